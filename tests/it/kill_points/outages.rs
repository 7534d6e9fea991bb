//! Postgres or RabbitMQ out of reach at the worst moment.

use std::time::{Duration, Instant};

use postroom::level::Level;
use postroom_testkit::proxy::Weather;
use postroom_testkit::smtp::{Phase, Script};

use super::{LEASE, LONG_LEASE, Scene, job, was_killed};
use crate::support::{eventually, mails, proxied, taken};

/// Waits until every worker has been silent for twice its lease, on the database's clock.
async fn lease_is_over(scene: &Scene) {
    let sql = scene.world.sql().await;
    let silent = format!(
        "SELECT max(heartbeat_at) < clock_timestamp() - interval '{} seconds' FROM worker",
        2 * LEASE.as_secs()
    );
    eventually(Duration::from_secs(30), || async {
        sql.query_one(&silent, &[]).await.unwrap().get(0)
    })
    .await;
}

#[tokio::test]
async fn an_outage_of_postgres_longer_than_the_lease_repeats_no_mail_whose_reply_waits_in_memory() {
    const JOBS: usize = 12;
    let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(1500));
    let mut scene = Scene::new(script).await;
    let (proxy, url) = proxied(scene.world.database_url()).await;
    let through = [("POSTROOM_DATABASE_URL", url.as_str())];
    let first = scene.worker_with("", &through).await;
    let second = scene.worker_with("", &through).await;
    let jobs = mails("acme", "job", JOBS);
    scene.world.publish_all(Level::High, &jobs).await;
    eventually(Duration::from_secs(20), || async {
        scene.server.counters().command("DATA") > 0
    })
    .await;
    proxy.set(Weather::Stall);
    lease_is_over(&scene).await;
    // Nothing is reported that Postgres does not know.
    assert!(scene.reports.none_for(Duration::from_millis(200)).await);
    proxy.heal();
    scene.reports.finals(JOBS, Duration::from_mins(1)).await;
    scene.over().await;
    for (_, job) in &jobs {
        scene.was_sent(job["id"].as_str().unwrap(), 1, 0);
    }
    for worker in [&first, &second] {
        assert!(!worker.logs().contains("took over"), "{}", worker.logs());
    }
}

#[tokio::test]
async fn no_outcome_is_acknowledged_before_postgres_has_it() {
    const JOBS: usize = 12;
    let script = Script::new().delay(Phase::FinalDot, Duration::from_secs(4));
    let mut scene = Scene::new(script).await;
    let (proxy, url) = proxied(scene.world.database_url()).await;
    let through = [LONG_LEASE, ("POSTROOM_DATABASE_URL", url.as_str())];
    let mut workers = [
        scene.worker_with("", &through).await,
        scene.worker_with("", &through).await,
    ];
    let jobs = mails("acme", "job", JOBS);
    scene.world.publish_all(Level::High, &jobs).await;
    eventually(Duration::from_secs(20), || async {
        scene.server.counters().command("DATA") == JOBS as u64
    })
    .await;
    proxy.set(Weather::Stall);
    // Every reply comes, and waits in memory.
    eventually(Duration::from_secs(20), || async {
        let told = workers
            .iter()
            .map(|worker| worker.logs().matches("accepted=1").count());
        told.sum::<usize>() == JOBS
    })
    .await;
    scene.nothing_was_acknowledged(&mut workers, JOBS as u32).await;
}

#[tokio::test]
async fn a_worker_killed_during_an_outage_of_postgres_leaves_the_reply_unknown() {
    let script = Script::new().delay(Phase::FinalDot, Duration::from_secs(1));
    let mut scene = Scene::new(script).await;
    let (proxy, url) = proxied(scene.world.database_url()).await;
    let plan = "mail_written=pause(500ms);replied=kill";
    let mut doomed = scene
        .worker_with(plan, &[("POSTROOM_DATABASE_URL", url.as_str())])
        .await;
    scene.publish(&job("unknown")).await;
    doomed.wait_log("fail point mail_written").await;
    proxy.set(Weather::Stall);
    was_killed(&mut doomed).await;
    assert_eq!(scene.mails("unknown"), 1);
    let _survivor = scene.worker("").await;
    scene.reports.final_of("unknown").await;
    scene.over().await;
    scene.was_sent("unknown", 2, 1);
}

