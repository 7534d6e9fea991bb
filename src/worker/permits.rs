//! Permits to send. Each level has some of its own, so that `immediate` never waits for bulk and bulk never starves;
//! the rest is shared, most urgent first, but every eighth shared grant goes to the least urgent that asks.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Notify, watch};

use crate::level::Level;
use crate::telemetry::metrics::Metrics;

/// One in this many shared grants goes bottom up.
const AGEING: u64 = 8;

/// The permits of one worker.
pub struct Permits {
    state: Mutex<State>,
    freed: Notify,
    /// Changes when half of what a level can have has become free.
    plenty: watch::Sender<()>,
    metrics: Arc<Metrics>,
}

struct State {
    reserved: [usize; 4],
    shared: usize,
    used: [usize; 4],
    shared_used: usize,
    shared_grants: u64,
}

impl fmt::Debug for Permits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Permits")
            .field("used", &state.used)
            .field("shared_used", &state.shared_used)
            .finish()
    }
}

impl Permits {
    /// Divides `total` (at least 8 are made) between the levels: a quarter, an eighth, a sixteenth and a sixteenth
    /// reserved, at least one each; the rest shared.
    #[must_use]
    pub fn new(total: usize, metrics: Arc<Metrics>) -> Arc<Self> {
        let total = total.max(8);
        let reserved = [
            total / 4,
            (total / 8).max(1),
            (total / 16).max(1),
            (total / 16).max(1),
        ];
        let shared = total - reserved.iter().sum::<usize>();
        let state = State {
            reserved,
            shared,
            used: [0; 4],
            shared_used: 0,
            shared_grants: 0,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            freed: Notify::new(),
            plenty: watch::Sender::new(()),
            metrics,
        })
    }

    /// A permit for this level, if one is free.
    pub fn try_acquire(self: &Arc<Self>, level: Level) -> Option<Permit> {
        let mut state = self.lock();
        let i = level.index();
        let shared = if state.used[i] < state.reserved[i] {
            state.used[i] += 1;
            false
        } else if state.shared_used < state.shared {
            state.shared_used += 1;
            state.shared_grants += 1;
            true
        } else {
            return None;
        };
        drop(state);
        self.metrics
            .permits_used
            .with_label_values(&[level.as_str()])
            .inc();
        Some(Permit {
            permits: Arc::clone(self),
            level,
            shared,
        })
    }

    /// How many permits this level could get now.
    #[must_use]
    pub fn available(&self, level: Level) -> usize {
        self.lock().available(level.index())
    }

    /// Whether half of what this level can have is free.
    #[must_use]
    pub fn has_plenty(&self, level: Level) -> bool {
        self.lock().has_plenty(level.index())
    }

    /// The order in which levels should ask now.
    #[must_use]
    pub fn order(&self) -> [Level; 4] {
        let mut order = Level::ALL;
        if self.lock().shared_grants % AGEING == AGEING - 1 {
            order.reverse();
        }
        order
    }

    /// How many are in use.
    #[must_use]
    pub fn in_use(&self) -> usize {
        let state = self.lock();
        state.used.iter().sum::<usize>() + state.shared_used
    }

    /// Waits until some permit is given back.
    pub async fn freed(&self) {
        self.freed.notified().await;
    }

    /// Changes when so many are free again that it is worth taking several jobs at once.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<()> {
        self.plenty.subscribe()
    }

    fn release(&self, level: Level, shared: bool) {
        let mut state = self.lock();
        let before: [bool; 4] = std::array::from_fn(|i| state.has_plenty(i));
        if shared {
            state.shared_used -= 1;
        } else {
            state.used[level.index()] -= 1;
        }
        let is_news = (0..4).any(|i| !before[i] && state.has_plenty(i));
        drop(state);
        if is_news {
            self.plenty.send_replace(());
        }
        self.metrics
            .permits_used
            .with_label_values(&[level.as_str()])
            .dec();
        self.freed.notify_one();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // The counters are consistent whenever the lock is free: no code panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn available(&self, i: usize) -> usize {
        (self.reserved[i] - self.used[i]) + (self.shared - self.shared_used)
    }

    fn has_plenty(&self, i: usize) -> bool {
        self.available(i) * 2 >= self.reserved[i] + self.shared
    }
}

/// The right to have one mail in flight; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    permits: Arc<Permits>,
    level: Level,
    shared: bool,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.permits.release(self.level, self.shared);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(total: usize) -> Arc<Permits> {
        Permits::new(total, Arc::new(Metrics::new().unwrap()))
    }

    fn drain(permits: &Arc<Permits>, level: Level) -> Vec<Permit> {
        std::iter::from_fn(|| permits.try_acquire(level)).collect()
    }

    #[test]
    fn bulk_can_never_take_the_permits_of_immediate() {
        let permits = permits(64);
        let bulk = drain(&permits, Level::Low);
        assert_eq!(bulk.len(), 64 - 16 - 8 - 4);
        assert_eq!(drain(&permits, Level::Immediate).len(), 16);
    }

    #[test]
    fn immediate_can_never_take_the_last_permits_of_bulk() {
        let permits = permits(8);
        let urgent = drain(&permits, Level::Immediate);
        assert_eq!(permits.available(Level::Low), 1);
        assert_eq!(urgent.len() + drain(&permits, Level::High).len(), 6);
    }

    #[test]
    fn a_dropped_permit_can_be_had_again() {
        let permits = permits(8);
        let mut held = drain(&permits, Level::Medium);
        assert!(permits.try_acquire(Level::Medium).is_none());
        held.pop();
        assert!(permits.try_acquire(Level::Medium).is_some());
        assert_eq!(permits.in_use(), held.len());
    }

    #[test]
    fn it_is_told_when_half_of_what_a_level_can_have_is_free_again() {
        let permits = permits(64);
        let mut held = drain(&permits, Level::Low);
        let mut told = permits.watch();
        let mut at = Vec::new();
        while held.pop().is_some() {
            if told.has_changed().unwrap() {
                told.mark_unchanged();
                at.push(permits.available(Level::Low));
            }
        }
        // Half of what each level can have, and what of it is its own is free already: 48, 40, 36, 36.
        assert_eq!(at, [8, 12, 14, 18]);
    }

    #[test]
    fn now_and_then_the_least_urgent_level_asks_first() {
        let permits = permits(64);
        assert_eq!(permits.order()[0], Level::Immediate);
        let reserved: Vec<_> = (0..16)
            .filter_map(|_| permits.try_acquire(Level::Immediate))
            .collect();
        let shared: Vec<_> = (0..7)
            .filter_map(|_| permits.try_acquire(Level::Immediate))
            .collect();
        assert_eq!((reserved.len(), shared.len()), (16, 7));
        assert_eq!(permits.order()[0], Level::Low);
    }
}
