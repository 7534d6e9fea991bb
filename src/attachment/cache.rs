//! Fetched attachments whose digest the job gave, kept in memory so that a retry, or the next mail with the same file,
//! does not fetch them again. Per tenant: knowing a digest must not be enough to read another tenant's file.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::id::TenantId;

type Key = (TenantId, [u8; 32]);

/// Bytes of keys and links per entry, about.
const ENTRY: u64 = 512;

/// Least recently used out first.
#[derive(Debug)]
pub(super) struct Cache {
    limit: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<Key, (u64, Bytes)>,
    by_use: BTreeMap<u64, Key>,
    clock: u64,
    bytes: u64,
}

impl Cache {
    /// Keeps at most so many bytes.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            state: Mutex::default(),
        }
    }

    /// The content with this digest.
    pub(super) fn get(&self, tenant: &TenantId, digest: &[u8; 32]) -> Option<Bytes> {
        self.lock().touch((tenant.clone(), *digest))
    }

    /// Remembers verified content, unless it would fill most of the cache by itself.
    pub(super) fn put(&self, tenant: &TenantId, digest: [u8; 32], bytes: &Bytes) {
        // An empty file costs an entry all the same.
        let size = bytes.len().max(1) as u64;
        if size > self.limit / 2 {
            return;
        }
        let key = (tenant.clone(), digest);
        let mut state = self.lock();
        if state.touch(key.clone()).is_some() {
            return;
        }
        let is_full = |state: &State| {
            state.bytes + size > self.limit || state.entries.len() as u64 >= self.most_entries()
        };
        while is_full(&state) && state.drop_oldest() {}
        state.clock += 1;
        let now = state.clock;
        state.bytes += size;
        state.by_use.insert(now, key.clone());
        state.entries.insert(key, (now, bytes.clone()));
    }

    /// What is known of a tiny file weighs more than the file.
    fn most_entries(&self) -> u64 {
        (self.limit / ENTRY).max(16)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn touch(&mut self, key: Key) -> Option<Bytes> {
        let (used, bytes) = self.entries.get_mut(&key)?;
        self.clock += 1;
        let before = std::mem::replace(used, self.clock);
        let bytes = bytes.clone();
        self.by_use.remove(&before);
        self.by_use.insert(self.clock, key);
        Some(bytes)
    }

    fn drop_oldest(&mut self) -> bool {
        let Some((_, key)) = self.by_use.pop_first() else {
            return false;
        };
        if let Some((_, bytes)) = self.entries.remove(&key) {
            self.bytes -= bytes.len().max(1) as u64;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        name.parse().unwrap()
    }

    #[test]
    fn one_tenant_does_not_see_the_files_of_another() {
        let cache = Cache::new(100);
        cache.put(&tenant("a"), [1; 32], &Bytes::from_static(b"secret"));
        assert!(cache.get(&tenant("a"), &[1; 32]).is_some());
        assert!(cache.get(&tenant("b"), &[1; 32]).is_none());
    }

    #[test]
    fn tiny_files_are_bounded_in_number() {
        let cache = Cache::new(100 * ENTRY);
        for n in 0..1000_u16 {
            let mut digest = [0; 32];
            digest[..2].copy_from_slice(&n.to_be_bytes());
            cache.put(&tenant("acme"), digest, &Bytes::new());
        }
        assert_eq!(cache.lock().entries.len(), 100);
        assert_eq!(cache.lock().by_use.len(), 100);
    }

    #[test]
    fn the_least_recently_used_goes_first_and_the_bound_holds() {
        let cache = Cache::new(100);
        let (acme, file) = (tenant("acme"), Bytes::from(vec![0; 40]));
        cache.put(&acme, [1; 32], &file);
        cache.put(&acme, [2; 32], &file);
        assert!(cache.get(&acme, &[1; 32]).is_some());
        cache.put(&acme, [3; 32], &file);
        assert!(cache.get(&acme, &[2; 32]).is_none());
        assert!(cache.get(&acme, &[1; 32]).is_some());
        assert_eq!(cache.lock().bytes, 80);
        cache.put(&acme, [4; 32], &Bytes::from(vec![0; 51]));
        assert!(cache.get(&acme, &[4; 32]).is_none(), "larger than half the cache");
    }
}
