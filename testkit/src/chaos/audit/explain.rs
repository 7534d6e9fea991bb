//! When a mail may have gone out twice: docs/guarantees.md, "When a mail can go out twice".

use std::time::{Duration, Instant};

use super::{Evidence, Mail};
use crate::chaos::fault::{Kind, Pair, Trouble};
use crate::chaos::inject::Happened;
use crate::chaos::smtp_moods::FINAL_TIMEOUT;

/// From the final dot to the commit of the outcome, with all the load there is on a small machine.
const COMMIT: Duration = Duration::from_secs(3);
/// From the server's reply to the worker.
const REPLY: Duration = Duration::from_secs(1);

/// Why nobody may know that this mail was taken; none if its worker must.
pub(super) fn uncertain(evidence: &Evidence, mail: &Mail) -> Option<&'static str> {
    let taken = mail.received.at;
    match mail.received.answered {
        None => return Some("the SMTP server did not answer the final dot"),
        Some(answered) if answered.duration_since(taken) + REPLY > FINAL_TIMEOUT => {
            return Some("the SMTP server answered the final dot too late");
        }
        Some(_) => {}
    }
    let slot = mail.received.helo.split('.').next().unwrap_or_default();
    evidence.happened.iter().find_map(|happened| {
        let this_process = happened.process.as_ref() == Some(&mail.received.helo);
        let this_place = slot.strip_prefix("worker-") == Some(&(happened.target + 1).to_string());
        match happened.kind {
            Kind::WorkerKilled if this_process => {
                let open = commit_may_begin(evidence, slot, happened.start);
                (taken >= open && taken <= happened.start + REPLY).then_some("its worker was killed")
            }
            Kind::WorkerStopped if this_process => {
                let open = commit_may_begin(evidence, slot, happened.start);
                (taken >= open && taken <= happened.end + REPLY)
                    .then_some("its worker stood still for longer than its lease")
            }
            Kind::Net(
                Pair::WorkerPostgres,
                Trouble::Stall | Trouble::Cut | Trouble::Reset | Trouble::Delay,
            ) if this_place => overlaps(happened, taken, COMMIT)
                .then_some("its worker was cut off from Postgres for longer than its lease"),
            Kind::Net(Pair::WorkersSmtp, _) if happened.target == mail.server => {
                overlaps(happened, taken, REPLY).then_some("the connection to the SMTP server broke")
            }
            _ => None,
        }
    })
}

/// Mails taken after this may not have been recorded at `end`: longer ago if Postgres was away in between.
fn commit_may_begin(evidence: &Evidence, slot: &str, end: Instant) -> Instant {
    let open = end.checked_sub(COMMIT).unwrap_or(end);
    let away = evidence.happened.iter().filter(|happened| match happened.kind {
        Kind::PostgresKilled | Kind::PostgresDropped => true,
        Kind::Net(Pair::WorkerPostgres, _) => {
            slot.strip_prefix("worker-") == Some(&(happened.target + 1).to_string())
        }
        _ => false,
    });
    away.filter(|happened| happened.end + COMMIT >= open && happened.start <= end)
        .filter_map(|happened| happened.start.checked_sub(COMMIT))
        .fold(open, Instant::min)
}

fn overlaps(happened: &Happened, at: Instant, slack: Duration) -> bool {
    at + slack >= happened.start && at <= happened.end + slack
}
