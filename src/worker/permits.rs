//! Permits to send. Each level has some of its own, so that `immediate` never waits for bulk and bulk never starves;
//! the rest is shared, most urgent first, but every eighth shared grant goes to the least urgent that asks.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Notify, watch};

use crate::config::LEAST_CONCURRENCY;
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
    used: Used,
    /// Of these, what is only lent.
    lent: Used,
    shared_grants: u64,
}

/// Permits that are not free.
#[derive(Debug, Default)]
struct Used {
    own: [usize; 4],
    shared: usize,
}

impl fmt::Debug for Permits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("Permits")
            .field("used", &state.used)
            .field("lent", &state.lent)
            .finish()
    }
}

impl Permits {
    /// Divides `total` (at least [`LEAST_CONCURRENCY`] are made) between the levels: a quarter, an eighth, a sixteenth and a sixteenth
    /// reserved, at least one each; the rest shared.
    #[must_use]
    pub fn new(total: usize, metrics: Arc<Metrics>) -> Arc<Self> {
        let total = total.max(LEAST_CONCURRENCY);
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
            used: Used::default(),
            lent: Used::default(),
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
        self.lend(level).map(Lent::keep)
    }

    /// The same for somebody who has yet to look whether there is something to send. Those who wait for permits are not told
    /// when it comes back unused: otherwise his own looking would be what tells him to look again.
    pub fn lend(self: &Arc<Self>, level: Level) -> Option<Lent> {
        let mut state = self.lock();
        let i = level.index();
        let shared = state.used.own[i] >= state.reserved[i];
        if shared && state.used.shared >= state.shared {
            return None;
        }
        *state.used.of(i, shared) += 1;
        *state.lent.of(i, shared) += 1;
        drop(state);
        Some(Lent {
            permits: Arc::clone(self),
            level,
            shared,
            is_kept: false,
        })
    }

    /// How many permits this level could get now.
    #[must_use]
    pub fn available(&self, level: Level) -> usize {
        self.lock().available(level.index())
    }

    /// Whether half of what this level can have is free, or only lent.
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
        state.used.own.iter().sum::<usize>() + state.used.shared
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

    fn keep(&self, level: Level, shared: bool) {
        let mut state = self.lock();
        *state.lent.of(level.index(), shared) -= 1;
        state.shared_grants += u64::from(shared);
        drop(state);
        self.metrics
            .permits_used
            .with_label_values(&[level.as_str()])
            .inc();
    }

    fn take_back(&self, level: Level, shared: bool) {
        let mut state = self.lock();
        *state.lent.of(level.index(), shared) -= 1;
        *state.used.of(level.index(), shared) -= 1;
        drop(state);
        self.freed.notify_one();
    }

    fn release(&self, level: Level, shared: bool) {
        let mut state = self.lock();
        let before: [bool; 4] = std::array::from_fn(|i| state.has_plenty(i));
        *state.used.of(level.index(), shared) -= 1;
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

impl Used {
    fn of(&mut self, i: usize, shared: bool) -> &mut usize {
        if shared {
            &mut self.shared
        } else {
            &mut self.own[i]
        }
    }
}

impl State {
    fn available(&self, i: usize) -> usize {
        (self.reserved[i] - self.used.own[i]) + (self.shared - self.used.shared)
    }

    fn has_plenty(&self, i: usize) -> bool {
        let free = self.available(i) + self.lent.own[i] + self.lent.shared;
        free * 2 >= self.reserved[i] + self.shared
    }
}

/// A permit that is given back when dropped, unless it is kept.
#[derive(Debug)]
pub struct Lent {
    permits: Arc<Permits>,
    level: Level,
    shared: bool,
    is_kept: bool,
}

impl Lent {
    /// There is something to send.
    #[must_use]
    pub fn keep(mut self) -> Permit {
        self.is_kept = true;
        self.permits.keep(self.level, self.shared);
        Permit {
            permits: Arc::clone(&self.permits),
            level: self.level,
            shared: self.shared,
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if !self.is_kept {
            self.permits.take_back(self.level, self.shared);
        }
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
    fn who_only_looks_tells_nobody_that_permits_are_free() {
        let permits = permits(64);
        let told = permits.watch();
        let _held: Vec<_> = (0..10).map(|_| permits.try_acquire(Level::Low)).collect();
        let lent: Vec<_> = std::iter::from_fn(|| permits.lend(Level::Low)).collect();
        assert_eq!((lent.len(), permits.available(Level::Low)), (26, 0));
        assert!(permits.has_plenty(Level::Low));
        drop(lent);
        assert_eq!(permits.available(Level::Low), 26);
        assert!(!told.has_changed().unwrap());
    }

    #[test]
    fn what_becomes_free_while_somebody_looks_is_told() {
        let permits = permits(64);
        let told = permits.watch();
        let mut held: Vec<_> = (0..19).map(|_| permits.try_acquire(Level::Low)).collect();
        let lent: Vec<_> = std::iter::from_fn(|| permits.lend(Level::Low)).collect();
        assert!(!permits.has_plenty(Level::Low));
        held.pop();
        assert!(told.has_changed().unwrap());
        drop(lent);
    }

    #[test]
    fn what_was_lent_and_kept_is_a_permit_like_any_other() {
        let permits = permits(64);
        let mut told = permits.watch();
        let kept: Vec<_> = std::iter::from_fn(|| permits.lend(Level::Low).map(Lent::keep)).collect();
        assert!(!permits.has_plenty(Level::Low));
        assert_eq!(permits.in_use(), kept.len());
        drop(kept);
        assert!(told.has_changed().unwrap());
        told.mark_unchanged();
        assert_eq!(permits.in_use(), 0);
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
