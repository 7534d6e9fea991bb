//! Random walks over the whole life of jobs: several workers, a broker that redelivers, crashes, stalls, lost answers,
//! cancels. Checked: nobody sends twice without a fault to blame, one final report per job, no job and no report lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::world::{World, absorb, body, in_world, job, report, request, result, settlement, tenant, until};
use crate::id::JobId;
use crate::ledger::admit::Admitted;
use crate::ledger::outbox::ReportKey;
use crate::ledger::settle::{Next, Settled, Settlement};
use crate::ledger::{Epoch, Row, WaitReason};
use crate::level::Level;
use crate::report::RecipientStatus::{Accepted, Deferred, Refused};
use crate::report::{RecipientResult, Report, ReportType};

const DEADLINE: Duration = Duration::from_mins(25);
const JOBS: usize = 30;

/// What a worker has in hand.
struct Task {
    row: Row,
    /// Whether it holds the delivery, which then is to be acknowledged or given back.
    delivery: bool,
    /// What the server has said, once it was asked.
    sent: Option<Vec<RecipientResult>>,
}

struct Worker {
    epoch: Arc<Epoch>,
    tasks: Vec<Task>,
}

/// What the world outside knows of a job.
#[derive(Default)]
struct Job {
    /// Messages in RabbitMQ: ready for delivery.
    ready: u32,
    /// How often the server took the mail, and whether somebody crashed, stalled or was robbed meanwhile.
    taken: u32,
    excused: bool,
    /// Published final reports by event id, and whatever else was published.
    finals: BTreeSet<String>,
    published: u32,
}

struct Model {
    world: World,
    random: SmallRng,
    workers: Vec<Worker>,
    jobs: BTreeMap<JobId, Job>,
    trace: Vec<String>,
}

impl Model {
    fn note(&mut self, what: String) {
        self.trace.push(what);
    }

    fn job(&mut self, id: &JobId) -> &mut Job {
        self.jobs.get_mut(id).unwrap()
    }

    fn pick(&mut self, count: usize) -> usize {
        self.random.random_range(0..count)
    }

    fn some_job(&mut self) -> JobId {
        let n = self.pick(JOBS);
        job(&format!("{n}"))
    }

    async fn step(&mut self) {
        let w = self.pick(self.workers.len());
        match self.pick(22) {
            0..6 => self.deliver(w).await,
            6..8 => self.release(w).await,
            8..14 => self.work(w).await,
            14 if self.pick(2) == 0 => self.crash(w).await,
            14..16 => self.stall(w).await,
            16 => self.beat(w).await,
            17..19 => self.take_over().await,
            19 => self.sweep().await,
            20 => {
                let id = self.some_job();
                if self.pick(3) == 0 {
                    let answer = self.world.ledger.cancel(&tenant("acme"), &id).await.unwrap();
                    self.note(format!("cancel {id}: {answer:?}"));
                } else {
                    self.note(format!("publish {id} again"));
                    self.job(&id).ready += 1;
                }
            }
            _ => {
                let epoch = Arc::clone(&self.workers[w].epoch);
                self.world.ledger.forgotten(&epoch).await.unwrap();
                let id = self.some_job();
                self.world
                    .ledger
                    .release_by_hand(&tenant("acme"), &id)
                    .await
                    .unwrap();
            }
        }
        self.check().await;
    }

    /// Nobody else has a task of a job that a living worker holds by lease.
    async fn check(&mut self) {
        let mut owners: BTreeMap<JobId, Vec<i64>> = BTreeMap::new();
        for worker in &self.workers {
            let dead: bool = self
                .world
                .one(&format!(
                    "SELECT dead FROM {{s}}.worker WHERE epoch = {}",
                    worker.epoch.number()
                ))
                .await;
            for task in worker.tasks.iter().filter(|_| !dead) {
                owners
                    .entry(task.row.id.clone())
                    .or_default()
                    .push(task.row.lease.claim);
            }
        }
        for (id, claims) in owners {
            assert!(
                claims.len() < 2,
                "{id} leased twice by the living\n{}",
                self.trace.join("\n")
            );
        }
    }

