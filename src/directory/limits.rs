//! Rate limits as they are written: on the command line, in the database, and as the worker gets them.
//!
//! An account or tenant has a list of them; at most [`MAX_LIMITS`]. Each counts messages or recipients over a rolling
//! period (how that is done is the ledger's part).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde_json::{Value, json};

/// Longest list of one account or tenant.
pub const MAX_LIMITS: usize = 8;
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_hours(31 * 24);

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Unit {
    /// One per mail, however many recipients.
    #[default]
    Messages,
    /// One per recipient.
    Recipients,
}

impl Unit {
    /// The name in flags and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Recipients => "recipients",
        }
    }
}

impl FromStr for Unit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "messages" => Ok(Self::Messages),
            "recipients" => Ok(Self::Recipients),
            other => Err(format!("`{other}` is not a unit; use messages or recipients")),
        }
    }
}

/// At most `limit` of `unit` in any interval of length `per`. Written `60/1m` or `10000/1d:recipients`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Limit {
    /// How many; in a change, 0 removes the limit.
    pub limit: u32,
    /// Length of the interval: whole seconds, 1 s to 31 days.
    pub per: Duration,
    /// What is counted.
    pub unit: Unit,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}/{}:{}",
            self.limit,
            period_text(self.per),
            self.unit.as_str()
        )
    }
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused =
            || format!("`{text}` is not a limit; write N/PERIOD or N/PERIOD:recipients, such as 60/1m");
        let (limit, rest) = text.split_once('/').ok_or_else(refused)?;
        let (period, unit) = rest.split_once(':').unwrap_or((rest, "messages"));
        let limit = Self {
            limit: limit.parse().map_err(|_| refused())?,
            per: parse_period(period)?,
            unit: unit.parse()?,
        };
        limit.checked()
    }
}

impl Limit {
    fn checked(self) -> Result<Self, String> {
        if !(SHORTEST..=LONGEST).contains(&self.per) || self.per.subsec_nanos() != 0 {
            return Err("the period of a limit must be whole seconds, from 1s to 31d".to_owned());
        }
        if self.limit > i32::MAX as u32 {
            return Err(format!("a limit is at most {}", i32::MAX));
        }
        Ok(self)
    }
}

/// Reads a length of time: a number followed by `s`, `m`, `h` or `d`. Only 0 needs no letter: who writes `--max-age 3` means
/// days, and seconds would make the first deferral final.
///
/// # Errors
/// With what is allowed.
pub fn parse_period(text: &str) -> Result<Duration, String> {
    let refused =
        || format!("`{text}` is not a length of time; write a number and s, m, h or d, such as 90s or 2d");
    let (digits, seconds) = match text.as_bytes().last() {
        Some(b's') => (&text[..text.len() - 1], 1),
        Some(b'm') => (&text[..text.len() - 1], 60),
        Some(b'h') => (&text[..text.len() - 1], 3_600),
        Some(b'd') => (&text[..text.len() - 1], 86_400),
        _ if text == "0" => (text, 1),
        _ => return Err(refused()),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(refused());
    }
    let count: u32 = digits.parse().map_err(|_| refused())?;
    Ok(Duration::from_secs(u64::from(count) * seconds))
}

/// The shortest form that [`parse_period`] reads back.
#[must_use]
pub fn period_text(period: Duration) -> String {
    let seconds = period.as_secs();
    for (length, letter) in [(86_400, 'd'), (3_600, 'h'), (60, 'm')] {
        if seconds >= length && seconds.is_multiple_of(length) {
            return format!("{}{letter}", seconds / length);
        }
    }
    format!("{seconds}s")
}

/// What a command wants changed about a list of limits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LimitChanges {
    /// Limits for a period, whatever was counted before: replaces all limits of that period; 0 removes them. Without
    /// `unit`, what the replaced one counted is kept.
    pub per_period: Vec<(u32, Duration)>,
    /// What the limits in `per_period` count; alone, what all limits count.
    pub unit: Option<Unit>,
    /// Replaces the limit of the same period and unit; 0 removes it.
    pub exact: Vec<Limit>,
}

impl LimitChanges {
    /// The list after the change, in order of period and unit.
    ///
    /// # Errors
    /// If a limit is out of range, or the list becomes too long.
    pub fn apply(&self, current: &[Limit]) -> Result<Vec<Limit>, String> {
        let mut list = current.to_vec();
        for &(limit, per) in &self.per_period {
            let kept = list.iter().find(|l| l.per == per).map(|l| l.unit);
            let unit = self.unit.or(kept).unwrap_or_default();
            list.retain(|l| l.per != per);
            list.push(Limit { limit, per, unit }.checked()?);
        }
        if let (true, Some(unit)) = (self.per_period.is_empty(), self.unit) {
            for limit in &mut list {
                limit.unit = unit;
            }
            // Two of one period have become one: the smaller holds for both.
            list.sort_by_key(|l| (l.per, l.limit));
            list.dedup_by_key(|l| l.per);
        }
        for exact in &self.exact {
            list.retain(|l| (l.per, l.unit) != (exact.per, exact.unit));
            list.push(exact.checked()?);
        }
        list.retain(|l| l.limit > 0);
        list.sort_by_key(|l| (l.per, l.unit.as_str()));
        if list.len() > MAX_LIMITS {
            return Err(format!(
                "at most {MAX_LIMITS} limits each; remove one with 0/PERIOD first"
            ));
        }
        Ok(list)
    }
}

/// The list as it is stored: `[{"limit": 60, "per": 60000000, "unit": "messages"}]`, `per` in microseconds.
#[must_use]
pub fn to_json(limits: &[Limit]) -> Value {
    let entry =
        |l: &Limit| json!({"limit": l.limit, "per": l.per.as_micros() as u64, "unit": l.unit.as_str()});
    limits.iter().map(entry).collect()
}

