//! The sweeper: publishes what crashes and broker outages left in the outbox, and the events of accounts.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;

use super::{Head, Tries};
use crate::broker::PublishError;
use crate::ledger::outbox::{Owed, ReportNumber};
use crate::report::event_id;
use crate::worker::Worker;

/// How often the outbox is swept.
const SWEEP: Duration = Duration::from_secs(5);
/// How long a swept report is nobody else's.
const HOLD: Duration = Duration::from_mins(1);

/// Sweeps until `stop`.
pub async fn run(worker: Arc<Worker>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let is_time = tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => true,
            () = worker.ledger.health().event() => false,
        };
        // Counts as a job in flight: what it takes out of the outbox is nobody else's for a while, so the session must
        // not end under it.
        let _sweeping = worker.tasks.token();
        if stop.is_cancelled() {
            return;
        }
        publish_account_events(&worker).await;
        while is_time && sweep_once(&worker).await && !stop.is_cancelled() {}
    }
}

/// Events of accounts; each goes from its table when its publish is confirmed. What fails is taken up again later, by
/// whichever worker comes first.
async fn publish_account_events(worker: &Arc<Worker>) {
    const CHUNK: i32 = 100;
    if !worker.is_connected() {
        return;
    }
    let owed = match worker.ledger.owed_account_events(CHUNK, HOLD).await {
        Ok(owed) => owed,
        Err(error) => return worker.database_trouble("account events", &error),
    };
    for event in owed {
        let head = Head {
            event: &event.id,
            tenant: &event.tenant,
            kind: &event.kind,
            correlation: None,
            traceparent: None,
        };
        if let Err(error) = worker.publish_json(&head, event.body.as_bytes()).await {
            return tracing::warn!(%error, "events of accounts are published later");
        }
        if let Err(error) = worker.ledger.clear_account_event(&event.id).await {
            worker.database_trouble("account events", &error);
        }
    }
}

/// One chunk; whether there may be more.
async fn sweep_once(worker: &Arc<Worker>) -> bool {
    const CHUNK: i32 = 256;
    // Whatever was taken now and not published would rest for a while.
    if !worker.is_connected() || worker.publisher.is_blocked() {
        return false;
    }
    let owed = match worker.ledger.owed_reports(CHUNK, HOLD).await {
        Ok(owed) => owed,
        Err(error) => {
            worker.database_trouble("outbox", &error);
            return false;
        }
    };
    let more = owed.len() == CHUNK as usize;
    let swept = publish_owed(worker, &owed).await;
    // What is not cleared is published once more, under the same id; what is not given back rests for a while.
    let cleared = worker.ledger.clear_outbox(&swept.published).await;
    let given_back = worker.ledger.leave_reports(&swept.given_back).await;
    if let Err(error) = cleared.and(given_back) {
        worker.database_trouble("outbox", &error);
        return false;
    }
    swept.all && more
}

/// What became of reports that were taken out of the outbox together.
#[derive(Default)]
struct Swept {
    published: Vec<ReportNumber>,
    /// The broker took nothing at all: whoever comes first. What it refused by itself is not among them: it rests, so that
    /// others have their turn.
    given_back: Vec<ReportNumber>,
    /// None was left over.
    all: bool,
}

/// Publishes these reports together. What cannot be read is neither published nor left over.
async fn publish_owed(worker: &Arc<Worker>, reports: &[Owed]) -> Swept {
    let publishing = reports.iter().map(|report| publish_one_owed(worker, report));
    let results = join_all(publishing).await;
    let mut swept = Swept::default();
    let mut trouble = None;
    for (report, result) in reports.iter().zip(results) {
        match result {
            Ok(true) => swept.published.push(report.number),
            Ok(false) => {}
            Err(error) => {
                if error.is_of_the_broker() {
                    swept.given_back.push(report.number);
                }
                trouble = Some(error);
            }
        }
    }
    swept.all = trouble.is_none();
    if let Some(error) = trouble {
        tracing::warn!(%error, "reports stay in the outbox");
    }
    swept
}

/// `false`: it cannot be read.
async fn publish_one_owed(worker: &Arc<Worker>, report: &Owed) -> Result<bool, PublishError> {
    let Some(of) = head(&report.json) else {
        tracing::error!(
            tenant = report.tenant,
            job = report.id,
            number = report.number.0,
            "a stored report cannot be read, and cannot be published: correct the body of this number in the table outbox, or delete it"
        );
        return Ok(false);
    };
    let (tenant, sequence) = (&report.tenant, report.sequence.to_string());
    let head = Head {
        event: &event_id(tenant, "job", &report.id, &sequence),
        tenant,
        kind: &of.kind,
        correlation: of.correlation.as_deref(),
        traceparent: of.traceparent.as_deref(),
    };
    let json = report.json.as_bytes();
    let mut tries = Tries::new();
    loop {
        worker.wait_connected(tries.until).await;
        match worker.publish_json(&head, json).await {
            Ok(()) => return Ok(true),
            Err(error) if tries.one_more(worker, &error).await => {}
            Err(error) => return Err(error),
        }
    }
}

/// What a stored report is published under.
struct StoredHead {
    kind: String,
    correlation: Option<String>,
    traceparent: Option<String>,
}

fn head(json: &str) -> Option<StoredHead> {
    let value: serde_json::Value = serde_json::from_str(json).ok()?;
    let text = |pointer| Some(value.pointer(pointer)?.as_str()?.to_owned());
    Some(StoredHead {
        kind: text("/type")?,
        correlation: text("/data/correlation_id"),
        traceparent: text("/data/traceparent"),
    })
}
