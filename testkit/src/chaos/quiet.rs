//! Waits until everything is over: every job reported or held, nothing leased, waiting or owed.

use std::collections::HashSet;
use std::time::{Duration, Instant};

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

/// What the database still has to do. State 3 is done, 4 held.
async fn left(town: &Installation) -> Result<Vec<String>, String> {
    let sql = town.sql().await?;
    let mut left = Vec::new();
    for (what, query) in [
        ("leased jobs", "SELECT count(*) FROM job WHERE state = 1"),
        ("waiting jobs", "SELECT count(*) FROM job WHERE state IN (0, 2)"),
        (
            "reports in the outbox",
            "SELECT count(*) FROM job WHERE outbox IS NOT NULL",
        ),
        ("events in the outbox", "SELECT count(*) FROM event_outbox"),
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
