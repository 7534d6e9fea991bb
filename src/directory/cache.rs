//! The directory as the worker reads it: from memory, seconds old at most, many tenants in one statement.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::row::{self, StoredAccount, StoredTenant};
use super::{Account, DirectoryError, Tenant, TenantEntry};
use crate::db::{Database, DbError};
use crate::id::TenantId;
use crate::retry::RetryPolicy;
use crate::secret::{Keyring, SharedKeyring, stored};
use crate::smtp::{Credentials, Server};

/// A tenant is read again when what is known of it is this old: so long a change takes to arrive everywhere.
const FRESH: Duration = Duration::from_secs(2);
/// The same for a tenant that does not exist: one that has just been made should be found soon.
const FRESH_ABSENT: Duration = Duration::from_secs(1);
/// Tenants in memory at most. Names come from jobs, so it must be bounded.
const CAPACITY: usize = 20_000;
/// Tenants per statement.
const BATCH: usize = 500;
/// Time limit of one read.
const LIMIT: Duration = Duration::from_secs(10);

/// What reading a tenant gave: one whose rows make no sense must not fail the others of its statement.
type Answer = Result<Option<Arc<TenantEntry>>, DirectoryError>;

struct Known {
    entry: Option<Arc<TenantEntry>>,
    since: Instant,
    /// Somebody has asked for it since it was read.
    used: bool,
}

impl Known {
    fn is_fresh(&self) -> bool {
        let limit = if self.entry.is_some() { FRESH } else { FRESH_ABSENT };
        self.since.elapsed() < limit
    }

    /// Whether it will soon be asked for when it has to be read again.
    fn is_due_soon(&self) -> bool {
        self.used && self.entry.is_some() && self.since.elapsed() > FRESH / 2
    }
}

/// Tenants and their accounts, cached. Share one per process.
pub struct Directory {
    db: Database,
    keys: SharedKeyring,
    retry: RetryPolicy,
    sql: String,
    known: Mutex<HashMap<TenantId, Known>>,
    /// Tenants somebody waits for while another read is under way: the next one reads them all.
    wanted: Mutex<Vec<TenantId>>,
    reading: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory")
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

impl Directory {
    /// An empty cache over the database; passwords are opened with `keys`, and accounts follow `retry` where they set
    /// nothing themselves.
    #[must_use]
    pub fn new(db: Database, keys: impl Into<SharedKeyring>, retry: RetryPolicy) -> Self {
        let (tenant, account) = (row::TENANT_COLUMNS, row::ACCOUNT_COLUMNS);
        let sql = db.sql(&format!(
            "SELECT {tenant}, {account} FROM {{s}}.tenant t LEFT JOIN {{s}}.account a ON a.tenant = t.id \
             WHERE t.id = ANY($1)"
        ));
        Self {
            db,
            keys: keys.into(),
            retry,
            sql,
            known: Mutex::default(),
            wanted: Mutex::default(),
            reading: tokio::sync::Mutex::default(),
        }
    }

    /// The tenant, or `None` if there is none. What is returned is a consistent snapshot, at most 2 s old.
    ///
    /// # Errors
    /// If it had to be read and the database failed. It may work later: let the job wait.
    pub async fn tenant(&self, id: &TenantId) -> Result<Option<Arc<TenantEntry>>, DirectoryError> {
        if let Some(entry) = self.fresh(id) {
            return Ok(entry);
        }
        self.read(std::slice::from_ref(id))
            .await?
            .remove(id)
            .unwrap_or(Ok(None))
    }

    /// Reads those of the tenants that are not known in as few statements as possible.
    ///
    /// # Errors
    /// As [`Directory::tenant`].
    pub async fn prefetch(&self, ids: &[TenantId]) -> Result<(), DirectoryError> {
        let missing: Vec<_> = ids
            .iter()
            .filter(|id| self.fresh(id).is_none())
            .cloned()
            .collect();
        if !missing.is_empty() {
            self.read(&missing).await?;
        }
        Ok(())
    }

    /// Forgets what is known of these, so that they are read anew: what ends a job is not to be said from memory.
    pub fn forget(&self, ids: &[&TenantId]) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for id in ids {
            known.remove(*id);
        }
    }

