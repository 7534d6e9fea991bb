//! Headers a job may add, and those it may not.

use super::bounds::{MAX_HEADER_NAME, MAX_HEADER_VALUE, MAX_HEADERS};
use super::errors::{Errors, Pointer, excerpt};
use super::json::Node;
use super::values;

/// Headers a job may not set, with the field to use instead where there is one.
pub(super) const RESERVED: &[(&str, Option<&str>)] = &[
    ("From", Some("from")),
    ("To", Some("to")),
    ("Cc", Some("cc")),
    ("Bcc", Some("bcc")),
    ("Reply-To", Some("reply_to")),
    ("Subject", Some("subject")),
    ("Return-Path", Some("return_path")),
    ("Sender", None),
    ("Date", None),
    ("Message-ID", None),
    ("MIME-Version", None),
    ("Received", None),
    ("Received-SPF", None),
    ("Authentication-Results", None),
    ("DKIM-Signature", None),
    ("DomainKey-Signature", None),
    ("Delivered-To", None),
    ("Apparently-To", None),
];

/// Beginnings of names a job may not set.
pub(super) const RESERVED_PREFIXES: &[&str] = &["Content-", "Resent-", "ARC-", "X-Postroom-"];

/// Given by `list_unsubscribe` when the job has it.
const LIST_HEADERS: [&str; 2] = ["List-Unsubscribe", "List-Unsubscribe-Post"];

/// Reads `headers`: an object of strings; a null member counts as absent.
pub(super) fn headers(
    node: Node<'_>,
    has_list_unsubscribe: bool,
    at: &Pointer<'_>,
    errors: &mut Errors,
) -> Vec<(String, String)> {
    let entries = match node {
        Node::Object(entries) => entries,
        other => {
            values::mistyped(&other, "an object of header names and strings", at, errors);
            return Vec::new();
        }
    };
    if entries.len() > MAX_HEADERS {
        errors.push(
            at,
            format!("holds {} headers; at most {MAX_HEADERS}", entries.len()),
        );
        return Vec::new();
    }
    let mut headers: Vec<(String, String)> = Vec::with_capacity(entries.len());
    for (name, value) in entries {
        let at = at.key(&name);
        if let Some(message) = objection(&name, has_list_unsubscribe) {
            errors.push(&at, message);
            continue;
        }
        if matches!(value, Node::Null) {
            continue;
        }
        let Some(value) = values::line(value, MAX_HEADER_VALUE, &at, errors) else {
            continue;
        };
        // The same spelling twice is found by the reader of the JSON.
        let twin = headers
            .iter()
            .find(|(other, _)| other.eq_ignore_ascii_case(&name));
        if let Some((other, _)) = twin.filter(|(other, _)| *other != name) {
            errors.push(&at, format!("is the same header as {}", excerpt(other)));
            continue;
        }
        headers.push((name.into_owned(), value.into_owned()));
    }
    headers
}

/// Why a job may not set this header.
fn objection(name: &str, has_list_unsubscribe: bool) -> Option<String> {
    if !is_name(name) {
        return Some(format!(
            "a header name is 1 to {MAX_HEADER_NAME} printable ASCII characters without blank and colon"
        ));
    }
    let is = |other: &str| name.eq_ignore_ascii_case(other);
    if let Some((_, field)) = RESERVED.iter().find(|(reserved, _)| is(reserved)) {
        return Some(match field {
            Some(field) => format!("is not allowed in `headers`; use the field `{field}`"),
            None => "is not allowed in `headers`; it is set when the mail is sent".to_owned(),
        });
    }
    if let Some(prefix) = RESERVED_PREFIXES.iter().find(|prefix| {
        name.get(..prefix.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    }) {
        return Some(format!(
            "is not allowed in `headers`: `{prefix}` headers are set when the mail is sent"
        ));
    }
    (has_list_unsubscribe && LIST_HEADERS.iter().any(|header| is(header)))
        .then(|| "is set from `list_unsubscribe`; give one of the two".to_owned())
}

/// A field name as RFC 5322 §3.6.8 has it.
fn is_name(name: &str) -> bool {
    (1..=MAX_HEADER_NAME).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic() && b != b':')
}
