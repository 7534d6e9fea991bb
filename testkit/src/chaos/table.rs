//! The result for people, and for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::audit::Audit;

/// Violations printed.
const VIOLATIONS: usize = 30;

/// The table.
#[must_use]
pub fn print(audit: &Audit) -> String {
    let date = date(audit);
    let mut out = format!(
        "\nFault campaign, seed {}, {date}: {}\n\n",
        audit.seed, audit.setting
    );
    let _ = writeln!(out, "{:<62}{:>5}{:>10}", "fault", "times", "together");
    for (name, (count, time)) in &audit.faults {
        let padding = 62_usize.saturating_sub(name.chars().count());
        let _ = writeln!(
            out,
            "{name}{:padding$}{count:>5}{:>8.1} s",
            "",
            time.as_secs_f64()
        );
    }
    let _ = writeln!(out, "\n{:<62}{:>5}", "faults injected", audit.injected());
    let mut row = |name: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(out, "{name:<60}{value:>7}");
    };
    row("jobs (confirmed to the producer)", &audit.jobs);
    row("  published, repeats among them", &audit.publishes);
    for (outcome, count) in audit.outcomes.iter().filter(|(outcome, _)| **outcome != "lost") {
        row(&format!("  {outcome}"), count);
    }
    row("lost", &audit.lost);
    row("mails taken by the SMTP servers", &audit.mails);
    row(
        "duplicates, each explained by a fault",
        &audit.duplicates.values().sum::<usize>(),
    );
    for (reason, count) in &audit.duplicates {
        row(&format!("  {reason}"), count);
    }
    row("duplicates without an explanation", &audit.unexplained);
    row("circuit breakers that opened", &audit.breakers);
    row("webhooks", &audit.webhooks);
    row("  repeats under the same event id", &audit.repeated_webhooks);
    row("most mails of the limited account in its window", &audit.limit.0);
    row("  allowed", &audit.limit.1);
    let (recovery, fault) = &audit.longest_recovery;
    row(
        "longest recovery, seconds",
        &format!("{:.1}", recovery.as_secs_f64()),
    );
    let _ = writeln!(out, "  after: {fault}");
    let _ = writeln!(
        out,
        "all over {:.1} s after the last heal",
        audit.quiet_after.as_secs_f64()
    );
    for violation in audit.violations.iter().take(VIOLATIONS) {
        let _ = writeln!(out, "VIOLATION {violation}");
    }
    if audit.violations.len() > VIOLATIONS {
        let _ = writeln!(out, "… {} violations in all", audit.violations.len());
    }
    for story in &audit.stories {
        let _ = writeln!(out, "\n{story}");
    }
    let verdict = if audit.is_good() {
        "Everything is accounted for."
    } else {
        "Something does not add up."
    };
    let _ = writeln!(out, "\n{verdict}");
    out
}

fn date(audit: &Audit) -> String {
    let date = jiff::Timestamp::try_from(audit.date).unwrap_or_default();
    date.to_string().split('T').next().unwrap_or_default().to_owned()
}

/// The same as JSON.
#[must_use]
pub fn json(audit: &Audit) -> Value {
    let faults: serde_json::Map<String, Value> = audit
        .faults
        .iter()
        .map(|(name, (count, time))| {
            (
                name.clone(),
                json!({"count": count, "seconds": time.as_secs_f64()}),
            )
        })
        .collect();
    json!({
        "seed": audit.seed,
        "date": date(audit),
        "setting": audit.setting,
        "faults_injected": audit.injected(),
        "faults": faults,
        "jobs": audit.jobs,
        "publishes": audit.publishes,
        "outcomes": audit.outcomes,
        "lost": audit.lost,
        "mails": audit.mails,
        "duplicates_explained": audit.duplicates,
        "duplicates_unexplained": audit.unexplained,
        "breakers_opened": audit.breakers,
        "webhooks": audit.webhooks,
        "webhooks_repeated": audit.repeated_webhooks,
        "limit": {"most": audit.limit.0, "allowed": audit.limit.1},
        "longest_recovery_seconds": audit.longest_recovery.0.as_secs_f64(),
        "longest_recovery_after": audit.longest_recovery.1,
        "quiet_after_seconds": audit.quiet_after.as_secs_f64(),
        "violations": audit.violations,
    })
}
