//! Reports on their way out: published with a confirm, then struck off the outbox. What cannot be published now stays
//! in the outbox; the sweeper comes for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::Worker;
use crate::broker::{Properties, PublishError};
use crate::fail_point::{self, Point};
use crate::ledger::outbox::{Owed, ReportNumber};
use crate::report::{ReportMessage, event_id, routing_key};

/// AMQP `type` of a report.
const MESSAGE_TYPE: &str = "mail.report.v1";
/// Reports on their way at once. With a broker that confirms nothing, the rest stays in the outbox.
const ON_THEIR_WAY: usize = 2048;
/// How many of them are not for jobs that are only parked: what became of a mail is told without delay.
const LEFT_TO_OTHERS: usize = ON_THEIR_WAY / 2;
/// How often parking looks whether there is room.
const LOOK: Duration = Duration::from_millis(10);
/// How long a report waits for a session with the broker, at the start or in between; then it is the sweeper's. Less
/// than the time after which the sweeper comes for it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the outbox is swept.
const SWEEP: Duration = Duration::from_secs(5);
/// How long a swept report is nobody else's.
const HOLD: Duration = Duration::from_mins(1);

/// Publishes reports.
#[derive(Debug)]
pub struct Reporter {
    room: Arc<Semaphore>,
    /// Reports owed above which nothing new is begun.
    limit: usize,
    full: AtomicBool,
}

impl Reporter {
    /// Nothing on its way. `limit`: reports owed above which the outbox is full.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            room: Arc::new(Semaphore::new(ON_THEIR_WAY)),
            limit,
            full: AtomicBool::new(false),
        }
    }

    /// Whether so many reports wait that nothing new should be sent: each mail would add one.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Waits until so many more reports can be on their way and leave room for others, but not for long: the sweeper is
    /// there for what does not fit.
    pub async fn wait_for_room(&self, reports: usize) {
        let wanted = (reports + LEFT_TO_OTHERS).min(ON_THEIR_WAY);
        // Looked at rather than queued for: who stands in line gets every place that becomes free.
        let room = async {
            while self.room.available_permits() < wanted {
                tokio::time::sleep(LOOK).await;
            }
        };
        let _ = tokio::time::timeout(PATIENCE, room).await;
    }

    /// Notes how many reports are owed. Full from the limit on, until an eighth of it is free again.
    fn note_owed(&self, owed: usize) {
        let was_full = self.is_full();
        let from = if was_full {
            self.limit - self.limit / 8
        } else {
            self.limit
        };
        let full = owed >= from.max(1);
        self.full.store(full, Ordering::Relaxed);
        match (was_full, full) {
            (false, true) => tracing::warn!(
                owed,
                "reports cannot be published and fill the outbox (POSTROOM_OUTBOX_LIMIT): nothing new is sent until \
                 the broker takes them; is it blocked by an alarm?"
            ),
            (true, false) => tracing::info!(owed, "the outbox has room again; sending goes on"),
            _ => {}
        }
    }
}

/// Looks how full the outbox is.
pub async fn measure(worker: &Arc<Worker>) {
    let limit = worker.reporter.limit;
    let most = i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1);
    match worker.ledger.outbox_size(most).await {
        Ok(owed) => {
            worker.metrics.outbox_jobs.set(owed);
            worker.reporter.note_owed(usize::try_from(owed).unwrap_or(0));
        }
        Err(error) => worker.database_trouble("outbox", &error),
    }
}

