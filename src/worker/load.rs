//! How much each account has in hand in this worker: admitted, and its SMTP transaction not yet over. Keeps one slow
//! account from holding the permits of the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::id::AccountKey;

/// Jobs in hand per account.
#[derive(Debug, Default)]
pub struct Load {
    accounts: Mutex<HashMap<AccountKey, usize>>,
}

/// One job in hand; counted until dropped.
#[derive(Debug)]
pub struct InHand {
    load: Arc<Load>,
    account: AccountKey,
}

impl Load {
    /// Counts one more job of this account.
    #[must_use]
    pub fn enter(self: &Arc<Self>, account: &AccountKey) -> InHand {
        *self.lock().entry(account.clone()).or_default() += 1;
        InHand { load: Arc::clone(self), account: account.clone() }
    }

    /// Jobs of this account in hand.
    #[must_use]
    pub fn of(&self, account: &AccountKey) -> usize {
        self.lock().get(account).copied().unwrap_or(0)
    }

    /// How many accounts have something in hand, this one not counted.
    #[must_use]
    pub fn others(&self, account: &AccountKey) -> usize {
        let accounts = self.lock();
        accounts.len() - usize::from(accounts.contains_key(account))
    }

    /// Accounts with at least this many in hand, as `limit` says for each.
    #[must_use]
    pub fn full(&self, limit: impl Fn(&AccountKey) -> usize) -> Vec<AccountKey> {
        let accounts = self.lock();
        accounts.iter().filter(|(key, count)| **count >= limit(key)).map(|(key, _)| key.clone()).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<AccountKey, usize>> {
        // A count is one step: a panic elsewhere cannot leave it half done.
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        let mut accounts = self.load.lock();
        if let Some(count) = accounts.get_mut(&self.account) {
            *count -= 1;
            if *count == 0 {
                accounts.remove(&self.account);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_in_hand_are_counted_until_they_are_dropped() {
        let load = Arc::new(Load::default());
        let (a, b) = (AccountKey::from_stored("t/a"), AccountKey::from_stored("t/b"));
        let held = [load.enter(&a), load.enter(&a), load.enter(&b)];
        assert_eq!((load.of(&a), load.of(&b), load.others(&a)), (2, 1, 1));
        assert_eq!(load.full(|_| 2), [a.clone()]);
        drop(held);
        assert_eq!((load.of(&a), load.others(&a)), (0, 0));
    }
}
