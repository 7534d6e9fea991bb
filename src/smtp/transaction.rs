//! The mail itself, written in as few blocks as possible, and the reply that decides.

use std::fmt;
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::fail_point::{self, Point};
use crate::failure::{Failure, Reply, Stage};

use super::classify;
use super::connection::{Bdat, Connection};
use super::envelope::{RcptResult, Results};
use super::open::{Form, fail_accepted};
use super::pool::Lease;
use super::stuffing::Blocks;
use super::trouble::Trouble;

/// How long to wait for what the server has to say about a connection it broke.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);

/// A transaction in which at least one recipient was accepted: the server waits for the mail.
///
/// Dropping it closes the connection before the end of the mail: the server throws it away.
pub struct Transaction {
    lease: Lease,
    results: Results,
    form: Form,
}

impl fmt::Debug for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transaction")
            .field("recipients", &self.results.len())
            .finish_non_exhaustive()
    }
}

/// What became of the mail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Known: one result per recipient, final for this attempt.
    Done(Results),
    /// The end of the mail was on its way when the connection broke or the time ran out: nobody knows whether the
    /// server took it.
    Uncertain {
        /// The recipients it may have taken it for.
        unknown: Vec<Address>,
        /// The recipients refused before.
        refused: Results,
        /// What happened.
        failure: Failure,
    },
}

/// How writing or waiting ended.
enum Sent {
    Reply(Reply),
    /// Without its end, the server throws a mail away.
    Unfinished(Trouble),
    Unknown(Trouble),
}

/// Why a mail was not written to its end.
pub(super) struct Unwritten {
    pub(super) trouble: Trouble,
    /// It broke off in the last block.
    pub(super) in_last: bool,
    /// The end of the mail may be out all the same.
    pub(super) may_be_whole: bool,
}

impl Transaction {
    pub(super) fn new(lease: Lease, results: Results, form: Form) -> Self {
        Self { lease, results, form }
    }

    /// One result per recipient so far, in the order of the envelope; at least one is accepted.
    #[must_use]
    pub fn results(&self) -> &[(Address, RcptResult)] {
        &self.results
    }

    /// Sends the mail, the one that was announced, and waits for the server's verdict; then the connection goes back to
    /// its pool. Lines must end with CRLF. After DATA, leading dots are doubled here (RFC 5321 §4.5.2); a server that
    /// knows BDAT gets the mail as it is (RFC 3030), or what it has not got of it yet.
    pub async fn finish(mut self, message: &[u8]) -> Outcome {
        let begun = Instant::now();
        let Some(connection) = self.lease.connection() else {
            return done(self.results, &Trouble::Closed.failure(Stage::Data));
        };
        let sent = send(connection, message, self.form).await;
        self.lease.observe_data(begun.elapsed());
        match sent {
            Sent::Reply(reply) if reply.code >= 400 => {
                let failure = self.refusal(reply).await;
                done(self.results, &failure)
            }
            Sent::Reply(reply) => Outcome::Done(accepted(self.results, &reply)),
            Sent::Unfinished(trouble) => done(self.results, &trouble.failure(Stage::Data)),
            Sent::Unknown(trouble) => uncertain(self.results, trouble.failure(Stage::Data)),
        }
    }

    async fn refusal(&mut self, reply: Reply) -> Failure {
        match self.lease.connection() {
            Some(connection) if self.form != Form::Data => {
                let failure = chunk_refusal(connection, reply).await;
                self.lease.heed_bdat();
                failure
            }
            _ => classify::refusal(Stage::Data, reply),
        }
    }

    /// Closes the connection before the end of the mail: the server does not take it.
    pub fn abandon(mut self) {
        if let Some(connection) = self.lease.connection() {
            connection.give_up();
        }
    }
}

/// The final reply counts for those who had been accepted.
pub(super) fn accepted(mut results: Results, reply: &Reply) -> Results {
    for (_, result) in results.iter_mut().filter(|(_, result)| result.is_accepted()) {
        *result = RcptResult::Accepted(reply.clone());
    }
    results
}

/// Nobody knows what became of the mail for those who had been accepted.
pub(super) fn uncertain(results: Results, failure: Failure) -> Outcome {
    let (accepted, refused): (Results, Results) =
        results.into_iter().partition(|(_, result)| result.is_accepted());
    Outcome::Uncertain {
        unknown: accepted.into_iter().map(|(address, _)| address).collect(),
        refused,
        failure,
    }
}

fn done(mut results: Results, failure: &Failure) -> Outcome {
    fail_accepted(&mut results, failure);
    Outcome::Done(results)
}

/// Whether a reply to BDAT says that the server does not know it, or has lost the thread: nothing about the mail, whose
/// octets it may go on to read as commands.
pub(super) fn disowns_bdat(reply: &Reply) -> bool {
    (500..=504).contains(&reply.code)
}

/// What a negative reply to BDAT means; the server has thrown the octets away (RFC 3030 §2). RSET shows whether it has.
pub(super) async fn chunk_refusal(connection: &mut Connection, reply: Reply) -> Failure {
    if disowns_bdat(&reply) {
        connection.bdat = Bdat::Broken;
        connection.give_up();
        return Trouble::Malformed.failure(Stage::Data).with_reply(reply);
    }
    if connection.is_orderly() {
        let limit = connection.timeouts.command;
        connection.reset(limit).await;
    }
    classify::refusal(Stage::Data, reply)
}

/// Writes a mail, and the commands before it, to which `replies` replies are due.
pub(super) async fn write(
    connection: &mut Connection,
    mut blocks: Blocks<'_>,
    replies: u32,
) -> Result<(), Unwritten> {
    let limit = connection.timeouts.write;
    let counted = blocks.are_counted();
    let mut due = replies;
    while let Some(block) = blocks.next_block() {
        let mut written = 0;
        let result = connection.write(block.bytes, due, limit, &mut written).await;
        due = 0;
        if let Err(trouble) = result {
            // Under TLS, bytes may be out that do not count as written. In clear those of a chunk are counted on both
            // sides; after DATA a server may be content with less than the whole last line.
            let may_be_out = connection.is_tls() || (written > 0 && !counted);
            return Err(Unwritten {
                trouble,
                in_last: block.is_last,
                may_be_whole: block.is_last && may_be_out,
            });
        }
        if !block.is_last {
            fail_point::hit(Point::MailHalfWritten, []);
        }
    }
    fail_point::hit(Point::MailWritten, []);
    connection.leave_data();
    Ok(())
}

async fn send(connection: &mut Connection, message: &[u8], form: Form) -> Sent {
    let blocks = match form {
        Form::Data => Blocks::new(message),
        Form::Chunk { taken } => Blocks::counted(message.get(taken..).unwrap_or_default(), ""),
    };
    if let Err(unwritten) = write(connection, blocks, 1).await {
        // A server that refuses early says why before it closes; a refusal is certain.
        return match connection.reply(LAST_WORDS).await {
            Ok(reply) if unwritten.in_last || !reply.is_positive() => Sent::Reply(reply),
            _ if unwritten.may_be_whole => Sent::Unknown(unwritten.trouble),
            _ => Sent::Unfinished(unwritten.trouble),
        };
    }
    match connection.reply(connection.timeouts.final_reply).await {
        // Still asking for the mail: that is no verdict.
        Ok(reply) if (300..400).contains(&reply.code) => {
            connection.give_up();
            Sent::Unknown(Trouble::Malformed)
        }
        Ok(reply) => Sent::Reply(reply),
        Err(trouble) => Sent::Unknown(trouble),
    }
}
