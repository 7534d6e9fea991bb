//! Transfer encodings of bodies (RFC 2045 §6): 7bit where it does, else quoted-printable or base64. Never 8bit, so
//! that a mail passes through every server.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use memchr::{memchr_iter, memchr2_iter};

/// Longest line sent as 7bit (RFC 5322 §2.1.1).
const MAX_LINE: usize = 998;

/// Line length of quoted-printable and base64 (RFC 2045 §6.7 and 6.8).
const ENCODED_LINE: usize = 76;

/// How a body is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// As it is.
    SevenBit,
    /// Mostly ASCII.
    QuotedPrintable,
    /// Anything.
    Base64,
}

impl Encoding {
    /// The value of Content-Transfer-Encoding.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::SevenBit => "7bit",
            Self::QuotedPrintable => "quoted-printable",
            Self::Base64 => "base64",
        }
    }

    /// The most readable encoding for a text with CRLF line ends.
    pub(super) fn of(text: &str) -> Self {
        let plain = |byte: &u8| matches!(byte, b' '..=b'~' | b'\t' | b'\r' | b'\n');
        let special = text.len() - text.as_bytes().iter().filter(|byte| plain(byte)).count();
        if special * 4 > text.len() {
            Self::Base64
        } else if special > 0 || has_long_line(text) {
            Self::QuotedPrintable
        } else {
            Self::SevenBit
        }
    }
}

/// Whether a line of a text with CRLF line ends is longer than may be sent as it is.
fn has_long_line(text: &str) -> bool {
    let mut start = 0;
    let ends = memchr_iter(b'\n', text.as_bytes());
    ends.chain([text.len() + 1]).any(|end| {
        let length = (end - start).saturating_sub(1);
        start = end + 1;
        length > MAX_LINE
    })
}

/// The text with CRLF line ends, as mail has them; a lone CR or LF ends a line too.
pub(super) fn with_crlf(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let is_lone = |at: &usize| match bytes[*at] {
        b'\n' => *at == 0 || bytes[at - 1] != b'\r',
        _ => bytes.get(at + 1) != Some(&b'\n'),
    };
    let mut lone = memchr2_iter(b'\r', b'\n', bytes).filter(is_lone).peekable();
    if lone.peek().is_none() {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + text.len() / 16 + 16);
    let mut copied = 0;
    for at in lone {
        out.push_str(&text[copied..at]);
        out.push_str("\r\n");
        copied = at + 1;
    }
    out.push_str(&text[copied..]);
    Cow::Owned(out)
}

/// Writes a text with CRLF line ends.
pub(super) fn write_text(out: &mut String, text: &str, encoding: Encoding) {
    match encoding {
        Encoding::SevenBit => out.push_str(text),
        Encoding::QuotedPrintable => write_quoted_printable(out, text),
        Encoding::Base64 => write_base64(out, text.as_bytes()),
    }
}

/// Base64 in lines of 76 characters; no line end after the last.
pub(super) fn write_base64(out: &mut String, bytes: &[u8]) {
    /// Lines encoded at a time: a call for each would cost more than it encodes.
    const LINES: usize = 32;
    out.reserve(base64_len(bytes.len()));
    let mut buffer = [0; LINES * ENCODED_LINE];
    let mut is_first = true;
    for chunk in bytes.chunks(LINES * ENCODED_LINE / 4 * 3) {
        let written = STANDARD.encode_slice(chunk, &mut buffer).unwrap_or(0);
        let mut rest = std::str::from_utf8(&buffer[..written]).unwrap_or("");
        while !rest.is_empty() {
            let (line, behind) = rest.split_at(rest.len().min(ENCODED_LINE));
            if !std::mem::take(&mut is_first) {
                out.push_str("\r\n");
            }
            out.push_str(line);
            rest = behind;
        }
    }
}

/// Length of [`write_base64`]'s output for so many bytes, roughly from above.
pub(super) fn base64_len(bytes: usize) -> usize {
    bytes / 3 * 4 + bytes / 28 + 8
}

fn write_quoted_printable(out: &mut String, text: &str) {
    out.reserve(text.len() + text.len() / 4);
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            out.push_str("\r\n");
        }
        write_quoted_printable_line(out, line.strip_suffix('\r').unwrap_or(line));
    }
}

