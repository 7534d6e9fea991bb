//! The life of a leased job, told once: attempt → plan → settle → acknowledge → report.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt as _;
use tracing::Instrument as _;

use super::Worker;
use super::admission::Picked;
use super::arrival::{Arrival, plain};
use super::bury::{Doomed, Refusal};
use super::delivery::{Properties, stored};
use super::load::InHand;
use super::permits::Permit;
use crate::broker::Delivery;
use crate::config::JobLimits;
use crate::fail_point::{self, Point};
use crate::failure::Failure;
use crate::job::MailJob;
use crate::job::decode::{self, Incoming, RejectReason};
use crate::ledger::admit::{Absorb, Admitted};
use crate::ledger::release::Released;
use crate::ledger::settle::{Answer, Body, Next, Settled, Settlement};
use crate::ledger::{Row, WaitReason};
use crate::memory::{self, Held, Share};
use crate::pipeline::attempt::panicked;
use crate::pipeline::task::Task;
use crate::pipeline::{Attempt, Verdict};
use crate::report::{RecipientResult, RecipientStatus};
use crate::settlement::{Circumstances, cancelled, plan};
use crate::telemetry::traces;

type Right = Option<(Permit, InHand)>;

/// A claimed job that is over, or has to wait, before anything was tried.
#[derive(Debug)]
pub struct Over {
    task: Task,
    /// Where a new one came from.
    origin: Option<Box<Arrival>>,
    verdict: Verdict,
}

impl Over {
    /// The same for a job that is not claimed yet, but will have this row.
    pub(super) fn new(origin: Box<Arrival>, row: Row, verdict: Verdict) -> Self {
        Self {
            task: task(&origin, row),
            origin: Some(origin),
            verdict,
        }
    }

    /// One that expired in the waiting room.
    fn expired(task: Task) -> Self {
        Self {
            task,
            origin: None,
            verdict: Verdict::Expired,
        }
    }

    /// One that waits behind older ones of its account.
    #[must_use]
    pub fn busy(picked: Picked, row: Row) -> Self {
        let (reason, delay) = (WaitReason::Busy, std::time::Duration::ZERO);
        Self::new(picked.arrival, row, Verdict::Wait { reason, delay })
    }
}

/// What is left to do when an outcome is written.
pub(super) struct End {
    /// What was to be done.
    pub(super) task: Task,
    /// Where a new job came from.
    pub(super) origin: Option<Box<Arrival>>,
    /// What the server said, if it took the mail for anybody.
    results: Vec<RecipientResult>,
    message_id: Arc<str>,
    gives_back: bool,
    /// What was tried, as long as a cancel may be what ends it.
    tried: Option<Box<Attempt>>,
}

/// An admitted arrival as the pipeline takes it.
fn task(arrival: &Arrival, row: Row) -> Task {
    let correlation_id = arrival.properties.correlation_id.as_deref();
    Task {
        correlation_id: correlation_id.map_or_else(|| arrival.job.id.shared(), Arc::from),
        traceparent: arrival.properties.traceparent.clone(),
        published: arrival.properties.published,
        job: Arc::clone(&arrival.job),
        row,
        level: arrival.level,
        new: true,
        released: None,
        weight: arrival.delivery.held.as_ref().map_or(0, Held::bytes),
        // The delivery holds it.
        held: None,
    }
}

impl Worker {
    /// Sends an admitted job on its way; one that is over, or has to wait, comes back to be concluded with others.
    #[must_use]
    pub fn follow(self: &Arc<Self>, picked: Picked, answer: Admitted) -> Option<Over> {
        let Picked { arrival, permit, .. } = picked;
        match answer {
            Admitted::Go(row) | Admitted::Behind(row) if row.is_poison() => {
                self.bury_poison(Doomed::arrived(arrival, *row));
            }
            Admitted::Go(row) | Admitted::Behind(row) => {
                self.spawn_job(task(&arrival, *row), Some(arrival), permit);
            }
            Admitted::Wait { row, reason, delay } => {
                return Some(Over::new(arrival, *row, Verdict::Wait { reason, delay }));
            }
            Admitted::Expired(row) => return Some(Over::new(arrival, *row, Verdict::Expired)),
            Admitted::Cancelled(row) => return Some(Over::new(arrival, *row, Verdict::Cancelled)),
            Admitted::InFlight | Admitted::Held => self.absorb(arrival),
            Admitted::Waiting | Admitted::Done => {
                // Answered from the ledger; a report still owed is the sweeper's.
                self.metrics.jobs.with_label_values(&["duplicate"]).inc();
                arrival.ack();
            }
            Admitted::Conflict => self.bury(arrival, Refusal::IdConflict),
        }
        None
    }

