//! `metadata`: the producer's own data, which comes back in reports as it is.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::bounds::MAX_METADATA;
use super::errors::{Errors, Pointer};
use super::json::Node;
use super::values;

/// Reads the object; `body` is the job it stands in.
pub(super) fn read(node: Node<'_>, body: &str, at: &Pointer<'_>, errors: &mut Errors) -> Option<Value> {
    if !matches!(node, Node::Object(_)) {
        values::mistyped(&node, "an object", at, errors);
        return None;
    }
    let large = holds_large(&node);
    let value = node.into_value();
    let size = serde_json::to_vec(&value).map_or(usize::MAX, |text| text.len());
    if size > MAX_METADATA {
        errors.push(at, format!("has {size} bytes as JSON; at most {MAX_METADATA}"));
        return None;
    }
    if large {
        check_large(body, at, errors);
    }
    Some(value)
}

/// Whether a number may have been an integer beyond 64 bits: such are read as doubles.
fn holds_large(node: &Node<'_>) -> bool {
    /// 2^63.
    const LARGE: f64 = 9_223_372_036_854_775_808.0;
    match node {
        Node::Number(number) => {
            number.is_f64() && number.as_f64().is_some_and(|double| double.abs() >= LARGE)
        }
        Node::Array(items) => items.iter().any(holds_large),
        Node::Object(entries) => entries.iter().any(|(_, value)| holds_large(value)),
        _ => false,
    }
}

/// Looks again at what the producer wrote, for what a double does not tell any more.
fn check_large(body: &str, at: &Pointer<'_>, errors: &mut Errors) {
    #[derive(Deserialize)]
    struct Job<'a> {
        #[serde(borrow)]
        metadata: &'a RawValue,
    }
    // It was read once already; what cannot be read so has names twice, which is told.
    if let Ok(job) = serde_json::from_str::<Job<'_>>(body) {
        check_numbers(job.metadata.get(), at, errors);
    }
}

/// Names numbers that would come back as others.
fn check_numbers(text: &str, at: &Pointer<'_>, errors: &mut Errors) {
    match text.as_bytes().first() {
        Some(b'{') => {
            let members: BTreeMap<String, &RawValue> = serde_json::from_str(text).unwrap_or_default();
            for (name, value) in members {
                check_numbers(value.get(), &at.key(&name), errors);
            }
        }
        Some(b'[') => {
            let items: Vec<&RawValue> = serde_json::from_str(text).unwrap_or_default();
            for (index, item) in items.into_iter().enumerate() {
                check_numbers(item.get(), &at.index(index), errors);
            }
        }
        Some(b'-' | b'0'..=b'9') if !comes_back(text) => errors.push(
            at,
            "is an integer beyond 64 bits, which would not come back as it is; write it as a string",
        ),
        _ => {}
    }
}

/// Whether a number comes back as it was written: an integer of 64 bits; a double; or a double written without an exponent,
/// as JavaScript does up to 1e21.
fn comes_back(number: &str) -> bool {
    let is_integer = || number.parse::<i64>().is_ok() || number.parse::<u64>().is_ok();
    let is_double = || {
        number
            .parse::<f64>()
            .is_ok_and(|double| double.to_string() == number)
    };
    number.contains(['.', 'e', 'E']) || is_integer() || is_double()
}
