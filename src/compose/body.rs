//! Transfer encodings of bodies (RFC 2045 §6): 7bit where it does, else quoted-printable or base64. Never 8bit, so
//! that a mail passes through every server.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

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
        } else if special > 0 || text.split("\r\n").any(|line| line.len() > MAX_LINE) {
            Self::QuotedPrintable
        } else {
            Self::SevenBit
        }
    }
}

/// The text with CRLF line ends, as mail has them; a lone CR or LF ends a line too.
pub(super) fn with_crlf(text: &str) -> Cow<'_, str> {
    let bytes = text.as_bytes();
    let lone = |(index, byte): (usize, &u8)| match byte {
        b'\n' => index == 0 || bytes[index - 1] != b'\r',
        b'\r' => bytes.get(index + 1) != Some(&b'\n'),
        _ => false,
    };
    if !bytes.iter().enumerate().any(lone) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + text.len() / 16 + 16);
    let mut rest = text;
    while let Some(end) = rest.find(['\r', '\n']) {
        out.push_str(&rest[..end]);
        out.push_str("\r\n");
        let width = if rest[end..].starts_with("\r\n") { 2 } else { 1 };
        rest = &rest[end + width..];
    }
    out.push_str(rest);
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
    out.reserve(base64_len(bytes.len()));
    let mut line = [0; ENCODED_LINE];
    for (index, chunk) in bytes.chunks(ENCODED_LINE / 4 * 3).enumerate() {
        if index > 0 {
            out.push_str("\r\n");
        }
        let written = STANDARD.encode_slice(chunk, &mut line).unwrap_or(0);
        out.push_str(std::str::from_utf8(&line[..written]).unwrap_or(""));
    }
}

/// Length of [`write_base64`]'s output for so many bytes, roughly from above.
pub(super) fn base64_len(bytes: usize) -> usize {
    bytes / 3 * 4 + bytes / 28 + 8
}

fn write_quoted_printable(out: &mut String, text: &str) {
    out.reserve(text.len() + text.len() / 4);
    for (index, line) in text.split("\r\n").enumerate() {
        if index > 0 {
            out.push_str("\r\n");
        }
        write_quoted_printable_line(out, line.as_bytes());
    }
}

fn write_quoted_printable_line(out: &mut String, line: &[u8]) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut column = 0;
    for (index, &byte) in line.iter().enumerate() {
        let last = index + 1 == line.len();
        let literal = match byte {
            b' ' | b'\t' => !last,
            b'=' => false,
            _ => byte.is_ascii_graphic(),
        };
        let width = if literal { 1 } else { 3 };
        // A soft line break needs a column itself.
        if column + width > ENCODED_LINE - usize::from(!last) {
            out.push_str("=\r\n");
            column = 0;
        }
        if literal {
            out.push(char::from(byte));
        } else {
            out.push('=');
            out.push(char::from(HEX[usize::from(byte >> 4)]));
            out.push(char::from(HEX[usize::from(byte & 15)]));
        }
        column += width;
    }
}
