//! Jobs that crash whoever works on them end in the dead letters; jobs that only were near them do not. And jobs of which
//! nobody knows whether they were sent end as somebody decides.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::{Action, Phase, Script, SmtpServer};
use serde_json::json;

use crate::sends::account;
use crate::support::{World, mail, mails, taken};

const LIMIT: Duration = Duration::from_mins(2);

/// A world in which work on the content of job `poison` does this to a worker.
async fn world(action: &str) -> World {
    let mut world = World::ready().await;
    world.set("POSTROOM_LEASE", "1s");
    world.set("POSTROOM_RETRY_BASE", "100ms");
    world.set("POSTROOM_FAIL_POINTS", format!("composing={action}@job=poison"));
    world
}

/// What the dead letters hold.
async fn dead(world: &World) -> Vec<serde_json::Value> {
    let listed = world.postroom(&["dead", "list", "--json"]).await.success();
    listed
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The poison is buried and told; then, mended, it is replayed.
async fn is_buried_and_can_be_replayed(mut world: World, server: &SmtpServer) {
    let mut reports = world.reports().await;
    let letters = dead(&world).await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(
        (&letters[0]["reason"], &letters[0]["id"]),
        (&json!("crash_loop"), &json!("poison"))
    );
    let shown = world.job("acme", "poison").await;
    assert_eq!(
        (&shown["state"], &shown["outcome"]),
        (&json!("dead"), &json!("mail.failed"))
    );
    let said = world
        .postroom(&["job", "resolve", "acme", "poison", "--sent"])
        .await
        .fails_with(1);
    assert!(said.contains("dead replay"), "{said}");
    world.unset("POSTROOM_FAIL_POINTS");
    let _worker = world.start_worker().await;
    world
        .postroom(&["dead", "replay", "--id", "poison"])
        .await
        .success();
    let sent = reports.final_of("poison").await;
    assert_eq!(
        (sent.kind(), &sent.json["data"]["attempt"]),
        ("mail.sent", &json!(1))
    );
    assert_eq!(taken(server)["poison"], 1);
    assert!(dead(&world).await.is_empty());
    world.assert_settled().await;
}

#[tokio::test]
async fn a_job_that_kills_three_workers_is_buried_and_its_neighbours_are_sent() {
    let world = world("kill").await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    world.publish_all(Level::High, &mails("acme", "before", 20)).await;
    world.publish_mail(Level::High, "acme", "poison").await;
    world.publish_all(Level::High, &mails("acme", "after", 20)).await;
    let mut deaths = 0;
    // Not waited for: it may be dead before it is ready.
    let mut worker = world.spawn(&["worker"]);
    let buried = loop {
        tokio::select! {
            report = reports.final_of("poison") => break report,
            status = worker.wait() => {
                assert!(!status.success());
                deaths += 1;
                worker = world.spawn(&["worker"]);
            }
        }
    };
    assert_eq!(deaths, 3);
    assert_eq!((buried.kind(), buried.reason()), ("mail.failed", "crash_loop"));
    assert_eq!(buried.json["data"]["recipients"][0]["status"], "pending");
    let finals = reports.finals(41, LIMIT).await;
    assert_eq!(
        finals
            .iter()
            .filter(|report| report.kind() == "mail.sent")
            .count(),
        40
    );
    worker.term().await;
    is_buried_and_can_be_replayed(world, &server).await;
}

#[tokio::test]
async fn a_job_that_panics_three_times_is_buried_out_of_the_waiting_room() {
    let world = world("panic").await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let mut worker = world.start_worker().await;
    let mut job = mail("acme", "poison");
    job["metadata"] = json!({"order": 7});
    job["from"] = json!("shop@example.com");
    job["smtp_override"] = json!({"host": "127.0.0.1", "port": server.port(), "tls": "none"});
    world.publish(Level::High, "acme", &job).await;
    let buried = reports.final_of("poison").await;
    assert_eq!((buried.kind(), buried.reason()), ("mail.failed", "crash_loop"));
    assert_eq!(buried.json["data"]["metadata"], json!({"order": 7}));
    assert_eq!(buried.json["data"]["attempt"], 3);
    assert_eq!(worker.count("postroom_dead_lettered_total").await, 1);
    worker.term().await;
    is_buried_and_can_be_replayed(world, &server).await;
}

#[tokio::test]
async fn a_job_that_was_inflated_to_wait_is_buried_compressed_and_can_be_replayed() {
    let mut world = world("panic").await;
    world.set("POSTROOM_JOB_MAX_BYTES", "64KiB");
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let mut worker = world.start_worker().await;
    let mut job = mail("acme", "poison");
    job["text"] = json!("Hello again.\n".repeat(16_000));
    world.publish_gzip(Level::High, "acme", &job).await;
    let buried = reports.final_of("poison").await;
    assert_eq!((buried.kind(), buried.reason()), ("mail.failed", "crash_loop"));
    assert_eq!(
        buried.json["data"]["recipients"][0]["address"],
        "poison@example.org"
    );
    assert!(dead(&world).await[0]["bytes"].as_u64().unwrap() < 64 << 10);
    worker.term().await;
    is_buried_and_can_be_replayed(world, &server).await;
}

#[tokio::test]
async fn a_job_held_as_uncertain_ends_as_an_operator_decides() {
    let world = World::ready().await;
    // The server takes the mail, and the connection breaks before it can say so.
    let script = Script::new().first(3, Phase::FinalDot, Action::TakeThenClose);
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for id in ["sent", "not-sent", "failed"] {
        let mut job = mail("acme", id);
        job["on_uncertain"] = json!("hold");
        world.publish(Level::High, "acme", &job).await;
        world.wait_state("acme", id, 4).await;
        for undecided in ["release", "cancel"] {
            let said = world
                .postroom(&["job", undecided, "acme", id])
                .await
                .fails_with(1);
            assert!(said.contains("job resolve --sent"), "{said}");
        }
    }
    for (id, kind) in [
        ("sent", "mail.sent"),
        ("not-sent", "mail.sent"),
        ("failed", "mail.failed"),
    ] {
        let flag = format!("--{id}");
        let decide = ["job", "resolve", "acme", id, &flag, "--by", "ann"];
        world.postroom(&decide).await.success();
        let told = reports.final_of(id).await;
        assert_eq!(
            (told.kind(), &told.json["data"]["uncertain_attempts"]),
            (kind, &json!(1)),
            "{id}"
        );
        let shown = world.job("acme", id).await;
        assert_eq!(
            (&shown["resolved"], &shown["resolved_by"]),
            (&json!(id.replace('-', "_")), &json!("ann"))
        );
        assert!(shown["resolved_at"].is_string());
        let again = world.postroom(&decide).await.fails_with(1);
        assert!(again.contains("job show"), "{again}");
    }
    world
        .postroom(&["job", "resolve", "acme", "sent"])
        .await
        .fails_with(2);
    world
        .postroom(&["job", "resolve", "acme", "nobody", "--sent"])
        .await
        .fails_with(1);
    assert_eq!(taken(&server)["not-sent"], 2);
    assert_eq!(taken(&server)["sent"], 1);
    world.assert_settled().await;
}

#[tokio::test]
async fn attempts_that_ended_uncertain_are_counted_in_the_final_report() {
    let mut world = World::ready().await;
    world.set("POSTROOM_RETRY_BASE", "100ms");
    let script = Script::new().first(2, Phase::FinalDot, Action::TakeThenClose);
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_mail(Level::High, "acme", "unsure").await;
    let sent = reports.final_of("unsure").await;
    let data = &sent.json["data"];
    assert_eq!(
        (&data["attempt"], &data["uncertain_attempts"]),
        (&json!(3), &json!(2))
    );
    assert_eq!(server.received_count(), 3);
}
