//! Servers that are away, at start and later: a clear log, readiness off, and all goes on by itself.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use postroom::level::Level;
use postroom_testkit::smtp::{Phase, Script, SmtpServer};
use serde_json::{Value, json};

use crate::sends::account;
use crate::support::{
    Amqp, POSTGRES, Private, Process, RABBITMQ, Reports, World, eventually, eventually_some,
};

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
    let world_amqp = Amqp::connect(world.amqp_url()).await;
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

/// Event ids of the final reports, by job. A report published twice has one id.
type Finals = HashMap<String, HashSet<String>>;

fn finals(reports: &Reports) -> Finals {
    let mut finals = Finals::new();
    for report in reports.all().iter().filter(|report| report.is_final()) {
        finals
            .entry(report.job().to_owned())
            .or_default()
            .insert(report.id.clone());
    }
    finals
}

/// The same out of the bridge's queue, which outlives the broker. Takes away what is there.
async fn take_finals(amqp: &Amqp, finals: &mut Finals) {
    while let Some(message) = amqp.get("mail.reports.bridge").await {
        let report: Value = serde_json::from_slice(&message.data).unwrap();
        if report["data"]["final"] == true {
            let id = message.properties.message_id().as_ref().unwrap().to_string();
            let job = report["data"]["job"].as_str().unwrap().to_owned();
            finals.entry(job).or_default().insert(id);
        }
    }
}

fn assert_one_each(finals: &Finals, count: usize) {
    assert_eq!(finals.len(), count);
    let twice: Vec<_> = finals.iter().filter(|(_, ids)| ids.len() != 1).collect();
    assert!(twice.is_empty(), "{twice:?}");
}

async fn slow_server(millis: u64) -> SmtpServer {
    let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(millis));
    SmtpServer::builder().script(script).start().await
}

/// Kills one server while mail flows, and starts it again once the worker has noticed.
async fn restart_under_load(private: &Private, name: &str, worker: &Process) {
    private.kill(name).await;
    worker.wait_not_ready().await;
    assert_eq!(worker.get("/livez").await.unwrap().0, 200);
    private.start_again(name).await;
    eventually(LIMIT, || worker.ready()).await;
}

#[tokio::test]
async fn restarts_of_postgres_and_rabbitmq_under_load_lose_and_repeat_nothing() {
    const COUNT: usize = 400;
    let private = Private::start().await;
    let world = World::on(private.servers()).await;
    world.prepare().await;
    let server = slow_server(100).await;
    account(&world, "acme", &server, &[]).await;
    let worker = world.start_worker().await;

    publish_numbered(&world, "a", COUNT).await;
    server.wait_for(COUNT / 8, LIMIT).await;
    restart_under_load(&private, POSTGRES, &worker).await;
    let done = server.wait_for(COUNT, LIMIT).await;
    let sent = worker.metric(r#"postroom_jobs_total{outcome="sent"}"#).await;
    assert!(done.len() == COUNT && sent > 0.0);

    publish_numbered(&world, "b", COUNT).await;
    server.wait_for(COUNT + COUNT / 8, LIMIT).await;
    restart_under_load(&private, RABBITMQ, &worker).await;
    let amqp = Amqp::connect(world.amqp_url()).await;
    let mut seen = Finals::new();
    // What the broker did not confirm waits in the outbox for the next sweep.
    let begun = Instant::now();
    while seen.len() < 2 * COUNT && begun.elapsed() < LIMIT {
        take_finals(&amqp, &mut seen).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_one_each(&seen, 2 * COUNT);
    // The process lived on and held its leases: nobody got a mail twice.
    assert_eq!(server.received_count(), 2 * COUNT);
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
async fn three_workers_rolled_under_load_lose_repeat_and_delay_nothing() {
    const COUNT: usize = 900;
    let mut world = World::ready().await;
    // Whatever waits for a lease to run out waits for longer than this test.
    world.set("POSTROOM_LEASE", "10m");
    let server = slow_server(50).await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let mut workers = vec![
        world.start_worker().await,
        world.start_worker().await,
        world.start_worker().await,
    ];
    publish_numbered(&world, "roll", COUNT / 2).await;
    let sql = world.sql().await;
    for turn in 1..=3 {
        // The new one first, then the old one ends: as an orchestrator does it.
        workers.push(world.start_worker().await);
        let mut old = workers.remove(0);
        let name = format!("load-{turn}");
        let (ended, ()) = tokio::join!(old.term(), publish_numbered(&world, &name, COUNT / 6));
        assert!(ended.success(), "{}", old.logs());
        let left = "SELECT count(*) FROM worker WHERE dead AND (EXISTS (SELECT FROM job WHERE job.epoch = worker.epoch AND state = 1)
            OR EXISTS (SELECT FROM outbox WHERE outbox.epoch = worker.epoch))";
        let left: i64 = sql.query_one(left, &[]).await.unwrap().get(0);
        assert_eq!(
            left, 0,
            "workers that have ended with jobs leased, or reports owed"
        );
    }
    reports
        .until_within(LIMIT, |all| all.iter().filter(|r| r.is_final()).count() >= COUNT)
        .await;
    assert_one_each(&finals(&reports), COUNT);
    assert_eq!(reports.all().iter().filter(|r| r.is_final()).count(), COUNT);
    assert_eq!(server.received_count(), COUNT);
    world.assert_settled().await;
}
