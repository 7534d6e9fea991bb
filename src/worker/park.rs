//! Parking: what is to be sent later goes straight into the waiting room, many jobs in one statement. It takes no permit, no
//! connection and no lease. What the ledger knows already, or what cannot be parked as it is, goes the ordinary way.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::Worker;
use super::admission;
use super::arrival::Arrival;
use crate::broker::dead_letter::REPLAY;
use crate::fail_point::{self, Point};
use crate::job::MailJob;
use crate::ledger::batches::pauses;
use crate::ledger::park::{Birth, ParkRequest, Parked, born};
use crate::ledger::settle::Body;
use crate::ledger::{Lease, Row, WaitReason};
use crate::pipeline::task::SharedClock;
use crate::pipeline::{Attempt, Verdict};
use crate::report::ReportMessage;
use crate::settlement::{Circumstances, all_pending, plan};

/// A job that is to be sent later than this is parked at once. Sooner ones are due by the time a statement is answered, or
/// the clocks may differ by as much.
const LATER: SignedDuration = SignedDuration::from_secs(2);
/// Most arrivals that wait for a statement; those beyond go the ordinary way.
const WAITING: usize = 4096;
/// Most jobs in one statement.
const ROWS: usize = 256;
/// Most bytes of bodies and reports in one statement; a single larger job still goes, alone.
const BYTES: usize = 4 << 20;
/// Statements at once: one enters its jobs while the other commits. A third would only wait for their lanes, which are
/// locked from the entry until then.
const STATEMENTS: usize = 2;
/// Jobs that make a second statement worth its while beside one that is running.
const CROWD: usize = 32;
/// How often those that wait are looked at while the outbox is full.
const LOOK: Duration = Duration::from_millis(100);

/// Whether a job is to be sent some time from now.
#[must_use]
pub fn is_for_later(job: &MailJob, clock: &SharedClock) -> bool {
    job.send_at
        .is_some_and(|at| at.duration_since(clock.now()) > LATER)
}

/// Where admission hands over what is for later.
#[derive(Debug)]
pub struct Entrance(mpsc::Sender<Box<Arrival>>);

impl Entrance {
    /// The entrance, and where it leads to.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Box<Arrival>>) {
        let (entrance, arrivals) = mpsc::channel(WAITING);
        (Self(entrance), arrivals)
    }

    /// Takes what is to be parked at once; anything else comes back. A job that an operator took out of the dead letters is
    /// known to the ledger.
    pub fn offer(&self, arrival: Box<Arrival>, clock: &SharedClock) -> Option<Box<Arrival>> {
        if !is_for_later(&arrival.job, clock) || arrival.delivery.has_header(REPLAY) {
            return Some(arrival);
        }
        self.0
            .try_send(arrival)
            .err()
            .map(mpsc::error::TrySendError::into_inner)
    }
}

/// Parks arrivals until `stop`; those not begun then are given back to RabbitMQ.
pub async fn run(worker: Arc<Worker>, mut arrivals: mpsc::Receiver<Box<Arrival>>, stop: CancellationToken) {
    let mut waiting = Vec::with_capacity(ROWS);
    let mut running = JoinSet::new();
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let enough = if running.is_empty() { 1 } else { CROWD };
        // A report is owed for most of them.
        let is_full = worker.reporter.is_full();
        if waiting.len() >= enough && running.len() < STATEMENTS && !is_full {
            let batch = std::mem::replace(&mut waiting, Vec::with_capacity(ROWS));
            let parking = park(Arc::clone(&worker), batch);
            running.spawn(worker.tasks.track_future(parking));
        }
        let room = ROWS - waiting.len();
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = running.join_next() => {}
            taken = arrivals.recv_many(&mut waiting, room), if room > 0 => if taken == 0 {
                break;
            },
            _ = looks.tick(), if is_full && !waiting.is_empty() => {}
        }
    }
    arrivals.close();
    while let Ok(arrival) = arrivals.try_recv() {
        arrival.give_back();
    }
    for arrival in waiting {
        arrival.give_back();
    }
    // The worker waits for them among its tasks.
    running.detach_all();
}

/// An arrival, ready to be parked.
struct Ready {
    arrival: Box<Arrival>,
    body: Body,
    report: Option<ReportMessage>,
}

impl Ready {
    fn weight(&self) -> usize {
        let report = self.report.as_ref().map_or(0, |report| report.json().len());
        self.body.bytes.len() + report
    }

    fn request(&self, send_at: Timestamp) -> ParkRequest<'_> {
        let job = &self.arrival.job;
        ParkRequest {
            tenant: &job.tenant,
            id: &job.id,
            level: self.arrival.level,
            account: &self.arrival.account,
            digest: &job.digest,
            send_at,
            expires_at: job.expires_at,
            batch: job.batch.as_deref(),
            body: &self.body,
            report: self.report.as_ref(),
        }
    }
}

