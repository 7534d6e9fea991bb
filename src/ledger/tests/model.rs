//! Random walks over the whole life of jobs, against the real SQL: workers that crash, stall, drain and lose answers, a
//! broker that redelivers, operators who cancel and release, limits, two tenants with an account in common. After every
//! statement the tables are compared with what they were and with what the world outside knows; in the end everything
//! must have come to its end.
//!
//! `POSTROOM_TEST_MODEL_STEPS=100000 POSTROOM_TEST_MODEL_SEED=7` makes one walk longer than `make test` has time for.

mod attempt;
mod end;
mod faults;
mod intake;
mod jobs;
mod mutants;
mod operators;
mod reports;
mod snapshot;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use self::jobs::{Key, Knowledge};
use self::mutants::Habit;
use self::reports::Unpublished;
use self::snapshot::Snapshot;
use super::world::{World, in_world};
use crate::ledger::admit::AdmitRequest;
use crate::ledger::settle::{Answer, Next, Settlement};
use crate::ledger::{Epoch, Row, Slot, WaitReason};
use crate::report::RecipientResult;

/// What must hold after every statement, and in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// A mail goes to nobody twice unless a crash or a stall lay between write and commit; a job that is to be held then
    /// not even so.
    SentOnce,
    /// A job that is not final is at the broker, or in the hands of a worker who will give it back, or its body is here.
    NothingLost,
    /// One final report, one event id.
    OneFinal,
    /// A final row changes no more.
    FinalStays,
    /// Who was accepted stays accepted, and is told so.
    AcceptedStays,
    /// A report leaves the outbox by its own number only, then surely, and is published before.
    ReportsOwed,
    /// Among the living, nobody has a task that another one has.
    OneOwner,
    /// Who has lost the lease writes nothing, and whose settlement is answered as written finds it written.
    LeaseGuards,
    /// A dead epoch stays dead, and dies only after silence.
    DeadStayDead,
    /// What is sent and what may yet be sent never exceeds a limit.
    WithinLimits,
    /// Every slot is counted once, until it is used, forfeited or given back.
    SlotsCounted,
    /// The lanes know of everything that waits.
    LanesRight,
    /// A job that is to be cancelled neither waits nor goes back after its attempt.
    CancelStands,
    /// Once the faults stop, everything ends.
    Ends,
}

/// A rule, broken.
#[derive(Debug)]
struct Broken {
    rule: Rule,
    how: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.how)
    }
}

type Step<T = ()> = Result<T, Broken>;

/// Breaks a rule if what it says is not so.
fn holds(so: bool, rule: Rule, how: impl FnOnce() -> String) -> Step {
    if so {
        Ok(())
    } else {
        Err(Broken { rule, how: how() })
    }
}

/// How far an attempt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing has happened yet.
    Ready,
    /// The lease was asked about for the last time; the write comes next, or a stall.
    Checked,
    /// The server has answered, or not.
    Written,
}

/// What a worker has in hand.
struct Task {
    row: Row,
    key: Key,
    /// Whether it holds the delivery, which then is to be acknowledged or given back.
    delivery: bool,
    stage: Stage,
    slot: Option<Slot>,
    /// Parked as soon as anybody looks, for this reason.
    park: Option<WaitReason>,
    /// Cumulative results, once there are any.
    results: Option<Vec<RecipientResult>>,
    /// The connection broke after the final dot.
    unknown: bool,
    /// Acceptances of this attempt, by their place in what is known of the job.
    accepted: Vec<usize>,
    /// A settlement whose answer got lost, and what it was.
    unanswered: Option<(Settlement, Answer)>,
}

struct Worker {
    epoch: Arc<Epoch>,
    /// Silent for longer than its lease, and not yet aware of it.
    stalled: bool,
    tasks: Vec<Task>,
    /// Admissions whose answer got lost.
    asked: Vec<(Key, AdmitRequest)>,
    /// Deliveries of jobs that were in other hands.
    to_absorb: Vec<Key>,
    /// Reports it is about to publish.
    unpublished: Vec<Unpublished>,
}

impl Worker {
    fn new(epoch: Arc<Epoch>) -> Self {
        Self {
            epoch,
            stalled: false,
            tasks: Vec::new(),
            asked: Vec::new(),
            to_absorb: Vec::new(),
            unpublished: Vec::new(),
        }
    }

    /// Whether it would begin the write now.
    fn believes(&self) -> bool {
        !self.stalled && !self.epoch.died().is_cancelled()
    }
}

