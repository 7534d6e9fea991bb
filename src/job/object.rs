//! Objects with a fixed set of fields: anything else is refused by name.

use super::errors::{Errors, Pointer, excerpt};
use super::json::{Entries, Node};

/// The fields of an object not looked at yet.
pub(super) struct Fields<'a> {
    entries: Entries<'a>,
    known: &'static [&'static str],
}

impl<'a> Fields<'a> {
    /// Takes an object's members and refuses those nobody knows.
    pub(super) fn new(
        entries: Entries<'a>,
        known: &'static [&'static str],
        at: &Pointer<'_>,
        errors: &mut Errors,
    ) -> Self {
        for (name, _) in &entries {
            if !known.contains(&&**name) {
                errors.push(&at.key(name), unknown(name, known));
            }
        }
        Self { entries, known }
    }

    /// Takes a field; `None` if it is absent or null.
    pub(super) fn take(&mut self, name: &str) -> Option<Node<'a>> {
        debug_assert!(
            self.known.contains(&name),
            "{name} is missing in the table of fields"
        );
        let (_, node) = self.entries.iter_mut().find(|(key, _)| key == name)?;
        match std::mem::replace(node, Node::Null) {
            Node::Null => None,
            node => Some(node),
        }
    }
}

fn unknown(name: &str, known: &[&str]) -> String {
    let shown = excerpt(name);
    match closest(name, known) {
        Some(guess) => format!("unknown field {shown}; did you mean `{guess}`?"),
        None => format!("unknown field {shown}; known here: {}", known.join(", ")),
    }
}

/// The known name a typo was probably meant to be.
fn closest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    // Names of other mail APIs and of common sense, which no edit distance leads to.
    const ALIASES: [(&str, &str); 12] = [
        ("body", "text"),
        ("plain", "text"),
        ("sender", "from"),
        ("recipients", "to"),
        ("tenant_id", "tenant"),
        ("account_id", "account"),
        ("message_id", "id"),
        ("mime_type", "content_type"),
        ("content", "base64"),
        ("user", "username"),
        ("email", "address"),
        ("deferred_until", "send_at"),
    ];
    if name.len() > 40 {
        return None;
    }
    let lower = name.to_lowercase().replace(['-', ' '], "_");
    let alias = ALIASES
        .iter()
        .find(|(other, _)| *other == lower)
        .and_then(|(_, ours)| known.iter().find(|name| *name == ours));
    alias.copied().or_else(|| {
        known
            .iter()
            .map(|candidate| (distance(&lower, candidate), *candidate))
            .filter(|(distance, candidate)| *distance <= candidate.len().min(8) / 3)
            .min()
            .map(|(_, candidate)| candidate)
    })
}

/// Edit distance (optimal string alignment: a swap of neighbours counts once).
fn distance(left: &str, right: &str) -> usize {
    let (left, right): (Vec<char>, Vec<char>) = (left.chars().collect(), right.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=right.len()).collect();
    for (i, &a) in left.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &b) in right.iter().enumerate() {
            let mut cost = (above[j] + usize::from(a != b))
                .min(above[j + 1] + 1)
                .min(row[j] + 1);
            if i > 0 && j > 0 && a == right[j - 1] && left[i - 1] == b {
                cost = cost.min(before[j - 1] + 1);
            }
            row.push(cost);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::fields::JOB_FIELDS;

    #[test]
    fn typos_lead_to_the_name_that_was_meant() {
        for (typo, meant) in [
            ("subjcet", Some("subject")),
            ("replyTo", Some("reply_to")),
            ("Attachment", Some("attachments")),
            ("tenantId", Some("tenant")),
            ("tenant_id", Some("tenant")),
            ("sender", Some("from")),
            ("send-at", Some("send_at")),
            ("zzz", None),
            ("x", None),
        ] {
            assert_eq!(closest(typo, JOB_FIELDS), meant, "{typo}");
        }
    }
}
