//! Connections all workers together may have open to one account.
//!
//! What this worker holds is counted here as well as in the ledger. Takes and returns whose answer did not come leave the two
//! apart, so the ledger is told from time to time what is true.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::RwLock;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::id::AccountKey;

/// Time for one call to the ledger.
const LIMIT: Duration = Duration::from_secs(10);
/// How often the ledger is told what is held.
const RESTATE: Duration = Duration::from_secs(15);
/// How often it is told so when nothing is held (any more) after an answer that did not come: the statement may still be
/// running somewhere.
const RESTATED_AFTER_TROUBLE: u32 = 4;

/// The cap could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CapsError(pub String);

/// Leases on connections, shared by all workers. The ledger implements it.
pub trait ConnectionCaps: Send + Sync {
    /// Takes one of `cap` connections of an account; whether there was one.
    ///
    /// # Errors
    /// When the ledger cannot be asked.
    fn acquire<'a>(&'a self, key: &'a AccountKey, cap: u32) -> BoxFuture<'a, Result<bool, CapsError>>;

    /// Accounts of which this worker has connections and others lately asked in vain.
    ///
    /// # Errors
    /// When the ledger cannot be asked.
    fn wanted(&self) -> BoxFuture<'_, Result<Vec<AccountKey>, CapsError>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    /// Gives one back.
    ///
    /// # Errors
    /// When the ledger cannot be told.
    fn release<'a>(&'a self, key: &'a AccountKey) -> BoxFuture<'a, Result<(), CapsError>>;

    /// Says how many this worker has of each account, and none of any other.
    ///
    /// # Errors
    /// When the ledger cannot be told.
    fn restate<'a>(&'a self, held: &'a [(AccountKey, u32)]) -> BoxFuture<'a, Result<(), CapsError>>;
}

/// Takes leases and gives them back in the background.
pub(super) struct Caps {
    shared: Arc<dyn ConnectionCaps>,
    pub(super) tasks: TaskTracker,
    pub(super) runtime: Handle,
    /// Held, being asked for, or on their way back.
    held: Mutex<HashMap<AccountKey, u32>>,
    /// Takes and returns are under way while it is read; what is held is said when none is.
    moving: RwLock<()>,
    restated: Mutex<Instant>,
    /// How often it is still to be said after trouble.
    doubts: AtomicU32,
}

/// One connection's worth; given back on drop.
pub(super) struct CapLease {
    key: AccountKey,
    caps: Arc<Caps>,
}

impl Caps {
    /// Nothing held. Tasks run on `runtime`.
    pub(super) fn new(shared: Arc<dyn ConnectionCaps>, runtime: Handle) -> Self {
        Self {
            shared,
            tasks: TaskTracker::new(),
            runtime,
            held: Mutex::default(),
            moving: RwLock::default(),
            restated: Mutex::new(Instant::now()),
            doubts: AtomicU32::new(0),
        }
    }

    /// Takes a lease; `None` if all are taken. Asked in a task of its own, so that a caller who gives up does not leave
    /// behind a lease that nobody knows of.
    pub(super) async fn acquire(
        self: &Arc<Self>,
        key: &AccountKey,
        cap: u32,
    ) -> Result<Option<CapLease>, CapsError> {
        let (caps, key) = (Arc::clone(self), key.clone());
        let asking = async move {
            let moving = caps.moving.read().await;
            *caps.held().entry(key.clone()).or_default() += 1;
            let asked = within(caps.shared.acquire(&key, cap)).await;
            if !matches!(asked, Ok(true)) {
                caps.count_down(&key);
            }
            if asked.is_err() {
                caps.doubt();
            }
            drop(moving);
            Ok(if asked? {
                Some(CapLease { key, caps })
            } else {
                None
            })
        };
        let asked = self.tasks.spawn_on(asking, &self.runtime).await;
        asked.unwrap_or_else(|error| Err(CapsError(error.to_string())))
    }

    /// Accounts whose connections others want; none if that cannot be asked.
    pub(super) async fn wanted(&self) -> Vec<AccountKey> {
        within(self.shared.wanted()).await.unwrap_or_default()
    }

    /// Tells the ledger what is held, if that is due.
    pub(super) async fn restate(&self) {
        let is_idle = self.held().is_empty() && self.doubts.load(Ordering::Relaxed) == 0;
        if is_idle || self.restated().elapsed() < RESTATE {
            return;
        }
        let _still = self.moving.write().await;
        *self.restated() = Instant::now();
        let held: Vec<_> = self.held().iter().map(|(key, n)| (key.clone(), *n)).collect();
        match within(self.shared.restate(&held)).await {
            Ok(()) => {
                let fewer = |doubts: u32| doubts.checked_sub(1);
                let _ = self
                    .doubts
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer);
            }
            Err(error) => {
                tracing::debug!(%error, "the ledger is told later which connections are open");
                self.doubt();
            }
        }
    }

    async fn release(&self, key: &AccountKey) {
        let _moving = self.moving.read().await;
        if within(self.shared.release(key)).await.is_err() {
            self.doubt();
        }
        self.count_down(key);
    }

    /// The ledger may count what is not there.
    fn doubt(&self) {
        self.doubts.store(RESTATED_AFTER_TROUBLE, Ordering::Relaxed);
    }

    fn count_down(&self, key: &AccountKey) {
        let mut held = self.held();
        if let Some(count) = held.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                held.remove(key);
            }
        }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<AccountKey, u32>> {
        // A count is one step: a panic elsewhere cannot leave it half done.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn restated(&self) -> MutexGuard<'_, Instant> {
        self.restated.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn within<T>(call: BoxFuture<'_, Result<T, CapsError>>) -> Result<T, CapsError> {
    tokio::time::timeout(LIMIT, call)
        .await
        .unwrap_or_else(|_| Err(CapsError(format!("no answer within {LIMIT:?}"))))
}

impl Drop for CapLease {
    fn drop(&mut self) {
        let (key, caps) = (self.key.clone(), Arc::clone(&self.caps));
        let release = async move { caps.release(&key).await };
        self.caps.tasks.spawn_on(release, &self.caps.runtime);
    }
}