    /// What is known and fresh; the inner `None` says that there is no such tenant.
    #[expect(
        clippy::option_option,
        reason = "not known, known not to exist, and known are three things"
    )]
    fn fresh(&self, id: &TenantId) -> Option<Option<Arc<TenantEntry>>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_mut(id).filter(|known| known.is_fresh()).map(|known| {
            known.used = true;
            known.entry.clone()
        })
    }

    /// Reads tenants, together with those that others wait for; the answers hold at least these.
    async fn read(&self, ids: &[TenantId]) -> Result<HashMap<TenantId, Answer>, DirectoryError> {
        self.wanted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(ids);
        let _turn = self.reading.lock().await;
        let mut missing = std::mem::take(&mut *self.wanted.lock().unwrap_or_else(PoisonError::into_inner));
        // Once more: a read before this one may have taken them along and failed.
        missing.extend_from_slice(ids);
        missing.sort_unstable();
        missing.dedup();
        let mut answers = HashMap::with_capacity(missing.len());
        missing.retain(|id| match self.fresh(id) {
            Some(entry) => {
                answers.insert(id.clone(), Ok(entry));
                false
            }
            None => true,
        });
        self.add_those_due_soon(&mut missing);
        for chunk in missing.chunks(BATCH) {
            let read = tokio::time::timeout(LIMIT, self.query(chunk)).await;
            let read = read.map_err(|_| DbError::Timeout)??;
            self.remember(&read);
            answers.extend(read);
        }
        Ok(answers)
    }

    /// Fills the statement that has to be made with tenants in use that would need one of their own in a moment: with many
    /// of them, somebody would wait for one all the time.
    fn add_those_due_soon(&self, missing: &mut Vec<TenantId>) {
        if missing.is_empty() {
            return;
        }
        let room = missing.len().next_multiple_of(BATCH) - missing.len();
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let due = known.iter().filter(|(_, known)| known.is_due_soon());
        // What is no longer fresh may be among the missing.
        let due = due.filter(|(id, known)| known.is_fresh() || missing.binary_search(id).is_err());
        let due: Vec<_> = due.take(room).map(|(id, _)| id.clone()).collect();
        missing.extend(due);
    }

    async fn query(&self, ids: &[TenantId]) -> Result<HashMap<TenantId, Answer>, DirectoryError> {
        let names: Vec<&str> = ids.iter().map(TenantId::as_str).collect();
        let client = self.db.client().await?;
        let rows = client
            .query_typed(&self.sql, &[(&names, Type::TEXT_ARRAY)])
            .await?;
        drop(client);
        let mut entries: HashMap<&str, Result<TenantEntry, DirectoryError>> =
            HashMap::with_capacity(ids.len());
        for row in &rows {
            let slot = entries.entry(row.try_get(0)?).or_insert_with(|| {
                Ok(TenantEntry {
                    tenant: tenant_of(row::tenant(row)?),
                    accounts: HashMap::new(),
                    default: None,
                })
            });
            if let Ok(entry) = slot
                && let Err(error) = self.add_account(entry, row)
            {
                *slot = Err(error);
            }
        }
        let answer = |id: &TenantId| {
            entries
                .remove(id.as_str())
                .transpose()
                .map(|entry| entry.map(Arc::new))
        };
        Ok(ids.iter().cloned().zip(ids.iter().map(answer)).collect())
    }

    fn add_account(&self, entry: &mut TenantEntry, row: &Row) -> Result<(), DirectoryError> {
        if let Some(account) = row::account(row, row::TENANT_WIDTH)? {
            let id = account.id.clone();
            if account.is_default {
                entry.default = Some(id.clone());
            }
            entry.accounts.insert(
                id,
                Arc::new(account_of(account, &self.keys.current(), self.retry)),
            );
        }
        Ok(())
    }

    fn remember(&self, read: &HashMap<TenantId, Answer>) {
        let since = Instant::now();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() + read.len() > CAPACITY {
            known.retain(|_, known| known.is_fresh());
        }
        if known.len() + read.len() > CAPACITY {
            // Someone floods us with names. Start over: one statement per batch brings back what is in use.
            known.clear();
        }
        for (id, answer) in read {
            match answer {
                Ok(entry) => known.insert(
                    id.clone(),
                    Known {
                        entry: entry.clone(),
                        since,
                        used: false,
                    },
                ),
                Err(_) => known.remove(id),
            };
        }
    }
}

fn tenant_of(stored: StoredTenant) -> Tenant {
    Tenant {
        id: stored.id,
        name: stored.name,
        fallback: stored.fallback,
        on_uncertain: stored.on_uncertain,
        limited: !stored.limits.is_empty(),
        large_files: stored.large_files,
    }
}

/// Opens the password. One that does not open locks the account instead of failing the tenant.
fn account_of(stored: StoredAccount, keys: &Keyring, defaults: RetryPolicy) -> Account {
    let key = stored.key();
    let mut locked = None;
    let credentials = stored
        .username
        .zip(stored.password)
        .and_then(|(username, sealed)| {
            let aad = stored::account_password_aad(&stored.tenant, &stored.id);
            match keys.open(&sealed, &aad) {
                Ok(password) => Some(Credentials { username, password }),
                Err(error) => {
                    locked = Some(error);
                    None
                }
            }
        });
    Account {
        key,
        version: stored.version,
        server: Server {
            host: stored.host,
            port: stored.port,
            tls: stored.tls,
            credentials,
            allow_plaintext_auth: stored.allow_plaintext_auth,
            ca_pem: stored.ca_pem.map(Into::into),
            trusted: stored.tenant.is_platform(),
        },
        locked,
        limited: !stored.limits.is_empty(),
        max_connections: stored.max_connections,
        from: stored.from,
        retry: RetryPolicy {
            max_attempts: stored.max_attempts.unwrap_or(defaults.max_attempts),
            max_age: stored.max_age.unwrap_or(defaults.max_age),
            ..defaults
        },
        is_default: stored.is_default,
    }
}

#[cfg(test)]
mod tests;
