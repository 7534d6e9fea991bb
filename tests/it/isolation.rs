//! Every door between tenants, tried. Names are chosen to be beginnings of each other, ids to look like paths; the table
//! in docs/security.md says which test tries which door.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use lapin::BasicProperties;
use lapin::options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Confirmation, Connection, ConnectionProperties};
use postroom::level::Level;
use postroom_testkit::smtp::SmtpServer;
use postroom_testkit::webhook::WebhookReceiver;
use reqwest::Method;
use serde_json::{Value, json};

use crate::sends::account;
use crate::support::{World, eventually_some};

const LIMIT: Duration = Duration::from_mins(1);

fn in_an_hour() -> Value {
    json!((Timestamp::now() + SignedDuration::from_hours(1)).to_string())
}

/// A small job whose id need not be a part of an address.
fn mail(tenant: &str, id: &str) -> Value {
    let mut job = crate::support::mail(tenant, id);
    job["to"] = json!("ann@example.org");
    job
}

/// A tenant whose account logs in with `u` and `p`.
async fn with_password(world: &World, tenant: &str, server: &SmtpServer) {
    account(world, tenant, server, &[]).await;
    let line = format!("account set {tenant} main --username u --password-stdin --allow-plaintext-auth");
    let words: Vec<_> = line.split(' ').collect();
    world.postroom_stdin(&words, b"p").await.success();
}

/// Two tenants, each with an account at a server of its own.
async fn neighbours() -> (World, SmtpServer, SmtpServer) {
    let world = World::ready().await;
    let (one, other) = (
        SmtpServer::builder().start().await,
        SmtpServer::builder().start().await,
    );
    account(&world, "a", &one, &[]).await;
    account(&world, "a-b", &other, &[]).await;
    (world, one, other)
}

#[tokio::test]
async fn the_same_id_of_two_tenants_is_two_jobs() {
    let (world, one, other) = neighbours().await;
    let mut reports = world.reports().await;
    let hooks = [
        WebhookReceiver::start().await.unwrap(),
        WebhookReceiver::start().await.unwrap(),
    ];
    for (tenant, hook) in ["a", "a-b"].iter().zip(&hooks) {
        let set = [
            "endpoint",
            "set",
            tenant,
            "--url",
            &hook.url("/"),
            "--generate-secret",
        ];
        world.postroom(&set).await.success();
    }
    let (_worker, _bridge) = (world.start_worker().await, world.start_bridge().await);
    // The last reads like an id of the other tenant's.
    for id in ["1", "b/1", "../a-b/1", "a:1", "a-b/main"] {
        for tenant in ["a", "a-b"] {
            world.publish(Level::High, tenant, &mail(tenant, id)).await;
        }
        let both = |all: &[crate::support::Received]| {
            all.iter().filter(|r| r.job() == id && r.is_final()).count() == 2
        };
        reports.until(both).await;
        let of = reports.of(id);
        assert_ne!(of[0].id, of[1].id, "event ids differ");
        for report in of {
            assert_eq!(
                (report.kind(), report.key.as_str()),
                ("mail.sent", &*format!("report.{}.mail.sent", report.tenant()))
            );
        }
    }
    assert_eq!((one.received_count(), other.received_count()), (5, 5));
    for (tenant, hook) in ["a", "a-b"].iter().zip(&hooks) {
        for request in hook.wait_for(5, LIMIT).await.unwrap() {
            assert_eq!(request.json()["data"]["tenant"], *tenant);
        }
    }
    // An event of one is not replayed to the other.
    let event = hooks[1].received()[0].event_id().to_owned();
    let replay = async |tenant| {
        let line = ["endpoint", "replay", tenant, "--event", &event];
        world.postroom(&line).await
    };
    let said = replay("a").await.fails_with(1);
    assert!(said.contains(&event), "{said}");
    assert_eq!((hooks[0].received().len(), hooks[1].received().len()), (5, 5));
    replay("a-b").await.success();
    hooks[1].wait_for(6, LIMIT).await.unwrap();
    assert_eq!(hooks[0].received().len(), 5);
}

