//! One attempt: the slot, the mark, the last question, the write, the settlement.

use std::time::Duration;

use super::jobs::{Acceptance, Key, charged};
use super::mutants::Habit;
use super::reports::Unpublished;
use super::{Broken, Model, Rule, Stage, Step, Task, holds, is_final};
use crate::ledger::WaitReason;
use crate::ledger::settle::{Answer, Next, Settled, Settlement};
use crate::ledger::slots::{SlotAnswer, SlotRequest};
use crate::report::RecipientStatus::{Accepted, Deferred, Refused};
use crate::report::{RecipientResult, ReportType};

use super::super::world::{report, settlement};

/// The lease of a task as the tables have it.
fn lease(task: &Task) -> (i64, i64) {
    (task.row.lease.epoch.number(), task.row.lease.claim)
}

/// Who got what.
fn brief(results: &[RecipientResult]) -> String {
    let words = results
        .iter()
        .map(|result| format!("{}: {:?}", result.address, result.status));
    words.collect::<Vec<_>>().join(", ")
}

impl Model {
    /// One step of one task of this worker.
    pub(super) async fn work(&mut self, w: usize) -> Step {
        if self.workers[w].tasks.is_empty() {
            return Ok(());
        }
        let n = self.pick(self.workers[w].tasks.len());
        self.work_at(w, n).await
    }

    /// The same for its task of this job, if it has one.
    pub(super) async fn work_on(&mut self, w: usize, key: &Key) -> Step {
        let place = self.workers[w].tasks.iter().position(|task| task.key == *key);
        match place {
            Some(n) => self.work_at(w, n).await,
            None => Ok(()),
        }
    }

    async fn work_at(&mut self, w: usize, n: usize) -> Step {
        let task = self.workers[w].tasks.swap_remove(n);
        if task.unanswered.is_some() {
            return self.settle_again(w, task).await;
        }
        match task.stage {
            Stage::Ready if task.park.is_some() || self.chance(6) => self.put_off(w, task).await,
            Stage::Ready => self.prepare(w, task).await,
            Stage::Checked => self.write(w, task).await,
            Stage::Written => self.conclude(w, task).await,
        }
    }

    /// Takes the slot, marks, and asks for the last time whether the lease stands.
    async fn prepare(&mut self, w: usize, mut task: Task) -> Step {
        if !task.slot.is_some_and(|slot| slot.is_valid()) {
            return self.take_slot(w, task).await;
        }
        if self.jobs[&task.key].hold && self.habit != Habit::NeverMarks {
            let stands = self.mark(w, &task).await?;
            if !stands {
                return self.put_off(w, task).await;
            }
        }
        if !self.workers[w].believes() && self.habit != Habit::NeverAsks {
            return self.put_off(w, task).await;
        }
        self.note(|| format!("worker {w} is about to write {}", task.key));
        task.stage = Stage::Checked;
        self.workers[w].tasks.push(task);
        self.look().await
    }

    async fn mark(&mut self, w: usize, task: &Task) -> Step<bool> {
        let mine = self.leases(task);
        let mut stands = self
            .world
            .ledger
            .mark_data(std::slice::from_ref(&task.row))
            .await
            .unwrap()[0];
        if self.chance(4) {
            stands = self
                .world
                .ledger
                .mark_data(std::slice::from_ref(&task.row))
                .await
                .unwrap()[0];
        }
        self.note(|| format!("worker {w} marks {}: {stands}", task.key));
        holds(stands == mine, Rule::LeaseGuards, || {
            format!("{} was marked: {stands}, leased: {mine}", task.key)
        })?;
        Ok(stands)
    }

    /// Whether the tables say that the job is leased by this very claim.
    fn leases(&self, task: &Task) -> bool {
        let lease = lease(task);
        let row = self.tables.jobs.get(&task.key);
        row.is_some_and(|row| row.state == 1 && row.lease == lease)
    }

