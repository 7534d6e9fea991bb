//! The operator's commands about the broker.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use postroom::broker::{self, BrokerError};
use postroom::cli::dead::{self, DeadCommand, DeadError, DeadQueue, Filter, Replay};
use postroom::cli::send::{self, SendArgs};
use postroom::cli::topology::{self, TopologyCommand};
use postroom::level::Level;
use serde_json::{Value, json};

use crate::support::{World, producers_names};

fn sealed(text: &str) -> Result<Vec<u8>, String> {
    let opened = text.strip_prefix("sealed:").ok_or("not sealed")?;
    Ok(opened.as_bytes().to_vec())
}

async fn dead(world: &World, command: DeadCommand) -> Result<String, DeadError> {
    let mut out = Vec::new();
    dead::run(&command, &world.broker_config(), &sealed, &mut out).await?;
    Ok(String::from_utf8(out).unwrap())
}

fn replay(filter: Filter) -> DeadCommand {
    DeadCommand::Replay(Replay { filter, level: None })
}

fn replay_unroutable(level: Option<Level>) -> DeadCommand {
    let filter = Filter {
        queue: DeadQueue::Unroutable,
        all: true,
        ..Filter::default()
    };
    DeadCommand::Replay(Replay { filter, level })
}

async fn put_dead(world: &World, key: &str, headers: &[(&str, &str)], body: &str) {
    let mut table = FieldTable::default();
    for (name, value) in headers {
        table.insert((*name).into(), AMQPValue::LongString((*value).into()));
    }
    let properties = BasicProperties::default().with_headers(table);
    world
        .amqp()
        .await
        .publish("mail.dlx", key, properties, body.as_bytes())
        .await;
}

#[tokio::test]
async fn printed_definitions_import_into_a_topology_that_passes_the_check() {
    let world = World::new().await;
    let mut out = Vec::new();
    let config = world.broker_config();
    topology::run(&TopologyCommand::Print, &config, &mut out)
        .await
        .unwrap();
    let definitions: Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(definitions["queues"][0]["vhost"], world.scratch().name());
    world
        .scratch()
        .servers()
        .management(
            reqwest::Method::POST,
            "definitions",
            Some(&definitions.to_string()),
        )
        .await
        .unwrap();
    let mut out = Vec::new();
    topology::run(&TopologyCommand::Check, &config, &mut out)
        .await
        .unwrap();
    topology::run(&TopologyCommand::Apply, &config, &mut out)
        .await
        .unwrap();
    let said = String::from_utf8(out).unwrap();
    assert!(said.contains("14 already there"), "{said}");
}

#[tokio::test]
async fn a_queue_with_other_arguments_is_named_with_what_to_do() {
    let world = World::new().await;
    let channel = &world.amqp().await.channel;
    let options = lapin::options::QueueDeclareOptions::durable();
    channel
        .queue_declare("mail.jobs.low".into(), options, FieldTable::default())
        .await
        .unwrap();
    for command in [TopologyCommand::Apply, TopologyCommand::Check] {
        let error = topology::run(&command, &world.broker_config(), &mut Vec::new())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("different: queue mail.jobs.low"), "{error}");
        assert!(error.contains("inequivalent arg"), "{error}");
        assert!(error.contains("empty and delete it"), "{error}");
    }
}

#[tokio::test]
async fn send_publishes_to_the_level_and_prints_the_id() {
    let world = World::new().await;
    world.apply_topology().await;
    let job = json!({"id": "order-1", "tenant": "acme", "text": "hello"}).to_string();
    let file = world.dir().join("job.json");
    std::fs::write(&file, &job).unwrap();
    let args = SendArgs {
        level: Level::High,
        file,
    };
    let mut out = Vec::new();
    send::run(&args, &world.broker_config(), &mut out).await.unwrap();
    assert_eq!(out, b"order-1\n");
    world.wait_depth("mail.jobs.high", 1).await;
    let message = world.amqp().await.get("mail.jobs.high").await.unwrap();
    assert_eq!(message.data, job.as_bytes());
    assert_eq!(message.routing_key.as_str(), "high.acme");
    assert_eq!(
        message.properties.kind().as_ref().unwrap().as_str(),
        "mail.job.v1"
    );
    assert!(message.properties.timestamp().is_some());
}

