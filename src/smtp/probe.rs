//! The first chunk of a mail, which shows whether a server knows BDAT (RFC 3030).
//!
//! A server that only passes the keyword on, as some proxies do, reads the octets of a chunk as commands. So the first
//! chunk is one line, the `Date` field, which nobody else has written and which tells nothing: to such a server it is one
//! unknown command. An empty chunk would have no octets at all, but Exchange takes `BDAT 0` for a syntax error and hangs up.

use memchr::memchr;

/// Longest first chunk, in octets.
const MAX_LEN: usize = 200;

/// The `Date` field with its line end, if the mail begins with it and goes on behind it.
pub(super) fn first_chunk(message: &[u8]) -> Option<&str> {
    let head = &message[..message.len().min(MAX_LEN)];
    let (line, _) = head.split_at(memchr(b'\n', head)? + 1);
    let text = line.strip_suffix(b"\r\n")?;
    let is_one_line = text.iter().all(|byte| *byte == b' ' || byte.is_ascii_graphic());
    if !text.starts_with(b"Date: ") || !is_one_line || line.len() == message.len() {
        return None;
    }
    str::from_utf8(line).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_chunk_is_the_date_and_nothing_else() {
        let date = "Date: Mon, 2 Nov 2026 08:09:10 +0000\r\n";
        let mail = format!("{date}Subject: x\r\n\r\nDate: y\r\n");
        assert_eq!(first_chunk(mail.as_bytes()), Some(date));
        for other in [
            "",
            "Date: x",
            "Date: x\r\n",
            "Date: x\nSubject: x\r\n",
            "Date: x\rRSET\r\nSubject: x\r\n",
            "Date: \u{fc}\r\nSubject: x\r\n",
            "Subject: x\r\nDate: x\r\n",
            "date: x\r\nSubject: x\r\n",
        ] {
            assert_eq!(first_chunk(other.as_bytes()), None, "{other:?}");
        }
        let of = |len: usize| format!("Date: {}\r\nSubject: x\r\n", "x".repeat(len - "Date: \r\n".len()));
        assert_eq!(first_chunk(of(200).as_bytes()).map(str::len), Some(200));
        assert_eq!(first_chunk(of(201).as_bytes()), None);
    }
}
