//! One connection of the test server.

mod stream;

use std::io;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::BytesMut;
use tokio::net::TcpStream;

use self::stream::Stream;
use super::builder::TlsSetup;
use super::record::Received;
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
    mail: Option<Transaction>,
}

#[derive(Default)]
struct Transaction {
    from: String,
    params: String,
    to: Vec<String>,
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
        mail: None,
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
            "EHLO" | "HELO" => self.ehlo().await,
            "STARTTLS" => self.starttls().await,
            "AUTH" => self.auth(rest).await,
            "MAIL" => self.mail(rest).await,
            "RCPT" => self.rcpt(rest).await,
            "DATA" => self.data().await,
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

    async fn ehlo(&mut self) -> io::Result<Next> {
        self.mail = None;
        let setup = &self.shared.setup;
        let mut lines = vec!["test.example".to_owned()];
        if let Some(size) = setup.size {
            lines.push(format!("SIZE {size}"));
        }
        let offer_auth = !setup.users.is_empty() && (self.tls || setup.auth_in_plain);
        if offer_auth && !setup.mechanisms.is_empty() {
            lines.push(format!("AUTH {}", setup.mechanisms.join(" ")));
        }
        let starttls = matches!(setup.tls, TlsSetup::StartTls(_)) && !self.tls && setup.offer_starttls;
        let switches = [
            ("STARTTLS", starttls),
            ("PIPELINING", setup.pipelining),
            ("8BITMIME", setup.eight_bit_mime),
            ("SMTPUTF8", setup.smtputf8),
            ("CHUNKING", setup.chunking),
            ("ENHANCEDSTATUSCODES", true),
        ];
        lines.extend(
            switches
                .iter()
                .filter(|(_, on)| *on)
                .map(|(name, _)| (*name).to_owned()),
        );
        let last = lines.len() - 1;
        let reply: Vec<String> = lines
            .iter()
            .enumerate()
            .map(|(n, line)| format!("250{}{line}", if n == last { ' ' } else { '-' }))
            .collect();
        self.simple(Phase::Ehlo, &reply.join("\r\n")).await
    }

    async fn starttls(&mut self) -> io::Result<Next> {
        let shared = Arc::clone(&self.shared);
        let TlsSetup::StartTls(cert) = &shared.setup.tls else {
            return Ok(self.say("502 5.5.1 Not implemented"));
        };
        match self
            .answer(Phase::StartTls, "220 2.0.0 Ready to start TLS")
            .await?
        {
            Answered::Code(220) => {
                self.flush().await?;
                // Whatever came in clear after STARTTLS is forgotten (RFC 3207 §4.2).
                self.inbound.clear();
                self.stream.accept_tls(cert.server_config()).await?;
                self.tls = true;
                self.mail = None;
                Ok(Next::Go)
            }
            Answered::Code(_) => Ok(Next::Go),
            Answered::Close => Ok(Next::Close),
        }
    }

    async fn auth(&mut self, rest: &str) -> io::Result<Next> {
        let (mechanism, initial) = rest.split_once(' ').unwrap_or((rest, ""));
        let offered = self.shared.setup.mechanisms.iter().any(|m| m == mechanism);
        let given = match mechanism {
            "PLAIN" if offered => {
                let response = if initial.is_empty() {
                    self.challenge("334 ").await?
                } else {
                    initial.to_owned()
                };
                plain(&response)
            }
            "LOGIN" if offered => {
                let user = self.challenge("334 VXNlcm5hbWU6").await?;
                let password = self.challenge("334 UGFzc3dvcmQ6").await?;
                decoded(&user).zip(decoded(&password))
            }
            _ => return Ok(self.say("504 5.5.4 Unrecognized authentication type")),
        };
        let known = given.filter(|given| self.shared.setup.users.contains(given));
        let (reply, user) = match known {
            Some((user, _)) => ("235 2.7.0 Authentication successful", Some(user)),
            None => ("535 5.7.8 Authentication credentials invalid", None),
        };
        let answered = self.answer(Phase::Auth, reply).await?;
        match (&answered, user) {
            (Answered::Code(235), Some(user)) => {
                self.shared.record.logged_in(&user);
                self.user = Some(user);
            }
            _ => self.shared.record.count(|counters| counters.auth_failed += 1),
        }
        Ok(next(&answered))
    }

