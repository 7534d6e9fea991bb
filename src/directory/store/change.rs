//! What can be changed about an account, and what a change makes of it.

use std::net::IpAddr;
use std::time::Duration;

use secrecy::SecretString;

use super::{StoredAccount, check_text, optional_number};
use crate::address::Mailbox;
use crate::directory::DirectoryError;
use crate::directory::limits::LimitChanges;
use crate::id::{AccountId, AccountKey, TenantId};
use crate::job::TlsMode;

/// What is to be changed about an account; what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct AccountChange {
    /// SMTP host.
    pub host: Option<String>,
    /// SMTP port.
    pub port: Option<u16>,
    /// How connections are protected.
    pub tls: Option<TlsMode>,
    /// User name; empty removes user name and password.
    pub username: Option<String>,
    /// Password, in clear; it is sealed before it leaves this process.
    pub password: Option<SecretString>,
    /// Whether the password may be sent over an unencrypted connection.
    pub allow_plaintext_auth: Option<bool>,
    /// Certificate authorities, PEM; empty removes them.
    pub ca_pem: Option<String>,
    /// Author of mails whose job names none; `Some(None)` removes it.
    pub from: Option<Option<Mailbox>>,
    /// Rate limits.
    pub limits: LimitChanges,
    /// Connections at once, over all workers; 0 removes the cap.
    pub max_connections: Option<u32>,
    /// Attempts before a job fails; 0 for the installation's default.
    pub max_attempts: Option<u32>,
    /// Age at which a job fails; 0 for the installation's default.
    pub max_age: Option<Duration>,
    /// Makes it the tenant's default instead of the one that was.
    pub make_default: bool,
}

impl AccountChange {
    /// A new account, before the change is applied to it.
    pub(super) fn blank(&self, tenant: &TenantId, id: &AccountId) -> Result<StoredAccount, DirectoryError> {
        let (Some(host), Some(port), Some(tls)) = (self.host.clone(), self.port, self.tls) else {
            let flags = [
                ("--host", self.host.is_none()),
                ("--port", self.port.is_none()),
                ("--tls", self.tls.is_none()),
            ];
            let missing: Vec<_> = flags
                .iter()
                .filter(|(_, missing)| *missing)
                .map(|(flag, _)| *flag)
                .collect();
            return Err(DirectoryError::Incomplete {
                key: AccountKey::new(tenant, id),
                missing: missing.join(", "),
            });
        };
        Ok(StoredAccount {
            tenant: tenant.clone(),
            id: id.clone(),
            host,
            port,
            tls,
            username: None,
            password: None,
            allow_plaintext_auth: false,
            ca_pem: None,
            from: None,
            limits: Vec::new(),
            max_connections: None,
            max_attempts: None,
            max_age: None,
            is_default: false,
            version: 0,
        })
    }

    /// Everything but the password.
    pub(super) fn apply(&self, account: &StoredAccount) -> Result<StoredAccount, DirectoryError> {
        let mut next = account.clone();
        if let Some(host) = &self.host {
            check_host(host)?;
            next.host.clone_from(host);
        }
        if self.port == Some(0) {
            return Err(DirectoryError::Invalid("the port must be 1 to 65535".to_owned()));
        }
        next.port = self.port.unwrap_or(next.port);
        next.tls = self.tls.unwrap_or(next.tls);
        if let Some(username) = &self.username {
            check_text("the user name", username)?;
            next.username = (!username.is_empty()).then(|| username.clone());
        }
        next.allow_plaintext_auth = self.allow_plaintext_auth.unwrap_or(next.allow_plaintext_auth);
        if let Some(pem) = &self.ca_pem {
            next.ca_pem = (!pem.is_empty()).then(|| pem.clone());
        }
        if let Some(from) = &self.from {
            next.from.clone_from(from);
        }
        next.limits = self
            .limits
            .apply(&account.limits)
            .map_err(DirectoryError::Invalid)?;
        if let Some(cap) = self.max_connections {
            next.max_connections = optional_number("the number of connections", cap)?;
        }
        if let Some(attempts) = self.max_attempts {
            next.max_attempts = optional_number("the number of attempts", attempts)?;
        }
        if let Some(age) = self.max_age {
            next.max_age = (age.as_secs() > 0).then_some(age);
        }
        next.is_default |= self.make_default;
        Ok(next)
    }
}

/// Whether connections made with the one must not be used for the other.
pub(super) fn connects_differently(a: &StoredAccount, b: &StoredAccount) -> bool {
    (&a.host, a.port, a.tls) != (&b.host, b.port, b.tls)
        || (&a.username, &a.password, &a.ca_pem) != (&b.username, &b.password, &b.ca_pem)
}

fn check_host(host: &str) -> Result<(), DirectoryError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let is_address = bare.unwrap_or(host).parse::<IpAddr>().is_ok();
    let is_name = !host.is_empty() && host.len() <= 253 && host.bytes().all(allowed);
    if is_name || is_address {
        return Ok(());
    }
    Err(DirectoryError::Invalid(
        "the host must be a host name (international ones in their xn-- form) or an address, its port apart (--port)"
            .to_owned(),
    ))
}