/// Reads what [`to_json`] wrote.
///
/// # Errors
/// Says what is wrong with the stored value.
pub fn from_json(value: &Value) -> Result<Vec<Limit>, String> {
    let refused = || "not a list of {limit, per, unit}".to_owned();
    let entry = |entry: &Value| {
        Some(Limit {
            limit: u32::try_from(entry.get("limit")?.as_u64()?).ok()?,
            per: Duration::from_micros(entry.get("per")?.as_u64()?),
            unit: entry.get("unit")?.as_str()?.parse().ok()?,
        })
    };
    let list = value.as_array().ok_or_else(refused)?;
    list.iter().map(|e| entry(e).ok_or_else(refused)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(texts: &[&str]) -> Vec<Limit> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn shown(limits: &[Limit]) -> Vec<String> {
        limits.iter().map(ToString::to_string).collect()
    }

    const MINUTE: Duration = Duration::from_mins(1);
    const DAY: Duration = Duration::from_hours(24);

    #[test]
    fn a_limit_is_a_number_a_period_and_a_unit() {
        for (text, canonical) in [
            ("60/3s", "60/3s:messages"),
            ("10000/1d:recipients", "10000/1d:recipients"),
            ("5/90s", "5/90s:messages"),
            ("5/120s:messages", "5/2m:messages"),
            ("0/24h", "0/1d:messages"),
        ] {
            assert_eq!(text.parse::<Limit>().unwrap().to_string(), canonical, "{text}");
        }
        for text in [
            "",
            "60",
            "60/",
            "/1m",
            "-1/1m",
            "60/0s",
            "60/0",
            "5/60",
            "60/32d",
            "60/1w",
            "60/1m:mails",
            "1.5/1m",
            "60/+1m",
        ] {
            assert!(text.parse::<Limit>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_length_of_time_has_a_unit_unless_it_is_zero() {
        assert_eq!(parse_period("0"), Ok(Duration::ZERO));
        assert_eq!(parse_period("3d"), Ok(3 * DAY));
        for text in ["3", "12", "00", "", "d"] {
            assert!(
                parse_period(text).unwrap_err().contains("such as 90s or 2d"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_flag_replaces_the_limits_of_its_period_and_zero_removes_them() {
        let current = list(&["30/1m", "10000/1d:recipients"]);
        let change = |limit, per, unit| LimitChanges {
            per_period: vec![(limit, per)],
            unit,
            exact: vec![],
        };
        let cases = [
            (
                change(50, MINUTE, None),
                vec!["50/1m:messages", "10000/1d:recipients"],
            ),
            (
                change(500, DAY, None),
                vec!["30/1m:messages", "500/1d:recipients"],
            ),
            (
                change(500, DAY, Some(Unit::Messages)),
                vec!["30/1m:messages", "500/1d:messages"],
            ),
            (change(0, MINUTE, None), vec!["10000/1d:recipients"]),
            (
                change(9, Duration::from_secs(1), None),
                vec!["9/1s:messages", "30/1m:messages", "10000/1d:recipients"],
            ),
            (
                LimitChanges::default(),
                vec!["30/1m:messages", "10000/1d:recipients"],
            ),
        ];
        for (changes, expected) in cases {
            assert_eq!(shown(&changes.apply(&current).unwrap()), expected, "{changes:?}");
        }
    }

    #[test]
    fn the_unit_alone_changes_what_all_limits_count() {
        let changes = LimitChanges {
            unit: Some(Unit::Recipients),
            ..LimitChanges::default()
        };
        let after = changes
            .apply(&list(&["30/1m", "10/1m:recipients", "9/1h"]))
            .unwrap();
        assert_eq!(shown(&after), ["10/1m:recipients", "9/1h:recipients"]);
    }

    #[test]
    fn exact_limits_live_beside_others_of_their_period() {
        let changes = LimitChanges {
            exact: list(&["200/1d:recipients", "0/1m"]),
            ..LimitChanges::default()
        };
        let after = changes.apply(&list(&["30/1m", "100/1d"])).unwrap();
        assert_eq!(shown(&after), ["100/1d:messages", "200/1d:recipients"]);
    }

    #[test]
    fn a_list_is_bounded() {
        let exact = (1..=9).map(|n| format!("1/{n}s").parse().unwrap()).collect();
        let changes = LimitChanges {
            exact,
            ..LimitChanges::default()
        };
        assert!(changes.apply(&[]).unwrap_err().contains("at most 8"));
        let changes = LimitChanges {
            per_period: vec![(u32::MAX, MINUTE)],
            ..LimitChanges::default()
        };
        assert!(changes.apply(&[]).is_err());
    }

    #[test]
    fn the_stored_form_is_the_one_the_limiter_reads() {
        let stored = to_json(&list(&["60/1m"]));
        assert_eq!(
            stored.to_string(),
            r#"[{"limit":60,"per":60000000,"unit":"messages"}]"#
        );
        assert!(from_json(&json!({})).is_err());
        assert!(from_json(&json!([{"limit": -1, "per": 1, "unit": "messages"}])).is_err());
    }

    proptest! {
        #[test]
        fn stored_limits_come_back(limit in 1..=i32::MAX as u32, seconds in 1_u64..=31 * 86_400, recipients: bool) {
            let unit = if recipients { Unit::Recipients } else { Unit::Messages };
            let one = Limit { limit, per: Duration::from_secs(seconds), unit };
            prop_assert_eq!(from_json(&to_json(&[one])).unwrap(), vec![one]);
            prop_assert_eq!(one.to_string().parse::<Limit>().unwrap(), one);
        }
    }
}
