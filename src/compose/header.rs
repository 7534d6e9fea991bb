//! Header fields: folding (RFC 5322 §2.2.3), encoded words (RFC 2047), parameters (RFC 2231). Whatever the value, one
//! call writes exactly one field: control characters, line ends among them, become spaces.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::address::{Address, Mailbox};
use crate::failure::Failure;

/// Preferred line length (RFC 5322 §2.1.1 asks for at most 78).
const LINE: usize = 76;

/// Longest word that is left as it is; with the field's name it stays below the 998 bytes of RFC 5322 §2.1.1.
pub(super) const MAX_WORD: usize = 900;

/// Longest name of a header field.
const MAX_NAME: usize = 76;

/// Longest display name written as a quoted string; longer ones become encoded words, which fold.
const MAX_QUOTED: usize = 60;

/// What is percent-encoded in RFC 2231 parameters and URLs: all but unreserved characters.
pub(super) const ATTRIBUTE: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Fields that [`super::compose`] writes itself, and those that would tell who else got the mail. A job may give
/// List-Unsubscribe (RFC 2369) itself, but not beside its own way of saying the same.
const RESERVED: &[&str] = &[
    "bcc",
    "cc",
    "date",
    "from",
    "message-id",
    "mime-version",
    "reply-to",
    "resent-bcc",
    "return-path",
    "subject",
    "to",
    "x-postroom-id",
];

/// Fields that are written for `list_unsubscribe`.
const UNSUBSCRIBE: &[&str] = &["list-unsubscribe", "list-unsubscribe-post"];

/// Whether a job may set this field (a second line of defence: jobs are checked when they are read).
pub(super) fn may_be_given(name: &str, has_list_unsubscribe: bool) -> bool {
    let well_formed = (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':');
    let content = name
        .get(..8)
        .is_some_and(|start| start.eq_ignore_ascii_case("content-"));
    let is_among = |names: &[&str]| names.iter().any(|other| name.eq_ignore_ascii_case(other));
    let is_ours = content || is_among(RESERVED) || (has_list_unsubscribe && is_among(UNSUBSCRIBE));
    well_formed && !is_ours
}

/// A field whose value is known to be short, ASCII and free of foreign bytes.
pub(super) fn verbatim(out: &mut String, name: &str, value: &str) {
    out.push_str(name);
    out.push_str(": ");
    out.push_str(value);
    out.push_str("\r\n");
}

/// A field of free text.
pub(super) fn unstructured(out: &mut String, name: &str, value: &str) {
    let value = clean(value);
    let value = value.trim();
    out.push_str(name);
    out.push(':');
    let column = name.len() + 1;
    if is_plain(value) {
        write_folded(out, column, value);
    } else {
        write_encoded_words(out, column, value);
    }
    out.push_str("\r\n");
}

/// A field that a job gives. What stands in angle brackets, such as an address or a URL, is read by machines: it stays as
/// it is, and only the text around it becomes encoded words (RFC 2047 §5).
pub(super) fn given(out: &mut String, name: &str, value: &str) {
    let cleaned = clean(value);
    let pieces = if is_plain(cleaned.trim()) {
        None
    } else {
        bracketed(cleaned.trim())
    };
    let Some(pieces) = pieces else {
        unstructured(out, name, value);
        return;
    };
    out.push_str(name);
    out.push(':');
    let mut column = name.len() + 1;
    for (text, brackets) in pieces {
        column = write_text(out, column, text);
        if !brackets.is_empty() {
            column = write_token(out, column, brackets);
        }
    }
    out.push_str("\r\n");
}

/// The value cut into pieces of text, each with the `<…>` behind it, the last without. `None` if there is nothing in angle
/// brackets, or something that cannot be left as it is.
fn bracketed(value: &str) -> Option<Vec<(&str, &str)>> {
    let mut pieces = Vec::new();
    let mut rest = value;
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>')? + 1;
        let brackets = &rest[start..end];
        let is_token = brackets.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_token || !is_plain(brackets) || brackets[1..].contains('<') {
            return None;
        }
        pieces.push((&rest[..start], brackets));
        rest = &rest[end..];
    }
    if pieces.is_empty() {
        return None;
    }
    pieces.push((rest, ""));
    Some(pieces)
}

