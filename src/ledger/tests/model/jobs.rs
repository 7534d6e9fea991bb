//! The jobs, and what the world outside the database knows of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytes::Bytes;

use super::super::world::{account, job, tenant};
use crate::id::{AccountKey, JobId, TenantId};
use crate::ledger::settle::Body;
use crate::level::Level;

/// Which job.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) tenant: TenantId,
    pub(super) id: JobId,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.id)
    }
}

/// A server took the mail for a recipient.
#[derive(Debug, Clone)]
pub(super) struct Acceptance {
    pub(super) address: String,
    /// A crash or a stall came before it was committed: it may have been forgotten.
    pub(super) excused: bool,
    /// How often an operator had let the job go by then.
    pub(super) let_go: u32,
}

/// What is known of a job outside the database.
#[derive(Debug, Clone)]
pub(super) struct Knowledge {
    pub(super) account: AccountKey,
    pub(super) level: Level,
    pub(super) recipients: u32,
    /// `on_uncertain = hold`.
    pub(super) hold: bool,
    /// Messages at the broker, ready for delivery.
    pub(super) ready: u32,
    pub(super) acceptances: Vec<Acceptance>,
    /// How often an operator released it.
    pub(super) let_go: u32,
    /// Numbers of the reports that were ever in its outbox.
    pub(super) owed: BTreeSet<i64>,
    /// Numbers of its final reports, in the outbox or published.
    pub(super) finals: BTreeSet<i64>,
    /// Its published reports by number.
    pub(super) published: BTreeMap<i64, serde_json::Value>,
}

impl Knowledge {
    pub(super) fn addresses(&self) -> Vec<String> {
        (0..self.recipients).map(|n| format!("{n}@b.example")).collect()
    }

    pub(super) fn body(&self) -> Body {
        Body {
            bytes: Bytes::from_static(b"{}"),
            properties: format!(r#"{{"recipients": {}}}"#, self.recipients),
        }
    }
}

/// Twelve jobs of either tenant, some by its own account, some by the one both may use.
pub(super) fn all() -> BTreeMap<Key, Knowledge> {
    let mut jobs = BTreeMap::new();
    for n in 0..24 {
        let owner = ["acme", "beta"][n % 2];
        let sender = if n % 3 == 0 { "platform" } else { owner };
        let key = Key {
            tenant: tenant(owner),
            id: job(&format!("{n}")),
        };
        let job = Knowledge {
            account: account(&format!("{sender}/main")),
            level: [Level::Medium, Level::Low][n / 2 % 2],
            recipients: 1 + (n / 4 % 3) as u32,
            hold: n % 5 < 2,
            ready: 1,
            acceptances: Vec::new(),
            let_go: 0,
            owed: BTreeSet::new(),
            finals: BTreeSet::new(),
            published: BTreeMap::new(),
        };
        jobs.insert(key, job);
    }
    jobs
}

/// The keys a send counts against, as `charged_keys` has them.
pub(super) fn charged(tenant: &TenantId, account: &str) -> Vec<String> {
    let owner = account.split('/').next().unwrap_or_default();
    let mut keys = vec![format!("{tenant}/")];
    if owner != tenant.as_str() {
        keys.push(format!("{owner}/"));
    }
    keys.push(account.to_owned());
    keys
}
