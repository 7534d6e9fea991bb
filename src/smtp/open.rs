//! MAIL, RCPT and what opens the mail: one write where the server offers PIPELINING (RFC 2920), else step by step.
//!
//! Where CHUNKING is offered (RFC 3030), the first mail of a connection asks with its first line as a chunk in the place of
//! DATA (`probe`). If the server takes it, the rest follows as the last chunk, and nothing needs to be asked on that
//! connection any more. If not, nobody can tell whether it has swallowed the line or owes one more reply, for the line
//! that it read as a command; so the mail goes by DATA, but on a fresh connection. Without its last chunk it was not taken.

use std::fmt::Write as _;
use std::time::Duration;

use crate::failure::{Class, Failure, Fault, Reply, Stage};

use super::classify;
use super::connection::{Bdat, Connection};
use super::envelope::{Envelope, RcptResult, Results, all_failed, path};
use super::probe::first_chunk;
use super::trouble::Trouble;

/// Commands in one write. Both sides could block on full buffers with very many at once (RFC 2920 §3.1).
pub(super) const WINDOW: usize = 100;

/// What a server wants to know of a mail beforehand.
#[derive(Debug, Clone, Copy)]
pub struct Mail {
    /// Bytes of the mail.
    pub size: usize,
    /// Its headers need SMTPUTF8; addresses are looked at when it is announced.
    pub utf8: bool,
    /// It has bytes outside ASCII.
    pub eightbit: bool,
}

/// A mail to be announced.
#[derive(Debug, Clone, Copy)]
pub(super) struct Announcement<'a> {
    pub(super) envelope: &'a Envelope,
    pub(super) mail: Mail,
    pub(super) message: &'a [u8],
    /// BDAT may be used if it is offered.
    pub(super) chunking: bool,
}

/// How the mail is announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner<'a> {
    /// By DATA.
    Data,
    /// By its first chunk, which shows whether the server takes any.
    Probe(&'a str),
    /// Not at all: it is one chunk.
    Chunk,
}

/// How the mail is brought to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// After DATA.
    Data,
    /// As the last chunk, without the octets that the server has taken already.
    Chunk { taken: usize },
}

/// Why a transaction did not come about: no recipient can be sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenError {
    /// The reason, or the first recipient's if each has its own.
    pub failure: Failure,
    /// What it means for each recipient.
    pub results: Results,
    /// Whether MAIL was sent, on this connection or the one it was to replace, so that the provider may have counted it.
    pub mail_sent: bool,
}

/// How opening failed.
pub(super) enum NotOpen {
    /// Before any reply to MAIL, or by a refusal of MAIL that passes, after others were accepted: a connection used before
    /// was dead or used up, and a fresh one may do.
    Stale(OpenError),
    /// At BDAT, which the server does not know after all: it has nothing of the mail, and a fresh connection may do, by
    /// DATA.
    Mistrusted(OpenError),
    /// For good.
    Failed(OpenError),
}

/// A transaction whose envelope was accepted for at least one recipient.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) results: Results,
    pub(super) form: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Mail,
    Rcpt,
    /// DATA or BDAT.
    Data,
}

impl Command {
    pub(super) fn stage(self) -> Stage {
        match self {
            Self::Mail => Stage::MailFrom,
            Self::Rcpt => Stage::RcptTo,
            Self::Data => Stage::Data,
        }
    }
}

/// Opens a transaction; the connection waits for the mail then. On failure it is ready for the next transaction, or
/// over.
pub(super) async fn open(connection: &mut Connection, mail: Announcement<'_>) -> Result<Opened, NotOpen> {
    let parameters = parameters(connection, mail).map_err(|error| NotOpen::Failed(*error))?;
    let mut opening = Opening::new(connection, mail);
    match opening.converse(&parameters).await {
        Ok(()) => opening.conclude().await,
        Err(failure) => Err(opening.broken_off(*failure)),
    }
}