#[tokio::test]
async fn dead_messages_are_listed_filtered_and_stay() {
    let world = World::new().await;
    world.apply_topology().await;
    put_dead(
        &world,
        "low.acme",
        &[("x-dead-reason", "invalid"), ("x-dead-detail", "no `to`")],
        r#"{"id": "a", "tenant": "acme"}"#,
    )
    .await;
    put_dead(
        &world,
        "high.other",
        &[("x-dead-reason", "invalid_json")],
        "not json",
    )
    .await;
    world.wait_depth("mail.jobs.dead", 2).await;

    let table = dead(&world, DeadCommand::List(Filter::default())).await.unwrap();
    assert!(
        table.contains("invalid_json") && table.contains("no `to`"),
        "{table}"
    );
    let filter = Filter {
        tenant: Some("acme".to_owned()),
        json: true,
        ..Filter::default()
    };
    let listed = dead(&world, DeadCommand::List(filter)).await.unwrap();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["id"], "a");
    assert_eq!(listed["reason"], "invalid");
    assert_eq!(listed["detail"], "no `to`");
    let filter = Filter {
        reason: Some("invalid_json".to_owned()),
        json: true,
        ..Filter::default()
    };
    let shown = dead(&world, DeadCommand::Show(filter)).await.unwrap();
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["body"], "not json");
    assert_eq!(shown["tenant"], "other");
    world.wait_depth("mail.jobs.dead", 2).await;
}