    async fn take_slot(&mut self, w: usize, mut task: Task) -> Step {
        let request = SlotRequest {
            tenant: task.key.tenant.clone(),
            id: task.key.id.clone(),
            lease: task.row.lease.clone(),
            account: self.jobs[&task.key].account.clone(),
            recipients: self.jobs[&task.key].recipients,
            keep: false,
        };
        let rounds = 1 + usize::from(self.chance(5));
        let key = task.key.clone();
        for round in 1..=rounds {
            if self.leases(&task) {
                self.refunded.insert(key.clone());
            }
            let answer = self
                .world
                .ledger
                .take_slots(std::slice::from_ref(&request))
                .await
                .unwrap()[0];
            self.note(|| format!("worker {w} asks for a slot for {key}: {answer:?}"));
            if round < rounds {
                self.workers[w].tasks.push(task);
                self.look().await?;
                task = self.workers[w].tasks.pop().expect("it was just put there");
                continue;
            }
            match answer {
                SlotAnswer::Granted(slot) => task.slot = Some(slot),
                SlotAnswer::Denied(_) => task.park = Some(WaitReason::Rate),
                // To be found out by the settlement.
                SlotAnswer::LeaseLost => task.park = Some(WaitReason::Busy),
            }
            break;
        }
        self.workers[w].tasks.push(task);
        self.look().await
    }

    /// The write, late if the worker has stalled since it asked.
    async fn write(&mut self, w: usize, mut task: Task) -> Step {
        let late = !self.workers[w].believes() && self.habit != Habit::NeverAsks;
        self.charge(&task);
        let job = self.jobs[&task.key].clone();
        task.unknown = self.chance(8);
        let mut results: Vec<RecipientResult> = if task.row.recipients.is_empty() {
            job.addresses()
                .iter()
                .map(|address| RecipientResult::pending(address))
                .collect()
        } else {
            task.row.recipients.clone()
        };
        for result in results.iter_mut().filter(|result| result.is_open()) {
            let outcome = [Accepted, Accepted, Deferred, Refused][self.pick(4)];
            if outcome == Accepted {
                let place = self.accept(&task, &result.address, late)?;
                task.accepted.push(place);
            }
            if !task.unknown {
                result.status = outcome;
            }
        }
        self.note(|| {
            let told = if task.unknown { "hears nothing" } else { "hears" };
            format!(
                "worker {w} writes {} (late: {late}, under {:?}) and {told}: {}",
                task.key,
                lease(&task),
                brief(&results)
            )
        });
        task.results = Some(results);
        task.stage = Stage::Written;
        self.workers[w].tasks.push(task);
        self.look().await
    }

    /// A server takes the mail for a recipient. Nobody may have got it before without an excuse.
    fn accept(&mut self, task: &Task, address: &str, late: bool) -> Step<usize> {
        let job = self.job(&task.key);
        let (hold, let_go) = (job.hold, job.let_go);
        let unexcused = job.acceptances.iter().find(|earlier| {
            let excused = if hold {
                let_go > earlier.let_go
            } else {
                late || earlier.excused
            };
            earlier.address == address && !excused
        });
        if let Some(earlier) = unexcused {
            return Err(Broken {
                rule: Rule::SentOnce,
                how: format!("{} goes to {address} again: {earlier:?}", task.key),
            });
        }
        job.acceptances.push(Acceptance {
            address: address.to_owned(),
            excused: late || task.unknown,
            let_go,
        });
        Ok(job.acceptances.len() - 1)
    }

    fn charge(&mut self, task: &Task) {
        let slot = task.slot.expect("a slot comes before the write");
        if slot.until.is_none() {
            return;
        }
        if self.leases(task)
            && let Some((at, _)) = self.tables.jobs[&task.key].slot
        {
            self.used.insert((task.key.clone(), at));
        }
        let account = self.jobs[&task.key].account.as_str().to_owned();
        for key in charged(&task.key.tenant, &account) {
            let recipients = key == "beta/main";
            if let Some((_, sent)) = self.limits.get_mut(&key) {
                *sent += if recipients { slot.recipients as i32 } else { 1 };
            }
        }
    }

    /// Back where it came from, or into the waiting room, without an attempt: its slot goes back.
    async fn put_off(&mut self, w: usize, task: Task) -> Step {
        let next = match task.park {
            Some(WaitReason::Rate) => self.park(&task, WaitReason::Rate, Duration::from_mins(1)),
            None if self.chance(2) => Next::GiveBack,
            _ => {
                let (reason, delay) = self.waits_for();
                self.park(&task, reason, delay)
            }
        };
        let mut written = settlement(&task.row, next);
        written.refund = true;
        self.settle(w, task, written).await
    }

