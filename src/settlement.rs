//! What follows from an attempt: the outcome, the report, and whether and when to come back. Pure: everything that is
//! decided here is decided from its arguments.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::failure::{Class, Failure, Fault, Severity, Stage};
use crate::job::{MailJob, OnUncertain};
use crate::ledger::settle::{Next, Settlement};
use crate::ledger::{Row, WaitReason};
use crate::pipeline::{Attempt, Verdict};
use crate::report::{
    RecipientResult, RecipientStatus, Report, ReportData, ReportMessage, ReportType, Timings, event_id,
};
use crate::retry::RetryPolicy;
use crate::smtp::classify;

/// Longest wait between two looks for a missing key.
const LONGEST_KEY_WAIT: Duration = Duration::from_mins(5);

/// What the decision depends on besides the attempt itself.
#[derive(Debug, Clone)]
pub struct Circumstances<'a> {
    /// The job.
    pub job: &'a MailJob,
    /// What the ledger knows of it.
    pub row: &'a Row,
    /// AMQP `correlation_id`, else the job's id.
    pub correlation_id: &'a Arc<str>,
    /// W3C trace context of the producer.
    pub traceparent: Option<&'a str>,
    /// When to come back, unless the account says otherwise.
    pub retry: RetryPolicy,
    /// It came from RabbitMQ just now rather than out of the waiting room.
    pub new: bool,
    /// Shorter waits are not reported.
    pub deferred_report_after: Duration,
    /// The database's clock.
    pub now: Timestamp,
    /// Random number in 0..1 that spreads retries.
    pub jitter: f64,
}

/// Decides what is to be written; what follows for the recipients, and the failure that is told, are noted in the attempt.
/// Where the job has to wait, the body is still to be put in: only the worker has it, and few jobs need it.
#[must_use]
pub fn plan(at: &Circumstances<'_>, attempt: &mut Attempt) -> Settlement {
    match &attempt.verdict {
        Verdict::Expired => finish(at, attempt, ReportType::Expired),
        Verdict::Cancelled => finish(at, attempt, ReportType::Cancelled),
        Verdict::GiveBack => settlement(at, attempt, Next::GiveBack, None),
        Verdict::Wait {
            reason: WaitReason::Unhealthy,
            ..
        } if at.row.overdue && attempt.waits_for.is_none() => fail(at, attempt, &unhealthy()),
        Verdict::Wait { reason, delay } => {
            let (reason, delay) = (*reason, *delay);
            wait(at, attempt, reason, delay)
        }
        Verdict::Uncertain(_) if attempt.on_uncertain == OnUncertain::Hold => hold(at, attempt),
        Verdict::Uncertain(failure) | Verdict::Failed(failure) => {
            let failure = failure.clone();
            if failure.is_transient() {
                again(at, attempt, &failure)
            } else {
                fail(at, attempt, &failure)
            }
        }
        Verdict::Attempted => attempted(at, attempt),
    }
}

/// The same for a job that was cancelled during the attempt, where the outcome let it be: what was tried was tried, and may
/// have led to something nobody knows of.
#[must_use]
pub fn cancelled(at: &Circumstances<'_>, mut attempt: Attempt) -> Settlement {
    attempt.waits_for = None;
    // It does not end by what went wrong; listings show that all the same.
    let failure = attempt.failure.take();
    let mut settlement = finish(at, &attempt, ReportType::Cancelled);
    settlement.error = failure.as_ref().map(ToString::to_string);
    settlement
}

fn unhealthy() -> Failure {
    Failure::permanent(
        Class::Infrastructure,
        Fault::Provider,
        Stage::Resolve,
        "sender_unhealthy",
        "given up: the sending account or its server has not worked since, see `postroom account show`",
    )
}

/// The server spoke: final if nobody is left, else the rest is tried again.
fn attempted(at: &Circumstances<'_>, attempt: &mut Attempt) -> Settlement {
    let deferred = attempt
        .recipients
        .iter()
        .any(|r| r.status == RecipientStatus::Deferred);
    let pending = attempt
        .recipients
        .iter()
        .any(|r| r.status == RecipientStatus::Pending);
    if deferred {
        let failure = deferral(attempt);
        return again(at, attempt, &failure);
    }
    if pending {
        // They have had no turn: the attempt goes on with them.
        return wait(at, attempt, WaitReason::Rate, Duration::ZERO);
    }
    let accepted = attempt
        .recipients
        .iter()
        .any(|r| r.status == RecipientStatus::Accepted);
    finish(
        at,
        attempt,
        if accepted {
            ReportType::Sent
        } else {
            ReportType::Failed
        },
    )
}

