//! The dispatcher: leases due jobs out of the waiting room while this worker has permits and connections for them.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Worker;
use super::permits::Lent;
use crate::db::DbError;
use crate::ledger::release::ReleaseRequest;
use crate::level::Level;
use crate::memory::{FACTOR, Share};

/// Most bytes of bodies taken out in one statement.
const RELEASE_BYTES: u64 = 8 << 20;
/// How often the waiting room is looked at.
const TICK: Duration = Duration::from_millis(200);
/// From a look that stopped for want of permits or memory to the next, unless many permits have become free before.
const PACE: Duration = Duration::from_millis(20);
/// Most jobs taken out in one statement.
const MOST: usize = 128;

/// Runs until `stop`.
pub async fn run(worker: Arc<Worker>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut room, mut permits) = (worker.load.watch(), worker.permits.watch());
    // Something is due: worth another look as soon as an account has room for more.
    let mut is_due = false;
    let mut short = Vec::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
            () = worker.nudge.notified() => {}
            Ok(()) = room.changed(), if is_due => {}
            Ok(()) = permits.changed(), if !short.is_empty() => {}
            () = tokio::time::sleep(PACE), if !short.is_empty() => {
                if !short.iter().any(|level| worker.can_take(*level)) {
                    continue;
                }
            }
        }
        loop {
            // Counts as a job in flight: what it takes out is waited for when the worker ends.
            let _taking = worker.tasks.token();
            if stop.is_cancelled() {
                return;
            }
            if !worker.may_begin() {
                break;
            }
            match turn(&worker).await {
                Ok(seen) => {
                    (is_due, short) = (seen.is_due, seen.short);
                    if seen.taken == 0 {
                        break;
                    }
                }
                Err(error) => {
                    worker.database_trouble("release", &error);
                    tokio::time::sleep(TICK * 5).await;
                    break;
                }
            }
        }
    }
}

/// What one look found.
struct Seen {
    is_due: bool,
    /// Levels that have something due, and neither permit nor memory for it.
    short: Vec<Level>,
    /// Jobs taken out.
    taken: usize,
}

/// One look at every level that has something due.
async fn turn(worker: &Arc<Worker>) -> Result<Seen, DbError> {
    let due = worker.ledger.due_levels().await?;
    let mut seen = Seen {
        is_due: !due.is_empty(),
        short: Vec::new(),
        taken: 0,
    };
    for level in worker
        .permits
        .order()
        .into_iter()
        .filter(|level| due.contains(level))
    {
        match level_turn(worker, level).await? {
            Some(taken) => seen.taken += taken,
            None => seen.short.push(level),
        }
    }
    Ok(seen)
}

impl Worker {
    /// Bytes of bodies that one statement may take out of the waiting room now: as many as memory is free for. None while
    /// what was taken out before still waits for its share.
    pub(super) fn releasable_bytes(&self) -> u64 {
        (self.memory.free(Share::Room) / FACTOR).min(RELEASE_BYTES)
    }

    fn can_take(&self, level: Level) -> bool {
        self.permits.available(level) > 0 && self.releasable_bytes() > 0
    }
}

/// How many were taken out; `None`: there is neither permit nor memory for any.
async fn level_turn(worker: &Arc<Worker>, level: Level) -> Result<Option<usize>, DbError> {
    let most_bytes = worker.releasable_bytes();
    if most_bytes == 0 {
        return Ok(None);
    }
    // Permits first: what is leased without one would only sit here. Half of those left at a time: an account that is
    // full after this is passed over next time, and must not have taken the permits of all others by then.
    let most = worker.permits.available(level).div_ceil(2).min(MOST);
    let mut permits: Vec<Lent> = (0..most).map_while(|_| worker.permits.lend(level)).collect();
    if permits.is_empty() {
        return Ok(None);
    }
    let request = ReleaseRequest {
        level,
        most: permits.len(),
        most_bytes,
        exclude: worker.load.full_accounts(),
        only: None,
        max_age: worker.retry.max_age,
    };
    let released = worker.release(&request).await?;
    let taken = released.len();
    for job in released {
        let permit = permits.pop().map(Lent::keep);
        let in_hand = worker.load.enter(&job.row.account, worker.pool_size.min(job.cap));
        worker.run_released(job, permit.map(|permit| (permit, in_hand)));
    }
    Ok(Some(taken))
}