struct Model {
    world: World,
    random: SmallRng,
    habit: Habit,
    workers: Vec<Worker>,
    jobs: BTreeMap<Key, Knowledge>,
    /// The limit in force by key, and what was sent under it.
    limits: BTreeMap<String, (i32, i32)>,
    /// Slots under which something was sent: those are not sent under again.
    used: BTreeSet<(Key, i64)>,
    tables: Snapshot,
    /// What the statement at hand is entitled to.
    cleared: BTreeSet<(Key, i64)>,
    refunded: BTreeSet<Key>,
    trace: Vec<String>,
}

impl Model {
    fn note(&mut self, what: impl FnOnce() -> String) {
        self.trace.push(what());
    }

    fn job(&mut self, key: &Key) -> &mut Knowledge {
        self.jobs.get_mut(key).expect("only known jobs are asked for")
    }

    fn pick(&mut self, count: usize) -> usize {
        self.random.random_range(0..count)
    }

    fn chance(&mut self, one_in: usize) -> bool {
        self.pick(one_in) == 0
    }

    fn some_job(&mut self) -> Key {
        let n = self.pick(self.jobs.len());
        self.jobs.keys().nth(n).cloned().expect("there are jobs")
    }

    fn epoch(&self, w: usize) -> Arc<Epoch> {
        Arc::clone(&self.workers[w].epoch)
    }

    async fn step(&mut self) -> Step {
        let w = self.pick(self.workers.len());
        match self.pick(64) {
            0..13 => self.deliver(w).await,
            13..16 => self.ask_again(w).await,
            16..18 => self.absorb(w).await,
            18..24 => self.release(w).await,
            24..44 => self.work(w).await,
            44..49 if self.habit == Habit::Robbed => self.rob().await,
            44 => self.crash(w).await,
            45 => self.lose_a_task(w).await,
            46 => self.stall(w).await,
            47 | 63 => self.rob().await,
            48 => self.drain(w).await,
            49..51 => self.beat(w).await,
            51..54 => self.take_over(w).await,
            54..57 => self.publish(w).await,
            57 => self.sweep().await,
            58..60 => self.operate().await,
            60 => self.change_limits().await,
            61 => self.find_forgotten(w).await,
            _ => {
                let key = self.some_job();
                self.note(|| format!("publish {key} again"));
                self.job(&key).ready += 1;
                Ok(())
            }
        }
    }
}

/// Walks so many steps, then to the end. What went wrong comes with the way there.
async fn walk(world: World, seed: u64, steps: usize, habit: Habit) -> Result<(), (Broken, String)> {
    let mut workers = Vec::new();
    for _ in 0..3 {
        workers.push(Worker::new(world.epoch().await));
    }
    let mut model = Model {
        world,
        random: SmallRng::seed_from_u64(seed),
        habit,
        workers,
        jobs: jobs::all(),
        limits: BTreeMap::new(),
        used: BTreeSet::new(),
        tables: Snapshot::default(),
        cleared: BTreeSet::new(),
        refunded: BTreeSet::new(),
        trace: vec![format!("seed {seed}")],
    };
    let outcome = async {
        model.begin().await?;
        for _ in 0..steps {
            model.step().await?;
        }
        model.end().await
    }
    .await;
    outcome.map_err(|broken| (broken, model.trace.join("\n")))
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

async fn walks(seed: u64) {
    let seed = number("POSTROOM_TEST_MODEL_SEED").map_or(seed, |more| more * 100 + seed);
    let steps = number("POSTROOM_TEST_MODEL_STEPS").map_or(300, |steps| steps as usize);
    // One walk of 300 steps sees little of what happens late; many short ones see much of what happens early.
    for round in 0..steps.div_ceil(300) as u64 {
        let one = in_world(|world| async move {
            let seed = seed + round * 10_000;
            eprintln!("seed {seed}");
            if let Err((broken, trace)) = Box::pin(walk(world, seed, 300.min(steps), Habit::Good)).await {
                panic!("{trace}\n{broken}");
            }
        });
        Box::pin(one).await;
    }
}

#[tokio::test]
async fn every_job_ends_once_whatever_happens_to_its_workers_1() {
    walks(1).await;
}

#[tokio::test]
async fn every_job_ends_once_whatever_happens_to_its_workers_2() {
    walks(2).await;
}

#[tokio::test]
async fn every_job_ends_once_whatever_happens_to_its_workers_3() {
    walks(3).await;
}

/// Used by what settles: whether a settlement ends the job.
fn is_final(next: &Next) -> bool {
    matches!(next, Next::Done(_))
}
