//! Figures: limits and recovery.

use std::time::{Duration, Instant};

use super::Evidence;
use crate::chaos::fault::{Kind, Pair};
use crate::chaos::inject::Happened;

/// The largest number of mails within any interval of this length, wherever it begins. `times` is sorted.
pub(super) fn most_within(times: &[Instant], period: Duration) -> usize {
    let (mut first, mut most) = (0, 0);
    for (last, time) in times.iter().enumerate() {
        while times[first] + period <= *time {
            first += 1;
        }
        most = most.max(last + 1 - first);
    }
    most
}

/// From the end of a fault until what it hit worked again: a worker or an SMTP server when it had its next mail, a bridge or
/// the receiver at the next webhook, a server at both. Faults that ended inside another one of the same part do not count.
pub(super) fn longest_recovery(evidence: &Evidence) -> (Duration, String) {
    let mut mails: Vec<(Instant, usize, &str)> = evidence
        .mails
        .values()
        .flatten()
        .map(|mail| (mail.received.at, mail.server, mail.received.helo.as_str()))
        .collect();
    mails.sort();
    let mut hooks = evidence.hook_times.clone();
    hooks.sort();
    let mut longest = (Duration::ZERO, "none".to_owned());
    for happened in &evidence.happened {
        let next_mail = |fits: &dyn Fn(usize, &str) -> bool| {
            let from = mails.partition_point(|(at, _, _)| *at < happened.end);
            mails[from..]
                .iter()
                .find(|(_, server, helo)| fits(*server, helo))
                .map(|(at, _, _)| *at)
        };
        let next_hook = || hooks.get(hooks.partition_point(|at| *at < happened.end)).copied();
        let again = match part(happened) {
            _ if evidence.happened.iter().any(|other| hides(other, happened)) => None,
            Part::Worker(number) => {
                next_mail(&|_, helo| helo.starts_with(&format!("worker-{}.", number + 1)))
            }
            Part::Mail(number) => next_mail(&|server, _| server == number),
            Part::Bridge => next_hook(),
            Part::Server => next_mail(&|_, _| true)
                .zip(next_hook())
                .map(|(mail, hook)| mail.max(hook)),
            Part::Store => None,
        };
        if let Some(again) = again {
            let took = again.saturating_duration_since(happened.end);
            if took > longest.0 {
                longest = (took, happened.kind.name());
            }
        }
    }
    longest
}

#[derive(PartialEq, Eq)]
enum Part {
    Worker(usize),
    Bridge,
    Mail(usize),
    Server,
    Store,
}

fn part(happened: &Happened) -> Part {
    match happened.kind {
        Kind::WorkerKilled
        | Kind::WorkerStopped
        | Kind::WorkerRolled
        | Kind::Net(Pair::WorkerRabbit | Pair::WorkerPostgres, _) => Part::Worker(happened.target),
        Kind::BridgeKilled
        | Kind::BridgeStopped
        | Kind::BridgeRolled
        | Kind::WebhookFails
        | Kind::WebhookHangs
        | Kind::Net(Pair::BridgeRabbit | Pair::BridgePostgres | Pair::BridgesWebhook, _) => Part::Bridge,
        Kind::Smtp(_) | Kind::Net(Pair::WorkersSmtp, _) => Part::Mail(happened.target),
        Kind::StoreFails | Kind::Net(Pair::WorkersStore, _) => Part::Store,
        Kind::RabbitStopped
        | Kind::RabbitKilled
        | Kind::RabbitDropped
        | Kind::PostgresKilled
        | Kind::PostgresDropped => Part::Server,
    }
}

/// Whether the other fault goes on when this one ends, and hits the same part, or a server of all.
fn hides(other: &Happened, this: &Happened) -> bool {
    let goes_on = other.start <= this.end && other.end > this.end;
    goes_on && (part(other) == part(this) || part(other) == Part::Server)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_begin_anywhere() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let times = [at(0), at(900), at(1000), at(1100), at(1899), at(1900)];
        assert_eq!(most_within(&times, Duration::from_secs(1)), 4);
        assert_eq!(most_within(&[], Duration::from_secs(1)), 0);
    }
}
