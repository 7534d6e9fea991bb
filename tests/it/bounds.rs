//! What is large, slow or plenty is held within bounds: memory first of all.

use std::time::{Duration, Instant};

use postroom::level::Level;
use postroom_testkit::smtp::{Phase, Script, SmtpServer};
use serde_json::{Value, json};

use crate::sends::account;
use crate::support::{Private, Process, Reports, World, eventually, mail, mails, taken};

/// About 5 MB of JSON.
const LARGE: usize = 5_000_000;
/// Budget of the bounded run, in bytes: less than four of the large jobs at a time.
const BUDGET: u64 = 64 << 20;

fn large(tenant: &str, id: &str) -> Value {
    let line = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor.\n";
    json!({
        "id": id, "tenant": tenant, "to": format!("{id}@example.org"), "subject": id,
        "text": line.repeat(LARGE / line.len()),
    })
}

/// A field of `/proc/PID/status`, in bytes.
fn memory(process: &Process, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

fn jobs() -> usize {
    let given = std::env::var("POSTROOM_TEST_LARGE_JOBS").ok();
    given.map_or(40, |count| count.parse().unwrap())
}

async fn world_with_budget(budget: u64) -> World {
    let mut world = World::new().await;
    world.set("POSTROOM_MEMORY_BUDGET", format!("{}MiB", budget >> 20));
    world.set("POSTROOM_JOB_MAX_INFLATED_BYTES", "8MiB");
    world.set("POSTROOM_ATTACHMENT_MAX_BYTES", "1MiB");
    world.set("POSTROOM_ATTACHMENT_MEMORY", "1MiB");
    world.prepare().await;
    world
}

/// Sends large jobs of all levels with so many workers. Gives what each of them used at most.
async fn run_large(budget: u64, workers: usize, jobs: usize) -> Vec<u64> {
    let world = world_with_budget(budget).await;
    // Slow enough that what is taken stays in hand.
    let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(300));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    for n in 0..jobs {
        let level = Level::ALL[n % 4];
        world
            .publish(level, "acme", &large("acme", &format!("large-{n}")))
            .await;
    }
    let mut running = Vec::new();
    for _ in 0..workers {
        let mut process = world.spawn(&["worker"]);
        process.wait_ready().await;
        running.push(process);
    }
    // A small one behind them does not wait for all of them.
    world
        .publish(Level::Immediate, "acme", &mail("acme", "small"))
        .await;
    let finals = reports.finals(jobs + 1, Duration::from_mins(10)).await;
    assert_eq!(finals.len(), jobs + 1);
    assert!(finals.iter().all(|report| report.kind() == "mail.sent"));
    assert!(taken(&server).values().all(|times| *times == 1));
    world.assert_settled().await;
    let mut used = Vec::new();
    for process in &running {
        let peak = memory(process, "VmHWM");
        let beyond = process.count("postroom_deliveries_beyond_budget_total").await;
        eprintln!("budget {budget}: peak {peak}, {beyond} given back");
        used.push(peak);
        assert_eq!(process.count("postroom_job_bytes").await, 0);
    }
    used
}

#[tokio::test]
async fn large_jobs_of_all_levels_are_sent_within_the_memory_budget() {
    let jobs = jobs();
    let bounded = run_large(BUDGET, 2, jobs).await;
    // Beside the budget: the process itself, and what lapin holds of the narrowest windows, two deliveries per queue.
    let bound = (64 << 20) + BUDGET + 4 * 2 * LARGE as u64;
    for used in bounded {
        assert!(used < bound, "{used} bytes in use, more than {bound}");
    }
}

#[tokio::test]
async fn a_blocked_broker_stops_sending_only_when_the_outbox_is_full_and_all_goes_on_when_it_is_not() {
    const JOBS: usize = 400;
    let private = Private::start().await;
    let mut world = World::on(private.servers()).await;
    world.set("POSTROOM_OUTBOX_LIMIT", "50");
    world.prepare().await;
    let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(100));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &["--max-connections", "2"]).await;
    world
        .publish_all(Level::Medium, &mails("acme", "job", JOBS))
        .await;
    let mut reports = world.reports().await;
    private.alarm().await;
    let worker = world.start_worker().await;
    // Mails go out although no report does.
    worker.wait_log("fill the outbox").await;
    let sent = server.received_count();
    assert!(sent >= 50, "{sent} sent");
    eventually(Duration::from_secs(30), || async {
        let before = server.received_count();
        tokio::time::sleep(Duration::from_secs(1)).await;
        server.received_count() == before
    })
    .await;
    assert!(server.received_count() < JOBS, "the outbox has no bound");
    assert!(worker.count("postroom_outbox_jobs").await >= 50);
    assert_eq!(worker.count("postroom_outbox_full").await, 1);
    let oldest = async || worker.count("postroom_outbox_oldest_seconds").await;
    let before = oldest().await;
    eventually(Duration::from_secs(10), || async { oldest().await > before + 1 }).await;
    assert_eq!(reports.all().len(), 0, "the alarm is not on");
    assert!(worker.ready().await, "it is no reason to end the worker");
    private.calm().await;
    let finals = reports.finals(JOBS, Duration::from_mins(3)).await;
    assert_eq!(finals.len(), JOBS);
    assert!(taken(&server).values().all(|times| *times == 1));
    eventually(Duration::from_secs(10), || async {
        worker.count("postroom_outbox_full").await + oldest().await == 0
    })
    .await;
    world.assert_settled().await;
}

