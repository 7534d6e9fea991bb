//! Parking: what is to be sent later goes straight into the waiting room, many jobs in one statement. It takes no permit, no
//! connection and no lease. What the ledger knows already, or what cannot be parked as it is, goes the ordinary way.

use std::collections::VecDeque;
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
use super::conclude::{End, Over};
use super::pause;
use crate::broker::dead_letter::REPLAY;
use crate::fail_point::{self, Point};
use crate::job::MailJob;
use crate::ledger::batches::pauses;
use crate::ledger::park::{Birth, ParkRequest, Parked, born};
use crate::ledger::settle::{Answer, Body, Next, Settled, Settlement};
use crate::ledger::{Lease, Row, WaitReason};
use crate::pipeline::Verdict;
use crate::pipeline::task::SharedClock;

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

/// Parks arrivals until `stop`; those not begun then, or in a [`pause`], are given back to RabbitMQ.
pub async fn run(worker: Arc<Worker>, mut arrivals: mpsc::Receiver<Box<Arrival>>, stop: CancellationToken) {
    let mut waiting = Vec::with_capacity(ROWS);
    let mut running = JoinSet::new();
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut paused = worker.pause.watch();
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
            () = pause::begun(&mut paused), if !waiting.is_empty() => give_back(&mut waiting),
            _ = looks.tick(), if is_full && !waiting.is_empty() => {}
        }
    }
    arrivals.close();
    while let Ok(arrival) = arrivals.try_recv() {
        arrival.give_back();
    }
    give_back(&mut waiting);
    // The worker waits for them among its tasks.
    running.detach_all();
}

#[expect(clippy::vec_box, reason = "they are large, and come boxed")]
fn give_back(arrivals: &mut Vec<Box<Arrival>>) {
    arrivals.drain(..).for_each(Arrival::give_back);
}

/// An arrival, ready to be parked.
struct Ready {
    end: End,
    settlement: Settlement,
    body: Body,
    send_at: Timestamp,
}

impl Ready {
    fn weight(&self) -> usize {
        let report = self.settlement.report.as_ref();
        self.body.bytes.len() + report.map_or(0, |report| report.json().len())
    }

    fn request(&self) -> ParkRequest<'_> {
        let job = &self.end.task.job;
        ParkRequest {
            tenant: &job.tenant,
            id: &job.id,
            level: self.end.task.level,
            account: &self.settlement.row.account,
            digest: &job.digest,
            send_at: self.send_at,
            expires_at: job.expires_at,
            batch: job.batch.as_deref(),
            body: &self.body,
            report: self.settlement.report.as_ref(),
        }
    }
}

/// Parks a batch. What is left over is admitted.
#[expect(clippy::vec_box, reason = "they are large, and come boxed")]
async fn park(worker: Arc<Worker>, arrivals: Vec<Box<Arrival>>) {
    let _in_flight = worker.in_flight();
    let (now, lease) = (worker.clock.now(), worker.claim());
    let (mut ready, mut others) = (VecDeque::with_capacity(arrivals.len()), Vec::new());
    for arrival in arrivals.into_iter().filter(|arrival| !arrival.is_stale()) {
        // A defect of ours met in one must not take the others along: its delivery goes back.
        let prepare = || worker.prepare_parking(arrival, now, &lease);
        match std::panic::catch_unwind(AssertUnwindSafe(prepare)) {
            Ok(Ok(job)) => ready.push_back(job),
            Ok(Err(arrival)) => others.extend(arrival),
            Err(_) => {}
        }
    }
    while !ready.is_empty() {
        let batch = next_batch(&mut ready);
        worker.reporter.wait_for_room(batch.len()).await;
        let parked = insert(&worker, &batch, now).await;
        for (job, parked) in batch.into_iter().zip(parked) {
            match parked {
                Some(Parked { report }) => {
                    let settled = Settled::Written;
                    worker
                        .end(job.end, job.settlement, Answer { settled, report })
                        .await;
                }
                None => others.extend(job.end.origin),
            }
        }
    }
    admission::admit_to_park(&worker, others).await;
}

/// The first of those that are ready, as many as fit into one statement.
fn next_batch(ready: &mut VecDeque<Ready>) -> Vec<Ready> {
    let mut bytes = 0;
    let fits = |job: &&Ready| {
        bytes += job.weight();
        bytes <= BYTES
    };
    let count = ready.iter().take_while(fits).count();
    ready.drain(..count.max(1)).collect()
}

/// Writes a batch. Repeated as it is until Postgres answers: until then nothing is acknowledged. If it refuses the batch,
/// none of it is parked: admission finds out which job is to blame.
async fn insert(worker: &Arc<Worker>, batch: &[Ready], now: Timestamp) -> Vec<Option<Parked>> {
    let requests: Vec<_> = batch.iter().map(Ready::request).collect();
    let birth = Birth::new(worker.epoch(), batch.len(), now);
    let mut waits = pauses();
    fail_point::hit(Point::Delivered, requests.iter().map(|job| job.id.as_str()));
    loop {
        match worker.ledger.park(&birth, &requests).await {
            Ok(parked) => return parked,
            Err(error) => {
                worker.database_trouble("park", &error);
                // In a pause admission has them, and gives them back.
                if !error.is_retryable() || worker.pause.is_on() {
                    return vec![None; batch.len()];
                }
            }
        }
        tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))).await;
    }
}

impl Worker {
    /// What is to be written of an arrival that waits for its time. It comes back if its body cannot be stored: admission
    /// gives it back to RabbitMQ, and says so.
    fn prepare_parking(
        &self,
        arrival: Box<Arrival>,
        now: Timestamp,
        lease: &Lease,
    ) -> Result<Ready, Option<Box<Arrival>>> {
        let Some(send_at) = arrival.job.send_at else {
            return Err(Some(arrival));
        };
        let (row, reason) = (unborn(&arrival, now, lease), WaitReason::Schedule);
        let delay = Duration::try_from(send_at.duration_since(now)).unwrap_or_default();
        let over = Over::new(arrival, row, Verdict::Wait { reason, delay });
        let (end, mut settlement) = self.plan_at_once(over);
        let body = match &mut settlement.next {
            Next::Park { body, .. } => body.take(),
            _ => None,
        };
        let Some(body) = body else { return Err(end.origin) };
        Ok(Ready {
            end,
            settlement,
            body,
            send_at,
        })
    }
}

/// The row that an arrival will have, as the plan wants it. Nothing is done under the lease: it waits.
fn unborn(arrival: &Arrival, now: Timestamp, lease: &Lease) -> Row {
    let (tenant, id) = (arrival.job.tenant.clone(), arrival.job.id.clone());
    Row {
        created: now,
        ..Row::new(tenant, id, arrival.account.clone(), lease.clone(), born(now))
    }
}
