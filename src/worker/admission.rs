//! Admission: takes arrivals as permits and connections allow, claims them in batches, and sends each on its way.
//!
//! What cannot run now is not held back at the head of its queue: what is to be sent later goes to [`park`], over a limit it
//! is parked at once, behind a busy account when it has stood here for a while. With no permit free nothing is taken, and
//! the backlog stays in RabbitMQ. In a [`pause`] all that is in hand goes back to it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc};
use tokio::time::{MissedTickBehavior, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Worker;
use super::arrival::Arrival;
use super::bury::Refusal;
use super::conclude::Over;
use super::load::InHand;
use super::park;
use super::pause;
use super::permits::Permit;
use crate::broker::dead_letter::REPLAY;
use crate::fail_point::{self, Point};
use crate::id::AccountKey;
use crate::job::MailJob;
use crate::ledger::admit::{AdmitRequest, Admitted, Want};
use crate::ledger::batches::pauses;
use crate::ledger::release::ReleaseRequest;
use crate::level::Level;
use crate::pipeline::task::Task;

/// Most jobs in one admission statement.
const BATCH: usize = 128;
/// How long a job may stand in hand because its account is busy before it is parked.
const PARK_AFTER: Duration = Duration::from_secs(1);
/// From a look that stopped for want of a permit to the next of that level, unless many have become free before: a statement
/// for each of them would cost more than it carries.
const PACE: Duration = Duration::from_millis(5);
/// How often jobs in hand are looked at when nothing else happens.
const LOOK: Duration = Duration::from_millis(100);
/// Admission statements at once.
const STATEMENTS: usize = 2;

/// Jobs in hand, not yet admitted.
#[derive(Debug)]
pub struct Admission {
    worker: Arc<Worker>,
    later: park::Entrance,
    levels: [VecDeque<Box<Arrival>>; 4],
    statements: Arc<Semaphore>,
    /// Something urgent lacks a permit.
    lacks_urgent_permits: bool,
    /// How many of each level have been looked at in vain since something was freed: those behind them lack a permit, or are
    /// new.
    passed: [usize; 4],
    /// Levels of which the last look stopped for want of a permit.
    short: [bool; 4],
    /// When these are looked at again, if anything is free then.
    again: Instant,
    /// The next look goes on behind the first that finds no permit, to what has stood for long behind a busy account.
    goes_behind: bool,
}

/// An arrival picked for a batch, with what it needs to run; without a permit it is to be parked.
#[derive(Debug)]
pub struct Picked {
    /// The arrival.
    pub arrival: Box<Arrival>,
    /// Its claim and what is asked for.
    pub request: AdmitRequest,
    /// The right to send it.
    pub permit: Option<(Permit, InHand)>,
}

impl Admission {
    /// An empty hand. `later`: for what is to be parked at once.
    #[must_use]
    pub fn new(worker: Arc<Worker>, later: park::Entrance) -> Self {
        Self {
            worker,
            later,
            levels: Default::default(),
            statements: Arc::new(Semaphore::new(STATEMENTS)),
            lacks_urgent_permits: false,
            passed: [0; 4],
            short: [false; 4],
            again: Instant::now(),
            goes_behind: false,
        }
    }

    /// Runs until `stop`; what is still in hand then is given back to RabbitMQ.
    pub async fn run(mut self, mut arrivals: mpsc::Receiver<Box<Arrival>>, stop: CancellationToken) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut room, mut permits) = (self.worker.load.watch(), self.worker.permits.watch());
        let mut paused = self.worker.pause.watch();
        loop {
            let waiting = self.levels.iter().any(|level| !level.is_empty());
            let is_short = self.short.contains(&true);
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = pause::begun(&mut paused), if waiting => self.give_all_back(),
                arrival = arrivals.recv() => match arrival {
                    Some(arrival) => self.take(arrival),
                    None => break,
                },
                () = self.worker.permits.freed(), if self.lacks_urgent_permits => self.passed = [0; 4],
                Ok(()) = permits.changed(), if waiting => self.passed = [0; 4],
                Ok(()) = room.changed(), if waiting => self.passed = [0; 4],
                () = sleep_until(self.again.into()), if is_short => self.look_again(),
                _ = looks.tick(), if waiting => {
                    // With no permit free too: what has stood for long behind a busy account is parked.
                    self.passed = [0; 4];
                    self.short = [false; 4];
                    self.goes_behind = true;
                    if !self.worker.may_begin() {
                        self.forget_stale();
                    }
                }
            }
            while let Ok(arrival) = arrivals.try_recv() {
                self.take(arrival);
            }
            tokio::select! {
                () = stop.cancelled() => break,
                // Without the database it may wait for long for its turn.
                () = pause::begun(&mut paused) => {}
                () = self.admit_what_can_run() => {}
            }
        }
        arrivals.close();
        while let Ok(arrival) = arrivals.try_recv() {
            self.take(arrival);
        }
        self.give_all_back();
    }

    fn give_all_back(&mut self) {
        for arrival in self.levels.iter_mut().flat_map(|level| level.drain(..)) {
            arrival.give_back();
        }
        self.passed = [0; 4];
        self.short = [false; 4];
    }

    /// Levels that were short of permits may have what has become free since.
    fn look_again(&mut self) {
        self.again = Instant::now() + PACE;
        for level in Level::ALL {
            self.short[level.index()] &= self.worker.permits.available(level) == 0;
        }
    }

    fn take(&mut self, arrival: Box<Arrival>) {
        if let Some(arrival) = self.later.offer(arrival, &self.worker.clock) {
            self.levels[arrival.level.index()].push_back(arrival);
        }
    }

    async fn admit_what_can_run(&mut self) {
        while self.worker.may_begin() {
            // The batch is picked when it can be sent, so that it is as full as the load makes it.
            let Ok(statement) = Arc::clone(&self.statements).acquire_owned().await else {
                return;
            };
            let batch = self.pick();
            if batch.is_empty() {
                return;
            }
            let worker = Arc::clone(&self.worker);
            self.worker.tasks.spawn(async move {
                admit(&worker, batch).await;
                drop(statement);
            });
        }
    }

    /// What the broker has taken back is passed over when its turn comes; while none has, sessions may come and go.
    fn forget_stale(&mut self) {
        for level in &mut self.levels {
            level.retain(|arrival| !arrival.is_stale());
        }
    }

    /// The next batch: levels in the order of the permits, jobs in the order of arrival, passing over those whose
    /// account is busy.
    fn pick(&mut self) -> Vec<Picked> {
        let mut picking = Picking::new(&self.worker, std::mem::take(&mut self.goes_behind));
        self.lacks_urgent_permits = false;
        for level in self.worker.permits.order() {
            let i = level.index();
            if self.short[i] && !self.worker.permits.has_plenty(level) {
                continue;
            }
            self.passed[i] = picking.pick_from(&mut self.levels[i], level, self.passed[i]);
            let is_urgent = level == Level::Immediate;
            self.short[i] = picking.lacks_permits && !is_urgent;
            if self.short[i] {
                self.again = picking.now + PACE;
            }
            self.lacks_urgent_permits |= picking.lacks_permits && is_urgent;
        }
        picking.batch
    }
}

