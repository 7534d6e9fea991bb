//! Suspects: jobs that may crash whoever works on them. What we do with their content is watched.

use super::attempt::Pipeline;
use super::task::Task;
use super::turns::Turns;
use super::{Attempt, Verdict};
use crate::attachment::Prepared;
use crate::directory::Chosen;

/// A suspect at work.
pub(super) struct Watched<'a> {
    _alone: Option<tokio::sync::SemaphorePermit<'a>>,
}

impl Pipeline {
    /// Begins to watch what a suspect does to us: says so in the ledger, so that a crash is known to be its own. The prime
    /// suspect alone, so that it is nobody else's.
    pub(super) async fn watch(&self, task: &Task) -> Result<Option<Watched<'_>>, Verdict> {
        if !task.row.is_suspect() {
            return Ok(None);
        }
        let alone = if task.row.is_prime_suspect() {
            self.alone.acquire().await.ok()
        } else {
            None
        };
        if !self.batches.mark_suspect(&task.row, true).await {
            return Err(Verdict::GiveBack);
        }
        Ok(Some(Watched { _alone: alone }))
    }

    /// All of our own work on a suspect's content, while it is watched; what follows is a conversation like any other.
    pub(super) fn rehearse(&self, task: &Task, attempt: &mut Attempt, chosen: &Chosen, prepared: &Prepared) {
        let message_id = self.message_id(task, chosen, attempt);
        let open = Turns::of(attempt).next(attempt);
        // Its failure is told when it is composed to be sent.
        drop(Self::compose(task, chosen, prepared, &message_id, &open));
    }

    pub(super) async fn unwatch(&self, task: &Task, watched: Watched<'_>) -> Result<(), Verdict> {
        let stands = self.batches.mark_suspect(&task.row, false).await;
        drop(watched);
        if stands { Ok(()) } else { Err(Verdict::GiveBack) }
    }
}