    pub(super) fn park(&self, task: &Task, reason: WaitReason, delay: Duration) -> Next {
        let body = task.delivery.then(|| self.jobs[&task.key].body());
        Next::Park { reason, delay, body }
    }

    /// What follows from what the server said.
    pub(super) async fn conclude(&mut self, w: usize, task: Task) -> Step {
        let results = task.results.clone().unwrap_or_default();
        let open = results.iter().any(RecipientResult::is_open);
        let hold = self.jobs[&task.key].hold && self.habit != Habit::NeverMarks;
        let next = if task.unknown && hold {
            let body = task.delivery.then(|| self.jobs[&task.key].body());
            Next::Hold { body }
        } else if open {
            self.park(&task, WaitReason::Retry, Duration::ZERO)
        } else if results.iter().any(|result| result.status == Accepted) {
            Next::Done(ReportType::Sent)
        } else {
            Next::Done(ReportType::Failed)
        };
        let written = settlement(&task.row, next);
        self.settle(w, task, written).await
    }

    /// Ends a job without an attempt.
    pub(super) async fn finish(&mut self, w: usize, task: Task, kind: ReportType) -> Step {
        let known = task.results.as_ref().unwrap_or(&task.row.recipients);
        let accepted = known.iter().any(|result| result.status == Accepted);
        let kind = if accepted { ReportType::Sent } else { kind };
        let written = settlement(&task.row, Next::Done(kind));
        self.settle(w, task, written).await
    }

    /// Settles; the answer may get lost, and the statement be repeated later.
    pub(super) async fn settle(&mut self, w: usize, mut task: Task, mut written: Settlement) -> Step {
        written.attempts = task.row.attempts + u32::from(task.stage == Stage::Written);
        written.recipients = task.results.clone();
        let kind = match written.next {
            Next::Done(kind) => Some(kind),
            Next::Park { .. } => self.chance(2).then_some(ReportType::Deferred),
            Next::Hold { .. } => Some(ReportType::Uncertain),
            Next::GiveBack => None,
        };
        written.report = kind.map(|kind| {
            let mut report = report(&task.row, kind);
            report.data.recipients = task
                .results
                .clone()
                .unwrap_or_else(|| task.row.recipients.clone());
            report.into()
        });
        if self.habit == Habit::AcksFirst && task.delivery {
            task.delivery = false;
            self.workers[w].tasks.push(task);
            self.look().await?;
            task = self.workers[w].tasks.pop().expect("it was just put there");
        }
        if self.chance(6) {
            let answer = self.write_settlement(w, &mut task, &written).await?;
            self.note(|| "… but the answer gets lost".to_owned());
            task.unanswered = Some((written, answer));
            self.workers[w].tasks.push(task);
            return Ok(());
        }
        let answer = self.write_settlement(w, &mut task, &written).await?;
        Box::pin(self.settled(w, task, written, answer)).await
    }

    /// Repeats a settlement whose answer got lost.
    pub(super) async fn settle_again(&mut self, w: usize, mut task: Task) -> Step {
        let (written, before) = task.unanswered.take().expect("asked for tasks that have one");
        let answer = self.write_settlement(w, &mut task, &written).await?;
        holds(
            before.settled == Settled::Written
                || answer.settled != Settled::Written
                || self.leased_before(&task),
            Rule::LeaseGuards,
            || format!("{} was answered {before:?}, then {answer:?}", task.key),
        )?;
        self.settled(w, task, written, answer).await
    }

    /// A settlement that was refused for a cancel may be written later: a release by hand overrules the cancel.
    fn leased_before(&self, task: &Task) -> bool {
        let lease = lease(task);
        self.tables
            .jobs
            .get(&task.key)
            .is_some_and(|row| row.lease == lease)
    }

