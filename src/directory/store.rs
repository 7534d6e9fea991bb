//! Changes to the directory: what the operator's commands do. Every change is one transaction, the rate limiter's
//! rows included.

mod account;
mod change;
mod tenant;

use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::Transaction;
use tokio_postgres::types::Type;

pub use super::row::{StoredAccount, StoredTenant};
pub use change::AccountChange;
pub use tenant::TenantChange;

use super::DirectoryError;
use super::limits::{self, Limit};
use crate::db::{Database, DbError};
use crate::id::TenantId;
use crate::secret::Keyring;

/// Time limit of one change.
const LIMIT: Duration = Duration::from_secs(30);
/// Longest name, host or user name, in bytes.
const MAX_TEXT: usize = 255;

/// The stored directory. Secrets are sealed on the way in and never come out.
#[derive(Debug, Clone)]
pub struct Store {
    db: Database,
    keys: Option<Arc<Keyring>>,
}

impl Store {
    /// A store; without keys it can do everything but store passwords.
    #[must_use]
    pub fn new(db: Database, keys: Option<Arc<Keyring>>) -> Self {
        Self { db, keys }
    }

    /// The rate limiter's row of `key` (`acme/` for a tenant, `acme/main` for an account) gets these limits.
    async fn set_limits(
        &self,
        tx: &Transaction<'_>,
        key: &str,
        list: &[Limit],
    ) -> Result<(), DirectoryError> {
        let sql = self.db.sql("SELECT {s}.set_limits_v1($1, $2)");
        let json = limits::to_json(list);
        tx.query_typed(&sql, &[(&key, Type::TEXT), (&json, Type::JSONB)])
            .await?;
        Ok(())
    }

    /// The account's cap on connections over all workers; `None` removes it.
    async fn set_cap(&self, tx: &Transaction<'_>, key: &str, cap: Option<u32>) -> Result<(), DirectoryError> {
        let sql = self.db.sql("SELECT {s}.set_connection_cap_v1($1, $2)");
        let cap = cap.map(|cap| cap as i32);
        tx.query_typed(&sql, &[(&key, Type::TEXT), (&cap, Type::INT4)])
            .await?;
        Ok(())
    }

    /// Locks the tenant's row, so that changes to the tenant and its accounts come one after the other.
    async fn lock_tenant(&self, tx: &Transaction<'_>, tenant: &TenantId) -> Result<(), DirectoryError> {
        let sql = self.db.sql("SELECT FROM {s}.tenant WHERE id = $1 FOR UPDATE");
        tx.query_typed_opt(&sql, &[(&tenant.as_str(), Type::TEXT)])
            .await?
            .map(|_| ())
            .ok_or_else(|| DirectoryError::NoTenant(tenant.clone()))
    }
}

/// Bounds the time of a piece of work on the database.
async fn within<T>(work: impl Future<Output = Result<T, DirectoryError>>) -> Result<T, DirectoryError> {
    tokio::time::timeout(LIMIT, work)
        .await
        .map_err(|_| DirectoryError::Database(DbError::Timeout))?
}

/// A short text without control characters.
fn check_text(what: &str, text: &str) -> Result<(), DirectoryError> {
    if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
        return Err(DirectoryError::Invalid(format!(
            "{what} must be at most {MAX_TEXT} bytes without control characters"
        )));
    }
    Ok(())
}

/// A number that fits its column; 0 means none.
fn optional_number(what: &str, number: u32) -> Result<Option<u32>, DirectoryError> {
    if number > i32::MAX as u32 {
        return Err(DirectoryError::Invalid(format!("{what} is at most {}", i32::MAX)));
    }
    Ok((number > 0).then_some(number))
}

#[cfg(test)]
mod tests;
