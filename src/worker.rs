//! The worker: deliveries in, mail out, every outcome recorded before it is acknowledged.
//!
//! ```text
//! RabbitMQ ─▶ arrival ─▶ admission ─▶ pipeline ─▶ settlement ─▶ ack, report
//!                            │ park                  │ park
//!                            ▼                       ▼
//!                        waiting room (Postgres) ─▶ dispatcher ─▶ pipeline …
//! ```

pub mod admission;
pub mod arrival;
pub mod bury;
pub mod conclude;
pub mod delivery;
pub mod dispatcher;
mod expiry;
pub mod housekeeping;
pub mod intake;
pub mod load;
pub mod park;
pub mod pause;
pub mod permits;
pub mod reporter;
mod run;
mod traced;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::task::TaskTracker;

use crate::broker::{Publisher, Topology};
use crate::config::JobLimits;
use crate::db::DbError;
use crate::failure::Failure;
use crate::health;
use crate::id::AccountKey;
use crate::ledger::batches::Batches;
use crate::ledger::release::{ReleaseRequest, Released};
use crate::ledger::{Epoch, Lease, Ledger};
use crate::memory::Memory;
use crate::pipeline::Attempt;
use crate::pipeline::attempt::Pipeline;
use crate::pipeline::task::{SharedClock, Task};
use crate::report::{RecipientResult, RecipientStatus};
use crate::retry::RetryPolicy;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::Traces;

pub use run::{Settings, WorkerError, run};

/// Additional data under which whole bodies of dead letters are sealed.
pub const DEAD_BODY: &str = "dead-letter";

/// Everything the parts of a worker share.
#[derive(Debug)]
pub struct Worker {
    /// The ledger.
    pub ledger: Ledger,
    /// Its calls, coalesced.
    pub batches: Batches,
    /// Attempts.
    pub pipeline: Pipeline,
    /// Publishing, over all sessions.
    pub publisher: Publisher,
    /// Names of exchanges and queues.
    pub topology: Topology,
    /// Whether there is a session with the broker.
    pub connected: watch::Receiver<bool>,
    /// Reports on their way.
    pub reporter: reporter::Reporter,
    /// Sends in flight.
    pub permits: Arc<permits::Permits>,
    /// Sends allowed.
    pub permits_total: usize,
    /// Bytes of jobs in hand.
    pub memory: Arc<Memory>,
    /// Jobs in hand per account.
    pub load: Arc<load::Load>,
    /// Connections per account.
    pub pool_size: usize,
    /// Bounds of a job.
    pub limits: JobLimits,
    /// Retries of jobs without an account.
    pub retry: RetryPolicy,
    /// Shorter waits are not reported.
    pub deferred_report_after: Duration,
    /// How long a silent worker keeps its jobs.
    pub lease: Duration,
    /// After this time an attempt has met all its time limits: from the last byte on, what it began is decided.
    pub attempt_deadline: Duration,
    /// How long outcomes are remembered.
    pub retention: Duration,
    /// The database's clock.
    pub clock: Arc<SharedClock>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Spans, if there is a collector.
    pub traces: Option<Arc<Traces>>,
    /// Every job in flight; draining waits for them.
    pub tasks: TaskTracker,
    /// Whether deliveries are given back instead of kept.
    pub pause: pause::Pause,
    /// Something may be due in the waiting room.
    pub nudge: Notify,
    /// Readiness of the database.
    pub database: health::Handle,
    epoch: RwLock<Arc<Epoch>>,
    caps: Arc<run::Caps>,
    arrivals: mpsc::Sender<Box<arrival::Arrival>>,
    name: String,
}

/// One more job between its lease and its settlement, until dropped.
#[derive(Debug)]
struct InFlight(Arc<Metrics>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.dec();
    }
}

