//! How much each account has in hand in this worker: admitted, and its SMTP transaction not yet over. Keeps one slow
//! account from holding the permits of the others.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::id::AccountKey;

/// How long it takes until an admitted job can have its connection. So many jobs as end meanwhile may be in hand beyond
/// the connections of an account: a quick server is kept busy, a slow one does not hold permits that it cannot use.
const ADMISSION: Duration = Duration::from_millis(50);
/// Most jobs in hand per connection.
const PER_CONNECTION: usize = 8;
/// Time of a send until one has been seen.
const UNKNOWN: Duration = Duration::from_millis(100);
/// How long an account gets no more than it had in hand when a job found no connection.
const BUSY_FOR: Duration = Duration::from_millis(500);

/// Jobs in hand per account.
///
/// An account that got all it can have in hand gets nothing more until most of what is not on a connection has gone: so
/// admission takes many jobs in one statement rather than one for each that ends, and no connection stands idle for it.
pub struct Load {
    accounts: Mutex<HashMap<AccountKey, Account>>,
    /// What one account may have in hand while others have something too.
    fair: usize,
    /// Changes when an account that was full may have more.
    room: watch::Sender<()>,
}

impl fmt::Debug for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Load")
            .field("accounts", &self.lock().len())
            .finish()
    }
}

#[derive(Debug)]
struct Account {
    in_hand: usize,
    connections: usize,
    /// It was full, and most of that is still there.
    resting: bool,
    /// Somebody waits for the next to go.
    awaited: bool,
    busy_until: Option<Instant>,
    /// What was in hand when a job last found no connection: so many have one.
    held: usize,
    /// Moving average of the time of a send.
    send: Duration,
}

impl Default for Account {
    fn default() -> Self {
        Self {
            in_hand: 0,
            connections: 0,
            resting: false,
            awaited: false,
            busy_until: None,
            held: 0,
            send: UNKNOWN,
        }
    }
}

impl Account {
    /// Whether it has no connection but those it uses, as was seen a moment ago.
    fn has_all_connections(&self) -> bool {
        self.in_hand >= self.held && self.busy_until.is_some_and(|until| until > Instant::now())
    }
}

/// One job in hand; counted until dropped.
#[derive(Debug)]
pub struct InHand {
    load: Arc<Load>,
    account: AccountKey,
}

impl Load {
    /// Nothing in hand. `permits`: sends in flight in this worker.
    #[must_use]
    pub fn new(permits: usize) -> Arc<Self> {
        Arc::new(Self {
            accounts: Mutex::default(),
            fair: (permits / 2).max(1),
            room: watch::Sender::new(()),
        })
    }

