//! Sessions, consumers, acknowledgements and confirms against a real broker.

use std::sync::Arc;
use std::time::Duration;

use lapin::BasicProperties;
use postroom::broker::{
    BrokerError, Consumer, DeadLetter, Properties, PublishError, Publisher, Session, Subscription, Supervisor,
};
use postroom::config;
use postroom::level::Level;
use postroom::telemetry::metrics::Metrics;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::{World, eventually, eventually_some, producers_names};

const QUEUE: &str = "mail.jobs.low";
/// RabbitMQ, killed and started again on a busy machine, takes longer than half a minute until it lets anybody in.
const LIMIT: Duration = Duration::from_secs(90);

/// A supervisor that hands its sessions to the test.
pub(crate) struct Running {
    pub(crate) supervisor: Arc<Supervisor>,
    sessions: mpsc::UnboundedReceiver<Session>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), BrokerError>>,
}

impl Running {
    pub(crate) fn start(config: config::Broker) -> Self {
        let metrics = Arc::new(Metrics::new().unwrap());
        let supervisor = Arc::new(Supervisor::new(config, metrics));
        let (sender, sessions) = mpsc::unbounded_channel();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn({
            let (supervisor, shutdown) = (Arc::clone(&supervisor), shutdown.clone());
            async move {
                let serve = |session: Session| {
                    let (sender, shutdown) = (sender.clone(), shutdown.clone());
                    async move {
                        sender.send(session.clone()).unwrap();
                        tokio::select! {
                            () = session.ended().cancelled() => {}
                            () = shutdown.cancelled() => {}
                        }
                        Ok(())
                    }
                };
                supervisor.run(&shutdown, serve).await
            }
        });
        Self {
            supervisor,
            sessions,
            shutdown,
            task,
        }
    }

