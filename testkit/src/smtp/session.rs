//! One connection of the test server.

mod commands;
mod stream;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use tokio::net::TcpStream;

use self::stream::Stream;
use super::builder::TlsSetup;
use super::script::{Action, Phase};
use super::{Script, Shared};

/// Whether the session goes on.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Go,
    Close,
}

/// What became of a phase.
enum Answered {
    /// The reply given, as code.
    Code(u16),
    /// The session is to end.
    Close,
}

struct Session {
    shared: Arc<Shared>,
    script: Arc<Script>,
    id: u64,
    stream: Stream,
    inbound: BytesMut,
    out: Vec<u8>,
    verbs: Vec<String>,
    tls: bool,
    user: Option<String>,
    helo: String,
    mail: Option<Transaction>,
    /// MAIL commands accepted.
    mails: usize,
    /// Mails taken whose 250 has not gone out yet.
    unanswered: Vec<usize>,
}

struct Transaction {
    /// When MAIL came.
    at: Instant,
    from: String,
    params: String,
    /// RCPT commands so far.
    named: usize,
    /// Recipients accepted.
    to: Vec<String>,
    /// Chunks so far.
    chunks: Vec<u8>,
}

/// Serves a connection to its end.
pub(super) async fn serve(stream: TcpStream, id: u64, shared: Arc<Shared>) {
    shared.record.opened();
    let open = Open { shared, user: None };
    let _ = stream.set_nodelay(true);
    let mut session = Session {
        script: open.shared.script(),
        shared: Arc::clone(&open.shared),
        id,
        stream: Stream::Plain(stream),
        inbound: BytesMut::with_capacity(8192),
        out: Vec::with_capacity(1024),
        verbs: Vec::new(),
        tls: false,
        user: None,
        helo: String::new(),
        mail: None,
        mails: 0,
        unanswered: Vec::new(),
    };
    let mut open = open;
    // A client that goes away is no error of the test's.
    let _ = session.run(&mut open).await;
}

/// Counts the connection as closed however the session ends.
struct Open {
    shared: Arc<Shared>,
    user: Option<String>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.record.closed(self.user.as_deref());
    }
}