    /// The statement, and whether it did what it says.
    async fn write_settlement(&mut self, w: usize, task: &mut Task, written: &Settlement) -> Step<Answer> {
        let mine = self.leases(task);
        let before = self.tables.jobs.get(&task.key).cloned();
        if mine && written.refund {
            self.refunded.insert(task.key.clone());
        }
        let answers = self.world.ledger.settle(std::slice::from_ref(written)).await;
        let answer = answers.unwrap().remove(0);
        self.note(|| format!("worker {w} settles {} {:?}: {answer:?}", task.key, written.next));
        // Until the answer is acted upon, the delivery is in hand.
        let held = u32::from(task.delivery);
        self.job(&task.key).ready += held;
        self.look().await?;
        self.job(&task.key).ready -= held;
        let row = self.tables.jobs.get(&task.key).cloned();
        if !mine {
            holds(row == before, Rule::LeaseGuards, || {
                format!("{} was {before:?} and is {row:?}", task.key)
            })?;
        }
        if answer.settled == Settled::Written && mine {
            let row = row.as_ref().expect("a row that was settled is there");
            let right = match written.next {
                Next::Done(_) => row.state == 3,
                Next::Park { .. } => row.state == 2,
                Next::GiveBack => row.state == if row.has_body { 2 } else { 0 },
                Next::Hold { .. } => row.state == 4,
            };
            holds(right, Rule::LeaseGuards, || {
                format!("{} is {row:?} after {written:?}", task.key)
            })?;
            let lost = before.is_some_and(|before| before.cancel)
                && !is_final(&written.next)
                && !matches!(written.next, Next::Hold { .. });
            holds(!lost, Rule::CancelStands, || {
                format!("{} was to be cancelled", task.key)
            })?;
            if let Some(report) = &written.report {
                let sequence = report.data.sequence;
                holds(self.owes(&task.key, sequence), Rule::ReportsOwed, || {
                    format!("{} does not owe {sequence}", task.key)
                })?;
            }
            if let Some(results) = &written.recipients {
                let told = results.iter().filter(|result| result.status == Accepted);
                let missing: Vec<_> = told.filter(|r| !row.accepted.contains(&*r.address)).collect();
                holds(missing.is_empty(), Rule::AcceptedStays, || {
                    format!("{} forgot {missing:?}", task.key)
                })?;
            }
            // Committed: from now on nothing excuses a second write.
            task.accepted.clear();
        }
        Ok(answer)
    }

    /// Acts upon the answer.
    async fn settled(&mut self, w: usize, mut task: Task, written: Settlement, answer: Answer) -> Step {
        match answer.settled {
            Settled::Written => {
                let keeps = !matches!(written.next, Next::GiveBack) && !self.chance(6);
                if task.delivery && !keeps {
                    self.job(&task.key).ready += 1;
                }
                if let (Some(report), Some(number)) = (written.report, answer.report) {
                    let key = task.key.clone();
                    self.workers[w]
                        .unpublished
                        .push(Unpublished { key, report, number });
                }
                self.look().await
            }
            Settled::LeaseLost => {
                if task.delivery {
                    self.job(&task.key).ready += 1;
                }
                self.merge(w, &task).await
            }
            Settled::Cancelled => {
                task.slot = None;
                let kind = ReportType::Cancelled;
                let was_cancelled = matches!(written.next, Next::Done(ReportType::Cancelled));
                assert!(!was_cancelled, "cancelled twice");
                Box::pin(self.finish(w, task, kind)).await
            }
        }
    }

    /// The lease is lost, but what the server took is true.
    async fn merge(&mut self, w: usize, task: &Task) -> Step {
        let results = task.results.clone().unwrap_or_default();
        if !results.iter().any(|result| result.status == Accepted) {
            return self.look().await;
        }
        // Whoever has it now does not know, and may not find out in time.
        let robbed = self.tables.jobs.get(&task.key).is_some_and(|row| row.state == 1);
        if robbed {
            for worker in &self.workers {
                for other in worker.tasks.iter().filter(|other| other.key == task.key) {
                    let job = self
                        .jobs
                        .get_mut(&task.key)
                        .expect("only known jobs are asked for");
                    for place in &other.accepted {
                        job.acceptances[*place].excused = true;
                    }
                }
            }
        }
        for _ in 0..=usize::from(self.chance(4)) {
            let ledger = &self.world.ledger;
            let attempts = task.row.attempts + 1;
            let (tenant, id) = (&task.key.tenant, &task.key.id);
            let merge = ledger.merge_acceptance(tenant, id, &results, "<1@acme>", attempts);
            let was_final = merge.await.unwrap();
            self.note(|| format!("worker {w} merges {}, final already: {was_final}", task.key));
            self.look().await?;
        }
        Ok(())
    }
}
