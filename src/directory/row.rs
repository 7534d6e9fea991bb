//! Tenants and accounts as they are stored, and how their rows are read.

use std::time::Duration;

use serde_json::Value;
use tokio_postgres::Row;

use super::DirectoryError;
use super::limits::{self, Limit};
use crate::address::Mailbox;
use crate::attachment::{LargeFileAction, LargeFiles};
use crate::id::{AccountId, AccountKey, TenantId};
use crate::job::{Fallback, OnUncertain, TlsMode};

/// A tenant as stored.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTenant {
    /// Its name in jobs and keys; `-` is the platform.
    pub id: TenantId,
    /// Name for people.
    pub name: Option<String>,
    /// Whether the platform may send for it.
    pub fallback: Fallback,
    /// What to do about uncertain outcomes.
    pub on_uncertain: OnUncertain,
    /// Over all its accounts.
    pub limits: Vec<Limit>,
    /// Large attachments.
    pub large_files: LargeFiles,
}

/// An account as stored; the password stays sealed.
#[derive(Clone, PartialEq)]
pub struct StoredAccount {
    /// Whose.
    pub tenant: TenantId,
    /// Its name.
    pub id: AccountId,
    /// SMTP host.
    pub host: String,
    /// SMTP port.
    pub port: u16,
    /// How connections are protected.
    pub tls: TlsMode,
    /// User name; there is a password exactly if there is one.
    pub username: Option<String>,
    /// Sealed, see [`crate::secret`].
    pub password: Option<String>,
    /// Whether the password may be sent over an unencrypted connection.
    pub allow_plaintext_auth: bool,
    /// Certificate authorities besides the system's, PEM.
    pub ca_pem: Option<String>,
    /// Author of mails whose job names none.
    pub from: Option<Mailbox>,
    /// Rate limits.
    pub limits: Vec<Limit>,
    /// Connections at once, over all workers.
    pub max_connections: Option<u32>,
    /// Attempts before a job fails; else the installation's default.
    pub max_attempts: Option<u32>,
    /// Age at which a job fails; else the installation's default.
    pub max_age: Option<Duration>,
    /// Whether it is the tenant's default.
    pub is_default: bool,
    /// See [`super::Account::version`].
    pub version: i64,
}

impl std::fmt::Debug for StoredAccount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredAccount")
            .field("key", &self.key())
            .field("host", &self.host)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

impl StoredAccount {
    /// `tenant/account`.
    #[must_use]
    pub fn key(&self) -> AccountKey {
        AccountKey::new(&self.tenant, &self.id)
    }
}

/// What [`tenant`] reads, for a table alias `t`.
pub(super) const TENANT_COLUMNS: &str =
    "t.id, t.name, t.fallback, t.on_uncertain, t.limits, t.large_file_bytes, t.large_file_action";
/// How many they are.
pub(super) const TENANT_WIDTH: usize = 7;

/// What [`account`] reads, for a table alias `a`.
pub(super) const ACCOUNT_COLUMNS: &str = "a.id, a.tenant, a.host, a.port, a.tls, a.username, a.password, \
     a.allow_plaintext_auth, a.ca_pem, a.from_address, a.limits, a.max_connections, a.max_attempts, \
     a.max_age_seconds, a.is_default, a.version";

/// Reads [`TENANT_COLUMNS`] at the beginning of a row.
pub(super) fn tenant(row: &Row) -> Result<StoredTenant, DirectoryError> {
    let id: &str = row.try_get(0)?;
    let bad = |reason: String| DirectoryError::Row {
        what: format!("tenant `{id}`"),
        reason,
    };
    Ok(StoredTenant {
        id: parsed(id).map_err(bad)?,
        name: row.try_get(1)?,
        fallback: parsed(row.try_get(2)?).map_err(bad)?,
        on_uncertain: parsed(row.try_get(3)?).map_err(bad)?,
        limits: limits::from_json(&row.try_get::<_, Value>(4)?).map_err(bad)?,
        large_files: LargeFiles {
            threshold: row.try_get::<_, Option<i64>>(5)?.map(|bytes| bytes as u64),
            action: parsed::<LargeFileAction>(row.try_get(6)?).map_err(bad)?,
        },
    })
}

