//! A mail in one flight (RFC 3030 §4.2): MAIL, RCPT…, BDAT and its octets in one write, then all the replies.
//!
//! The server may have the mail from its last octet on, whatever it has answered until then. So a conversation that breaks
//! off is uncertain unless the server's own words, or the number of octets, say that it cannot have it.

use std::time::Instant;

use crate::failure::{Failure, Stage};

use super::connection::{Bdat, Connection};
use super::envelope::{Envelope, all_failed};
use super::open::{Announcement, Mail, NotOpen, Opening, WINDOW, fail_accepted, parameters};
use super::stuffing::Blocks;
use super::transaction::{
    LAST_WORDS, Outcome, Unwritten, accepted, chunk_refusal, disowns_bdat, uncertain, write,
};
use super::trouble::Trouble;

/// Largest mail that goes before the server has accepted anybody, in bytes. TCP needs about four round trips for more
/// than this on a connection that has not sent much yet (RFC 6928), so that one less is no great gain; and it is what a
/// refused recipient may cost in vain.
const MAX_SIZE: usize = 128 << 10;

/// Whether a mail may go in one flight as far as connection and mail are concerned.
pub(super) fn is_possible(connection: &Connection, envelope: &Envelope, mail: Mail) -> bool {
    connection.extensions.pipelining
        && connection.bdat == Bdat::Works
        && mail.size <= MAX_SIZE
        && envelope.to.len() + 2 <= WINDOW
        && connection.is_orderly()
        && connection.is_quiet()
}

/// Sends and waits. Refusals are outcomes; an error means that nothing was taken and nobody was refused.
pub(super) async fn deliver(
    connection: &mut Connection,
    announced: Announcement<'_>,
) -> Result<Outcome, NotOpen> {
    let parameters = parameters(connection, announced).map_err(|error| NotOpen::Failed(*error))?;
    let recipients = announced.envelope.to.len();
    let mut flight = Opening::new(connection, announced);
    let mut commands = String::with_capacity(64 * (recipients + 1));
    for n in 0..=recipients {
        flight.write_command(n, &parameters, &mut commands);
    }
    let replies = recipients as u32 + 2;
    let blocks = Blocks::counted(announced.message, &commands);
    let unwritten = write(flight.connection, blocks, replies).await.err();
    // A server may keep its replies back until it has gone through the mail (RFC 2920 §3.2): from here on, giving up on
    // any of them means not to know.
    let limit = match unwritten {
        None => flight.connection.timeouts.final_reply,
        Some(_) => LAST_WORDS,
    };
    flight.connection.hurry(Instant::now() + limit);
    for n in 0..recipients + 2 {
        if let Err(failure) = flight.hear(flight.command(n), limit).await {
            return broken_off(flight, announced.envelope, *failure, unwritten).map_err(|error| *error);
        }
    }
    conclude(flight, announced.envelope).await
}

/// All replies are there.
async fn conclude(mut flight: Opening<'_>, envelope: &Envelope) -> Result<Outcome, NotOpen> {
    let Some(reply) = flight.data_reply.take() else {
        let failure = Trouble::Malformed.failure(Stage::Data);
        return broken_off(flight, envelope, failure, None).map_err(|error| *error);
    };
    let mail_refused = flight.mail_refused();
    if let Some(failure) = mail_refused
        .clone()
        .filter(|_| flight.is_used_up() && !reply.is_positive())
    {
        return Err(flight.sender_refused(failure));
    }
    let nobody = mail_refused.is_some() || !flight.any_accepted();
    if nobody {
        // A server that takes a mail for nobody is not to be trusted with another one.
        if reply.is_positive() {
            distrust(flight.connection);
        } else {
            let limit = flight.connection.timeouts.command;
            flight.connection.reset(limit).await;
        }
        return Ok(Outcome::Done(refusals(flight, envelope)));
    }
    if (300..400).contains(&reply.code) || (reply.is_positive() && !is_in_step(flight.connection).await) {
        distrust(flight.connection);
        return Ok(uncertain(flight.results, Trouble::Malformed.failure(Stage::Data)));
    }
    if reply.is_positive() {
        return Ok(Outcome::Done(accepted(flight.results, &reply)));
    }
    let disowned = disowns_bdat(&reply);
    let failure = chunk_refusal(flight.connection, reply).await;
    if disowned {
        return Err(NotOpen::Mistrusted(flight.broken(failure)));
    }
    fail_accepted(&mut flight.results, &failure);
    Ok(Outcome::Done(flight.results))
}

/// Not all replies came: `failure` is what came instead, and has a reply only if that was a 421.
fn broken_off(
    flight: Opening<'_>,
    envelope: &Envelope,
    failure: Failure,
    unwritten: Option<Unwritten>,
) -> Result<Outcome, Box<NotOpen>> {
    flight.connection.give_up();
    if let Some(failure) = flight.mail_refused().filter(|_| flight.is_used_up()) {
        return Err(Box::new(flight.sender_refused(failure)));
    }
    let all_answered = flight.results.len() == envelope.to.len();
    if flight.mail_refused().is_some() || (all_answered && !flight.any_accepted()) {
        return Ok(Outcome::Done(refusals(flight, envelope)));
    }
    let silent = flight.mail_reply.is_none();
    let certain = if failure.reply.is_some() {
        Some(failure.clone())
    } else {
        unwritten
            .filter(|unwritten| !unwritten.may_be_whole)
            .map(|unwritten| unwritten.trouble.failure(Stage::Data))
    };
    let Some(certain) = certain else {
        distrust(flight.connection);
        let unanswered = envelope.to[flight.results.len()..].iter().cloned();
        return Ok(with_unanswered(
            uncertain(
                flight.results,
                Failure {
                    stage: Stage::Data,
                    ..failure
                },
            ),
            unanswered,
        ));
    };
    let error = flight.broken(certain);
    if silent {
        Err(Box::new(NotOpen::Stale(error)))
    } else {
        Ok(Outcome::Done(error.results))
    }
}

/// Each recipient's refusal where nobody was accepted.
fn refusals(flight: Opening<'_>, envelope: &Envelope) -> super::Results {
    match flight.mail_refused() {
        Some(failure) => all_failed(&envelope.to, &failure),
        None => flight.results,
    }
}

/// Those whose RCPT was not answered may have the mail as well.
fn with_unanswered(
    mut outcome: Outcome,
    unanswered: impl Iterator<Item = crate::address::Address>,
) -> Outcome {
    if let Outcome::Uncertain { unknown, .. } = &mut outcome {
        unknown.extend(unanswered);
    }
    outcome
}

/// Whether nothing more has come in than was due, but for a farewell: what was taken for the final reply is it then.
async fn is_in_step(connection: &mut Connection) -> bool {
    if connection.is_quiet() {
        return true;
    }
    let farewell = connection.reply(LAST_WORDS).await;
    farewell.map_or(true, |reply| reply.code == 421)
}

fn distrust(connection: &mut Connection) {
    connection.bdat = Bdat::Broken;
    connection.give_up();
}