    async fn deliver(&mut self, w: usize) {
        let ready: Vec<JobId> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.ready > 0)
            .map(|(id, _)| id.clone())
            .collect();
        if ready.is_empty() {
            return;
        }
        let id = ready[self.pick(ready.len())].clone();
        self.job(&id).ready -= 1;
        let epoch = Arc::clone(&self.workers[w].epoch);
        let request = request(&epoch, "acme", id.as_str());
        let mut answer = self.world.admit_one(request.clone()).await;
        if self.pick(5) == 0 {
            answer = self.world.admit_one(request).await;
        }
        self.note(format!("deliver {id} to {}: {answer:?}", epoch.number()));
        match answer {
            Admitted::Go(row) | Admitted::Behind(row) => {
                self.workers[w].tasks.push(Task {
                    row: *row,
                    delivery: true,
                    sent: None,
                });
            }
            Admitted::Cancelled(row) => {
                let task = Task {
                    row: *row,
                    delivery: true,
                    sent: None,
                };
                self.settle(task, finished(ReportType::Cancelled), false).await;
            }
            Admitted::InFlight | Admitted::Held => {
                let safe = self
                    .world
                    .ledger
                    .absorb(&[absorb("acme", id.as_str())])
                    .await
                    .unwrap()[0];
                if !safe {
                    self.job(&id).ready += 1;
                }
            }
            Admitted::Waiting | Admitted::Done { .. } => {}
            other => panic!("{other:?}"),
        }
    }

    async fn release(&mut self, w: usize) {
        let epoch = Arc::clone(&self.workers[w].epoch);
        let released = self.world.release(&epoch, Level::Medium, 2).await;
        let lost = self.pick(6) == 0;
        for released in released {
            self.note(format!(
                "release {} to {} (answer lost: {lost})",
                released.row.id,
                epoch.number()
            ));
            assert!(!released.body.is_empty());
            if !lost {
                self.workers[w].tasks.push(Task {
                    row: released.row,
                    delivery: false,
                    sent: None,
                });
            }
        }
    }

    /// One step of one task: the write to the server, or its settlement.
    async fn work(&mut self, w: usize) {
        if self.workers[w].tasks.is_empty() {
            return;
        }
        let n = self.pick(self.workers[w].tasks.len());
        let mut task = self.workers[w].tasks.swap_remove(n);
        if task.sent.is_none() && self.pick(4) > 0 {
            // The last question before the write; an answer of the past is what makes duplicates.
            if task.row.lease.epoch.died().is_cancelled() {
                return self.settle(task, Next::GiveBack, false).await;
            }
            let outcome = [Accepted, Deferred, Deferred, Refused][self.pick(4)];
            if outcome == Accepted {
                self.job(&task.row.id).taken += 1;
            }
            self.note(format!(
                "{} sends {}: {outcome:?}",
                task.row.lease.epoch.number(),
                task.row.id
            ));
            task.sent = Some(vec![result("a@b.example", outcome)]);
            self.workers[w].tasks.push(task);
            return;
        }
        let next = match task.sent.as_ref().map(|results| results[0].status) {
            Some(Accepted) => finished(ReportType::Sent),
            Some(Refused) => finished(ReportType::Failed),
            Some(_) => Next::Park {
                reason: WaitReason::Retry,
                delay: Duration::ZERO,
                body: Some(body()),
            },
            None if self.pick(2) == 0 => Next::GiveBack,
            None => {
                let reason = [WaitReason::Busy, WaitReason::Rate][self.pick(2)];
                Next::Park {
                    reason,
                    delay: Duration::ZERO,
                    body: Some(body()),
                }
            }
        };
        let twice = self.pick(4) == 0;
        self.settle(task, next, twice).await;
    }

    async fn settle(&mut self, task: Task, next: Next, twice: bool) {
        let Task { row, delivery, sent } = task;
        let mut written = settlement(&row, next);
        written.attempts = row.attempts + 1;
        written.recipients = sent.clone();
        written.report = match written.next {
            Next::Done(kind) => Some(report(&row, kind)),
            Next::Park { .. } if self.pick(2) == 0 => Some(report(&row, ReportType::Deferred)),
            _ => None,
        };
        let mut answer = self.world.settle_one(written.clone()).await;
        if twice {
            answer = self.world.settle_one(written.clone()).await;
        }
        if answer == Settled::Cancelled {
            written.next = finished(ReportType::Cancelled);
            written.report = Some(report(&row, ReportType::Cancelled));
            answer = self.world.settle_one(written.clone()).await;
        }
        self.note(format!(
            "{} settles {} {:?}: {answer:?}",
            row.lease.epoch.number(),
            row.id,
            written.next
        ));
        match answer {
            Settled::Written => {
                // Written is written: RabbitMQ is about to forget the body.
                let state = self.world.state("acme", row.id.as_str()).await;
                let right = match written.next {
                    Next::Done(_) => state == 3,
                    Next::GiveBack => state == 0 || state == 2,
                    _ => state == 2,
                };
                assert!(right, "{} is in state {state}\n{}", row.id, self.trace.join("\n"));
                self.written(&row, &written, delivery).await;
            }
            Settled::LeaseLost => {
                self.job(&row.id).excused = true;
                let accepted = sent.filter(|results| results[0].status == Accepted);
                if let Some(results) = accepted {
                    let merge =
                        self.world
                            .ledger
                            .merge_acceptance(&row.tenant, &row.id, &results, "<1@acme>");
                    merge.await.unwrap();
                }
                if delivery {
                    self.job(&row.id).ready += 1;
                }
            }
            Settled::Cancelled => panic!("cancelled twice"),
        }
    }

    /// Acknowledges, then publishes; a crash may come in between.
    async fn written(&mut self, row: &Row, written: &Settlement, delivery: bool) {
        let acknowledged = !matches!(written.next, Next::GiveBack) && self.pick(6) > 0;
        if delivery && !acknowledged {
            self.job(&row.id).ready += 1;
        }
        if let Some(report) = &written.report
            && self.pick(3) > 0
        {
            self.publish(&row.id, &serde_json::to_value(report).unwrap());
            if self.pick(3) > 0 {
                self.clear(report).await;
            }
        }
    }

    fn publish(&mut self, id: &JobId, report: &serde_json::Value) {
        let name = format!(
            "{} {}",
            report["data"]["sequence"],
            report["type"].as_str().unwrap()
        );
        let job = self.job(id);
        job.published += 1;
        if report["data"]["final"].as_bool().unwrap() {
            job.finals.insert(name);
        }
    }

    async fn clear(&mut self, report: &Report) {
        let (tenant, id) = (report.data.tenant.clone(), report.data.job.clone().unwrap());
        let key = ReportKey {
            tenant,
            id,
            sequence: report.data.sequence,
        };
        self.world.ledger.clear_outbox(&[key]).await.unwrap();
    }

    async fn sweep(&mut self) {
        self.world
            .run("UPDATE {s}.job SET outbox_at = clock_timestamp() WHERE outbox IS NOT NULL")
            .await;
        for owed in self.world.ledger.owed_reports(100, Duration::ZERO).await.unwrap() {
            for (sequence, text) in owed.reports {
                self.publish(&owed.id, &serde_json::from_str(&text).unwrap());
                let key = ReportKey {
                    tenant: owed.tenant.clone(),
                    id: owed.id.clone(),
                    sequence,
                };
                self.world.ledger.clear_outbox(&[key]).await.unwrap();
            }
        }
    }

    async fn crash(&mut self, w: usize) {
        let epoch = self.world.epoch().await;
        let old = std::mem::replace(
            &mut self.workers[w],
            Worker {
                epoch,
                tasks: Vec::new(),
            },
        );
        self.note(format!("{} crashes", old.epoch.number()));
        self.world.silence(&old.epoch).await;
        for task in old.tasks {
            let job = self.job(&task.row.id);
            job.excused = true;
            job.ready += u32::from(task.delivery);
        }
    }

    /// Silent for longer than its lease; it still believes in what it holds.
    async fn stall(&mut self, w: usize) {
        let worker = &self.workers[w];
        self.world.silence(&worker.epoch).await;
        let ids: Vec<JobId> = worker.tasks.iter().map(|task| task.row.id.clone()).collect();
        self.trace
            .push(format!("{} stalls with {ids:?}", self.workers[w].epoch.number()));
        for id in ids {
            self.job(&id).excused = true;
        }
    }

    async fn take_over(&mut self) {
        let heir = self.world.steady_epoch().await;
        let takeover = self.world.ledger.takeover(&heir, DEADLINE).await.unwrap();
        self.note(format!("takeover: {takeover:?}"));
        self.world.ledger.retire(&heir).await.unwrap();
        for w in 0..self.workers.len() {
            // The others go on under an epoch of which they do not know that it is dead.
            if self.pick(3) == 0 {
                self.beat(w).await;
            }
        }
    }

    /// A worker that finds its epoch dead abandons what is not yet written, and tells what is.
    async fn beat(&mut self, w: usize) {
        let epoch = Arc::clone(&self.workers[w].epoch);
        if self.world.ledger.heartbeat(&epoch).await.unwrap() == crate::ledger::lease::Beat::Dead {
            let epoch = self.world.epoch().await;
            let tasks = Vec::new();
            let old = std::mem::replace(&mut self.workers[w], Worker { epoch, tasks });
            for task in old.tasks {
                let next = match task.sent {
                    Some(ref results) if results[0].status == Accepted => finished(ReportType::Sent),
                    _ => Next::GiveBack,
                };
                self.settle(task, next, false).await;
            }
        }
    }

    /// The faults stop; everything must come to its end.
    async fn end(&mut self) {
        for w in 0..self.workers.len() {
            self.crash(w).await;
        }
        self.take_over().await;
        for round in 0.. {
            assert!(round < 200, "no end\n{}", self.trace.join("\n"));
            for id in self.jobs.keys().cloned().collect::<Vec<_>>() {
                while self.job(&id).ready > 0 {
                    self.job(&id).ready -= 1;
                    let epoch = Arc::clone(&self.workers[0].epoch);
                    match self.world.admit_one(request(&epoch, "acme", id.as_str())).await {
                        Admitted::Go(row) | Admitted::Behind(row) => {
                            self.finish(*row, ReportType::Sent).await;
                        }
                        Admitted::Cancelled(row) => self.finish(*row, ReportType::Cancelled).await,
                        Admitted::Waiting | Admitted::Done { .. } => {}
                        other => panic!("{id}: {other:?}\n{}", self.trace.join("\n")),
                    }
                }
            }
            let epoch = Arc::clone(&self.workers[0].epoch);
            for released in self.world.release(&epoch, Level::Medium, 100).await {
                self.finish(released.row, ReportType::Sent).await;
            }
            let open: i64 = self
                .world
                .one("SELECT count(*) FROM {s}.job WHERE state <> 3")
                .await;
            if open == 0 {
                break;
            }
        }
        let sweep = async || {
            self.sweep().await;
            self.world
                .one::<i64>("SELECT count(*) FROM {s}.job WHERE outbox IS NOT NULL")
                .await
                == 0
        };
        until("every report is published", sweep).await;
    }

    async fn finish(&mut self, row: Row, kind: ReportType) {
        if kind == ReportType::Sent {
            self.job(&row.id).taken += 1;
        }
        let sent = (kind == ReportType::Sent).then(|| vec![result("a@b.example", Accepted)]);
        self.settle(
            Task {
                row,
                delivery: true,
                sent,
            },
            finished(kind),
            false,
        )
        .await;
    }
}

