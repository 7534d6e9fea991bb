//! The programs of docs/publishing.md, as they stand there: each says so when nobody wants its job, publishes it as the
//! page asks, and may do so twice.

use std::time::Duration;

use lapin::ExchangeKind;
use lapin::message::Delivery;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use postroom::level::Level;
use postroom_testkit::smtp::SmtpServer;
use serde_json::json;

use crate::sends::account;
use crate::support::{Clients, World, eventually_some};

const PAGE: &str = "docs/publishing.md";
const JOB: &str = "order-4711/confirmation";
const LIMIT: Duration = Duration::from_mins(1);

/// Declares the exchange of jobs as a producer may, with no queue behind it.
async fn declare_exchange(world: &World) {
    let options = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let channel = &world.amqp().await.channel;
    let (name, arguments) = (world.topology().jobs_exchange(), FieldTable::default());
    let declared = channel.exchange_declare(name.into(), ExchangeKind::Topic, options, arguments);
    declared.await.unwrap();
}

/// A queue that gets every job too.
async fn listen(world: &World) -> String {
    let channel = &world.amqp().await.channel;
    let options = QueueDeclareOptions {
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    let queue = channel.queue_declare("".into(), options, FieldTable::default());
    let name = queue.await.unwrap().name().clone();
    let exchange = world.topology().jobs_exchange();
    let bound = channel.queue_bind(
        name.clone(),
        exchange.into(),
        "#".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    bound.await.unwrap();
    name.to_string()
}

fn assert_published_as_the_page_asks(message: &Delivery, name: &str) {
    let properties = &message.properties;
    let text = |value: &Option<lapin::types::ShortString>| value.as_ref().map(ToString::to_string);
    assert_eq!(message.routing_key.as_str(), "high.acme", "{name}");
    assert_eq!(properties.delivery_mode(), &Some(2), "{name}");
    assert_eq!(
        text(properties.content_type()).as_deref(),
        Some("application/json"),
        "{name}"
    );
    assert_eq!(text(properties.kind()).as_deref(), Some("mail.job.v1"), "{name}");
    let age = jiff::Timestamp::now().as_second() - properties.timestamp().unwrap() as i64;
    assert!((0..300).contains(&age), "{name}: {age} s old");
}

/// `complaint` is in what the program says when its job comes back.
async fn producer(name: &str, complaint: &str) {
    let clients = Clients::ready().await;
    let world = World::new().await;
    world.postroom(&["migrate"]).await.success();
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let program = clients.program(&world, PAGE, name);
    let variables = [("AMQP_URL", world.amqp_url())];

    declare_exchange(&world).await;
    let error = clients
        .run(&program, &variables)
        .await
        .expect_err("nobody wanted it");
    assert!(error.contains(complaint), "{error}");

    let _worker = world.start_worker().await;
    let queue = listen(&world).await;
    let mut reports = world.reports().await;
    for _ in 0..2 {
        clients.run(&program, &variables).await.unwrap();
        let amqp = world.amqp().await;
        let message = eventually_some(LIMIT, || amqp.get(&queue)).await;
        assert_published_as_the_page_asks(&message, name);
    }
    let report = reports.final_of(JOB).await;
    assert_eq!(report.kind(), "mail.sent", "{}", report.json);
    world.wait_depth("mail.jobs.high", 0).await;
    assert_eq!(server.received_count(), 1, "published twice, sent once");
}

#[tokio::test]
async fn the_producer_of_the_documentation_with_pika_works() {
    producer("pika_producer.py", "UnroutableError").await;
}

#[tokio::test]
async fn the_producer_of_the_documentation_with_aio_pika_works() {
    producer("aio_pika_producer.py", "PublishError").await;
}

#[tokio::test]
async fn the_producer_of_the_documentation_with_kombu_works() {
    producer("kombu_producer.py", "NO_ROUTE").await;
}

#[tokio::test]
async fn the_producer_of_the_documentation_with_amqplib_works() {
    producer("producer.mjs", "unroutable").await;
}

#[tokio::test]
async fn overrides_sealed_as_the_documentation_does_are_opened() {
    let clients = Clients::ready().await;
    let world = World::ready().await;
    world.postroom(&["tenant", "set", "acme"]).await.success();
    let server = SmtpServer::builder().start().await;
    let _worker = world.start_worker().await;
    let mut reports = world.reports().await;
    let settings = json!({"host": "127.0.0.1", "port": server.port(), "tls": "none"});
    let variables = [("OVERRIDE_KEY", world.variable("POSTROOM_OVERRIDE_KEYS"))];
    for (name, tenant, code) in [
        (
            "seal.py",
            "acme",
            "from seal import seal\nprint(seal(\"TENANT\", SERVER))",
        ),
        (
            "seal.mjs",
            "acme",
            "import { seal } from './seal.mjs';\nconsole.log(await seal('TENANT', SERVER));",
        ),
        (
            "seal.mjs",
            "other",
            "import { seal } from './seal.mjs';\nconsole.log(await seal('TENANT', SERVER));",
        ),
    ] {
        let program = clients.program(&world, PAGE, name);
        let code = code
            .replace("TENANT", tenant)
            .replace("SERVER", &settings.to_string());
        let token = clients.evaluate(&program, &code, &variables).await.unwrap();
        let id = format!("{name}/{tenant}");
        let job = json!({"id": id, "tenant": "acme", "from": "ann@own.example", "to": "bob@example.org", "text": "t",
            "smtp_override": token.trim()});
        world.publish(Level::High, "acme", &job).await;
        let report = reports.final_of(&id).await;
        let expected = if tenant == "acme" {
            "mail.sent"
        } else {
            "mail.failed"
        };
        assert_eq!(report.kind(), expected, "{}", report.json);
    }
    assert_eq!(server.received_count(), 2);
}
