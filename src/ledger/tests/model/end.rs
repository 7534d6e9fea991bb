//! The faults stop; everything must come to its end.

use std::time::{Duration, Instant};

use super::jobs::Key;
use super::{Model, Rule, Step, holds};
use crate::report::RecipientStatus;

use super::super::world::PATIENCE;

impl Model {
    /// Drives everything to its end and judges it.
    pub(super) async fn end(&mut self) -> Step {
        self.note(|| "the end begins".to_owned());
        self.lift_limits().await?;
        for w in 0..self.workers.len() {
            self.crash(w).await?;
        }
        let begun = Instant::now();
        while !self.is_over() {
            holds(begun.elapsed() < PATIENCE, Rule::Ends, || self.what_is_left())?;
            self.round().await?;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for key in self.jobs.keys().cloned().collect::<Vec<_>>() {
            self.judge(&key)?;
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        let all_final = self
            .jobs
            .iter()
            .all(|(key, job)| job.ready == 0 && self.tables.jobs.get(key).is_some_and(|row| row.state == 3));
        all_final && self.nobody_holds() && self.nothing_is_owed()
    }

    /// Everybody does everything once.
    async fn round(&mut self) -> Step {
        self.take_over(0).await?;
        self.beat_all().await?;
        for w in 0..self.workers.len() {
            self.find_forgotten(w).await?;
            self.deliver(w).await?;
            self.release(w).await?;
            while !self.workers[w].asked.is_empty() {
                self.ask_again(w).await?;
            }
            while !self.workers[w].to_absorb.is_empty() {
                self.absorb(w).await?;
            }
            for _ in 0..self.workers[w].tasks.len() * 4 {
                self.work(w).await?;
            }
        }
        let held = self.tables.jobs.iter().filter(|(_, row)| row.state == 4);
        for key in held.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.send_again(&key).await?;
        }
        self.sweep().await
    }

    fn what_is_left(&self) -> String {
        let left = self.jobs.iter().filter_map(|(key, job)| {
            let row = self.tables.jobs.get(key);
            let over = job.ready == 0 && row.is_some_and(|row| row.state == 3);
            (!over).then(|| format!("{key}: {} ready, {row:?}", job.ready))
        });
        left.collect::<Vec<_>>().join("\n")
    }

    /// One final report, published, that tells of everybody who is known to have got it.
    fn judge(&self, key: &Key) -> Step {
        let job = &self.jobs[key];
        let unpaid: Vec<_> = job
            .owed
            .iter()
            .filter(|n| !job.published.contains_key(n))
            .collect();
        holds(unpaid.is_empty(), Rule::ReportsOwed, || {
            format!("{key}: {unpaid:?} were never published")
        })?;
        let told: Vec<_> = job
            .published
            .values()
            .filter(|report| report["data"]["final"].as_bool().unwrap_or_default())
            .collect();
        holds(
            told.len() == 1 && job.finals.len() == 1,
            Rule::ReportsOwed,
            || format!("{key}: {} final reports were published", told.len()),
        )?;
        let recipients = told[0]["data"]["recipients"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        for acceptance in job.acceptances.iter().filter(|acceptance| !acceptance.excused) {
            let told = recipients.iter().any(|recipient| {
                recipient["address"] == acceptance.address.as_str()
                    && recipient["status"] == serde_json::to_value(RecipientStatus::Accepted).unwrap()
            });
            holds(told, Rule::AcceptedStays, || {
                format!("{key} was taken for {} and told otherwise", acceptance.address)
            })?;
        }
        Ok(())
    }
}
