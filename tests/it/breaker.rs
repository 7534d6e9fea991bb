//! An account whose server does not work is left alone by all workers together, tried by one mail at a time, and its tenant
//! is told; nobody else notices.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::{Action, Phase, Script, SmtpServer};
use postroom_testkit::webhook::WebhookReceiver;
use serde_json::{Value, json};

use crate::sends::{account, account_with_password};
use crate::support::{Process, Reports, World, eventually, mail, mails};

const LIMIT: Duration = Duration::from_secs(30);

fn dead() -> Script {
    Script::new().on(Phase::Greeting, Action::shutting_down())
}

/// A world whose breakers cool down for this long, and whose retries come quickly.
async fn world(cooldown: &str) -> World {
    let mut world = World::ready().await;
    world.set("POSTROOM_BREAKER_COOLDOWN", cooldown);
    world.set("POSTROOM_RETRY_BASE", "200ms");
    world.set("POSTROOM_RETRY_CAP", "300ms");
    world
}

/// What `account show --json` says of the breaker.
async fn health(world: &World, tenant: &str) -> Value {
    let shown = world
        .postroom(&["account", "show", tenant, "main", "--json"])
        .await;
    let account: Value = serde_json::from_str(&shown.success()).unwrap();
    account["health"].clone()
}

async fn wait_open(world: &World, tenant: &str) {
    eventually(LIMIT, || async { health(world, tenant).await["state"] == "open" }).await;
}

/// Ends the cooldown of every account, as time would.
async fn cool(world: &World) {
    let sql = "UPDATE account_health SET until = clock_timestamp() WHERE state = 1;
               UPDATE lane SET next_at = clock_timestamp()";
    world.sql().await.batch_execute(sql).await.unwrap();
}

/// Waits until a probe has failed for the `n`th time.
async fn wait_openings(world: &World, n: i32) {
    let sql = world.sql().await;
    eventually(LIMIT, || async {
        let row = sql
            .query_opt("SELECT openings FROM account_health WHERE state = 1", &[])
            .await;
        row.unwrap().is_some_and(|row| row.get::<_, i32>(0) == n)
    })
    .await;
}

/// Two tenants, one of whose servers is dead, two workers and a bridge that tells `acme` everything.
struct Outage {
    world: World,
    dead: SmtpServer,
    other: SmtpServer,
    receiver: WebhookReceiver,
    processes: Vec<Process>,
}

impl Outage {
    async fn begin() -> Self {
        let world = world("10m").await;
        let dead = SmtpServer::builder().script(dead()).start().await;
        let other = SmtpServer::builder().start().await;
        // One connection at a time: what is under way when it opens does not blur the count.
        account(&world, "acme", &dead, &["--max-connections", "1"]).await;
        account(&world, "other", &other, &[]).await;
        let receiver = WebhookReceiver::start().await.unwrap();
        let url = receiver.url("/");
        let set = ["endpoint", "set", "acme", "--url", &url, "--generate-secret"];
        world.postroom(&set).await.success();
        let processes = vec![
            world.start_worker().await,
            world.start_worker().await,
            world.start_bridge().await,
        ];
        Self {
            world,
            dead,
            other,
            receiver,
            processes,
        }
    }

    /// The events of this type that the webhook got.
    fn told(&self, kind: &str) -> Vec<Value> {
        let all = self.receiver.received().into_iter().map(|event| event.json());
        all.filter(|event| event["type"] == kind).collect()
    }

    /// The tenant was told, once each, by webhook and on the exchange.
    async fn assert_told_once(&self, reports: &Reports) {
        eventually(LIMIT, || async { self.told("account.recovered").len() == 1 }).await;
        let told = self.told("account.unhealthy");
        assert_eq!(told.len(), 1);
        let data = &told[0]["data"];
        assert_eq!(
            (&data["tenant"], &data["account"]),
            (&json!("acme"), &json!("main"))
        );
        assert_eq!(data["reason"], "service_unavailable");
        assert!(data["next_attempt_at"].is_string());
        let key = "report.acme.account.unhealthy";
        assert_eq!(reports.all().iter().filter(|report| report.key == key).count(), 1);
    }
}

#[tokio::test]
async fn a_dead_server_is_left_alone_by_two_workers_then_probed_once_then_everything_flows() {
    let outage = Outage::begin().await;
    let (world, server) = (&outage.world, &outage.dead);
    let mut reports = world.reports().await;
    world.publish_all(Level::High, &mails("acme", "a", 30)).await;
    wait_open(world, "acme").await;

    // Nobody else notices.
    world.publish_all(Level::High, &mails("other", "o", 20)).await;
    outage.other.wait_for(20, LIMIT).await;
    // What comes now waits, without an attempt.
    world.publish_mail(Level::High, "acme", "late").await;
    world.wait_state("acme", "late", 2).await;
    let late = world.job("acme", "late").await;
    assert_eq!(
        (&late["reason"], &late["attempts"]),
        (&json!("unhealthy"), &json!(0))
    );
    assert_eq!(late["account_health"]["state"], "open");
    assert_eq!(late["account_health"]["reason"], "service_unavailable");
    // The gauge is read from the database now and then.
    eventually(LIMIT, || async {
        outage.processes[0].metric("postroom_unhealthy_accounts").await >= 1.0
    })
    .await;
    let connections = server.counters().connections;
    assert!(
        (5..=10).contains(&connections),
        "{connections} connections until it opened"
    );

    // The first probe fails too: exactly one more connection.
    cool(world).await;
    wait_openings(world, 2).await;
    assert_eq!(server.counters().connections, connections + 1);
    // It works again: one probe, then all.
    server.set_script(Script::new());
    cool(world).await;
    server.wait_for(31, LIMIT).await;
    let finals = reports.finals(51, LIMIT).await;
    assert!(finals.iter().all(|report| report.kind() == "mail.sent"));
    assert_eq!(server.received_count(), 31, "nothing twice");
    eventually(LIMIT, || async { health(world, "acme").await.is_null() }).await;
    outage.assert_told_once(&reports).await;
    world.assert_settled().await;
}