fn finished(kind: ReportType) -> Next {
    Next::Done(kind)
}

#[tokio::test]
async fn every_job_ends_once_whatever_happens_to_its_workers() {
    for seed in 0..6 {
        in_world(|world| async move {
            let mut workers = Vec::new();
            for _ in 0..3 {
                workers.push(Worker {
                    epoch: world.epoch().await,
                    tasks: Vec::new(),
                });
            }
            let jobs = (0..JOBS)
                .map(|n| {
                    (
                        job(&format!("{n}")),
                        Job {
                            ready: 1,
                            ..Job::default()
                        },
                    )
                })
                .collect();
            let random = SmallRng::seed_from_u64(seed);
            let mut model = Model {
                world,
                random,
                workers,
                jobs,
                trace: vec![format!("seed {seed}")],
            };
            for _ in 0..200 {
                model.step().await;
            }
            model.end().await;
            let trace = model.trace.join("\n");

            for (id, job) in &model.jobs {
                assert_eq!(job.finals.len(), 1, "{id}: {:?}\n{trace}", job.finals);
                assert!(job.published > 0);
                assert!(
                    job.taken <= 1 || job.excused,
                    "{id} was sent {} times\n{trace}",
                    job.taken
                );
                let told = job
                    .finals
                    .first()
                    .is_some_and(|name| name.ends_with(ReportType::Sent.as_str()));
                let otherwise = job.taken > 0 && !told && !job.excused;
                assert!(
                    !otherwise,
                    "{id} was taken, and told otherwise: {:?}\n{trace}",
                    job.finals
                );
            }
            model.world.assert_lanes_count_right().await;
        })
        .await;
    }
}