#[tokio::test]
async fn a_job_sends_through_no_account_of_another_tenant() {
    let (world, one, other) = neighbours().await;
    let port = other.port().to_string();
    let only = [
        "account",
        "set",
        "a-b",
        "only",
        "--host",
        "127.0.0.1",
        "--port",
        &port,
        "--tls",
        "none",
        "--from",
        "b@b.example",
    ];
    world.postroom(&only).await.success();
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for (id, account, reason) in [
        ("named", "only", "unknown_account"),
        ("path", "a-b/only", "invalid"),
    ] {
        let mut job = mail("a", id);
        job["account"] = json!(account);
        world.publish(Level::High, "a", &job).await;
        let report = reports.final_of(id).await;
        assert_eq!(
            (report.kind(), report.reason(), report.tenant()),
            ("mail.rejected", reason, "a")
        );
    }
    // The body names the other one: the key decides who is told, and nobody sends.
    world.publish(Level::High, "a", &mail("a-b", "body")).await;
    let report = reports.final_of("body").await;
    assert_eq!((report.reason(), report.tenant()), ("tenant_mismatch", "a"));
    // RabbitMQ routes by these headers too, without asking for their permission.
    let mut headers = FieldTable::default();
    let keys = vec![AMQPValue::LongString("high.a-b".into())];
    headers.insert("CC".into(), AMQPValue::FieldArray(keys.into()));
    let properties = BasicProperties::default().with_headers(headers);
    let body = mail("a-b", "copied").to_string();
    world
        .amqp()
        .await
        .publish("mail.jobs", "low.a", properties, body.as_bytes())
        .await;
    let report = reports.final_of("copied").await;
    assert_eq!((report.reason(), report.tenant()), ("tenant_mismatch", "a"));
    for (number, tenant) in ["a/b", "a.b", "-", "../a-b", "a\u{0}b"].iter().enumerate() {
        let id = format!("tenant-{number}");
        world.publish(Level::High, "a", &mail(tenant, &id)).await;
        let report = reports.final_of(&id).await;
        assert_eq!(
            (report.kind(), report.tenant()),
            ("mail.rejected", "a"),
            "{tenant:?}"
        );
    }
    assert_eq!((one.received_count(), other.received_count()), (0, 0));
}

#[tokio::test]
async fn commands_for_one_tenant_reach_no_other() {
    let (world, one, other) = neighbours().await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for tenant in ["a", "a-b"] {
        let mut job = mail(tenant, "later");
        job["send_at"] = in_an_hour();
        world.publish(Level::High, tenant, &job).await;
    }
    for tenant in ["a", "a-b"] {
        eventually_some(LIMIT, || async {
            let shown = world.postroom(&["job", "show", tenant, "later"]).await;
            (shown.code == 0 && shown.stdout.contains("waiting")).then_some(())
        })
        .await;
    }
    let listed = world
        .postroom(&["job", "list", "--tenant", "a", "--json"])
        .await
        .success();
    let tenants: Vec<Value> = listed
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["tenant"].take())
        .collect();
    assert_eq!(tenants, ["a"]);
    world.postroom(&["job", "cancel", "a", "later"]).await.success();
    assert_eq!(reports.final_of("later").await.tenant(), "a");
    assert_eq!(world.job("a-b", "later").await["state"], "waiting");
    world
        .postroom(&["job", "release", "a-b", "later"])
        .await
        .success();
    reports
        .until(|all| all.iter().any(|r| r.tenant() == "a-b" && r.kind() == "mail.sent"))
        .await;
    // Names that are none are wrong use, before anything is asked.
    for line in [
        "job show a/b x",
        "job cancel ../a x",
        "account show a main/../b",
        "tenant show a:b",
        "endpoint show a. x",
        "tenant set a/b",
    ] {
        let words: Vec<_> = line.split(' ').collect();
        world.postroom(&words).await.fails_with(2);
    }
    world.postroom(&["tenant", "remove", "a"]).await.success();
    world.publish_mail(Level::High, "a-b", "after").await;
    assert_eq!(reports.final_of("after").await.kind(), "mail.sent");
    assert_eq!((one.received_count(), other.received_count()), (0, 2));
}

