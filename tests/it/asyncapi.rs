//! `schema/asyncapi.v1.json` is valid AsyncAPI, and says what the topology and the schemas say.

use std::path::Path;

use postroom::broker::Topology;
use postroom::level::Level;
use serde_json::{Value, json};

use crate::support::Clients;

fn load(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn schema(file: &str) -> Value {
    load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("schema").join(file))
}

fn document() -> Value {
    schema("asyncapi.v1.json")
}

#[tokio::test]
async fn the_asyncapi_document_is_valid() {
    let clients = Clients::ready().await;
    let specification = load(&clients.node_modules().join("@asyncapi/specs/schemas/3.0.0.json"));
    let validator = jsonschema::draft7::options().build(&specification).unwrap();
    let errors = |document: &Value| -> Vec<String> {
        let errors = validator.iter_errors(document);
        errors
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect()
    };
    assert_eq!(errors(&document()), Vec::<String>::new());
    for (pointer, wrong) in [
        ("/channels/jobs/bindings/amqp/is", json!("exchange")),
        ("/operations/sendReports/action", json!("publish")),
        ("/components/messages/job/payload", json!({"schema": 1})),
    ] {
        let mut broken = document();
        *broken.pointer_mut(pointer).unwrap() = wrong;
        assert!(!errors(&broken).is_empty(), "{pointer}");
    }
}

/// Every value of `$ref`.
fn references(value: &Value) -> Vec<&str> {
    let inner: Vec<&Value> = match value {
        Value::Object(fields) => fields.values().collect(),
        Value::Array(items) => items.iter().collect(),
        _ => Vec::new(),
    };
    let own = value.get("$ref").and_then(Value::as_str);
    own.into_iter()
        .chain(inner.into_iter().flat_map(references))
        .collect()
}

#[test]
fn what_the_asyncapi_document_refers_to_is_there() {
    let document = document();
    let references = references(&document);
    assert!(references.len() > 10);
    for reference in references {
        match reference.strip_prefix('#') {
            Some(pointer) => assert!(document.pointer(pointer).is_some(), "{reference}"),
            None => assert!(schema(reference).is_object(), "{reference}"),
        }
    }
}

#[test]
fn the_asyncapi_document_has_the_exchanges_and_levels_of_the_topology() {
    let document = document();
    let topology = Topology::new("mail", &[]);
    let declared = topology.definitions("/");
    for (channel, exchange) in [
        ("jobs", topology.jobs_exchange()),
        ("reports", topology.reports_exchange()),
    ] {
        let exchanges = declared["exchanges"].as_array().unwrap();
        let declared = exchanges.iter().find(|e| e["name"] == exchange.as_str()).unwrap();
        let described = &document["channels"][channel]["bindings"]["amqp"]["exchange"];
        assert_eq!(
            *described,
            json!({"name": declared["name"], "type": declared["type"], "durable": declared["durable"],
                "autoDelete": declared["auto_delete"]})
        );
    }
    let levels: Vec<_> = Level::ALL.iter().map(ToString::to_string).collect();
    assert_eq!(
        document["channels"]["jobs"]["parameters"]["level"]["enum"],
        json!(levels)
    );
}
