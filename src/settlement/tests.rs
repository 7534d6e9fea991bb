use serde_json::json;

use super::*;
use crate::failure::Reply;
use crate::id::AccountKey;
use crate::job::decode::{self, Incoming};
use crate::ledger::lease;

fn job(more: &serde_json::Value) -> MailJob {
    let mut body = json!({
        "id": "1", "tenant": "acme", "to": ["a@example.org", "b@example.org"], "subject": "s", "text": "t",
        "tags": ["x"], "batch": "spring",
    });
    for (name, value) in more.as_object().into_iter().flatten() {
        body[name] = value.clone();
    }
    let body = body.to_string();
    let incoming = Incoming {
        body: body.as_bytes(),
        ..Incoming::default()
    };
    decode::decode(&incoming, &crate::config::JobLimits::default()).unwrap()
}

fn row(attempts: u32) -> Row {
    let (tenant, id) = ("acme".parse().unwrap(), "1".parse().unwrap());
    let lease = lease::Epoch::for_tests().claim();
    Row {
        attempts,
        created: Timestamp::UNIX_EPOCH,
        ..Row::new(tenant, id, AccountKey::from_stored("acme/main"), lease, 1000)
    }
}

fn policy(max_attempts: u32) -> RetryPolicy {
    RetryPolicy {
        max_attempts,
        max_age: Duration::from_hours(1),
        base: Duration::from_secs(10),
        cap: Duration::from_mins(10),
    }
}

struct Case {
    job: MailJob,
    row: Row,
    correlation_id: Arc<str>,
    retry: RetryPolicy,
    new: bool,
}

impl Case {
    fn new() -> Self {
        Self {
            job: job(&json!({})),
            row: row(0),
            correlation_id: "corr".into(),
            retry: policy(3),
            new: true,
        }
    }

    fn at(&self) -> Circumstances<'_> {
        Circumstances {
            job: &self.job,
            row: &self.row,
            correlation_id: &self.correlation_id,
            traceparent: None,
            retry: self.retry,
            new: self.new,
            deferred_report_after: Duration::from_mins(1),
            now: Timestamp::UNIX_EPOCH + SignedDuration::from_secs(100),
            jitter: 0.5,
        }
    }

    fn plan(&self, mut attempt: Attempt) -> Settlement {
        plan(&self.at(), &mut attempt)
    }

    /// An attempt in which the server said this about the two recipients.
    fn answered(&self, results: [RecipientStatus; 2]) -> Attempt {
        let mut attempt = Attempt::of(self.job.all_pending(), Some("<m@example.com>".into()));
        for (recipient, status) in attempt.recipients.iter_mut().zip(results) {
            recipient.status = status;
        }
        attempt.verdict = Verdict::Attempted;
        attempt.started = true;
        attempt.reached_mail_from = true;
        if results.contains(&RecipientStatus::Deferred) {
            attempt.failure = Some(later());
        }
        attempt
    }

    fn concluded(&self, verdict: Verdict) -> Attempt {
        let mut attempt = Attempt::of(self.job.all_pending(), None);
        attempt.verdict = verdict;
        attempt
    }
}

fn later() -> Failure {
    Failure::transient(
        Class::Infrastructure,
        Fault::Provider,
        Stage::RcptTo,
        "server_error",
        "trouble",
    )
}

fn never() -> Failure {
    Failure::permanent(
        Class::Content,
        Fault::Sender,
        Stage::Compose,
        "message_too_large",
        "too large",
    )
}

fn outcome(settlement: &Settlement) -> &'static str {
    match &settlement.next {
        Next::Done(kind) => kind.as_str(),
        Next::Park { reason, .. } => reason.as_str(),
        Next::GiveBack => "give back",
        Next::Hold { .. } => "hold",
    }
}

#[test]
fn what_the_server_says_about_the_recipients_decides_the_outcome() {
    use RecipientStatus::{Accepted, Deferred, Refused};
    let table = [
        ([Accepted, Accepted], "mail.sent", false),
        ([Accepted, Refused], "mail.sent", true),
        ([Refused, Refused], "mail.failed", false),
        ([Accepted, Deferred], "retry", false),
        ([Refused, Deferred], "retry", false),
    ];
    for (results, expected, partial) in table {
        let case = Case::new();
        let settlement = case.plan(case.answered(results));
        assert_eq!(outcome(&settlement), expected, "{results:?}");
        let report = settlement.report.expect("it is reported");
        assert_eq!(report.data.partial, partial, "{results:?}");
        assert_eq!(report.data.is_final, expected != "retry");
        assert_eq!(report.data.sequence, 1001);
        assert_eq!(settlement.attempts, 1);
        assert!(!settlement.refund, "MAIL FROM was written");
    }
}