#[tokio::test]
async fn the_platform_takes_over_while_the_account_is_unhealthy_if_the_policy_says_so() {
    let world = world("60s").await;
    let (own, platform) = (
        SmtpServer::builder().script(dead()).start().await,
        SmtpServer::builder().start().await,
    );
    account(&world, "acme", &own, &[]).await;
    let port = platform.port().to_string();
    let line =
        format!("account set - main --host 127.0.0.1 --port {port} --tls none --from post@platform.example");
    world
        .postroom(&line.split_whitespace().collect::<Vec<_>>())
        .await
        .success();
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for n in 0..5 {
        let mut job = mail("acme", &format!("own-{n}"));
        job["fallback"] = json!("never");
        world.publish(Level::High, "acme", &job).await;
    }
    wait_open(&world, "acme").await;
    let connections = own.counters().connections;
    let mut job = mail("acme", "instead");
    job["fallback"] = json!("platform");
    world.publish(Level::High, "acme", &job).await;
    let sent = reports.final_of("instead").await;
    let sender = &sent.json["data"]["sender"];
    assert_eq!(
        (&sender["via"], &sender["reason"]),
        (&json!("platform"), &json!("unhealthy"))
    );
    assert_eq!(sent.json["data"]["attempt"], 1);
    assert_eq!(
        own.counters().connections,
        connections,
        "the account was not asked"
    );
    assert_eq!(platform.received_count(), 1);
}

#[tokio::test]
async fn a_refused_login_opens_the_account_and_a_new_password_closes_it_at_once() {
    let world = world("10m").await;
    let server = SmtpServer::builder().auth("u", "right").start().await;
    world.postroom(&["tenant", "set", "acme"]).await.success();
    account_with_password(&world, "main", &server, "wrong", "--from a@example.com").await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_all(Level::High, &mails("acme", "m", 8)).await;
    wait_open(&world, "acme").await;
    let shown = world
        .postroom(&["account", "show", "acme", "main"])
        .await
        .success();
    assert!(shown.contains("auth_refused"), "{shown}");
    assert!(!shown.contains("wrong"), "{shown}");
    account_with_password(&world, "main", &server, "right", "").await;
    let finals = reports.finals(8, LIMIT).await;
    assert!(finals.iter().all(|report| report.kind() == "mail.sent"));
    assert_eq!(server.received_count(), 8);
}

#[tokio::test]
async fn recipients_refused_or_deferred_open_nothing() {
    let world = world("10m").await;
    let script = Script::new().recipients_with(|address| match address.split_once('-').unwrap().0 {
        "gone" => Some("550 5.1.1 No such user".to_owned()),
        "grey" => Some("451 4.7.1 Greylisted, come back".to_owned()),
        _ => None,
    });
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &["--max-attempts", "2"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for prefix in ["gone", "grey"] {
        world.publish_all(Level::High, &mails("acme", prefix, 8)).await;
    }
    let finals = reports.finals(16, LIMIT).await;
    assert!(finals.iter().all(|report| report.kind() == "mail.failed"));
    assert!(health(&world, "acme").await.is_null());
}

#[tokio::test]
async fn what_waits_for_an_account_that_never_comes_back_fails_at_its_age() {
    let world = world("10m").await;
    let server = SmtpServer::builder().script(dead()).start().await;
    account(&world, "acme", &server, &["--max-age", "3s"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_all(Level::High, &mails("acme", "m", 5)).await;
    wait_open(&world, "acme").await;
    world.publish_mail(Level::High, "acme", "late").await;
    // Lanes of accounts in trouble are looked at once a minute.
    let sql = world.sql().await;
    let failed = reports.finals(6, Duration::from_mins(1));
    let poke = async {
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            sql.batch_execute("UPDATE lane SET next_at = clock_timestamp()")
                .await
                .unwrap();
        }
    };
    let finals = tokio::select! {
        finals = failed => finals,
        () = poke => unreachable!(),
    };
    assert!(finals.iter().all(|report| report.kind() == "mail.failed"));
    let late = finals.iter().find(|report| report.job() == "late").unwrap();
    assert_eq!(
        (late.reason(), &late.json["data"]["attempt"]),
        ("sender_unhealthy", &json!(0))
    );
}