/// Text beside something in angle brackets: what separates it from the one before, then words, or a name.
fn write_text(out: &mut String, mut column: usize, text: &str) -> usize {
    let text = text.trim_matches(' ');
    let separator = text.chars().next().filter(|first| matches!(first, ',' | ';'));
    if let Some(separator) = separator {
        out.push(separator);
        column += 1;
    }
    let name = text[usize::from(separator.is_some())..].trim_matches(' ');
    if name.is_empty() {
        return column;
    }
    if is_plain(name) {
        return words(name).fold(column, |column, word| write_token(out, column, word.trim_start()));
    }
    // Encoded words are none within quotes, and do not need them.
    let unquoted = name.strip_prefix('"').and_then(|name| name.strip_suffix('"'));
    let unquoted = unquoted.filter(|name| !name.contains(['"', '\\']));
    write_encoded_words(out, column, unquoted.unwrap_or(name))
}

/// A field of addresses; nothing if there are none.
pub(super) fn mailboxes(out: &mut String, name: &str, list: &[Mailbox]) -> Result<(), Failure> {
    if list.is_empty() {
        return Ok(());
    }
    out.push_str(name);
    out.push(':');
    let mut column = name.len() + 1;
    for (index, mailbox) in list.iter().enumerate() {
        if index > 0 {
            out.push(',');
            column += 1;
        }
        let address = wire_address(&mailbox.address)?;
        let phrase = mailbox.name.as_deref().map(clean);
        match phrase
            .as_deref()
            .map(str::trim)
            .filter(|phrase| !phrase.is_empty())
        {
            None => column = write_token(out, column, address.as_ref()),
            Some(phrase) => {
                column = write_phrase(out, column, phrase);
                column = write_token(out, column, &format!("<{address}>"));
            }
        }
    }
    out.push_str("\r\n");
    Ok(())
}

/// `; key="value"` on a line of its own, in the extended form where the plain one does not do (RFC 2231 §3 and 4).
pub(super) fn parameter(out: &mut String, key: &str, value: &str) {
    let value = clean(value);
    let simple = |byte: u8| byte == b' ' || (byte.is_ascii_graphic() && byte != b'"' && byte != b'\\');
    if value.len() <= MAX_QUOTED && value.bytes().all(simple) && !value.contains("=?") {
        out.extend([";\r\n ", key, "=\"", &value, "\""]);
        return;
    }
    let pieces = encoded_pieces(&value);
    if let [only] = &pieces[..] {
        out.extend([";\r\n ", key, "*=utf-8''", only]);
        return;
    }
    for (index, piece) in pieces.iter().enumerate() {
        let charset = if index == 0 { "utf-8''" } else { "" };
        out.extend([";\r\n ", key, "*", &index.to_string(), "*=", charset, piece]);
    }
}

/// The value percent-encoded, in pieces for one line each. No piece ends within a character: readers decode each by
/// itself.
fn encoded_pieces(value: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut buffer = [0; 4];
    for character in value.chars() {
        let encoded = utf8_percent_encode(character.encode_utf8(&mut buffer), ATTRIBUTE).to_string();
        match pieces.last_mut() {
            Some(last) if last.len() + encoded.len() <= MAX_QUOTED - "utf-8''".len() => {
                last.push_str(&encoded);
            }
            _ => pieces.push(encoded),
        }
    }
    pieces
}

/// The address as it goes over the wire: its domain in ASCII form (RFC 5890), so that only a local part outside ASCII
/// needs SMTPUTF8.
pub(super) fn wire_address(address: &Address) -> Result<Address, Failure> {
    let text: &str = address.as_ref();
    if text.chars().any(char::is_control) || text.len() > 320 {
        return Err(super::refused(
            "invalid_address",
            "an address holds control characters or is too long",
        ));
    }
    if address.domain().is_ascii() {
        return Ok(address.clone());
    }
    let domain = ascii_domain(address.domain());
    Address::new(address.user(), &*domain)
        .ok()
        .filter(|_| domain.is_ascii())
        .ok_or_else(|| super::refused("invalid_address", "the domain of an address has no ASCII form"))
}

