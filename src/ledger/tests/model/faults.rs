//! What happens to workers.

use std::time::Duration;

use super::mutants::Habit;
use super::{Model, Rule, Stage, Step, Task, Worker, holds};
use crate::ledger::lease::Beat;
use crate::ledger::settle::Next;

use super::super::world::settlement;

const DEADLINE: Duration = Duration::from_mins(25);

impl Model {
    /// The outcome of this attempt dies with its worker.
    fn excuse(&mut self, task: &Task) {
        for place in &task.accepted {
            self.job(&task.key).acceptances[*place].excused = true;
        }
    }

    fn drop_task(&mut self, task: &Task) {
        self.excuse(task);
        self.job(&task.key).ready += u32::from(task.delivery);
    }

    /// SIGKILL: what it had in hand is at the broker again, or leased to a dead epoch.
    pub(super) async fn crash(&mut self, w: usize) -> Step {
        let epoch = self.world.epoch().await;
        let old = std::mem::replace(&mut self.workers[w], Worker::new(epoch));
        self.note(|| format!("worker {w} crashes, epoch {}", old.epoch.number()));
        self.world.silence(&old.epoch).await;
        for task in &old.tasks {
            self.drop_task(task);
        }
        for key in old.asked.iter().map(|(key, _)| key).chain(&old.to_absorb) {
            self.job(key).ready += 1;
        }
        drop(old);
        self.look().await
    }

    /// One task is gone, as if it had panicked; its worker lives on.
    pub(super) async fn lose_a_task(&mut self, w: usize) -> Step {
        if self.workers[w].tasks.is_empty() {
            return Ok(());
        }
        let n = self.pick(self.workers[w].tasks.len());
        let task = self.workers[w].tasks.swap_remove(n);
        self.note(|| format!("worker {w} loses its task {}", task.key));
        self.drop_task(&task);
        drop(task);
        self.look().await
    }

    /// Silent for longer than its lease; it still believes in what it holds.
    pub(super) async fn stall(&mut self, w: usize) -> Step {
        let epoch = self.epoch(w);
        self.note(|| format!("worker {w} stalls, epoch {}", epoch.number()));
        self.world.silence(&epoch).await;
        self.workers[w].stalled = true;
        let tasks = std::mem::take(&mut self.workers[w].tasks);
        for task in tasks.iter().filter(|task| task.stage == Stage::Written) {
            self.excuse(task);
        }
        self.workers[w].tasks = tasks;
        self.look().await
    }

    /// A stall that is long enough for others to take over what it holds, and to begin.
    pub(super) async fn rob(&mut self) -> Step {
        let busiest = (0..self.workers.len()).max_by_key(|w| self.workers[*w].tasks.len());
        let w = busiest.expect("there are workers");
        // Some of it is about to be written, or is written.
        let held: Vec<_> = self.workers[w]
            .tasks
            .iter()
            .map(|task| task.key.clone())
            .collect();
        for key in &held {
            for _ in 0..self.pick(4) {
                self.work_on(w, key).await?;
            }
        }
        self.stall(w).await?;
        let other = (w + 1) % self.workers.len();
        let keys: Vec<_> = self.workers[w]
            .tasks
            .iter()
            .map(|task| (task.key.clone(), task.delivery))
            .collect();
        self.take_over(other).await?;
        for (key, delivery) in &keys {
            // RabbitMQ has lost the connection, too.
            if *delivery {
                self.job(key).ready += 1;
                self.deliver_job(other, key.clone()).await?;
            }
        }
        self.release(other).await?;
        for (key, _) in &keys {
            // It wakes, and goes on where it was; the other one may be anywhere by then.
            for _ in 0..self.pick(12) {
                let who = if self.chance(2) { w } else { other };
                self.work_on(who, key).await?;
            }
        }
        if self.chance(2) || self.habit == Habit::Robbed {
            self.beat(w).await?;
        }
        Ok(())
    }

