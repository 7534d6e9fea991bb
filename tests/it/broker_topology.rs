//! The topology as a broker sees it.

use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use postroom::broker::{self, Topology};
use postroom::level::Level;
use reqwest::Method;
use serde_json::json;

use crate::support::World;

#[tokio::test]
async fn what_is_missing_is_declared_and_a_second_time_nothing_is() {
    let world = World::new().await;
    let connection = broker::connect(&world.broker_config(), "test").await.unwrap();
    let topology = world.topology();

    let error = topology.check(&connection).await.unwrap_err().to_string();
    assert!(error.contains("missing: exchange mail.unroutable"), "{error}");
    assert!(error.contains("queue mail.jobs.low"), "{error}");

    let first = topology.apply(&connection).await.unwrap();
    assert_eq!(first.created.len(), 6 + 8, "{first:?}");
    let second = topology.apply(&connection).await.unwrap();
    assert_eq!((second.created.len(), second.present), (0, 6 + 8));
    topology.check(&connection).await.unwrap();
}

#[tokio::test]
async fn the_queue_of_the_bridge_is_bound_when_it_is_declared_and_by_workers_never_again() {
    const KEY: &str = "report.acme.mail.sent";
    let world = World::new().await;
    world.postroom(&["migrate"]).await.success();
    let mut worker = world.start_worker().await;
    let amqp = world.amqp().await;
    let report = async || {
        amqp.publish("mail.reports", KEY, BasicProperties::default(), b"{}")
            .await;
    };
    report().await;
    world.wait_depth("mail.reports.bridge", 1).await;
    worker.term().await;

    let connection = broker::connect(&world.broker_config(), "test").await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let (queue, exchange) = ("mail.reports.bridge", "mail.reports");
    channel
        .queue_unbind(
            queue.into(),
            exchange.into(),
            "report.#".into(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    let mut worker = world.start_worker().await;
    report().await;
    world.wait_depth("mail.unroutable", 1).await;
    assert_eq!(world.depth(queue).await, 1);
    worker.term().await;
    // Who wants it back says so.
    world.postroom(&["topology", "apply"]).await.success();
    report().await;
    world.wait_depth(queue, 2).await;
}

/// Lets a user of the broker declare what this expression names.
async fn let_declare(world: &World, user: &str, what: &str) {
    let rights = json!({"configure": what, "write": ".*", "read": ".*"}).to_string();
    let path = format!("permissions/{}/{user}", world.scratch().name());
    let servers = world.scratch().servers();
    servers
        .management(Method::PUT, &path, Some(&rights))
        .await
        .unwrap();
}

#[tokio::test]
async fn the_queue_of_the_bridge_is_bound_also_where_another_queue_was_refused_at_first() {
    let world = World::new().await;
    let servers = world.scratch().servers();
    let user = world.scratch().name();
    let (path, account) = (format!("users/{user}"), r#"{"password": "pw", "tags": ""}"#);
    servers
        .management(Method::PUT, &path, Some(account))
        .await
        .unwrap();
    let_declare(&world, user, r"^mail\.(?!jobs\.dead$)").await;
    let mut config = world.broker_config();
    let mut url = url::Url::parse(world.amqp_url()).unwrap();
    url.set_username(user).unwrap();
    url.set_password(Some("pw")).unwrap();
    config.url = url.to_string().into();
    let connection = broker::connect(&config, "test").await.unwrap();
    let topology = world.topology().leaving_reports();
    let error = topology.apply(&connection).await.unwrap_err().to_string();
    assert!(error.contains("not permitted: queue mail.jobs.dead"), "{error}");

    let_declare(&world, user, ".*").await;
    let connection = broker::connect(&config, "test").await.unwrap();
    topology.apply(&connection).await.unwrap();
    let amqp = world.amqp().await;
    amqp.publish(
        "mail.reports",
        "report.acme.mail.sent",
        BasicProperties::default(),
        b"{}",
    )
    .await;
    world.wait_depth("mail.reports.bridge", 1).await;
    servers.management(Method::DELETE, &path, None).await.unwrap();
}

#[tokio::test]
async fn a_worker_does_not_start_where_a_queue_differs() {
    let world = World::new().await;
    world.postroom(&["migrate"]).await.success();
    let connection = broker::connect(&world.broker_config(), "test").await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let durable = QueueDeclareOptions {
        durable: true,
        ..QueueDeclareOptions::default()
    };
    channel
        .queue_declare("mail.jobs.low".into(), durable, FieldTable::default())
        .await
        .unwrap();
    let mut worker = world.spawn(&["worker"]);
    assert_eq!(worker.wait().await.code(), Some(1), "{}", worker.logs());
    let logs = worker.logs();
    assert!(logs.contains("different: queue mail.jobs.low"), "{logs}");
}

#[tokio::test]
async fn a_key_without_a_level_waits_among_the_unroutable() {
    let world = World::new().await;
    world.apply_topology().await;
    let amqp = world.amqp().await;
    amqp.publish("mail.jobs", "urgent.acme", BasicProperties::default(), b"?")
        .await;
    world.wait_depth("mail.unroutable", 1).await;
}

#[tokio::test]
async fn a_dedicated_queue_gets_its_tenant_and_nobody_else() {
    let world = World::new().await;
    let connection = broker::connect(&world.broker_config(), "test").await.unwrap();
    let topology = Topology::new("mail", &[(Level::Low, "mail.jobs.low.acme".to_owned())]);
    topology.apply(&connection).await.unwrap();

    let amqp = world.amqp().await;
    for key in ["low.acme", "low.other", "high.acme"] {
        amqp.publish("mail.jobs", key, BasicProperties::default(), b"{}")
            .await;
    }
    world.wait_depth("mail.jobs.low.acme", 1).await;
    world.wait_depth("mail.jobs.low", 1).await;
    world.wait_depth("mail.jobs.high", 1).await;
}
