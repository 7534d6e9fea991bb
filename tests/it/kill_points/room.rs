//! The waiting room, and jobs that pass from one worker to another.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use postroom_testkit::smtp::{Phase, Script};
use serde_json::Value;

use super::{LONG_LEASE, Scene, held, job, was_killed};
use crate::support::{Process, eventually};

/// A job that waits in the ledger for a moment before it is sent.
fn later(id: &str) -> Value {
    let mut job = job(id);
    let at = Timestamp::now()
        .checked_add(SignedDuration::from_secs(2))
        .unwrap();
    job["send_at"] = at.to_string().into();
    job
}

#[tokio::test]
async fn a_parked_job_delivered_again_is_acknowledged_and_one_released_to_the_dead_is_taken_over() {
    let mut scene = Scene::new(Script::new()).await;
    scene.dies("before_ack=kill", &later("parked")).await;
    scene.dies("released=kill@job=released", &later("released")).await;
    let _survivor = scene.worker("").await;
    scene.reports.finals(2, Duration::from_secs(40)).await;
    scene.over().await;
    // Who was killed after the release of the second may have released the first as well.
    scene.was_sent("released", 1, 1);
    assert_eq!(scene.mails("parked"), 1);
    assert_eq!(scene.the_final("parked").kind(), "mail.sent");
}

#[tokio::test]
async fn a_job_given_back_by_a_worker_that_then_dies_waits_for_no_lease() {
    let mut scene = Scene::new(Script::new()).await;
    // The answer to the mark is lost: the worker gives the job back, first in the ledger, then to the broker.
    let plan = "data_marked=error@1;before_ack=kill@1";
    scene.dies(plan, &held("back")).await;
    let _survivor = scene.worker_with("", &[LONG_LEASE]).await;
    scene.reports.final_of("back").await;
    scene.over().await;
    scene.was_sent("back", 1, 0);
}

/// Publishes the same job again until this worker has died of it.
async fn copies_until_death(scene: &Scene, doomed: &mut Process, job: &Value) {
    eventually(Duration::from_secs(20), || async {
        scene.publish(job).await;
        doomed.logs().contains("Kill")
    })
    .await;
    was_killed(doomed).await;
}

#[tokio::test]
async fn a_copy_absorbed_by_a_worker_that_loses_the_answer_or_dies_changes_nothing() {
    let script = Script::new().delay(Phase::FinalDot, Duration::from_secs(4));
    let mut scene = Scene::new(script).await;
    let _sender = scene.worker_with("", &[LONG_LEASE]).await;
    scene.publish(&job("one")).await;
    eventually(Duration::from_secs(20), || async {
        scene.server.counters().command("DATA") == 1
    })
    .await;
    let plan = "absorbed=error@1;absorbed=kill@2";
    let mut doomed = scene.worker_with(plan, &[LONG_LEASE]).await;
    copies_until_death(&scene, &mut doomed, &job("one")).await;
    scene.reports.final_of("one").await;
    scene.over().await;
    scene.was_sent("one", 1, 0);
}

#[tokio::test]
async fn a_worker_killed_in_the_middle_of_a_takeover_leaves_it_to_the_next() {
    let mut scene = Scene::new(Script::new()).await;
    scene.dies("leased=kill", &job("first")).await;
    // Its last deed is to commit that the dead worker's jobs wait again.
    let mut second = scene.worker("taken_over=kill;released=pause(30s)").await;
    was_killed(&mut second).await;
    let _third = scene.worker("").await;
    scene.reports.final_of("first").await;
    scene.over().await;
    // Whether the second one had leased it as well by then is a race.
    assert_eq!(scene.mails("first"), 1);
    let told = scene.the_final("first").json["data"]["uncertain_attempts"].clone();
    assert!(told == 1 || told == 2, "{told}");
}

#[tokio::test]
async fn the_connections_of_a_dead_worker_count_no_longer_against_the_cap() {
    let mut scene = Scene::new(Script::new()).await;
    let capped = ["account", "set", "acme", "main", "--max-connections", "1"];
    scene.world.postroom(&capped).await.success();
    scene.dies("envelope_accepted=kill", &job("capped")).await;
    let leased = "SELECT coalesce(sum(held), 0)::bigint FROM connection_lease";
    let sql = scene.world.sql().await;
    let held: i64 = sql.query_one(leased, &[]).await.unwrap().get(0);
    assert_eq!(held, 1, "the dead one still has its connection");
    let _survivor = scene.worker("").await;
    scene.reports.final_of("capped").await;
    scene.over().await;
    scene.was_sent("capped", 1, 1);
}