/// The parameters of MAIL, if the server can take the mail at all.
pub(super) fn parameters(
    connection: &Connection,
    announced: Announcement<'_>,
) -> Result<String, Box<OpenError>> {
    let (offers, mail) = (&connection.extensions, announced.mail);
    let refused = |reason, message: String| {
        let failure = Failure::permanent(Class::Content, Fault::Sender, Stage::MailFrom, reason, message);
        Err(Box::new(OpenError {
            results: all_failed(&announced.envelope.to, &failure),
            failure,
            mail_sent: false,
        }))
    };
    if let Some(limit) = offers.size_limit().filter(|limit| mail.size as u64 > *limit) {
        let message = format!(
            "The mail has {} bytes, the server takes at most {limit}",
            mail.size
        );
        return refused("message_too_large", message);
    }
    let utf8 = mail.utf8 || announced.envelope.needs_utf8();
    if utf8 && !offers.smtputf8 {
        let message = "An address or header needs SMTPUTF8, which the server does not offer".to_owned();
        return refused("smtputf8_not_supported", message);
    }
    if mail.eightbit && !offers.eight_bit_mime {
        let message = "The mail needs 8BITMIME, which the server does not offer".to_owned();
        return refused("8bitmime_not_supported", message);
    }
    let mut text = String::new();
    if offers.size.is_some() {
        let _ = write!(text, " SIZE={}", mail.size);
    }
    if mail.eightbit {
        text.push_str(" BODY=8BITMIME");
    }
    if utf8 {
        text.push_str(" SMTPUTF8");
    }
    Ok(text)
}

pub(super) struct Opening<'a> {
    pub(super) connection: &'a mut Connection,
    envelope: &'a Envelope,
    manner: Manner<'a>,
    /// Of the recipients answered so far.
    pub(super) results: Results,
    pub(super) mail_reply: Option<Reply>,
    pub(super) data_reply: Option<Reply>,
}

impl<'a> Opening<'a> {
    pub(super) fn new(connection: &'a mut Connection, mail: Announcement<'a>) -> Self {
        connection.messages += 1;
        let manner = match connection.bdat {
            Bdat::Works if mail.chunking => Manner::Chunk,
            Bdat::Untried if mail.chunking && connection.extensions.chunking => {
                first_chunk(mail.message).map_or(Manner::Data, Manner::Probe)
            }
            _ => Manner::Data,
        };
        Self {
            connection,
            envelope: mail.envelope,
            manner,
            results: Vec::with_capacity(mail.envelope.to.len()),
            mail_reply: None,
            data_reply: None,
        }
    }