#[tokio::test]
async fn a_replayed_job_goes_through_the_front_door_again() {
    let world = World::new().await;
    world.apply_topology().await;
    put_dead(
        &world,
        "low.acme",
        &[
            ("x-dead-reason", "invalid"),
            ("x-dead-source", "mail.jobs.low"),
            ("traceparent", "00-1"),
        ],
        r#"{"id": "a"}"#,
    )
    .await;
    put_dead(
        &world,
        "low.acme",
        &[("x-dead-reason", "unknown_tenant"), ("x-dead-sealed", "true")],
        r#"sealed:{"id": "b"}"#,
    )
    .await;
    world.wait_depth("mail.jobs.dead", 2).await;

    let error = dead(&world, replay(Filter::default())).await.unwrap_err();
    assert!(error.is_usage(), "{error}");
    let one = Filter {
        id: Some("a".to_owned()),
        ..Filter::default()
    };
    assert_eq!(dead(&world, replay(one)).await.unwrap(), "1 replayed\n");
    world.wait_depth("mail.jobs.low", 1).await;
    let message = world.amqp().await.get("mail.jobs.low").await.unwrap();
    assert_eq!(message.data, br#"{"id": "a"}"#);
    assert_eq!(message.exchange.as_str(), "mail.jobs");
    let headers = message.properties.headers().clone().unwrap();
    assert_eq!(producers_names(&headers), ["traceparent", "x-replay"]);
    assert_eq!(headers.inner()["x-replay"], AMQPValue::LongLongInt(1));

    // What was passed over is still there, and opened only on its way back.
    let all = Filter {
        all: true,
        ..Filter::default()
    };
    let shown = dead(&world, DeadCommand::Show(all.clone())).await.unwrap();
    assert!(shown.contains("sealed:"), "{shown}");
    dead(&world, replay(all)).await.unwrap();
    world.wait_depth("mail.jobs.low", 1).await;
    let message = world.amqp().await.get("mail.jobs.low").await.unwrap();
    assert_eq!(message.data, br#"{"id": "b"}"#);
    world.wait_depth("mail.jobs.dead", 0).await;
}

#[tokio::test]
async fn a_job_with_a_misspelt_level_goes_to_the_level_that_its_replay_names() {
    let world = World::new().await;
    world.apply_topology().await;
    let amqp = world.amqp().await;
    for (key, body) in [
        ("hihg.acme", r#"{"id": "a"}"#),
        ("acme", r#"{"tenant": "acme", "id": "b"}"#),
        ("nothing", "{}"),
    ] {
        amqp.publish("mail.jobs", key, BasicProperties::default(), body.as_bytes())
            .await;
    }
    amqp.publish("mail.reports", "strange", BasicProperties::default(), b"{}")
        .await;
    world.wait_depth("mail.unroutable", 4).await;

    let mut out = Vec::new();
    let said = dead::run(
        &replay_unroutable(None),
        &world.broker_config(),
        &sealed,
        &mut out,
    )
    .await;
    assert!(matches!(said.unwrap_err(), DeadError::Left { left: 3 }));
    let out = String::from_utf8(out).unwrap();
    assert!(out.contains("a (key hihg.acme): its key names no level"), "{out}");
    // What is no job goes back to where it came from, once, and nobody wants it there either.
    assert!(out.ends_with("1 replayed\n"), "{out}");
    world.wait_depth("mail.unroutable", 4).await;

    let mut out = Vec::new();
    let command = replay_unroutable(Some(Level::High));
    let said = dead::run(&command, &world.broker_config(), &sealed, &mut out).await;
    assert!(matches!(said.unwrap_err(), DeadError::Left { left: 1 }));
    let out = String::from_utf8(out).unwrap();
    assert!(
        out.contains("(key nothing): neither its key nor its body"),
        "{out}"
    );
    assert!(out.ends_with("3 replayed\n"), "{out}");
    world.wait_depth("mail.jobs.high", 2).await;
    for _ in 0..2 {
        let message = amqp.get("mail.jobs.high").await.unwrap();
        assert_eq!(message.routing_key.as_str(), "high.acme");
        assert_eq!(message.exchange.as_str(), "mail.jobs");
    }

    let command = DeadCommand::Replay(Replay {
        filter: Filter {
            all: true,
            ..Filter::default()
        },
        level: Some(Level::Low),
    });
    assert!(dead(&world, command).await.unwrap_err().is_usage());
}

#[tokio::test]
async fn a_dead_letter_that_cannot_be_opened_does_not_keep_others_from_being_replayed() {
    let world = World::new().await;
    world.apply_topology().await;
    let sealed_with_a_lost_key = [("x-dead-reason", "id_conflict"), ("x-dead-sealed", "true")];
    put_dead(&world, "low.acme", &sealed_with_a_lost_key, "v1:lost").await;
    // To its own queue again, which is gone.
    let from_elsewhere = [("x-dead-reason", "invalid"), ("x-dead-source", "mail.jobs.gone")];
    put_dead(&world, "low", &from_elsewhere, "{}").await;
    put_dead(
        &world,
        "low.acme",
        &[("x-dead-reason", "invalid")],
        r#"{"id": "c"}"#,
    )
    .await;
    world.wait_depth("mail.jobs.dead", 3).await;

    let all = Filter {
        all: true,
        ..Filter::default()
    };
    let mut out = Vec::new();
    let result = dead::run(&replay(all), &world.broker_config(), &sealed, &mut out).await;
    let error = result.unwrap_err();
    assert!(
        matches!(error, DeadError::Left { left: 2 }) && !error.is_usage(),
        "{error}"
    );
    let out = String::from_utf8(out).unwrap();
    let lines: Vec<_> = out.lines().collect();
    assert!(
        lines[0].contains("(key low.acme): cannot be opened: not sealed"),
        "{out}"
    );
    assert!(lines[1].contains("(key low): no queue for exchange"), "{out}");
    assert_eq!(lines[2..], ["1 replayed"], "{out}");
    world.wait_depth("mail.jobs.low", 1).await;
    world.wait_depth("mail.jobs.dead", 2).await;
}

fn by_id(id: &str, tenant: Option<&str>) -> Filter {
    Filter {
        id: Some(id.to_owned()),
        tenant: tenant.map(str::to_owned),
        ..Filter::default()
    }
}

#[tokio::test]
async fn dead_letters_of_an_id_that_two_tenants_use_are_changed_for_the_one_that_is_named() {
    let world = World::new().await;
    world.apply_topology().await;
    let of = |tenant| format!(r#"{{"id": "17", "tenant": "{tenant}"}}"#);
    for key in ["low.a", "low.a-b", "low.a"] {
        put_dead(&world, key, &[("x-dead-reason", "invalid")], &of(&key[4..])).await;
    }
    put_dead(
        &world,
        "low.c",
        &[("x-dead-reason", "invalid")],
        r#"{"id": "18"}"#,
    )
    .await;
    world.wait_depth("mail.jobs.dead", 4).await;

    for command in [
        DeadCommand::Drop(by_id("17", None)),
        replay(by_id("17", None)),
        DeadCommand::Drop(Filter {
            limit: Some(1),
            all: true,
            ..by_id("17", None)
        }),
    ] {
        let error = dead(&world, command).await.unwrap_err();
        assert!(error.is_usage(), "{error}");
        assert!(error.to_string().contains("`a`, `a-b`; say whose"), "{error}");
        world.wait_depth("mail.jobs.dead", 4).await;
    }
    let dropped = dead(&world, DeadCommand::Drop(by_id("17", Some("a")))).await;
    assert_eq!(dropped.unwrap(), "2 dropped\n");
    let rest = dead(&world, DeadCommand::List(Filter::default())).await.unwrap();
    assert!(rest.contains("low.a-b") && rest.contains("low.c"), "{rest}");
    // One tenant's alone needs no name.
    let as_json = Filter {
        json: true,
        ..by_id("18", None)
    };
    let replayed = dead(&world, replay(as_json)).await.unwrap();
    assert_eq!(replayed, "{\"replayed\":1}\n");
    world.wait_depth("mail.jobs.dead", 1).await;
}

#[tokio::test]
async fn an_id_is_found_among_more_dead_letters_than_a_queue_gives_back_at_once() {
    let world = World::new().await;
    world.apply_topology().await;
    let amqp = world.amqp().await;
    for number in 0..120 {
        let id = if matches!(number, 60 | 119) { 1000 } else { number };
        let body = format!(r#"{{"id": "{id}"}}"#);
        let properties = BasicProperties::default();
        amqp.publish("mail.dlx", "low.a", properties, body.as_bytes())
            .await;
    }
    world.wait_depth("mail.jobs.dead", 120).await;
    let listed = dead(&world, DeadCommand::List(Filter::default())).await.unwrap();
    assert_eq!(listed.lines().count(), 121, "{listed}");
    world.wait_depth("mail.jobs.dead", 120).await;
    let dropped = dead(&world, DeadCommand::Drop(by_id("1000", None))).await;
    assert_eq!(dropped.unwrap(), "2 dropped\n");
    world.wait_depth("mail.jobs.dead", 118).await;
}

#[tokio::test]
async fn an_id_that_no_dead_letter_has_is_a_failure_whatever_was_to_be_done() {
    let world = World::new().await;
    world.apply_topology().await;
    put_dead(&world, "low.a", &[("x-dead-reason", "invalid")], r#"{"id": "1"}"#).await;
    world.wait_depth("mail.jobs.dead", 1).await;
    for (id, tenant) in [("2", None), ("2", Some("a")), ("1", Some("b"))] {
        for command in [
            DeadCommand::List(by_id(id, tenant)),
            DeadCommand::Show(by_id(id, tenant)),
            DeadCommand::Drop(by_id(id, tenant)),
            replay(by_id(id, tenant)),
        ] {
            let error = dead(&world, command).await.unwrap_err();
            assert!(
                matches!(error, DeadError::Unknown(_)) && !error.is_usage(),
                "{error}"
            );
        }
    }
    world.wait_depth("mail.jobs.dead", 1).await;
}

/// A pager at its first screen: takes nothing more until it is told to.
struct Pager {
    began: tokio::sync::mpsc::UnboundedSender<()>,
    go_on: std::sync::mpsc::Receiver<()>,
}

impl std::io::Write for Pager {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.began.send(());
        // Ends when the test drops the other side.
        let _ = self.go_on.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn dead_letters_that_somebody_pages_through_are_seen_by_others() {
    let world = World::new().await;
    world.apply_topology().await;
    for key in ["low.a", "low.b", "low.c"] {
        put_dead(&world, key, &[("x-dead-reason", "invalid")], "{}").await;
    }
    world.wait_depth("mail.jobs.dead", 3).await;
    let (began, mut begins) = tokio::sync::mpsc::unbounded_channel();
    let (go_on, waits) = std::sync::mpsc::channel();
    let mut pager = Pager { began, go_on: waits };
    let config = world.broker_config();
    let show = tokio::spawn(async move {
        let command = DeadCommand::Show(Filter::default());
        dead::run(&command, &config, &sealed, &mut pager).await
    });
    begins.recv().await.unwrap();
    let listed = dead(&world, DeadCommand::List(Filter::default())).await.unwrap();
    drop(go_on);
    show.await.unwrap().unwrap();
    assert_eq!(listed.lines().count(), 4, "{listed}");
}

#[tokio::test]
async fn what_a_producer_writes_cannot_forge_a_line_of_a_list() {
    let world = World::new().await;
    world.apply_topology().await;
    let id = "1\u{1b}[2K\n2   acme  low.acme  invalid\u{9b}\u{202e}";
    let body = json!({"id": id, "tenant": "acme"}).to_string();
    let headers = [("x-dead-reason", "in\nvalid\u{1b}"), ("x-dead-sealed", "true")];
    put_dead(&world, "low.\u{1b}\nacme", &headers, &body).await;
    world.wait_depth("mail.jobs.dead", 1).await;
    let harmless = |text: &str| {
        text.chars()
            .all(|c| c == '\n' || !c.is_control() && c != '\u{202e}')
    };

    let table = dead(&world, DeadCommand::List(Filter::default())).await.unwrap();
    assert!(table.lines().count() == 2 && harmless(&table), "{table:?}");
    let as_json = Filter {
        json: true,
        ..Filter::default()
    };
    for command in [DeadCommand::List(as_json.clone()), DeadCommand::Show(as_json)] {
        let text = dead(&world, command).await.unwrap();
        assert!(text.lines().count() == 1 && harmless(&text), "{text:?}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["id"], id);
    }
    let mut out = Vec::new();
    let all = Filter {
        all: true,
        ..Filter::default()
    };
    let result = dead::run(&replay(all), &world.broker_config(), &sealed, &mut out).await;
    assert!(matches!(result.unwrap_err(), DeadError::Left { left: 1 }));
    let said = String::from_utf8(out).unwrap();
    assert!(said.lines().count() == 2 && harmless(&said), "{said:?}");
}

#[tokio::test]
async fn a_sealed_dead_letter_says_what_is_wrong_with_the_keys() {
    let mut world = World::new().await;
    world.apply_topology().await;
    let sealed = [("x-dead-reason", "id_conflict"), ("x-dead-sealed", "true")];
    put_dead(&world, "low.acme", &sealed, "v1:k:lost").await;
    world.wait_depth("mail.jobs.dead", 1).await;
    world.unset("POSTROOM_ENCRYPTION_KEYS");
    let none = ["dead", "replay", "--all"];
    let unreadable = [&none[..], &["--encryption-keys-file", "/no/such/file"]].concat();
    for (command, why) in [
        (&none[..], "is not set"),
        (&unreadable, "cannot open /no/such/file"),
    ] {
        let said = world.postroom(command).await;
        assert_eq!(said.code, 1, "{}", said.stderr);
        assert!(said.stdout.contains(why), "{}", said.stdout);
    }
    world.postroom(&["dead", "list"]).await.success();
}

#[tokio::test]
async fn dropped_messages_are_gone_and_others_are_not() {
    let world = World::new().await;
    world.apply_topology().await;
    for (key, reason) in [
        ("low.a", "invalid"),
        ("low.b", "crash_loop"),
        ("low.c", "invalid"),
    ] {
        put_dead(&world, key, &[("x-dead-reason", reason)], "{}").await;
    }
    world.wait_depth("mail.jobs.dead", 3).await;
    let filter = Filter {
        reason: Some("invalid".to_owned()),
        ..Filter::default()
    };
    assert_eq!(
        dead(&world, DeadCommand::Drop(filter)).await.unwrap(),
        "2 dropped\n"
    );
    world.wait_depth("mail.jobs.dead", 1).await;
}

#[tokio::test]
async fn a_poisonous_message_ends_among_the_dead_by_the_brokers_own_hand_and_can_be_replayed() {
    let world = World::new().await;
    world.apply_topology().await;
    world
        .amqp()
        .await
        .publish("", "mail.jobs.low", BasicProperties::default(), b"{}")
        .await;
    let channel = &world.amqp().await.channel;
    let mut deliveries = 0;
    while world.depth("mail.jobs.dead").await == 0 {
        let got = channel
            .basic_get("mail.jobs.low".into(), lapin::options::BasicGetOptions::default())
            .await
            .unwrap();
        if let Some(message) = got {
            deliveries += 1;
            // From 4.3 on a nack does not count; this does, as a lost connection does.
            let options = lapin::options::BasicRejectOptions { requeue: true };
            message.delivery.acker.reject(options).await.unwrap();
        }
        assert!(deliveries <= 51, "not dead after {deliveries} deliveries");
    }
    assert!(deliveries >= 50, "dead after only {deliveries} deliveries");
    let filter = Filter {
        json: true,
        ..Filter::default()
    };
    let listed = dead(&world, DeadCommand::List(filter)).await.unwrap();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["reason"], "delivery_limit");
    assert_eq!(listed["queue"], "mail.jobs.low");
    let all = Filter {
        all: true,
        ..Filter::default()
    };
    dead(&world, replay(all)).await.unwrap();
    world.wait_depth("mail.jobs.low", 1).await;
}

#[tokio::test]
async fn without_a_topology_commands_say_what_to_do() {
    let world = World::new().await;
    let filter = Filter {
        queue: DeadQueue::Reports,
        ..Filter::default()
    };
    let error = dead(&world, DeadCommand::List(filter)).await.unwrap_err();
    assert!(
        matches!(error, DeadError::Broker(BrokerError::Amqp(_))),
        "{error}"
    );
    assert!(error.to_string().contains("mail.reports.dead"), "{error}");
}

#[tokio::test]
async fn a_wrong_password_is_reported_without_it() {
    let world = World::new().await;
    let mut config = world.broker_config();
    let url = world.amqp_url().replacen("guest:guest@", "guest:hunter2@", 1);
    config.url = url.into();
    let error = broker::connect(&config, "test").await.unwrap_err().to_string();
    assert!(
        error.contains("cannot connect to RabbitMQ at 127.0.0.1"),
        "{error}"
    );
    assert!(!error.contains("hunter2"), "{error}");
}

#[tokio::test]
async fn definitions_are_printed_for_the_vhost_of_the_url_or_the_default_one() {
    let mut world = World::new().await;
    let name = world.scratch().name().to_owned();
    for vhost in [name.as_str(), "/"] {
        let printed = world.postroom(&["topology", "print"]).await.success();
        let definitions: serde_json::Value = serde_json::from_str(&printed).unwrap();
        let queues = definitions["queues"].as_array().unwrap();
        assert!(
            queues.len() >= 8 && queues.iter().all(|queue| queue["vhost"] == vhost),
            "{printed}"
        );
        world.unset("POSTROOM_AMQP_URL");
    }
}
