//! The mail itself: dot-stuffed, written in as few blocks as possible, and the reply that decides.

use std::fmt;
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::fail_point::{self, Point};
use crate::failure::{Failure, Reply, Stage};

use super::classify;
use super::connection::Connection;
use super::envelope::{RcptResult, Results};
use super::open::fail_accepted;
use super::pool::Lease;
use super::stuffing::Blocks;
use super::trouble::Trouble;

/// How long to wait for what the server has to say about a connection it broke.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A transaction in which at least one recipient was accepted: the server waits for the mail.
///
/// Dropping it closes the connection without the final dot: the server throws the mail away.
pub struct Transaction {
    lease: Lease,
    results: Results,
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

impl Transaction {
    pub(super) fn new(lease: Lease, results: Results) -> Self {
        Self { lease, results }
    }

    /// One result per recipient so far, in the order of the envelope; at least one is accepted.
    #[must_use]
    pub fn results(&self) -> &[(Address, RcptResult)] {
        &self.results
    }

    /// Sends the mail and waits for the server's verdict; then the connection goes back to its pool. Lines must end
    /// with CRLF; leading dots are doubled here (RFC 5321 §4.5.2).
    pub async fn finish(mut self, message: &[u8]) -> Outcome {
        let begun = Instant::now();
        let Some(connection) = self.lease.connection() else {
            return done(self.results, &Trouble::Closed.failure(Stage::Data));
        };
        let sent = send(connection, message).await;
        self.lease.observe_data(begun.elapsed());
        match sent {
            Sent::Reply(reply) if reply.code >= 400 => {
                done(self.results, &classify::refusal(Stage::Data, reply))
            }
            Sent::Reply(reply) => {
                for (_, result) in self.results.iter_mut().filter(|(_, result)| result.is_accepted()) {
                    *result = RcptResult::Accepted(reply.clone());
                }
                Outcome::Done(self.results)
            }
            Sent::Unfinished(trouble) => done(self.results, &trouble.failure(Stage::Data)),
            Sent::Unknown(trouble) => {
                let (accepted, refused): (Results, Results) = self
                    .results
                    .into_iter()
                    .partition(|(_, result)| result.is_accepted());
                Outcome::Uncertain {
                    unknown: accepted.into_iter().map(|(address, _)| address).collect(),
                    refused,
                    failure: trouble.failure(Stage::Data),
                }
            }
        }
    }

    /// Closes the connection without the final dot: the server does not take the mail.
    pub fn abandon(mut self) {
        if let Some(connection) = self.lease.connection() {
            connection.give_up();
        }
    }
}

fn done(mut results: Results, failure: &Failure) -> Outcome {
    fail_accepted(&mut results, failure);
    Outcome::Done(results)
}

async fn send(connection: &mut Connection, message: &[u8]) -> Sent {
    let mut blocks = Blocks::new(message);
    let limit = connection.timeouts.write;
    while let Some(block) = blocks.next_block() {
        let (commands, mut written) = (u32::from(block.is_last), 0);
        let result = connection.write(block.bytes, commands, limit, &mut written).await;
        let Err(trouble) = result else {
            if !block.is_last {
                fail_point::hit(Point::MailHalfWritten, []);
            }
            continue;
        };
        // A server that refuses early says why before it closes; a refusal is certain.
        if let Ok(reply) = connection.reply(LAST_WORDS).await
            && (block.is_last || !reply.is_positive())
        {
            return Sent::Reply(reply);
        }
        // Under TLS, bytes may be out that do not count as written.
        let ending = block.is_last && (written > 0 || connection.is_tls());
        return if ending {
            Sent::Unknown(trouble)
        } else {
            Sent::Unfinished(trouble)
        };
    }
    fail_point::hit(Point::MailWritten, []);
    connection.leave_data();
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
