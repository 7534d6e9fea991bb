//! Reading single values: type, form and length, each refusal saying what is allowed.

use std::borrow::Cow;
use std::str::FromStr;

use jiff::Timestamp;

use super::errors::{Errors, Pointer, excerpt};
use super::json::Node;

/// Refuses a value of the wrong type.
pub(super) fn mistyped(node: &Node<'_>, wanted: &str, at: &Pointer<'_>, errors: &mut Errors) {
    // What is nested too deeply was named when it was read.
    if !matches!(node, Node::TooDeep) {
        errors.push(at, format!("must be {wanted}, not {}", node.kind()));
    }
}

/// Any string.
pub(super) fn string<'a>(node: Node<'a>, at: &Pointer<'_>, errors: &mut Errors) -> Option<Cow<'a, str>> {
    match node {
        Node::String(text) => Some(text),
        other => {
            mistyped(&other, "a string", at, errors);
            None
        }
    }
}

/// Whether a text has at most that many characters.
pub(super) fn fits(text: &str, max: usize) -> bool {
    text.len() <= max || text.chars().count() <= max
}

/// Whether a text may stand in one header line: no control character but TAB.
pub(super) fn is_line(text: &str) -> bool {
    text.chars().all(|c| c == '\t' || !c.is_control())
}

/// Characters that addresses and URLs must not hold: blanks as regular expressions understand them, and control
/// characters.
pub(super) fn is_blank(c: char) -> bool {
    c.is_control() || c.is_whitespace() || c == '\u{feff}'
}

/// A header's text: at most `max` characters, no line breaks or other control characters but TAB.
pub(super) fn line<'a>(
    node: Node<'a>,
    max: usize,
    at: &Pointer<'_>,
    errors: &mut Errors,
) -> Option<Cow<'a, str>> {
    let text = string(node, at, errors)?;
    if fits(&text, max) && is_line(&text) {
        return Some(text);
    }
    errors.push(
        at,
        format!("must be at most {max} characters without line breaks or other control characters"),
    );
    None
}

/// A label: 1 to `max` characters, no control characters.
pub(super) fn label<'a>(
    node: Node<'a>,
    max: usize,
    at: &Pointer<'_>,
    errors: &mut Errors,
) -> Option<Cow<'a, str>> {
    let text = string(node, at, errors)?;
    if !text.is_empty() && fits(&text, max) && !text.chars().any(char::is_control) {
        return Some(text);
    }
    errors.push(
        at,
        format!("must be 1 to {max} characters without control characters"),
    );
    None
}

/// A boolean.
pub(super) fn boolean(node: &Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<bool> {
    if let Node::Bool(value) = node {
        return Some(*value);
    }
    mistyped(node, "true or false", at, errors);
    None
}

/// A value that parses; `rule` says what is allowed. The refusal shows the value: not for secrets or addresses.
pub(super) fn parsed<T: FromStr>(
    node: Node<'_>,
    rule: &str,
    at: &Pointer<'_>,
    errors: &mut Errors,
) -> Option<T> {
    let text = string(node, at, errors)?;
    let value = text.parse().ok();
    if value.is_none() {
        errors.push(at, format!("must be {rule}, not {}", excerpt(&text)));
    }
    value
}

/// A number of digits only, without sign.
pub(super) fn decimal(text: &str) -> Option<u32> {
    let is_plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    is_plain.then(|| text.parse().ok())?
}

/// 2000-01-01T00:00:00Z: earlier times are mistakes.
const EARLIEST: i64 = 946_684_800;

/// A time as RFC 3339 writes it, of the years 2000 to 9999.
pub(super) fn time(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<Timestamp> {
    let text = string(node, at, errors)?;
    let time = instant(&text);
    if time.is_none() {
        errors.push(
            at,
            format!(
                "must be an RFC 3339 time with offset, years 2000 to 9999, like `2026-11-21T09:30:00Z`, not {}",
                excerpt(&text)
            ),
        );
    }
    time
}

/// The instant an RFC 3339 time names, if it is one of the years 2000 to 9999.
pub(super) fn instant(text: &str) -> Option<Timestamp> {
    let time: Timestamp = is_rfc3339(text.as_bytes()).then(|| text.parse().ok())??;
    (time.as_second() >= EARLIEST).then_some(time)
}

/// The form alone; the parser below accepts more than the RFC (blanks, zones in brackets, missing seconds).
fn is_rfc3339(text: &[u8]) -> bool {
    let shaped = |text: &[u8], shape: &[u8]| {
        text.len() == shape.len()
            && text.iter().zip(shape).all(|(byte, want)| match want {
                b'0' => byte.is_ascii_digit(),
                b'T' => matches!(byte, b'T' | b't'),
                _ => byte == want,
            })
    };
    let Some((date_time, mut rest)) = text.split_at_checked(19) else {
        return false;
    };
    if !shaped(date_time, b"0000-00-00T00:00:00") {
        return false;
    }
    if let [b'.', fraction @ ..] = rest {
        let digits = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if !(1..=9).contains(&digits) {
            return false;
        }
        rest = &fraction[digits..];
    }
    matches!(rest, b"Z" | b"z") || shaped(rest, b"+00:00") || shaped(rest, b"-00:00")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339_of_sane_years() {
        for good in [
            "2026-11-21T09:30:00Z",
            "2026-11-21t09:30:00z",
            "2026-11-21T09:30:00.123456789+05:30",
            "2000-01-01T00:00:00Z",
            "2026-06-30T23:59:60Z",
            "2026-11-21T09:30:00-00:00",
            "9999-12-30T00:00:00Z",
        ] {
            assert!(instant(good).is_some(), "{good}");
        }
        for bad in [
            "",
            "2026-11-21",
            "2026-11-21T09:30Z",
            "2026-11-21 09:30:00Z",
            "2026-11-21T09:30:00",
            "2026-11-21T09:30:00+0530",
            "2026-11-21T09:30:00Z[UTC]",
            "2026-11-21T09:30:00.Z",
            "2026-13-21T09:30:00Z",
            "2026-02-30T09:30:00Z",
            "1999-12-31T23:59:59Z",
            "2000-01-01T00:00:00+01:00",
            "+300000-01-01T00:00:00Z",
            "1763717400",
        ] {
            assert!(instant(bad).is_none(), "{bad}");
        }
        assert_eq!(
            instant("2026-11-21T10:30:00+01:00"),
            instant("2026-11-21T09:30:00Z")
        );
    }
}
