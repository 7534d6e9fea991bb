//! Connections kept per account: bounded while open, reused latest first, closed when old, used up, idle or outdated.

mod account;
mod core;
mod lease;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::time::{timeout, timeout_at};

use crate::config;
use crate::failure::{Class, Failure, Fault, Stage};
use crate::id::AccountKey;
use crate::telemetry::metrics::Metrics;

use super::caps::{CapLease, ConnectionCaps};
use super::dial::lacks_domain;
use super::server::{Resolver, Server, Submission};
use super::tls::TlsSetupError;

pub use account::Capacity;
use account::{AccountPool, Bound};
use core::{Core, Entry};
use lease::Home;
pub use lease::{Lease, NotBegun};

/// Times that are no settings; tests shorten them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tuning {
    /// Wait of [`Pools::checkout`] for a place.
    pub(super) wait: Duration,
    /// Idle time after which a connection is probed before it is used again.
    pub(super) probe_after: Duration,
    /// Idle time of connections that count against a cap shared with other workers, even if nobody is known to want them.
    pub(super) shared_idle: Duration,
    /// Wait for a connection of this worker to come back when the shared cap is reached.
    pub(super) own_wait: Duration,
    /// How long an account counts as full after the shared cap was reached.
    pub(super) full_for: Duration,
    /// Time between two looks at idle connections.
    pub(super) sweep: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            wait: Duration::from_secs(5),
            probe_after: Duration::from_secs(10),
            shared_idle: Duration::from_secs(15),
            own_wait: Duration::from_millis(500),
            full_for: Duration::from_millis(250),
            sweep: Duration::from_secs(1),
        }
    }
}

/// Longest [`Pools::close`].
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// No connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckoutError {
    /// All places of the account are taken, here or by other workers. No attempt: try again shortly.
    Busy,
    /// Connecting or logging in failed, before MAIL.
    Failed(Failure),
}

/// The pools of a process.
pub struct Pools {
    core: Arc<Core>,
    accounts: Mutex<HashMap<AccountKey, Arc<AccountPool>>>,
}

impl fmt::Debug for Pools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pools").finish_non_exhaustive()
    }
}

