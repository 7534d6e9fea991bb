//! Producers as they really are, in Python: pika, aio-pika and kombu, each declaring the exchange itself or not.

use std::collections::BTreeSet;
use std::time::Duration;

use mail_parser::MessageParser;
use postroom_testkit::smtp::SmtpServer;

use crate::sends::account;
use crate::support::{Clients, World, eventually};

const LIMIT: Duration = Duration::from_mins(1);

/// Runs a script that publishes jobs with these names.
async fn produce(world: &World, clients: &Clients, script: &str, variables: &[(&str, &str)], names: &[&str]) {
    let edit = |command: &mut tokio::process::Command| {
        command.args(names).env("AMQP_URL", world.amqp_url());
        command.envs(variables.iter().copied());
    };
    clients.python_script(script, edit).await;
}

const DECLARES: (&str, &str) = ("DECLARES", "yes");

/// A script, its variables, and what its jobs are called.
type Run = (&'static str, Vec<(&'static str, &'static str)>, &'static str);

#[tokio::test]
async fn mail_of_pika_aio_pika_and_kombu_is_sent() {
    let clients = Clients::ready().await;
    let world = World::new().await;
    world.postroom(&["migrate"]).await.success();
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    // These come before any worker: they declare the exchange, and nothing of it is in our way later. A message without a
    // queue is returned to them, so they only declare.
    for script in ["with_pika.py", "with_aio_pika.py"] {
        produce(&world, &clients, script, &[DECLARES], &[]).await;
    }
    let worker = world.start_worker().await;
    let mut reports = world.reports().await;
    let compressed = |name| ("COMPRESSION", name);
    let runs: [Run; 10] = [
        ("with_pika.py", vec![], "pika"),
        ("with_pika.py", vec![DECLARES], "pika-declares"),
        ("with_aio_pika.py", vec![], "aio-pika"),
        ("with_aio_pika.py", vec![DECLARES], "aio-pika-declares"),
        ("with_kombu.py", vec![], "kombu"),
        ("with_kombu.py", vec![DECLARES], "kombu-declares"),
        ("with_kombu.py", vec![compressed("gzip")], "kombu-gzip"),
        (
            "with_kombu.py",
            vec![DECLARES, compressed("gzip")],
            "kombu-gzip-declares",
        ),
        ("with_kombu.py", vec![compressed("zlib")], "kombu-zlib"),
        (
            "with_kombu.py",
            vec![DECLARES, compressed("zlib")],
            "kombu-zlib-declares",
        ),
    ];
    let mut subjects = BTreeSet::new();
    for (script, variables, name) in &runs {
        let twice = [format!("{name}-1"), format!("{name}-2")];
        produce(&world, &clients, script, variables, &[&twice[0], &twice[1]]).await;
        for id in &twice {
            let report = reports.final_of(id).await;
            assert_eq!(report.kind(), "mail.sent", "{}", report.json);
            let correlation = if *script == "with_pika.py" {
                format!("pika/{id}")
            } else {
                id.clone()
            };
            assert_eq!(report.json["data"]["correlation_id"], *correlation);
            subjects.insert(format!("Grüße von {id}"));
        }
    }
    let received = server.received().into_iter().map(|mail| {
        let parsed = MessageParser::default().parse(&mail.data).unwrap();
        assert!(parsed.body_text(0).unwrap().starts_with("Hello from Python."));
        parsed.subject().unwrap().to_owned()
    });
    // Two of one producer may overtake each other.
    assert_eq!(received.collect::<BTreeSet<_>>(), subjects);
    assert_eq!(server.received_count(), 2 * runs.len());
    eventually(LIMIT, || async { world.depth("mail.jobs.low").await == 0 }).await;
    assert_eq!(world.depth("mail.jobs.dead").await, 0, "{}", worker.logs());
}
