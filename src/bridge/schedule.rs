//! When a webhook is tried again: ten attempts over three days, later if the receiver asks for it.

use std::time::Duration;

use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;

/// Waits before the second, third … tenth attempt, as in the example of Standard Webhooks 1.0.
pub const WAITS: [Duration; 9] = [
    Duration::from_secs(5),
    Duration::from_mins(5),
    Duration::from_mins(30),
    Duration::from_hours(2),
    Duration::from_hours(5),
    Duration::from_hours(10),
    Duration::from_hours(14),
    Duration::from_hours(20),
    Duration::from_hours(24),
];
/// Longest `Retry-After` we follow: a receiver may slow us down, not make us forget it.
pub const MAX_RETRY_AFTER: Duration = Duration::from_hours(24);

/// The wait before the next attempt after `attempts` have been made; `None` when that was the last.
/// `jitter` from 0 to 1 spreads it by 20 % either way; `scale` is 1 outside of tests.
#[must_use]
pub fn next_wait(attempts: u32, retry_after: Option<Duration>, scale: f64, jitter: f64) -> Option<Duration> {
    let index = usize::try_from(attempts.checked_sub(1)?).ok()?;
    let wait = WAITS.get(index)?.mul_f64(scale * (0.8 + 0.4 * jitter));
    Some(wait.max(retry_after.unwrap_or_default()))
}

/// Reads `Retry-After` (RFC 9110 §10.2.3): seconds or an HTTP date; at most [`MAX_RETRY_AFTER`].
#[must_use]
pub fn retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    let value = value.trim();
    let wait = match value.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        // More digits than fit is still a number of seconds.
        Err(_) if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) => MAX_RETRY_AFTER,
        Err(_) => {
            let at = DateTimeParser::new().parse_timestamp(value).ok()?;
            Duration::try_from(at.duration_since(now)).unwrap_or_default()
        }
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ten_attempts_are_spread_over_three_days() {
        let seconds =
            |attempts| next_wait(attempts, None, 1.0, 0.5).map(|wait| wait.as_secs_f64().round() as u64);
        let table = [5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400];
        for (wait, attempts) in table.into_iter().zip(1..) {
            assert_eq!(seconds(attempts), Some(wait), "after attempt {attempts}");
        }
        assert_eq!(seconds(10), None);
        assert_eq!(seconds(u32::MAX), None);
        assert!(WAITS.iter().sum::<Duration>() > Duration::from_hours(72));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_bounded() {
        let now: Timestamp = "2015-10-21T07:28:00Z".parse().unwrap();
        let cases = [
            ("0", Some(0)),
            (" 120 ", Some(120)),
            ("999999", Some(86_400)),
            ("99999999999999999999999", Some(86_400)),
            ("Wed, 21 Oct 2015 07:29:30 GMT", Some(90)),
            ("Wed, 21 Oct 2015 07:00:00 GMT", Some(0)),
            ("Fri, 23 Oct 2015 07:29:30 GMT", Some(86_400)),
            ("soon", None),
            ("-5", None),
            ("", None),
        ];
        for (value, seconds) in cases {
            assert_eq!(
                retry_after(value, now),
                seconds.map(Duration::from_secs),
                "{value}"
            );
        }
    }

    #[test]
    fn the_receiver_can_lengthen_a_wait_but_not_shorten_it() {
        let hour = Duration::from_hours(1);
        assert_eq!(next_wait(1, Some(hour), 1.0, 0.5), Some(hour));
        assert_eq!(next_wait(9, Some(hour), 1.0, 0.5), Some(Duration::from_hours(24)));
        assert_eq!(next_wait(10, Some(hour), 1.0, 0.5), None);
    }

    proptest! {
        #[test]
        fn jitter_stays_within_a_fifth(attempts in 1_u32..=9, jitter in 0.0..=1.0) {
            let wait = next_wait(attempts, None, 1.0, jitter).unwrap().as_secs_f64();
            let base = WAITS[attempts as usize - 1].as_secs_f64();
            prop_assert!((0.799 * base..=1.201 * base).contains(&wait));
        }

        #[test]
        fn no_header_makes_it_panic_or_wait_longer_than_a_day(value in ".{0,60}") {
            if let Some(wait) = retry_after(&value, Timestamp::UNIX_EPOCH) {
                prop_assert!(wait <= MAX_RETRY_AFTER);
            }
        }
    }
}
