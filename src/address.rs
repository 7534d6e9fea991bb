//! Mail addresses: checked once, when they are read.

use std::fmt;

pub use lettre::Address;

/// An address with an optional display name (RFC 5322 §3.4).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mailbox {
    /// Display name, without CR, LF or NUL.
    pub name: Option<String>,
    /// The address itself.
    pub address: Address,
}

impl Mailbox {
    /// A mailbox without a display name.
    #[must_use]
    pub fn bare(address: Address) -> Self {
        Self { name: None, address }
    }
}

impl fmt::Display for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} <{}>", self.address),
            None => write!(f, "{}", self.address),
        }
    }
}

/// What logs may show of an address: its domain.
#[must_use]
pub fn masked(address: &str) -> String {
    address
        .rsplit_once('@')
        .map_or_else(|| "***".to_owned(), |(_, domain)| format!("***@{domain}"))
}