#[test]
fn a_retry_is_reported_once_and_carries_its_time() {
    use RecipientStatus::{Accepted, Deferred};
    let mut case = Case::new();
    let settlement = case.plan(case.answered([Accepted, Deferred]));
    let report = settlement.report.expect("the first is reported");
    assert_eq!(report.kind, "mail.deferred");
    assert!(report.data.next_attempt_at.is_some());
    assert_eq!(report.data.reason.as_deref(), Some("server_error"));
    case.row = row(1);
    assert!(case.plan(case.answered([Accepted, Deferred])).report.is_none());
}

#[test]
fn the_last_attempt_refuses_whoever_still_waits() {
    use RecipientStatus::{Accepted, Deferred, Refused};
    let mut case = Case::new();
    case.row = row(2);
    for (results, expected) in [
        ([Accepted, Deferred], "mail.sent"),
        ([Refused, Deferred], "mail.failed"),
    ] {
        let settlement = case.plan(case.answered(results));
        assert_eq!(outcome(&settlement), expected);
        let report = settlement.report.unwrap();
        assert_eq!(report.data.recipients[1].status, Refused);
        assert!(
            report
                .data
                .detail
                .as_ref()
                .unwrap()
                .contains("given up after 3 attempts")
        );
    }
}

#[test]
fn a_job_tried_for_as_long_as_its_policy_allows_is_given_up() {
    let mut case = Case::new();
    case.retry.max_age = Duration::from_secs(100);
    for (tried, expected) in [(0, "mail.failed"), (50, "retry")] {
        case.row.tried = Some(Timestamp::from_second(tried).unwrap());
        let settlement = case.plan(case.concluded(Verdict::Failed(later())));
        assert_eq!(outcome(&settlement), expected, "first tried at {tried}");
    }
}

#[test]
fn a_mail_scheduled_beyond_its_max_age_is_retried_after_a_passing_failure() {
    let mut case = Case::new();
    case.row.created = Timestamp::UNIX_EPOCH - SignedDuration::from_hours(96);
    let mut attempt = case.concluded(Verdict::Failed(later()));
    attempt.started = true;
    let settlement = case.plan(attempt);
    assert_eq!((outcome(&settlement), settlement.attempts), ("retry", 1));
    let unhealthy = Verdict::Wait {
        reason: WaitReason::Unhealthy,
        delay: Duration::from_secs(5),
    };
    assert_eq!(outcome(&case.plan(case.concluded(unhealthy))), "unhealthy");
}

#[test]
fn a_failure_that_stays_fails_everybody_at_once() {
    let case = Case::new();
    let mut attempt = case.concluded(Verdict::Failed(never()));
    attempt.started = true;
    let settlement = case.plan(attempt);
    assert_eq!(outcome(&settlement), "mail.failed");
    let data = &settlement.report.unwrap().data;
    assert_eq!(
        (data.class, data.fault, data.stage),
        (Some("content"), Some("sender"), Some("compose"))
    );
    assert!(
        data.recipients
            .iter()
            .all(|r| r.status == RecipientStatus::Refused)
    );
    assert!(settlement.refund, "MAIL FROM was never written");
}

#[test]
fn waiting_for_room_is_no_attempt_and_costs_nothing() {
    for reason in [
        WaitReason::Rate,
        WaitReason::Busy,
        WaitReason::Schedule,
        WaitReason::Unhealthy,
    ] {
        let case = Case::new();
        let settlement = case.plan(case.concluded(Verdict::Wait {
            reason,
            delay: Duration::from_secs(5),
        }));
        assert_eq!(outcome(&settlement), reason.as_str());
        assert_eq!(settlement.attempts, 0);
        assert!(settlement.refund && settlement.report.is_none() && settlement.recipients.is_none());
        assert!(matches!(settlement.next, Next::Park { .. }));
    }
}

#[test]
fn an_attempt_that_waits_for_room_in_the_midst_of_it_goes_on_and_is_counted_when_it_is_over() {
    use RecipientStatus::{Accepted, Deferred, Pending};
    let mut case = Case::new();
    case.row = row(1);
    for reason in [WaitReason::Rate, WaitReason::Busy, WaitReason::Unhealthy] {
        let mut part = case.answered([Deferred, Pending]);
        part.verdict = Verdict::Wait {
            reason,
            delay: Duration::from_secs(5),
        };
        let settlement = case.plan(part);
        assert_eq!((outcome(&settlement), settlement.attempts), (reason.as_str(), 1));
        assert!(settlement.recipients.is_some(), "what was said is kept");
    }
    let settlement = case.plan(case.answered([Deferred, Accepted]));
    assert_eq!((outcome(&settlement), settlement.attempts), ("retry", 2));
}

