//! Resolve: who sends a job, and who sends instead while accounts are in trouble.

use std::sync::Arc;
use std::time::Duration;

use super::attempt::Pipeline;
use super::task::Task;
use super::{Attempt, Verdict};
use crate::directory::{Chosen, DirectoryError, TenantEntry, Via, overrides, sender};
use crate::failure::{Class, Failure, Fault, Stage};
use crate::id::TenantId;
use crate::job::MailJob;
use crate::ledger::WaitReason;
use crate::secret::SharedKeyring;

/// The two entries a sender is chosen from.
#[derive(Debug)]
pub struct Entries {
    /// The job's tenant.
    pub tenant: Arc<TenantEntry>,
    /// The platform.
    pub platform: Option<Arc<TenantEntry>>,
}

impl Entries {
    /// Whether a send through `chosen` counts against any limit: the tenant's, the account's, or that of the platform, whose
    /// account it may be.
    #[must_use]
    pub fn limit(&self, chosen: &Chosen) -> bool {
        let platform = self.platform.as_ref().filter(|_| chosen.via == Via::Platform);
        self.tenant.tenant.limited
            || chosen.account.limited
            || platform.is_some_and(|platform| platform.tenant.limited)
    }
}

impl Pipeline {
    /// Who sends a job, and from which entries that was chosen. A refusal is never said from memory: tenant or account may
    /// have been set up a moment ago.
    ///
    /// # Errors
    /// `Failed`: why nobody sends. `GiveBack`: the directory does not answer.
    pub async fn resolve(&self, job: &MailJob) -> Result<(Entries, Chosen), Verdict> {
        let resolved = self.look_up(job).await;
        match resolved {
            Err(Verdict::Failed(failure)) if !failure.is_transient() => {
                self.directory.forget(&[&job.tenant, &TenantId::platform()]);
                self.look_up(job).await
            }
            resolved => resolved,
        }
    }

    async fn look_up(&self, job: &MailJob) -> Result<(Entries, Chosen), Verdict> {
        let entries = self.entries(&job.tenant).await?;
        let overrides = self.keys.overrides.as_ref().map(SharedKeyring::current);
        let opened = overrides::open_override(job, &self.keys.encryption.current(), overrides.as_deref());
        let chosen = opened
            .and_then(|opened| sender::choose(job, &entries.tenant, entries.platform.as_deref(), opened))
            .map_err(Verdict::Failed)?;
        Ok((entries, chosen))
    }

    /// The tenant's accounts and the platform's. A directory that does not answer is our trouble: the job goes back. A row
    /// that cannot be read concerns those it is for, until somebody mends it.
    async fn entries(&self, tenant: &TenantId) -> Result<Entries, Verdict> {
        let unreadable = |error: DirectoryError| {
            tracing::warn!(%error, "the directory cannot be read");
            match error {
                DirectoryError::Row { .. } => Verdict::Failed(Failure::transient(
                    Class::Local,
                    Fault::Us,
                    Stage::Resolve,
                    "configuration_unreadable",
                    "The settings of the tenant or of one of its accounts cannot be read",
                )),
                _ => Verdict::GiveBack,
            }
        };
        let entry = match self.directory.tenant(tenant).await.map_err(unreadable)? {
            Some(entry) => entry,
            None => Arc::new(sender::unknown_tenant(tenant, self.unknown_tenant).map_err(Verdict::Failed)?),
        };
        let platform = self
            .directory
            .tenant(&TenantId::platform())
            .await
            .map_err(unreadable)?;
        Ok(Entries {
            tenant: entry,
            platform,
        })
    }

    /// How long the account of `chosen` is to be left alone. An account that the job was not admitted under may be tried
    /// as soon as its cooldown is over: nobody else may come to do it.
    pub(super) fn trouble(&self, task: &Task, chosen: &Chosen) -> Option<Duration> {
        if chosen.via == Via::Override {
            return None;
        }
        let wait = self.batches.health().wait(&chosen.account.key)?;
        let is_own = chosen.account.key == task.row.account;
        let may_try = if is_own { task.row.probe } else { wait.is_zero() };
        (!may_try).then_some(wait)
    }

    /// Who sends while accounts are in trouble: `chosen` if it is not, else the platform if it may, else nobody yet. No
    /// attempt, and no slot.
    pub(super) fn healthy(
        &self,
        task: &Task,
        attempt: &mut Attempt,
        entries: &Entries,
        chosen: Chosen,
    ) -> Result<Chosen, Verdict> {
        let Some(delay) = self.trouble(task, &chosen) else {
            return Ok(chosen);
        };
        let platform = entries.platform.as_deref();
        let other = sender::while_unhealthy(&chosen, &task.job, &entries.tenant, platform);
        if let Some(other) = other.filter(|other| self.trouble(task, other).is_none()) {
            return Ok(other);
        }
        is_for(attempt, &chosen);
        attempt.waits_for = (chosen.account.key != task.row.account).then(|| chosen.account.key.clone());
        Err(Verdict::Wait {
            reason: WaitReason::Unhealthy,
            delay,
        })
    }
}

/// Notes the tenant's own account that is to send, and the retries of whoever sends. Where another stands in for that account
/// the job is for it all the same.
pub(super) fn is_for(attempt: &mut Attempt, chosen: &Chosen) {
    if chosen.via == Via::Account {
        attempt.account = Some(chosen.account.key.account().into());
    }
    // An override has no schedule of its own: the installation's holds.
    attempt.retry = (chosen.via != Via::Override).then_some(chosen.account.retry);
}
