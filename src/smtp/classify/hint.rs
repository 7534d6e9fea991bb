//! The wait a server asks for in words: `try again in 5 minutes`.

use std::time::Duration;

use crate::retry::MAX_HINT;

/// Words without which a number with a unit is no request to wait.
const CONTEXT: &[&str] = &[
    "again",
    "retry",
    "wait",
    "after",
    "later",
    "greylist",
    "come back",
    "delay",
];

/// Reads a delay from a reply's text, at most [`MAX_HINT`].
#[must_use]
pub fn delay_hint(text: &str) -> Option<Duration> {
    let text = text.to_ascii_lowercase();
    if !CONTEXT.iter().any(|word| text.contains(word)) {
        return None;
    }
    let mut tokens = tokens(&text).peekable();
    while let Some(token) = tokens.next() {
        let Ok(number) = token.parse::<u64>() else {
            continue;
        };
        if let Some(unit) = tokens.peek().and_then(|word| seconds_per(word)) {
            let wait = Duration::from_secs(number.saturating_mul(unit));
            return Some(wait.min(MAX_HINT)).filter(|wait| !wait.is_zero());
        }
    }
    None
}

/// Runs of digits and runs of letters: `300s` is a number and a unit.
fn tokens(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        rest = rest.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
        let first = rest.chars().next()?;
        let same = |c: char| c.is_ascii_alphanumeric() && c.is_ascii_digit() == first.is_ascii_digit();
        let end = rest.find(|c| !same(c)).unwrap_or(rest.len());
        let (token, after) = rest.split_at(end);
        rest = after;
        Some(token)
    })
}

fn seconds_per(word: &str) -> Option<u64> {
    Some(match word {
        "s" | "sec" | "secs" | "second" | "seconds" => 1,
        "m" | "min" | "mins" | "minute" | "minutes" => 60,
        "h" | "hr" | "hrs" | "hour" | "hours" => 3600,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_read_from_words() {
        for (text, seconds) in [
            ("Greylisted, try again in 5 minutes", Some(300)),
            ("please retry after 90 seconds.", Some(90)),
            ("Too many messages; wait 2 hours", Some(7200)),
            ("try again later (300s)", Some(300)),
            ("Greylisting in action, please come back in 00:04:12", None),
            ("retry in 1hr", Some(3600)),
            ("try again in 99999999999999999999 minutes", None),
            ("try again in 9999999999 hours", Some(86_400)),
            ("retry in 0 seconds", None),
            ("mailbox of 5 minutes.example is full", None),
            ("try again later", None),
            ("", None),
        ] {
            assert_eq!(delay_hint(text), seconds.map(Duration::from_secs), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_gives_a_delay_out_of_bounds(text in ".{0,200}") {
            if let Some(wait) = delay_hint(&format!("retry {text}")) {
                proptest::prop_assert!(wait > Duration::ZERO && wait <= MAX_HINT);
            }
        }
    }
}
