//! Whose turn it is among the recipients of a mail, within one attempt.

use std::collections::HashSet;

use super::Attempt;
use crate::address::Address;
use crate::report::RecipientStatus;

/// Conversations that a server may end over single recipients before the others wait for the next attempt.
const MOST_HANGUPS: usize = 3;

/// Who has had a turn.
#[derive(Debug, Default)]
pub(super) struct Turns {
    had: HashSet<String>,
    hangups: usize,
}

impl Turns {
    /// Recipients that still wait and have not had their turn in this attempt. Those of whom nothing was heard yet go
    /// first, by themselves: a server that hangs up over one of the others does not keep the mail from them.
    pub(super) fn next(&self, attempt: &Attempt) -> Vec<Address> {
        if self.hangups >= MOST_HANGUPS {
            return Vec::new();
        }
        let unheard = self.waiting(attempt, RecipientStatus::Pending);
        if unheard.is_empty() {
            return self.waiting(attempt, RecipientStatus::Deferred);
        }
        unheard
    }

    fn waiting(&self, attempt: &Attempt, status: RecipientStatus) -> Vec<Address> {
        attempt
            .recipients
            .iter()
            .filter(|r| r.status == status && !self.had.contains(&*r.address))
            .filter_map(|r| r.address.parse().ok())
            .collect()
    }

    /// These have it now.
    pub(super) fn begin(&mut self, recipients: &[Address]) {
        self.had.extend(recipients.iter().map(ToString::to_string));
    }

    /// The server has hung up over somebody else: these have it again.
    pub(super) fn give_back(&mut self, untold: &[Address]) {
        self.hangups += usize::from(!untold.is_empty());
        for address in untold {
            self.had.remove(AsRef::<str>::as_ref(address));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::RecipientResult;

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

    #[test]
    fn those_of_whom_nothing_was_heard_go_first_and_the_deferred_after_them() {
        use RecipientStatus::{Accepted, Deferred, Pending, Refused};
        let attempt = attempt(&[
            ("a@x.example", Deferred),
            ("b@x.example", Pending),
            ("c@x.example", Accepted),
            ("d@x.example", Refused),
            ("e@x.example", Pending),
        ]);
        let mut turns = Turns::default();
        let first = turns.next(&attempt);
        assert_eq!(names(&first), ["b", "e"]);
        turns.begin(&first);
        let second = turns.next(&attempt);
        assert_eq!(names(&second), ["a"]);
        turns.begin(&second);
        assert!(turns.next(&attempt).is_empty());
    }

    #[test]
    fn those_not_told_have_their_turn_again_a_few_times() {
        let many: Vec<String> = (0..9).map(|n| format!("r{n}@x.example")).collect();
        let many: Vec<_> = many
            .iter()
            .map(|r| (r.as_str(), RecipientStatus::Pending))
            .collect();
        let attempt = attempt(&many);
        let mut turns = Turns::default();
        for hangup in 0..MOST_HANGUPS {
            let open = turns.next(&attempt);
            assert_eq!(open.len(), many.len() - hangup);
            turns.begin(&open);
            turns.give_back(&open[1..]);
        }
        assert!(
            turns.next(&attempt).is_empty(),
            "the rest waits for the next attempt"
        );
    }
}
