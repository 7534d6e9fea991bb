//! What the sink makes of the bytes of a connection: replies, and mails counted.

use memchr::memmem;

use super::{Mode, Shared};

/// End of the data, with the line end before it.
const DOT: &[u8] = b"\r\n.\r\n";

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Command,
    /// Within DATA.
    Data,
    /// Within a chunk: bytes to come, and whether it is the last.
    Chunk(usize, bool),
    /// Lines of AUTH to come.
    Auth(u8),
    Ended,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Protocol<'a> {
    shared: &'a Shared,
    mode: Mode,
    state: State,
    /// Recipients accepted in this transaction.
    recipients: usize,
}

impl<'a> Protocol<'a> {
    pub(super) fn new(shared: &'a Shared) -> Self {
        Self {
            shared,
            mode: shared.mode(),
            state: State::Command,
            recipients: 0,
        }
    }

    /// After QUIT.
    pub(super) fn ended(&self) -> bool {
        self.state == State::Ended
    }

    /// Consumes what is complete of the input, and adds the replies.
    pub(super) fn take(&mut self, input: &mut Vec<u8>, output: &mut Vec<u8>) {
        let mut at = 0;
        while let Some(used) = self.step(&input[at..], output) {
            at += used;
        }
        input.drain(..at);
    }

    /// How much of the input it used; nothing if there is not enough.
    fn step(&mut self, input: &[u8], output: &mut Vec<u8>) -> Option<usize> {
        match self.state {
            State::Data => match memmem::find(input, DOT) {
                Some(at) => {
                    self.took(output);
                    Some(at + DOT.len())
                }
                // The dot may be cut in two.
                None => (input.len() >= DOT.len()).then(|| input.len() - (DOT.len() - 1)),
            },
            State::Chunk(left, last) if input.len() >= left => {
                self.state = State::Command;
                if last {
                    self.took(output);
                } else {
                    output.extend(b"250 2.0.0 more\r\n");
                }
                Some(left)
            }
            State::Chunk(left, last) => {
                self.state = State::Chunk(left - input.len(), last);
                (!input.is_empty()).then_some(input.len())
            }
            State::Ended => None,
            State::Command | State::Auth(_) => {
                let end = memchr::memchr(b'\n', input)?;
                self.line(input[..end].trim_ascii_end(), output);
                Some(end + 1)
            }
        }
    }

    fn took(&mut self, output: &mut Vec<u8>) {
        self.state = State::Command;
        if self.recipients == 0 {
            output.extend(b"554 5.5.1 no valid recipients\r\n");
            return;
        }
        self.recipients = 0;
        self.shared.took();
        output.extend(b"250 2.0.0 taken\r\n");
    }

    fn line(&mut self, line: &[u8], output: &mut Vec<u8>) {
        if let State::Auth(more) = self.state {
            self.auth(more.saturating_sub(1), output);
            return;
        }
        let verb = line.get(..4).unwrap_or(line).to_ascii_uppercase();
        let reply: &[u8] = match verb.as_slice() {
            b"EHLO" => return self.greet(output),
            b"RCPT" if self.shared.defers(address(line)) => b"451 4.7.1 later\r\n",
            b"RCPT" => {
                self.recipients += 1;
                b"250 2.1.5 ok\r\n"
            }
            b"DATA" if self.recipients == 0 => b"503 5.5.1 no valid recipients\r\n",
            b"DATA" => {
                self.state = State::Data;
                b"354 go on\r\n"
            }
            b"BDAT" => return self.chunk(line, output),
            b"AUTH" => {
                let words = line.split(|byte| *byte == b' ').count();
                let login = line
                    .get(5..)
                    .is_some_and(|rest| rest.to_ascii_uppercase().starts_with(b"LOGIN"));
                return self.auth(1 + u8::from(login) - (words - 2).min(1) as u8, output);
            }
            b"QUIT" => {
                self.state = State::Ended;
                b"221 2.0.0 bye\r\n"
            }
            b"MAIL" | b"RSET" => {
                self.recipients = 0;
                b"250 2.1.0 ok\r\n"
            }
            b"NOOP" => b"250 2.0.0 ok\r\n",
            _ => b"500 5.5.1 what?\r\n",
        };
        output.extend(reply);
    }

    fn greet(&self, output: &mut Vec<u8>) {
        output.extend(
            b"250-sink\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n250-SIZE 104857600\r\n250-AUTH PLAIN LOGIN\r\n",
        );
        if self.mode.pipelining {
            output.extend(b"250-PIPELINING\r\n");
        }
        if self.mode.chunking {
            output.extend(b"250-CHUNKING\r\n");
        }
        output.extend(b"250 ENHANCEDSTATUSCODES\r\n");
    }

    fn auth(&mut self, more: u8, output: &mut Vec<u8>) {
        if more == 0 {
            self.state = State::Command;
            output.extend(b"235 2.7.0 welcome\r\n");
        } else {
            self.state = State::Auth(more);
            output.extend(b"334 \r\n");
        }
    }

    fn chunk(&mut self, line: &[u8], output: &mut Vec<u8>) {
        let line = String::from_utf8_lossy(line).to_ascii_uppercase();
        let mut words = line.split_whitespace().skip(1);
        match words.next().and_then(|size| size.parse().ok()) {
            Some(size) => self.state = State::Chunk(size, words.next() == Some("LAST")),
            None => output.extend(b"501 5.5.4 size?\r\n"),
        }
    }
}

/// Between the angle brackets.
fn address(line: &[u8]) -> &[u8] {
    let begin = memchr::memchr(b'<', line).map_or(0, |at| at + 1);
    let end = memchr::memchr(b'>', line).unwrap_or(line.len());
    line.get(begin..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replies(mode: Mode, pieces: &[&[u8]]) -> (String, u64) {
        let shared = Shared::default();
        shared.begin(mode);
        let mut protocol = Protocol::new(&shared);
        let (mut input, mut output) = (Vec::new(), Vec::new());
        for piece in pieces {
            input.extend_from_slice(piece);
            protocol.take(&mut input, &mut output);
        }
        (
            String::from_utf8_lossy(&output).into_owned(),
            shared.taken().mails,
        )
    }

    #[test]
    fn a_mail_cut_anywhere_is_one_mail() {
        let mail = b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nSubject: x\r\n\r\n..\r\n.\r\nQUIT\r\n";
        for cut in 0..mail.len() {
            let (text, mails) = replies(Mode::default(), &[&mail[..cut], &mail[cut..]]);
            assert_eq!(mails, 1, "cut at {cut}: {text}");
            assert!(text.ends_with("221 2.0.0 bye\r\n"), "cut at {cut}: {text}");
        }
    }

    #[test]
    fn a_chunk_cut_anywhere_is_one_mail() {
        let mail = b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT 3\r\nabcBDAT 4 LAST\r\n\r\n.\nNOOP\r\n";
        for cut in 0..mail.len() {
            let (text, mails) = replies(Mode::default(), &[&mail[..cut], &mail[cut..]]);
            assert_eq!(mails, 1, "cut at {cut}: {text}");
        }
    }

    #[test]
    fn who_is_to_come_later_is_taken_the_second_time() {
        let again = b"RCPT TO:<later-1@d>\r\nRCPT TO:<later-1@d>\r\n";
        let (text, _) = replies(Mode::default(), &[again]);
        assert_eq!(text, "451 4.7.1 later\r\n250 2.1.5 ok\r\n");
    }
}