#[tokio::test]
async fn a_job_delivered_again_to_the_worker_that_is_sending_it_is_not_sent_beside_itself() {
    let script = Script::new().delay(Phase::FinalDot, Duration::from_secs(4));
    let mut scene = Scene::new(script).await;
    let (proxy, url) = proxied(scene.world.amqp_url()).await;
    let worker = scene
        .worker_with("", &[LONG_LEASE, ("POSTROOM_AMQP_URL", &url)])
        .await;
    scene.publish(&job("one")).await;
    eventually(Duration::from_secs(20), || async {
        scene.server.counters().command("DATA") == 1
    })
    .await;
    proxy.reset();
    // It comes back to the only worker there is, while that waits for the reply.
    let absorbed = r#"postroom_jobs_total{outcome="duplicate"}"#;
    eventually(Duration::from_secs(20), || async {
        worker.count(absorbed).await == 1
    })
    .await;
    scene.reports.final_of("one").await;
    scene.over().await;
    scene.was_sent("one", 1, 0);
    assert_eq!(taken(&scene.server).len(), 1);
    assert!(worker.logs().contains("generation=2"));
}

#[tokio::test]
async fn a_worker_told_to_end_while_rabbitmq_is_away_leaves_its_reports_to_the_next() {
    let script = Script::new().delay(Phase::FinalDot, Duration::from_secs(2));
    let mut scene = Scene::new(script).await;
    let (proxy, url) = proxied(scene.world.amqp_url()).await;
    let mut worker = scene
        .worker_with("", &[LONG_LEASE, ("POSTROOM_AMQP_URL", &url)])
        .await;
    scene.publish(&job("unreported")).await;
    eventually(Duration::from_secs(20), || async {
        scene.server.counters().command("DATA") == 1
    })
    .await;
    proxy.set(Weather::Stall);
    proxy.reset();
    worker.wait_log("session with RabbitMQ lost").await;
    let sql = scene.world.sql().await;
    eventually(Duration::from_secs(20), || async {
        let owed = "SELECT count(*) FROM outbox";
        sql.query_one(owed, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    let told = Instant::now();
    assert!(worker.term().await.success(), "{}", worker.logs());
    // Much less than the 25 s for which a report is tried.
    assert!(told.elapsed() < Duration::from_secs(12), "{:?}", told.elapsed());
    scene.outbox_is_due().await;
    let _next = scene.worker("").await;
    scene.reports.final_of("unreported").await;
    scene.over().await;
    scene.was_sent("unreported", 1, 0);
}

#[tokio::test]
async fn a_report_that_a_sweep_could_not_publish_for_want_of_rabbitmq_is_due_for_whoever_comes_first() {
    let mut scene = Scene::new(Script::new()).await;
    let (proxy, url) = proxied(scene.world.amqp_url()).await;
    // Its worker tries it twice; then it is left to the sweep.
    let plan = "report_confirmed=error@1;report_confirmed=error@2";
    let mut worker = scene
        .worker_with(plan, &[LONG_LEASE, ("POSTROOM_AMQP_URL", &url)])
        .await;
    scene.publish(&job("swept")).await;
    scene.reports.until(|all| all.len() == 2).await;
    proxy.set(Weather::Stall);
    scene.outbox_is_due().await;
    let sql = scene.world.sql().await;
    let is_one = async |condition: &str| {
        let count = format!("SELECT count(*) FROM outbox WHERE {condition}");
        sql.query_one(&count, &[]).await.unwrap().get::<_, i64>(0) == 1
    };
    let taken = "due_at > clock_timestamp() + interval '40 seconds'";
    eventually(Duration::from_secs(20), || is_one(taken)).await;
    proxy.reset();
    worker.wait_log("session with RabbitMQ lost").await;
    assert!(worker.term().await.success(), "{}", worker.logs());
    assert!(is_one("due_at <= clock_timestamp()").await, "{}", worker.logs());
    let _next = scene.worker("").await;
    scene.reports.until(|all| all.len() > 2).await;
    scene.over().await;
    scene.was_sent("swept", 1, 0);
}

#[tokio::test]
async fn a_stored_report_that_cannot_be_read_is_named_in_the_log_and_holds_up_no_other() {
    let mut scene = Scene::new(Script::new()).await;
    // Its worker dies between settling and publishing; somebody puts a row in front of what it owes.
    scene.dies("settled=kill", || job("owed")).await;
    let sql = scene.world.sql().await;
    let broken = "INSERT INTO outbox (n, tenant, id, seq, due_at, created_at, body)
                  SELECT n - 1, tenant, 'broken', seq, due_at, created_at, '{' FROM outbox";
    assert_eq!(sql.execute(broken, &[]).await.unwrap(), 1);
    scene.outbox_is_due().await;
    let worker = scene.worker("").await;
    scene.reports.final_of("owed").await;
    worker.wait_log("a stored report cannot be read").await;
    // It stays until somebody does what the log says.
    let delete = "DELETE FROM outbox WHERE id = 'broken'";
    assert_eq!(sql.execute(delete, &[]).await.unwrap(), 1);
    scene.over().await;
}
