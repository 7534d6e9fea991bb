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

/// What may stand before an address, joined by `=`, without being part of it.
const LABELS: &[&str] = &[
    "addr",
    "address",
    "email",
    "for",
    "from",
    "orig_to",
    "rcpt",
    "recipient",
    "sender",
    "to",
    "user",
];

/// A text for logs that may quote addresses, such as a server's reply: of each, only the domain is left.
#[must_use]
pub fn masked_in(text: &str) -> Cow<'_, str> {
    if !text.contains('@') {
        return Cow::Borrowed(text);
    }
    let mut masked = String::with_capacity(text.len());
    let mut parts = text.split('@').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_some() {
            masked.push_str(before_local(part));
            masked.push_str("***@");
        } else {
            masked.push_str(part);
        }
    }
    Cow::Owned(masked)
}

/// What stands before the local part (RFC 5321 §4.1.2) that a text ends with.
fn before_local(text: &str) -> &str {
    // In quotes it may hold anything, an `@` too: then the opening quote is further back, and all of this goes.
    if let Some(quoted) = text.strip_suffix('"') {
        return &text[..opening_quote(quoted)];
    }
    let is_local = |c: char| !c.is_whitespace() && !"<>()[]\",;:".contains(c);
    let local = text.trim_end_matches(is_local).len();
    let (before, local) = text.split_at(local);
    let around = local.len() - local.trim_start_matches(['\'', '`']).len();
    let label = local.find('=').filter(|end| LABELS.contains(&&local[..*end]));
    &text[..before.len() + label.map_or(around, |end| end + 1)]
}

/// Where the quoted string begins that a closing quote would end here; 0 if it begins further back.
fn opening_quote(text: &str) -> usize {
    let escaped = |at: usize| {
        let before = &text[..at];
        (before.len() - before.trim_end_matches('\\').len()) % 2 == 1
    };
    let mut quotes = text.match_indices('"').map(|(at, _)| at);
    quotes.rfind(|at| !escaped(*at)).unwrap_or(0)
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
            ("<news-ann=example.org@lists.example>", "<***@lists.example>"),
            ("no o'neil@example.org here", "no ***@example.org here"),
            ("'ann@example.org': unknown", "'***@example.org': unknown"),
            (r#"<"ann smith"@example.org>"#, "<***@example.org>"),
            (r#"to "ann \"a\" smith"@example.org"#, "to ***@example.org"),
        ] {
            assert_eq!(masked_in(text), shown);
        }
    }
}
