//! Attempts and reports as spans (docs/tracing.md has their names and attributes).

use sha2::{Digest as _, Sha256};

use super::Worker;
use crate::failure::{Failure, Stage};
use crate::id::{JobId, TenantId};
use crate::pipeline::task::Task;
use crate::pipeline::{Attempt, Verdict};
use crate::report::{RecipientResult, RecipientStatus, Report};
use crate::telemetry::traces::{self, Attributes, Kind, Recording, Summary, TraceId};

impl Worker {
    /// Begins the span of an attempt, if there are spans and the job is sampled.
    pub(super) fn trace(&self, task: &Task) -> Option<Recording> {
        let traces = self.traces.as_ref()?;
        let root = || trace_of(&task.job.tenant, &task.job.id, task.row.born);
        traces.begin(task.traceparent.as_deref(), root)
    }

    /// Says what the attempt that is being followed was. `queue`: where the job came from, if not out of the waiting room.
    pub(super) fn summarise(&self, task: &Task, queue: Option<&str>, attempt: &Attempt) {
        traces::summarise(|| {
            let queues = self.topology.job_queues().iter();
            let queue = queue.or_else(|| {
                let mut of_level = queues.filter(|(level, _)| *level == task.level);
                of_level.next().map(|(_, queue)| queue.as_str())
            });
            of_attempt(task, queue.unwrap_or_default(), attempt)
        });
    }

    /// Begins the span of a publish of a report, below that of the attempt that it is about.
    pub(super) fn trace_report(&self, report: &Report) -> Option<Recording> {
        let traces = self.traces.as_ref()?;
        traces.begin_below(report.data.traceparent.as_deref()?)
    }

    /// Ends it.
    pub(super) fn report_traced(&self, recording: Recording, report: &Report, confirmed: bool) {
        let exchange = self.topology.reports_exchange();
        recording.end(Summary {
            name: format!("send {exchange}"),
            kind: Kind::Producer,
            attributes: Attributes::default()
                .text("messaging.system", "rabbitmq")
                .text("messaging.operation.type", "send")
                .text("messaging.operation.name", "send")
                .text("messaging.destination.name", exchange)
                .text("messaging.message.id", report.id.as_str())
                .text("postroom.tenant", report.data.tenant.as_str())
                .text_if("postroom.job", report.data.job.as_ref().map(JobId::as_str))
                .text("postroom.report", report.kind),
            error: (!confirmed).then_some("not_confirmed".into()),
            failed_at: None,
        });
    }
}

/// The trace of a job that came with none: the same for all its attempts, whoever makes them.
fn trace_of(tenant: &TenantId, job: &JobId, born: i64) -> TraceId {
    let mut hash = Sha256::new();
    for part in ["postroom trace", tenant.as_str(), job.as_str()] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    hash.update(born.to_be_bytes());
    let digest: [u8; 32] = hash.finalize().into();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    TraceId::from_random(id)
}

fn of_attempt(task: &Task, queue: &str, attempt: &Attempt) -> Summary {
    let failure = failure(attempt);
    let count = |status| {
        let of_it = |r: &&RecipientResult| r.status == status;
        attempt.recipients.iter().filter(of_it).count() as i64
    };
    let (outcome, waits_for) = outcome(attempt);
    let attributes = Attributes::default()
        .text("messaging.system", "rabbitmq")
        .text("messaging.operation.type", "process")
        .text("messaging.operation.name", "process")
        .text("messaging.destination.name", queue)
        .text("postroom.tenant", task.job.tenant.as_str())
        .text("postroom.job", task.job.id.as_str())
        .text("postroom.level", task.level.as_str())
        .text("postroom.source", if task.new { "queue" } else { "waiting_room" })
        .number("postroom.attempt", attempt.number(&task.row))
        .text("postroom.outcome", outcome)
        .text_if("postroom.wait.reason", waits_for)
        .text_if("postroom.account", attempt.account.as_deref())
        .text_if(
            "postroom.sender.via",
            attempt.sender.as_ref().map(|sender| sender.via),
        )
        .number("postroom.recipients.accepted", count(RecipientStatus::Accepted))
        .number("postroom.recipients.deferred", count(RecipientStatus::Deferred))
        .number("postroom.recipients.refused", count(RecipientStatus::Refused))
        .text_if("postroom.failure.class", failure.map(|f| f.class.as_str()))
        .text_if("postroom.failure.fault", failure.map(|f| f.fault.as_str()))
        .text_if("postroom.failure.stage", failure.map(|f| f.stage.as_str()));
    Summary {
        name: format!("process {queue}"),
        kind: Kind::Consumer,
        attributes,
        error: failure.map(|f| f.reason.into()),
        failed_at: failure.and_then(|f| stage(f.stage)),
    }
}

/// What is told as the error: never its message, which may quote a server that quotes addresses.
fn failure(attempt: &Attempt) -> Option<&Failure> {
    match &attempt.verdict {
        Verdict::Failed(failure) | Verdict::Uncertain(failure) => Some(failure),
        Verdict::Attempted => attempt.failure.as_ref(),
        _ => None,
    }
}

/// A word for what the attempt came to, and why it waits if it does.
fn outcome(attempt: &Attempt) -> (&'static str, Option<&'static str>) {
    let any = |status| attempt.recipients.iter().any(|r| r.status == status);
    let outcome = match &attempt.verdict {
        Verdict::Attempted if !any(RecipientStatus::Deferred) && !any(RecipientStatus::Refused) => "sent",
        Verdict::Attempted if any(RecipientStatus::Accepted) => "partial",
        Verdict::Attempted if any(RecipientStatus::Deferred) => "deferred",
        Verdict::Attempted => "refused",
        Verdict::Failed(_) => "failed",
        Verdict::Uncertain(_) => "uncertain",
        Verdict::Wait { reason, .. } => return ("waits", Some(reason.as_str())),
        Verdict::Expired => "expired",
        Verdict::Cancelled => "cancelled",
        Verdict::GiveBack => "given_back",
    };
    (outcome, None)
}

/// The span of the stage at which it failed.
fn stage(stage: Stage) -> Option<&'static str> {
    match stage {
        Stage::Resolve => Some("resolve"),
        Stage::Fetch | Stage::Upload => Some("fetch"),
        Stage::Compose => Some("compose"),
        Stage::Connect | Stage::Auth => Some("connection"),
        Stage::MailFrom | Stage::RcptTo | Stage::Data => Some("send"),
        Stage::Settle => Some("settle"),
        Stage::Decode => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_without_a_trace_has_the_same_one_at_every_attempt() {
        let tenant: TenantId = "acme".parse().unwrap();
        let (one, two): (JobId, JobId) = ("1".parse().unwrap(), "2".parse().unwrap());
        assert_eq!(trace_of(&tenant, &one, 7), trace_of(&tenant, &one, 7));
        assert_ne!(trace_of(&tenant, &one, 7), trace_of(&tenant, &two, 7));
        assert_ne!(trace_of(&tenant, &one, 7), trace_of(&tenant, &one, 8));
    }
}
