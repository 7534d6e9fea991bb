//! Reports on their way out: published with a confirm, then struck off the outbox. What cannot be published now stays
//! in the outbox; the sweeper comes for it ([`sweep`]).

pub mod sweep;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::Worker;
use crate::broker::{Properties, PublishError};
use crate::fail_point::{self, Point};
use crate::ledger::outbox::{Backlog, ReportNumber};
use crate::report::{ReportMessage, routing_key};

/// AMQP `type` of a report.
const MESSAGE_TYPE: &str = "mail.report.v1";
/// Reports on their way at once. With a broker that confirms nothing, the rest stays in the outbox.
const ON_THEIR_WAY: usize = 2048;
/// How many of them are not for jobs that are only parked: what became of a mail is told without delay.
const LEFT_TO_OTHERS: usize = ON_THEIR_WAY / 2;
/// How often parking looks whether there is room.
const LOOK: Duration = Duration::from_millis(10);
/// How long parking waits for that at most.
const NO_ROOM: Duration = Duration::from_secs(10);
/// How long a report is tried, with the time in which there is no session with the broker: longer than a restart of one
/// takes. Less than the 30 s after which the sweeper comes for it, and than what it takes is nobody else's.
const PATIENCE: Duration = Duration::from_secs(25);
/// How often a report that waits for a session looks whether the worker ends.
const ENDING: Duration = Duration::from_secs(1);
/// Pause after a session is lost.
const LOST: Duration = Duration::from_millis(100);
/// Tries that the broker refuses or does not answer until the report is left.
const REFUSED: usize = 2;

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
        let _ = tokio::time::timeout(NO_ROOM, room).await;
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

/// How often the outbox is counted, by one worker for all. A little less than each looks.
const COUNT: Duration = Duration::from_millis(1500);

/// Looks how full the outbox is, and how old; also while the broker takes nothing, when that is what tells.
pub async fn measure(worker: &Arc<Worker>) {
    let limit = worker.reporter.limit;
    let most = i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1);
    match worker.ledger.outbox_backlog(most, COUNT).await {
        Ok(Backlog { owed, oldest }) => {
            worker.reporter.note_owed(usize::try_from(owed).unwrap_or(0));
            let metrics = &worker.metrics;
            metrics.outbox_jobs.set(owed);
            metrics.outbox_age.set(oldest.as_secs() as i64);
            metrics.outbox_full.set(worker.reporter.is_full().into());
        }
        Err(error) => worker.database_trouble("outbox", &error),
    }
}

/// How often the whole outbox is searched, by one worker for all.
const SEARCH: Duration = Duration::from_mins(5);

/// Looks for reports that are hidden from the count and the sweeper.
pub async fn find_late(worker: &Arc<Worker>) {
    if let Err(error) = worker.ledger.find_late_reports(SEARCH).await {
        worker.database_trouble("outbox", &error);
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
            let mut tries = Tries::new();
            loop {
                worker.wait_connected(tries.until).await;
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
                    Err(error) if tries.one_more(&worker, &error).await => {}
                    Err(error) => {
                        tracing::debug!(%error, "a report stays in the outbox");
                        break;
                    }
                }
            }
            drop(room);
        });
    }
}

/// How often a report is tried: again in the next session if one ends under it, and once more if the broker does not take
/// it. Its id makes a repeat recognisable.
struct Tries {
    until: Instant,
    refused: usize,
}

impl Tries {
    fn new() -> Self {
        Self {
            until: Instant::now() + PATIENCE,
            refused: 0,
        }
    }

    /// Whether it is tried again, with a pause before if there is a reason for one.
    async fn one_more(&mut self, worker: &Worker, error: &PublishError) -> bool {
        if Instant::now() + LOST >= self.until {
            return false;
        }
        if error.is_of_the_session() {
            // Until that is known here.
            tokio::time::sleep(LOST).await;
            return !worker.tasks.is_closed();
        }
        self.refused += 1;
        self.refused < REFUSED
    }
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

impl<'a> Head<'a> {
    fn of(report: &'a ReportMessage) -> Self {
        Self {
            event: &report.id,
            tenant: report.data.tenant.as_str(),
            kind: report.kind,
            correlation: report.data.correlation_id.as_deref(),
            traceparent: report.data.traceparent.as_deref(),
        }
    }
}

impl Worker {
    /// Publishes a report and awaits the confirm.
    ///
    /// # Errors
    /// If it is not known to be stored.
    pub async fn publish_report(&self, report: &ReportMessage) -> Result<(), PublishError> {
        self.publish_json(&Head::of(report), report.json().as_bytes())
            .await
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

    /// Waits for a session with the broker; no longer when the worker ends.
    async fn wait_connected(&self, until: Instant) {
        let mut connected = self.connected.clone();
        while !*connected.borrow_and_update() && !self.tasks.is_closed() && Instant::now() < until {
            let look = until.min(Instant::now() + ENDING);
            if let Ok(Err(_)) = tokio::time::timeout_at(look, connected.changed()).await {
                return;
            }
        }
    }

    /// Whether there is a session with the broker.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        *self.connected.borrow()
    }
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

    /// Reports of a lot that is to be parked.
    const LOT: usize = 100;
    /// The rest of the half that such a lot may use.
    const REST: usize = ON_THEIR_WAY - LEFT_TO_OTHERS - LOT;

    #[tokio::test(start_paused = true)]
    async fn parking_waits_until_half_of_the_way_is_free_for_others() {
        let reporter = Reporter::new(80);
        let begun = Instant::now();
        let _rest = reporter.room.try_acquire_many(REST as u32).unwrap();
        reporter.wait_for_room(LOT).await;
        assert_eq!(begun.elapsed(), Duration::ZERO, "there is room");
        let one_more = reporter.room.try_acquire().unwrap();
        let mut waiting = std::pin::pin!(reporter.wait_for_room(LOT));
        let early = tokio::time::timeout(NO_ROOM / 2, &mut waiting).await;
        assert!(early.is_err(), "others have less than half");
        // Who waits takes nothing away from those it waits for.
        let others = reporter.room.try_acquire_many((LOT + LEFT_TO_OTHERS - 1) as u32);
        drop(others.unwrap());
        drop(one_more);
        waiting.await;
        assert!(begun.elapsed() <= NO_ROOM / 2 + LOOK, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn parking_waits_for_room_neither_for_ever_nor_for_more_than_there_is() {
        let reporter = Reporter::new(80);
        let begun = Instant::now();
        reporter.wait_for_room(ON_THEIR_WAY).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        let _all = reporter.room.try_acquire_many(ON_THEIR_WAY as u32).unwrap();
        let waiting = tokio::time::timeout(2 * NO_ROOM, reporter.wait_for_room(1));
        assert!(waiting.await.is_ok(), "it would wait for ever");
        let waited = begun.elapsed();
        assert!((NO_ROOM..NO_ROOM + LOOK).contains(&waited), "{waited:?}");
    }
}