/// A domain in ASCII form, or unchanged if it has none.
pub(super) fn ascii_domain(domain: &str) -> Cow<'_, str> {
    if domain.is_ascii() {
        return Cow::Borrowed(domain);
    }
    match url::Host::parse(domain) {
        Ok(url::Host::Domain(ascii)) => Cow::Owned(ascii),
        _ => Cow::Borrowed(domain),
    }
}

/// Control characters become spaces.
pub(super) fn clean(value: &str) -> Cow<'_, str> {
    if value.chars().any(char::is_control) {
        Cow::Owned(
            value
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect(),
        )
    } else {
        Cow::Borrowed(value)
    }
}

/// Whether a reader sees this text if it is written as it is.
fn is_plain(value: &str) -> bool {
    value.is_ascii() && !value.contains("=?") && words(value).all(|word| word.len() <= MAX_WORD)
}

/// Words, each with the spaces before it.
fn words(value: &str) -> impl Iterator<Item = &str> {
    let mut rest = value;
    std::iter::from_fn(move || {
        let start = rest.find(|c| c != ' ')?;
        let end = rest[start..]
            .find(' ')
            .map_or(rest.len(), |length| start + length);
        let (word, tail) = rest.split_at(end);
        rest = tail;
        Some(word)
    })
}

/// Plain text, folded before the spaces of a word that does not fit. The first word stays beside the field's name.
fn write_folded(out: &mut String, mut column: usize, value: &str) {
    out.push(' ');
    column += 1;
    for (index, word) in words(value).enumerate() {
        if index > 0 && column + word.len() > LINE {
            out.push_str("\r\n");
            column = 0;
        }
        out.push_str(word);
        column += word.len();
    }
}

/// A space or a fold, then the token.
fn write_token(out: &mut String, column: usize, token: &str) -> usize {
    let start = if column + 1 + token.len() > LINE {
        out.push_str("\r\n ");
        1
    } else {
        out.push(' ');
        column + 1
    };
    out.push_str(token);
    start + token.len()
}

/// A display name (RFC 5322 §3.2.5): atoms, a quoted string or encoded words.
fn write_phrase(out: &mut String, column: usize, phrase: &str) -> usize {
    if !phrase.is_ascii() || phrase.contains("=?") || phrase.len() > MAX_QUOTED {
        return write_encoded_words(out, column, phrase);
    }
    let is_atoms = phrase
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b' ' | b'-' | b'_' | b'\''));
    if is_atoms && !phrase.contains("  ") {
        return write_token(out, column, phrase);
    }
    let quoted = phrase.replace('\\', "\\\\").replace('"', "\\\"");
    write_token(out, column, &format!("\"{quoted}\""))
}

/// The text as encoded words (RFC 2047 §2: at most 75 characters each), one per line.
fn write_encoded_words(out: &mut String, mut column: usize, text: &str) -> usize {
    const OPEN: &str = "=?utf-8?b?";
    const CLOSE: &str = "?=";
    let mut rest = text;
    out.push(' ');
    column += 1;
    while !rest.is_empty() {
        let room = LINE.saturating_sub(column + OPEN.len() + CLOSE.len()) / 4 * 3;
        // Four bytes hold any character, so that every line takes at least one.
        if room < 4 {
            out.push_str("\r\n ");
            column = 1;
            continue;
        }
        let (word, tail) = rest.split_at(rest.floor_char_boundary(room.min(rest.len())));
        out.push_str(OPEN);
        let start = out.len();
        STANDARD.encode_string(word, out);
        out.push_str(CLOSE);
        column += OPEN.len() + out.len() - start;
        rest = tail;
        if !rest.is_empty() {
            out.push_str("\r\n ");
            column = 1;
        }
    }
    column
}
