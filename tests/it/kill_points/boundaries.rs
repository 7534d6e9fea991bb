//! Workers killed at each boundary of a job's life, from its delivery to its acknowledgement.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::Script;
use serde_json::json;

use super::{LONG_LEASE, Scene, job};
use crate::support::eventually;

/// Where a worker dies while it handles a job of that name; how often that is sent in the end, and how many of its
/// leases ended in the dark.
const BOUNDARIES: [(&str, usize, u64); 8] = [
    ("admitted", 1, 1),
    ("leased", 1, 1),
    ("envelope_accepted", 1, 1),
    ("before_final_write", 1, 1),
    // The server has said yes and nobody wrote it down: the one window in which a mail goes out twice.
    ("replied", 2, 1),
    ("settled", 1, 0),
    ("before_ack", 1, 0),
    // The last one: the next to be killed would get it, and lease it.
    ("delivered", 1, 0),
];

#[tokio::test]
async fn a_worker_killed_at_any_boundary_loses_nothing_and_repeats_only_after_the_final_write() {
    let mut scene = Scene::new(Script::new()).await;
    for (point, ..) in BOUNDARIES {
        scene
            .dies(&format!("{point}=kill@job={point}"), || job(point))
            .await;
    }
    scene.outbox_is_due().await;
    let _survivor = scene.worker("").await;
    scene
        .reports
        .finals(BOUNDARIES.len(), Duration::from_mins(1))
        .await;
    scene.over().await;
    for (point, mails, uncertain) in BOUNDARIES {
        scene.was_sent(point, mails, uncertain);
    }
}

#[tokio::test]
async fn a_worker_killed_in_the_middle_of_a_mail_leaves_half_a_mail_that_nobody_takes() {
    let mut scene = Scene::new(Script::new()).await;
    let mut long = job("long");
    long["text"] = json!("A line of some words.\n".repeat(20_000));
    scene.dies("mail_half_written=kill", || long).await;
    assert_eq!(scene.mails("long"), 0);
    let _survivor = scene.worker("").await;
    scene.reports.final_of("long").await;
    scene.over().await;
    scene.was_sent("long", 1, 1);
}

#[tokio::test]
async fn a_worker_killed_between_the_final_dot_and_the_reply_leads_to_the_same_mail_once_more() {
    let mut scene = Scene::new(Script::new()).await;
    scene.dies("mail_written=kill", || job("twice")).await;
    scene.server.wait_for(1, Duration::from_secs(20)).await;
    let _survivor = scene.worker("").await;
    scene.reports.final_of("twice").await;
    scene.over().await;
    scene.was_sent("twice", 2, 1);
    let mails = scene.server.received();
    for name in ["Message-ID", "Date"] {
        assert_eq!(
            crate::support::header(&mails[0], name),
            crate::support::header(&mails[1], name)
        );
    }
}

#[tokio::test]
async fn a_job_at_which_a_worker_panics_is_tried_again_and_the_worker_goes_on() {
    let mut scene = Scene::new(Script::new()).await;
    let worker = scene.worker("leased=panic@1@job=poison").await;
    scene.publish(&job("poison")).await;
    scene.publish(&job("other")).await;
    scene.reports.finals(2, Duration::from_secs(30)).await;
    scene.over().await;
    assert!(worker.logs().contains("fail point leased"));
    for id in ["poison", "other"] {
        assert_eq!((scene.mails(id), scene.the_final(id).kind()), (1, "mail.sent"));
    }
    assert!(worker.ready().await);
}

#[tokio::test]
async fn a_panic_over_one_of_many_expired_jobs_leaves_the_others_alone_and_it_ends_as_well() {
    const OTHERS: usize = 60;
    const KEPT: &str = "SELECT count(*) FROM job WHERE id = 'poison' AND state = 1 AND body IS NOT NULL";
    let mut scene = Scene::new(Script::new()).await;
    let mut jobs: Vec<_> = (0..OTHERS).map(|n| job(&format!("other-{n}"))).collect();
    jobs.insert(OTHERS / 2, job("poison"));
    let expired = jobs.into_iter().map(|mut job| {
        job["expires_at"] = "2020-01-01T00:00:00Z".into();
        ("acme".to_owned(), job)
    });
    let expired: Vec<_> = expired.collect();
    scene.world.publish_all(Level::High, &expired).await;
    // Both statements that admit stand still for a while, so that the next one has the whole rest.
    let plan = "delivered=pause(500ms)@1;delivered=pause(500ms)@2;admitted=pause(1ms)@job=poison;\
                planning=panic@1@job=poison";
    let mut worker = scene.worker_with(plan, &[LONG_LEASE]).await;
    scene.reports.finals(OTHERS, Duration::from_secs(30)).await;
    assert!(scene.reports.of("poison").is_empty());
    let logs = worker.logs();
    let batch = logs.lines().find(|line| line.contains("fail point admitted"));
    assert!(batch.is_some_and(|jobs| jobs.contains("other-")), "{batch:?}");
    // Its delivery comes again, and the job is kept for whoever finds its lease. This worker looks for what it has forgotten
    // once a minute and would take two or three; the next one takes over at once what is left of the old.
    let sql = scene.world.sql().await;
    eventually(Duration::from_secs(20), || async {
        sql.query_one(KEPT, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    assert!(worker.ready().await);
    assert!(worker.term().await.success(), "{}", worker.logs());
    let _next = scene.worker("").await;
    scene.reports.final_of("poison").await;
    scene.over().await;
    for (_, job) in &expired {
        let id = job["id"].as_str().unwrap();
        assert_eq!(scene.the_final(id).kind(), "mail.expired");
    }
    assert_eq!(scene.server.received_count(), 0);
}