fn write_quoted_printable_line(out: &mut String, line: &str) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let (bytes, mut at, mut column) = (line.as_bytes(), 0, 0);
    while let Some(&byte) = bytes.get(at) {
        let is_last = at + 1 == bytes.len();
        // A soft line break needs a column itself.
        let end = ENCODED_LINE - usize::from(!is_last);
        let run = bytes[at..bytes.len() - 1]
            .iter()
            .take(end - column)
            .take_while(|byte| IS_LITERAL[usize::from(**byte)])
            .count();
        let is_literal = IS_LITERAL[usize::from(byte)] && !(is_last && matches!(byte, b' ' | b'\t'));
        let width = if is_literal { 1 } else { 3 };
        if run > 0 {
            // Literals are ASCII: no character is cut.
            out.push_str(&line[at..at + run]);
            at += run;
            column += run;
        } else if column + width > end {
            out.push_str("=\r\n");
            column = 0;
        } else {
            if is_literal {
                out.push(char::from(byte));
            } else {
                out.push('=');
                out.push(char::from(HEX[usize::from(byte >> 4)]));
                out.push(char::from(HEX[usize::from(byte & 15)]));
            }
            at += 1;
            column += width;
        }
    }
}

/// What quoted-printable leaves as it is, unless it is a blank at the end of a line.
static IS_LITERAL: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = b' ';
    while byte <= b'~' {
        table[byte as usize] = byte != b'=';
        byte += 1;
    }
    table[b'\t' as usize] = true;
    table
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Base64 as it should be, by the letter.
    fn lines_of_76(bytes: &[u8]) -> String {
        let encoded = STANDARD.encode(bytes);
        let lines: Vec<&str> = encoded
            .as_bytes()
            .chunks(76)
            .map(|line| std::str::from_utf8(line).unwrap())
            .collect();
        lines.join("\r\n")
    }

    #[test]
    fn base64_has_lines_of_76_characters_at_any_length() {
        let bytes: Vec<u8> = (0..6000_u32).map(|n| (n * 31 % 251) as u8).collect();
        for length in (0..200).chain(1800..1850).chain(3620..3680).chain([5999, 6000]) {
            let mut out = String::new();
            write_base64(&mut out, &bytes[..length]);
            assert_eq!(out, lines_of_76(&bytes[..length]), "{length}");
            assert!(out.len() <= base64_len(length));
        }
    }

    #[test]
    fn a_line_of_998_bytes_goes_as_it_is_and_one_of_999_does_not() {
        for before in ["", "a\r\n", "\r\n"] {
            for after in ["", "\r\n", "\r\nb"] {
                let text = |length| format!("{before}{}{after}", "x".repeat(length));
                assert_eq!(
                    Encoding::of(&text(998)),
                    Encoding::SevenBit,
                    "{before:?} {after:?}"
                );
                assert_eq!(
                    Encoding::of(&text(999)),
                    Encoding::QuotedPrintable,
                    "{before:?} {after:?}"
                );
            }
        }
    }

    /// Quoted-printable read as RFC 2045 §6.7 says.
    fn unquoted(text: &str) -> Vec<u8> {
        let mut out = Vec::new();
        for (index, line) in text.split("\r\n").enumerate() {
            let soft = index > 0
                && text
                    .split("\r\n")
                    .nth(index - 1)
                    .is_some_and(|line| line.ends_with('='));
            if index > 0 && !soft {
                out.extend(b"\r\n");
            }
            let mut rest = line.strip_suffix('=').unwrap_or(line).as_bytes();
            while let [first, behind @ ..] = rest {
                if *first == b'=' {
                    let hex = std::str::from_utf8(&behind[..2]).unwrap();
                    out.push(u8::from_str_radix(hex, 16).unwrap());
                    rest = &behind[2..];
                } else {
                    out.push(*first);
                    rest = behind;
                }
            }
        }
        out
    }

    proptest! {
        #[test]
        fn line_ends_become_crlf_and_nothing_else_changes(text in "[ab\u{fc}\r\n]{0,40}") {
            let plain = text.replace("\r\n", "\n").replace('\r', "\n").replace('\n', "\r\n");
            prop_assert_eq!(with_crlf(&text), plain);
        }

        #[test]
        fn quoted_printable_comes_back_from_lines_of_at_most_76_characters_without_blanks_at_their_ends(
            text in "([a-c=\u{fc}\u{20ac} \t]{0,90}|\n|x{60,80}| {70,80}){0,8}",
        ) {
            let text = with_crlf(&text).into_owned();
            let mut out = String::new();
            write_text(&mut out, &text, Encoding::QuotedPrintable);
            for line in out.split("\r\n") {
                prop_assert!(line.len() <= ENCODED_LINE && line.is_ascii(), "{}", line);
                prop_assert!(!line.ends_with([' ', '\t']), "{}", line);
            }
            prop_assert_eq!(unquoted(&out), text.as_bytes());
        }
    }
}
