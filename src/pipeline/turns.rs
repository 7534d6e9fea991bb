//! Whose turn it is among the recipients of a mail, within one attempt.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Attempt, Verdict};
use crate::address::Address;
use crate::failure::Failure;
use crate::ledger::WaitReason;
use crate::report::{RecipientResult, RecipientStatus};

/// Conversations that a server may end over single recipients before the others wait for the next attempt.
const MOST_HANGUPS: usize = 3;

/// Who is to have a turn in an attempt: everybody who waits, once. Where a limit or a busy account cuts it, those left have
/// theirs when there is room again, before anybody has another.
#[derive(Debug, Default)]
pub(super) struct Turns {
    due: HashSet<Arc<str>>,
    hangups: usize,
    answered: bool,
}

impl Turns {
    /// Those who have had no turn yet; of a mail of whom all have had theirs, those who were deferred. A server that hangs up
    /// over one of the latter does not keep the mail from the former.
    pub(super) fn of(attempt: &Attempt) -> Self {
        let mut due = with_status(&attempt.recipients, RecipientStatus::Pending);
        if due.is_empty() {
            due = with_status(&attempt.recipients, RecipientStatus::Deferred);
        }
        Self {
            due,
            ..Self::default()
        }
    }

    /// Recipients that still wait and have not had their turn.
    pub(super) fn next(&self, attempt: &Attempt) -> Vec<Address> {
        if self.hangups >= MOST_HANGUPS {
            return Vec::new();
        }
        let recipients = attempt.recipients.iter();
        recipients
            .filter(|r| r.is_open() && self.due.contains(&r.address))
            .filter_map(|r| r.address.parse().ok())
            .collect()
    }

    /// These have it now.
    pub(super) fn begin(&mut self, recipients: &[Address]) {
        for address in recipients {
            self.due.remove(AsRef::<str>::as_ref(address));
        }
    }

    /// The server has answered. It hung up over somebody else before it said anything of these, if there are any: they have
    /// their turn again.
    pub(super) fn answered(&mut self, untold: &[Address]) {
        self.answered = true;
        self.hangups += usize::from(!untold.is_empty());
        self.have_again(untold);
    }

    /// These were not asked about after all.
    pub(super) fn have_again(&mut self, recipients: &[Address]) {
        let addresses = recipients.iter().map(AsRef::<str>::as_ref);
        self.due.extend(addresses.map(Arc::from));
    }

    /// A server that hung up and said for how long is not asked about the others as soon as there is room: the attempt is
    /// over, and they are the first of the next one.
    pub(super) fn after(&self, verdict: Verdict, attempt: &Attempt) -> Verdict {
        let asks_for_patience = |failure: &Failure| failure.retry_after.is_some();
        let cut = matches!(
            verdict,
            Verdict::Wait {
                reason: WaitReason::Rate | WaitReason::Busy,
                ..
            }
        );
        if cut && self.hangups > 0 && attempt.failure.as_ref().is_some_and(asks_for_patience) {
            return Verdict::Attempted;
        }
        verdict
    }

    /// No more for now. Whoever was deferred by an earlier attempt, and had no turn while others had, is before them next time.
    pub(super) fn end(&self, attempt: &mut Attempt) {
        if !self.answered {
            return;
        }
        for recipient in &mut attempt.recipients {
            if recipient.status == RecipientStatus::Deferred && self.due.contains(&recipient.address) {
                recipient.status = RecipientStatus::Pending;
            }
        }
    }
}

