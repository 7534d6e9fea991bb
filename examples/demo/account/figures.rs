//! Speed, as information: nothing depends on it.

use std::time::{Duration, SystemTime};

use super::seen::Seen;
use crate::plan::{Message, Plan};
use crate::run::Times;
use crate::setup::World;

pub(super) fn figures(world: &World, plan: &Plan, seen: &Seen, times: &Times) -> Vec<(&'static str, String)> {
    let since = |at: SystemTime| at.duration_since(times.started).unwrap_or_default();
    let at = |message: &Message| {
        let (tenant, id) = message.job_with_final()?;
        Some(seen.finals_of(tenant, id).first()?.request.at)
    };
    let all: Vec<Duration> = plan.messages.iter().filter_map(&at).map(since).collect();
    let prompt = |message: &&Message| !message.kind.waits();
    let unhindered: Vec<Duration> = plan
        .messages
        .iter()
        .filter(prompt)
        .filter_map(&at)
        .map(since)
        .collect();
    let mut latencies: Vec<Duration> = plan
        .messages
        .iter()
        .zip(&times.confirmed)
        .filter(|(message, _)| prompt(message))
        .filter_map(|(message, confirmed)| {
            Some(at(message)?.duration_since((*confirmed)?).unwrap_or_default())
        })
        .collect();
    latencies.sort_unstable();
    let quantile = |part: f64| {
        let index = (latencies.len() as f64 * part) as usize;
        latencies
            .get(index.min(latencies.len().saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    };
    let mails: usize = seen.mails.values().map(Vec::len).sum();
    let connections = world.smtp.counters().connections + world.own.counters().connections;
    vec![
        (
            "publishing",
            rate(plan.count(|message| !message.after_original), times.publishing),
        ),
        (
            "jobs that need not wait, to the last webhook",
            rate(unhindered.len(), longest(&unhindered)),
        ),
        ("all jobs, to the last webhook", rate(all.len(), longest(&all))),
        (
            "from publish to webhook (median, 99 %)",
            format!(
                "{:.2} s, {:.2} s",
                quantile(0.5).as_secs_f64(),
                quantile(0.99).as_secs_f64()
            ),
        ),
        (
            "both workers",
            format!(
                "{:.1} ms CPU per mail, {:.0} MB together, {connections} SMTP connections for {mails} mails",
                seen.cpu * 1000.0 / mails.max(1) as f64,
                seen.memory / 1e6,
            ),
        ),
    ]
}

fn longest(durations: &[Duration]) -> Duration {
    durations.iter().max().copied().unwrap_or_default()
}

fn rate(count: usize, took: Duration) -> String {
    let seconds = took.as_secs_f64();
    format!(
        "{count} in {seconds:.1} s, {:.0}/s",
        count as f64 / seconds.max(0.001)
    )
}
