//! Mail addresses: checked once, when they are read.

use std::borrow::Cow;
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

/// A text for logs that may quote addresses, such as a server's reply: of each, only the domain is left.
#[must_use]
pub fn masked_in(text: &str) -> Cow<'_, str> {
    if !text.contains('@') {
        return Cow::Borrowed(text);
    }
    let is_local = |c: char| !c.is_whitespace() && !"<>()[]\"'`,;:=".contains(c);
    let mut masked = String::with_capacity(text.len());
    let mut parts = text.split('@').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_some() {
            masked.push_str(part.trim_end_matches(is_local));
            masked.push_str("***@");
        } else {
            masked.push_str(part);
        }
    }
    Cow::Owned(masked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_addresses_in_a_text_only_the_domain_is_left() {
        for (text, shown) in [
            ("550 5.1.1 No such user", "550 5.1.1 No such user"),
            ("<ann.b+c@example.org>: unknown", "<***@example.org>: unknown"),
            ("a@b.example, c@d.example.", "***@b.example, ***@d.example."),
            ("müller@example.org full", "***@example.org full"),
            ("a@b@c.example", "***@***@c.example"),
            ("to=x@y.example", "to=***@y.example"),
        ] {
            assert_eq!(masked_in(text), shown);
        }
    }
}
