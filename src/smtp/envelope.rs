//! From whom and to whom, and what became of each.

use std::borrow::Cow;

use crate::address::Address;
use crate::failure::{Failure, Reply};

/// The envelope of a mail (RFC 5321 §3.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// Address for MAIL; `None` is the null sender `<>`.
    pub from: Option<Address>,
    /// Addresses for RCPT; at least one.
    pub to: Vec<Address>,
}

/// What the server said about one recipient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RcptResult {
    /// It takes the mail for this recipient. Before the end of the transaction: it would.
    Accepted(Reply),
    /// It does not, or could not be asked; `reply` of the failure has its words.
    Failed(Failure),
    /// Nothing that counts: the server ended the conversation over another recipient.
    Untold,
}

impl RcptResult {
    /// Whether the recipient was accepted.
    #[must_use]
    pub fn is_accepted(&self) -> bool {
        matches!(self, Self::Accepted(_))
    }

    /// The server's words, if it said any.
    #[must_use]
    pub fn reply(&self) -> Option<&Reply> {
        match self {
            Self::Accepted(reply) => Some(reply),
            Self::Failed(failure) => failure.reply.as_ref(),
            Self::Untold => None,
        }
    }

    /// Why it was not accepted.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Accepted(_) | Self::Untold => None,
            Self::Failed(failure) => Some(failure),
        }
    }
}

/// One result per recipient, in the order of the envelope.
pub type Results = Vec<(Address, RcptResult)>;

/// The same failure for every recipient.
pub(super) fn all_failed(to: &[Address], failure: &Failure) -> Results {
    to.iter()
        .map(|address| (address.clone(), RcptResult::Failed(failure.clone())))
        .collect()
}

/// An address as it stands in a command. A domain outside ASCII goes as A-labels (RFC 5890), so that only local parts
/// outside ASCII need SMTPUTF8.
pub(super) fn path(address: &Address) -> Cow<'_, str> {
    let text: &str = address.as_ref();
    if text.is_ascii() || address.domain().is_ascii() {
        return Cow::Borrowed(text);
    }
    match url::Host::parse(address.domain()) {
        Ok(url::Host::Domain(domain)) => Cow::Owned(format!("{}@{domain}", address.user())),
        _ => Cow::Borrowed(text),
    }
}

/// Whether an address needs SMTPUTF8 (RFC 6531).
#[must_use]
pub fn needs_utf8(address: &Address) -> bool {
    !path(address).is_ascii()
}

impl Envelope {
    /// Whether an address needs SMTPUTF8 (RFC 6531).
    #[must_use]
    pub fn needs_utf8(&self) -> bool {
        self.from.iter().chain(&self.to).any(needs_utf8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_local_part_outside_ascii_needs_smtputf8() {
        let envelope = |to: &str| Envelope {
            from: None,
            to: vec![to.parse().unwrap()],
        };
        assert!(!envelope("a@example.org").needs_utf8());
        assert!(!envelope("a@müller.example").needs_utf8());
        assert!(envelope("jürgen@example.org").needs_utf8());
        assert_eq!(
            path(&"a@müller.example".parse().unwrap()),
            "a@xn--mller-kva.example"
        );
    }
}