/// Reads [`ACCOUNT_COLUMNS`] from column `first` on; `None` if an outer join found no account.
pub(super) fn account(row: &Row, first: usize) -> Result<Option<StoredAccount>, DirectoryError> {
    let Some(id) = row.try_get::<_, Option<&str>>(first)? else {
        return Ok(None);
    };
    let tenant: &str = row.try_get(first + 1)?;
    let bad = |reason: String| DirectoryError::Row {
        what: format!("account `{tenant}/{id}`"),
        reason,
    };
    let from: Option<&str> = row.try_get(first + 9)?;
    Ok(Some(StoredAccount {
        tenant: parsed(tenant).map_err(bad)?,
        id: parsed(id).map_err(bad)?,
        host: row.try_get(first + 2)?,
        port: u16::try_from(row.try_get::<_, i32>(first + 3)?).map_err(|e| bad(e.to_string()))?,
        tls: parsed(row.try_get(first + 4)?).map_err(bad)?,
        username: row.try_get(first + 5)?,
        password: row.try_get(first + 6)?,
        allow_plaintext_auth: row.try_get(first + 7)?,
        ca_pem: row.try_get(first + 8)?,
        from: from.map(parse_mailbox).transpose().map_err(bad)?,
        limits: limits::from_json(&row.try_get::<_, Value>(first + 10)?).map_err(bad)?,
        max_connections: row.try_get::<_, Option<i32>>(first + 11)?.map(|n| n as u32),
        max_attempts: row.try_get::<_, Option<i32>>(first + 12)?.map(|n| n as u32),
        max_age: row
            .try_get::<_, Option<i64>>(first + 13)?
            .map(|seconds| Duration::from_secs(seconds as u64)),
        is_default: row.try_get(first + 14)?,
        version: row.try_get(first + 15)?,
    }))
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}

/// Reads `a@b` or `Name <a@b>`, what [`Mailbox`] displays; quotes around the name are taken off.
///
/// # Errors
/// With what is allowed.
pub fn parse_mailbox(text: &str) -> Result<Mailbox, String> {
    let refused = || "expected an address: `a@example.com` or `Name <a@example.com>`".to_owned();
    if text.len() > 1_000 || text.chars().any(char::is_control) {
        return Err(refused());
    }
    let text = text.trim();
    let (name, address) = match text.strip_suffix('>') {
        Some(rest) => rest.rsplit_once('<').ok_or_else(refused)?,
        None => ("", text),
    };
    let name = name.trim();
    let name = name
        .strip_prefix('"')
        .and_then(|name| name.strip_suffix('"'))
        .unwrap_or(name);
    Ok(Mailbox {
        name: (!name.is_empty()).then(|| name.to_owned()),
        address: address.trim().parse().map_err(|_| refused())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mailbox_is_an_address_with_or_without_a_name() {
        for (text, name, address) in [
            ("a@example.com", None, "a@example.com"),
            ("<a@example.com>", None, "a@example.com"),
            ("Acme Post <a@example.com>", Some("Acme Post"), "a@example.com"),
            (
                "\"Müller, Jörg\" <a@example.com>",
                Some("Müller, Jörg"),
                "a@example.com",
            ),
            ("1 < 2 <a@example.com>", Some("1 < 2"), "a@example.com"),
        ] {
            let mailbox = parse_mailbox(text).unwrap();
            assert_eq!(
                (mailbox.name.as_deref(), mailbox.address.to_string().as_str()),
                (name, address)
            );
            assert_eq!(parse_mailbox(&mailbox.to_string()).unwrap(), mailbox, "{text}");
        }
    }

    #[test]
    fn what_is_no_mailbox_is_refused() {
        for text in [
            "",
            "a",
            "a@",
            "a@b@c",
            "Name a@b.c>",
            "A\r\nBcc: x <a@b.c>",
            "A\0 <a@b.c>",
            "a@b.c <x>",
        ] {
            assert!(parse_mailbox(text).is_err(), "{text:?}");
        }
    }
}
