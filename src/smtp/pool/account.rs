//! The connections of one account.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::core::Entry;

/// How many checkouts could be served now without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// By idle connections.
    pub idle: usize,
    /// By opening more.
    pub openable: usize,
}

impl Capacity {
    /// Both together.
    #[must_use]
    pub fn total(self) -> usize {
        self.idle + self.openable
    }
}

/// How many connections an account may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bound {
    /// In this process.
    pub(super) places: usize,
    /// Each counts against a cap shared with other workers.
    pub(super) is_shared: bool,
}

/// A connection in use or being closed holds one permit of `places`; idle ones hold none. As an idle one is always
/// taken before another is opened, there are never more connections than places.
#[derive(Debug)]
pub(super) struct AccountPool {
    places: Arc<Semaphore>,
    /// A connection came back.
    returned: Notify,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    version: i64,
    /// Permits that exist; more than places for a while after the bound was lowered.
    permits: usize,
    bound: Bound,
    /// The latest used is last.
    idle: Vec<Entry>,
    full_until: Option<Instant>,
    /// BDAT made trouble: mails go by DATA until then.
    data_until: Option<Instant>,
}

/// Permission to have one connection open.
#[derive(Debug)]
pub(super) struct Place {
    pool: Arc<AccountPool>,
    permit: Option<OwnedSemaphorePermit>,
}

impl AccountPool {
    pub(super) fn new(version: i64, bound: Bound) -> Self {
        Self {
            places: Arc::new(Semaphore::new(bound.places)),
            returned: Notify::new(),
            state: Mutex::new(State {
                version,
                permits: bound.places,
                bound,
                idle: Vec::new(),
                full_until: None,
                data_until: None,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn capacity(&self) -> Capacity {
        let state = self.lock();
        let free = self.places.available_permits();
        let idle = state.idle.len().min(free);
        let full = state.full_until.is_some_and(|until| Instant::now() < until);
        Capacity {
            idle,
            openable: if full { 0 } else { free - idle },
        }
    }

    pub(super) fn checked_out(&self) -> usize {
        let permits = self.lock().permits;
        permits.saturating_sub(self.places.available_permits())
    }

    pub(super) fn is_unused(&self) -> bool {
        let state = self.lock();
        let full = state.full_until.is_some_and(|until| Instant::now() < until);
        state.idle.is_empty()
            && state.data_until.is_none()
            && !full
            && self.places.available_permits() >= state.permits
    }

    pub(super) fn count_as_full(&self, time: Duration) {
        self.lock().full_until = Some(Instant::now() + time);
    }

    /// No BDAT for this time: the server said or did something that a server which knows it does not.
    pub(super) fn distrust_bdat(&self, time: Duration) {
        self.lock().data_until = Some(Instant::now() + time);
    }

    /// Whether BDAT may be used, if it is offered.
    pub(super) fn trusts_bdat(&self) -> bool {
        let mut state = self.lock();
        state.data_until = state.data_until.filter(|until| Instant::now() < *until);
        state.data_until.is_none()
    }

    /// Waits for a place, in order of arrival.
    pub(super) async fn place(self: &Arc<Self>) -> Option<Place> {
        let permit = Arc::clone(&self.places).acquire_owned().await.ok()?;
        Some(self.holding(permit))
    }

    /// A place, if there is one.
    pub(super) fn try_place(self: &Arc<Self>) -> Option<Place> {
        let permit = Arc::clone(&self.places).try_acquire_owned().ok()?;
        Some(self.holding(permit))
    }

    fn holding(self: &Arc<Self>, permit: OwnedSemaphorePermit) -> Place {
        Place {
            pool: Arc::clone(self),
            permit: Some(permit),
        }
    }

    /// Takes over newer settings, or another bound, and gives out the idle connections that may not stay, to be closed.
    pub(super) fn adopt(&self, version: i64, bound: Bound) -> Vec<Entry> {
        let mut state = self.lock();
        // A bound changes without a new version.
        if version < state.version || (version == state.version && bound == state.bound) {
            return Vec::new();
        }
        let in_use = state.permits.saturating_sub(self.places.available_permits());
        state.bound = bound;
        if bound.places > state.permits {
            self.places.add_permits(bound.places - state.permits);
            state.permits = bound.places;
        } else {
            state.permits -= self.places.forget_permits(state.permits - bound.places);
        }
        if version == state.version {
            return state.take_surplus(in_use);
        }
        state.version = version;
        // It may be another server now.
        state.data_until = None;
        std::mem::take(&mut state.idle)
    }

    /// The latest idle connection of this version.
    pub(super) fn take_idle(&self, version: i64) -> Option<Entry> {
        let mut state = self.lock();
        if version == state.version {
            state.idle.pop()
        } else {
            None
        }
    }

    /// Takes a connection back, unless it is outdated or one too many; its place is free then, or gone.
    pub(super) fn put_back(&self, entry: Entry, mut place: Place) -> Option<(Entry, Option<Place>)> {
        let mut state = self.lock();
        if state.permits > state.bound.places {
            // Gone at once: what comes back next may not be one too many.
            place.let_go(&mut state);
            return Some((entry, None));
        }
        if entry.version != state.version || !state.may_keep(&entry) || state.idle.len() >= state.bound.places
        {
            return Some((entry, Some(place)));
        }
        state.idle.push(entry);
        drop(state);
        self.returned.notify_one();
        None
    }

    /// The next connection of this version that comes back. Never, if there is no other one: then `None` at once.
    pub(super) async fn next_returned(&self, version: i64) -> Option<Entry> {
        // One place is the caller's own.
        while self.checked_out() > 1 {
            let returned = self.returned.notified();
            if let Some(entry) = self.take_idle(version) {
                return Some(entry);
            }
            returned.await;
        }
        self.take_idle(version)
    }

    /// Whether a connection that counts against a shared cap is idle.
    pub(super) fn idles_under_cap(&self) -> bool {
        self.lock().idle.iter().any(Entry::is_capped)
    }

    /// Takes out idle connections.
    pub(super) fn drain(&self, which: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        self.lock().idle.extract_if(.., |entry| which(entry)).collect()
    }
}

impl State {
    /// Where others count too, a connection that they do not know of may not stay.
    fn may_keep(&self, entry: &Entry) -> bool {
        entry.is_capped() || !self.bound.is_shared
    }

    /// Idle connections for which there is no room any more, those used longest ago first.
    fn take_surplus(&mut self, in_use: usize) -> Vec<Entry> {
        let (kept, mut surplus): (Vec<Entry>, Vec<Entry>) = std::mem::take(&mut self.idle)
            .into_iter()
            .partition(|entry| self.may_keep(entry));
        self.idle = kept;
        let room = self.bound.places.saturating_sub(in_use);
        let over = self.idle.len().saturating_sub(room);
        surplus.extend(self.idle.drain(..over));
        surplus
    }
}

impl Place {
    pub(super) fn pool(&self) -> &Arc<AccountPool> {
        &self.pool
    }

    fn let_go(&mut self, state: &mut State) {
        let Some(permit) = self.permit.take() else { return };
        if state.permits > state.bound.places {
            state.permits -= 1;
            permit.forget();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.permit.is_some() {
            let pool = Arc::clone(&self.pool);
            self.let_go(&mut pool.lock());
        }
    }
}
