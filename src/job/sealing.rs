//! Keeping passwords from being written: a plain `smtp_override` is sealed in its body before that is stored.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::json::Name;
use super::smtp_override::is_sealed;

/// Why a body could not be searched for its override.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the body is not a JSON object, so its smtp_override cannot be sealed; seal the whole body instead")]
pub struct SealError;

/// Replaces a plain `smtp_override` in an uncompressed body by what `seal` makes of its bytes, so that the body may be
/// stored. Every other byte stays. A body without a plain one comes back as it is.
///
/// # Errors
/// If the body is not a JSON object.
pub fn seal_override(body: &[u8], seal: impl Fn(&[u8]) -> String) -> Result<Cow<'_, [u8]>, SealError> {
    let text = std::str::from_utf8(body).map_err(|_| SealError)?;
    let mut reader = serde_json::Deserializer::from_str(text);
    let found = reader.deserialize_map(FindOverride).map_err(|_| SealError)?;
    reader.end().map_err(|_| SealError)?;
    if found.is_empty() {
        return Ok(Cow::Borrowed(body));
    }
    let mut sealed = Vec::with_capacity(body.len() + 128);
    let mut copied = 0;
    for raw in found {
        // `RawValue` borrows from the body, so the distance of the two pointers is its place there.
        let start = raw.as_ptr() as usize - text.as_ptr() as usize;
        sealed.extend_from_slice(&body[copied..start]);
        serde_json::to_writer(&mut sealed, &seal(raw.as_bytes())).map_err(|_| SealError)?;
        copied = start + raw.len();
    }
    sealed.extend_from_slice(&body[copied..]);
    Ok(Cow::Owned(sealed))
}

/// Finds the plain overrides among the members of the outermost object, in order.
struct FindOverride;

impl<'a> Visitor<'a> for FindOverride {
    type Value = Vec<&'a str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = Vec::new();
        while let Some(Name(name)) = map.next_key()? {
            if name == "smtp_override" {
                let raw = map.next_value::<&'a RawValue>()?.get();
                let is_plain =
                    raw != "null" && !serde_json::from_str::<String>(raw).is_ok_and(|text| is_sealed(&text));
                if is_plain {
                    found.push(raw);
                }
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// Whether a body that could not be decoded may hold a secret, so that it must be sealed as a whole before it is
/// written anywhere. Errs towards yes: compressed bytes and letters written as escapes cannot be searched.
#[must_use]
pub fn may_hold_secret(body: &[u8]) -> bool {
    if matches!(body, [0x1f, 0x8b, ..] | [0x78, 0x01 | 0x5e | 0x9c | 0xda, ..]) {
        return true;
    }
    holds_word(body, &[WORDS, OVERRIDE].concat())
}

/// [`may_hold_secret`] of a body whose override is sealed: whether there is anything else.
#[must_use]
pub fn may_hold_other_secret(body: &[u8]) -> bool {
    holds_word(body, &[WORDS, OTHER].concat())
}

/// A body as an operator may see it, whoever published it: in JSON, members whose names say that they are secrets are
/// hidden at any depth, a plain override as a whole; anything else is shown only if it is text without such a name.
#[must_use]
pub fn without_secrets(body: &[u8]) -> Value {
    match serde_json::from_slice(body) {
        Ok(mut shown @ (Value::Object(_) | Value::Array(_))) => {
            hide_secrets(&mut shown);
            shown
        }
        // Other encodings, and compressions that we do not know, cannot be searched.
        _ => match std::str::from_utf8(body) {
            Ok(text) if !may_hold_secret(body) => Value::from(text),
            _ => Value::from(format!("(hidden: {} bytes that may hold a secret)", body.len())),
        },
    }
}

/// The depth is bounded by `serde_json`, which read the value.
fn hide_secrets(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(hide_secrets),
        Value::Object(members) => {
            for (name, value) in members {
                if is_secret(name, value) {
                    *value = Value::from("(hidden)");
                } else {
                    hide_secrets(value);
                }
            }
        }
        _ => {}
    }
}

fn is_secret(name: &str, value: &Value) -> bool {
    if value.is_null() {
        return false;
    }
    let name = name.as_bytes();
    let is_sealed = || value.as_str().is_some_and(is_sealed);
    holds_word(name, &[WORDS, OTHER].concat()) || holds_word(name, OVERRIDE) && !is_sealed()
}

/// What secrets are called.
const WORDS: &[&[u8]] = &[b"password", b"passwd", b"passphrase", b"secret", b"credential"];
/// What the override is called, rightly or wrongly.
const OVERRIDE: &[&[u8]] = &[b"smtp_over", b"smtpover", b"smtp-over"];
/// What may be in a body besides an override that was found and sealed.
const OTHER: &[&[u8]] = &[b"token", b"smtp_overide", b"smtpover", b"smtp-over"];

fn holds_word(body: &[u8], words: &[&[u8]]) -> bool {
    // UTF-16 has a NUL beside every ASCII letter.
    let searched: Cow<'_, [u8]> = if body.contains(&0) {
        Cow::Owned(body.iter().copied().filter(|byte| *byte != 0).collect())
    } else {
        Cow::Borrowed(body)
    };
    (0..searched.len()).any(|start| {
        let rest = &searched[start..];
        match rest[0] {
            b'\\' => is_escaped_letter(rest),
            b's' | b'S' | b'p' | b'P' | b'c' | b'C' | b't' | b'T' => words.iter().any(|word| {
                rest.get(..word.len())
                    .is_some_and(|text| text.eq_ignore_ascii_case(word))
            }),
            _ => false,
        }
    })
}

/// `\u0041` to `\u007f`: ASCII letters are written so only to hide them.
fn is_escaped_letter(text: &[u8]) -> bool {
    matches!(text, [b'\\', b'u', b'0', b'0', b'4'..=b'7', ..])
}
