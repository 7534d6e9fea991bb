//! Reports on their way out: published with a confirm, then struck off the outbox. What cannot be published now stays
//! in the outbox; the sweeper comes for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::Worker;
use crate::ledger::outbox::ReportKey;
use crate::report::{Report, event_id};

/// Reports on their way at once. With a broker that confirms nothing, the rest stays in the outbox.
const ON_THEIR_WAY: usize = 2048;
/// How often the outbox is swept.
const SWEEP: Duration = Duration::from_secs(5);
/// How long a swept report is nobody else's.
const HOLD: Duration = Duration::from_mins(1);

/// Publishes reports.
#[derive(Debug)]
pub struct Reporter {
    room: Arc<Semaphore>,
}

impl Default for Reporter {
    fn default() -> Self {
        Self { room: Arc::new(Semaphore::new(ON_THEIR_WAY)) }
    }
}

impl Reporter {
    /// Publishes a report that is in the outbox, without waiting for it.
    pub fn publish(&self, worker: &Arc<Worker>, report: Report) {
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else { return };
        let worker = Arc::clone(worker);
        worker.clone().tasks.spawn(async move {
            let Some(id) = report.data.job.clone() else { return };
            let json = serde_json::to_string(&report).unwrap_or_default();
            let tenant = report.data.tenant.clone();
            let correlation = report.data.correlation_id.as_deref();
            match worker.broker.publish_report(&report.id, tenant.as_str(), report.kind, correlation, &json).await {
                Ok(()) => worker.batches.clear(ReportKey { tenant, id, sequence: report.data.sequence }).await,
                Err(error) => tracing::debug!(%error, "a report stays in the outbox"),
            }
            drop(room);
        });
    }
}

/// Publishes what crashes and broker outages left in the outbox, until `stop`.
pub async fn sweep(worker: Arc<Worker>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        while sweep_once(&worker).await && !stop.is_cancelled() {}
    }
}

/// One chunk; whether there may be more.
async fn sweep_once(worker: &Arc<Worker>) -> bool {
    const CHUNK: i32 = 256;
    if !worker.broker.is_connected() {
        return false;
    }
    let owed = match worker.ledger.owed_reports(CHUNK, HOLD).await {
        Ok(owed) => owed,
        Err(error) => {
            worker.database_trouble("outbox", &error);
            return false;
        }
    };
    let oldest = owed.iter().map(|o| o.waiting.as_secs()).max().unwrap_or(0);
    worker.metrics.outbox_age.set(oldest as i64);
    let more = owed.len() == CHUNK as usize;
    for job in owed {
        for (sequence, json) in job.reports {
            let Some((kind, correlation)) = head(&json) else { continue };
            let event = event_id(job.tenant.as_str(), "job", job.id.as_str(), &sequence.to_string());
            let published =
                worker.broker.publish_report(&event, job.tenant.as_str(), &kind, correlation.as_deref(), &json).await;
            if published.is_err() {
                return false;
            }
            worker.batches.clear(ReportKey { tenant: job.tenant.clone(), id: job.id.clone(), sequence }).await;
        }
    }
    more
}

/// Type and correlation id of a stored report.
fn head(json: &str) -> Option<(String, Option<String>)> {
    let value: serde_json::Value = serde_json::from_str(json).ok()?;
    let correlation = value.pointer("/data/correlation_id").and_then(|c| c.as_str()).map(str::to_owned);
    Some((value.get("type")?.as_str()?.to_owned(), correlation))
}
