//! What a test server does differently from a well-behaved one.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The points at which a script can act: the reply to each of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The greeting.
    Greeting,
    /// EHLO or HELO.
    Ehlo,
    /// STARTTLS.
    StartTls,
    /// AUTH, at its end.
    Auth,
    /// MAIL.
    Mail,
    /// RCPT.
    Rcpt,
    /// DATA, up to 354.
    Data,
    /// The end of the mail.
    FinalDot,
    /// RSET.
    Rset,
    /// NOOP.
    Noop,
    /// QUIT.
    Quit,
}

/// What to do instead of answering properly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Answer this (without CRLF; lines of a long reply separated by `\r\n`).
    Reply(String),
    /// Answer this and close the connection.
    ReplyThenClose(String),
    /// Close without an answer.
    Close,
    /// Never answer, keeping the connection.
    Silence,
    /// Take the mail, then close without an answer. At [`Phase::FinalDot`].
    TakeThenClose,
    /// Take the mail, then never answer. At [`Phase::FinalDot`].
    TakeThenSilence,
}

impl Action {
    /// [`Action::Reply`].
    #[must_use]
    pub fn reply(text: &str) -> Self {
        Self::Reply(text.to_owned())
    }

    /// A 421 with closing.
    #[must_use]
    pub fn shutting_down() -> Self {
        Self::ReplyThenClose("421 4.3.2 Service shutting down".to_owned())
    }
}

/// What happens to a recipient.
#[derive(Clone)]
pub struct RcptRule(Arc<dyn Fn() -> Option<String> + Send + Sync>);

impl fmt::Debug for RcptRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RcptRule")
    }
}

impl RcptRule {
    /// Always answered with this.
    #[must_use]
    pub fn refuse(reply: &str) -> Self {
        let reply = reply.to_owned();
        Self(Arc::new(move || Some(reply.clone())))
    }

    /// Answered with this the first `n` times, then accepted.
    #[must_use]
    pub fn defer_first(n: u64, reply: &str) -> Self {
        let reply = reply.to_owned();
        let seen = AtomicU64::new(0);
        Self(Arc::new(move || {
            (seen.fetch_add(1, Ordering::Relaxed) < n).then(|| reply.clone())
        }))
    }
}

/// Given the address in RCPT, the reply if it is not to be accepted.
type RecipientRule = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

#[derive(Debug, Clone)]
struct Rule {
    phase: Phase,
    /// The first occurrence it applies to, counted from 0, and how many.
    skip: u64,
    times: u64,
    seen: Arc<AtomicU64>,
    action: Action,
}

/// The whole plan. Counts are per server, over all its connections.
#[derive(Clone, Default)]
pub struct Script {
    rules: Vec<Rule>,
    delays: Vec<(Phase, Duration)>,
    recipients: Vec<RecipientRule>,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script")
            .field("rules", &self.rules)
            .field("delays", &self.delays)
            .finish_non_exhaustive()
    }
}

impl Script {
    /// A well-behaved server.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Always does this at a phase.
    #[must_use]
    pub fn on(self, phase: Phase, action: Action) -> Self {
        self.rule(phase, 0, u64::MAX, action)
    }

    /// Does this the first `n` times.
    #[must_use]
    pub fn first(self, n: u64, phase: Phase, action: Action) -> Self {
        self.rule(phase, 0, n, action)
    }

    /// Does this always but the first `n` times.
    #[must_use]
    pub fn after(self, n: u64, phase: Phase, action: Action) -> Self {
        self.rule(phase, n, u64::MAX, action)
    }

    /// Does this only the time after the first `n`.
    #[must_use]
    pub fn once_after(self, n: u64, phase: Phase, action: Action) -> Self {
        self.rule(phase, n, 1, action)
    }

    fn rule(mut self, phase: Phase, skip: u64, times: u64, action: Action) -> Self {
        self.rules.push(Rule {
            phase,
            skip,
            times,
            seen: Arc::default(),
            action,
        });
        self
    }

    /// Waits this long before each reply of a phase.
    #[must_use]
    pub fn delay(mut self, phase: Phase, delay: Duration) -> Self {
        self.delays.push((phase, delay));
        self
    }

    /// A rule for recipients with this local part, whatever their domain.
    #[must_use]
    pub fn recipient(self, local: &str, rule: RcptRule) -> Self {
        let local = local.to_owned();
        self.recipients_with(move |address| {
            let (user, _) = address.rsplit_once('@').unwrap_or((address, ""));
            if user == local { (rule.0)() } else { None }
        })
    }

    /// A rule for recipients: gives the reply for those not to be accepted.
    #[must_use]
    pub fn recipients_with(mut self, rule: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        self.recipients.push(Arc::new(rule));
        self
    }

    /// What to do now; counts the occurrence for every rule of the phase.
    pub(crate) fn decide(&self, phase: Phase) -> Option<&Action> {
        let mut decided = None;
        for rule in self.rules.iter().filter(|rule| rule.phase == phase) {
            let nth = rule.seen.fetch_add(1, Ordering::Relaxed);
            let applies = nth >= rule.skip && nth - rule.skip < rule.times;
            if applies && decided.is_none() {
                decided = Some(&rule.action);
            }
        }
        decided
    }

    pub(crate) fn delay_of(&self, phase: Phase) -> Option<Duration> {
        self.delays
            .iter()
            .find(|(at, _)| *at == phase)
            .map(|(_, delay)| *delay)
    }

    pub(crate) fn refusal(&self, address: &str) -> Option<String> {
        self.recipients.iter().find_map(|rule| rule(address))
    }
}
