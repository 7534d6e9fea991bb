//! Reports: published by who wrote them or by the sweeper, and cleared by their numbers.

use std::time::Duration;

use serde_json::Value;

use super::jobs::Key;
use super::mutants::Habit;
use super::{Model, Rule, Step, holds};
use crate::ledger::outbox::ReportNumber;
use crate::report::ReportMessage;

/// A report that its worker is about to publish.
pub(super) struct Unpublished {
    pub(super) key: Key,
    pub(super) report: ReportMessage,
    pub(super) number: ReportNumber,
}

impl Model {
    /// A worker publishes one of its reports; the confirm may get lost, and the clearing come late.
    pub(super) async fn publish(&mut self, w: usize) -> Step {
        if self.workers[w].unpublished.is_empty() {
            return Ok(());
        }
        let n = self.pick(self.workers[w].unpublished.len());
        let Unpublished { key, report, number } = self.workers[w].unpublished.swap_remove(n);
        let sequence = report.data.sequence;
        if self.habit == Habit::ClearsFirst {
            self.clear(&key, sequence, number).await?;
        }
        if self.chance(4) {
            return Ok(()); // It crashed over it.
        }
        self.published(&key, sequence, &serde_json::from_str(report.json()).unwrap())?;
        if !self.chance(4) {
            self.clear(&key, sequence, number).await?;
        }
        Ok(())
    }

    fn published(&mut self, key: &Key, sequence: i64, report: &Value) -> Step {
        self.note(|| format!("{key}: {} {sequence} is published", report["type"]));
        let job = self.job(key);
        if report["data"]["final"].as_bool().unwrap() {
            job.finals.insert(sequence);
        }
        let (ids, earlier) = (job.finals.len(), job.published.get(&sequence).cloned());
        job.published.insert(sequence, report.clone());
        holds(ids < 2, Rule::OneFinal, || {
            format!("{key} has {ids} final reports")
        })?;
        let same = earlier.is_none_or(|earlier| earlier["type"] == report["type"]);
        holds(same, Rule::OneFinal, || {
            format!("{key} has two reports of the number {sequence}")
        })
    }

    async fn clear(&mut self, key: &Key, sequence: i64, number: ReportNumber) -> Step {
        for _ in 0..=usize::from(self.chance(5)) {
            self.cleared.insert((key.clone(), sequence));
            self.world.ledger.clear_outbox(&[number]).await.unwrap();
            self.note(|| format!("{key}: {sequence} is cleared"));
            self.look().await?;
            holds(!self.owes(key, sequence), Rule::ReportsOwed, || {
                format!("{key} still owes {sequence}")
            })?;
        }
        Ok(())
    }

    /// Publishes what is owed for too long.
    pub(super) async fn sweep(&mut self) -> Step {
        self.world
            .run("UPDATE {s}.outbox SET due_at = clock_timestamp()")
            .await;
        let owed = self.world.ledger.owed_reports(100, Duration::ZERO).await.unwrap();
        for owed in owed {
            let key = Key {
                tenant: owed.tenant.parse().unwrap(),
                id: owed.id.parse().unwrap(),
            };
            self.published(&key, owed.sequence, &serde_json::from_str(&owed.json).unwrap())?;
            if !self.chance(8) {
                self.clear(&key, owed.sequence, owed.number).await?;
            }
        }
        Ok(())
    }
}
