//! `schema/` and the code say the same.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::{Value, json};

use super::refused::invalid;
use super::{minimal, read_value, with};
use crate::config::JobLimits;
use crate::failure::{Class, Failure, Fault, Stage};
use crate::id::AccountKey;
use crate::job::address::ADDRESS_FIELDS;
use crate::job::attachments::ATTACHMENT_FIELDS;
use crate::job::bounds;
use crate::job::fields::{JOB_FIELDS, LIST_UNSUBSCRIBE_FIELDS};
use crate::job::smtp_override::OVERRIDE_FIELDS;
use crate::report::{
    FieldError, LinkedFile, RecipientResult, RecipientStatus, Report, ReportData, ReportType, Sender,
    Timings, event_id,
};

fn load(file: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap()
}

fn job_schema() -> Value {
    load("schema/mail-job.v1.json")
}

fn validator(schema: &Value) -> Validator {
    jsonschema::draft202012::meta::validate(schema).unwrap();
    jsonschema::draft202012::options()
        .should_validate_formats(true)
        .build(schema)
        .unwrap()
}

/// Whether the published schema takes a job.
pub(super) fn schema_takes(job: &Value) -> bool {
    static VALIDATOR: LazyLock<Validator> = LazyLock::new(|| validator(&job_schema()));
    VALIDATOR.is_valid(job)
}

fn names(object: &Value) -> BTreeSet<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn the_schema_has_exactly_the_fields_of_the_decoder() {
    let schema = job_schema();
    for (pointer, fields) in [
        ("", JOB_FIELDS),
        ("/properties/list_unsubscribe", LIST_UNSUBSCRIBE_FIELDS),
        ("/$defs/address/anyOf/1", ADDRESS_FIELDS),
        ("/$defs/attachment", ATTACHMENT_FIELDS),
        ("/$defs/smtp_server", OVERRIDE_FIELDS),
    ] {
        let object = schema.pointer(pointer).unwrap();
        assert_eq!(
            names(&object["properties"]),
            fields.iter().copied().collect(),
            "{pointer}"
        );
        assert_eq!(object["additionalProperties"], json!(false), "{pointer}");
        for (name, property) in object["properties"].as_object().unwrap() {
            assert!(
                property["description"].is_string(),
                "{pointer}/{name} has no description"
            );
        }
    }
}

#[test]
fn the_schema_has_the_bounds_of_the_decoder() {
    let schema = job_schema();
    let limits = JobLimits::default();
    for (pointer, bound) in [
        ("/properties/to/anyOf/1/maxItems", limits.max_recipients),
        ("/properties/cc/anyOf/1/maxItems", limits.max_recipients),
        ("/properties/bcc/anyOf/1/maxItems", limits.max_recipients),
        ("/properties/reply_to/anyOf/1/maxItems", bounds::MAX_REPLY_TO),
        ("/properties/subject/maxLength", bounds::MAX_SUBJECT),
        ("/properties/headers/maxProperties", bounds::MAX_HEADERS),
        (
            "/properties/headers/propertyNames/maxLength",
            bounds::MAX_HEADER_NAME,
        ),
        (
            "/properties/headers/additionalProperties/maxLength",
            bounds::MAX_HEADER_VALUE,
        ),
        ("/properties/locale/maxLength", bounds::MAX_LOCALE),
        (
            "/properties/list_unsubscribe/properties/url/maxLength",
            bounds::MAX_LIST_URL,
        ),
        ("/properties/attachments/maxItems", limits.max_attachments),
        ("/properties/batch/maxLength", bounds::MAX_BATCH),
        ("/properties/tags/maxItems", bounds::MAX_TAGS),
        ("/properties/tags/items/maxLength", bounds::MAX_TAG),
        ("/$defs/address/anyOf/0/maxLength", bounds::MAX_ADDRESS_TEXT),
        (
            "/$defs/address/anyOf/1/properties/address/maxLength",
            bounds::MAX_ADDRESS,
        ),
        (
            "/$defs/address/anyOf/1/properties/name/maxLength",
            bounds::MAX_NAME,
        ),
        (
            "/$defs/attachment/properties/filename/maxLength",
            bounds::MAX_FILENAME,
        ),
        (
            "/$defs/attachment/properties/content_type/maxLength",
            bounds::MAX_CONTENT_TYPE,
        ),
        (
            "/$defs/attachment/properties/content_id/maxLength",
            bounds::MAX_CONTENT_ID,
        ),
        ("/$defs/attachment/properties/url/maxLength", bounds::MAX_URL),
        ("/$defs/smtp_server/properties/host/maxLength", bounds::MAX_HOST),
        (
            "/$defs/smtp_server/properties/username/maxLength",
            bounds::MAX_USERNAME,
        ),
        (
            "/$defs/smtp_server/properties/password/maxLength",
            bounds::MAX_PASSWORD,
        ),
        ("/$defs/sealed/maxLength", bounds::MAX_SEALED),
    ] {
        assert_eq!(schema.pointer(pointer), Some(&json!(bound)), "{pointer}");
    }
    let described = schema["description"].as_str().unwrap();
    assert!(described.contains(&format!("at most {} bytes", bounds::MAX_METADATA)));
}

