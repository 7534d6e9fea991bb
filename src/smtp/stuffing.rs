//! A mail as it goes over the wire, cut into blocks: after DATA with leading dots doubled and ended by a lone one
//! (RFC 5321 §4.5.2), or as a chunk whose octets are counted (BDAT, RFC 3030 §2).

use memchr::memchr_iter;

/// Bytes of the mail in one write. Together with the doubled dots and the end, a small mail is one write.
const BLOCK: usize = 64 << 10;

/// The blocks of a mail, made one at a time in the same buffer.
pub(crate) struct Blocks<'a> {
    rest: &'a [u8],
    at_line_start: bool,
    /// The mail does not end with CRLF; a lone LF is no end of line.
    lacks_line_end: bool,
    form: Form,
    progress: Progress,
    buffer: Vec<u8>,
}

/// What shows the server where the mail ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A lone dot.
    Stuffed,
    /// The number of octets, said before.
    Counted,
}

/// How many blocks were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Start,
    Middle,
    End,
}

/// Bytes for one write.
pub(crate) struct Block<'b> {
    pub(crate) bytes: &'b [u8],
    /// Holds the end of the mail.
    pub(crate) is_last: bool,
}

impl<'a> Blocks<'a> {
    pub(crate) fn new(message: &'a [u8]) -> Self {
        Self {
            rest: message,
            at_line_start: true,
            lacks_line_end: !message.is_empty() && !message.ends_with(b"\r\n"),
            form: Form::Stuffed,
            progress: Progress::Start,
            buffer: Vec::with_capacity(message.len().min(BLOCK) + 64),
        }
    }

    /// As one chunk, the last; `message` is what earlier ones have not brought. The first block begins with `commands`,
    /// those that go before BDAT in the same write.
    pub(crate) fn counted(message: &'a [u8], commands: &str) -> Self {
        let mut blocks = Self::new(message);
        blocks.form = Form::Counted;
        let octets = message.len() + if blocks.lacks_line_end { 2 } else { 0 };
        blocks.buffer.reserve(commands.len());
        blocks.buffer.extend_from_slice(commands.as_bytes());
        let command = format!("BDAT {octets} LAST\r\n");
        blocks.buffer.extend_from_slice(command.as_bytes());
        blocks
    }

    /// Whether the server knows the number of octets, so that it cannot take a mail that lacks one.
    pub(crate) fn are_counted(&self) -> bool {
        self.form == Form::Counted
    }

    pub(crate) fn next_block(&mut self) -> Option<Block<'_>> {
        match self.progress {
            // What goes before the mail is there already.
            Progress::Start => self.progress = Progress::Middle,
            Progress::Middle => self.buffer.clear(),
            Progress::End => return None,
        }
        let (block, rest) = self.rest.split_at(self.rest.len().min(BLOCK));
        self.rest = rest;
        match self.form {
            Form::Stuffed => self.stuff(block),
            Form::Counted => self.buffer.extend_from_slice(block),
        }
        if self.rest.is_empty() {
            self.progress = Progress::End;
            if self.lacks_line_end {
                self.buffer.extend_from_slice(b"\r\n");
            }
            if self.form == Form::Stuffed {
                self.buffer.extend_from_slice(b".\r\n");
            }
        }
        Some(Block {
            bytes: &self.buffer,
            is_last: self.progress == Progress::End,
        })
    }

    fn stuff(&mut self, block: &[u8]) {
        let mut copied = 0;
        // Dots are rarer than line ends, and base64 has none.
        for dot in memchr_iter(b'.', block) {
            let leads = if dot == 0 {
                self.at_line_start
            } else {
                block[dot - 1] == b'\n'
            };
            if leads {
                self.buffer.extend_from_slice(&block[copied..dot]);
                self.buffer.push(b'.');
                copied = dot;
            }
        }
        self.buffer.extend_from_slice(&block[copied..]);
        if let Some(last) = block.last() {
            self.at_line_start = *last == b'\n';
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stuffed(message: &[u8]) -> (Vec<u8>, usize) {
        let mut blocks = Blocks::new(message);
        let (mut out, mut count) = (Vec::new(), 0);
        while let Some(block) = blocks.next_block() {
            assert_eq!(block.is_last, blocks_end(block.bytes));
            out.extend_from_slice(block.bytes);
            count += 1;
        }
        (out, count)
    }

    fn blocks_end(bytes: &[u8]) -> bool {
        bytes.ends_with(b".\r\n") && (bytes.len() == 3 || bytes.ends_with(b"\n.\r\n"))
    }

    #[test]
    fn a_small_mail_is_one_block() {
        for (message, wire) in [
            ("a\r\n", "a\r\n.\r\n"),
            ("a", "a\r\n.\r\n"),
            ("", ".\r\n"),
            (".a\r\n..\r\nb.\r\n", "..a\r\n...\r\nb.\r\n.\r\n"),
            ("a\n.\nb", "a\n..\nb\r\n.\r\n"),
            ("a\n", "a\n\r\n.\r\n"),
        ] {
            let (out, count) = stuffed(message.as_bytes());
            assert_eq!(String::from_utf8(out).unwrap(), wire);
            assert_eq!(count, 1);
        }
    }

    #[test]
    fn a_dot_that_begins_a_block_is_doubled_only_at_the_start_of_a_line() {
        let mut message = vec![b'a'; BLOCK];
        message.extend_from_slice(b".\r\n");
        assert!(stuffed(&message).0.ends_with(b"a.\r\n.\r\n"));
        message[BLOCK - 2..BLOCK].copy_from_slice(b"\r\n");
        let (out, count) = stuffed(&message);
        assert!(out.ends_with(b"a\r\n..\r\n.\r\n"));
        assert_eq!(count, 2);
    }

    #[test]
    fn a_chunk_has_as_many_octets_as_it_says_none_changed_after_the_commands_before_it() {
        let large = [vec![b'a'; BLOCK].as_slice(), b".\r\n.\r\n"].concat();
        for (message, end) in [(&b".a\r\n.\r\n"[..], ""), (b"", ""), (b"a", "\r\n"), (&large, "")] {
            let mut blocks = Blocks::counted(message, "MAIL FROM:<>\r\n");
            let mut out = Vec::new();
            while let Some(block) = blocks.next_block() {
                out.extend_from_slice(block.bytes);
            }
            let octets = message.len() + end.len();
            let mut wire = format!("MAIL FROM:<>\r\nBDAT {octets} LAST\r\n").into_bytes();
            wire.extend_from_slice(message);
            wire.extend_from_slice(end.as_bytes());
            assert!(out == wire, "{octets}");
        }
    }

    proptest! {
        #[test]
        fn no_mail_holds_its_own_end(lines in proptest::collection::vec("[.a\r\n]{0,4}", 0..60)) {
            let message = lines.join("\r\n");
            let (out, _) = stuffed(message.as_bytes());
            let end = out.windows(5).position(|w| w == b"\r\n.\r\n").map_or(3, |at| at + 5);
            prop_assert_eq!(end, out.len());
            let text = String::from_utf8(out).unwrap();
            let back: String = text
                .split_inclusive('\n')
                .map(|line| line.strip_prefix('.').unwrap_or(line))
                .collect();
            let body = back.strip_suffix("\r\n").unwrap();
            prop_assert!(body == message || body.strip_suffix("\r\n") == Some(message.as_str()));
        }
    }
}
