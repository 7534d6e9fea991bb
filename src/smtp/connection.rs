//! One SMTP session: what was asked, what is still to be answered, and whether it can be used again.

use std::fmt;
use std::time::{Duration, Instant};

use lettre::transport::smtp::client::AsyncSmtpConnection;
use lettre::transport::smtp::extension::ClientId;
use rustls::pki_types::ServerName;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::config::SmtpTimeouts;
use crate::failure::{Class, Failure, Reply, Stage};

use super::classify;
use super::extensions::Extensions;
use super::trouble::{self, Trouble};
use super::wire::{UpgradeError, Wire};

/// How long a server may take to say goodbye.
const QUIT_LIMIT: Duration = Duration::from_secs(2);

/// What is known of BDAT (RFC 3030) on a connection whose server offers CHUNKING.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bdat {
    Untried,
    /// The server answered it as it should: it will count octets, and not read a mail as commands.
    Works,
    /// It is offered, but does not work.
    Broken,
}

pub(super) struct Connection {
    smtp: AsyncSmtpConnection,
    wire: Wire,
    pub(super) extensions: Extensions,
    pub(super) timeouts: SmtpTimeouts,
    pub(super) opened: Instant,
    /// Mails begun.
    pub(super) messages: u32,
    /// MAIL was accepted on it.
    pub(super) carried: bool,
    pub(super) bdat: Bdat,
    /// Commands sent whose replies were not read.
    unanswered: u32,
    /// When the mail must be written, whatever the limits of the single steps.
    deadline: Option<Instant>,
    /// The server waits for a mail, see [`Connection::enter_data`].
    in_data: bool,
    /// The server said 421, or the conversation broke.
    over: bool,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("messages", &self.messages)
            .field("over", &self.over)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Waits for the greeting and says EHLO.
    pub(super) async fn greet(wire: Wire, hello: &ClientId, timeouts: SmtpTimeouts) -> Result<Self, Failure> {
        let limit = timeouts.greeting;
        let broken = |trouble: Trouble| trouble.failure(Stage::Connect);
        match timeout(limit, wire.wait_line()).await {
            Err(_) => return Err(broken(Trouble::TimedOut(limit))),
            Ok(Err(_)) if wire.has_ended() => return Err(broken(Trouble::Closed)),
            Ok(Err(error)) => return Err(broken(Trouble::Io(error))),
            Ok(Ok(())) => {}
        }
        let connecting = AsyncSmtpConnection::connect_with_transport(Box::new(wire.clone()), hello);
        let connected = timeout(limit, connecting).await;
        let smtp = match connected {
            Err(_) => return Err(broken(Trouble::TimedOut(limit))),
            Ok(Err(error)) if error.status().is_some() => {
                return Err(classify::refusal(Stage::Connect, wire.refusal()));
            }
            Ok(Err(error)) => return Err(broken(trouble_of(&wire, error))),
            Ok(Ok(smtp)) => smtp,
        };
        let extensions = Extensions::parse(wire.reply_lines().iter().map(String::as_str));
        Ok(Self {
            smtp,
            wire,
            extensions,
            timeouts,
            opened: Instant::now(),
            messages: 0,
            carried: false,
            bdat: Bdat::Untried,
            unanswered: 0,
            deadline: None,
            in_data: false,
            over: false,
        })
    }