#[test]
fn every_example_is_valid_for_schema_and_decoder() {
    let schema = job_schema();
    let validator = validator(&schema);
    let mut jobs: Vec<Value> = schema["examples"].as_array().unwrap().clone();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/jobs");
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        jobs.push(serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap());
    }
    assert!(jobs.len() >= 9);
    jobs.push(minimal());
    jobs.push(with(
        json!({"smtp_override": "eyJhbGciOiJkaXIifQ..aXY.Y2lwaGVy.dGFn", "tags": null, "cc": []}),
    ));
    for job in jobs {
        if let Err(error) = validator.validate(&job) {
            panic!("{job}: {error}");
        }
        if let Err(rejection) = read_value(&job) {
            panic!("{job}: {rejection}");
        }
    }
}

#[test]
fn what_the_decoder_refuses_the_schema_refuses() {
    let validator = validator(&job_schema());
    for (change, pointer, _) in invalid() {
        let job = with(change);
        assert!(!validator.is_valid(&job), "{pointer}: {job}");
        assert!(read_value(&job).is_err());
    }
}

/// A report with every field set.
fn full(kind: ReportType) -> Report {
    let now = "2026-11-21T09:30:00.5Z".parse().unwrap();
    let mut data = ReportData {
        job: Some("1".parse().unwrap()),
        tenant: "acme".parse().unwrap(),
        account: Some("main".into()),
        sender: Some(Sender {
            via: "platform",
            account: Some(AccountKey::from_stored("-/main")),
            reason: Some("unhealthy"),
        }),
        attempt: 2,
        message_id: Some("<1@acme.example>".into()),
        recipients: [
            RecipientStatus::Accepted,
            RecipientStatus::Deferred,
            RecipientStatus::Refused,
            RecipientStatus::Pending,
        ]
        .into_iter()
        .map(|status| RecipientResult {
            status,
            code: Some(250),
            enhanced_code: Some("2.0.0".into()),
            text: Some("ok".into()),
            ..RecipientResult::pending("ann@example.org")
        })
        .collect(),
        partial: true,
        reason: None,
        detail: None,
        class: None,
        fault: None,
        stage: None,
        errors: vec![FieldError {
            pointer: "/to".into(),
            message: "no".into(),
        }],
        is_final: kind.is_final(),
        sequence: 3,
        correlation_id: Some("c".into()),
        traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()),
        next_attempt_at: Some(now),
        uncertain_attempts: 1,
        timings: Some(Timings {
            total_ms: 10,
            smtp_ms: Some(5),
        }),
        batch: Some("b".to_owned()),
        tags: vec!["t".to_owned()],
        metadata: Some(json!({"a": 1})),
        links: vec![LinkedFile {
            filename: "f".to_owned(),
            size: 1,
            expires_at: Some(now),
        }],
    };
    data.blame(&Failure::permanent(
        Class::Rate,
        Fault::Provider,
        Stage::RcptTo,
        "x",
        "y",
    ));
    Report {
        id: event_id("acme", "job", "1", "3"),
        kind: kind.as_str(),
        timestamp: now,
        data,
    }
}

/// A report with nothing set that need not be.
fn bare(kind: ReportType) -> Report {
    let full = full(kind);
    Report {
        data: ReportData {
            job: None,
            account: None,
            sender: None,
            attempt: 0,
            message_id: None,
            recipients: Vec::new(),
            partial: false,
            reason: None,
            detail: None,
            class: None,
            fault: None,
            stage: None,
            errors: Vec::new(),
            correlation_id: None,
            traceparent: None,
            next_attempt_at: None,
            uncertain_attempts: 0,
            timings: None,
            batch: None,
            tags: Vec::new(),
            metadata: None,
            links: Vec::new(),
            ..full.data
        },
        ..full
    }
}