#[tokio::test]
async fn while_the_outbox_stays_full_no_job_is_delivered_again_and_again() {
    const JOBS: usize = 40;
    let mut world = World::ready().await;
    world.set("POSTROOM_LEASE", "3s");
    world.set("POSTROOM_OUTBOX_LIMIT", "50");
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let sql = world.sql().await;
    sql.batch_execute(
        "INSERT INTO outbox (tenant, id, seq, due_at, created_at, body)
         SELECT 'acme', 'owed-' || n, n, now() + interval '1 hour', now(), '{}' FROM generate_series(1, 50) n",
    )
    .await
    .unwrap();
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    worker.wait_log("fill the outbox").await;
    world
        .publish_all(Level::Medium, &mails("acme", "job", JOBS))
        .await;
    worker.wait_log("the outbox is full: nothing is consumed").await;
    world.wait_depth("mail.jobs.medium", JOBS as u32).await;
    // Several leases more.
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert!(!worker.ready().await);
    let delivered = worker.count("postroom_deliveries_total").await;
    assert!(delivered <= JOBS as u64, "{delivered} deliveries");
    sql.batch_execute("DELETE FROM outbox").await.unwrap();
    assert_eq!(reports.finals(JOBS, Duration::from_mins(1)).await.len(), JOBS);
    eventually(Duration::from_secs(10), || worker.ready()).await;
    assert_eq!(server.received_count(), JOBS);
    world.assert_settled().await;
}

#[tokio::test]
async fn a_database_that_stands_still_for_longer_than_the_lease_costs_no_lease() {
    let mut world = World::new().await;
    world.set("POSTROOM_LEASE", "3s");
    world.set("POSTROOM_DATABASE_POOL_SIZE", "1");
    world.prepare().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let workers = [world.start_worker().await, world.start_worker().await];
    let (locking, watching) = (world.sql().await, world.sql().await);
    locking
        .batch_execute("BEGIN; LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    world.publish_all(Level::High, &mails("acme", "job", 50)).await;
    // Every statement about jobs hangs, every heartbeat passes.
    let beats =
        "SELECT count(*) FROM worker WHERE NOT dead AND heartbeat_at > started_at + interval '12 seconds'";
    eventually(Duration::from_mins(1), || async {
        watching.query_one(beats, &[]).await.unwrap().get::<_, i64>(0) == 2
    })
    .await;
    locking.batch_execute("COMMIT").await.unwrap();
    assert_eq!(reports.finals(50, Duration::from_mins(1)).await.len(), 50);
    assert!(taken(&server).values().all(|times| *times == 1));
    world.assert_settled().await;
    for worker in &workers {
        assert_eq!(worker.count("postroom_leases_lost_total").await, 0);
        assert!(!worker.logs().contains("another worker took over"));
    }
}

/// The middle one of the times from publishing a job to its final report, one job after the other.
async fn usual_latency(world: &World, reports: &mut Reports, name: &str) -> Duration {
    let mut times = Vec::new();
    for n in 0..15 {
        let id = format!("{name}-{n}");
        let begun = Instant::now();
        world.publish_mail(Level::Medium, "other", &id).await;
        reports.final_of(&id).await;
        times.push(begun.elapsed());
    }
    times.sort();
    times[times.len() / 2]
}

#[tokio::test]
async fn a_hundred_thousand_waiting_jobs_of_a_dead_tenant_hardly_slow_down_others() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "other", &server, &[]).await;
    let dead = SmtpServer::builder()
        .script(Script::new().delay(Phase::Greeting, Duration::from_mins(5)))
        .start()
        .await;
    account(&world, "dead", &dead, &[]).await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    let unloaded = usual_latency(&world, &mut reports, "before").await;
    let sql = world.sql().await;
    sql.batch_execute(
        "INSERT INTO job (tenant, id, state, level, account, digest, born, seq, body, body_size, properties, due_at,
             reason, created_at, updated_at)
         SELECT 'dead', 'd-' || n, 2, 2, 'dead/main', '\\x00', 1, 1, b.body, length(b.body), '{\"recipients\": 1}',
             clock_timestamp() - interval '1 minute', 2, clock_timestamp(), clock_timestamp()
         FROM generate_series(1, 100000) n, LATERAL (SELECT convert_to(json_build_object('id', 'd-' || n, 'tenant', 'dead',
             'to', 'a@example.org', 'subject', 's', 'text', 't')::text, 'UTF8') AS body) b;
         INSERT INTO lane (account, level, tenant, next_at, fifo, oldest_at)
             VALUES ('dead/main', 2, 'dead', clock_timestamp(), 0, clock_timestamp() - interval '1 hour');
         ANALYZE job",
    )
    .await
    .unwrap();
    eventually(Duration::from_secs(30), || async {
        dead.counters().connections > 0
    })
    .await;
    let loaded = usual_latency(&world, &mut reports, "behind").await;
    eprintln!("latency {unloaded:?}, with a full waiting room {loaded:?}");
    assert!(
        loaded < unloaded * 5 + Duration::from_millis(500),
        "{unloaded:?} unloaded, {loaded:?} loaded"
    );
    drop(worker);
}
