//! Connections that no longer answer. A server that stands still, or a network that swallows everything without closing,
//! leaves a statement waiting for ever: the server's own time limit does not reach it, and what is in between may still
//! acknowledge every byte. So whoever has a connection for longer than any statement may take makes all connections be
//! dropped: their statements fail as they do with any lost connection, and are repeated over new ones.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use deadpool_postgres::Object;
use tokio::sync::watch;

/// A connection of the pool; returned to it when dropped.
#[derive(Debug)]
pub struct Client {
    object: Object,
    _checkout: Checkout,
}

impl Deref for Client {
    type Target = Object;

    fn deref(&self) -> &Object {
        &self.object
    }
}

impl DerefMut for Client {
    fn deref_mut(&mut self) -> &mut Object {
        &mut self.object
    }
}

/// Who has a connection, and since when. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Checkouts {
    held: Arc<Mutex<Held>>,
    limit: Duration,
    severed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Held {
    next: u64,
    /// Numbers rise with time: the first entry is the oldest.
    since: BTreeMap<u64, Instant>,
}

#[derive(Debug)]
struct Checkout {
    number: u64,
    held: Arc<Mutex<Held>>,
}

impl Drop for Checkout {
    fn drop(&mut self) {
        lock(&self.held).since.remove(&self.number);
    }
}

impl Checkouts {
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            held: Arc::default(),
            limit,
            severed: watch::Sender::new(0),
        }
    }

    /// The connection is in use from now on.
    pub(super) fn begin(&self, object: Object) -> Client {
        let mut held = lock(&self.held);
        let number = held.next;
        held.next += 1;
        held.since.insert(number, Instant::now());
        Client {
            object,
            _checkout: Checkout {
                number,
                held: Arc::clone(&self.held),
            },
        }
    }

    /// Changes when every connection of this moment is to be dropped.
    pub(super) fn severed(&self) -> watch::Receiver<u64> {
        self.severed.subscribe()
    }

    /// Drops all connections if one has been in use for too long.
    pub(super) fn sever_stuck(&self) {
        let mut held = lock(&self.held);
        let oldest = held.since.first_key_value();
        if oldest.is_none_or(|(_, since)| since.elapsed() < self.limit) {
            return;
        }
        // They fail in a moment; until then they count as new.
        held.since.values_mut().for_each(|since| *since = Instant::now());
        drop(held);
        tracing::warn!(limit = ?self.limit, "the database does not answer: its connections are dropped");
        self.severed.send_modify(|generation| *generation += 1);
    }
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    // One insert or remove at a time: a panic elsewhere cannot leave it half done.
    held.lock().unwrap_or_else(PoisonError::into_inner)
}