#[tokio::test]
async fn the_limit_of_one_tenant_holds_up_no_other() {
    let (world, one, other) = neighbours().await;
    world
        .postroom(&["tenant", "set", "a", "--per-hour", "1"])
        .await
        .success();
    world
        .postroom(&["account", "set", "a", "main", "--per-hour", "1"])
        .await
        .success();
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for id in ["1", "2", "3"] {
        world.publish_mail(Level::High, "a", id).await;
        world.publish_mail(Level::High, "a-b", id).await;
    }
    reports
        .until(|all| {
            let sent = |tenant: &str| {
                all.iter()
                    .filter(|r| r.tenant() == tenant && r.kind() == "mail.sent")
                    .count()
            };
            let deferred = all
                .iter()
                .filter(|r| r.tenant() == "a" && r.kind() == "mail.deferred")
                .count();
            (sent("a"), deferred, sent("a-b")) == (1, 2, 3)
        })
        .await;
    assert_eq!((one.received_count(), other.received_count()), (1, 3));
    assert!(
        reports
            .all()
            .iter()
            .all(|r| r.tenant() == "a" || r.kind() == "mail.sent")
    );
}

/// Sends through `server` with a password, when its time comes.
fn overridden(tenant: &str, id: &str, server: &SmtpServer) -> Value {
    let mut job = mail(tenant, id);
    job["from"] = json!("shop@example.com");
    job["smtp_override"] = json!({
        "host": "127.0.0.1", "port": server.port(), "tls": "none", "username": "u", "password": "p",
        "allow_plaintext_auth": true,
    });
    job
}

#[tokio::test]
async fn what_was_sealed_for_one_opens_for_no_other() {
    let world = World::ready().await;
    let server = SmtpServer::builder().auth("u", "p").start().await;
    for tenant in ["a", "a-b"] {
        with_password(&world, tenant, &server).await;
    }
    let sql = world.sql().await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut job = overridden("a", "parked", &server);
    job["send_at"] = in_an_hour();
    world.publish(Level::High, "a", &job).await;
    let body = eventually_some(LIMIT, || async {
        let rows = sql
            .query("SELECT body FROM job WHERE body IS NOT NULL", &[])
            .await
            .unwrap();
        rows.first().map(|row| row.get::<_, Vec<u8>>(0))
    })
    .await;
    let stored: Value = serde_json::from_slice(&body).unwrap();
    let sealed = stored["smtp_override"].as_str().unwrap();
    assert!(sealed.starts_with("v1:"), "{sealed}");
    for (tenant, id) in [("a-b", "parked"), ("a-b", "copied"), ("a", "copied-too")] {
        let mut job = mail(tenant, id);
        job["from"] = json!("shop@example.com");
        job["smtp_override"] = json!(sealed);
        world.publish(Level::High, tenant, &job).await;
        let report = reports
            .until(|all| all.iter().any(|r| r.job() == id && r.tenant() == tenant))
            .await
            .last()
            .unwrap()
            .clone();
        assert_eq!(
            (report.kind(), report.reason()),
            ("mail.failed", "override_invalid"),
            "{}",
            report.json
        );
    }
    assert_eq!(server.counters().auth_ok, 0);
}

#[tokio::test]
async fn a_password_moved_to_another_tenants_row_is_not_used() {
    let world = World::ready().await;
    let server = SmtpServer::builder().auth("u", "p").start().await;
    with_password(&world, "a", &server).await;
    with_password(&world, "a-b", &server).await;
    let sql = world.sql().await;
    let moved = "UPDATE account SET password = (SELECT password FROM account WHERE tenant = 'a') WHERE tenant = 'a-b'";
    assert_eq!(sql.execute(moved, &[]).await.unwrap(), 1);
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_mail(Level::High, "a-b", "moved").await;
    let deferred = reports.until(|all| all.iter().any(|r| r.job() == "moved")).await[0].clone();
    assert_eq!(
        (deferred.kind(), deferred.reason()),
        ("mail.deferred", "secret_unreadable"),
        "{}",
        deferred.json
    );
    world.publish_mail(Level::High, "a", "own").await;
    assert_eq!(reports.final_of("own").await.kind(), "mail.sent");
    assert_eq!(server.counters().auth_ok, 1);
}

/// A user of the broker, removed at the end.
struct User<'a> {
    world: &'a World,
    name: String,
}

impl<'a> User<'a> {
    /// With the permissions that docs/operations.md gives to a producer of one tenant.
    async fn producer_of(world: &'a World, tenant: &str) -> Self {
        let name = format!("{}_{tenant}", world.scratch().name());
        let user = Self { world, name };
        let vhost = world.scratch().name();
        user.put(
            &format!("users/{}", user.name),
            r#"{"password": "pw", "tags": ""}"#,
        )
        .await;
        let rights = json!({"configure": "^$", "write": r"^mail\.jobs$", "read": "^$"});
        user.put(&format!("permissions/{vhost}/{}", user.name), &rights.to_string())
            .await;
        let topic = json!({"exchange": "mail.jobs", "write": format!("^[a-z]+\\.{tenant}$"), "read": "^$"});
        user.put(
            &format!("topic-permissions/{vhost}/{}", user.name),
            &topic.to_string(),
        )
        .await;
        user
    }

