//! What a test server saw.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::Notify;

/// A mail the server took.
#[derive(Debug, Clone)]
pub struct Received {
    /// When its final dot was there.
    pub at: Instant,
    /// The same by the calendar.
    pub time: SystemTime,
    /// Address of MAIL, without brackets; empty for the null sender.
    pub from: String,
    /// What followed the address in MAIL, such as `SIZE=120 BODY=8BITMIME`.
    pub params: String,
    /// Addresses accepted in RCPT.
    pub to: Vec<String>,
    /// The mail, dots unstuffed; empty if the server was told not to keep it.
    pub data: Vec<u8>,
    /// Number of the connection, from 0.
    pub session: u64,
    /// Whether the connection was encrypted.
    pub tls: bool,
    /// Who had logged in.
    pub user: Option<String>,
}

/// Counts since the server started.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Connections accepted.
    pub connections: u64,
    /// Open now.
    pub open: u64,
    /// Most open at once.
    pub max_open: u64,
    /// Most logged in at once, by user.
    pub max_open_by_user: HashMap<String, u64>,
    /// Commands by verb, in upper case.
    pub commands: HashMap<String, u64>,
    /// AUTH that succeeded.
    pub auth_ok: u64,
    /// AUTH that failed.
    pub auth_failed: u64,
    open_by_user: HashMap<String, u64>,
}

impl Counters {
    /// How often a command was seen.
    #[must_use]
    pub fn command(&self, verb: &str) -> u64 {
        self.commands.get(verb).copied().unwrap_or(0)
    }
}

#[derive(Debug, Default)]
pub(super) struct Record {
    received: Mutex<Vec<Received>>,
    counters: Mutex<Counters>,
    trace: Mutex<Vec<Vec<String>>>,
    changed: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Record {
    pub(super) fn received(&self) -> Vec<Received> {
        lock(&self.received).clone()
    }

    pub(super) fn received_count(&self) -> usize {
        lock(&self.received).len()
    }

    pub(super) fn counters(&self) -> Counters {
        lock(&self.counters).clone()
    }

    pub(super) fn trace(&self) -> Vec<Vec<String>> {
        lock(&self.trace).clone()
    }

    pub(super) fn take(&self, mail: Received) {
        lock(&self.received).push(mail);
        self.changed.notify_waiters();
    }

    pub(super) fn batch(&self, verbs: Vec<String>) {
        lock(&self.trace).push(verbs);
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut lock(&self.counters));
    }

    pub(super) fn command(&self, verb: &str) {
        self.count(|counters| {
            if let Some(n) = counters.commands.get_mut(verb) {
                *n += 1;
            } else {
                counters.commands.insert(verb.to_owned(), 1);
            }
        });
    }

    pub(super) fn opened(&self) {
        self.count(|counters| {
            counters.connections += 1;
            counters.open += 1;
            counters.max_open = counters.max_open.max(counters.open);
        });
    }

    pub(super) fn logged_in(&self, user: &str) {
        self.count(|counters| {
            counters.auth_ok += 1;
            let now = counters.open_by_user.entry(user.to_owned()).or_default();
            *now += 1;
            let now = *now;
            let most = counters.max_open_by_user.entry(user.to_owned()).or_default();
            *most = now.max(*most);
        });
    }

    pub(super) fn closed(&self, user: Option<&str>) {
        self.count(|counters| {
            counters.open -= 1;
            if let Some(now) = user.and_then(|user| counters.open_by_user.get_mut(user)) {
                *now -= 1;
            }
        });
        self.changed.notify_waiters();
    }

    pub(super) async fn wait_until(&self, reached: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if reached(self) {
                return;
            }
            changed.await;
        }
    }
}