    /// Says everything and hears the answers; an error means that the connection is over.
    async fn converse(&mut self, parameters: &str) -> Result<(), Box<Failure>> {
        let recipients = self.envelope.to.len();
        let window = if self.connection.extensions.pipelining {
            WINDOW
        } else {
            1
        };
        let total = recipients + if self.manner == Manner::Chunk { 1 } else { 2 };
        let mut next = 0;
        let mut text = String::with_capacity(64 * total.min(window));
        while next < total {
            let end = total.min(next + window);
            text.clear();
            for n in next..end {
                self.write_command(n, parameters, &mut text);
            }
            let sent = self.say(&text, end - next).await;
            sent.map_err(|trouble| trouble.failure(self.command(next).stage()))?;
            let limit = self.connection.timeouts.command;
            for n in next..end {
                self.hear(self.command(n), limit).await?;
            }
            next = end;
            if self.mail_reply.as_ref().is_some_and(|reply| !reply.is_positive()) {
                break;
            }
            if next == recipients + 1 && !self.any_accepted() {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn command(&self, n: usize) -> Command {
        match n {
            0 => Command::Mail,
            n if n <= self.envelope.to.len() => Command::Rcpt,
            _ => Command::Data,
        }
    }

    pub(super) fn write_command(&self, n: usize, parameters: &str, text: &mut String) {
        let _ = match (self.command(n), self.manner) {
            (Command::Mail, _) => {
                let from = self.envelope.from.as_ref().map(path).unwrap_or_default();
                write!(text, "MAIL FROM:<{from}>{parameters}\r\n")
            }
            (Command::Rcpt, _) => write!(text, "RCPT TO:<{}>\r\n", path(&self.envelope.to[n - 1])),
            (Command::Data, Manner::Probe(chunk)) => write!(text, "BDAT {}\r\n{chunk}", chunk.len()),
            (Command::Data, _) => write!(text, "DATA\r\n"),
        };
    }

    async fn say(&mut self, text: &str, commands: usize) -> Result<(), Trouble> {
        let limit = self.connection.timeouts.command;
        self.connection
            .send(text.as_bytes(), commands as u32, limit)
            .await
    }

    /// Reads the reply to one command. A 421 ends the connection, whatever it answers; only that failure has a reply.
    pub(super) async fn hear(&mut self, command: Command, limit: Duration) -> Result<(), Box<Failure>> {
        let stage = command.stage();
        let reply = self.connection.reply(limit).await;
        let reply = reply.map_err(|trouble| trouble.failure(stage))?;
        if reply.code == 421 {
            return Err(Box::new(classify::refusal(stage, reply)));
        }
        if (300..400).contains(&reply.code) && command != Command::Data {
            return Err(Box::new(Trouble::Malformed.failure(stage)));
        }
        match command {
            Command::Mail => {
                self.connection.carried |= reply.is_positive();
                self.mail_reply = Some(reply);
            }
            Command::Rcpt => {
                let address = self.envelope.to[self.results.len()].clone();
                let result = if reply.is_positive() {
                    RcptResult::Accepted(reply)
                } else {
                    RcptResult::Failed(classify::refusal(stage, reply))
                };
                self.results.push((address, result));
            }
            Command::Data => self.data_reply = Some(reply),
        }
        Ok(())
    }

    pub(super) fn any_accepted(&self) -> bool {
        self.results.iter().any(|(_, result)| result.is_accepted())
    }

    /// Draws the conclusion from the replies.
    async fn conclude(mut self) -> Result<Opened, NotOpen> {
        let mail_refused = self.mail_refused();
        let wanted = mail_refused.is_none() && self.any_accepted();
        let data_reply = self.data_reply.take();
        let code = data_reply.as_ref().map_or(0, |reply| reply.code);
        let form = match (self.manner, code) {
            (Manner::Chunk, _) => Some(Form::Chunk { taken: 0 }),
            (Manner::Probe(chunk), 200..=299) => Some(Form::Chunk { taken: chunk.len() }),
            (Manner::Data, 354) => Some(Form::Data),
            _ => None,
        };
        if let Some(form) = form.filter(|_| wanted) {
            if self.is_probing() {
                self.connection.bdat = Bdat::Works;
            }
            self.connection.enter_data();
            return Ok(Opened {
                results: self.results,
                form,
            });
        }
        // A server that cannot take the mail now says 4yz; anything else tells of BDAT rather than of the mail.
        let data_reply = match data_reply {
            Some(reply) if wanted && self.is_probing() && !(400..500).contains(&reply.code) => {
                return Err(self.mistrusted(reply));
            }
            reply => reply,
        };
        if form == Some(Form::Data) {
            self.end_unwanted_data().await;
        }
        let limit = self.connection.timeouts.command;
        if let Some(failure) = mail_refused {
            if self.is_probing() && data_reply.is_some() {
                self.connection.reset(limit).await;
            }
            return Err(self.sender_refused(failure));
        }
        // After a first chunk that was read as a command, the reply to RSET is not the one that is read: the connection is
        // over then.
        self.connection.reset(limit).await;
        let refused = data_reply.filter(|_| wanted).map(|reply| {
            if reply.is_positive() {
                self.connection.give_up();
                return Trouble::Malformed.failure(Stage::Data);
            }
            classify::refusal(Stage::Data, reply)
        });
        Err(NotOpen::Failed(self.refused(refused)))
    }

    fn is_probing(&self) -> bool {
        matches!(self.manner, Manner::Probe(_))
    }

    /// The server has refused the first chunk.
    fn mistrusted(self, reply: Reply) -> NotOpen {
        self.connection.give_up();
        self.connection.bdat = Bdat::Broken;
        let failure = Trouble::Malformed.failure(Stage::Data).with_reply(reply);
        NotOpen::Mistrusted(self.broken(failure))
    }

    /// The conversation broke off; `failure` has a reply only if that was a 421.
    fn broken_off(self, failure: Failure) -> NotOpen {
        self.connection.give_up();
        let at_first_chunk = self.is_probing() && self.results.len() == self.envelope.to.len();
        if at_first_chunk {
            self.connection.bdat = Bdat::Broken;
        }
        if let Some(refusal) = self.mail_refused() {
            return self.sender_refused(refusal);
        }
        let stale = self.mail_reply.is_none();
        let mistrusted = at_first_chunk && self.any_accepted() && failure.reply.is_none();
        let error = self.broken(failure);
        if stale {
            NotOpen::Stale(error)
        } else if mistrusted {
            NotOpen::Mistrusted(error)
        } else {
            NotOpen::Failed(error)
        }
    }

    /// The refusal of the sender, which is everybody's.
    pub(super) fn mail_refused(&self) -> Option<Failure> {
        let refusal = self.mail_reply.as_ref().filter(|reply| !reply.is_positive());
        refusal.map(|reply| classify::refusal(Stage::MailFrom, reply.clone()))
    }

    /// Whether MAIL was refused for now after others were accepted. Some servers end a session's allowance so, and the
    /// connection would be taken first for every mail to come; a fresh one shows whether it is that.
    pub(super) fn is_used_up(&self) -> bool {
        let passes = |reply: &Reply| (400..500).contains(&reply.code) || reply.code == 503;
        self.connection.carried && self.mail_reply.as_ref().is_some_and(passes)
    }

    /// MAIL was refused, by a connection that may be used up.
    pub(super) fn sender_refused(self, failure: Failure) -> NotOpen {
        let error = self.refused_for_all(failure);
        if self.is_used_up() {
            self.connection.give_up();
            return NotOpen::Stale(error);
        }
        NotOpen::Failed(error)
    }

    fn refused_for_all(&self, failure: Failure) -> OpenError {
        OpenError {
            results: all_failed(&self.envelope.to, &failure),
            failure,
            mail_sent: true,
        }
    }

    /// The server wants a mail although it has nobody to give it to: a lone dot ends that (RFC 2920 §3.1).
    async fn end_unwanted_data(&mut self) {
        let limit = self.connection.timeouts.command;
        // A trouble here makes the connection unusable; the results stand.
        let _ = self.connection.exchange(b".\r\n", limit).await;
    }

    /// Nobody left: each recipient's own refusal, and `failure` for those that had been accepted.
    fn refused(self, failure: Option<Failure>) -> OpenError {
        let mut results = self.results;
        if let Some(failure) = &failure {
            fail_accepted(&mut results, failure);
        }
        let first = results.iter().find_map(|(_, result)| result.failure().cloned());
        OpenError {
            failure: failure
                .or(first)
                .unwrap_or_else(|| Trouble::Malformed.failure(Stage::RcptTo)),
            results,
            mail_sent: true,
        }
    }

    /// The conversation broke: refusals already heard stand, the rest fails with it. A 421 to RCPT is that recipient's
    /// alone (Google ends the session over one whose domain wants TLS, say): it tells nothing of the others.
    pub(super) fn broken(self, failure: Failure) -> OpenError {
        let mut results = self.results;
        let rest = &self.envelope.to[results.len()..];
        let of_recipient = failure.stage == Stage::RcptTo && failure.reply.is_some();
        if let Some((recipient, others)) = rest.split_first().filter(|_| of_recipient) {
            for (_, result) in results.iter_mut().filter(|(_, result)| result.is_accepted()) {
                *result = RcptResult::Untold;
            }
            results.push((recipient.clone(), RcptResult::Failed(failure.clone())));
            results.extend(others.iter().map(|other| (other.clone(), RcptResult::Untold)));
        } else {
            fail_accepted(&mut results, &failure);
            results.extend(all_failed(rest, &failure));
        }
        OpenError {
            failure,
            results,
            mail_sent: true,
        }
    }
}

/// Turns what had been accepted into a failure.
pub(super) fn fail_accepted(results: &mut Results, failure: &Failure) {
    for (_, result) in results.iter_mut().filter(|(_, result)| result.is_accepted()) {
        *result = RcptResult::Failed(failure.clone());
    }
}