impl Pools {
    /// Loads certificate authorities and begins to look after idle connections. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If `POSTROOM_SMTP_CA_FILE` cannot be used.
    pub fn new(
        config: config::Smtp,
        resolver: Arc<dyn Resolver>,
        caps: Arc<dyn ConnectionCaps>,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, TlsSetupError> {
        if lacks_domain(&config.ehlo_name) {
            tracing::warn!(
                name = config.ehlo_name,
                "SMTP servers that look at the name given in EHLO refuse mail from one without a domain: set \
                 POSTROOM_EHLO_NAME to a name in DNS"
            );
        }
        Self::tuned(config, resolver, caps, metrics, Tuning::default())
    }

    pub(super) fn tuned(
        config: config::Smtp,
        resolver: Arc<dyn Resolver>,
        caps: Arc<dyn ConnectionCaps>,
        metrics: Arc<Metrics>,
        tuning: Tuning,
    ) -> Result<Arc<Self>, TlsSetupError> {
        let pools = Arc::new(Self {
            core: Core::new(config, resolver, caps, metrics, tuning)?,
            accounts: Mutex::default(),
        });
        tokio::spawn(sweep(Arc::downgrade(&pools), tuning.sweep));
        Ok(pools)
    }

    /// What could be checked out of an account now without waiting. Cheap.
    #[must_use]
    pub fn capacity(&self, key: &AccountKey) -> Capacity {
        self.capacity_within(key, None)
    }

    /// The same, for an account that may not have been seen yet, given its `max_connections`.
    #[must_use]
    pub fn capacity_within(&self, key: &AccountKey, max_connections: Option<u32>) -> Capacity {
        match self.known(key) {
            Some(pool) => pool.capacity(),
            None => Capacity {
                idle: 0,
                openable: self.bound(max_connections).places,
            },
        }
    }

    /// Connections of an account in use now.
    #[must_use]
    pub fn checked_out(&self, key: &AccountKey) -> usize {
        self.known(key).map_or(0, |pool| pool.checked_out())
    }

    /// Gets a connection of an account: an idle one, or a new one while there may be more. Waits up to 5 s for a place,
    /// and at most half the time of an attempt.
    ///
    /// # Errors
    /// [`CheckoutError`].
    pub async fn checkout(&self, submission: &Arc<Submission>) -> Result<Lease, CheckoutError> {
        self.checkout_unless(submission, &|| false).await
    }

    /// The same, but whoever waited for a place looks first whether it is still worth while.
    ///
    /// # Errors
    /// [`CheckoutError`]; `Busy` also if `is_pointless` says so.
    pub async fn checkout_unless(
        &self,
        submission: &Arc<Submission>,
        is_pointless: &(dyn Fn() -> bool + Send + Sync),
    ) -> Result<Lease, CheckoutError> {
        let begun = Instant::now();
        let deadline = begun + self.core.config.timeouts.attempt;
        let pool = self.account(submission);
        // A place that comes too late is none: running out of time would be told as the server's fault.
        let patience = self.core.tuning.wait.min(self.core.config.timeouts.attempt / 2);
        let place = match timeout(patience, pool.place()).await {
            Ok(Some(place)) if !self.core.is_closed() && !is_pointless() => place,
            _ => return Err(CheckoutError::Busy),
        };
        let idle = timeout_at(deadline.into(), self.idle(&pool, submission.version)).await;
        let (idle, spare) = idle.unwrap_or_default();
        let home = Home::Pool {
            place,
            submission: Arc::clone(submission),
        };
        if let Some(entry) = idle {
            return Ok(Lease::new(Arc::clone(&self.core), entry, home, true, begun));
        }
        let cap = match self.cap(submission, spare).await {
            // Quicker than the waiting room, if it comes back soon.
            Err(CheckoutError::Busy) => match self.own(&pool, submission.version).await {
                Some(entry) => return Ok(Lease::new(Arc::clone(&self.core), entry, home, true, begun)),
                None => return Err(self.denied(&pool)),
            },
            cap => cap?,
        };
        let connected = self.core.connect(&submission.server, deadline).await;
        let connection = connected.map_err(CheckoutError::Failed)?;
        let entry = self.core.entry(connection, submission.version, cap);
        Ok(Lease::new(Arc::clone(&self.core), entry, home, false, begun))
    }

    /// A connection for one mail, outside all pools.
    ///
    /// # Errors
    /// Connecting or logging in failed, before MAIL.
    pub async fn connect_once(&self, server: &Server) -> Result<Lease, Failure> {
        let begun = Instant::now();
        let deadline = begun + self.core.config.timeouts.attempt;
        let connection = self.core.connect(server, deadline).await?;
        let entry = self.core.entry(connection, 0, None);
        let home = Home::Outside(Box::new(server.clone()));
        Ok(Lease::new(Arc::clone(&self.core), entry, home, false, begun))
    }

    /// Time limit for everything of a transaction up to the last byte of the mail.
    #[must_use]
    pub fn attempt_limit(&self) -> Duration {
        self.core.config.timeouts.attempt
    }

    /// Says goodbye on all idle connections and waits, for a few seconds at most, until all is closed and given back.
    /// Connections in use close when their leases are dropped.
    pub async fn close(&self) {
        self.core.shut();
        let pools: Vec<Arc<AccountPool>> = self.lock().drain().map(|(_, pool)| pool).collect();
        for pool in pools {
            for entry in pool.drain(|_| true) {
                self.core.retire(entry, pool.try_place());
            }
        }
        self.core.caps.tasks.close();
        let _ = timeout(CLOSE_LIMIT, self.core.caps.tasks.wait()).await;
    }

    /// The latest idle connection that still lives, and a lease on the shared cap left over from a dead one.
    async fn idle(&self, pool: &Arc<AccountPool>, version: i64) -> (Option<Entry>, Option<CapLease>) {
        let mut spare = None;
        while let Some(mut entry) = pool.take_idle(version) {
            if self.core.is_alive(&mut entry).await {
                entry.use_now();
                return (Some(entry), spare);
            }
            spare = entry.into_cap().or(spare);
        }
        (None, spare)
    }

    /// A place under the shared cap, for accounts that have one.
    async fn cap(
        &self,
        submission: &Submission,
        spare: Option<CapLease>,
    ) -> Result<Option<CapLease>, CheckoutError> {
        let Some(cap) = submission.max_connections else {
            return Ok(None);
        };
        if spare.is_some() {
            return Ok(spare);
        }
        match self.core.caps.acquire(&submission.key, cap).await {
            Ok(Some(lease)) => Ok(Some(lease)),
            Ok(None) => Err(CheckoutError::Busy),
            Err(error) => Err(CheckoutError::Failed(Failure::transient(
                Class::Local,
                Fault::Us,
                Stage::Connect,
                "connection_cap_unavailable",
                format!("The cap on connections could not be asked: {error}"),
            ))),
        }
    }

    /// A connection of this worker that comes back soon.
    async fn own(&self, pool: &AccountPool, version: i64) -> Option<Entry> {
        let returned = timeout(self.core.tuning.own_wait, pool.next_returned(version));
        let mut entry = returned.await.ok()??;
        if !self.core.is_alive(&mut entry).await {
            return None;
        }
        entry.use_now();
        Some(entry)
    }

    fn denied(&self, pool: &AccountPool) -> CheckoutError {
        pool.count_as_full(self.core.tuning.full_for);
        self.core.denied.inc();
        CheckoutError::Busy
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<AccountKey, Arc<AccountPool>>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, key: &AccountKey) -> Option<Arc<AccountPool>> {
        self.lock().get(key).cloned()
    }

    /// The account's pool, brought to the version of the submission if that is newer, and to its bound.
    fn account(&self, submission: &Submission) -> Arc<AccountPool> {
        let bound = self.bound(submission.max_connections);
        let pool = {
            let mut accounts = self.lock();
            if let Some(pool) = accounts.get(&submission.key) {
                Arc::clone(pool)
            } else {
                let pool = Arc::new(AccountPool::new(submission.version, bound));
                accounts.insert(submission.key.clone(), Arc::clone(&pool));
                pool
            }
        };
        for outdated in pool.adopt(submission.version, bound) {
            self.core.retire(outdated, pool.try_place());
        }
        pool
    }

    fn bound(&self, max_connections: Option<u32>) -> Bound {
        let own = self.core.config.pool_size.max(1);
        Bound {
            places: max_connections.map_or(own, |most| own.min(most.max(1) as usize)),
            is_shared: max_connections.is_some(),
        }
    }

    /// Closes idle connections that count against a cap and that other workers want. Asks nobody when there are none.
    async fn give_up_wanted(&self) {
        let idling: Vec<(AccountKey, Arc<AccountPool>)> = {
            let accounts = self.lock();
            let idling = accounts.iter().filter(|(_, pool)| pool.idles_under_cap());
            idling
                .map(|(key, pool)| (key.clone(), Arc::clone(pool)))
                .collect()
        };
        if idling.is_empty() {
            return;
        }
        let wanted = self.core.caps.wanted().await;
        for (_, pool) in idling.into_iter().filter(|(key, _)| wanted.contains(key)) {
            for entry in pool.drain(Entry::is_capped) {
                self.core.retire(entry, pool.try_place());
            }
        }
    }

    fn look_after_idle(&self) {
        let now = Instant::now();
        let pools: Vec<Arc<AccountPool>> = self.lock().values().cloned().collect();
        for pool in pools {
            for entry in pool.drain(|entry| !self.core.may_idle(entry, now)) {
                self.core.retire(entry, pool.try_place());
            }
        }
        // Nobody but the map knows a pool without connections: it need not be remembered.
        self.lock()
            .retain(|_, pool| Arc::strong_count(pool) > 1 || !pool.is_unused());
    }
}

async fn sweep(pools: Weak<Pools>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let Some(pools) = pools.upgrade() else { return };
        if pools.core.is_closed() {
            return;
        }
        pools.look_after_idle();
        pools.give_up_wanted().await;
        pools.core.caps.restate().await;
    }
}
