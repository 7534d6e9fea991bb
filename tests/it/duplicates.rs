//! Ids are idempotency keys: the same job again is the same mail, other content under its id is refused.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::{Phase, Script, SmtpServer};
use serde_json::json;

use crate::sends::account;
use crate::support::{World, mail, taken};

#[tokio::test]
async fn a_job_published_again_and_again_gives_one_mail() {
    let world = World::ready().await;
    let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(1500));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    // Before: two copies are in the queue when the workers start, and may be taken by different ones.
    world.publish_mail(Level::High, "acme", "one").await;
    world.publish_mail(Level::High, "acme", "one").await;
    let (first, second) = (world.start_worker().await, world.start_worker().await);
    // During: the server is about to answer; on another level too.
    while server.counters().command("DATA") == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for level in [Level::High, Level::Low, Level::Immediate] {
        world.publish_mail(level, "acme", "one").await;
    }
    assert_eq!(reports.final_of("one").await.kind(), "mail.sent");
    // After.
    for _ in 0..3 {
        world.publish_mail(Level::High, "acme", "one").await;
    }
    // What is published last is done last: by then the copies have been dealt with.
    world.publish_mail(Level::High, "acme", "two").await;
    reports.final_of("two").await;
    world.assert_settled().await;
    assert!(reports.none_for(Duration::from_millis(500)).await);
    assert_eq!(
        taken(&server).into_iter().collect::<Vec<_>>(),
        [("one".into(), 1), ("two".into(), 1)]
    );
    assert_eq!(reports.of("one").len(), 1);
    let mut duplicates = 0.0;
    for worker in [&first, &second] {
        duplicates += worker.metric(r#"postroom_jobs_total{outcome="duplicate"}"#).await;
    }
    assert!((5.0..=7.0).contains(&duplicates), "{duplicates}");
    assert_eq!(world.depth("mail.jobs.dead").await, 0);
}

#[tokio::test]
async fn other_content_under_a_known_id_is_dead_lettered_and_leaves_the_first_alone() {
    let mut world = World::ready().await;
    world.set("POSTROOM_DEFERRED_REPORT_AFTER", "1s");
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut first = mail("acme", "waits");
    let send_at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(4);
    first["send_at"] = send_at.to_string().into();
    world.publish(Level::High, "acme", &first).await;
    world.publish_mail(Level::High, "acme", "done").await;
    reports.final_of("done").await;
    reports.until(|all| all.iter().any(|r| r.job() == "waits")).await;
    for id in ["waits", "done"] {
        let mut other = mail("acme", id);
        other["subject"] = json!("something else");
        world.publish(Level::High, "acme", &other).await;
    }
    reports
        .until(|all| all.iter().filter(|r| r.kind() == "mail.rejected").count() == 2)
        .await;
    for rejected in reports.all().iter().filter(|r| r.kind() == "mail.rejected") {
        assert_eq!(rejected.reason(), "id_conflict");
        assert!(!rejected.is_final(), "{}", rejected.json);
    }
    world.wait_depth("mail.jobs.dead", 2).await;
    let letters = world.postroom(&["dead", "list", "--json"]).await.success();
    assert_eq!(letters.matches("id_conflict").count(), 2, "{letters}");
    let sent = reports.final_of("waits").await;
    assert_eq!(sent.kind(), "mail.sent");
    let taken = taken(&server);
    assert_eq!(
        taken.into_iter().collect::<Vec<_>>(),
        [("done".into(), 1), ("waits".into(), 1)]
    );
    world.assert_settled().await;
}
