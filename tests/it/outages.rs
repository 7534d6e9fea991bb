//! Servers that are away, at start and later: a clear log, readiness off, and all goes on by itself.

use std::collections::HashMap;
use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::SmtpServer;
use serde_json::{Value, json};

use crate::sends::account;
use crate::support::{POSTGRES, Private, Process, RABBITMQ, Reports, World, eventually, eventually_some};

const LIMIT: Duration = Duration::from_secs(90);

fn job(id: &str) -> Value {
    json!({"id": id, "tenant": "acme", "to": "ann@example.org", "subject": "s", "text": "t"})
}

async fn publish_numbered(world: &World, name: &str, count: usize) {
    let jobs: Vec<_> = (0..count)
        .map(|n| ("acme".to_owned(), job(&format!("{name}-{n}"))))
        .collect();
    world.publish_all(Level::Medium, &jobs).await;
}

/// Alive, not ready, and says why.
async fn assert_waiting(process: &Process, component: &str) {
    let (status, body) = eventually_some(LIMIT, || async {
        process.get("/readyz").await.filter(|(status, _)| *status == 503)
    })
    .await;
    assert_eq!(status, 503);
    assert!(body.contains(&format!("[-] {component}")), "{body}");
    assert_eq!(process.get("/livez").await.unwrap().0, 200);
}

#[tokio::test]
async fn a_worker_started_before_its_servers_waits_for_them() {
    let private = Private::start().await;
    let world = World::on(private.servers()).await;
    world.prepare().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    private.halt(POSTGRES).await;
    private.halt(RABBITMQ).await;

    let mut worker = world.spawn(&["worker"]);
    assert_waiting(&worker, "database").await;
    worker.wait_log("not ready component=\"database\"").await;
    private.start_again(POSTGRES).await;
    worker.wait_log("no session with RabbitMQ").await;
    assert_waiting(&worker, "amqp").await;
    private.start_again(RABBITMQ).await;
    eventually(LIMIT, || worker.ready()).await;
    // The world's own connection is of before.
    let world_amqp = crate::support::Amqp::connect(world.amqp_url()).await;
    let mut reports = world.reports().await;
    let body = job("first").to_string();
    world_amqp
        .publish(
            "mail.jobs",
            "high.acme",
            lapin::BasicProperties::default(),
            body.as_bytes(),
        )
        .await;
    assert_eq!(reports.final_of("first").await.kind(), "mail.sent");
    assert!(!worker.logs().contains("panicked"), "{}", worker.logs());
    assert!(worker.term().await.success());
}

/// Final reports by job; collected again after the broker was away, from the ledger's point of view.
fn finals(reports: &Reports) -> HashMap<String, usize> {
    let mut finals: HashMap<String, HashMap<String, ()>> = HashMap::new();
    for report in reports.all().iter().filter(|report| report.is_final()) {
        // A repeated publish has the same id.
        finals
            .entry(report.job().to_owned())
            .or_default()
            .insert(report.id.clone(), ());
    }
    finals.into_iter().map(|(job, ids)| (job, ids.len())).collect()
}

/// Every job done in the ledger, and no report owed.
async fn wait_all_done(world: &World, count: i64) {
    eventually(LIMIT, || async {
        let Ok(listed) = serde_json::from_str::<Value>(&format!(
            "[{}]",
            world
                .postroom(&["job", "list", "--state", "done", "--limit", "5000", "--json"])
                .await
                .stdout
                .trim()
                .replace('\n', ",")
        )) else {
            return false;
        };
        listed.as_array().unwrap().len() as i64 == count
    })
    .await;
}

