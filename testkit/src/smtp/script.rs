//! What a test server does differently from a well-behaved one.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Deserialize;

/// The points at which a script can act: the reply to each of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    /// BDAT, before its octets. A server with something to do here knows the command only from EHLO: it answers, and reads
    /// the octets as commands.
    Bdat,
    /// BDAT without octets that is not the last; some servers take it for a syntax error.
    EmptyChunk,
    /// The mail while it comes in, before its final dot; of one in chunks, the last. Only actions that end or freeze the
    /// connection make sense.
    Content,
    /// The end of the mail: the final dot, or the last octet of the last chunk.
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
    /// Answer properly, but only after this time. At [`Phase::FinalDot`] the mail is taken before.
    Delay(Duration),
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
    /// Of the occurrences it applies to, this part is hit; drawn from the script's seed.
    chance: f64,
    seen: Arc<AtomicU64>,
    action: Action,
}

/// The whole plan. Counts are per server, over all its connections.
#[derive(Clone, Default)]
pub struct Script {
    rules: Vec<Rule>,
    delays: Vec<(Phase, Duration)>,
    recipients: Vec<RecipientRule>,
    positions: Vec<(usize, String)>,
    drip: Option<Duration>,
    session: Option<(usize, String)>,
    seed: u64,
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

    /// Does this with a probability of `chance` (0 to 1), drawn from the [seed](Self::seed): the same seed hits the same
    /// occurrences.
    #[must_use]
    pub fn sometimes(mut self, chance: f64, phase: Phase, action: Action) -> Self {
        self = self.on(phase, action);
        self.last_chance(chance);
        self
    }

    /// Where the dice of [`Self::sometimes`] begin.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
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

    pub(super) fn rule(mut self, phase: Phase, skip: u64, times: u64, action: Action) -> Self {
        self.rules.push(Rule {
            phase,
            skip,
            times,
            chance: 1.0,
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

    /// Answers this to the `n`th recipient of every mail, counted from 1.
    #[must_use]
    pub fn nth_recipient(mut self, n: usize, reply: &str) -> Self {
        self.positions.push((n, reply.to_owned()));
        self
    }

    /// Takes so many mails of each connection, and answers this to MAIL from then on.
    #[must_use]
    pub fn mails_per_connection(mut self, most: usize, reply: &str) -> Self {
        self.session = Some((most, reply.to_owned()));
        self
    }

    /// Sends every reply byte by byte with this pause in between.
    #[must_use]
    pub fn drip(mut self, pause: Duration) -> Self {
        self.drip = Some(pause);
        self
    }

    pub(super) fn last_chance(&mut self, chance: f64) {
        if let Some(rule) = self.rules.last_mut() {
            rule.chance = chance;
        }
    }

    pub(crate) fn drip_pause(&self) -> Option<Duration> {
        self.drip
    }

    /// What to do now; counts the occurrence for every rule of the phase.
    pub(crate) fn decide(&self, phase: Phase) -> Option<&Action> {
        let mut decided = None;
        for (number, rule) in self
            .rules
            .iter()
            .enumerate()
            .filter(|(_, rule)| rule.phase == phase)
        {
            let nth = rule.seen.fetch_add(1, Ordering::Relaxed);
            let in_turn = nth >= rule.skip && nth - rule.skip < rule.times;
            let applies = in_turn && (rule.chance >= 1.0 || self.draw(number, nth) < rule.chance);
            if applies && decided.is_none() {
                decided = Some(&rule.action);
            }
        }
        decided
    }

    /// The refusal of MAIL on a connection that has had so many.
    pub(crate) fn session_ends(&self, mails: usize) -> Option<String> {
        let (most, reply) = self.session.as_ref()?;
        (mails >= *most).then(|| reply.clone())
    }

    pub(crate) fn delay_of(&self, phase: Phase) -> Option<Duration> {
        self.delays
            .iter()
            .find(|(at, _)| *at == phase)
            .map(|(_, delay)| *delay)
    }

    /// A number in 0..1 for the `nth` occurrence of a rule, always the same for a seed (splitmix64).
    fn draw(&self, rule: usize, nth: u64) -> f64 {
        let mut state = self.seed ^ (rule as u64).wrapping_mul(0xa076_1d64_78bd_642f);
        state = state.wrapping_add(nth.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((state ^ (state >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// The refusal of a recipient, the `position`th of its mail.
    pub(crate) fn refusal(&self, address: &str, position: usize) -> Option<String> {
        let by_position = self.positions.iter().find(|(n, _)| *n == position);
        by_position
            .map(|(_, reply)| reply.clone())
            .or_else(|| self.recipients.iter().find_map(|rule| rule(address)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(seed: u64) -> Vec<bool> {
        let script = Script::new()
            .seed(seed)
            .sometimes(0.25, Phase::Mail, Action::Close);
        (0..4000).map(|_| script.decide(Phase::Mail).is_some()).collect()
    }

    #[test]
    fn a_seed_hits_the_same_occurrences_about_as_often_as_told() {
        let count = hits(7).iter().filter(|hit| **hit).count();
        assert!((900..1100).contains(&count), "{count}");
        assert_eq!(hits(7), hits(7));
        assert_ne!(hits(7), hits(8));
    }
}