#[test]
fn what_an_earlier_part_of_an_attempt_was_told_decides_when_to_come_back() {
    use RecipientStatus::{Accepted, Deferred};
    let case = Case::new();
    let mut attempt = case.answered([Deferred, Accepted]);
    let told = Reply::new(451, "4.7.1 Greylisted, try again in 5 minutes");
    attempt.recipients[0].record(Deferred, Some(&told));
    // Of the part with which it ended.
    for failure in [None, Some(never())] {
        attempt.failure = failure;
        let settlement = case.plan(attempt.clone());
        assert!(settlement.error.unwrap().starts_with("greylisted"));
        let Next::Park { delay, .. } = settlement.next else {
            panic!("{:?}", settlement.next);
        };
        assert!(delay >= Duration::from_mins(5), "{delay:?}");
    }
}

#[test]
fn long_waits_of_new_jobs_are_reported_and_those_of_waiting_ones_are_not() {
    let long = Verdict::Wait {
        reason: WaitReason::Rate,
        delay: Duration::from_mins(2),
    };
    let mut case = Case::new();
    let report = case
        .plan(case.concluded(long.clone()))
        .report
        .expect("it is worth telling");
    assert_eq!(
        (report.kind, report.data.reason.as_deref()),
        ("mail.deferred", Some("rate"))
    );
    assert_eq!(report.data.attempt, 0);
    case.new = false;
    assert!(case.plan(case.concluded(long)).report.is_none());
}

#[test]
fn what_expires_before_its_next_attempt_is_due_when_it_expires() {
    let mut case = Case::new();
    for (expires, due, has_next) in [(105, 5, false), (200, 10, true)] {
        case.job.expires_at = Some(Timestamp::from_second(expires).unwrap());
        let settlement = case.plan(case.answered([RecipientStatus::Deferred; 2]));
        let Next::Park { delay, .. } = settlement.next else {
            panic!("{:?}", settlement.next);
        };
        assert_eq!(delay, Duration::from_secs(due));
        let report = settlement.report.expect("the first is reported");
        assert_eq!(report.data.next_attempt_at.is_some(), has_next);
    }
}

#[test]
fn what_has_expired_when_its_attempt_is_over_does_not_wait_any_more() {
    let mut case = Case::new();
    case.job.expires_at = Some(Timestamp::from_second(100).unwrap());
    let settlement = case.plan(case.answered([RecipientStatus::Deferred; 2]));
    assert_eq!((outcome(&settlement), settlement.attempts), ("mail.expired", 1));
    let data = &settlement.report.unwrap().data;
    assert_eq!(
        data.reason.as_deref(),
        Some("server_error"),
        "why it was not sent before"
    );
    let mut uncertain = case.concluded(Verdict::Uncertain(later()));
    uncertain.started = true;
    let settlement = case.plan(uncertain);
    assert_eq!(outcome(&settlement), "mail.expired");
    assert_eq!(settlement.report.unwrap().data.uncertain_attempts, 1);
    let waits = Verdict::Wait {
        reason: WaitReason::Busy,
        delay: Duration::ZERO,
    };
    assert_eq!(outcome(&case.plan(case.concluded(waits))), "mail.expired");
}

#[test]
fn a_mail_that_waits_for_an_unhealthy_account_for_as_long_as_retries_may_take_fails() {
    let mut case = Case::new();
    case.row = row(3);
    let mut attempt = case.concluded(Verdict::Wait {
        reason: WaitReason::Unhealthy,
        delay: Duration::from_secs(5),
    });
    attempt.waits_for = Some(AccountKey::from_stored("acme/other"));
    // That it waited too long for one account says nothing of the other, for which it waits now.
    for overdue in [false, true] {
        case.row.overdue = overdue;
        let waits = case.plan(attempt.clone());
        assert_eq!(outcome(&waits), "unhealthy");
        assert_eq!(waits.account, attempt.waits_for);
    }
    attempt.waits_for = None;
    let failed = case.plan(attempt);
    assert_eq!(outcome(&failed), "mail.failed");
    assert_eq!((failed.attempts, failed.refund), (3, true));
    assert_eq!(
        failed.report.unwrap().data.reason.as_deref(),
        Some("sender_unhealthy")
    );
}

#[test]
fn what_an_attempt_found_out_about_accounts_is_written_with_whatever_follows() {
    let case = Case::new();
    for verdict in [Verdict::Failed(never()), Verdict::Cancelled, Verdict::GiveBack] {
        let mut attempt = case.concluded(verdict);
        attempt.evidence.push(crate::ledger::health::Evidence {
            account: AccountKey::from_stored("acme/main"),
            fault: None,
        });
        assert_eq!(case.plan(attempt.clone()).evidence, attempt.evidence);
    }
}

