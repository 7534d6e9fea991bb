//! A broker that dies and returns.

use std::time::Duration;

use postroom::broker::{Properties, PublishError};

use crate::broker_session::{Running, consume, publish_many};
use crate::support::{Private, RABBITMQ, World, eventually};

const LIMIT: Duration = Duration::from_mins(1);

#[tokio::test]
async fn after_a_crash_of_the_broker_everything_goes_on_by_itself() {
    let private = Private::start().await;
    let world = World::on(private.servers()).await;
    let mut running = Running::start(world.broker_config());
    let first = running.session().await;
    publish_many(&world, 10).await;
    let mut consumer = consume(&first, 4).await;
    let held = consumer.next().await.unwrap();
    let publisher = running.supervisor.publisher();

    private.kill(RABBITMQ).await;
    tokio::time::timeout(LIMIT, first.ended().cancelled())
        .await
        .unwrap();
    assert!(consumer.next().await.is_none());
    held.receipt.ack();
    eventually(LIMIT, || async { !*running.supervisor.connected().borrow() }).await;
    let error = publisher
        .publish("mail.jobs", "low.acme", Properties::default(), b"{}")
        .await
        .unwrap_err();
    assert!(matches!(error, PublishError::NotConnected), "{error}");

    private.start_again(RABBITMQ).await;
    let second = running.session().await;
    let mut consumer = consume(&second, 4).await;
    for _ in 0..10 {
        let delivery = tokio::time::timeout(LIMIT, consumer.next())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(delivery.generation, second.generation());
        delivery.receipt.ack();
    }
    publisher
        .publish("mail.jobs", "high.acme", Properties::default(), b"{}")
        .await
        .unwrap();
    running.stop().await;
}