    async fn challenge(&mut self, reply: &str) -> io::Result<String> {
        self.say(reply);
        self.line()
            .await?
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    async fn mail(&mut self, rest: &str) -> io::Result<Next> {
        if !self.shared.setup.users.is_empty() && self.user.is_none() {
            return Ok(self.say("530 5.7.0 Authentication required"));
        }
        if self.mail.is_some() {
            return Ok(self.say("503 5.5.1 Nested MAIL command"));
        }
        let Some((from, params)) = path(rest, "FROM:") else {
            return Ok(self.say("501 5.5.4 Syntax: MAIL FROM:<address>"));
        };
        let announced = params
            .split(' ')
            .find_map(|p| p.strip_prefix("SIZE=")?.parse::<u64>().ok());
        if announced
            .zip(self.shared.setup.size)
            .is_some_and(|(size, limit)| size > limit)
        {
            return Ok(self.say("552 5.3.4 Message size exceeds fixed limit"));
        }
        let begun = Transaction {
            from: from.to_owned(),
            params: params.to_owned(),
            to: Vec::new(),
        };
        let answered = self.answer(Phase::Mail, "250 2.1.0 Ok").await?;
        if let Answered::Code(250) = answered {
            self.mail = Some(begun);
        }
        Ok(next(&answered))
    }

    async fn rcpt(&mut self, rest: &str) -> io::Result<Next> {
        if self.mail.is_none() {
            return Ok(self.say("503 5.5.1 Need MAIL command"));
        }
        let Some((to, _)) = path(rest, "TO:") else {
            return Ok(self.say("501 5.5.4 Syntax: RCPT TO:<address>"));
        };
        let refusal = self.script.refusal(to);
        let reply = refusal.as_deref().unwrap_or("250 2.1.5 Ok");
        let answered = self.answer(Phase::Rcpt, reply).await?;
        if let (Answered::Code(250), Some(mail)) = (&answered, &mut self.mail) {
            mail.to.push(to.to_owned());
        }
        Ok(next(&answered))
    }

    async fn data(&mut self) -> io::Result<Next> {
        let reply = match &self.mail {
            None => "503 5.5.1 Need MAIL command",
            Some(mail) if mail.to.is_empty() => "554 5.5.1 No valid recipients",
            Some(_) => "354 End data with <CR><LF>.<CR><LF>",
        };
        match self.answer(Phase::Data, reply).await? {
            Answered::Close => return Ok(Next::Close),
            Answered::Code(354) => {}
            Answered::Code(_) => return Ok(Next::Go),
        }
        let Some(data) = self.content().await? else {
            return Ok(Next::Close);
        };
        let mail = self.mail.take().unwrap_or_default();
        let action = self.script.decide(Phase::FinalDot).cloned();
        let taken = match &action {
            None | Some(Action::TakeThenClose | Action::TakeThenSilence) => !mail.to.is_empty(),
            Some(Action::Reply(reply) | Action::ReplyThenClose(reply)) => reply.starts_with('2'),
            Some(Action::Close | Action::Silence) => false,
        };
        let reply = if mail.to.is_empty() {
            "554 5.5.1 No valid recipients".to_owned()
        } else {
            format!(
                "250 2.0.0 Ok: queued as {}",
                self.shared.record.received_count() + 1
            )
        };
        if taken {
            self.record(mail, data);
        }
        let answered = self.perform(Phase::FinalDot, action.as_ref(), &reply).await?;
        Ok(next(&answered))
    }

    fn record(&self, mail: Transaction, data: Vec<u8>) {
        self.shared.record.take(Received {
            at: Instant::now(),
            time: SystemTime::now(),
            from: mail.from,
            params: mail.params,
            to: mail.to,
            data,
            session: self.id,
            tls: self.tls,
            user: self.user.clone(),
        });
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
        let reply = match action {
            None => reply,
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
            self.stream.write_all(&self.out).await?;
            self.out.clear();
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

/// Splits `FROM:<a@b> PARAMS` into address and parameters.
fn path<'a>(rest: &'a str, keyword: &str) -> Option<(&'a str, &'a str)> {
    let head = rest.get(..keyword.len())?;
    if !head.eq_ignore_ascii_case(keyword) {
        return None;
    }
    let (address, params) = rest[keyword.len()..].strip_prefix('<')?.split_once('>')?;
    Some((address, params.trim()))
}

fn decoded(text: &str) -> Option<String> {
    String::from_utf8(STANDARD.decode(text).ok()?).ok()
}

fn plain(response: &str) -> Option<(String, String)> {
    let text = decoded(response)?;
    let mut parts = text.split('\0').skip(1);
    Some((parts.next()?.to_owned(), parts.next()?.to_owned()))
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
