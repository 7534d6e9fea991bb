//! Send: one SMTP transaction, and what its replies say about each recipient.

use std::time::Duration;

use lettre::Address;

use super::attempt::Pipeline;
use super::task::Task;
use super::{Attempt, Verdict};
use crate::compose::Email;
use crate::fail_point::{self, Point};
use crate::failure::{Class, Failure, Fault, Severity, Stage};
use crate::job::OnUncertain;
use crate::ledger::slots::Slot;
use crate::ledger::{Row, WaitReason};
use crate::report::RecipientStatus;
use crate::smtp::{self, Envelope, NotBegun, Outcome, RcptResult};

/// Some of a job's recipients, and the slot that covers them.
pub(super) struct Covered<'a> {
    pub(super) recipients: &'a [Address],
    pub(super) slot: &'a Slot,
}

impl Pipeline {
    /// One transaction: in one flight where the server takes that, else MAIL, RCPT and DATA, the last look at the lease,
    /// the mail. Gives those of whom nothing was said, because the server hung up over somebody else.
    pub(super) async fn transact(
        &self,
        task: &Task,
        attempt: &mut Attempt,
        lease: smtp::Lease,
        email: &Email,
        Covered {
            recipients: part,
            slot,
        }: Covered<'_>,
    ) -> Result<Vec<Address>, Verdict> {
        let envelope = Envelope {
            from: email.envelope_from.clone(),
            to: email.recipients.clone(),
        };
        let mail = smtp::Mail {
            size: email.message.len(),
            utf8: email.needs_utf8,
            eightbit: email.is_8bit,
        };
        let mut lease = lease;
        // The mark of a job to be held is a commit, which may take longer than a slot is good for: MAIL goes before it.
        let mark_is_late = attempt.on_uncertain == OnUncertain::Hold && slot.until.is_some();
        if !mark_is_late && lease.may_deliver_at_once(&envelope, mail) {
            // From the first byte on nobody knows: the last look comes before all of it.
            if !self.may_write(task, attempt).await {
                return Err(Verdict::GiveBack);
            }
            match lease.deliver_at_once(&envelope, mail, &email.message).await {
                Ok(outcome) => return conclude(attempt, outcome, email, part),
                Err(NotBegun::Failed(error)) => return not_opened(attempt, error, part),
                Err(NotBegun::Fresh(fresh)) => lease = *fresh,
            }
            // The provider may have heard MAIL, and connecting took its time.
            attempt.reached_mail_from = true;
            in_time(slot)?;
        }
        let transaction = loop {
            match lease.open(&envelope, mail, &email.message).await {
                Ok(transaction) => break transaction,
                Err(NotBegun::Failed(error)) => return not_opened(attempt, error, part),
                Err(NotBegun::Fresh(fresh)) => lease = *fresh,
            }
            attempt.reached_mail_from = true;
            in_time(slot)?;
        };
        attempt.started = true;
        attempt.reached_mail_from = true;
        if !self.may_write(task, attempt).await {
            transaction.abandon();
            return Err(Verdict::GiveBack);
        }
        let outcome = transaction.finish(&email.message).await;
        conclude(attempt, outcome, email, part)
    }

    /// The last question before the write that may end the message: is the job still ours? For jobs that are to be
    /// held when the outcome stays unknown, the answer is committed first, with what is needed to ask the server.
    async fn may_write(&self, task: &Task, attempt: &Attempt) -> bool {
        fail_point::hit(Point::EnvelopeAccepted, [task.job.id.as_str()]);
        if attempt.on_uncertain == OnUncertain::Hold {
            let row = Row {
                recipients: attempt.recipients.clone(),
                message_id: attempt.message_id.clone(),
                ..task.row.clone()
            };
            if !self.batches.mark_data(row).await {
                return false;
            }
        }
        let is_ours = task.row.lease.is_good();
        if is_ours {
            fail_point::hit(Point::BeforeFinalWrite, [task.job.id.as_str()]);
        }
        is_ours
    }
}

