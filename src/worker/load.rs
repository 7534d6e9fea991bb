//! How much each account has in hand in this worker: admitted, and its SMTP transaction not yet over. Keeps one slow
//! account from holding the permits of the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
#[derive(Debug)]
pub struct Load {
    accounts: Mutex<HashMap<AccountKey, Account>>,
    /// What one account may have in hand while others have something too.
    fair: usize,
}

#[derive(Debug)]
struct Account {
    in_hand: usize,
    connections: usize,
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
            busy_until: None,
            held: 0,
            send: UNKNOWN,
        }
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
        })
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

    /// Whether an account has as much in hand as its connections can take. With nobody else about it may use every
    /// permit; otherwise at most half.
    #[must_use]
    pub fn is_full(&self, account: &AccountKey, connections: usize) -> bool {
        let accounts = self.lock();
        let Some(entry) = accounts.get(account) else {
            return false;
        };
        self.full(entry, connections, accounts.len() > 1)
    }

    /// Accounts that are full.
    #[must_use]
    pub fn full_accounts(&self) -> Vec<AccountKey> {
        let accounts = self.lock();
        let shared = accounts.len() > 1;
        let full = accounts
            .iter()
            .filter(|(_, entry)| self.full(entry, entry.connections, shared));
        full.map(|(account, _)| account.clone()).collect()
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

    fn full(&self, entry: &Account, connections: usize, shared: bool) -> bool {
        let ahead = ADMISSION.as_micros() as usize * connections / (entry.send.as_micros() as usize).max(1);
        let room = connections.saturating_add(ahead.min(connections * (PER_CONNECTION - 1)));
        let room = if shared { room.min(self.fair) } else { room };
        let busy = entry.busy_until.is_some_and(|until| until > Instant::now());
        (busy && entry.in_hand >= entry.held) || (entry.in_hand > 0 && entry.in_hand >= room)
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
        let Some(entry) = accounts.get_mut(&self.account) else {
            return;
        };
        entry.in_hand -= 1;
        if entry.in_hand == 0 && entry.busy_until.is_none_or(|until| until <= Instant::now()) {
            accounts.remove(&self.account);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> AccountKey {
        AccountKey::from_stored(name)
    }

    #[test]
    fn an_account_is_full_when_its_connections_have_enough_in_hand() {
        let load = Load::new(64);
        let mut held: Vec<_> = (0..2).map(|_| load.enter(&key("t/a"), 2)).collect();
        assert!(!load.is_full(&key("t/a"), 2));
        held.push(load.enter(&key("t/a"), 2));
        assert!(load.is_full(&key("t/a"), 2));
        assert!(!load.is_full(&key("t/b"), 2));
        assert_eq!(load.full_accounts(), [key("t/a")]);
        drop(held);
        assert!(!load.is_full(&key("t/a"), 2));
    }

    #[test]
    fn a_quick_server_gets_more_in_hand_than_a_slow_one() {
        let load = Load::new(64);
        let in_hand_of = |account: &str, took: Duration| {
            let mut held = vec![load.enter(&key(account), 2)];
            for _ in 0..50 {
                held[0].note_send(took);
            }
            while !load.is_full(&key(account), 2) {
                held.push(load.enter(&key(account), 2));
            }
            held.len()
        };
        assert_eq!(in_hand_of("t/slow", Duration::from_secs(20)), 2);
        assert_eq!(in_hand_of("t/quick", Duration::from_millis(5)), 16);
    }

    #[test]
    fn an_account_may_use_every_permit_only_while_it_is_alone() {
        let load = Load::new(8);
        let held: Vec<_> = (0..4).map(|_| load.enter(&key("t/a"), 16)).collect();
        assert!(!load.is_full(&key("t/a"), 16));
        let other = load.enter(&key("t/b"), 16);
        assert!(load.is_full(&key("t/a"), 16));
        drop((held, other));
    }

    #[test]
    fn an_account_that_has_all_the_connections_it_can_get_keeps_them_busy() {
        let load = Load::new(64);
        let mut held: Vec<_> = (0..3).map(|_| load.enter(&key("t/a"), 16)).collect();
        load.note_busy(&key("t/a"));
        assert!(load.is_full(&key("t/a"), 16));
        held.pop();
        assert!(!load.is_full(&key("t/a"), 16));
    }

    #[test]
    fn an_account_without_a_free_connection_is_full_for_a_moment() {
        let load = Load::new(8);
        load.note_busy(&key("t/a"));
        assert!(load.is_full(&key("t/a"), 16));
        std::thread::sleep(BUSY_FOR);
        assert!(!load.is_full(&key("t/a"), 16));
    }
}
