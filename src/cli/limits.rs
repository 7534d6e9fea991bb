//! The flags of rate limits, the same for tenants and accounts.

use std::time::Duration;

use serde_json::{Value, json};

use crate::directory::limits::{Limit, LimitChanges, Unit, period_text};

/// Rate limits; 0 removes one.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Rate limits (rolling; 0 removes one)")]
pub(super) struct LimitFlags {
    /// At most so many in any second.
    #[arg(long, value_name = "N")]
    per_second: Option<u32>,
    /// At most so many in any minute.
    #[arg(long, value_name = "N")]
    per_minute: Option<u32>,
    /// At most so many in any hour.
    #[arg(long, value_name = "N")]
    per_hour: Option<u32>,
    /// At most so many in any day.
    #[arg(long, value_name = "N")]
    per_day: Option<u32>,
    /// What the limits above count (messages, unless it was recipients before); alone: what all limits count.
    #[arg(long, value_name = "messages|recipients")]
    limit_unit: Option<Unit>,
    /// A limit for any period and unit, such as 60/3s or 10000/1d:recipients; may be repeated.
    #[arg(long, value_name = "N/PERIOD[:UNIT]")]
    limit: Vec<Limit>,
}

impl LimitFlags {
    pub(super) fn changes(self) -> LimitChanges {
        let flags = [
            (self.per_second, Duration::from_secs(1)),
            (self.per_minute, Duration::from_mins(1)),
            (self.per_hour, Duration::from_hours(1)),
            (self.per_day, Duration::from_hours(24)),
        ];
        LimitChanges {
            per_period: flags
                .into_iter()
                .filter_map(|(limit, per)| Some((limit?, per)))
                .collect(),
            unit: self.limit_unit,
            exact: self.limit,
        }
    }
}

/// `60/1m, 10000/1d recipients`, or `none`.
pub(super) fn shown(limits: &[Limit]) -> String {
    let one = |limit: &Limit| match limit.unit {
        Unit::Messages => format!("{}/{}", limit.limit, period_text(limit.per)),
        Unit::Recipients => format!("{}/{} recipients", limit.limit, period_text(limit.per)),
    };
    if limits.is_empty() {
        return "none".to_owned();
    }
    limits.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// For `--json`; `per` as [`Limit`] is written on the command line.
pub(super) fn json(limits: &[Limit]) -> Value {
    let one = |l: &Limit| json!({"limit": l.limit, "per": period_text(l.per), "unit": l.unit.as_str()});
    limits.iter().map(one).collect()
}
