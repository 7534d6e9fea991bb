//! `--max-connections` holds over all workers, and nobody starves behind it.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::{Phase, Script, SmtpServer};

use crate::sends::account;
use crate::support::{World, eventually, mails, taken};

const CAP: [&str; 2] = ["--max-connections", "2"];

#[tokio::test]
async fn two_workers_together_never_open_more_connections_than_allowed() {
    let world = World::ready().await;
    let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(30));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &CAP).await;
    let free = SmtpServer::builder().start().await;
    account(&world, "other", &free, &[]).await;
    let mut reports = world.reports().await;
    let mut workers = [world.start_worker().await, world.start_worker().await];
    world.publish_all(Level::Medium, &mails("acme", "job", 200)).await;
    // Jobs of others behind them are not held up.
    world.publish_all(Level::Medium, &mails("other", "free", 5)).await;
    reports
        .until(|all| {
            all.iter()
                .filter(|r| r.tenant() == "other" && r.is_final())
                .count()
                == 5
        })
        .await;
    let gone = server.received_count();
    assert!(gone < 200, "all of the slow account's went first");
    let finals = reports.finals(205, Duration::from_mins(2)).await;
    assert_eq!(finals.len(), 205);
    assert!(finals.iter().all(|report| report.kind() == "mail.sent"));
    assert_eq!(server.received_count(), 200);
    assert_eq!(server.counters().max_open, 2);
    world.assert_settled().await;
    for worker in &mut workers {
        assert!(worker.term().await.success());
    }
    let held: i64 = world
        .sql()
        .await
        .query_one("SELECT count(*) FROM connection_lease", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(held, 0, "connections leased to nobody");
}

#[tokio::test]
async fn connections_held_idle_or_busy_by_one_worker_do_not_stop_the_jobs_of_another() {
    let world = World::ready().await;
    let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(100));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &CAP).await;
    let mut reports = world.reports().await;
    let _first = world.start_worker().await;
    world.publish_all(Level::Medium, &mails("acme", "warm", 8)).await;
    reports.finals(8, Duration::from_mins(1)).await;
    // Both connections are open, and idle, in the first worker.
    let _second = world.start_worker().await;
    world.publish_all(Level::Medium, &mails("acme", "idle", 8)).await;
    reports.finals(16, Duration::from_mins(1)).await;
    // And now they are busy.
    world.publish_all(Level::Low, &mails("acme", "busy", 60)).await;
    world.publish_all(Level::High, &mails("acme", "more", 8)).await;
    assert_eq!(reports.finals(84, Duration::from_mins(1)).await.len(), 84);
    assert_eq!(taken(&server).len(), 84);
    assert_eq!(server.received_count(), 84);
    assert_eq!(server.counters().max_open, 2);
    world.assert_settled().await;
}

#[tokio::test]
async fn jobs_that_wait_for_few_connections_do_not_hold_the_permits_of_others() {
    const ACCOUNTS: usize = 6;
    let world = World::ready().await;
    let script = Script::new().delay(Phase::FinalDot, Duration::from_secs(30));
    let slow = SmtpServer::builder().script(script).start().await;
    for n in 0..ACCOUNTS {
        account(&world, &format!("slow-{n}"), &slow, &CAP).await;
    }
    let worker = world.start_worker().await;
    for n in 0..ACCOUNTS {
        let jobs = mails(&format!("slow-{n}"), &n.to_string(), 40);
        world.publish_all(Level::Medium, &jobs).await;
    }
    world.wait_depth("mail.jobs.medium", 0).await;
    let sql = world.sql().await;
    eventually(Duration::from_secs(30), || async {
        let waiting = "SELECT count(*) FROM job WHERE state = 2";
        let waiting: i64 = sql.query_one(waiting, &[]).await.unwrap().get(0);
        waiting >= 180 && slow.counters().command("DATA") == 2 * ACCOUNTS as u64
    })
    .await;
    let mut most = 0;
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        most = most.max(worker.count("postroom_permits_in_use{level=\"medium\"}").await);
    }
    // Two that send, and some that are ready to.
    assert!(
        most <= 5 * ACCOUNTS as u64,
        "{most} permits for {} connections",
        2 * ACCOUNTS
    );
}