/// Why somebody was deferred: as the server said just now, or in an earlier part of the attempt.
fn deferral(attempt: &Attempt) -> Failure {
    let now = attempt.failure.clone().filter(Failure::is_transient);
    now.or_else(|| {
        let deferred = |r: &&RecipientResult| r.status == RecipientStatus::Deferred;
        let replies = attempt.recipients.iter().filter(deferred);
        let mut failures = replies.filter_map(|r| Some(classify::refusal(Stage::RcptTo, r.reply()?)));
        failures.find(Failure::is_transient)
    })
    .unwrap_or_else(unknown_refusal)
}

fn unknown_refusal() -> Failure {
    Failure::transient(
        Class::Infrastructure,
        Fault::Provider,
        Stage::RcptTo,
        "deferred",
        "the server deferred the recipients",
    )
}

/// A passing failure: come back, unless that has been tried long enough.
fn again(at: &Circumstances<'_>, attempt: &mut Attempt, failure: &Failure) -> Settlement {
    let since = |at_first: Timestamp| Duration::try_from(at.now.duration_since(at_first)).unwrap_or_default();
    if failure.is_missing_key() {
        // However long it takes: keys are the operator's to bring.
        let delay = since(at.row.created).clamp(at.retry.base, LONGEST_KEY_WAIT.max(at.retry.base));
        let delay = delay.mul_f64(0.85 + 0.3 * at.jitter);
        attempt.failure = Some(failure.clone());
        return wait(at, attempt, WaitReason::Key, delay);
    }
    let attempts = attempt.number(at.row);
    let retry = attempt.retry.unwrap_or(at.retry);
    // How long it waited for its time, a limit or somebody's decision before is none of the server's doing.
    let age = at.row.tried.map(since).unwrap_or_default();
    let Some(delay) = retry.next(attempts, age, failure.retry_after, at.jitter) else {
        return give_up(at, attempt, failure);
    };
    attempt.failure = Some(failure.clone());
    wait(at, attempt, WaitReason::Retry, delay)
}

/// Retries are used up: whoever still waits will not get it.
fn give_up(at: &Circumstances<'_>, attempt: &mut Attempt, failure: &Failure) -> Settlement {
    for recipient in attempt.recipients.iter_mut().filter(|r| r.is_open()) {
        recipient.status = RecipientStatus::Refused;
    }
    let mut failure = failure.clone();
    failure.message = format!(
        "given up after {} attempts; last: {}",
        attempt.number(at.row),
        failure.message
    );
    failure.severity = Severity::Permanent;
    fail(at, attempt, &failure)
}

fn fail(at: &Circumstances<'_>, attempt: &mut Attempt, failure: &Failure) -> Settlement {
    let accepted = attempt
        .recipients
        .iter()
        .any(|r| r.status == RecipientStatus::Accepted);
    for recipient in attempt.recipients.iter_mut().filter(|r| r.is_open()) {
        recipient.record(RecipientStatus::Refused, failure.reply.as_ref());
    }
    attempt.failure = Some(failure.clone());
    finish(
        at,
        attempt,
        if accepted {
            ReportType::Sent
        } else {
            ReportType::Failed
        },
    )
}

fn finish(at: &Circumstances<'_>, attempt: &Attempt, end: ReportType) -> Settlement {
    let accepted = attempt
        .recipients
        .iter()
        .any(|r| r.status == RecipientStatus::Accepted);
    // What somebody has received was sent, whatever ended the rest.
    let kind = if accepted { ReportType::Sent } else { end };
    let mut report = report(at, attempt, kind);
    let data = &mut report.data;
    data.partial = accepted
        && attempt
            .recipients
            .iter()
            .any(|r| r.status != RecipientStatus::Accepted);
    if end == ReportType::Expired {
        data.detail
            .get_or_insert_with(|| "expires_at has passed".to_owned());
    }
    if end == ReportType::Cancelled {
        data.reason.get_or_insert_with(|| "cancelled".to_owned());
    }
    settlement(at, attempt, Next::Done(kind), Some(report))
}

fn hold(at: &Circumstances<'_>, attempt: &mut Attempt) -> Settlement {
    if let Verdict::Uncertain(failure) = &attempt.verdict {
        attempt.failure = Some(failure.clone());
    }
    let report = report(at, attempt, ReportType::Uncertain);
    settlement(at, attempt, Next::Hold { body: None }, Some(report))
}

