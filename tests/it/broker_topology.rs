//! The topology as a broker sees it.

use lapin::BasicProperties;
use postroom::broker::{self, Topology};
use postroom::level::Level;

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