fn with_status(recipients: &[RecipientResult], status: RecipientStatus) -> HashSet<Arc<str>> {
    let those = recipients.iter().filter(|r| r.status == status);
    those.map(|r| Arc::clone(&r.address)).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::failure::{Class, Fault, Stage};

    fn attempt(statuses: &[(&str, RecipientStatus)]) -> Attempt {
        let recipient = |(address, status): &(&str, RecipientStatus)| RecipientResult {
            status: *status,
            ..RecipientResult::pending(address)
        };
        Attempt::of(statuses.iter().map(recipient).collect(), None)
    }

    fn names(recipients: &[Address]) -> Vec<&str> {
        recipients.iter().map(Address::user).collect()
    }

    /// One turn, over which the server hangs up after it has deferred the first.
    fn hang_up(turns: &mut Turns, attempt: &mut Attempt) -> String {
        let open = turns.next(attempt);
        turns.begin(&open);
        let (first, untold) = open.split_first().expect("somebody is due");
        let mut all = attempt.recipients.iter_mut();
        all.find(|r| *r.address == *AsRef::<str>::as_ref(first))
            .unwrap()
            .status = RecipientStatus::Deferred;
        turns.answered(untold);
        first.user().to_owned()
    }

    #[test]
    fn those_of_whom_nothing_was_heard_have_their_turn_and_the_deferred_in_the_next_attempt() {
        use RecipientStatus::{Accepted, Deferred, Pending, Refused};
        let mut attempt = attempt(&[
            ("a@x.example", Deferred),
            ("b@x.example", Pending),
            ("c@x.example", Accepted),
            ("d@x.example", Refused),
            ("e@x.example", Pending),
        ]);
        let mut turns = Turns::of(&attempt);
        let first = turns.next(&attempt);
        assert_eq!(names(&first), ["b", "e"]);
        turns.begin(&first);
        turns.answered(&[]);
        assert!(turns.next(&attempt).is_empty());
        for place in [1, 4] {
            attempt.recipients[place].status = Accepted;
        }
        assert_eq!(names(&Turns::of(&attempt).next(&attempt)), ["a"]);
    }

    #[test]
    fn those_not_told_have_their_turn_again_a_few_times() {
        let many: Vec<String> = (0..9).map(|n| format!("r{n}@x.example")).collect();
        let many: Vec<_> = many
            .iter()
            .map(|r| (r.as_str(), RecipientStatus::Pending))
            .collect();
        let mut attempt = attempt(&many);
        let mut turns = Turns::of(&attempt);
        for hangup in 0..MOST_HANGUPS {
            assert_eq!(turns.next(&attempt).len(), many.len() - hangup);
            hang_up(&mut turns, &mut attempt);
        }
        assert!(
            turns.next(&attempt).is_empty(),
            "the rest waits for the next attempt"
        );
    }

    #[test]
    fn an_attempt_that_is_cut_goes_on_with_those_who_have_had_no_turn_and_ends_when_all_have() {
        use RecipientStatus::{Deferred, Pending};
        let mut attempt = attempt(&[("a@x.example", Deferred), ("b@x.example", Deferred)]);
        let mut turns = Turns::of(&attempt);
        assert_eq!(hang_up(&mut turns, &mut attempt), "a");
        turns.end(&mut attempt);
        assert_eq!(attempt.recipients[1].status, Pending);
        let mut turns = Turns::of(&attempt);
        assert_eq!(hang_up(&mut turns, &mut attempt), "b");
        assert!(turns.next(&attempt).is_empty());
        turns.end(&mut attempt);
        assert!(attempt.recipients.iter().all(|r| r.status == Deferred));
    }

    #[test]
    fn a_server_that_hung_up_and_said_for_how_long_ends_an_attempt_that_lacks_room() {
        let mut attempt = attempt(&[
            ("a@x.example", RecipientStatus::Pending),
            ("b@x.example", RecipientStatus::Pending),
        ]);
        let wait = || Verdict::Wait {
            reason: WaitReason::Rate,
            delay: Duration::ZERO,
        };
        let mut throttled =
            Failure::transient(Class::Rate, Fault::Provider, Stage::RcptTo, "throttled", "later");
        let mut turns = Turns::of(&attempt);
        assert!(matches!(turns.after(wait(), &attempt), Verdict::Wait { .. }));
        hang_up(&mut turns, &mut attempt);
        assert!(matches!(turns.after(wait(), &attempt), Verdict::Wait { .. }));
        attempt.failure = Some(throttled.clone());
        assert!(matches!(turns.after(wait(), &attempt), Verdict::Wait { .. }));
        throttled.retry_after = Some(Duration::from_mins(10));
        attempt.failure = Some(throttled);
        assert!(matches!(turns.after(wait(), &attempt), Verdict::Attempted));
        assert!(matches!(
            Turns::of(&attempt).after(wait(), &attempt),
            Verdict::Wait { .. }
        ));
    }

    #[test]
    fn who_was_not_asked_about_after_all_is_still_due() {
        let attempt = attempt(&[("a@x.example", RecipientStatus::Pending)]);
        let mut turns = Turns::of(&attempt);
        let open = turns.next(&attempt);
        turns.begin(&open);
        turns.have_again(&open);
        assert_eq!(names(&turns.next(&attempt)), ["a"]);
    }

    #[test]
    fn an_attempt_that_was_not_heard_changes_nothing_about_whose_turn_it_is() {
        let mut attempt = attempt(&[("a@x.example", RecipientStatus::Deferred)]);
        let mut turns = Turns::of(&attempt);
        turns.end(&mut attempt);
        turns.begin(&turns.next(&attempt));
        turns.end(&mut attempt);
        assert_eq!(attempt.recipients[0].status, RecipientStatus::Deferred);
    }
}