#[test]
fn an_uncertain_outcome_is_sent_again_or_held_as_the_policy_says() {
    let case = Case::new();
    let mut attempt = case.concluded(Verdict::Uncertain(later()));
    attempt.started = true;
    attempt.reached_mail_from = true;
    let again = case.plan(attempt.clone());
    assert_eq!((outcome(&again), again.uncertain), ("retry", true));
    assert_eq!(again.report.unwrap().data.uncertain_attempts, 1);
    attempt.on_uncertain = OnUncertain::Hold;
    let settlement = case.plan(attempt);
    assert!(settlement.uncertain);
    assert_eq!(outcome(&settlement), "hold");
    let report = settlement.report.unwrap();
    assert_eq!((report.kind, report.data.is_final), ("mail.uncertain", false));
    assert_eq!(report.data.uncertain_attempts, 1);
}

#[test]
fn what_somebody_has_received_was_sent_whatever_ended_the_rest() {
    for verdict in [Verdict::Expired, Verdict::Cancelled, Verdict::Failed(never())] {
        let mut case = Case::new();
        case.row = row(1);
        let mut attempt = case.answered([RecipientStatus::Accepted, RecipientStatus::Pending]);
        attempt.verdict = verdict.clone();
        let settlement = case.plan(attempt);
        assert_eq!(outcome(&settlement), "mail.sent", "{verdict:?}");
        assert!(settlement.report.unwrap().data.partial);
    }
}

#[test]
fn expired_and_cancelled_jobs_say_so() {
    for (verdict, kind, reason) in [
        (Verdict::Expired, "mail.expired", None),
        (Verdict::Cancelled, "mail.cancelled", Some("cancelled")),
    ] {
        let case = Case::new();
        let settlement = case.plan(case.concluded(verdict));
        let report = settlement.report.unwrap();
        assert_eq!(
            (report.kind, report.data.is_final, report.data.attempt),
            (kind, true, 0)
        );
        assert_eq!(report.data.reason.as_deref(), reason);
        assert_eq!(report.data.detail.is_some(), reason.is_none());
    }
}

#[test]
fn a_cancel_that_meets_an_attempt_tells_what_was_tried() {
    let mut case = Case::new();
    case.row.uncertain = 1;
    let mut attempt = case.concluded(Verdict::Uncertain(later()));
    attempt.started = true;
    attempt.reached_mail_from = true;
    attempt.failure = Some(later());
    attempt.smtp = Some(Duration::from_secs(2));
    attempt.waits_for = Some(AccountKey::from_stored("acme/other"));
    attempt.sender = Some(crate::report::Sender {
        via: "account",
        account: Some(AccountKey::from_stored("acme/main")),
        reason: None,
    });
    let settlement = cancelled(&case.at(), attempt);
    assert_eq!(outcome(&settlement), "mail.cancelled");
    assert_eq!((settlement.attempts, settlement.uncertain), (1, true));
    assert!(!settlement.refund && settlement.account.is_none() && settlement.error.is_some());
    let data = &settlement.report.unwrap().data;
    assert_eq!((data.attempt, data.uncertain_attempts), (1, 2));
    assert_eq!(data.timings.unwrap().smtp_ms, Some(2000));
    assert!(data.sender.is_some());
    assert_eq!(
        (data.reason.as_deref(), data.class),
        (Some("cancelled"), None),
        "not what went wrong"
    );
}

#[test]
fn a_report_echoes_what_the_producer_gave() {
    let case = Case::new();
    let report = case
        .plan(case.answered([RecipientStatus::Accepted; 2]))
        .report
        .unwrap();
    assert_eq!(report.id, event_id("acme", "job", "1", "1001"));
    assert_eq!(report.data.correlation_id.as_deref(), Some("corr"));
    assert_eq!(report.data.tags, ["x"]);
    assert_eq!(report.data.batch.as_deref(), Some("spring"));
    assert_eq!(report.data.timings.unwrap().total_ms, 100_000);
}

#[test]
fn a_job_given_back_says_nothing_and_returns_its_slot() {
    let case = Case::new();
    let settlement = case.plan(case.concluded(Verdict::GiveBack));
    assert!(settlement.report.is_none() && settlement.refund);
    assert_eq!(outcome(&settlement), "give back");
}

#[test]
fn a_missing_key_is_waited_for_however_long_and_costs_no_attempt() {
    let mut case = Case::new();
    case.row = row(2);
    case.retry.max_age = Duration::from_secs(1);
    for (new, reported) in [(true, true), (false, false)] {
        case.new = new;
        let failure = Failure {
            reason: crate::failure::KEY_UNKNOWN,
            ..later()
        };
        let settlement = case.plan(case.concluded(Verdict::Failed(failure)));
        let Next::Park { reason, delay, .. } = settlement.next else {
            panic!("{:?}", settlement.next);
        };
        // As long as it has waited already.
        assert_eq!((reason, delay), (WaitReason::Key, Duration::from_secs(100)));
        assert_eq!((settlement.attempts, settlement.report.is_some()), (2, reported));
    }
}