#[tokio::test]
async fn restarts_of_postgres_and_rabbitmq_under_load_lose_nothing() {
    const COUNT: usize = 400;
    let private = Private::start().await;
    let world = World::on(private.servers()).await;
    world.prepare().await;
    let server = SmtpServer::builder()
        .script(postroom_testkit::smtp::Script::new().delay(
            postroom_testkit::smtp::Phase::FinalDot,
            Duration::from_millis(100),
        ))
        .start()
        .await;
    account(&world, "acme", &server, &[]).await;
    let worker = world.start_worker().await;

    let mut reports = world.reports().await;
    publish_numbered(&world, "a", COUNT).await;
    server.wait_for(COUNT / 8, LIMIT).await;
    private.kill(POSTGRES).await;
    worker.wait_not_ready().await;
    assert_eq!(worker.get("/livez").await.unwrap().0, 200);
    assert!(
        server.received_count() < COUNT,
        "the load was over before the restart"
    );
    private.start_again(POSTGRES).await;
    eventually(LIMIT, || worker.ready()).await;
    reports
        .until_within(LIMIT, |all| {
            all.iter()
                .filter(|r| r.is_final())
                .map(|r| r.job())
                .collect::<std::collections::HashSet<_>>()
                .len()
                == COUNT
        })
        .await;
    let after_postgres = finals(&reports);
    assert!(
        after_postgres.values().all(|count| *count == 1),
        "{after_postgres:?}"
    );
    // The process was never killed and held its leases: nobody got a mail twice.
    assert_eq!(server.received_count(), COUNT);

    // Reports of the outage of the broker go to a queue that outlives it.
    publish_numbered(&world, "b", COUNT).await;
    server.wait_for(COUNT + COUNT / 8, LIMIT).await;
    private.kill(RABBITMQ).await;
    worker.wait_not_ready().await;
    private.start_again(RABBITMQ).await;
    eventually(LIMIT, || worker.ready()).await;
    wait_all_done(&world, 2 * COUNT as i64).await;
    let amqp = crate::support::Amqp::connect(world.amqp_url()).await;
    // Two finals per pair of jobs: everything that was owed has been published to the bridge's queue.
    eventually(LIMIT, || async {
        amqp.depth("mail.reports.bridge")
            .await
            .is_some_and(|depth| depth as usize >= 2 * COUNT)
    })
    .await;
    let mut seen: HashMap<String, std::collections::HashSet<String>> = HashMap::new();
    while let Some(message) = amqp.get("mail.reports.bridge").await {
        let report: Value = serde_json::from_slice(&message.data).unwrap();
        if report["data"]["final"] == true {
            let id = message.properties.message_id().as_ref().unwrap().to_string();
            let job = report["data"]["job"].as_str().unwrap().to_owned();
            seen.entry(job).or_default().insert(id);
        }
    }
    assert_eq!(seen.len(), 2 * COUNT);
    assert!(seen.values().all(|ids| ids.len() == 1));
    assert_eq!(
        server.received_count(),
        2 * COUNT,
        "a broker's outage repeats no mail"
    );
    assert_eq!(amqp.depth("mail.jobs.medium").await, Some(0));
    assert_eq!(amqp.depth("mail.jobs.dead").await, Some(0));
    assert!(!worker.logs().contains("panicked"), "{}", worker.logs());
}

#[tokio::test]
async fn mail_waits_for_an_smtp_server_that_is_down() {
    let mut world = World::ready().await;
    world.set("POSTROOM_RETRY_BASE", "200ms");
    world.set("POSTROOM_RETRY_CAP", "400ms");
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let address = server.addr();
    drop(server);
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    publish_numbered(&world, "down", 20).await;
    let all = reports
        .until(|all| all.iter().filter(|r| r.kind() == "mail.deferred").count() >= 20)
        .await;
    let data = &all[0].json["data"];
    assert_eq!(
        (&data["class"], &data["fault"]),
        (&json!("infrastructure"), &json!("provider")),
        "{data}"
    );
    assert!(
        worker.ready().await,
        "a tenant's server is not the worker's health"
    );
    let server = eventually_some(LIMIT, || async {
        tokio::net::TcpListener::bind(address).await.ok()?;
        Some(SmtpServer::builder().bind(address).start().await)
    })
    .await;
    server.wait_for(20, LIMIT).await;
    reports
        .until(|all| all.iter().filter(|r| r.is_final()).count() >= 20)
        .await;
    assert!(
        reports
            .all()
            .iter()
            .filter(|r| r.is_final())
            .all(|r| r.kind() == "mail.sent")
    );
    assert_eq!(server.received_count(), 20);
}

#[tokio::test]
async fn two_workers_rolled_under_load_lose_and_repeat_nothing() {
    const COUNT: usize = 300;
    let world = World::ready().await;
    let server = SmtpServer::builder()
        .script(
            postroom_testkit::smtp::Script::new()
                .delay(postroom_testkit::smtp::Phase::FinalDot, Duration::from_millis(50)),
        )
        .start()
        .await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let mut workers = vec![world.start_worker().await, world.start_worker().await];
    publish_numbered(&world, "roll", COUNT).await;
    for _ in 0..2 {
        // The new one first, then the old one ends: as an orchestrator does it.
        let sent = server.received_count();
        workers.push(world.start_worker().await);
        let mut old = workers.remove(0);
        assert!(old.term().await.success(), "{}", old.logs());
        assert!(server.received_count() >= sent);
    }
    reports
        .until_within(LIMIT, |all| all.iter().filter(|r| r.is_final()).count() >= COUNT)
        .await;
    assert_eq!(finals(&reports).len(), COUNT);
    assert_eq!(reports.all().iter().filter(|r| r.is_final()).count(), COUNT);
    assert_eq!(server.received_count(), COUNT);
    world.wait_depth("mail.jobs.medium", 0).await;
}
