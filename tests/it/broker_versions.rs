//! What RabbitMQ does differently from one version to the next, where it matters: held to be the same for us.

use std::time::Duration;

use lapin::BasicProperties;
use lapin::options::{BasicGetOptions, BasicRejectOptions};

use crate::broker_session::{Running, consume, publish_many};
use crate::support::{Private, RABBITMQ, World, eventually_some};

const LIMIT: Duration = Duration::from_mins(1);

/// Up to 4.2 the channel is closed, from 4.3 on the consumer is cancelled.
#[tokio::test]
async fn a_delivery_held_longer_than_the_broker_allows_comes_again() {
    let private = Private::start().await;
    private.configure_rabbitmq("[{rabbit, [{consumer_timeout, 3000}, {channel_tick_interval, 1000}]}].\n");
    private.halt(RABBITMQ).await;
    private.start_again(RABBITMQ).await;
    let world = World::on(private.servers()).await;
    let mut running = Running::start(world.broker_config());
    let first = running.session().await;
    publish_many(&world, 2).await;
    let mut consumer = consume(&first, 2).await;
    let held = consumer.next().await.unwrap();
    consumer.next().await.unwrap().receipt.ack();

    tokio::time::timeout(LIMIT, first.ended().cancelled())
        .await
        .unwrap();
    let second = running.session().await;
    let mut consumer = consume(&second, 2).await;
    let again = tokio::time::timeout(LIMIT, consumer.next())
        .await
        .unwrap()
        .unwrap();
    assert!(again.redelivered);
    assert_eq!(again.message_id(), held.message_id());
    // The old receipt is worth nothing, and does no harm.
    held.receipt.ack();
    again.receipt.ack();
    world.wait_depth("mail.jobs.low", 0).await;
    running.stop().await;
}

/// 4.x takes 16 MiB by default, and closes the channel of whoever publishes more.
#[tokio::test]
async fn the_largest_job_allowed_passes_through_the_queue_and_the_dead_letters() {
    let mut world = World::ready().await;
    world.set("POSTROOM_JOB_MAX_BYTES", "15MiB");
    let _worker = world.start_worker().await;
    let body = vec![b'{'; 15 << 20];
    world
        .publish_bytes(postroom::level::Level::High, "acme", &body)
        .await;
    world.wait_depth("mail.jobs.dead", 1).await;
    let dead = world.amqp().await.get("mail.jobs.dead").await.unwrap();
    assert_eq!(dead.data.len(), body.len());
}

/// 4.x drops after 20 deliveries what has no limit of its own.
#[tokio::test]
async fn looking_at_dead_letters_a_hundred_times_loses_none() {
    let world = World::ready().await;
    let amqp = world.amqp().await;
    amqp.publish("mail.dlx", "high.acme", BasicProperties::default(), b"{}")
        .await;
    world.wait_depth("mail.jobs.dead", 1).await;
    for _ in 0..100 {
        let message = eventually_some(LIMIT, async || {
            let options = BasicGetOptions::default();
            amqp.channel
                .basic_get("mail.jobs.dead".into(), options)
                .await
                .unwrap()
        })
        .await;
        let options = BasicRejectOptions { requeue: true };
        message.delivery.acker.reject(options).await.unwrap();
    }
    world.wait_depth("mail.jobs.dead", 1).await;
}