impl Session {
    async fn run(&mut self, open: &mut Open) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        if let TlsSetup::Implicit(cert) = &shared.setup.tls {
            self.stream.accept_tls(cert.server_config()).await?;
            self.tls = true;
        }
        if let Answered::Close = self.answer(Phase::Greeting, "220 test.example ESMTP").await? {
            return self.flush().await;
        }
        while let Some(line) = self.line().await? {
            let next = self.command(&line).await?;
            open.user.clone_from(&self.user);
            if next == Next::Close {
                return self.flush().await;
            }
        }
        Ok(())
    }

    async fn command(&mut self, line: &str) -> io::Result<Next> {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        let verb = verb.to_ascii_uppercase();
        self.shared.record.command(&verb);
        if self.shared.setup.trace {
            self.verbs.push(verb.clone());
        }
        match verb.as_str() {
            "EHLO" | "HELO" => self.ehlo(rest).await,
            "STARTTLS" => self.starttls().await,
            "AUTH" => self.auth(rest).await,
            "MAIL" => self.mail(rest).await,
            "RCPT" => self.rcpt(rest).await,
            "DATA" => self.data().await,
            "BDAT" => self.bdat(rest).await,
            "RSET" => {
                self.mail = None;
                self.simple(Phase::Rset, "250 2.0.0 Ok").await
            }
            "NOOP" => self.simple(Phase::Noop, "250 2.0.0 Ok").await,
            "QUIT" => {
                self.simple(Phase::Quit, "221 2.0.0 Bye").await?;
                Ok(Next::Close)
            }
            _ => Ok(self.say("500 5.5.2 Unknown command")),
        }
    }

    /// Reads the octets of a chunk; none if the client goes before.
    async fn octets(&mut self, n: usize) -> io::Result<Option<Vec<u8>>> {
        while self.inbound.len() < n {
            // Replies wait for the end of what is one write of the client's.
            if self.stream.read_buf(&mut self.inbound).await? == 0 {
                return Ok(None);
            }
        }
        Ok(Some(self.inbound.split_to(n).to_vec()))
    }

    /// Reads up to and including the final dot.
    async fn content(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut scanned = 0;
        loop {
            if let Some(end) = end_of_data(&self.inbound, scanned) {
                let bytes = self.inbound.split_to(end);
                let data = &bytes[..end - 3];
                return Ok(Some(if self.shared.setup.keep_data {
                    unstuffed(data)
                } else {
                    Vec::new()
                }));
            }
            scanned = self.inbound.len().saturating_sub(4);
            if !self.fill().await? {
                return Ok(None);
            }
        }
    }

    async fn simple(&mut self, phase: Phase, reply: &str) -> io::Result<Next> {
        let answered = self.answer(phase, reply).await?;
        Ok(next(&answered))
    }

    async fn answer(&mut self, phase: Phase, reply: &str) -> io::Result<Answered> {
        let script = Arc::clone(&self.script);
        self.perform(phase, script.decide(phase), reply).await
    }

    async fn perform(&mut self, phase: Phase, action: Option<&Action>, reply: &str) -> io::Result<Answered> {
        if let Some(delay) = self.script.delay_of(phase) {
            self.flush().await?;
            tokio::time::sleep(delay).await;
        }
        if let Some(Action::Delay(delay)) = action {
            self.flush().await?;
            tokio::time::sleep(*delay).await;
        }
        let reply = match action {
            None | Some(Action::Delay(_)) => reply,
            Some(Action::Reply(reply)) => reply,
            Some(Action::ReplyThenClose(reply)) => {
                self.say(reply);
                return Ok(Answered::Close);
            }
            Some(Action::Close | Action::TakeThenClose) => return Ok(Answered::Close),
            Some(Action::Silence | Action::TakeThenSilence) => {
                self.flush().await?;
                // Reads on, so that it notices when the client goes.
                while self.fill().await? {
                    self.inbound.clear();
                }
                return Ok(Answered::Close);
            }
        };
        self.say(reply);
        let code = reply.get(..3).and_then(|code| code.parse().ok()).unwrap_or(0);
        Ok(Answered::Code(code))
    }

    fn say(&mut self, reply: &str) -> Next {
        self.out.extend_from_slice(reply.as_bytes());
        self.out.extend_from_slice(b"\r\n");
        Next::Go
    }

    /// The next line; what was said before goes out only when nothing more has come in, all of it at once.
    async fn line(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = self.inbound.iter().position(|b| *b == b'\n') {
                let line = self.inbound.split_to(end + 1);
                return Ok(Some(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            if self.inbound.len() > 64 << 10 || !self.fill().await? {
                return Ok(None);
            }
        }
    }

    async fn fill(&mut self) -> io::Result<bool> {
        self.flush().await?;
        let n = self.stream.read_buf(&mut self.inbound).await?;
        self.script = self.shared.script();
        Ok(n > 0)
    }

    async fn flush(&mut self) -> io::Result<()> {
        if !self.verbs.is_empty() {
            self.shared.record.batch(std::mem::take(&mut self.verbs));
        }
        if !self.out.is_empty() {
            if let Some(latency) = self.shared.setup.latency {
                tokio::time::sleep(latency).await;
            }
            self.shared.record.count(|counters| counters.turns += 1);
            match self.script.drip_pause() {
                None => self.stream.write_all(&self.out).await?,
                Some(pause) => {
                    for byte in &self.out {
                        self.stream.write_all(std::slice::from_ref(byte)).await?;
                        tokio::time::sleep(pause).await;
                    }
                }
            }
            self.out.clear();
        }
        for id in self.unanswered.drain(..) {
            self.shared.record.answered(id);
        }
        Ok(())
    }
}

fn next(answered: &Answered) -> Next {
    match answered {
        Answered::Code(_) => Next::Go,
        Answered::Close => Next::Close,
    }
}

/// The end of the mail, final dot and its CRLF included; `scanned` bytes are known to hold no whole one.
fn end_of_data(bytes: &[u8], scanned: usize) -> Option<usize> {
    if bytes.starts_with(b".\r\n") {
        return Some(3);
    }
    let mut at = scanned;
    while let Some(found) = bytes[at..].iter().position(|b| *b == b'.') {
        let dot = at + found;
        if dot >= 2 && &bytes[dot - 2..dot] == b"\r\n" && bytes[dot + 1..].starts_with(b"\r\n") {
            return Some(dot + 3);
        }
        at = dot + 1;
    }
    None
}

/// Takes away the dot put before a leading dot (RFC 5321 §4.5.2).
fn unstuffed(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len());
    for line in data.split_inclusive(|b| *b == b'\n') {
        out.extend_from_slice(line.strip_prefix(b".").unwrap_or(line));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_found_however_the_bytes_are_cut() {
        let mail = b"a.b\r\n..x\r\n.\r\nRSET\r\n";
        assert_eq!(end_of_data(mail, 0), Some(13));
        assert_eq!(end_of_data(&mail[..12], 0), None);
        assert_eq!(end_of_data(mail, 8), Some(13));
        assert_eq!(end_of_data(b".\r\n", 0), Some(3));
        assert_eq!(unstuffed(b"a\r\n..x\r\n"), b"a\r\n.x\r\n");
    }
}
