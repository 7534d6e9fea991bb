//! `postroom job`: looking at jobs, cancelling them, letting them run.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use postroom::level::Level;
use postroom_testkit::smtp::{Action, Phase, Script, SmtpServer};
use serde_json::{Value, json};

use crate::sends::account;
use crate::support::{World, eventually, mail, taken};

fn scheduled(tenant: &str, id: &str) -> Value {
    let mut job = mail(tenant, id);
    job["send_at"] = (Timestamp::now() + SignedDuration::from_hours(1))
        .to_string()
        .into();
    job
}

async fn waits(world: &World, id: &str) {
    eventually(Duration::from_secs(20), || async {
        let shown = world.postroom(&["job", "show", "acme", id]).await;
        shown.code == 0 && shown.stdout.contains("waiting")
    })
    .await;
}

/// The two waiting jobs in the list.
async fn listed_as_waiting(world: &World) -> Vec<Value> {
    let listed = world
        .postroom(&["job", "list", "--tenant", "acme", "--state", "waiting", "--json"])
        .await
        .success();
    let jobs: Vec<Value> = listed
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(jobs.len(), 2, "{listed}");
    jobs
}

/// The list and `job show` say the same, and all that is known.
async fn shown_as_waiting(world: &World) {
    // Between two looks the report of the first may have been struck off.
    eventually(Duration::from_secs(20), || async {
        let jobs = listed_as_waiting(world).await;
        jobs.contains(&world.job("acme", "first").await)
    })
    .await;
    is_shown_in_full(&world.job("acme", "first").await);
}

fn is_shown_in_full(shown: &Value) {
    for (name, value) in [
        ("tenant", json!("acme")),
        ("job", json!("first")),
        ("level", json!("low")),
        ("state", json!("waiting")),
        ("reason", json!("schedule")),
        ("account", json!("acme/main")),
        ("attempts", json!(0)),
        ("batch", json!("b1")),
        ("outcome", Value::Null),
        ("cancel_requested", json!(false)),
    ] {
        assert_eq!(shown[name], value, "{name} in {shown}");
    }
}

#[tokio::test]
async fn a_waiting_job_can_be_seen_cancelled_and_released() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut first = scheduled("acme", "first");
    first["metadata"] = json!({"order": 7});
    first["tags"] = json!(["news"]);
    first["batch"] = json!("b1");
    world.publish(Level::Low, "acme", &first).await;
    world
        .publish(Level::High, "acme", &scheduled("acme", "second"))
        .await;
    waits(&world, "first").await;
    waits(&world, "second").await;

    shown_as_waiting(&world).await;

    let said = world
        .postroom(&["job", "cancel", "acme", "first"])
        .await
        .success();
    assert_eq!(said.trim(), "cancelled");
    let cancelled = reports.final_of("first").await;
    assert_eq!(cancelled.kind(), "mail.cancelled");
    assert_eq!(cancelled.json["data"]["metadata"], json!({"order": 7}));
    assert_eq!(cancelled.json["data"]["tags"], json!(["news"]));
    assert_eq!(world.job("acme", "first").await["outcome"], "mail.cancelled");
    world
        .postroom(&["job", "cancel", "acme", "first"])
        .await
        .fails_with(1);

    world
        .postroom(&["job", "release", "acme", "second"])
        .await
        .success();
    assert_eq!(reports.final_of("second").await.kind(), "mail.sent");
    let late = world
        .postroom(&["job", "cancel", "acme", "second"])
        .await
        .fails_with(1);
    assert!(late.contains("over already"), "{late}");
    world
        .postroom(&["job", "release", "acme", "second"])
        .await
        .fails_with(1);
    world
        .postroom(&["job", "release", "acme", "nobody"])
        .await
        .fails_with(1);
    world
        .postroom(&["job", "show", "acme", "nobody"])
        .await
        .fails_with(1);
    assert_eq!(taken(&server).into_keys().collect::<Vec<_>>(), ["second"]);
    world.assert_settled().await;
}

#[tokio::test]
async fn a_job_cancelled_before_it_comes_is_never_sent() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let said = world
        .postroom(&["job", "cancel", "acme", "early"])
        .await
        .success();
    assert!(said.contains("not here yet"), "{said}");
    let _worker = world.start_worker().await;
    world.publish_mail(Level::High, "acme", "early").await;
    world.publish_mail(Level::High, "acme", "other").await;
    let report = reports.final_of("early").await;
    assert_eq!(report.kind(), "mail.cancelled");
    assert_eq!(reports.final_of("other").await.kind(), "mail.sent");
    // The stone stays: a copy that comes later is cancelled too, silently.
    world.publish_mail(Level::High, "acme", "early").await;
    world.assert_settled().await;
    assert!(reports.none_for(Duration::from_millis(500)).await);
    assert_eq!(taken(&server).into_keys().collect::<Vec<_>>(), ["other"]);
}

/// Publishes a job of this tenant, and cancels it while its server thinks about the end of the mail.
async fn cancelled_in_flight(world: &World, tenant: &str, server: &SmtpServer) {
    world.publish_mail(Level::High, tenant, "going").await;
    eventually(Duration::from_secs(20), || async {
        server.counters().command("DATA") > 0
    })
    .await;
    let said = world
        .postroom(&["job", "cancel", tenant, "going"])
        .await
        .success();
    assert!(said.contains("in flight"), "{said}");
    assert_eq!(world.job(tenant, "going").await["cancel_requested"], true);
}

#[tokio::test]
async fn a_job_cancelled_while_it_is_sent_is_sent_if_the_server_takes_it_and_else_cancelled() {
    let world = World::ready().await;
    let slowly = || Script::new().delay(Phase::FinalDot, Duration::from_secs(2));
    let scripts = [
        ("yes", slowly()),
        (
            "later",
            slowly().on(Phase::FinalDot, Action::reply("451 4.3.0 Later")),
        ),
        ("who-knows", slowly().on(Phase::FinalDot, Action::TakeThenClose)),
    ];
    let mut servers = Vec::new();
    for (tenant, script) in scripts {
        let server = SmtpServer::builder().script(script).start().await;
        account(&world, tenant, &server, &[]).await;
        servers.push((tenant, server));
    }
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for (tenant, server) in &servers {
        cancelled_in_flight(&world, tenant, server).await;
    }
    let finals = reports.finals(3, Duration::from_mins(1)).await;
    let of = |tenant: &str| finals.iter().find(|r| r.tenant() == tenant).unwrap();
    assert_eq!(of("yes").kind(), "mail.sent");
    for (tenant, uncertain) in [("later", Value::Null), ("who-knows", json!(1))] {
        let (kind, data) = (of(tenant).kind(), &of(tenant).json["data"]);
        assert_eq!((kind, &data["attempt"]), ("mail.cancelled", &json!(1)), "{data}");
        assert_eq!(data["uncertain_attempts"], uncertain, "{data}");
        assert_eq!(data["sender"]["via"], "account", "{data}");
        assert!(data["timings"]["smtp_ms"].is_u64(), "{data}");
    }
    assert!(reports.none_for(Duration::from_millis(500)).await);
    world.assert_settled().await;
}