/// Parks a batch. What is left over is admitted.
#[expect(clippy::vec_box, reason = "they are large, and come boxed")]
async fn park(worker: Arc<Worker>, arrivals: Vec<Box<Arrival>>) {
    let _in_flight = worker.in_flight();
    let (now, lease) = (worker.clock.now(), worker.claim());
    let (mut ready, mut others) = (Vec::with_capacity(arrivals.len()), Vec::new());
    for arrival in arrivals {
        if arrival.is_stale() {
            continue;
        }
        // A defect of ours met in one must not take the others along.
        let prepared =
            std::panic::catch_unwind(AssertUnwindSafe(|| worker.prepare_parking(&arrival, now, &lease)));
        match prepared {
            Ok(Some((body, report))) => ready.push(Ready {
                arrival,
                body,
                report,
            }),
            // Not to be stored: admission gives it back, and says so.
            Ok(None) => others.push(arrival),
            Err(_) => arrival.give_back(),
        }
    }
    let mut ready = ready.into_iter().peekable();
    while ready.peek().is_some() {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(next) = ready.next_if(|next| batch.is_empty() || bytes + next.weight() <= BYTES) {
            bytes += next.weight();
            batch.push(next);
        }
        let parked = insert(&worker, &batch, now).await;
        for (job, parked) in batch.into_iter().zip(parked) {
            match parked {
                Some(parked) => worker.parked(job, parked),
                None => others.push(job.arrival),
            }
        }
    }
    admission::admit_to_park(&worker, others).await;
}

/// Writes a batch. Repeated as it is until Postgres answers: until then nothing is acknowledged. If it refuses the batch,
/// none of it is parked: admission finds out which job is to blame.
async fn insert(worker: &Arc<Worker>, batch: &[Ready], now: Timestamp) -> Vec<Option<Parked>> {
    let requests: Vec<_> = batch
        .iter()
        .map(|ready| ready.request(ready.arrival.job.send_at.unwrap_or(now)))
        .collect();
    let birth = Birth::new(worker.epoch(), batch.len(), now);
    let mut waits = pauses();
    fail_point::hit(Point::Delivered, requests.iter().map(|job| job.id.as_str()));
    loop {
        match worker.ledger.park(&birth, &requests).await {
            Ok(parked) => return parked,
            Err(error) => {
                worker.database_trouble("park", &error);
                if !error.is_retryable() {
                    return vec![None; batch.len()];
                }
            }
        }
        tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))).await;
    }
}

impl Worker {
    /// What is to be written of an arrival that waits for its time: its body, and the report if one is due. `None`: the body
    /// cannot be stored.
    fn prepare_parking(
        &self,
        arrival: &Arrival,
        now: Timestamp,
        lease: &Lease,
    ) -> Option<(Body, Option<ReportMessage>)> {
        let (job, properties) = (&arrival.job, &arrival.properties);
        let body = self.body(job, &arrival.delivery, properties)?;
        let delay = job.send_at?.duration_since(now);
        let mut attempt = Attempt::of(all_pending(job), None);
        attempt.verdict = Verdict::Wait {
            reason: WaitReason::Schedule,
            delay: Duration::try_from(delay).unwrap_or_default(),
        };
        attempt.account = job.account.as_ref().map(ToString::to_string);
        let row = unborn(arrival, now, lease);
        let circumstances = Circumstances {
            job,
            row: &row,
            correlation_id: properties.correlation_id.as_deref().unwrap_or(job.id.as_str()),
            traceparent: properties.traceparent.as_deref(),
            retry: self.retry,
            new: true,
            deferred_report_after: self.deferred_report_after,
            now,
            jitter: 0.0,
        };
        Some((body, plan(&circumstances, attempt).report))
    }

    /// It is in the waiting room: acknowledge, then report.
    fn parked(self: &Arc<Self>, ready: Ready, parked: Parked) {
        let Ready { arrival, report, .. } = ready;
        let job = Arc::clone(&arrival.job);
        let id = job.id.as_str();
        self.metrics.jobs.with_label_values(&["parked"]).inc();
        fail_point::hit(Point::BeforeAck, [id]);
        arrival.ack();
        fail_point::hit(Point::Acked, [id]);
        if let (Some(report), Some(number)) = (report, parked.report) {
            self.reporter.publish(self, report, number);
        }
    }
}

/// The row that an arrival will have, as the plan wants it. Nothing is done under the lease: it waits.
fn unborn(arrival: &Arrival, now: Timestamp, lease: &Lease) -> Row {
    let born = born(now);
    Row {
        tenant: arrival.job.tenant.clone(),
        id: arrival.job.id.clone(),
        account: arrival.account.clone(),
        lease: lease.clone(),
        born,
        sequence: born,
        attempts: 0,
        created: now,
        recipients: Vec::new(),
        message_id: None,
        uncertain: 0,
        crashes: 0,
        deaths: 0,
        probe: false,
        slot: None,
    }
}