    /// Runs a job out of the waiting room.
    pub fn run_released(self: &Arc<Self>, released: Released, right: Right) {
        let weight = memory::weight(released.body.len() as u64);
        if weight == 0 {
            return self.begin_released(released, right, None);
        }
        let worker = Arc::clone(self);
        self.tasks.spawn(async move {
            let held = worker.memory.hold(Share::Room, weight).await;
            worker.begin_released(released, right, Some(held));
        });
    }

    fn begin_released(self: &Arc<Self>, released: Released, right: Right, held: Option<Held>) {
        if let Some(task) = self.read_released(released, held) {
            self.spawn_job(task, None, right);
        }
    }

    /// Tells of what has expired in the waiting room: all in one statement.
    pub(super) async fn conclude_expired(self: &Arc<Self>, expired: Vec<Released>) {
        let bytes = expired
            .iter()
            .map(|job| memory::weight(job.body.len() as u64))
            .sum();
        let _held = self.memory.hold(Share::Room, bytes).await;
        let tasks = expired
            .into_iter()
            .filter_map(|job| self.read_released(job, None));
        let over = tasks.map(Over::expired).collect();
        self.conclude_together(over).await;
    }

    /// A job out of the waiting room as the pipeline takes it. `None`: it was dealt with.
    fn read_released(self: &Arc<Self>, mut released: Released, held: Option<Held>) -> Option<Task> {
        let properties = std::mem::take(&mut released.properties);
        let properties: Properties = serde_json::from_value(properties).unwrap_or_default();
        if released.row.is_poison() {
            let jobs = self.topology.jobs_exchange();
            self.bury_poison(Doomed::stored(released, properties, &jobs, held));
            return None;
        }
        let incoming = Incoming {
            body: &released.body,
            contract: properties.contract.as_deref(),
            ..Incoming::default()
        };
        // A defect of ours met here must not take the dispatcher along.
        let decoded =
            std::panic::catch_unwind(AssertUnwindSafe(|| decode::decode(&incoming, &JobLimits::STORED)));
        let job = match decoded {
            Ok(Ok(job)) => Arc::new(job),
            Ok(Err(rejection)) => {
                let newer = rejection.reason == RejectReason::ContractTooNew;
                let why = Unreadable::Rejected { newer };
                self.give_back_unreadable(released.row, why, &rejection.to_string());
                return None;
            }
            Err(_) => {
                let message = panicked().to_string();
                self.give_back_unreadable(released.row, Unreadable::Crashed, &message);
                return None;
            }
        };
        Some(Task {
            correlation_id: properties
                .correlation_id
                .map_or_else(|| job.id.shared(), Arc::from),
            traceparent: properties.traceparent,
            published: properties.published,
            job,
            row: released.row,
            level: released.level,
            new: false,
            released: properties.released_at,
            weight: held.as_ref().map_or(0, Held::bytes),
            held,
        })
    }

    fn spawn_job(self: &Arc<Self>, task: Task, origin: Option<Box<Arrival>>, right: Right) {
        let worker = Arc::clone(self);
        let span = tracing::info_span!("job", job = %task.job.id, tenant = %task.job.tenant);
        let trace = self.trace(&task);
        let work = async move { worker.run_job(task, origin, right).await }.instrument(span);
        self.tasks.spawn(traces::follow(trace, work));
    }

