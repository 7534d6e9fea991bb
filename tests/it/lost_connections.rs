//! Workers whose connections to broker and database are cut go on by themselves.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::{Phase, Script, SmtpServer};
use reqwest::Method;
use serde_json::Value;

use crate::sends::account;
use crate::support::{Process, World, eventually_some, mails, taken};

/// Closes a process's connections to the broker.
async fn cut_broker(world: &World, process: &Process) {
    let name = process.pid().to_string();
    let scratch = world.scratch();
    let path = format!("vhosts/{}/connections", scratch.name());
    // The broker lists them with some delay.
    let found = eventually_some(Duration::from_secs(20), || async {
        let listed = scratch
            .servers()
            .management(Method::GET, &path, None)
            .await
            .unwrap();
        let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
        let mine = listed.iter().filter(|connection| {
            let named = connection["client_properties"]["connection_name"].as_str();
            named.is_some_and(|named| named.ends_with(&name))
        });
        let names: Vec<_> = mine.map(|c| c["name"].as_str().unwrap().to_owned()).collect();
        (names.len() >= 2).then_some(names)
    })
    .await;
    scratch.close_connections(&found).await.unwrap();
}

/// Ends all of the workers' connections to the database.
async fn cut_database(world: &World) {
    let sql = world.sql().await;
    let cut: i64 = sql
        .query_one(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid()",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert!(cut > 0);
}

#[tokio::test]
async fn workers_cut_off_from_broker_and_database_lose_and_repeat_nothing() {
    const JOBS: usize = 1_000;
    let world = World::ready().await;
    let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(100));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &["--max-connections", "12"]).await;
    let mut reports = world.reports().await;
    let workers = [world.start_worker().await, world.start_worker().await];
    world
        .publish_all(Level::Medium, &mails("acme", "job", JOBS))
        .await;
    server.wait_for(50, Duration::from_mins(1)).await;
    cut_database(&world).await;
    server.wait_for(200, Duration::from_mins(1)).await;
    cut_broker(&world, &workers[0]).await;
    server.wait_for(400, Duration::from_mins(1)).await;
    cut_database(&world).await;
    cut_broker(&world, &workers[1]).await;
    let finals = reports.finals(JOBS, Duration::from_mins(3)).await;
    assert_eq!(finals.len(), JOBS, "one final report each");
    assert!(finals.iter().all(|report| report.kind() == "mail.sent"));
    let taken = taken(&server);
    assert_eq!(taken.len(), JOBS);
    let twice: Vec<_> = taken.iter().filter(|(_, count)| **count > 1).collect();
    assert!(twice.is_empty(), "sent twice: {twice:?}");
    assert!(server.counters().max_open <= 12);
    world.assert_settled().await;
    for worker in &workers {
        assert!(worker.ready().await);
    }
}
