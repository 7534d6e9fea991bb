//! What waits costs nothing: a process that can do nothing asks its servers a few times a second, however much waits.
//!
//! Counted in pieces sent to the database, about one a question, over a window of two seconds. What looks for work by being
//! told of its own looking asks a thousand times a second.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::proxy::Proxy;
use postroom_testkit::smtp::{Action, Phase, Script, SmtpServer};
use postroom_testkit::webhook::{Reply, WebhookReceiver};
use serde_json::json;

use crate::sends::account;
use crate::support::{Process, World, eventually, mails, proxied};
use crate::webhooks::endpoint;

const LIMIT: Duration = Duration::from_secs(30);
const WINDOW: Duration = Duration::from_secs(2);
/// Most questions of one process in a window. With nothing to do it has about twenty.
const FEW: u64 = 120;
const JOBS: usize = 300;

/// A world whose processes reach the database through a proxy that counts.
async fn watched() -> (World, Proxy) {
    let mut world = World::ready().await;
    world.set("POSTROOM_LOG", "info");
    let (proxy, url) = proxied(world.database_url()).await;
    world.set("POSTROOM_DATABASE_URL", url);
    (world, proxy)
}

async fn silent_server() -> SmtpServer {
    let script = Script::new().on(Phase::FinalDot, Action::Silence);
    SmtpServer::builder().script(script).start().await
}

/// Waits until so many jobs are in the waiting room.
async fn wait_waiting(world: &World, jobs: i64) {
    let sql = world.sql().await;
    eventually(LIMIT, || async {
        let count = "SELECT count(*) FROM job WHERE state = 2";
        sql.query_one(count, &[]).await.unwrap().get::<_, i64>(0) >= jobs
    })
    .await;
}

/// Requires that these processes ask little from some moment on: what they had begun may come to its end before.
async fn assert_quiet(proxy: &Proxy, processes: &[&Process]) {
    let most = FEW * processes.len() as u64;
    let mut asked = Vec::new();
    for _ in 0..4 {
        let before = proxy.pieces();
        tokio::time::sleep(WINDOW).await;
        asked.push(proxy.pieces() - before);
        if asked.last().is_some_and(|asked| *asked <= most) {
            return;
        }
    }
    panic!("{asked:?} questions within {WINDOW:?} each, where nothing can be done");
}

#[tokio::test]
async fn processes_with_nothing_to_do_ask_the_database_little() {
    let (world, proxy) = watched().await;
    let (worker, bridge) = (world.start_worker().await, world.start_bridge().await);
    assert_quiet(&proxy, &[&worker, &bridge]).await;
}

#[tokio::test]
async fn jobs_behind_a_server_that_does_not_answer_cost_nothing_while_they_wait() {
    let (world, proxy) = watched().await;
    let server = silent_server().await;
    account(&world, "acme", &server, &[]).await;
    let worker = world.start_worker().await;
    world
        .publish_all(Level::Medium, &mails("acme", "job", JOBS))
        .await;
    wait_waiting(&world, 200).await;
    assert_quiet(&proxy, &[&worker]).await;
}

#[tokio::test]
async fn jobs_whose_account_has_no_free_connection_anywhere_cost_nothing_while_they_wait() {
    let (world, proxy) = watched().await;
    let server = silent_server().await;
    account(&world, "acme", &server, &["--max-connections", "2"]).await;
    let first = world.start_worker().await;
    world
        .publish_all(Level::Medium, &mails("acme", "job", JOBS))
        .await;
    wait_waiting(&world, 200).await;
    let second = world.start_worker().await;
    assert_quiet(&proxy, &[&first, &second]).await;
}

#[tokio::test]
async fn jobs_behind_a_limit_a_broken_server_or_a_date_cost_nothing_while_they_wait() {
    let (world, proxy) = watched().await;
    let good = SmtpServer::builder().start().await;
    let script = Script::new().on(Phase::Greeting, Action::shutting_down());
    let broken = SmtpServer::builder().script(script).start().await;
    account(&world, "limited", &good, &["--limit", "1/1h"]).await;
    account(&world, "ill", &broken, &[]).await;
    account(&world, "later", &good, &[]).await;
    let worker = world.start_worker().await;
    let mut jobs = mails("limited", "job", JOBS);
    jobs.extend(mails("ill", "job", JOBS));
    let later = mails("later", "job", JOBS).into_iter().map(|(tenant, mut job)| {
        job["send_at"] = json!("2099-01-01T00:00:00Z");
        (tenant, job)
    });
    jobs.extend(later);
    world.publish_all(Level::Medium, &jobs).await;
    wait_waiting(&world, 3 * JOBS as i64 - 1).await;
    assert_quiet(&proxy, &[&worker]).await;
}

#[tokio::test]
async fn permits_all_held_by_servers_that_do_not_answer_are_not_asked_for_in_vain() {
    const ACCOUNTS: usize = 12;
    /// Of 128, what `medium` can have.
    const PERMITS: u64 = 72;
    let (world, proxy) = watched().await;
    let server = silent_server().await;
    let tenant = |n| format!("tenant-{n}");
    for n in 0..ACCOUNTS {
        account(&world, &tenant(n), &server, &[]).await;
    }
    let worker = world.start_worker().await;
    for n in 0..ACCOUNTS {
        world
            .publish_all(Level::Medium, &mails(&tenant(n), "job", 50))
            .await;
    }
    // With jobs of other levels beside them, whose own permits are free.
    world
        .publish_all(Level::Immediate, &mails(&tenant(0), "now", 50))
        .await;
    eventually(LIMIT, || async { server.counters().command("DATA") >= PERMITS }).await;
    assert_quiet(&proxy, &[&worker]).await;
}

#[tokio::test]
async fn reports_whose_receiver_does_not_work_cost_nothing_while_they_wait() {
    for reply in [Reply::Status(500), Reply::Hang] {
        let (world, proxy) = watched().await;
        let server = SmtpServer::builder().start().await;
        account(&world, "acme", &server, &[]).await;
        let receiver = WebhookReceiver::start().await.unwrap();
        receiver.always(reply);
        endpoint(&world, "acme", &receiver, &[], "").await;
        let (worker, bridge) = (world.start_worker().await, world.start_bridge().await);
        world
            .publish_all(Level::Medium, &mails("acme", "job", JOBS))
            .await;
        server.wait_for(JOBS, LIMIT).await;
        eventually(LIMIT, || async { receiver.received_count() > 0 }).await;
        let sql = world.sql().await;
        eventually(LIMIT, || async {
            let count = "SELECT count(*) FROM webhook_delivery WHERE state = 'pending'";
            sql.query_one(count, &[]).await.unwrap().get::<_, i64>(0) == JOBS as i64
        })
        .await;
        assert_quiet(&proxy, &[&worker, &bridge]).await;
    }
}