impl Reporter {
    /// Publishes a report that is in the outbox, without waiting for it.
    pub fn publish(&self, worker: &Arc<Worker>, report: ReportMessage, number: ReportNumber) {
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            return;
        };
        let worker = Arc::clone(worker);
        Arc::clone(&worker).tasks.spawn(async move {
            // Once more if the session ends under it; the id makes a repeat recognisable.
            for _ in 0..2 {
                worker.wait_connected().await;
                let trace = worker.trace_report(&report);
                let published = worker.publish_report(&report).await;
                if let Some(trace) = trace {
                    worker.report_traced(trace, &report, published.is_ok());
                }
                match published {
                    Ok(()) => {
                        worker.batches.clear(number).await;
                        break;
                    }
                    Err(error) => tracing::debug!(%error, "a report stays in the outbox"),
                }
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
    let oldest = owed.iter().map(|o| o.waiting.as_secs()).max().unwrap_or(0);
    worker.metrics.outbox_age.set(oldest as i64);
    let more = owed.len() == CHUNK as usize;
    let (published, all) = publish_owed(worker, &owed).await;
    if let Err(error) = worker.ledger.clear_outbox(&published).await {
        // They are published once more, under the same ids.
        worker.database_trouble("outbox", &error);
        return false;
    }
    all && more
}

/// Publishes these reports together: what was published, and whether that is all.
async fn publish_owed(worker: &Arc<Worker>, reports: &[Owed]) -> (Vec<ReportNumber>, bool) {
    let publishing = reports.iter().map(|report| publish_one_owed(worker, report));
    let results = join_all(publishing).await;
    if let Some(error) = results.iter().find_map(|result| result.as_ref().err()) {
        tracing::warn!(%error, "reports stay in the outbox");
    }
    let all = results.iter().all(Result::is_ok);
    (results.into_iter().flatten().flatten().collect(), all)
}

/// The number of the report, once it is published; none if it cannot be read.
async fn publish_one_owed(worker: &Arc<Worker>, report: &Owed) -> Result<Option<ReportNumber>, PublishError> {
    let Some(of) = head(&report.json) else {
        return Ok(None);
    };
    let (tenant, sequence) = (report.tenant.as_str(), report.sequence.to_string());
    let head = Head {
        event: &event_id(tenant, "job", report.id.as_str(), &sequence),
        tenant,
        kind: &of.kind,
        correlation: of.correlation.as_deref(),
        traceparent: of.traceparent.as_deref(),
    };
    let json = report.json.as_bytes();
    if worker.publish_json(&head, json).await.is_err() {
        // Nobody else may publish it for a while now: once more if the session has ended under it.
        worker.wait_connected().await;
        worker.publish_json(&head, json).await?;
    }
    Ok(Some(report.number))
}

/// What a report is published under.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Its id.
    pub event: &'a str,
    /// Whose.
    pub tenant: &'a str,
    /// Its type.
    pub kind: &'a str,
    /// AMQP `correlation_id`.
    pub correlation: Option<&'a str>,
    /// Header `traceparent`.
    pub traceparent: Option<&'a str>,
}

impl Worker {
    /// Publishes a report and awaits the confirm.
    ///
    /// # Errors
    /// If it is not known to be stored.
    pub async fn publish_report(&self, report: &ReportMessage) -> Result<(), PublishError> {
        let head = Head {
            event: &report.id,
            tenant: report.data.tenant.as_str(),
            kind: report.kind,
            correlation: report.data.correlation_id.as_deref(),
            traceparent: report.data.traceparent.as_deref(),
        };
        self.publish_json(&head, report.json().as_bytes()).await
    }

    async fn publish_json(&self, head: &Head<'_>, json: &[u8]) -> Result<(), PublishError> {
        let mut properties = Properties::default()
            .with_message_id(head.event.into())
            .with_type(MESSAGE_TYPE.into())
            .with_content_type("application/json".into())
            .with_app_id("postroom".into())
            .with_timestamp(u64::try_from(self.clock.now().as_second()).unwrap_or(0));
        if let Some(correlation) = head.correlation.and_then(|c| ShortString::try_new(c).ok()) {
            properties = properties.with_correlation_id(correlation);
        }
        if let Some(traceparent) = head.traceparent {
            let mut headers = FieldTable::default();
            headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
            properties = properties.with_headers(headers);
        }
        let key = routing_key(head.tenant, head.kind);
        self.publisher
            .publish(&self.topology.reports_exchange(), &key, properties, json)
            .await?;
        if fail_point::loses(Point::ReportConfirmed, [head.event]) {
            return Err(PublishError::Timeout);
        }
        Ok(())
    }

    /// Waits for a session with the broker, for a while; not at all when the worker ends.
    async fn wait_connected(&self) {
        if !self.is_connected() && !self.tasks.is_closed() {
            let mut connected = self.connected.clone();
            let _ = tokio::time::timeout(PATIENCE, connected.wait_for(|now| *now)).await;
        }
    }

    /// Whether there is a session with the broker.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        *self.connected.borrow()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outbox_is_full_from_its_limit_until_an_eighth_is_free() {
        let reporter = Reporter::new(80);
        let states = [79, 80, 71, 70, 69, 79].map(|owed| {
            reporter.note_owed(owed);
            reporter.is_full()
        });
        assert_eq!(states, [false, true, true, true, false, false]);
    }
}