fn wait(at: &Circumstances<'_>, attempt: &Attempt, reason: WaitReason, delay: Duration) -> Settlement {
    let left = at.job.expires_at.map(|expiry| expiry.duration_since(at.now));
    if left.is_some_and(|left| !left.is_positive()) {
        // The attempt took long, or the way to it: those who look for what expires among the waiting look for recent ones.
        return finish(at, attempt, ReportType::Expired);
    }
    let left = left.map(|left| Duration::try_from(left).unwrap_or_default());
    // It will have expired by then: that is told as soon as it is so.
    let expires = left.is_some_and(|left| left <= delay);
    let delay = left.map_or(delay, |left| left.min(delay));
    let report = is_reported(at, attempt, reason, delay).then(|| {
        let mut report = report(at, attempt, ReportType::Deferred);
        report
            .data
            .reason
            .get_or_insert_with(|| reason.as_str().to_owned());
        let next = at
            .now
            .checked_add(SignedDuration::try_from(delay).unwrap_or_default());
        report.data.next_attempt_at = next.ok().filter(|_| !expires);
        report
    });
    let next = Next::Park {
        reason,
        delay,
        body: None,
    };
    settlement(at, attempt, next, report)
}

/// At most one report per job and reason: the first retry, and the first wait for a limit or a date that is long
/// enough to be worth telling.
fn is_reported(at: &Circumstances<'_>, attempt: &Attempt, reason: WaitReason, delay: Duration) -> bool {
    match reason {
        WaitReason::Retry => attempt.number(at.row) == 1,
        WaitReason::Key => at.new,
        WaitReason::Rate | WaitReason::Schedule | WaitReason::Unhealthy => {
            at.new && delay >= at.deferred_report_after
        }
        WaitReason::Busy | WaitReason::Contract => false,
    }
}

/// Attempts that are over. One that has to wait for room in the midst of it is not: it goes on with those who have had no
/// turn yet, in however many parts a limit has it sent.
fn attempts_over(at: &Circumstances<'_>, attempt: &Attempt, next: &Next) -> u32 {
    match next {
        Next::Park { reason, .. } if *reason != WaitReason::Retry => at.row.attempts,
        _ => attempt.number(at.row),
    }
}

fn settlement(at: &Circumstances<'_>, attempt: &Attempt, next: Next, report: Option<Report>) -> Settlement {
    let known = attempt.started || !at.row.recipients.is_empty();
    Settlement {
        row: at.row.clone(),
        attempts: attempts_over(at, attempt, &next),
        next,
        recipients: known.then(|| attempt.recipients.clone()),
        message_id: attempt.message_id.clone(),
        report: report.map(ReportMessage::from),
        refund: !attempt.reached_mail_from,
        error: attempt.failure.as_ref().map(ToString::to_string),
        uncertain: attempt.is_uncertain(),
        crashed: attempt.crashed,
        account: attempt.waits_for.clone(),
        evidence: attempt.evidence.clone(),
    }
}

fn report(at: &Circumstances<'_>, attempt: &Attempt, kind: ReportType) -> Report {
    let sequence = at.row.sequence + 1;
    let mut data = ReportData {
        job: Some(at.job.id.clone()),
        tenant: at.job.tenant.clone(),
        account: attempt.account.clone(),
        sender: attempt.sender.clone(),
        attempt: attempt.number(at.row),
        message_id: attempt.message_id.clone(),
        recipients: attempt.recipients.clone(),
        partial: false,
        reason: None,
        detail: None,
        class: None,
        fault: None,
        stage: None,
        errors: Vec::new(),
        is_final: kind.is_final(),
        sequence,
        correlation_id: Some(Arc::clone(at.correlation_id)),
        traceparent: at.traceparent.map(str::to_owned),
        next_attempt_at: None,
        uncertain_attempts: at.row.uncertain + u32::from(attempt.is_uncertain()),
        timings: timings(at, attempt),
        batch: at.job.batch.clone(),
        tags: at.job.tags.clone(),
        metadata: at.job.metadata.clone(),
        links: attempt.links.clone(),
    };
    if let Some(failure) = &attempt.failure {
        data.blame(failure);
    }
    Report {
        id: event_id(
            at.job.tenant.as_str(),
            "job",
            at.job.id.as_str(),
            &sequence.to_string(),
        ),
        kind: kind.as_str(),
        timestamp: at.now,
        data,
    }
}

fn timings(at: &Circumstances<'_>, attempt: &Attempt) -> Option<Timings> {
    let total = at.now.duration_since(at.row.created).as_millis();
    attempt.started.then(|| Timings {
        total_ms: u64::try_from(total).unwrap_or(0),
        smtp_ms: attempt.smtp.map(|took| took.as_millis() as u64),
    })
}

#[cfg(test)]
mod tests;