/// One look at what is in hand.
struct Picking<'a> {
    worker: &'a Worker,
    now: Instant,
    batch: Vec<Picked>,
    picked: HashSet<SameJob>,
    /// Accounts found full in this look.
    full: HashSet<AccountKey>,
    /// An arrival of the level just looked at found no permit.
    lacks_permits: bool,
    /// As [`Admission::goes_behind`].
    goes_behind: bool,
}

/// A job by its name.
struct SameJob(Arc<MailJob>);

impl PartialEq for SameJob {
    fn eq(&self, other: &Self) -> bool {
        (&self.0.id, &self.0.tenant) == (&other.0.id, &other.0.tenant)
    }
}

impl Eq for SameJob {}

impl Hash for SameJob {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.id.hash(state);
    }
}

/// What one look says about an arrival.
enum Turn {
    Now(Want, Option<(Permit, InHand)>),
    Later,
    /// No permit of this level is left.
    NoPermit,
}

impl<'a> Picking<'a> {
    fn new(worker: &'a Worker, goes_behind: bool) -> Self {
        Self {
            worker,
            now: Instant::now(),
            batch: Vec::new(),
            picked: HashSet::new(),
            full: HashSet::new(),
            lacks_permits: false,
            goes_behind,
        }
    }

    /// Looks at a queue from `place` on, and returns up to where nothing more can be had: the first arrival that finds no
    /// permit has the next one. Those behind it are younger, and none of them is to be parked unless it has stood for long.
    fn pick_from(&mut self, queue: &mut VecDeque<Box<Arrival>>, level: Level, mut place: usize) -> usize {
        self.lacks_permits = false;
        let mut first_without = None;
        while self.batch.len() < BATCH
            && let Some(arrival) = queue.get(place)
        {
            if arrival.is_stale() {
                queue.remove(place);
                continue;
            }
            match self.turn(arrival, level) {
                Turn::Now(want, right) => {
                    if let Some(arrival) = queue.remove(place) {
                        self.add(arrival, want, right);
                    }
                }
                Turn::NoPermit => {
                    self.lacks_permits = true;
                    let first = *first_without.get_or_insert(place);
                    if !self.goes_behind || !self.has_stood_long(arrival) {
                        return first;
                    }
                    place += 1;
                }
                Turn::Later => place += 1,
            }
        }
        first_without.unwrap_or(place)
    }

