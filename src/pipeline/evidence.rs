//! What an attempt says about the health of the account it used.

use super::{Attempt, Verdict};
use crate::directory::{Chosen, Via};
use crate::ledger::health::{AccountFault, Evidence};
use crate::report::RecipientStatus;

/// Recipients that have the mail.
#[must_use]
pub fn accepted(attempt: &Attempt) -> usize {
    let accepted = |r: &&crate::report::RecipientResult| r.status == RecipientStatus::Accepted;
    attempt.recipients.iter().filter(accepted).count()
}

/// The evidence of one try through `chosen`, which began with so many recipients accepted and without a failure. `None` if
/// the server was not heard, or if the server is the job's own: those have no breaker.
#[must_use]
pub fn of(chosen: &Chosen, verdict: &Verdict, attempt: &Attempt, accepted_before: usize) -> Option<Evidence> {
    if chosen.via == Via::Override {
        return None;
    }
    let account = chosen.account.key.clone();
    let works = Evidence {
        account: account.clone(),
        fault: None,
    };
    if accepted(attempt) > accepted_before {
        return Some(works);
    }
    let failure = match verdict {
        Verdict::Failed(failure) | Verdict::Uncertain(failure) => failure,
        // It had to wait for room in the midst of it: what was said to those before counts.
        Verdict::Attempted | Verdict::Wait { .. } => attempt.failure.as_ref()?,
        _ => return None,
    };
    if failure.is_of_account() {
        let fault = Some(AccountFault::of(failure));
        return Some(Evidence { account, fault });
    }
    // Whoever answers, works: a recipient refused, a mail refused, even "more slowly, please".
    failure.reply.is_some().then_some(works)
}

#[cfg(test)]
mod tests {
    use crate::failure::{Class, Failure, Fault, Reply, Stage};

    fn failure(class: Class, fault: Fault, stage: Stage, code: Option<u16>) -> Failure {
        let failure = Failure::transient(class, fault, stage, "reason", "text");
        match code {
            Some(code) => failure.with_reply(Reply::new(code, "text")),
            None => failure,
        }
    }

    #[test]
    fn only_what_says_that_account_or_server_do_not_work_trips_the_breaker() {
        use {Class as C, Fault as F, Stage as S};
        for (class, fault, stage, code, trips) in [
            (C::Infrastructure, F::Provider, S::Connect, None, true),
            (C::Infrastructure, F::Provider, S::Connect, Some(421), true),
            (C::Infrastructure, F::Provider, S::Connect, Some(554), true),
            (C::Tls, F::Provider, S::Connect, None, true),
            (C::Tls, F::Sender, S::MailFrom, Some(530), true),
            (C::Auth, F::Sender, S::Auth, Some(535), true),
            (C::Auth, F::Provider, S::Auth, Some(454), true),
            (C::Auth, F::Sender, S::MailFrom, Some(530), true),
            (C::Infrastructure, F::Provider, S::MailFrom, Some(421), true),
            (C::Infrastructure, F::Provider, S::RcptTo, None, true),
            (C::Infrastructure, F::Provider, S::Data, None, true),
            // One recipient, one mail, one hop behind the server: the server works.
            (C::Infrastructure, F::Provider, S::RcptTo, Some(451), false),
            (C::Infrastructure, F::Provider, S::Data, Some(452), false),
            (C::Recipient, F::Recipient, S::RcptTo, Some(450), false),
            (C::Policy, F::Recipient, S::RcptTo, Some(451), false),
            (C::Policy, F::Sender, S::MailFrom, Some(550), false),
            (C::Policy, F::Us, S::Connect, Some(554), true),
            (C::Policy, F::Us, S::RcptTo, Some(554), true),
            (C::Content, F::Sender, S::Data, Some(554), false),
            // It asks for patience, and gets it: the retry waits as long as it asks.
            (C::Rate, F::Provider, S::Connect, Some(421), false),
            (C::Local, F::Us, S::Connect, None, false),
            (C::Infrastructure, F::Us, S::Fetch, None, false),
        ] {
            let failure = failure(class, fault, stage, code);
            assert_eq!(failure.is_of_account(), trips, "{failure:?}");
        }
        let mut lasting = failure(C::Auth, F::Sender, S::Auth, None);
        lasting.severity = crate::failure::Severity::Permanent;
        assert!(
            !lasting.is_of_account(),
            "its mail fails: there is nothing to wait for"
        );
    }
}
