//! What people do meanwhile: cancel, release, change limits.

use super::{Model, Rule, Step, holds};
use crate::ledger::odd::{Cancel, Decision, Resolved};

const HOUR: i64 = 3_600_000_000;

impl Model {
    /// The limits at the start, all of them too narrow for what is to be sent.
    pub(super) async fn begin(&mut self) -> Step {
        for (key, limit) in [("acme/", 8), ("platform/main", 5), ("beta/main", 9)] {
            self.limits.insert(key.to_owned(), (limit, 0));
            self.set_limit(key, limit).await?;
        }
        Ok(())
    }

    async fn set_limit(&mut self, key: &str, limit: i32) -> Step {
        let unit = if key == "beta/main" {
            "recipients"
        } else {
            "messages"
        };
        self.world.limit(key, &[(limit, HOUR, unit)]).await;
        self.look().await
    }

    /// A limit becomes a little wider.
    pub(super) async fn change_limits(&mut self) -> Step {
        let n = self.pick(self.limits.len());
        let (key, (limit, _)) = self.limits.iter_mut().nth(n).expect("there are limits");
        *limit += 3;
        let (key, limit) = (key.clone(), *limit);
        self.note(|| format!("the limit of {key} is now {limit}"));
        self.set_limit(&key, limit).await
    }

    /// No limits any more.
    pub(super) async fn lift_limits(&mut self) -> Step {
        for key in std::mem::take(&mut self.limits).into_keys() {
            self.world.limit(&key, &[]).await;
            self.look().await?;
        }
        Ok(())
    }

    /// Somebody cancels a job, or lets it go.
    pub(super) async fn operate(&mut self) -> Step {
        // Half of the time, one that somebody is at work on.
        let w = self.pick(self.workers.len());
        let at_work = self.workers[w].tasks.last().map(|task| task.key.clone());
        let key = match at_work {
            Some(key) if self.chance(2) => key,
            _ => self.some_job(),
        };
        let before = self.tables.jobs.get(&key).map(|row| row.state);
        if self.chance(3) {
            let answer = self.world.ledger.cancel(&key.tenant, &key.id).await.unwrap();
            self.note(|| format!("cancel {key}: {answer:?}"));
            self.look().await?;
            let state = self.tables.jobs.get(&key).map(|row| row.state);
            let right = match answer {
                Cancel::Cancelled => state == Some(3),
                Cancel::InFlight => state == Some(1),
                Cancel::Noted => state == Some(5),
                Cancel::TooLate => before == Some(3),
                Cancel::Held => before == Some(4) && state == Some(4),
            };
            return holds(right, Rule::CancelStands, || {
                format!("{key} was told {answer:?} and is in state {state:?}")
            });
        }
        match before {
            Some(2) => self.let_go(&key).await,
            Some(4) => self.send_again(&key).await,
            _ => Ok(()),
        }
    }

    async fn let_go(&mut self, key: &super::Key) -> Step {
        let ledger = &self.world.ledger;
        let answer = ledger.release_by_hand(&key.tenant, &key.id).await.unwrap();
        self.note(|| format!("release {key} by hand: {answer:?}"));
        self.look().await
    }

    /// Somebody decides that a held job was not sent.
    pub(super) async fn send_again(&mut self, key: &super::Key) -> Step {
        let ledger = &self.world.ledger;
        let decided = ledger.resolve(&key.tenant, &key.id, Decision::NotSent, "ann");
        let answer = decided.await.unwrap();
        self.note(|| format!("{key} was not sent: {answer:?}"));
        if answer == Resolved::Done {
            self.job(key).let_go += 1;
        }
        self.look().await
    }
}
