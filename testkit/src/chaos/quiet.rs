//! Waits until everything is over: every job reported or held, nothing leased, waiting or owed.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;
use tokio::time::sleep;

use super::installation::Installation;
use super::plan::Plan;

const LOOK: Duration = Duration::from_millis(500);
/// Between two lines about how it goes.
const SAY: Duration = Duration::from_secs(10);

/// What is not over after `patience`; empty if all is.
pub async fn wait(
    town: &Installation,
    plan: &Plan,
    patience: Duration,
    tell: &(dyn Fn(&str) + Sync),
) -> Vec<String> {
    let begun = Instant::now();
    let mut said = Instant::now();
    let mut webhooks = Webhooks::default();
    loop {
        webhooks.look(town);
        let left = match left(town).await {
            Ok(mut left) => {
                let open = plan
                    .jobs
                    .iter()
                    .filter(|job| !webhooks.ended.contains(&job.id))
                    .count();
                if open > 0 {
                    left.push(format!("{open} jobs without a final report"));
                }
                if left.is_empty() {
                    left.extend(queued(town).await);
                }
                left
            }
            Err(error) => vec![error],
        };
        if left.is_empty() || begun.elapsed() > patience {
            return left;
        }
        if said.elapsed() > SAY {
            said = Instant::now();
            tell(&format!("waiting: {}", left.join(", ")));
        }
        sleep(LOOK).await;
    }
}

/// Jobs whose end the webhooks have told.
#[derive(Default)]
struct Webhooks {
    seen: usize,
    ended: HashSet<String>,
}

impl Webhooks {
    fn look(&mut self, town: &Installation) {
        for request in town.hooks.0.received_from(self.seen) {
            self.seen += 1;
            let report = request.json();
            let over = report["data"]["final"] == true || report["type"] == "mail.uncertain";
            if let (true, Value::String(job)) = (over, &report["data"]["job"]) {
                self.ended.insert(job.clone());
            }
        }
    }
}

/// Messages in the queues of jobs and of the bridge, unacknowledged ones among them. The broker's figures are some seconds
/// old, which is right here: what it redelivers comes late, too.
async fn queued(town: &Installation) -> Option<String> {
    let path = format!("queues/{}", town.scratch.name());
    let listed = town.scratch.servers().management(Method::GET, &path, None).await;
    let listed: Vec<Value> = match listed.map(|text| serde_json::from_str(&text)) {
        Ok(Ok(listed)) => listed,
        _ => return Some("the management API does not answer".to_owned()),
    };
    let ours = listed.iter().filter(|queue| {
        let name = queue["name"].as_str().unwrap_or_default();
        name == "mail.reports.bridge" || (name.starts_with("mail.jobs.") && name != "mail.jobs.dead")
    });
    let count: u64 = ours.filter_map(|queue| queue["messages"].as_u64()).sum();
    (count > 0).then(|| format!("{count} messages in queues"))
}

/// What the database still has to do. State 3 is done, 4 held.
async fn left(town: &Installation) -> Result<Vec<String>, String> {
    let sql = town.sql().await?;
    let mut left = Vec::new();
    for (what, query) in [
        ("leased jobs", "SELECT count(*) FROM job WHERE state = 1"),
        ("waiting jobs", "SELECT count(*) FROM job WHERE state IN (0, 2)"),
        ("reports in the outbox", "SELECT count(*) FROM outbox"),
        ("events in the outbox", "SELECT count(*) FROM event_outbox"),
        (
            "events of accounts in the outbox",
            "SELECT count(*) FROM account_event",
        ),
        (
            "webhooks to deliver",
            "SELECT count(*) FROM webhook_delivery WHERE state = 'pending'",
        ),
    ] {
        let row = sql.query_one(query, &[]).await;
        let count: i64 = row.map_err(|error| format!("Postgres: {error}"))?.get(0);
        if count > 0 {
            left.push(format!("{count} {what}"));
        }
    }
    Ok(left)
}
