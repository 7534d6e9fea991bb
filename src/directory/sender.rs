//! The ladder that picks who sends a job:
//!
//! 1. the `smtp_override` of the job;
//! 2. the account the job names;
//! 3. the tenant's default account;
//! 4. the platform's default account, if the policy (the job's, else the tenant's) is `platform`;
//! 5. nobody: a failure that says why, never silence.
//!
//! Pure functions: everything they need is passed in, so that every rung is a row of a table in the tests.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Account, Tenant, TenantEntry};
use crate::address::{Address, Mailbox};
use crate::config::UnknownTenant;
use crate::failure::{Class, Failure, Fault, KEY_UNKNOWN, Stage};
use crate::id::{AccountKey, TenantId};
use crate::job::{Fallback, MailJob, OverrideServer};
use crate::report;
use crate::retry::RetryPolicy;
use crate::secret::SecretError;
use crate::smtp::{Credentials, Server};

/// The platform sends because the tenant has no account for the job.
pub const NOT_CONFIGURED: &str = "not_configured";
/// The platform sends because the account's circuit is open.
pub const UNHEALTHY: &str = "unhealthy";
/// The platform sends because sending through the account failed before the mail was offered.
pub const SEND_ERROR: &str = "send_error";

/// Which rung of the ladder it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Via {
    /// The job's own server.
    Override,
    /// An account of the tenant.
    Account,
    /// The platform's default account.
    Platform,
}

impl Via {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Override => "override",
            Self::Account => "account",
            Self::Platform => "platform",
        }
    }
}

/// Who sends a job, and as whom.
#[derive(Debug, Clone)]
pub struct Chosen {
    /// The rung.
    pub via: Via,
    /// The account; for an override one made for this send, with key [`AccountKey::for_override`].
    pub account: Arc<Account>,
    /// Why the platform sends: [`NOT_CONFIGURED`], [`UNHEALTHY`] or [`SEND_ERROR`].
    pub reason: Option<&'static str>,
    /// The From header.
    pub from: Mailbox,
    /// The Reply-To header; none if empty.
    pub reply_to: Vec<Mailbox>,
    /// MAIL FROM. Always set today; `None` would be the null reverse-path.
    pub envelope_from: Option<Address>,
}

impl Chosen {
    /// What reports say about the sender.
    #[must_use]
    pub fn sender(&self) -> report::Sender {
        report::Sender {
            via: self.via.as_str(),
            account: (self.via != Via::Override).then(|| self.account.key.clone()),
            reason: self.reason,
        }
    }
}

/// What stands for a tenant that is not in the directory.
///
/// # Errors
/// `tenant_not_found` if the installation rejects unknown tenants.
pub fn unknown_tenant(id: &TenantId, policy: UnknownTenant) -> Result<TenantEntry, Failure> {
    match policy {
        UnknownTenant::Platform => Ok(TenantEntry {
            tenant: Tenant::unknown(id.clone()),
            accounts: HashMap::new(),
            default: None,
        }),
        UnknownTenant::Reject => Err(Failure::permanent(
            Class::Local,
            Fault::Sender,
            Stage::Resolve,
            "tenant_not_found",
            format!("there is no tenant `{id}`"),
        )),
    }
}

/// Goes down the ladder. `opened` is the job's override as [`super::overrides::open_override`] gave it; `platform` is
/// the entry of tenant `-`.
///
/// # Errors
/// Permanent `account_not_found`, `sender_not_configured` or `from_missing`; transient `key_unknown` or
/// `secret_unreadable` while the account's password does not open.
pub fn choose(
    job: &MailJob,
    entry: &TenantEntry,
    platform: Option<&TenantEntry>,
    opened: Option<OverrideServer>,
) -> Result<Chosen, Failure> {
    if let Some(server) = opened {
        return own(
            job,
            Arc::new(override_account(&job.tenant, server)),
            Via::Override,
        );
    }
    match find(job, entry) {
        Ok(account) => own(job, account, Via::Account),
        Err(missing) if !allows_platform(job, entry) => Err(missing),
        Err(mut missing) => {
            let Some(account) = platform.and_then(default_account) else {
                missing
                    .message
                    .push_str("; the platform, which may send instead, has no default account");
                return Err(missing);
            };
            as_platform(job, entry, account, job.from.as_ref(), NOT_CONFIGURED)
        }
    }
}

/// Who sends instead after sending through `chosen` failed, if anybody: only if the policy says so, and only after a
/// failure of the account or its server before MAIL FROM. Never after a fault of the recipient or the content, and
/// never when the server may have taken the mail.
#[must_use]
pub fn after_failure(
    chosen: &Chosen,
    failure: &Failure,
    job: &MailJob,
    entry: &TenantEntry,
    platform: Option<&TenantEntry>,
) -> Option<Chosen> {
    let before_mail = matches!(failure.stage, Stage::Connect | Stage::Auth);
    let of_account = match failure.class {
        Class::Auth | Class::Tls | Class::Infrastructure => true,
        Class::Policy => failure.fault == Fault::Provider,
        // A provider that asks for patience gets it; our own trouble would be the platform's as well.
        Class::Recipient | Class::Content | Class::Rate | Class::Local => false,
    };
    let at_fault = matches!(failure.fault, Fault::Provider | Fault::Sender);
    (before_mail && of_account && at_fault)
        .then(|| instead_of(chosen, job, entry, platform, SEND_ERROR))
        .flatten()
}

