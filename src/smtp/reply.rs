//! What a server says, line by line: kept as it was said, and made fit for lettre's parser.

use bytes::BytesMut;

use crate::failure::Reply;

/// Text kept of one reply, in bytes; lettre gives up at 100 000.
const MAX_TEXT: usize = 16 << 10;

/// The latest reply, and the one before.
#[derive(Debug, Default)]
pub(crate) struct ReplyText {
    latest: Said,
    before: Said,
    complete: bool,
}

#[derive(Debug, Default)]
struct Said {
    code: u16,
    /// Text of the lines, without codes, each ended by a line feed.
    text: String,
}

impl ReplyText {
    /// Takes a line with its end, and leaves of it what lettre's parser needs.
    pub(crate) fn push(&mut self, line: &mut BytesMut) {
        if self.complete {
            std::mem::swap(&mut self.before, &mut self.latest);
            self.latest.text.clear();
            self.complete = false;
        }
        let said = String::from_utf8_lossy(line);
        let said = said.trim_end();
        self.latest.code = said.get(..3).and_then(|code| code.parse().ok()).unwrap_or(0);
        if self.latest.text.len() + said.len() < MAX_TEXT {
            self.latest.text.push_str(said.get(4..).unwrap_or_default());
            self.latest.text.push('\n');
        }
        self.complete = said.as_bytes().get(3) != Some(&b'-');
        make_parseable(line);
    }

    /// The latest reply.
    pub(crate) fn reply(&self) -> Reply {
        self.latest.reply()
    }

    /// The latest reply if it is negative, else the one before: lettre says QUIT by itself when EHLO is refused.
    pub(crate) fn refusal(&self) -> Reply {
        if self.latest.code >= 400 {
            self.latest.reply()
        } else {
            self.before.reply()
        }
    }

    /// Whether the latest reply has its last line.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    pub(crate) fn lines(&self) -> std::str::Lines<'_> {
        self.latest.text.lines()
    }
}

impl Said {
    /// As a value; an enhanced code repeated on every line is kept once.
    fn reply(&self) -> Reply {
        let mut lines = self.text.lines();
        let first = lines.next().unwrap_or_default();
        if self.text.len() <= first.len() + 1 {
            return Reply::new(self.code, first);
        }
        let code = first.split(' ').next().unwrap_or_default();
        let mut text = first.to_owned();
        for line in lines {
            text.push(' ');
            let repeated = line.strip_prefix(code).filter(|_| code.contains('.'));
            text.push_str(repeated.unwrap_or(line).trim());
        }
        Reply::new(self.code, &text)
    }
}

/// Leaves of a line the code and whether more follow. lettre needs no more, and would refuse codes such as 571,
/// text that is not UTF-8, a code without text (RFC 5321 §4.2 allows it) and long lines.
fn make_parseable(line: &mut BytesMut) {
    let said = line.trim_ascii_end();
    let separator = said.get(3).copied().unwrap_or(b' ');
    let known =
        said.len() >= 3 && said[..3].iter().all(u8::is_ascii_digit) && matches!(separator, b' ' | b'-');
    if !known {
        line.clear();
        line.extend_from_slice(b"?\r\n");
        return;
    }
    line.truncate(3);
    line[1] = line[1].min(b'5');
    line.extend_from_slice(&[separator, b'x', b'\r', b'\n']);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(lines: &[&[u8]]) -> (Reply, Vec<BytesMut>) {
        let mut text = ReplyText::default();
        let mut parseable = Vec::new();
        for line in lines {
            let mut line = BytesMut::from(*line);
            text.push(&mut line);
            parseable.push(line);
        }
        (text.reply(), parseable)
    }

    #[test]
    fn lines_are_joined_and_the_enhanced_code_kept_once() {
        let (reply, _) = said(&[b"550-5.1.1 No such user\r\n", b"550 5.1.1 see the manual\r\n"]);
        assert_eq!(reply.code, 550);
        assert_eq!(reply.enhanced.as_deref(), Some("5.1.1"));
        assert_eq!(&*reply.text, "No such user see the manual");
    }

    #[test]
    fn a_code_unknown_to_rfc_5321_is_kept_and_still_parsed() {
        let (reply, lines) = said(&[b"571 Delivery not authorized\r\n"]);
        assert_eq!(reply.code, 571);
        assert_eq!(&lines[0][..], b"551 x\r\n");
    }

    #[test]
    fn text_that_is_not_utf_8_is_no_trouble() {
        let (reply, lines) = said(&[b"250 angenommen f\xfcr Empf\xe4nger\n"]);
        assert_eq!(reply.code, 250);
        assert_eq!(&lines[0][..], b"250 x\r\n");
    }

    #[test]
    fn a_bare_code_is_a_reply() {
        let (reply, lines) = said(&[b"250\r\n"]);
        assert_eq!((reply.code, &*reply.text), (250, ""));
        assert_eq!(&lines[0][..], b"250 x\r\n");
    }

    #[test]
    fn a_new_reply_replaces_the_last() {
        let (reply, _) = said(&[b"250 2.1.0 Ok\r\n", b"354 go on\r\n"]);
        assert_eq!((reply.code, reply.enhanced, &*reply.text), (354, None, "go on"));
    }
}
