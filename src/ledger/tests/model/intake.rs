//! Deliveries and releases: how a worker comes by its tasks.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::jobs::Key;
use super::mutants::Habit;
use super::reports::Unpublished;
use super::{Model, Rule, Stage, Step, Task, holds};
use crate::ledger::admit::{Absorb, AdmitRequest, Admitted, Want};
use crate::ledger::park::{Birth, ParkRequest, Parked};
use crate::ledger::{Row, WaitReason};
use crate::level::Level;
use crate::report::{ReportMessage, ReportType};

use super::super::world::{all, report, row_of};

/// An answer, without what is known anyway.
fn brief(answer: &Admitted) -> String {
    match answer {
        Admitted::Go(row) => format!("go under {}, slot {:?}", row.lease.claim, row.slot.is_some()),
        Admitted::Behind(row) => format!("go behind others under {}", row.lease.claim),
        Admitted::Wait { row, reason, .. } => format!("wait under {}, {reason:?}", row.lease.claim),
        Admitted::Cancelled(row) => format!("cancelled, under {}", row.lease.claim),
        other => format!("{other:?}"),
    }
}

impl Task {
    pub(super) fn new(row: Row, delivery: bool) -> Self {
        let key = Key {
            tenant: row.tenant.clone(),
            id: row.id.clone(),
        };
        let slot = row.slot;
        Self {
            row,
            key,
            delivery,
            stage: Stage::Ready,
            slot,
            park: None,
            results: None,
            unknown: false,
            accepted: Vec::new(),
            unanswered: None,
        }
    }
}

