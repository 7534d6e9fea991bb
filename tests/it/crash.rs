//! Workers that die, and workers that are told to end.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::{Phase, Script, SmtpServer};

use crate::sends::account;
use crate::support::{Received, World, eventually, mails, taken};

async fn slow_server() -> SmtpServer {
    let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(50));
    SmtpServer::builder().script(script).start().await
}

fn each_has_one_final(finals: &[Received], jobs: usize) {
    let mut per_job = BTreeMap::new();
    for report in finals {
        *per_job.entry(report.job()).or_insert(0) += 1;
        assert_eq!(report.kind(), "mail.sent", "{}", report.json);
    }
    let repeated: Vec<_> = per_job.iter().filter(|(_, count)| **count != 1).collect();
    assert!(repeated.is_empty(), "{repeated:?}");
    assert_eq!(per_job.len(), jobs);
}

#[tokio::test]
async fn two_thousand_jobs_survive_the_death_of_a_worker() {
    const JOBS: usize = 2_000;
    const CONCURRENCY: usize = 32;
    let mut world = World::ready().await;
    world.set("POSTROOM_LEASE", "3s");
    world.set("POSTROOM_CONCURRENCY", CONCURRENCY.to_string());
    world.set("POSTROOM_LOG", "info");
    let server = slow_server().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let (mut doomed, _survivor) = (world.start_worker().await, world.start_worker().await);
    world
        .publish_all(Level::Medium, &mails("acme", "job", JOBS))
        .await;
    server.wait_for(JOBS / 4, Duration::from_mins(1)).await;
    doomed.kill().await;
    let _successor = world.start_worker().await;
    let finals = reports.finals(JOBS, Duration::from_mins(2)).await;
    each_has_one_final(&finals, JOBS);
    world.assert_settled().await;
    assert!(
        reports.nothing_new_for(Duration::from_secs(1)).await,
        "a report after the last one"
    );
    let taken = taken(&server);
    assert_eq!(taken.len(), JOBS, "mails of the jobs");
    let twice: Vec<_> = taken.iter().filter(|(_, count)| **count > 1).collect();
    // Only what was in flight at the kill: its outcome died with the worker.
    assert!(
        twice.len() <= CONCURRENCY && twice.iter().all(|(_, count)| **count == 2),
        "{twice:?}"
    );
}

#[tokio::test]
async fn a_worker_told_to_end_finishes_what_it_has_begun_and_leaves_the_rest() {
    const JOBS: usize = 600;
    let mut world = World::ready().await;
    // Whatever waits for a lease to run out waits for longer than this test.
    world.set("POSTROOM_LEASE", "10m");
    // Eight at a time and 50 ms each: most still wait when the workers are told to end, however fast the machine is.
    world.set("POSTROOM_CONCURRENCY", "8");
    let server = slow_server().await;
    account(&world, "acme", &server, &[]).await;
    account(&world, "limited", &server, &["--limit", "20/2s"]).await;
    let mut reports = world.reports().await;
    let (mut first, mut second) = (world.start_worker().await, world.start_worker().await);
    let mut jobs = mails("acme", "job", JOBS);
    jobs.extend(mails("limited", "limited", 60));
    world.publish_all(Level::Medium, &jobs).await;
    let sql = world.sql().await;
    for (worker, count) in [(&mut first, 50), (&mut second, 150)] {
        server.wait_for(count, Duration::from_mins(1)).await;
        assert!(worker.term().await.success(), "{}", worker.logs());
        let ended = worker.logs();
        assert!(!ended.contains("grace period is over"), "{ended}");
        let left = "SELECT count(*) FROM worker WHERE dead AND (EXISTS (SELECT FROM job WHERE job.epoch = worker.epoch AND state = 1)
            OR EXISTS (SELECT FROM outbox WHERE outbox.epoch = worker.epoch))";
        let leased: i64 = sql.query_one(left, &[]).await.unwrap().get(0);
        assert_eq!(
            leased, 0,
            "workers that have ended with jobs leased, or reports not published"
        );
    }
    assert!(server.received_count() < JOBS, "nothing left to give back");
    let _third = world.start_worker().await;
    let finals = reports.finals(JOBS + 60, Duration::from_mins(2)).await;
    each_has_one_final(&finals, JOBS + 60);
    world.assert_settled().await;
    let taken = taken(&server);
    let senders: HashSet<_> = taken.values().collect();
    assert_eq!(
        (taken.len(), senders),
        (JOBS + 60, HashSet::from([&1])),
        "each sent once"
    );
}

#[tokio::test]
async fn a_worker_told_to_end_leaves_old_jobs_to_be_forgotten_by_others() {
    const OLD: i64 = 60_000;
    let world = World::ready().await;
    let sql = world.sql().await;
    let fill = format!(
        "INSERT INTO job (tenant, id, state, level, account, digest, born, seq, created_at, updated_at, finished_at)
         SELECT 'acme', 'old' || i, 3, 1, 'acme/main', '', 0, 0, now(), now(), now() - interval '1 year'
         FROM generate_series(1, {OLD}) i"
    );
    sql.batch_execute(&fill).await.unwrap();
    let left = async || {
        let count = "SELECT count(*) FROM job";
        sql.query_one(count, &[]).await.unwrap().get::<_, i64>(0)
    };
    let mut worker = world.start_worker().await;
    eventually(Duration::from_secs(30), || async { left().await < OLD }).await;
    assert!(worker.term().await.success());
    assert!(left().await > 0, "it went on until all were forgotten");
}
