//! When to try again: a job exponentially with jitter, bounded by number and age; an account in trouble by its breaker.

use std::time::Duration;

/// The longest delay taken over from a server's reply.
pub const MAX_HINT: Duration = Duration::from_hours(24);

/// What the delay is multiplied by from one attempt to the next.
const FACTOR: u32 = 3;

/// The retry schedule of an account.
///
/// The defaults wait about 15 and 45 seconds, 2, 7, 20 and 61 minutes, 3 hours and then 4 hours each time, for three
/// days: a hiccup costs seconds, greylisting minutes, and a server that is down over a weekend loses nothing. With any
/// jitter the days end before the attempts do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in all, the first included. At least 1.
    pub max_attempts: u32,
    /// Time from the first attempt that failed for a passing reason, after which it is not tried again.
    pub max_age: Duration,
    /// Wait after the first attempt.
    pub base: Duration,
    /// Longest wait between attempts (a server's own hint may be longer).
    pub cap: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 30,
            max_age: Duration::from_hours(72),
            base: Duration::from_secs(15),
            cap: Duration::from_hours(4),
        }
    }
}

impl RetryPolicy {
    /// How long to wait after attempt number `attempt` (counted from 1) failed for a passing reason; `None` to give up.
    ///
    /// `age` is the time since the first such attempt, `hint` what the server asked for (never undercut, taken
    /// over up to [`MAX_HINT`]), `jitter` a random number from 0 to 1: waits of jobs that failed together spread over
    /// 85 % to 115 % of the schedule. A wait that would end after `max_age` is shortened to end there, so that the
    /// last attempt comes at the end of the time allowed; if the hint forbids that, it is over.
    #[must_use]
    pub fn next(&self, attempt: u32, age: Duration, hint: Option<Duration>, jitter: f64) -> Option<Duration> {
        if attempt >= self.max_attempts || age >= self.max_age {
            return None;
        }
        let jitter = if jitter.is_finite() {
            jitter.clamp(0.0, 1.0)
        } else {
            0.5
        };
        let scheduled = self.scheduled(attempt).mul_f64(0.85 + 0.3 * jitter);
        // A hint is a promise of the server's: jitter only ever adds to it.
        let earliest = hint.unwrap_or_default().min(MAX_HINT);
        let wait = scheduled.max(earliest.mul_f64(1.0 + 0.1 * jitter));
        let left = self.max_age.checked_sub(age)?;
        if wait <= left {
            Some(wait)
        } else {
            // Not worth an attempt right after the last one.
            (left >= earliest && left >= self.base.min(wait)).then_some(left)
        }
    }

    fn scheduled(&self, attempt: u32) -> Duration {
        let factor = FACTOR.saturating_pow(attempt.saturating_sub(1));
        self.base.saturating_mul(factor).min(self.cap)
    }
}

/// When the circuit breaker of an account opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breaker {
    /// Faults in a row that open it.
    pub faults: u32,
    /// The first cooldown; doubled each time a probe fails.
    pub cooldown: Duration,
    /// The longest one.
    pub cap: Duration,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            faults: 5,
            cooldown: Duration::from_mins(1),
            cap: Duration::from_mins(15),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn minutes(n: u64) -> Duration {
        Duration::from_mins(n)
    }

    #[test]
    fn the_default_schedule_triples_from_a_quarter_of_a_minute_to_four_hours() {
        let policy = RetryPolicy::default();
        let waits: Vec<u64> = (1..=7)
            .map(|n| policy.next(n, Duration::ZERO, None, 0.5).unwrap().as_secs())
            .collect();
        assert_eq!(waits, [15, 45, 135, 405, 1215, 3645, 10935]);
    }

    #[test]
    fn the_default_schedule_lasts_for_three_days_whatever_the_jitter() {
        let policy = RetryPolicy::default();
        for jitter in [0.0, 0.5, 1.0] {
            let mut age = Duration::ZERO;
            let mut attempt = 1;
            while let Some(wait) = policy.next(attempt, age, None, jitter) {
                age += wait;
                attempt += 1;
            }
            assert_eq!(age, policy.max_age, "{attempt} attempts with jitter {jitter}");
            assert!(attempt < policy.max_attempts, "{attempt} with jitter {jitter}");
        }
    }

    #[test]
    fn the_last_attempt_comes_at_the_end_of_the_time_allowed() {
        let policy = RetryPolicy::default();
        let age = minutes(72 * 60 - 30);
        assert_eq!(policy.next(9, age, None, 0.5), Some(minutes(30)));
        assert_eq!(policy.next(9, age, Some(minutes(40)), 0.5), None);
        assert_eq!(
            policy.next(9, Duration::from_secs(72 * 3600 - 5), None, 0.5),
            None
        );
        assert_eq!(policy.next(9, policy.max_age, None, 0.5), None);
    }

    #[test]
    fn the_last_attempt_allowed_is_the_last() {
        let policy = RetryPolicy {
            max_attempts: 3,
            ..RetryPolicy::default()
        };
        assert!(policy.next(2, Duration::ZERO, None, 0.5).is_some());
        assert_eq!(policy.next(3, Duration::ZERO, None, 0.5), None);
        assert_eq!(policy.next(u32::MAX, Duration::ZERO, None, 0.5), None);
    }

    proptest! {
        #[test]
        fn a_wait_is_never_shorter_than_the_hint_and_never_ends_after_the_age_allowed(
            attempt in 0u32..40,
            age in 0u64..400_000,
            hint in proptest::option::of(0u64..200_000),
            jitter in -1.0f64..2.0,
            base in 0u64..10_000,
            cap in 0u64..100_000,
        ) {
            let policy = RetryPolicy {
                base: Duration::from_secs(base),
                cap: Duration::from_secs(cap),
                ..RetryPolicy::default()
            };
            let age = Duration::from_secs(age);
            let hint = hint.map(Duration::from_secs);
            if let Some(wait) = policy.next(attempt, age, hint, jitter) {
                prop_assert!(wait >= hint.unwrap_or_default().min(MAX_HINT));
                prop_assert!(age + wait <= policy.max_age);
                prop_assert!(wait <= policy.cap.mul_f64(1.15).max(MAX_HINT.mul_f64(1.1)));
            }
        }

        #[test]
        fn a_later_attempt_never_waits_less(attempt in 1u32..18, jitter in 0.0f64..1.0) {
            let policy = RetryPolicy::default();
            let wait = |n| policy.next(n, Duration::ZERO, None, jitter);
            prop_assert!(wait(attempt) <= wait(attempt + 1));
        }
    }
}