impl Worker {
    /// The current epoch.
    #[must_use]
    pub fn epoch(&self) -> Arc<Epoch> {
        Arc::clone(&self.epoch.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A lease to ask for.
    #[must_use]
    pub fn claim(&self) -> Lease {
        self.epoch().claim()
    }

    /// Registers as a new worker after the old epoch died.
    pub async fn renew_epoch(&self) {
        let registered = self
            .ledger
            .register(&self.name, self.lease, self.attempt_deadline);
        match registered.await {
            Ok(epoch) => {
                self.caps.renew(&epoch);
                *self.epoch.write().unwrap_or_else(PoisonError::into_inner) = epoch;
            }
            Err(error) => self.database_trouble("register", &error),
        }
    }

    /// Counts a job between its lease and its settlement.
    fn in_flight(&self) -> InFlight {
        self.metrics.in_flight.inc();
        InFlight(Arc::clone(&self.metrics))
    }

    /// A job of this account found no connection.
    fn note_busy(&self, account: &AccountKey) {
        self.load.note_busy(account);
    }

    /// Leases due jobs of the current epoch.
    async fn release(&self, request: &ReleaseRequest) -> Result<Vec<Released>, DbError> {
        self.ledger.release(&self.epoch(), request).await
    }

    /// Puts an arrival (again) before admission.
    pub async fn arrive(&self, arrival: Box<arrival::Arrival>) {
        if let Err(closed) = self.arrivals.send(arrival).await {
            closed.0.give_back();
        }
    }

    /// Notes trouble with the database.
    pub fn database_trouble(&self, what: &str, error: &DbError) {
        self.metrics.sql_errors.with_label_values(&[error.class()]).inc();
        self.ledger.database().learn_from(error);
        if error.is_retryable() {
            self.database.not_ready(error.to_string());
            self.metrics.connected.with_label_values(&["database"]).set(0);
        }
        tracing::warn!(statement = what, %error, "trouble with the database");
    }

    /// Notes that the database answers.
    fn database_works(&self) {
        self.database.ready();
        self.metrics.connected.with_label_values(&["database"]).set(1);
    }

    /// Asks the database for the time.
    async fn correct_clock(&self) -> Result<(), DbError> {
        let client = self.ledger.vital().client().await?;
        let sent = (Instant::now(), Timestamp::now());
        let asked =
            tokio::time::timeout(self.lease / 4, client.query_one("SELECT clock_timestamp()", &[])).await;
        let Ok(row) = asked else {
            client.give_up();
            return Err(DbError::Timeout);
        };
        let theirs: Timestamp = row?.try_get(0)?;
        let half = sent.0.elapsed() / 2;
        let ours = sent.1.checked_add(half).unwrap_or(sent.1);
        self.clock.correct(theirs, ours, half);
        Ok(())
    }

    /// Counts what became of recipients, once it is known what follows.
    fn count_recipients(&self, task: &Task, attempt: &Attempt) {
        for (status, class) in news(&task.row.recipients, attempt) {
            self.metrics.recipients.with_label_values(&[status, class]).inc();
        }
    }

    /// One line per attempt, once it is known what follows.
    fn log_attempt(&self, task: &Task, attempt: &Attempt) {
        if !attempt.started {
            return;
        }
        let count = |status| attempt.recipients.iter().filter(|r| r.status == status).count();
        if let Some(failure) = &attempt.failure {
            self.metrics
                .failures
                .with_label_values(&[
                    failure.class.as_str(),
                    failure.fault.as_str(),
                    failure.stage.as_str(),
                ])
                .inc();
        }
        tracing::info!(
            attempt = attempt.number(&task.row),
            // Not `level`: in JSON that is the severity's key.
            job_level = %task.level,
            via = attempt.sender.as_ref().map(|s| s.via),
            account = attempt.sender.as_ref().and_then(|s| s.account.as_ref().map(AccountKey::as_str)),
            accepted = count(RecipientStatus::Accepted),
            deferred = count(RecipientStatus::Deferred),
            refused = count(RecipientStatus::Refused),
            smtp_ms = attempt.smtp.map(|took| took.as_millis() as u64),
            failure = attempt.failure.as_ref().map(Failure::for_log),
            "attempt"
        );
    }

    fn count(&self, settlement: &crate::ledger::settle::Settlement) {
        use crate::ledger::settle::Next;
        let outcome = match &settlement.next {
            Next::Done(kind) => kind.as_str().trim_start_matches("mail."),
            Next::Park { .. } => "parked",
            Next::Hold { .. } => "uncertain",
            Next::GiveBack => "given_back",
        };
        self.metrics.jobs.with_label_values(&[outcome]).inc();
    }
}

/// What an attempt, once it is planned, brought to those recipients that were open before: status and class of failure.
fn news<'a>(
    before: &'a [RecipientResult],
    attempt: &'a Attempt,
) -> impl Iterator<Item = (&'static str, &'static str)> + 'a {
    let class = attempt
        .failure
        .as_ref()
        .map_or("", |failure| failure.class.as_str());
    let was_open = |place: usize| before.get(place).is_none_or(RecipientResult::is_open);
    let recipients = attempt.recipients.iter().enumerate();
    recipients
        .filter(move |(place, _)| was_open(*place))
        .filter_map(move |(_, recipient)| match recipient.status {
            RecipientStatus::Accepted => Some(("accepted", "")),
            // Who is given up was not tried for that.
            RecipientStatus::Refused => Some(("refused", class)),
            RecipientStatus::Deferred => attempt.started.then_some(("deferred", class)),
            RecipientStatus::Pending => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::{Class, Failure, Fault, Stage};

    /// An attempt after which the recipients stand like this.
    fn attempt(statuses: &[RecipientStatus], started: bool) -> Attempt {
        let recipients = statuses.iter().map(|status| RecipientResult {
            status: *status,
            ..RecipientResult::pending("a@example.org")
        });
        let mut attempt = Attempt::of(recipients.collect(), None);
        attempt.started = started;
        let (class, fault) = (Class::Infrastructure, Fault::Provider);
        attempt.failure = Some(Failure::permanent(class, fault, Stage::Resolve, "reason", "text"));
        attempt
    }

    #[test]
    fn what_is_new_about_a_recipient_is_counted_once() {
        use RecipientStatus::{Accepted, Deferred, Pending, Refused};
        let all = [Accepted, Deferred, Refused, Pending];
        let tried = attempt(&all, true);
        let counted: Vec<_> = news(&[], &tried).collect();
        let class = "infrastructure";
        assert_eq!(
            counted,
            [("accepted", ""), ("deferred", class), ("refused", class)]
        );
        let known = attempt(&all, true).recipients;
        let again: Vec<_> = news(&known, &tried).collect();
        assert_eq!(again, [("deferred", class)], "only those that were open");
        let not_tried = attempt(&[Deferred, Refused], false);
        let given_up: Vec<_> = news(&[], &not_tried).collect();
        assert_eq!(given_up, [("refused", class)]);
    }
}
