//! Answers that get lost although the other side has done its part: what was done is recognised, not done again.

use std::time::Duration;

use postroom_testkit::smtp::Script;

use super::{LONG_LEASE, Scene, held, job};

#[tokio::test]
async fn the_same_claim_recognises_its_own_admission_and_outcome() {
    let mut scene = Scene::new(Script::new()).await;
    let points = ["admitted", "settled", "report_confirmed"];
    let plan = points.map(|point| format!("{point}=error@1")).join(";");
    let worker = scene.worker_with(&plan, &[LONG_LEASE]).await;
    scene.publish(&job("answers")).await;
    scene.reports.final_of("answers").await;
    scene.over().await;
    for point in points {
        assert!(worker.logs().contains(&format!("fail point {point}")));
    }
    scene.was_sent("answers", 1, 0);
    let copies = scene.reports.of("answers").len();
    assert_eq!(copies, 2, "the report was published again, under its id");
    assert_eq!(worker.count("postroom_jobs_total").await, 1);
}

#[tokio::test]
async fn a_report_whose_confirm_or_sender_is_lost_is_published_again_under_its_id() {
    let mut scene = Scene::new(Script::new()).await;
    // The frame of the acknowledgement is on its way before the end.
    let plan = "acked=pause(500ms)@job=acked;acked=kill@job=acked";
    scene.dies(plan, || job("acked")).await;
    scene.world.wait_depth("mail.jobs.high", 0).await;
    assert!(
        scene.reports.none_for(Duration::from_millis(300)).await,
        "it owes its report"
    );
    scene.dies("report_confirmed=kill", || job("confirmed")).await;
    scene.reports.final_of("confirmed").await;
    scene.outbox_is_due().await;
    let _survivor = scene.worker("").await;
    scene.reports.finals(2, Duration::from_secs(30)).await;
    scene.over().await;
    for (id, copies) in [("acked", 1), ("confirmed", 2)] {
        scene.was_sent(id, 1, 0);
        assert_eq!(scene.reports.of(id).len(), copies, "{id}");
    }
}

#[tokio::test]
async fn a_report_that_the_broker_does_not_confirm_rests_after_a_sweep_so_that_others_have_their_turn() {
    const RESTS: &str =
        "SELECT count(*) FROM outbox WHERE due_at > clock_timestamp() + interval '40 seconds'";
    let mut scene = Scene::new(Script::new()).await;
    // Its worker tries it twice, and so does the sweep.
    let plan =
        "report_confirmed=error@1;report_confirmed=error@2;report_confirmed=error@3;report_confirmed=error@4";
    let worker = scene.worker(plan).await;
    scene.publish(&job("unconfirmed")).await;
    scene.reports.until(|all| all.len() == 2).await;
    scene.outbox_is_due().await;
    scene.reports.until(|all| all.len() == 4).await;
    // Two sweeps later.
    assert!(scene.reports.none_for(Duration::from_secs(12)).await);
    assert!(worker.count("postroom_outbox_oldest_seconds").await >= 10);
    let sql = scene.world.sql().await;
    let resting: i64 = sql.query_one(RESTS, &[]).await.unwrap().get(0);
    assert_eq!(resting, 1);
    scene.outbox_is_due().await;
    scene.reports.until(|all| all.len() == 5).await;
    scene.over().await;
    scene.was_sent("unconfirmed", 1, 0);
}

#[tokio::test]
async fn a_mark_whose_answer_is_lost_stops_the_write_and_the_next_lease_sends() {
    let mut scene = Scene::new(Script::new()).await;
    let _worker = scene.worker_with("data_marked=error@1", &[LONG_LEASE]).await;
    scene.publish(&held("marked")).await;
    scene.reports.final_of("marked").await;
    scene.over().await;
    scene.was_sent("marked", 1, 0);
}
