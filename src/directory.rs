//! Who may send, and through what: tenants, their accounts and limits, and the ladder that picks the sender of a job.
//!
//! [`cache`] answers the worker from memory, [`store`] is what the operator's commands change, [`sender`] decides who
//! sends, [`overrides`] opens the `smtp_override` of a job, [`limits`] are rate limits as they are written, [`row`] is how all
//! of it is stored.

use std::collections::HashMap;

use crate::address::Mailbox;
use crate::attachment::LargeFiles;
use crate::db::DbError;
use crate::id::{AccountId, AccountKey, TenantId};
use crate::job::{Fallback, OnUncertain};
use crate::retry::RetryPolicy;
use crate::secret::SecretError;
use crate::smtp::Server;

pub mod ca;
pub mod cache;
pub mod limits;
pub mod overrides;
pub mod row;
pub mod sender;
pub mod store;

pub use cache::Directory;
pub use sender::{Chosen, Via};
pub use store::Store;

#[cfg(test)]
pub(crate) mod scratch;

/// A tenant, as the worker sees it.
#[derive(Debug, Clone)]
pub struct Tenant {
    /// Its name in jobs and keys.
    pub id: TenantId,
    /// Name for people; the display name when the platform sends for it.
    pub name: Option<String>,
    /// Whether the platform may send for it.
    pub fallback: Fallback,
    /// What to do about uncertain outcomes.
    pub on_uncertain: OnUncertain,
    /// Whether it has rate limits of its own, over all its accounts.
    pub limited: bool,
    /// What to do with large attachments.
    pub large_files: LargeFiles,
}

/// An account ready for sending, its password in clear.
#[derive(Debug, Clone)]
pub struct Account {
    /// `tenant/account`.
    pub key: AccountKey,
    /// Rises with every change of host, port, TLS, credentials or certificate authority: connections of an older
    /// version are not used again. 0 for an override.
    pub version: i64,
    /// The SMTP server and how to log in. Without credentials while [`Account::locked`] is set.
    pub server: Server,
    /// The password could not be opened: do not send through this account, let its jobs wait.
    pub locked: Option<SecretError>,
    /// Whether it has rate limits.
    pub limited: bool,
    /// Connections at once, over all workers.
    pub max_connections: Option<u32>,
    /// Author of mails whose job names none.
    pub from: Option<Mailbox>,
    /// When and how often to try again.
    pub retry: RetryPolicy,
    /// Whether it is the tenant's default.
    pub is_default: bool,
}

/// A tenant with its accounts, read in one statement.
#[derive(Debug, Clone)]
pub struct TenantEntry {
    /// The tenant.
    pub tenant: Tenant,
    /// Its accounts.
    pub accounts: HashMap<AccountId, std::sync::Arc<Account>>,
    /// Which of them sends when the job names none.
    pub default: Option<AccountId>,
}

impl Tenant {
    /// What stands for a tenant that is not in the directory when the installation sends for unknown tenants
    /// (`POSTROOM_UNKNOWN_TENANT=platform`): the platform may send.
    #[must_use]
    pub fn unknown(id: TenantId) -> Self {
        Self {
            id,
            name: None,
            fallback: Fallback::Platform,
            on_uncertain: OnUncertain::default(),
            limited: false,
            large_files: LargeFiles::default(),
        }
    }
}

/// What went wrong with the directory.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The database.
    #[error(transparent)]
    Database(#[from] DbError),
    /// No such tenant.
    #[error("tenant `{0}` does not exist; create it with `postroom tenant set {0}`")]
    NoTenant(TenantId),
    /// No such account.
    #[error("account `{0}` does not exist; `postroom account list` shows those that do")]
    NoAccount(AccountKey),
    /// A new account lacks something.
    #[error("account `{key}` does not exist yet; to create it add {missing}")]
    Incomplete {
        /// The new account.
        key: AccountKey,
        /// The missing flags.
        missing: String,
    },
    /// What is asked for makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The platform is always there.
    #[error("the platform `-` cannot be removed; remove its accounts one by one")]
    Platform,
    /// Its jobs would be left behind.
    #[error(
        "jobs of tenant `{0}` wait, and would fail without it: `postroom job list --tenant {0} --state waiting` shows them; \
         with --fail-waiting it is removed all the same"
    )]
    JobsWait(TenantId),
    /// A password needs a key.
    #[error(
        "passwords are stored sealed: set POSTROOM_ENCRYPTION_KEYS (`postroom key generate` makes a key)"
    )]
    NoKeys,
    /// The keys do not fit what is stored.
    #[error(transparent)]
    Keys(#[from] crate::secret::stored::StoredError),
    /// A row that this program cannot read.
    #[error("{what}: {reason}; set it anew")]
    Row {
        /// Which one.
        what: String,
        /// What is wrong.
        reason: String,
    },
}

impl From<tokio_postgres::Error> for DirectoryError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error.into())
    }
}

impl DirectoryError {
    /// Whether the command was used wrongly (exit code 2), as opposed to having failed (exit code 1).
    #[must_use]
    pub fn is_wrong_use(&self) -> bool {
        matches!(
            self,
            Self::Incomplete { .. } | Self::Invalid(_) | Self::Platform | Self::JobsWait(_)
        )
    }
}