impl Model {
    /// A delivery arrives; the answer of its admission may get lost.
    pub(super) async fn deliver(&mut self, w: usize) -> Step {
        let ready: Vec<Key> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.ready > 0)
            .map(|(key, _)| key.clone())
            .collect();
        if ready.is_empty() {
            return Ok(());
        }
        let key = ready[self.pick(ready.len())].clone();
        self.deliver_job(w, key).await
    }

    pub(super) async fn deliver_job(&mut self, w: usize, key: Key) -> Step {
        self.job(&key).ready -= 1;
        let at_once = match self.habit {
            Habit::Good => self.chance(6),
            habit => habit == Habit::Parks,
        };
        if at_once && self.park_at_once(w, &key).await? {
            return Ok(());
        }
        let want = [Want::Slot, Want::Slot, Want::Claim, Want::Park][self.pick(4)];
        let request = self.request(w, &key, want);
        if self.chance(6) {
            let answer = self.world.admit_one(request.clone()).await;
            self.note(|| {
                format!(
                    "worker {w} asks for {key}: {}, but the answer gets lost",
                    brief(&answer)
                )
            });
            self.workers[w].asked.push((key, request));
            return self.look().await;
        }
        self.admit(w, key, request).await
    }

    /// A delivery is to be sent in a moment; the answer may get lost, the worker die over it. `false`: it is to be admitted.
    async fn park_at_once(&mut self, w: usize, key: &Key) -> Step<bool> {
        let request = self.request(w, key, Want::Park);
        let now = Timestamp::now();
        let birth = Birth::new(self.epoch(w), 1, now);
        let told = self.chance(2).then(|| {
            let row = row_of(&request, birth.born);
            ReportMessage::from(report(&row, ReportType::Deferred))
        });
        let body = self.jobs[key].body();
        let later = ParkRequest {
            tenant: &key.tenant,
            id: &key.id,
            level: request.level,
            account: &request.account,
            digest: &request.digest,
            send_at: now + SignedDuration::from_millis(30),
            expires_at: None,
            batch: None,
            body: &body,
            report: told.as_ref(),
        };
        let mut parked = self.world.ledger.park(&birth, &[later]).await.unwrap()[0];
        if self.chance(4) {
            parked = self.world.ledger.park(&birth, &[later]).await.unwrap()[0];
        }
        let dies = parked.is_some() && self.chance(6);
        self.note(|| format!("worker {w} parks {key}: {parked:?} (and dies: {dies})"));
        if dies {
            self.job(key).ready += 1;
        } else if let (Some(number), Some(report)) = (parked.and_then(|parked| parked.report), told) {
            let key = key.clone();
            self.workers[w]
                .unpublished
                .push(Unpublished { key, report, number });
        }
        let Some(Parked { report }) = parked else {
            return Ok(false);
        };
        self.look().await?;
        let owes = report.is_none() || self.owes(key, birth.born + 1);
        holds(owes, Rule::ReportsOwed, || {
            format!("{key} waits and owes no report")
        })?;
        Ok(true)
    }

    /// Repeats an admission whose answer got lost.
    pub(super) async fn ask_again(&mut self, w: usize) -> Step {
        if self.workers[w].asked.is_empty() {
            return Ok(());
        }
        let n = self.pick(self.workers[w].asked.len());
        let (key, request) = self.workers[w].asked.swap_remove(n);
        self.admit(w, key, request).await
    }

    fn request(&self, w: usize, key: &Key, want: Want) -> AdmitRequest {
        let job = &self.jobs[key];
        AdmitRequest {
            tenant: key.tenant.clone(),
            id: key.id.clone(),
            level: job.level,
            account: job.account.clone(),
            lease: self.workers[w].epoch.claim(),
            recipients: job.recipients,
            digest: [7; 32],
            send_at: None,
            expires_at: None,
            batch: None,
            want,
            detour: false,
            replay: false,
        }
    }

    async fn admit(&mut self, w: usize, key: Key, request: AdmitRequest) -> Step {
        let answer = self.world.admit_one(request).await;
        self.note(|| format!("worker {w} admits {key}: {}", brief(&answer)));
        match answer {
            Admitted::Go(row) | Admitted::Behind(row) => self.workers[w].tasks.push(Task::new(*row, true)),
            Admitted::Wait { row, reason, .. } => {
                let mut task = Task::new(*row, true);
                task.park = Some(reason);
                self.workers[w].tasks.push(task);
            }
            Admitted::Cancelled(row) => {
                self.workers[w].tasks.push(Task::new(*row, true));
                self.look().await?;
                let task = self.workers[w].tasks.pop().expect("it was just put there");
                return self.finish(w, task, ReportType::Cancelled).await;
            }
            Admitted::InFlight | Admitted::Held => self.workers[w].to_absorb.push(key),
            Admitted::Waiting | Admitted::Done => {}
            other => panic!("{other:?}"),
        }
        self.look().await
    }

    /// A job is in other hands, or was a moment ago: its body is stored, and the broker may forget it.
    pub(super) async fn absorb(&mut self, w: usize) -> Step {
        if self.workers[w].to_absorb.is_empty() {
            return Ok(());
        }
        let n = self.pick(self.workers[w].to_absorb.len());
        let key = self.workers[w].to_absorb.swap_remove(n);
        let body = self.jobs[&key].body();
        let absorb = Absorb {
            tenant: key.tenant.clone(),
            id: key.id.clone(),
            body: body.bytes,
            properties: body.properties,
        };
        let mut safe = self
            .world
            .ledger
            .absorb(std::slice::from_ref(&absorb))
            .await
            .unwrap()[0];
        if self.chance(4) {
            safe = self.world.ledger.absorb(&[absorb]).await.unwrap()[0];
        }
        self.note(|| format!("worker {w} absorbs {key}: {safe}"));
        if !safe || self.chance(6) {
            self.job(&key).ready += 1;
        }
        self.look().await
    }

    /// What waits is released; the answer may get lost for good.
    pub(super) async fn release(&mut self, w: usize) -> Step {
        let level = [Level::Medium, Level::Low][self.pick(2)];
        let mut request = all(level, 2);
        if self.chance(4) {
            let key = self.some_job();
            request.only = Some(self.jobs[&key].account.clone());
        }
        let epoch = self.epoch(w);
        let released = self.world.ledger.release(&epoch, &request).await.unwrap();
        let lost = self.chance(8);
        for released in released {
            self.note(|| {
                let (key, claim) = (&released.row.id, released.row.lease.claim);
                format!(
                    "worker {w} releases {}/{key} under {claim} (lost: {lost})",
                    released.row.tenant
                )
            });
            assert!(!released.body.is_empty());
            if !lost {
                self.workers[w].tasks.push(Task::new(released.row, false));
            }
        }
        self.look().await
    }

    /// Leases of a living worker that nobody works on.
    pub(super) async fn find_forgotten(&mut self, w: usize) -> Step {
        let epoch = Arc::clone(&self.workers[w].epoch);
        let found = self.world.ledger.forgotten(&epoch).await.unwrap();
        self.note(|| format!("worker {w} finds {found} forgotten"));
        self.look().await
    }

    /// What becomes of a task that must not be sent now.
    pub(super) fn waits_for(&mut self) -> (WaitReason, Duration) {
        let reasons = [
            (WaitReason::Busy, Duration::ZERO),
            (WaitReason::Schedule, Duration::from_millis(20)),
        ];
        reasons[self.pick(2)]
    }
}
