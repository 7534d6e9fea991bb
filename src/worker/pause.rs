//! A worker that may begin nothing for a while gives back what it has in hand and not begun, and consumes nothing until it
//! may again. Kept, its deliveries would be nobody's until the broker's patience (`consumer_timeout`) ends the session, and
//! each such end counts against a queue's delivery limit: healthy jobs would be dead letters after a day.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::Worker;
use crate::health;

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Whether deliveries are given back instead of kept.
#[derive(Debug, Default)]
pub struct Pause(watch::Sender<bool>);

impl Pause {
    /// Whether it is a pause now.
    #[must_use]
    pub fn is_on(&self) -> bool {
        *self.0.borrow()
    }

    /// Who follows it for long keeps one of these: see [`begun`] and [`over`].
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.0.subscribe()
    }

    /// Whether this changed it.
    fn set(&self, on: bool) -> bool {
        self.0.send_if_modified(|now| std::mem::replace(now, on) != on)
    }
}

/// Waits until there is a pause.
pub async fn begun(pause: &mut watch::Receiver<bool>) {
    if pause.wait_for(|on| *on).await.is_err() {
        // The worker is gone, and with it whoever asks.
        std::future::pending::<()>().await;
    }
}

/// Waits until there is none.
pub async fn over(pause: &mut watch::Receiver<bool>) {
    if pause.wait_for(|on| !*on).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Begins and ends pauses until `stop`. One begins when nothing could be begun for a lease, and ends when it can.
pub async fn run(worker: Arc<Worker>, handle: health::Handle, stop: CancellationToken) {
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut since: Option<Instant> = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = looks.tick() => {}
        }
        let Some(why) = worker.why_not_begin() else {
            since = None;
            worker.pause.set(false);
            handle.ready();
            continue;
        };
        if since.get_or_insert_with(Instant::now).elapsed() >= worker.lease {
            handle.not_ready(format!(
                "{why}: nothing is consumed, what was not begun is left to other workers"
            ));
            worker.pause.set(true);
        }
    }
}

impl Worker {
    /// Why nothing new may be begun now, if so. Each mail adds a report; and under a lease that may be taken over, every job
    /// would come back from its last look before the mail.
    pub(super) fn why_not_begin(&self) -> Option<&'static str> {
        if self.reporter.is_full() {
            Some("the outbox is full")
        } else if self.epoch().is_fresh() {
            None
        } else {
            Some("the database has not heard of this worker for too long")
        }
    }

    /// Whether something new may be begun now.
    pub(super) fn may_begin(&self) -> bool {
        self.why_not_begin().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_waits_for_a_pause_or_its_end_is_told() {
        let pause = Pause::default();
        let mut watch = pause.watch();
        over(&mut watch).await;
        assert!(pause.set(true) && !pause.set(true));
        begun(&mut watch).await;
        assert!(pause.is_on());
        assert!(pause.set(false));
        over(&mut watch).await;
    }
}
