//! Connections all workers together may have open to one account.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

use crate::id::AccountKey;

/// Time for one call to the ledger.
const LIMIT: Duration = Duration::from_secs(10);

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

    /// Gives one back. Implementations repeat until it is done, or let it expire.
    fn release<'a>(&'a self, key: &'a AccountKey) -> BoxFuture<'a, ()>;
}

/// Takes leases and gives them back in the background.
pub(super) struct Caps {
    pub(super) shared: Arc<dyn ConnectionCaps>,
    pub(super) tasks: TaskTracker,
    pub(super) runtime: Handle,
}

/// One connection's worth; given back on drop.
pub(super) struct CapLease {
    key: AccountKey,
    caps: Arc<Caps>,
}

impl Caps {
    /// Takes a lease; `None` if all are taken. Asked in a task of its own, so that a caller who gives up does not leave
    /// behind a lease that nobody knows of.
    pub(super) async fn acquire(
        self: &Arc<Self>,
        key: &AccountKey,
        cap: u32,
    ) -> Result<Option<CapLease>, CapsError> {
        let (caps, key) = (Arc::clone(self), key.clone());
        let asking = async move {
            let granted = tokio::time::timeout(LIMIT, caps.shared.acquire(&key, cap))
                .await
                .map_err(|_| CapsError(format!("no answer within {LIMIT:?}")))??;
            Ok(if granted {
                Some(CapLease { key, caps })
            } else {
                None
            })
        };
        let asked = self.tasks.spawn_on(asking, &self.runtime).await;
        asked.unwrap_or_else(|error| Err(CapsError(error.to_string())))
    }
}

impl Caps {
    /// Accounts whose connections others want; none if that cannot be asked.
    pub(super) async fn wanted(&self) -> Vec<AccountKey> {
        let asked = tokio::time::timeout(LIMIT, self.shared.wanted()).await;
        asked.ok().and_then(Result::ok).unwrap_or_default()
    }
}

impl Drop for CapLease {
    fn drop(&mut self) {
        let (key, shared) = (self.key.clone(), Arc::clone(&self.caps.shared));
        let release = async move {
            let _ = tokio::time::timeout(LIMIT, shared.release(&key)).await;
        };
        self.caps.tasks.spawn_on(release, &self.caps.runtime);
    }
}