#[test]
fn every_report_we_write_is_valid() {
    let schema = load("schema/mail-report.v1.json");
    let validator = validator(&schema);
    for kind in ReportType::ALL {
        for report in [full(kind), bare(kind)] {
            let report = serde_json::to_value(report).unwrap();
            if let Err(error) = validator.validate(&report) {
                panic!("{report}: {error}");
            }
        }
    }
    for example in schema["examples"].as_array().unwrap() {
        assert!(validator.is_valid(example), "{example}");
    }
}

#[test]
fn the_report_schema_has_exactly_the_fields_we_write() {
    let schema = load("schema/mail-report.v1.json");
    let report = serde_json::to_value(full(ReportType::Sent)).unwrap();
    let bare = serde_json::to_value(bare(ReportType::Sent)).unwrap();
    for (value, place) in [
        ("", ""),
        ("/data", "/$defs/job_data"),
        ("/data/sender", "/$defs/job_data/properties/sender"),
        (
            "/data/recipients/0",
            "/$defs/job_data/properties/recipients/items",
        ),
        ("/data/errors/0", "/$defs/job_data/properties/errors/items"),
        ("/data/timings", "/$defs/job_data/properties/timings"),
        ("/data/links/0", "/$defs/job_data/properties/links/items"),
    ] {
        let properties = schema.pointer(&format!("{place}/properties")).unwrap();
        let mut described = names(properties);
        // Marks of the bridge, which cuts what is too long for a webhook.
        described.retain(|name| !name.ends_with("truncated"));
        assert_eq!(described, names(report.pointer(value).unwrap()), "{place}");
    }
    for required in schema["$defs"]["job_data"]["required"].as_array().unwrap() {
        assert!(
            bare["data"].get(required.as_str().unwrap()).is_some(),
            "{required}"
        );
    }
    let types: BTreeSet<_> = schema
        .pointer("/properties/type/anyOf/0/oneOf")
        .unwrap()
        .as_array()
        .unwrap()
        .iter()
        .map(|kind| kind["const"].as_str().unwrap())
        .collect();
    let read =
        |file: &str| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let (ledger, bridge) = (
        read("schema/migrations/V2__ledger.sql"),
        read("src/bridge/disable.rs"),
    );
    let of_the_ledger = ledger.split('\'').filter(|text| {
        let word = text.strip_prefix("account.").unwrap_or_default();
        !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase())
    });
    let of_the_bridge = bridge.split('"').filter(|text| text.starts_with("endpoint."));
    let jobs = ReportType::ALL.iter().map(|kind| kind.as_str());
    let written = jobs.chain(of_the_ledger).chain(of_the_bridge);
    assert_eq!(types, written.collect());
    let known = schema.pointer("/properties/type/anyOf/1/not/enum").unwrap();
    let known = known
        .as_array()
        .unwrap()
        .iter()
        .map(|kind| kind.as_str().unwrap());
    assert_eq!(types, known.collect());
}

#[test]
fn data_is_checked_by_the_type_of_its_report() {
    let validator = validator(&load("schema/mail-report.v1.json"));
    let report =
        |kind: &str, data: Value| json!({"type": kind, "timestamp": "2026-11-21T09:40:00Z", "data": data});
    let full = serde_json::to_value(full(ReportType::Sent)).unwrap();
    let unhealthy = json!({"tenant": "acme", "account": "main", "since": "2026-11-21T09:40:00Z", "class": "auth",
        "reason": "auth_refused", "faults": 5, "next_attempt_at": "2026-11-21T09:41:00Z"});
    let recovered = json!({"tenant": "acme", "account": "main", "since": "2026-11-21T09:40:00Z"});
    let disabled = json!({"tenant": "acme", "endpoint": "default", "reason": "gone"});
    for (kind, data, valid) in [
        ("mail.sent", &full["data"], true),
        ("mail.sent", &recovered, false),
        ("account.unhealthy", &unhealthy, true),
        ("account.unhealthy", &recovered, false),
        ("account.recovered", &recovered, true),
        ("account.recovered", &disabled, false),
        ("endpoint.disabled", &disabled, true),
        ("endpoint.disabled", &recovered, false),
        ("endpoint.added_later", &json!({"tenant": "acme", "new": 1}), true),
    ] {
        assert_eq!(
            validator.is_valid(&report(kind, data.clone())),
            valid,
            "{kind}: {data}"
        );
    }
}

#[test]
fn consumers_may_meet_types_and_fields_they_do_not_know() {
    let validator = validator(&load("schema/mail-report.v1.json"));
    let mut report = serde_json::to_value(full(ReportType::Sent)).unwrap();
    report["type"] = json!("mail.bounced");
    report["data"]["new"] = json!(1);
    assert!(validator.is_valid(&report));
}
