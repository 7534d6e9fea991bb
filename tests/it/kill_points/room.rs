//! The waiting room, and jobs that pass from one worker to another.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use postroom_testkit::smtp::{Action, Phase, Script};
use serde_json::Value;

use super::{LONG_LEASE, Scene, held, job, was_killed};
use crate::support::{Process, eventually};

/// A job that waits in the ledger for a moment before it is sent: so short that it is not parked at once, but claimed.
fn later(id: &str) -> Value {
    in_seconds(2, id)
}

fn in_seconds(seconds: i64, id: &str) -> Value {
    let mut job = job(id);
    let at = Timestamp::now()
        .checked_add(SignedDuration::from_secs(seconds))
        .unwrap();
    job["send_at"] = at.to_string().into();
    job
}

/// Where a worker dies while it parks a job of that name at once. The last one: the next to be killed would get it, and
/// park it.
const PARKING: [&str; 4] = ["settled", "before_ack", "acked", "delivered"];

async fn waiting(sql: &tokio_postgres::Client) -> i64 {
    let text = "SELECT count(*) FROM job WHERE state = 2 AND reason = 3";
    sql.query_one(text, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_worker_killed_at_any_boundary_of_parking_leaves_a_job_that_waits_once_and_is_told_once() {
    let mut scene = Scene::new(Script::new()).await;
    for point in PARKING {
        scene
            .dies(&format!("{point}=kill@job={point}"), || in_seconds(3600, point))
            .await;
    }
    let sql = scene.world.sql().await;
    assert_eq!(
        waiting(&sql).await,
        3,
        "all but the one of which nothing was written"
    );
    scene.outbox_is_due().await;
    let _survivor = scene.worker_with("", &[LONG_LEASE]).await;
    eventually(Duration::from_secs(20), || async { waiting(&sql).await == 4 }).await;
    for id in PARKING {
        let released = scene.world.postroom(&["job", "release", "acme", id]).await;
        released.success();
        scene.reports.final_of(id).await;
    }
    scene.over().await;
    for id in PARKING {
        scene.was_sent(id, 1, 0);
        let told = scene.reports.of(id);
        let deferred = told.iter().filter(|report| report.kind() == "mail.deferred");
        let ids: BTreeSet<_> = deferred.map(|report| &report.id).collect();
        assert_eq!(ids.len(), 1, "{id}: {ids:?}");
    }
}

#[tokio::test]
async fn nothing_parked_is_acknowledged_before_postgres_has_it() {
    const JOBS: u32 = 12;
    let mut scene = Scene::new(Script::new()).await;
    let (locking, watching) = (scene.world.sql().await, scene.world.sql().await);
    let lock = "BEGIN; LOCK TABLE job IN ACCESS EXCLUSIVE MODE";
    let mut worker = [scene.worker_with("", &[LONG_LEASE]).await];
    locking.batch_execute(lock).await.unwrap();
    for n in 0..JOBS {
        scene.publish(&in_seconds(3600, &format!("later-{n}"))).await;
    }
    let stuck = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                 AND wait_event_type = 'Lock' AND query LIKE '%.park_new_v%'";
    eventually(Duration::from_secs(20), || async {
        watching.query_one(stuck, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    scene.nothing_was_acknowledged(&mut worker, JOBS).await;
}

#[tokio::test]
async fn a_job_parked_by_a_statement_whose_answer_is_lost_is_recognised_and_told_once() {
    let mut scene = Scene::new(Script::new()).await;
    scene.world.set("POSTROOM_DEFERRED_REPORT_AFTER", "1s");
    let worker = scene.worker("settled=error@1").await;
    scene.publish(&in_seconds(5, "answer")).await;
    scene.reports.final_of("answer").await;
    scene.over().await;
    assert!(worker.logs().contains("fail point settled"));
    scene.was_sent("answer", 1, 0);
    let told: Vec<_> = scene
        .reports
        .of("answer")
        .iter()
        .map(|report| report.kind().to_owned())
        .collect();
    assert_eq!(told, ["mail.deferred", "mail.sent"]);
    let parked = worker.metric(r#"postroom_jobs_total{outcome="parked"}"#).await;
    let again = worker.metric(r#"postroom_jobs_total{outcome="duplicate"}"#).await;
    assert_eq!((parked as u64, again as u64), (1, 0));
}

#[tokio::test]
async fn a_parked_job_delivered_again_is_acknowledged_and_one_released_to_the_dead_is_taken_over() {
    let mut scene = Scene::new(Script::new()).await;
    scene.dies("before_ack=kill", || later("parked")).await;
    let sql = scene.world.sql().await;
    let state = "SELECT state FROM job WHERE id = 'parked'";
    let state: i16 = sql.query_one(state, &[]).await.unwrap().get(0);
    assert_eq!(state, 2, "it waits");
    scene
        .dies("released=kill@job=released", || later("released"))
        .await;
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
    scene.dies(plan, || held("back")).await;
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
async fn no_copy_is_acknowledged_before_postgres_has_its_body() {
    let silent = Script::new().on(Phase::FinalDot, Action::Silence);
    let mut scene = Scene::new(silent).await;
    let refusing = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''not now''; END';
                    CREATE TRIGGER refuse BEFORE UPDATE OF body ON job FOR EACH ROW
                    WHEN (OLD.body IS NULL AND NEW.body IS NOT NULL) EXECUTE FUNCTION refuse()";
    scene.world.sql().await.batch_execute(refusing).await.unwrap();
    let mut worker = [scene.worker_with("", &[LONG_LEASE]).await];
    scene.publish(&job("one")).await;
    eventually(Duration::from_secs(20), || async {
        scene.server.counters().command("DATA") == 1
    })
    .await;
    scene.publish(&job("one")).await;
    worker[0].wait_log("not now").await;
    scene.nothing_was_acknowledged(&mut worker, 2).await;
}

#[tokio::test]
async fn a_worker_killed_in_the_middle_of_a_takeover_leaves_it_to_the_next() {
    let mut scene = Scene::new(Script::new()).await;
    scene.dies("leased=kill", || job("first")).await;
    // Its last deed is to commit that the dead worker's jobs wait again; on a slow machine that is before it is ready.
    let mut second = scene.spawn("worker", "taken_over=kill;released=pause(30s)", &[]);
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
    scene.dies("envelope_accepted=kill", || job("capped")).await;
    let leased = "SELECT coalesce(sum(held), 0)::bigint FROM connection_lease";
    let sql = scene.world.sql().await;
    let held: i64 = sql.query_one(leased, &[]).await.unwrap().get(0);
    assert_eq!(held, 1, "the dead one still has its connection");
    let _survivor = scene.worker("").await;
    scene.reports.final_of("capped").await;
    scene.over().await;
    scene.was_sent("capped", 1, 1);
}
