//! Jobs that expire while they wait for a limit, for their account or for their next attempt are told at once, not when their
//! turn comes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Worker;

/// How often they are looked for.
const OFTEN: Duration = Duration::from_secs(2);
/// How often among all; else only among those that have expired since a look found nothing more.
const SELDOM: Duration = Duration::from_mins(5);
/// How long a transaction may take in which a job begins to wait. What a takeover puts back may have expired longer ago, as its
/// worker died at the end of a long attempt: that is found among all.
const MARGIN: Duration = Duration::from_mins(2);
/// Most of them in one statement.
const MOST: usize = 128;
/// Statements in one look.
const ROUNDS: usize = 16;

/// What has been looked for.
#[derive(Debug, Default)]
struct Looked {
    /// When the last look began that found nothing more.
    last: Option<Instant>,
    /// When the last of these began that was for all.
    whole: Option<Instant>,
}

impl Looked {
    /// Within what time those have expired that are to be looked for; `None`: all.
    fn recent(&self, now: Instant) -> Option<Duration> {
        self.whole.filter(|whole| now.duration_since(*whole) < SELDOM)?;
        Some(now.duration_since(self.last?) + MARGIN)
    }

    /// Nothing more was found.
    fn note(&mut self, began: Instant, recent: Option<Duration>) {
        self.last = Some(began);
        if recent.is_none() {
            self.whole = Some(began);
        }
    }
}

/// Looks for them until `stop`.
pub(super) async fn run(worker: Arc<Worker>, stop: CancellationToken) {
    let mut ticks = interval(OFTEN);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looked = Looked::default();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => look(&worker, &stop, &mut looked).await,
        }
    }
}

async fn look(worker: &Arc<Worker>, stop: &CancellationToken, looked: &mut Looked) {
    // Counts as a job in flight: what it takes out is waited for when the worker ends.
    let _taking = worker.tasks.token();
    let began = Instant::now();
    let recent = looked.recent(began);
    for _ in 0..ROUNDS {
        let bytes = worker.releasable_bytes();
        if stop.is_cancelled() || bytes == 0 || !worker.may_begin() {
            return;
        }
        let epoch = worker.epoch();
        match worker.ledger.release_expired(&epoch, (MOST, bytes), recent).await {
            Ok(expired) if expired.is_empty() => return looked.note(began, recent),
            Ok(expired) => worker.conclude_expired(expired).await,
            Err(error) => return worker.database_trouble("expire", &error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_is_for_all_until_one_found_nothing_more_and_now_and_then() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut looked = Looked::default();
        assert_eq!(looked.recent(at(0)), None);
        assert_eq!(looked.recent(at(2)), None, "something was found");
        looked.note(at(2), None);
        for (now, last) in [(4, 2), (6, 4)] {
            let recent = looked.recent(at(now));
            assert_eq!(recent, Some(Duration::from_secs(now - last) + MARGIN));
            looked.note(at(now), recent);
        }
        assert_eq!(looked.recent(at(100)), Some(Duration::from_secs(94) + MARGIN));
        assert_eq!(looked.recent(at(302)), None);
    }
}