    /// One job, from its lease to its report.
    async fn run_job(self: Arc<Self>, task: Task, origin: Option<Box<Arrival>>, right: Right) {
        let _in_flight = self.in_flight();
        let age = task.age(self.clock.now());
        let attempt = AssertUnwindSafe(self.pipeline.attempt(&task))
            .catch_unwind()
            .await;
        let attempt = attempt.unwrap_or_else(|_| crashed(&task));
        // Only now it is known whether it was one, and not a wait for room or a key.
        if let Some(age) = age.filter(|_| attempt.started) {
            let ages = self.metrics.queue_age.with_label_values(&[task.level.as_str()]);
            ages.observe(age.as_secs_f64());
        }
        if let (Some((_, in_hand)), Some(took)) = (&right, attempt.smtp) {
            in_hand.note_send(took);
        }
        // The mail is out, or not: either way the connection is free. What follows is bookkeeping.
        drop(right);
        if attempt.found_busy {
            self.note_busy(&task.row.account);
        }
        self.conclude(task, origin, attempt).await;
    }

    /// For jobs that are over, or have to wait, before anything is tried: all in one statement.
    pub fn conclude_at_once(self: &Arc<Self>, over: Vec<Over>) {
        if over.is_empty() {
            return;
        }
        let worker = Arc::clone(self);
        self.tasks
            .spawn(async move { worker.conclude_together(over).await });
    }

    async fn conclude_together(self: &Arc<Self>, over: Vec<Over>) {
        let _in_flight = self.in_flight();
        // A defect of ours met in one must not take the others along: its delivery goes back, its lease is found forgotten.
        let concluding = over
            .into_iter()
            .filter_map(|over| std::panic::catch_unwind(AssertUnwindSafe(|| self.plan_at_once(over))).ok());
        let (ends, settlements): (Vec<_>, Vec<_>) = concluding.unzip();
        let settled = self.batches.settle_together(settlements).await;
        for (end, (settlement, answer)) in ends.into_iter().zip(settled) {
            self.end(end, settlement, answer).await;
        }
    }

    /// What is to be written of one of them.
    pub(super) fn plan_at_once(&self, over: Over) -> (End, Settlement) {
        let Over {
            task,
            origin,
            verdict,
        } = over;
        fail_point::hit(Point::Planning, [task.job.id.as_str()]);
        let mut attempt = task.begin();
        attempt.verdict = verdict;
        self.plan(task, origin, attempt)
    }

    /// plan → settle → acknowledge → report.
    async fn conclude(self: &Arc<Self>, task: Task, origin: Option<Box<Arrival>>, attempt: Attempt) {
        let (end, settlement) = self.plan(task, origin, attempt);
        fail_point::hit(Point::Replied, [end.task.job.id.as_str()]);
        let since = Instant::now();
        let (settlement, answer) = self.batches.settle(settlement).await;
        traces::stage("settle", since);
        self.end(end, settlement, answer).await;
    }

    /// `traceparent`: that of the attempt, if it has a span.
    fn circumstances<'a>(&self, task: &'a Task, traceparent: Option<&'a str>) -> Circumstances<'a> {
        Circumstances {
            job: &task.job,
            row: &task.row,
            correlation_id: &task.correlation_id,
            traceparent: traceparent.or(task.traceparent.as_deref()),
            retry: self.retry,
            new: task.new,
            deferred_report_after: self.deferred_report_after,
            now: self.clock.now(),
            jitter: rand::random(),
        }
    }