/// Who sends instead while the circuit of `chosen`'s account is open, if the policy says so.
#[must_use]
pub fn while_unhealthy(
    chosen: &Chosen,
    job: &MailJob,
    entry: &TenantEntry,
    platform: Option<&TenantEntry>,
) -> Option<Chosen> {
    instead_of(chosen, job, entry, platform, UNHEALTHY)
}

/// Whether [`while_unhealthy`] would name somebody. Cheap.
#[must_use]
pub fn may_detour(
    chosen: &Chosen,
    job: &MailJob,
    entry: &TenantEntry,
    platform: Option<&TenantEntry>,
) -> bool {
    chosen.via == Via::Account && allows_platform(job, entry) && platform.and_then(default_account).is_some()
}

fn instead_of(
    chosen: &Chosen,
    job: &MailJob,
    entry: &TenantEntry,
    platform: Option<&TenantEntry>,
    reason: &'static str,
) -> Option<Chosen> {
    if chosen.via == Via::Platform || !allows_platform(job, entry) {
        return None;
    }
    as_platform(
        job,
        entry,
        default_account(platform?)?,
        Some(&chosen.from),
        reason,
    )
    .ok()
}

fn allows_platform(job: &MailJob, entry: &TenantEntry) -> bool {
    job.fallback.unwrap_or(entry.tenant.fallback) == Fallback::Platform
}

fn default_account(entry: &TenantEntry) -> Option<Arc<Account>> {
    entry.accounts.get(entry.default.as_ref()?).map(Arc::clone)
}

/// The named account, else the default.
fn find(job: &MailJob, entry: &TenantEntry) -> Result<Arc<Account>, Failure> {
    let tenant = &entry.tenant.id;
    if let Some(name) = &job.account {
        return entry.accounts.get(name).map(Arc::clone).ok_or_else(|| {
            let message = format!("tenant `{tenant}` has no account `{name}`");
            Failure::permanent(
                Class::Local,
                Fault::Sender,
                Stage::Resolve,
                "account_not_found",
                message,
            )
        });
    }
    default_account(entry).ok_or_else(|| {
        let message = if entry.accounts.is_empty() {
            format!("tenant `{tenant}` has no account")
        } else {
            format!("the job names no account and tenant `{tenant}` has no default one")
        };
        Failure::permanent(
            Class::Local,
            Fault::Us,
            Stage::Resolve,
            "sender_not_configured",
            message,
        )
    })
}

/// The tenant sends as itself.
fn own(job: &MailJob, account: Arc<Account>, via: Via) -> Result<Chosen, Failure> {
    check_unlocked(&account)?;
    let from = job
        .from
        .as_ref()
        .or(account.from.as_ref())
        .cloned()
        .ok_or_else(|| {
            let message = "neither the job nor the sending account names a From address";
            Failure::permanent(
                Class::Content,
                Fault::Sender,
                Stage::Resolve,
                "from_missing",
                message,
            )
        })?;
    Ok(Chosen {
        via,
        envelope_from: Some(job.return_path.as_ref().unwrap_or(&from.address).clone()),
        account,
        reason: None,
        from,
        reply_to: job.reply_to.clone(),
    })
}

/// The platform sends for the tenant: from its own address, or the mail would fail SPF and DMARC, with the tenant's
/// name, and answers go to whom the mail was from.
fn as_platform(
    job: &MailJob,
    entry: &TenantEntry,
    account: Arc<Account>,
    original: Option<&Mailbox>,
    reason: &'static str,
) -> Result<Chosen, Failure> {
    check_unlocked(&account)?;
    let own = account.from.clone().ok_or_else(|| {
        let message = format!(
            "account `{}` has no From address: set one with --from",
            account.key
        );
        Failure::permanent(Class::Local, Fault::Us, Stage::Resolve, "from_missing", message)
    })?;
    let original_name = original.and_then(|original| original.name.as_ref());
    let name = entry.tenant.name.as_ref().or(original_name).cloned().or(own.name);
    let reply_to = if job.reply_to.is_empty() {
        original
            .filter(|original| original.address != own.address)
            .cloned()
            .into_iter()
            .collect()
    } else {
        job.reply_to.clone()
    };
    Ok(Chosen {
        via: Via::Platform,
        account,
        reason: Some(reason),
        envelope_from: Some(own.address.clone()),
        from: Mailbox {
            name,
            address: own.address,
        },
        reply_to,
    })
}

/// Jobs wait, rather than fail, for a key that somebody forgot to roll out.
fn check_unlocked(account: &Account) -> Result<(), Failure> {
    let Some(error) = &account.locked else {
        return Ok(());
    };
    let reason = match error {
        SecretError::UnknownKey { .. } => KEY_UNKNOWN,
        SecretError::Corrupt | SecretError::Format => "secret_unreadable",
    };
    let message = format!("the password of account `{}`: {error}", account.key);
    Err(Failure::transient(
        Class::Local,
        Fault::Us,
        Stage::Resolve,
        reason,
        message,
    ))
}

/// An account for one send.
fn override_account(tenant: &TenantId, server: OverrideServer) -> Account {
    let credentials = server
        .credentials
        .map(|(username, password)| Credentials { username, password });
    Account {
        key: AccountKey::for_override(tenant),
        version: 0,
        server: Server {
            host: server.host,
            port: server.port,
            tls: server.tls,
            credentials,
            allow_plaintext_auth: server.allow_plaintext_auth,
            ca_pem: None,
            trusted: false,
        },
        locked: None,
        limited: false,
        max_connections: None,
        from: None,
        retry: RetryPolicy::default(),
        is_default: false,
    }
}

#[cfg(test)]
mod tests;