    /// Changes whenever an account that was full may have more in hand.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<()> {
        self.room.subscribe()
    }

    /// Counts one more job of this account, which has so many connections here.
    #[must_use]
    pub fn enter(self: &Arc<Self>, account: &AccountKey, connections: usize) -> InHand {
        let mut accounts = self.lock();
        let entry = accounts.entry(account.clone()).or_default();
        entry.in_hand += 1;
        entry.connections = connections;
        drop(accounts);
        InHand {
            load: Arc::clone(self),
            account: account.clone(),
        }
    }

    /// Whether an account gets nothing more now. With nobody else about it may have all its connections busy; otherwise
    /// it may use half of the permits. `urgent`: what cannot wait until others have gone, if there is room at all.
    #[must_use]
    pub fn is_full(&self, account: &AccountKey, connections: usize, urgent: bool) -> bool {
        let mut accounts = self.lock();
        let shared = accounts.len() > 1;
        let Some(entry) = accounts.get_mut(account) else {
            return false;
        };
        self.look(entry, connections, shared, urgent)
    }

    /// Accounts that get nothing more now.
    #[must_use]
    pub fn full_accounts(&self) -> Vec<AccountKey> {
        let mut accounts = self.lock();
        let shared = accounts.len() > 1;
        let mut full = Vec::new();
        for (account, entry) in accounts.iter_mut() {
            if self.look(entry, entry.connections, shared, false) {
                full.push(account.clone());
            }
        }
        full
    }

    /// Whether an account gets nothing more now. If so, what frees it is told.
    fn look(&self, entry: &mut Account, connections: usize, shared: bool, urgent: bool) -> bool {
        let is_over = entry.in_hand > 0 && entry.in_hand >= self.room(entry, connections, shared);
        let waits_for_next = entry.has_all_connections() || (is_over && urgent);
        entry.resting |= is_over;
        entry.awaited |= waits_for_next;
        waits_for_next || (entry.resting && !urgent)
    }

    /// A job of this account, no longer in hand, found no connection: for a moment those in hand are as many as there
    /// can be.
    pub fn note_busy(&self, account: &AccountKey) {
        let now = Instant::now();
        let mut accounts = self.lock();
        accounts.retain(|_, entry| entry.in_hand > 0 || entry.busy_until.is_some_and(|until| until > now));
        let entry = accounts.entry(account.clone()).or_default();
        entry.busy_until = Some(now + BUSY_FOR);
        entry.held = entry.in_hand;
    }

    /// How much an account may have in hand.
    fn room(&self, entry: &Account, connections: usize, shared: bool) -> usize {
        let ahead = ADMISSION.as_micros() as usize * connections / (entry.send.as_micros() as usize).max(1);
        let ahead = ahead.min(connections.saturating_mul(PER_CONNECTION - 1));
        let connections = if shared {
            connections.min(self.fair)
        } else {
            connections
        };
        connections.saturating_add(ahead).min(self.fair.max(connections))
    }

    /// How much of it is left when an account gets more again: all connections, and a quarter of what is ahead of them.
    fn low(&self, entry: &Account, shared: bool) -> usize {
        let room = self.room(entry, entry.connections, shared);
        room - room.saturating_sub(entry.connections) / 4 * 3
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<AccountKey, Account>> {
        // A count is one step: a panic elsewhere cannot leave it half done.
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InHand {
    /// Its send took so long.
    pub fn note_send(&self, took: Duration) {
        if let Some(entry) = self.load.lock().get_mut(&self.account) {
            entry.send = (entry.send * 3 + took) / 4;
        }
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        let mut accounts = self.load.lock();
        let shared = accounts.len() > 1;
        let Some(entry) = accounts.get_mut(&self.account) else {
            return;
        };
        entry.in_hand -= 1;
        let has_rested = entry.resting && entry.in_hand <= self.load.low(entry, shared);
        let is_news = has_rested || std::mem::take(&mut entry.awaited);
        if has_rested {
            entry.resting = false;
        }
        if entry.in_hand == 0 && entry.busy_until.is_none_or(|until| until <= Instant::now()) {
            accounts.remove(&self.account);
        }
        drop(accounts);
        if is_news {
            self.load.room.send_replace(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> AccountKey {
        AccountKey::from_stored(name)
    }

    fn is_full(load: &Load, account: &str, connections: usize) -> bool {
        load.is_full(&key(account), connections, false)
    }

    #[test]
    fn an_account_is_full_when_its_connections_have_enough_in_hand() {
        let load = Load::new(64);
        let mut held: Vec<_> = (0..2).map(|_| load.enter(&key("t/a"), 2)).collect();
        assert!(!is_full(&load, "t/a", 2));
        held.push(load.enter(&key("t/a"), 2));
        assert!(is_full(&load, "t/a", 2));
        assert!(!is_full(&load, "t/b", 2));
        assert_eq!(load.full_accounts(), [key("t/a")]);
        drop(held);
        assert!(!is_full(&load, "t/a", 2));
    }

    #[test]
    fn a_quick_server_gets_more_in_hand_than_a_slow_one() {
        let load = Load::new(64);
        let in_hand_of = |account: &str, took: Duration| {
            let mut held = vec![load.enter(&key(account), 2)];
            for _ in 0..50 {
                held[0].note_send(took);
            }
            while !is_full(&load, account, 2) {
                held.push(load.enter(&key(account), 2));
            }
            held.len()
        };
        assert_eq!(in_hand_of("t/slow", Duration::from_secs(20)), 2);
        assert_eq!(in_hand_of("t/quick", Duration::from_millis(5)), 16);
    }

    #[test]
    fn an_account_that_was_full_gets_more_when_most_of_what_is_ahead_has_gone() {
        let load = Load::new(128);
        let first = load.enter(&key("t/a"), 4);
        for _ in 0..50 {
            first.note_send(Duration::from_millis(1));
        }
        let mut held = vec![first];
        while !is_full(&load, "t/a", 4) {
            held.push(load.enter(&key("t/a"), 4));
        }
        assert_eq!(held.len(), 32, "its connections, and seven ahead of each");
        while is_full(&load, "t/a", 4) {
            assert!(load.full_accounts().contains(&key("t/a")));
            held.pop();
        }
        assert_eq!(held.len(), 11, "its connections, and a quarter of what is ahead");
    }

    #[test]
    fn who_found_an_account_full_is_told_when_it_has_room() {
        let load = Load::new(64);
        let room = load.watch();
        let mut held: Vec<_> = (0..12).map(|_| load.enter(&key("t/a"), 8)).collect();
        assert_eq!(load.full_accounts(), [key("t/a")]);
        while !load.full_accounts().is_empty() {
            assert!(!room.has_changed().unwrap());
            held.pop();
        }
        assert!(room.has_changed().unwrap());
        assert!(held.len() >= 8, "its connections stay busy");
    }

    #[tokio::test]
    async fn what_is_urgent_does_not_wait_until_most_has_gone() {
        let load = Load::new(64);
        let mut room = load.watch();
        let mut held: Vec<_> = (0..12).map(|_| load.enter(&key("t/a"), 8)).collect();
        assert!(load.is_full(&key("t/a"), 8, true));
        assert!(load.is_full(&key("t/a"), 8, false));
        held.pop();
        room.changed().await.unwrap();
        assert!(!load.is_full(&key("t/a"), 8, true));
        assert!(load.is_full(&key("t/a"), 8, false));
    }

    #[test]
    fn an_account_may_use_every_permit_only_while_it_is_alone() {
        let load = Load::new(8);
        let held: Vec<_> = (0..4).map(|_| load.enter(&key("t/a"), 16)).collect();
        assert!(!is_full(&load, "t/a", 16));
        let other = load.enter(&key("t/b"), 16);
        assert!(is_full(&load, "t/a", 16));
        drop((held, other));
    }

    #[test]
    fn an_account_that_has_all_the_connections_it_can_get_keeps_them_busy() {
        let load = Load::new(64);
        let mut held: Vec<_> = (0..3).map(|_| load.enter(&key("t/a"), 16)).collect();
        load.note_busy(&key("t/a"));
        assert!(is_full(&load, "t/a", 16));
        held.pop();
        assert!(!is_full(&load, "t/a", 16));
    }

    #[test]
    fn an_account_without_a_free_connection_is_full_for_a_moment() {
        let load = Load::new(8);
        load.note_busy(&key("t/a"));
        assert!(is_full(&load, "t/a", 16));
        std::thread::sleep(BUSY_FOR);
        assert!(!is_full(&load, "t/a", 16));
    }
}