    pub(crate) async fn session(&mut self) -> Session {
        tokio::time::timeout(LIMIT, self.sessions.recv())
            .await
            .unwrap()
            .unwrap()
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(LIMIT, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

pub(crate) async fn consume(session: &Session, prefetch: u16) -> Consumer {
    let subscription = Subscription {
        queue: QUEUE.into(),
        level: Some(Level::Low),
        prefetch,
    };
    session.consume(subscription).await.unwrap()
}

pub(crate) async fn publish_many(world: &World, count: usize) {
    for number in 0..count {
        let properties = BasicProperties::default().with_message_id(number.to_string().into());
        world
            .amqp()
            .await
            .publish("mail.jobs", "low.acme", properties, b"{}")
            .await;
    }
}

/// Ready and unacknowledged messages, as the broker counts them; its statistics lag behind.
async fn wait_messages(world: &World, queue: &str, count: u64) {
    eventually(LIMIT, || async {
        let path = format!("queues/{}/{queue}", world.scratch().name());
        let servers = world.scratch().servers();
        let answer = servers
            .management(reqwest::Method::GET, &path, None)
            .await
            .unwrap();
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        answer["messages"].as_u64() == Some(count)
    })
    .await;
}

#[tokio::test]
async fn deliveries_carry_what_the_producer_said() {
    let world = World::new().await;
    let mut running = Running::start(world.broker_config());
    let session = running.session().await;
    let mut headers = lapin::types::FieldTable::default();
    headers.insert(
        "traceparent".into(),
        lapin::types::AMQPValue::LongString("00-1".into()),
    );
    let properties = BasicProperties::default()
        .with_message_id("m".into())
        .with_correlation_id("c".into())
        .with_content_type("application/json".into())
        .with_content_encoding("gzip".into())
        .with_type("mail.job.v1".into())
        .with_timestamp(1_700_000_000)
        .with_headers(headers);
    world
        .amqp()
        .await
        .publish("mail.jobs", "low.acme", properties, b"body")
        .await;

    let delivery = consume(&session, 10).await.next().await.unwrap();
    assert_eq!(delivery.level, Some(Level::Low));
    assert_eq!(&*delivery.queue, QUEUE);
    assert_eq!(delivery.generation, 1);
    assert_eq!(delivery.message_id(), Some("m"));
    assert_eq!(delivery.correlation_id(), Some("c"));
    assert_eq!(delivery.content_type(), Some("application/json"));
    assert_eq!(delivery.content_encoding(), Some("gzip"));
    assert_eq!(delivery.kind(), Some("mail.job.v1"));
    assert_eq!(delivery.timestamp(), Some(1_700_000_000));
    assert_eq!(delivery.header("traceparent"), Some("00-1"));
    assert_eq!(
        (delivery.exchange.as_str(), delivery.routing_key.as_str()),
        ("mail.jobs", "low.acme")
    );
    assert!(!delivery.redelivered && !delivery.came_through_default_exchange());
    assert_eq!(&delivery.body[..], b"body");
    running.stop().await;
}

#[tokio::test]
async fn one_unfinished_delivery_does_not_stop_the_others() {
    let world = World::new().await;
    let mut running = Running::start(world.broker_config());
    let session = running.session().await;
    publish_many(&world, 200).await;
    let mut consumer = consume(&session, 16).await;

    // The first is held: with prefix acknowledgements alone the prefetch would fill up at 16.
    let held = consumer.next().await.unwrap();
    for _ in 1..200 {
        let delivery = tokio::time::timeout(LIMIT, consumer.next())
            .await
            .unwrap()
            .unwrap();
        delivery.receipt.ack();
    }
    wait_messages(&world, QUEUE, 1).await;
    held.receipt.ack();
    wait_messages(&world, QUEUE, 0).await;
    running.stop().await;
}

#[tokio::test]
async fn what_is_given_back_or_dropped_comes_again() {
    let world = World::new().await;
    let mut running = Running::start(world.broker_config());
    let session = running.session().await;
    publish_many(&world, 3).await;
    let mut consumer = consume(&session, 10).await;
    consumer.next().await.unwrap().receipt.give_back();
    drop(consumer.next().await.unwrap());
    consumer.next().await.unwrap().receipt.ack();
    for _ in 0..2 {
        let delivery = tokio::time::timeout(LIMIT, consumer.next())
            .await
            .unwrap()
            .unwrap();
        assert!(delivery.redelivered);
        delivery.receipt.ack();
    }
    running.stop().await;
    wait_messages(&world, QUEUE, 0).await;
}

#[tokio::test]
async fn after_stop_the_buffered_deliveries_come_out_and_acknowledgements_are_written() {
    let world = World::new().await;
    let mut running = Running::start(world.broker_config());
    let session = running.session().await;
    publish_many(&world, 30).await;
    let mut consumer = consume(&session, 10).await;
    consumer.next().await.unwrap().receipt.ack();
    consumer.stop().await.unwrap();
    let mut drained = 0;
    while let Some(delivery) = tokio::time::timeout(LIMIT, consumer.next()).await.unwrap() {
        drained += 1;
        delivery.receipt.give_back();
    }
    assert!((9..=10).contains(&drained), "{drained}");
    assert!(!session.ended().is_cancelled());
    running.stop().await;
    world.wait_depth(QUEUE, 29).await;
}

#[tokio::test]
async fn a_lost_connection_ends_the_session_and_a_new_one_begins() {
    let world = World::new().await;
    let mut running = Running::start(world.broker_config());
    let first = running.session().await;
    publish_many(&world, 1).await;
    let mut consumer = consume(&first, 10).await;
    let stale = consumer.next().await.unwrap();
    let connected = running.supervisor.connected();
    assert!(*connected.borrow());

    // The session's two and the test's own.
    let all = eventually_some(LIMIT, || async {
        let all = world.scratch().connections().await.unwrap();
        (all.len() >= 3).then_some(all)
    })
    .await;
    world.scratch().close_connections(&all).await.unwrap();
    tokio::time::timeout(LIMIT, first.ended().cancelled())
        .await
        .unwrap();
    assert!(consumer.next().await.is_none());

    let second = running.session().await;
    assert!(second.generation() > first.generation());
    // Without effect, and above all without harm to the new session's deliveries.
    stale.receipt.ack();
    let mut consumer = consume(&second, 10).await;
    let again = tokio::time::timeout(LIMIT, consumer.next())
        .await
        .unwrap()
        .unwrap();
    assert!(again.redelivered);
    assert_eq!(again.generation, second.generation());
    again.receipt.ack();
    let publisher = running.supervisor.publisher();
    eventually(LIMIT, || async {
        publisher
            .publish("mail.jobs", "high.acme", Properties::default(), b"{}")
            .await
            .is_ok()
    })
    .await;
    assert!(!second.ended().is_cancelled());
    running.stop().await;
    wait_messages(&world, QUEUE, 0).await;
}

#[tokio::test]
async fn a_deleted_queue_ends_the_session_and_is_declared_again() {
    let world = World::new().await;
    let mut running = Running::start(world.broker_config());
    let first = running.session().await;
    let mut consumer = consume(&first, 10).await;
    let channel = &world.amqp().await.channel;
    channel
        .queue_delete(QUEUE.into(), lapin::options::QueueDeleteOptions::default())
        .await
        .unwrap();
    assert!(
        tokio::time::timeout(LIMIT, consumer.next())
            .await
            .unwrap()
            .is_none()
    );
    assert!(first.ended().is_cancelled());
    running.session().await;
    assert_eq!(world.depth(QUEUE).await, 0);
    running.stop().await;
}

#[tokio::test]
async fn publishing_is_confirmed_by_many_callers_at_once() {
    let world = World::new().await;
    let mut running = Running::start(world.broker_config());
    let session = running.session().await;
    let publishes = (0..500).map(|_| {
        let publisher = session.publisher().clone();
        async move {
            publisher
                .publish("mail.jobs", "low.acme", Properties::default(), b"{}")
                .await
        }
    });
    for published in futures_util::future::join_all(publishes).await {
        published.unwrap();
    }
    world.wait_depth(QUEUE, 500).await;
    running.stop().await;
}

#[tokio::test]
async fn a_message_no_queue_wants_is_not_called_stored() {
    let world = World::new().await;
    let mut running = Running::start(world.broker_config());
    let session = running.session().await;
    // Without the alternate exchange that catches everything in a complete topology.
    let channel = &world.amqp().await.channel;
    channel
        .exchange_declare(
            "bare".into(),
            lapin::ExchangeKind::Topic,
            lapin::options::ExchangeDeclareOptions::default(),
            lapin::types::FieldTable::default(),
        )
        .await
        .unwrap();
    let properties = Properties::default().with_message_id("lonely".into());
    let error = session
        .publisher()
        .publish("bare", "nobody", properties, b"{}")
        .await
        .unwrap_err();
    assert!(matches!(error, PublishError::Returned { .. }), "{error}");
    // The next one is not mistaken for it.
    session
        .publisher()
        .publish("mail.jobs", "low.acme", Properties::default(), b"{}")
        .await
        .unwrap();
    running.stop().await;
}

#[tokio::test]
async fn without_a_session_publishing_fails_at_once() {
    let world = World::new().await;
    let metrics = Arc::new(Metrics::new().unwrap());
    let supervisor = Supervisor::new(world.broker_config(), metrics);
    let error = supervisor
        .publisher()
        .publish("mail.jobs", "low.acme", Properties::default(), b"{}")
        .await
        .unwrap_err();
    assert!(matches!(error, PublishError::NotConnected), "{error}");
}

#[tokio::test]
async fn a_broker_that_is_down_is_waited_for_until_shutdown() {
    let world = World::new().await;
    let mut config = world.broker_config();
    // Nothing listens on port 1.
    config.url = "amqp://127.0.0.1:1".into();
    let supervisor = Supervisor::new(config, Arc::new(Metrics::new().unwrap()));
    let shutdown = CancellationToken::new();
    let running = supervisor.run(&shutdown, |_| async { Ok(()) });
    let stop = async {
        assert!(!*supervisor.connected().borrow());
        shutdown.cancel();
    };
    let (ended, ()) = tokio::time::timeout(LIMIT, async { tokio::join!(running, stop) })
        .await
        .unwrap();
    ended.unwrap();
}

#[tokio::test]
async fn a_dead_letter_carries_its_reason_and_only_the_producers_headers() {
    let world = World::new().await;
    let mut running = Running::start(world.broker_config());
    let session = running.session().await;
    // Straight to the queue, as some producers do: the key says nothing then.
    world
        .amqp()
        .await
        .publish(
            "",
            QUEUE,
            BasicProperties::default().with_expiration("600000".into()),
            b"{",
        )
        .await;
    let mut consumer = consume(&session, 10).await;
    // A redelivery adds headers of the broker.
    consumer.next().await.unwrap().receipt.give_back();
    let delivery = consumer.next().await.unwrap();
    let letter = DeadLetter {
        reason: "invalid_json",
        detail: "expected\na value",
        tenant: Some("acme"),
        ..DeadLetter::default()
    };
    let publisher: &Publisher = session.publisher();
    publisher
        .dead_letter(running.supervisor.topology(), &delivery, &letter)
        .await
        .unwrap();
    delivery.receipt.ack();

    let amqp = world.amqp().await;
    let dead = eventually_some(LIMIT, || amqp.get("mail.jobs.dead")).await;
    assert_eq!(dead.routing_key.as_str(), "low.acme");
    assert_eq!(dead.data, b"{");
    assert_eq!(dead.properties.expiration(), &None);
    let headers = dead.properties.headers().clone().unwrap();
    assert_eq!(
        producers_names(&headers),
        ["x-dead-detail", "x-dead-reason", "x-dead-source", "x-dead-ts"]
    );
    let text = |name: &str| postroom::broker::consumer::header_text(&headers, name).unwrap();
    assert_eq!(text("x-dead-reason"), "invalid_json");
    assert_eq!(text("x-dead-detail"), "expected a value");
    assert_eq!(text("x-dead-source"), QUEUE);
    running.stop().await;
    wait_messages(&world, QUEUE, 0).await;
}