    /// What is to be written of an attempt, and what is left to do then.
    fn plan(&self, task: Task, origin: Option<Box<Arrival>>, mut attempt: Attempt) -> (End, Settlement) {
        let accepted = |r: &RecipientResult| r.status == RecipientStatus::Accepted;
        // True even if the lease is lost. All of them: those that were not accepted are still to be tried.
        let results = if attempt.recipients.iter().any(accepted) {
            attempt.recipients.clone()
        } else {
            Vec::new()
        };
        let message_id = attempt.message_id.clone().unwrap_or_default();
        let queue = origin.as_ref().map(|origin| &*origin.delivery.queue);
        self.summarise(&task, queue, &attempt);
        let traceparent = traces::traceparent();
        let mut settlement = plan(&self.circumstances(&task, traceparent.as_deref()), &mut attempt);
        self.count_recipients(&task, &attempt);
        self.log_attempt(&task, &attempt);
        if let Some(origin) = &origin {
            self.keep_body(&task, origin, &mut settlement.next);
        }
        let gives_back = matches!(settlement.next, Next::GiveBack);
        let goes_on = gives_back || matches!(settlement.next, Next::Park { .. });
        let end = End {
            task,
            origin,
            results,
            message_id,
            gives_back,
            tried: goes_on.then(|| Box::new(attempt)),
        };
        (end, settlement)
    }

    /// What follows when the outcome is written, or could not be: acknowledge, then report.
    pub(super) async fn end(self: &Arc<Self>, mut end: End, settlement: Settlement, answer: Answer) {
        let cancelled = answer.settled == Settled::Cancelled;
        let (settlement, answer) = match end.tried.take().filter(|_| cancelled) {
            // Boxed, like what follows a lost lease: every job would carry the room for it.
            Some(tried) => Box::pin(self.settle_cancelled(&end.task, tried)).await,
            None => (settlement, answer),
        };
        let id = end.task.job.id.as_str();
        match answer.settled {
            Settled::Written | Settled::Cancelled => {
                self.count(&settlement);
                fail_point::hit(Point::BeforeAck, [id]);
                match end.origin {
                    Some(origin) if end.gives_back => origin.give_back(),
                    Some(origin) => origin.ack(),
                    None => {}
                }
                fail_point::hit(Point::Acked, [id]);
                if let (Some(report), Some(number)) = (settlement.report, answer.report) {
                    self.reporter.publish(self, report, number);
                }
            }
            Settled::LeaseLost => Box::pin(self.lost(end, settlement.attempts)).await,
        }
        if matches!(
            settlement.next,
            Next::Park {
                delay: std::time::Duration::ZERO,
                ..
            }
        ) {
            self.nudge.notify_one();
        }
    }

    /// Puts the body of a new job into what is written, if the job has to wait. Only then: most never do.
    fn keep_body(&self, task: &Task, origin: &Arrival, next: &mut Next) {
        let (Next::Park { body, .. } | Next::Hold { body }) = next else {
            return;
        };
        *body = self.body(&task.job, &origin.delivery, &origin.properties);
        if body.is_none() {
            // It cannot be kept here: RabbitMQ stays its owner.
            *next = Next::GiveBack;
        }
    }

    /// The body of a delivery as it is stored.
    fn body(&self, job: &MailJob, delivery: &Delivery, properties: &Properties) -> Option<Body> {
        let plain = plain(delivery, &self.limits).ok_or_else(|| "it cannot be inflated again".to_owned());
        let keys = self.pipeline.keys.encryption.current();
        let stored = plain.and_then(|plain| stored(job, &plain, properties, &keys));
        stored
            .map_err(|error| tracing::error!(%error, job = %job.id, "body cannot be stored"))
            .ok()
    }

    /// A cancel that came in between wins over anything but an outcome.
    async fn settle_cancelled(&self, task: &Task, tried: Box<Attempt>) -> (Settlement, Answer) {
        let traceparent = traces::traceparent();
        let cancelled = cancelled(&self.circumstances(task, traceparent.as_deref()), *tried);
        self.batches.settle(cancelled).await
    }

    /// Somebody else has the job by now. What the server took is true all the same.
    async fn lost(&self, end: End, attempts: u32) {
        self.metrics.leases_lost.inc();
        tracing::warn!("the lease was lost before the outcome was written");
        let (row, results) = (&end.task.row, &end.results);
        if !results.is_empty() {
            let mut waits = crate::ledger::batches::pauses();
            let merged = loop {
                match self
                    .ledger
                    .merge_acceptance(&row.tenant, &row.id, results, &end.message_id, attempts)
                    .await
                {
                    Ok(was_final) => break was_final,
                    Err(error) => self.database_trouble("merge", &error),
                }
                tokio::time::sleep(waits.next().unwrap_or_default()).await;
            };
            if merged {
                self.metrics.duplicate_sends.inc();
            }
        }
        // Whoever has the job now may lack its body: RabbitMQ offers it once more.
        if let Some(origin) = end.origin {
            origin.give_back();
        }
    }

