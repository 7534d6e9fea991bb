//! Names of things: tenants, accounts, jobs. Cheap to clone, valid by construction.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, LazyLock};

/// Why a name was refused; the text says what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidId(pub &'static str);

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $valid:ident, $rule:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// What a valid value looks like, for error messages.
            pub const RULE: &'static str = $rule;

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The name as text that others may keep.
            #[must_use]
            pub fn shared(&self) -> Arc<str> {
                Arc::clone(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                if $valid(text) { Ok(Self(text.into())) } else { Err(InvalidId($rule)) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
    };
}

id_type!(
    /// A tenant; `-` is the platform itself.
    TenantId,
    is_tenant,
    "1 to 64 characters of A-Z a-z 0-9 _ -, beginning with a letter or digit"
);
id_type!(
    /// An account of a tenant, unique within it.
    AccountId,
    is_name,
    "1 to 64 characters of A-Z a-z 0-9 _ -, beginning with a letter or digit"
);
id_type!(
    /// The producer's id of a job, unique within the tenant: the idempotency key.
    JobId,
    is_job,
    "1 to 128 printable ASCII characters without spaces"
);

impl TenantId {
    /// The platform's own tenant. A job may not name it.
    #[must_use]
    pub fn platform() -> Self {
        static PLATFORM: LazyLock<TenantId> = LazyLock::new(|| TenantId("-".into()));
        PLATFORM.clone()
    }

    /// Whether this is the platform itself.
    #[must_use]
    pub fn is_platform(&self) -> bool {
        &*self.0 == "-"
    }
}

fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=64).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}

fn is_tenant(text: &str) -> bool {
    text == "-" || is_name(text)
}

fn is_job(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

/// A tenant's account, written `tenant/account`; the key of limits, lanes and pools.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AccountKey(Arc<str>);

impl AccountKey {
    /// The key of a stored account.
    #[must_use]
    pub fn new(tenant: &TenantId, account: &AccountId) -> Self {
        Self(format!("{tenant}/{account}").into())
    }

    /// The key under which all `smtp_override` sends of a tenant are counted.
    #[must_use]
    pub fn for_override(tenant: &TenantId) -> Self {
        Self(format!("{tenant}/~override").into())
    }

    /// Takes back a key that was stored.
    #[must_use]
    pub fn from_stored(text: &str) -> Self {
        Self(text.into())
    }

    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The account's name, if it is one that this tenant has stored: neither borrowed nor a server of the job's own.
    #[must_use]
    pub fn stored_by(&self, tenant: &TenantId) -> Option<&str> {
        let (owner, account) = self.0.split_once('/')?;
        (owner == tenant.as_str() && !account.is_empty() && !account.starts_with('~')).then_some(account)
    }

    /// The account's name without its tenant.
    #[must_use]
    pub fn account(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, account)| account)
    }
}

impl fmt::Display for AccountKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl serde::Serialize for AccountKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl fmt::Debug for AccountKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_are_letters_digits_underscore_and_hyphen() {
        for good in ["a", "A1", "acme-corp_2", "-", &"x".repeat(64)] {
            assert!(good.parse::<TenantId>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "_a", "a.b", "a b", "ä", "a/b", &"x".repeat(65)] {
            assert!(bad.parse::<TenantId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn job_ids_are_printable_ascii_without_space() {
        for good in [
            "1",
            "order:42/é".replace('é', "e").as_str(),
            &"!".repeat(128),
            "~",
        ] {
            assert!(good.parse::<JobId>().is_ok(), "{good}");
        }
        for bad in ["", "a b", "é", "a\n", &"x".repeat(129), "\u{7f}"] {
            assert!(bad.parse::<JobId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_account_key_gives_its_account_back() {
        let key = AccountKey::new(&"acme".parse().unwrap(), &"main".parse().unwrap());
        assert_eq!(key.as_str(), "acme/main");
        assert_eq!(key.account(), "main");
    }

    #[test]
    fn an_account_is_named_to_the_tenant_who_stored_it_alone() {
        let acme: TenantId = "acme".parse().unwrap();
        let named = |key: &str| {
            let key = AccountKey::from_stored(key);
            key.stored_by(&acme).map(str::to_owned)
        };
        assert_eq!(named("acme/main").as_deref(), Some("main"));
        for other in ["-/default", "acme/~override", "acme/", "acme2/main", "acme"] {
            assert_eq!(named(other), None, "{other}");
        }
    }
}
