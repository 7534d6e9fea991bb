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