    /// Keeps the body of a job in flight elsewhere, then acknowledges; a job given back meanwhile is admitted again.
    fn absorb(self: &Arc<Self>, arrival: Box<Arrival>) {
        let worker = Arc::clone(self);
        self.tasks.spawn(async move {
            let stored = worker.body(&arrival.job, &arrival.delivery, &arrival.properties);
            let Some(Body { bytes, properties }) = stored else {
                return arrival.give_back();
            };
            let (tenant, id) = (arrival.job.tenant.clone(), arrival.job.id.clone());
            if worker
                .batches
                .absorb(Absorb {
                    tenant,
                    id,
                    body: bytes,
                    properties,
                })
                .await
            {
                worker.metrics.jobs.with_label_values(&["duplicate"]).inc();
                arrival.ack();
            } else {
                worker.arrive(arrival).await;
            }
        });
    }

    fn give_back_unreadable(self: &Arc<Self>, row: Row, what: Unreadable, why: &str) {
        let newer = what == Unreadable::Rejected { newer: true };
        if !newer {
            tracing::error!(job = %row.id, tenant = %row.tenant, "a stored body cannot be read; it waits: {why}");
        }
        let settlement = Settlement {
            attempts: row.attempts,
            next: Next::Park {
                reason: WaitReason::Contract,
                delay: std::time::Duration::from_mins(1),
                body: None,
            },
            recipients: None,
            message_id: None,
            report: None,
            refund: true,
            error: (!newer).then(|| why.to_owned()),
            uncertain: false,
            crashed: what == Unreadable::Crashed,
            account: None,
            evidence: Vec::new(),
            row,
        };
        let worker = Arc::clone(self);
        self.tasks
            .spawn(async move { worker.batches.settle(settlement).await });
    }
}

/// Why a stored body is of no use here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unreadable {
    /// It is no job to this worker; `newer`: it may be one to others.
    Rejected { newer: bool },
    /// Reading it ended in a panic.
    Crashed,
}

fn crashed(task: &Task) -> Attempt {
    let failure: Failure = panicked();
    let mut attempt = task.begin();
    attempt.started = true;
    // Nobody knows how far it came: the slot counts.
    attempt.reached_mail_from = true;
    attempt.crashed = true;
    attempt.verdict = Verdict::Uncertain(failure);
    attempt
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::AccountKey;
    use crate::ledger::Epoch;
    use crate::level::Level;
    use crate::memory::Memory;

    #[test]
    fn a_new_job_weighs_what_its_delivery_holds() {
        let memory = Memory::new(64 << 20, prometheus::IntGauge::new("held", "held").unwrap());
        let body = r#"{"id":"1","tenant":"acme","to":"a@example.org","text":"t"}"#;
        let incoming = Incoming {
            body: body.as_bytes(),
            ..Incoming::default()
        };
        let job = decode::decode(&incoming, &crate::config::JobLimits::default()).unwrap();
        let account = AccountKey::from_stored("acme/main");
        let lease = Epoch::for_tests().claim();
        let row = Row::new(job.tenant.clone(), job.id.clone(), account.clone(), lease, 0);
        let delivery = Delivery {
            held: memory.try_hold(Share::Bulk, 1 << 20),
            ..Delivery::for_tests(body)
        };
        let arrival = Arrival {
            delivery,
            job: Arc::new(job),
            account,
            connections: 1,
            may_detour: false,
            level: Level::High,
            properties: Properties::default(),
            since: Instant::now(),
            ended: tokio_util::sync::CancellationToken::new(),
        };
        assert_eq!(task(&arrival, row).weight, 1 << 20);
    }
}