    fn turn(&mut self, arrival: &Arrival, level: Level) -> Turn {
        // One that was not parked at once: parking takes neither permit nor connection.
        if park::is_for_later(&arrival.job, &self.worker.clock) {
            return if self.has_twin(arrival) {
                Turn::Later
            } else {
                Turn::Now(Want::Park, None)
            };
        }
        if self.is_full(arrival) {
            return if self.has_stood_long(arrival) && !self.has_twin(arrival) {
                Turn::Now(Want::Park, None)
            } else {
                Turn::Later
            };
        }
        if self.has_twin(arrival) {
            return Turn::Later;
        }
        let Some(permit) = self.worker.permits.try_acquire(level) else {
            return Turn::NoPermit;
        };
        let in_hand = self.worker.load.enter(&arrival.account, arrival.connections);
        let want = if Task::is_self_contained(&arrival.job) {
            Want::Slot
        } else {
            Want::Claim
        };
        Turn::Now(want, Some((permit, in_hand)))
    }

    fn is_full(&mut self, arrival: &Arrival) -> bool {
        let urgent = arrival.level == Level::Immediate;
        if !urgent && self.full.contains(&arrival.account) {
            return true;
        }
        let load = &self.worker.load;
        let full = load.is_full(&arrival.account, arrival.connections, urgent);
        if full {
            self.full.insert(arrival.account.clone());
        }
        full
    }

    fn has_stood_long(&self, arrival: &Arrival) -> bool {
        self.now.saturating_duration_since(arrival.since) >= PARK_AFTER
    }

    /// Whether the same job is in the batch: one statement cannot claim it twice.
    fn has_twin(&self, arrival: &Arrival) -> bool {
        self.picked.contains(&SameJob(Arc::clone(&arrival.job)))
    }

    fn add(&mut self, arrival: Box<Arrival>, want: Want, permit: Option<(Permit, InHand)>) {
        self.picked.insert(SameJob(Arc::clone(&arrival.job)));
        self.batch.push(Picked::new(self.worker, arrival, want, permit));
    }
}

impl Picked {
    fn new(worker: &Worker, arrival: Box<Arrival>, want: Want, permit: Option<(Permit, InHand)>) -> Self {
        let (account, lease) = (arrival.account.clone(), worker.claim());
        let mut request = AdmitRequest::new(&arrival.job, arrival.level, account, lease, want);
        request.detour = arrival.may_detour;
        request.replay = arrival.delivery.has_header(REPLAY);
        Self {
            arrival,
            request,
            permit,
        }
    }
}