/// Takes those out whom the server has no way to name, for want of SMTPUTF8 (RFC 6531).
pub(super) fn unspeakable(lease: &smtp::Lease, open: &mut Vec<Address>) -> Vec<Address> {
    if lease.extensions().is_none_or(|offers| offers.smtputf8) {
        return Vec::new();
    }
    let (foreign, rest) = std::mem::take(open).into_iter().partition(smtp::needs_utf8);
    *open = rest;
    foreign
}

/// Refuses those whom the server cannot name, and nobody else: others may have had no turn, or wait for another.
pub(super) fn refuse_unspeakable(attempt: &mut Attempt, foreign: &[Address]) {
    if foreign.is_empty() {
        return;
    }
    attempt.started = true;
    let failure = Failure::permanent(
        Class::Content,
        Fault::Sender,
        Stage::RcptTo,
        "smtputf8_not_supported",
        "The recipient's address needs SMTPUTF8, which the server does not offer",
    );
    let refused = RcptResult::Failed(failure);
    record(attempt, foreign, std::iter::repeat(&refused));
}

/// A slot counts where it was granted: MAIL must not come much later.
fn in_time(slot: &Slot) -> Result<(), Verdict> {
    if slot.is_valid() {
        return Ok(());
    }
    Err(Verdict::Wait {
        reason: WaitReason::Rate,
        delay: Duration::ZERO,
    })
}

/// No recipient can be sent to: what the server said to each, or why it was not asked.
fn not_opened(
    attempt: &mut Attempt,
    error: smtp::OpenError,
    part: &[Address],
) -> Result<Vec<Address>, Verdict> {
    attempt.started = true;
    attempt.reached_mail_from |= error.mail_sent;
    // After MAIL on a connection that turned out dead, there may be no other: that says nothing about anybody either.
    let connecting = matches!(error.failure.stage, Stage::Connect | Stage::Auth);
    if !error.mail_sent || connecting {
        return Err(Verdict::Failed(error.failure));
    }
    let results = error.results.iter().map(|(_, result)| result);
    Ok(record(attempt, part, results))
}

/// What became of the mail.
fn conclude(
    attempt: &mut Attempt,
    outcome: Outcome,
    email: &Email,
    part: &[Address],
) -> Result<Vec<Address>, Verdict> {
    attempt.started = true;
    attempt.reached_mail_from = true;
    match outcome {
        Outcome::Done(results) => {
            let results = results.iter().map(|(_, result)| result);
            Ok(record(attempt, part, results))
        }
        Outcome::Uncertain { refused, failure, .. } => {
            for (address, result) in &refused {
                // In the envelope's spelling; the report has the job's.
                let place = email.recipients.iter().position(|a| a == address);
                if let Some(mine) = place.and_then(|place| part.get(place)) {
                    record(attempt, std::slice::from_ref(mine), std::iter::once(result));
                }
            }
            Err(Verdict::Uncertain(failure))
        }
    }
}

/// Notes what the server said about each recipient of this transaction, and the failure most worth telling. Gives those of
/// whom it said nothing.
fn record<'a>(
    attempt: &mut Attempt,
    part: &[Address],
    results: impl Iterator<Item = &'a RcptResult>,
) -> Vec<Address> {
    let mut untold = Vec::new();
    for (address, result) in part.iter().zip(results) {
        let name: &str = address.as_ref();
        let Some(mine) = attempt.recipients.iter_mut().find(|r| *r.address == *name) else {
            continue;
        };
        let status = match result {
            RcptResult::Accepted(_) => RecipientStatus::Accepted,
            RcptResult::Failed(failure) if failure.is_transient() => RecipientStatus::Deferred,
            RcptResult::Failed(_) => RecipientStatus::Refused,
            RcptResult::Untold => {
                untold.push(address.clone());
                continue;
            }
        };
        mine.record(status, result.reply());
        if let Some(failure) = result.failure() {
            keep_worse(attempt, failure);
        }
    }
    untold
}

/// A transient failure decides when to come back, so it is the one to keep.
fn keep_worse(attempt: &mut Attempt, failure: &Failure) {
    let keep = attempt
        .failure
        .as_ref()
        .is_some_and(|f| f.severity == Severity::Transient);
    if !keep {
        attempt.failure = Some(failure.clone());
    }
}