    /// STARTTLS, required: whatever stands in the way is a failure, never a connection in clear.
    pub(super) async fn starttls(
        &mut self,
        tls: (TlsConnector, ServerName<'static>),
        hello: &ClientId,
    ) -> Result<(), Failure> {
        if !self.extensions.starttls {
            return Err(trouble::no_tls(
                "starttls_not_offered",
                "The server does not offer STARTTLS",
            ));
        }
        let limit = self.timeouts.greeting;
        let broken = |trouble: Trouble| trouble::no_tls("tls_failed", format!("STARTTLS failed: {trouble}"));
        let reply = self.exchange(b"STARTTLS\r\n", limit).await.map_err(broken)?;
        if reply.code != 220 {
            // "Too many connections" says nothing about TLS, whatever it answers.
            let refusal = classify::refusal(Stage::Connect, reply.clone());
            if reply.code == 421 || refusal.class == Class::Rate {
                return Err(refusal);
            }
            let mut failure = trouble::no_tls("starttls_refused", "The server refuses STARTTLS");
            failure.retry_after = classify::delay_hint(&reply.text);
            return Err(failure.with_reply(reply));
        }
        upgrade(&self.wire, tls, limit).await?;
        // Nothing said in clear counts any more (RFC 3207 §4.2).
        let ehlo = format!("EHLO {hello}\r\n");
        let reply = self.exchange(ehlo.as_bytes(), limit).await;
        let reply = reply.map_err(|trouble| trouble.failure(Stage::Connect))?;
        if !reply.is_positive() {
            return Err(classify::refusal(Stage::Connect, reply));
        }
        self.extensions = Extensions::parse(self.wire.reply_lines().iter().map(String::as_str));
        Ok(())
    }

    /// From now on everything must be over by then.
    pub(super) fn hurry(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
    }

    /// The limits of the single steps hold again.
    pub(super) fn take_time(&mut self) {
        self.deadline = None;
    }

    fn limited(&self, limit: Duration) -> Duration {
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        self.deadline.map_or(limit, |deadline| limit.min(left(deadline)))
    }

    /// Sends one command and reads its reply.
    pub(super) async fn exchange(&mut self, command: &[u8], limit: Duration) -> Result<Reply, Trouble> {
        self.send(command, 1, limit).await?;
        self.reply(limit).await
    }

    /// Writes `commands` commands at once.
    pub(super) async fn send(&mut self, bytes: &[u8], commands: u32, limit: Duration) -> Result<(), Trouble> {
        self.write(bytes, commands, limit, &mut 0).await
    }

    /// Like [`Connection::send`]; `written` tells how much went out even if it failed.
    pub(super) async fn write(
        &mut self,
        bytes: &[u8],
        commands: u32,
        limit: Duration,
        written: &mut usize,
    ) -> Result<(), Trouble> {
        self.unanswered += commands;
        let limit = self.limited(limit);
        let result = match timeout(limit, self.wire.write_all(bytes, written)).await {
            Err(_) => Err(Trouble::TimedOut(limit)),
            Ok(Err(error)) => Err(Trouble::Io(error)),
            Ok(Ok(())) => Ok(()),
        };
        self.over |= result.is_err();
        result
    }

    /// Reads the next reply.
    pub(super) async fn reply(&mut self, limit: Duration) -> Result<Reply, Trouble> {
        let limit = self.limited(limit);
        let result = match timeout(limit, self.smtp.read_response()).await {
            Err(_) => Err(Trouble::TimedOut(limit)),
            Ok(Err(error)) if error.status().is_none() => Err(trouble_of(&self.wire, error)),
            Ok(_) => Ok(self.wire.reply()),
        };
        match &result {
            Ok(reply) => {
                self.unanswered = self.unanswered.saturating_sub(1);
                self.over |= reply.code == 421;
            }
            Err(_) => self.over = true,
        }
        result
    }

    /// Forgets the transaction at the server; on trouble the connection is over.
    pub(super) async fn reset(&mut self, limit: Duration) {
        let reply = self.exchange(b"RSET\r\n", limit).await;
        self.over |= !reply.is_ok_and(|reply| reply.is_positive());
    }

    /// Notes that the server waits for a mail: until it is complete, nothing else can be said.
    pub(super) fn enter_data(&mut self) {
        self.in_data = true;
    }

    /// Notes that the mail was completed; the reply to it may take its time.
    pub(super) fn leave_data(&mut self) {
        self.in_data = false;
        self.take_time();
    }

    /// Gives the connection up.
    pub(super) fn give_up(&mut self) {
        self.over = true;
    }

    /// Whether the next command may be sent.
    pub(super) fn is_orderly(&self) -> bool {
        !self.over && !self.in_data && self.unanswered == 0
    }

    /// Whether the server said nothing unasked, such as 421 or the end.
    pub(super) fn is_quiet(&self) -> bool {
        self.wire.is_quiet()
    }

    /// Whether it is encrypted.
    pub(super) fn is_tls(&self) -> bool {
        self.wire.is_tls()
    }

    /// Says goodbye, if the server can listen.
    pub(super) async fn quit(&mut self) {
        if self.is_orderly() {
            let _ = self.exchange(b"QUIT\r\n", QUIT_LIMIT).await;
        }
    }
}

/// Turns a connection into a TLS one within a time limit.
pub(super) async fn upgrade(
    wire: &Wire,
    (connector, name): (TlsConnector, ServerName<'static>),
    limit: Duration,
) -> Result<(), Failure> {
    match timeout(limit, wire.upgrade(&connector, name)).await {
        Err(_) => Err(trouble::no_tls(
            "tls_failed",
            format!("No TLS handshake within {limit:?}"),
        )),
        Ok(result) => result.map_err(|error: UpgradeError| trouble::handshake(&error)),
    }
}

fn trouble_of(wire: &Wire, error: lettre::transport::smtp::Error) -> Trouble {
    if wire.has_ended() {
        Trouble::Closed
    } else if error.is_response() {
        Trouble::Malformed
    } else {
        Trouble::Io(std::io::Error::other(error))
    }
}