    async fn put(&self, path: &str, body: &str) {
        let servers = self.world.scratch().servers();
        servers.management(Method::PUT, path, Some(body)).await.unwrap();
    }

    async fn connect(&self) -> Connection {
        let mut url = url::Url::parse(self.world.amqp_url()).unwrap();
        url.set_username(&self.name).unwrap();
        url.set_password(Some("pw")).unwrap();
        Box::pin(Connection::connect(url.as_str(), ConnectionProperties::default()))
            .await
            .unwrap()
    }

    async fn remove(self) {
        let servers = self.world.scratch().servers();
        servers
            .management(Method::DELETE, &format!("users/{}", self.name), None)
            .await
            .unwrap();
    }
}

async fn channel(connection: &Connection) -> Channel {
    let channel = connection.create_channel().await.unwrap();
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await
        .unwrap();
    channel
}

/// Whether the broker took a message.
async fn may_publish(connection: &Connection, exchange: &str, key: &str, body: &str) -> bool {
    let channel = channel(connection).await;
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let properties = BasicProperties::default();
    let published = channel
        .basic_publish(exchange.into(), key.into(), options, body.as_bytes(), properties)
        .await;
    match published {
        Ok(confirm) => matches!(confirm.await, Ok(Confirmation::Ack(None))),
        Err(_) => false,
    }
}

#[tokio::test]
async fn a_producer_of_one_tenant_publishes_for_no_other() {
    let (world, one, other) = neighbours().await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let user = User::producer_of(&world, "a").await;
    let connection = user.connect().await;
    let own = mail("a", "own").to_string();
    let foreign = mail("a-b", "foreign").to_string();
    assert!(may_publish(&connection, "mail.jobs", "high.a", &own).await);
    for (exchange, key) in [
        ("mail.jobs", "high.a-b"),
        ("mail.jobs", "high.a.b"),
        ("mail.jobs", "high.aa"),
        ("mail.jobs", "high."),
        // Behind the exchange for producers, where no topic permission holds.
        ("mail.jobs.route", "high.a-b"),
        ("", "mail.jobs.high"),
        ("mail.reports", "report.a-b.mail.sent"),
        ("mail.dlx", "mail.jobs.dead"),
    ] {
        assert!(
            !may_publish(&connection, exchange, key, &foreign).await,
            "{exchange} {key}"
        );
    }
    for queue in ["mail.jobs.high", "mail.jobs.dead", "mail.reports.bridge"] {
        let got = channel(&connection)
            .await
            .basic_get(queue.into(), BasicGetOptions::default())
            .await;
        assert!(got.is_err(), "{queue} can be read");
    }
    assert_eq!(reports.final_of("own").await.kind(), "mail.sent");
    assert_eq!((one.received_count(), other.received_count()), (1, 0));
    assert!(reports.none_for(Duration::from_millis(300)).await);
    let _ = connection.close(200, "done".into()).await;
    user.remove().await;
}

#[tokio::test]
async fn a_producers_odd_properties_do_no_harm() {
    let (world, one, _other) = neighbours().await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("traceparent", "\u{0}".repeat(60_000)),
        ("x-contract", "1.0".to_owned()),
    ] {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    for number in 0..500 {
        headers.insert(format!("x-{number}").into(), AMQPValue::LongLongInt(number));
    }
    let properties = BasicProperties::default()
        .with_correlation_id("a\u{0}b\nc".into())
        .with_headers(headers);
    let mut job = mail("a", "odd");
    job["send_at"] = json!((Timestamp::now() + SignedDuration::from_secs(2)).to_string());
    let body = job.to_string();
    world
        .amqp()
        .await
        .publish("mail.jobs", "high.a", properties, body.as_bytes())
        .await;
    let report = reports.final_of("odd").await;
    assert_eq!(report.kind(), "mail.sent", "{}", report.json);
    assert_eq!(report.json["data"]["correlation_id"], "a\u{fffd}b\u{fffd}c");
    assert_eq!(one.received_count(), 1);
}
