//! What is large, slow or plenty is held within bounds: memory first of all.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::{Phase, Script, SmtpServer};
use serde_json::{Value, json};

use crate::sends::account;
use crate::support::{Process, World, taken};

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
        .publish(Level::Immediate, "acme", &crate::support::mail("acme", "small"))
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
        println!("budget {budget}: peak {peak}, {beyond} given back");
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