/// Admits what could not be parked at once, and parks what is still to be parked. Of twins one at a time.
#[expect(clippy::vec_box, reason = "they are large, and come boxed")]
pub(super) async fn admit_to_park(worker: &Arc<Worker>, mut arrivals: Vec<Box<Arrival>>) {
    while !arrivals.is_empty() {
        let (mut picked, mut batch, mut rest) = (HashSet::new(), Vec::new(), Vec::new());
        for arrival in arrivals {
            if batch.len() < BATCH && picked.insert(SameJob(Arc::clone(&arrival.job))) {
                batch.push(Picked::new(worker, arrival, Want::Park, None));
            } else {
                rest.push(arrival);
            }
        }
        admit(worker, batch).await;
        arrivals = rest;
    }
}

/// Claims a batch and sends every job on its way. Repeated with the same claims until Postgres answers: until then
/// nothing is acknowledged. In a pause it is given up: what was leased by a statement whose answer got lost is found again.
async fn admit(worker: &Arc<Worker>, batch: Vec<Picked>) {
    let requests: Vec<AdmitRequest> = batch.iter().map(|picked| picked.request.clone()).collect();
    let mut waits = pauses();
    fail_point::hit(Point::Delivered, requests.iter().map(|r| r.id.as_str()));
    let answers = loop {
        match worker.ledger.admit(&requests).await {
            Ok(answers) => break answers,
            Err(error) if !error.is_row_fault() => {
                worker.database_trouble("admit", &error);
                if worker.pause.is_on() {
                    return batch.into_iter().for_each(|picked| picked.arrival.give_back());
                }
                tokio::time::sleep(waits.next().unwrap_or(PARK_AFTER)).await;
            }
            Err(error) if batch.len() > 1 => {
                worker.database_trouble("admit", &error);
                return admit_in_halves(worker, batch).await;
            }
            Err(error) => {
                for picked in batch {
                    worker.bury(picked.arrival, Refusal::ByDatabase(error.to_string()));
                }
                return;
            }
        }
    };
    let mut behind: HashMap<_, Vec<_>> = HashMap::new();
    let mut over = Vec::new();
    for (picked, answer) in batch.into_iter().zip(answers) {
        match answer {
            Admitted::Behind(row) => {
                let key = (row.account.clone(), picked.arrival.level);
                behind.entry(key).or_default().push((picked, row));
            }
            other => over.extend(worker.follow(picked, other)),
        }
    }
    worker.conclude_at_once(over);
    for ((account, level), jobs) in behind {
        release_first(worker, account, level, jobs).await;
    }
}

/// One row poisons the batch: halves, until it stands alone.
async fn admit_in_halves(worker: &Arc<Worker>, mut batch: Vec<Picked>) {
    let rest = batch.split_off(batch.len() / 2);
    Box::pin(admit(worker, batch)).await;
    Box::pin(admit(worker, rest)).await;
}

/// Older jobs of the account wait: they get the permits of the new ones, which go only as far as permits are left, so
/// that an account that has parked once does not keep parking.
async fn release_first(
    worker: &Arc<Worker>,
    account: AccountKey,
    level: Level,
    jobs: Vec<(Picked, Box<crate::ledger::Row>)>,
) {
    let request = ReleaseRequest {
        level,
        most: jobs.len(),
        most_bytes: worker.releasable_bytes(),
        exclude: Vec::new(),
        only: Some(account),
        max_age: worker.retry.max_age,
    };
    let released = match worker.release(&request).await {
        Ok(released) => released,
        Err(error) => {
            worker.database_trouble("release", &error);
            Vec::new()
        }
    };
    let mut jobs = VecDeque::from(jobs);
    let mut over = Vec::new();
    for job in released {
        // The youngest of the new ones gives its permit up.
        match jobs.pop_back() {
            Some((mut picked, row)) => {
                let permit = picked.permit.take();
                over.push(Over::busy(picked, *row));
                worker.run_released(job, permit);
            }
            None => worker.run_released(job, None),
        }
    }
    for (picked, row) in jobs {
        over.extend(worker.follow(picked, Admitted::Go(row)));
    }
    worker.conclude_at_once(over);
}