    /// SIGTERM: everything is settled or given back, then the epoch ends.
    pub(super) async fn drain(&mut self, w: usize) -> Step {
        self.note(|| format!("worker {w} drains"));
        while !self.workers[w].asked.is_empty() {
            self.ask_again(w).await?;
        }
        while !self.workers[w].to_absorb.is_empty() {
            self.absorb(w).await?;
        }
        while let Some(task) = self.workers[w].tasks.pop() {
            self.wind_up(w, task).await?;
        }
        let epoch = self.epoch(w);
        self.world.ledger.retire(&epoch).await.unwrap();
        let unpublished = std::mem::take(&mut self.workers[w].unpublished);
        self.workers[w] = Worker::new(self.world.epoch().await);
        // Its last reports go out after the end of its leases.
        self.workers[w].unpublished = unpublished;
        self.look().await
    }

    /// Settles what has an outcome, gives back what has none.
    async fn wind_up(&mut self, w: usize, task: Task) -> Step {
        if task.unanswered.is_some() {
            self.settle_again(w, task).await
        } else if task.stage == Stage::Written {
            self.conclude(w, task).await
        } else {
            let mut back = settlement(&task.row, Next::GiveBack);
            back.refund = true;
            self.settle(w, task, back).await
        }
    }

    /// A worker that finds its epoch dead abandons what is not yet written, and tells what is.
    pub(super) async fn beat(&mut self, w: usize) -> Step {
        let epoch = self.epoch(w);
        let beat = self.world.ledger.heartbeat(&epoch).await.unwrap();
        let dead = self.tables.dead.get(&epoch.number()) != Some(&false);
        self.note(|| format!("worker {w} beats: {beat:?}"));
        holds((beat == Beat::Dead) == dead, Rule::DeadStayDead, || {
            format!("epoch {} is dead: {dead}, told {beat:?}", epoch.number())
        })?;
        self.look().await?;
        if beat == Beat::Dead {
            return self.drain(w).await;
        }
        self.workers[w].stalled = false;
        Ok(())
    }

    /// One of the workers, if it is steady, takes over from those that are silent.
    pub(super) async fn take_over(&mut self, w: usize) -> Step {
        let heir = self.epoch(w);
        // Its heartbeats have come without a gap, for all the others know.
        let sql = format!(
            "UPDATE {{s}}.worker SET steady_since = clock_timestamp() - interval '2 hours' WHERE epoch = {}",
            heir.number()
        );
        self.world.run(&sql).await;
        let able = !self.workers[w].stalled && self.tables.dead.get(&heir.number()) == Some(&false);
        let deadline = if self.chance(3) { Duration::ZERO } else { DEADLINE };
        let before = self.tables.jobs.clone();
        let takeover = self.world.ledger.takeover(&heir, deadline).await.unwrap();
        self.note(|| format!("worker {w} takes over: {takeover:?}"));
        self.look().await?;
        for worker in self.workers.iter().filter(|worker| !worker.stalled) {
            let number = worker.epoch.number();
            let was_retired = worker.epoch.died().is_cancelled();
            let dead = self.tables.dead.get(&number) == Some(&true);
            holds(!dead || was_retired, Rule::DeadStayDead, || {
                format!("epoch {number} is alive and was declared dead")
            })?;
        }
        if !able {
            let unmoved = before
                .iter()
                .all(|(key, row)| row.state != 1 || self.tables.jobs.get(key) == Some(row));
            holds(unmoved, Rule::DeadStayDead, || {
                format!("epoch {} is silent itself and took over", heir.number())
            })?;
        }
        for (tenant, id) in takeover.uncertain {
            if self.chance(5) {
                continue; // It crashed in between; the next one finds it again.
            }
            self.world.ledger.hold_uncertain(&tenant, &id).await.unwrap();
            self.note(|| format!("{tenant}/{id} is held"));
            self.look().await?;
        }
        Ok(())
    }

    /// A heartbeat's worth of time for every worker.
    pub(super) async fn beat_all(&mut self) -> Step {
        for w in 0..self.workers.len() {
            self.beat(w).await?;
        }
        Ok(())
    }

    pub(super) fn nobody_holds(&self) -> bool {
        self.workers
            .iter()
            .all(|worker| worker.tasks.is_empty() && worker.asked.is_empty() && worker.to_absorb.is_empty())
    }
}
