//! The commands of a session, one function each.

use std::io;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

use super::{Answered, Next, Session, Transaction, next};
use crate::smtp::builder::TlsSetup;
use crate::smtp::record::{Received, Refused};
use crate::smtp::script::{Action, Phase};

impl Session {
    pub(super) async fn ehlo(&mut self, name: &str) -> io::Result<Next> {
        self.mail = None;
        name.clone_into(&mut self.helo);
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

    pub(super) async fn starttls(&mut self) -> io::Result<Next> {
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

    pub(super) async fn auth(&mut self, rest: &str) -> io::Result<Next> {
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

    pub(super) async fn challenge(&mut self, reply: &str) -> io::Result<String> {
        self.say(reply);
        self.line()
            .await?
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    pub(super) async fn mail(&mut self, rest: &str) -> io::Result<Next> {
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
            at: Instant::now(),
            from: from.to_owned(),
            params: params.to_owned(),
            named: 0,
            to: Vec::new(),
            chunks: Vec::new(),
        };
        let ended = self.script.session_ends(self.mails);
        let reply = ended.as_deref().unwrap_or("250 2.1.0 Ok");
        let answered = self.answer(Phase::Mail, reply).await?;
        self.note_refusal(Phase::Mail, &answered, None);
        if let Answered::Code(250) = answered {
            self.mails += 1;
            self.mail = Some(begun);
        }
        Ok(next(&answered))
    }

    pub(super) async fn rcpt(&mut self, rest: &str) -> io::Result<Next> {
        let Some(mail) = &mut self.mail else {
            return Ok(self.say("503 5.5.1 Need MAIL command"));
        };
        let Some((to, _)) = path(rest, "TO:") else {
            return Ok(self.say("501 5.5.4 Syntax: RCPT TO:<address>"));
        };
        mail.named += 1;
        let refusal = self.script.refusal(to, mail.named);
        let reply = refusal.as_deref().unwrap_or("250 2.1.5 Ok");
        let answered = self.answer(Phase::Rcpt, reply).await?;
        self.note_refusal(Phase::Rcpt, &answered, Some(to));
        if let (Answered::Code(250), Some(mail)) = (&answered, &mut self.mail) {
            mail.to.push(to.to_owned());
        }
        Ok(next(&answered))
    }

    pub(super) async fn data(&mut self) -> io::Result<Next> {
        let reply = match &self.mail {
            None => "503 5.5.1 Need MAIL command",
            Some(mail) if mail.to.is_empty() => "554 5.5.1 No valid recipients",
            Some(_) => "354 End data with <CR><LF>.<CR><LF>",
        };
        let answered = self.answer(Phase::Data, reply).await?;
        self.note_refusal(Phase::Data, &answered, None);
        match answered {
            Answered::Close => return Ok(Next::Close),
            Answered::Code(354) => {}
            Answered::Code(_) => return Ok(Next::Go),
        }
        if !self.content_begins().await? {
            return Ok(Next::Close);
        }
        let Some(data) = self.content().await? else {
            return Ok(Next::Close);
        };
        self.final_dot(data).await
    }

    /// A chunk (RFC 3030 §2): its octets are taken whatever the answer will be.
    pub(super) async fn bdat(&mut self, rest: &str) -> io::Result<Next> {
        let mut words = rest.split(' ');
        let octets = words.next().and_then(|n| n.parse::<usize>().ok());
        let (Some(octets), true) = (octets, self.shared.setup.chunking) else {
            return Ok(self.say("502 5.5.1 Not implemented"));
        };
        let is_last = words.next().is_some_and(|word| word.eq_ignore_ascii_case("LAST"));
        let script = Arc::clone(&self.script);
        if let Some(action) = script.decide(Phase::Bdat) {
            let answered = self.perform(Phase::Bdat, Some(action), "").await?;
            return Ok(next(&answered));
        }
        if octets == 0
            && !is_last
            && let Some(action) = script.decide(Phase::EmptyChunk)
        {
            let answered = self.perform(Phase::EmptyChunk, Some(action), "").await?;
            return Ok(next(&answered));
        }
        if octets > 0 && is_last && !self.content_begins().await? {
            return Ok(Next::Close);
        }
        let Some(mut chunk) = self.octets(octets).await? else {
            return Ok(Next::Close);
        };
        if !self.shared.setup.keep_data {
            chunk.clear();
        }
        match &mut self.mail {
            None => Ok(self.say("503 5.5.1 Need MAIL command")),
            Some(mail) if is_last => {
                mail.chunks.append(&mut chunk);
                let data = std::mem::take(&mut mail.chunks);
                self.final_dot(data).await
            }
            Some(mail) if mail.to.is_empty() => Ok(self.say("554 5.5.1 No valid recipients")),
            Some(mail) => {
                mail.chunks.append(&mut chunk);
                Ok(self.say(&format!("250 2.0.0 Ok: {octets} octets")))
            }
        }
    }

    /// Lets the script act in the middle of a mail, once its first bytes are there. Whether the session goes on.
    async fn content_begins(&mut self) -> io::Result<bool> {
        let script = Arc::clone(&self.script);
        let Some(action) = script.decide(Phase::Content) else {
            return Ok(true);
        };
        if self.inbound.is_empty() && !self.fill().await? {
            return Ok(false);
        }
        let answered = match action {
            Action::Delay(delay) => {
                tokio::time::sleep(*delay).await;
                return Ok(true);
            }
            action => self.perform(Phase::Content, Some(action), "").await?,
        };
        Ok(!matches!(answered, Answered::Close))
    }

    async fn final_dot(&mut self, data: Vec<u8>) -> io::Result<Next> {
        let Some(mail) = self.mail.take() else {
            return Ok(Next::Close);
        };
        let too_large = self
            .shared
            .setup
            .size
            .is_some_and(|limit| data.len() as u64 > limit);
        let action = self.script.decide(Phase::FinalDot).cloned();
        let would_take = !mail.to.is_empty() && !too_large;
        let taken = match &action {
            None | Some(Action::TakeThenClose | Action::TakeThenSilence | Action::Delay(_)) => would_take,
            Some(Action::Reply(reply) | Action::ReplyThenClose(reply)) => {
                would_take && reply.starts_with('2')
            }
            Some(Action::Close | Action::Silence) => false,
        };
        let reply = if mail.to.is_empty() {
            "554 5.5.1 No valid recipients".to_owned()
        } else if too_large {
            "552 5.3.4 Message size exceeds fixed limit".to_owned()
        } else {
            format!(
                "250 2.0.0 Ok: queued as {}",
                self.shared.record.received_count() + 1
            )
        };
        let recipients = mail.to.clone();
        let id = taken.then(|| self.record(mail, data));
        let answered = self.perform(Phase::FinalDot, action.as_ref(), &reply).await?;
        match id {
            Some(id) if matches!(answered, Answered::Code(_)) => self.unanswered.push(id),
            Some(_) => {}
            None => self.note_refusal_of(Phase::FinalDot, &answered, recipients),
        }
        if let Some(Action::ReplyThenClose(_)) = action {
            self.unanswered.extend(id);
        }
        Ok(next(&answered))
    }

    fn note_refusal(&self, phase: Phase, answered: &Answered, named: Option<&str>) {
        let to = self
            .mail
            .iter()
            .flat_map(|mail| mail.to.iter().map(String::as_str));
        let to = to.chain(named).map(str::to_owned).collect();
        self.note_refusal_of(phase, answered, to);
    }

    fn note_refusal_of(&self, phase: Phase, answered: &Answered, to: Vec<String>) {
        if !matches!(answered, Answered::Code(400..)) {
            return;
        }
        let last = self
            .out
            .split(|b| *b == b'\n')
            .rev()
            .find(|line| !line.is_empty());
        self.shared.record.refuse(Refused {
            at: Instant::now(),
            phase,
            reply: String::from_utf8_lossy(last.unwrap_or_default())
                .trim_end()
                .to_owned(),
            to,
            helo: self.helo.clone(),
        });
    }

    fn record(&self, mail: Transaction, data: Vec<u8>) -> usize {
        self.shared.record.take(Received {
            id: 0,
            mail_at: mail.at,
            at: Instant::now(),
            time: SystemTime::now(),
            from: mail.from,
            params: mail.params,
            to: mail.to,
            digest: digest(&data),
            data,
            session: self.id,
            tls: self.tls,
            user: self.user.clone(),
            helo: self.helo.clone(),
            answered: None,
        })
    }
}

/// SHA-256 in hexadecimal digits.
fn digest(data: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut hex = String::with_capacity(64);
    for byte in Sha256::digest(data) {
        // Writing to a string does not fail.
        let _ = write!(hex, "{byte:02x}");
    }
    hex
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
