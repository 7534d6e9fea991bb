//! One job: its reports, and its mails.

use std::collections::{BTreeMap, BTreeSet};

use super::explain::uncertain;
use super::{Audit, Evidence, Hook, Mail};
use crate::chaos::fault::Kind;
use crate::chaos::plan::{Expect, Job};
use crate::chaos::smtp_moods::Mood;

/// Notes what became of a job, and everything about it that must not be.
pub(super) fn check(audit: &mut Audit, evidence: &Evidence, job: &Job) {
    let hooks = evidence.hooks.get(&job.id).map(Vec::as_slice).unwrap_or_default();
    let mails = evidence.mails.get(&job.id).map(Vec::as_slice).unwrap_or_default();
    let mut wrong = Vec::new();
    let outcome = reports(job, hooks, &mut wrong);
    if outcome == "lost" {
        audit.lost += 1;
    }
    *audit.outcomes.entry(outcome).or_default() += 1;
    expected(evidence, job, outcome, mails, &mut wrong);
    agree(evidence, hooks, mails, &mut wrong);
    duplicates(audit, evidence, job, mails, &mut wrong);
    let about = wrong
        .into_iter()
        .map(|text| format!("{}/{}: {text}", job.tenant, job.id));
    audit.violations.extend(about);
}

/// Exactly one final report, under one event id, that the receiver took; or held, and told so.
fn reports(job: &Job, hooks: &[Hook], wrong: &mut Vec<String>) -> &'static str {
    let finals: BTreeSet<&str> = hooks
        .iter()
        .filter(|hook| hook.is_final())
        .map(|hook| hook.event.as_str())
        .collect();
    if finals.len() > 1 {
        wrong.push(format!("{} different final reports", finals.len()));
    }
    let mut by_event: BTreeMap<&str, bool> = BTreeMap::new();
    for hook in hooks {
        *by_event.entry(&hook.event).or_default() |= hook.taken;
    }
    for (event, _) in by_event.iter().filter(|(_, taken)| !**taken) {
        wrong.push(format!("its report {event} was never delivered"));
    }
    if let Some(last) = hooks.iter().find(|hook| hook.is_final()) {
        return match last.kind() {
            "mail.sent" if last.report["data"]["partial"] == true => "sent, not to all",
            "mail.sent" => "sent",
            "mail.failed" => "failed",
            "mail.expired" => "expired",
            "mail.cancelled" => "cancelled",
            "mail.rejected" => "rejected",
            other => {
                wrong.push(format!("a final report `{other}`"));
                "other"
            }
        };
    }
    if job.holds() && hooks.iter().any(|hook| hook.kind() == "mail.uncertain") {
        return "held as uncertain";
    }
    wrong.push("LOST: no final report".to_owned());
    "lost"
}

/// What became of it is what had to.
fn expected(evidence: &Evidence, job: &Job, outcome: &str, mails: &[Mail], wrong: &mut Vec<String>) {
    let good = match job.expect {
        Expect::Sent | Expect::Cancelled if outcome == "held as uncertain" => job.holds(),
        Expect::Sent if outcome == "failed" || outcome == "sent, not to all" => {
            refused_for_good(evidence, job) || job.good_recipients().len() < job_size(job)
        }
        Expect::Sent => outcome == "sent",
        Expect::Refused => outcome == "failed",
        Expect::Expired => outcome == "expired",
        Expect::Cancelled => outcome == "cancelled" || outcome.starts_with("sent"),
        Expect::Rejected => outcome == "rejected",
    };
    // The one who is not known is told by 550; a 5yz of a moody server may come for all of them.
    let good = good || (outcome == "failed" && refused_for_good(evidence, job));
    if !good && outcome != "lost" {
        wrong.push(format!("{outcome}, expected {:?}", job.expect));
    }
    if outcome == "sent" && mails.is_empty() {
        wrong.push("reported as sent, and no server has it".to_owned());
    }
}

fn job_size(job: &Job) -> usize {
    job.recipients().len()
}

/// Whether a server said 5yz about its good recipients.
fn refused_for_good(evidence: &Evidence, job: &Job) -> bool {
    let refuses = |happened: &crate::chaos::inject::Happened| happened.kind == Kind::Smtp(Mood::Refuses);
    evidence.happened.iter().any(refuses)
        && evidence.refused.iter().any(|refused| {
            refused.reply.starts_with("554") && refused.to.iter().any(|to| to.contains(&job.id))
        })
}

/// Who was accepted by the report is who got it; more may have it only where nobody could know.
fn agree(evidence: &Evidence, hooks: &[Hook], mails: &[Mail], wrong: &mut Vec<String>) {
    let Some(last) = hooks.iter().find(|hook| hook.is_final()) else {
        return;
    };
    let listed = last.report["data"]["recipients"].as_array();
    let accepted: BTreeSet<&str> = listed
        .into_iter()
        .flatten()
        .filter(|recipient| recipient["status"] == "accepted")
        .filter_map(|recipient| recipient["address"].as_str())
        .collect();
    let taken: BTreeSet<&str> = mails
        .iter()
        .flat_map(|mail| mail.received.to.iter().map(String::as_str))
        .collect();
    for address in accepted.difference(&taken) {
        wrong.push(format!("{address} reported as accepted, and no server has it"));
    }
    for address in taken.difference(&accepted) {
        let to = |mail: &&Mail| mail.received.to.iter().any(|to| to == address);
        if mails
            .iter()
            .filter(to)
            .any(|mail| uncertain(evidence, mail).is_none())
        {
            wrong.push(format!("{address} has it, and the report does not say so"));
        }
    }
}

/// A recipient gets it once; again only if nobody could know of the time before.
fn duplicates(audit: &mut Audit, evidence: &Evidence, job: &Job, mails: &[Mail], wrong: &mut Vec<String>) {
    let recipients: BTreeSet<&str> = mails
        .iter()
        .flat_map(|mail| mail.received.to.iter().map(String::as_str))
        .collect();
    for address in recipients {
        let to = |mail: &&Mail| mail.received.to.iter().any(|to| to == address);
        let all: Vec<&Mail> = mails.iter().filter(to).collect();
        if all.len() < 2 {
            continue;
        }
        let same = all.iter().map(|mail| mail.received.header("Message-ID"));
        if same.collect::<BTreeSet<_>>().len() > 1 && job.owner().is_some_and(|tenant| !tenant.fallback) {
            wrong.push(format!(
                "{address} has it {} times under different Message-IDs",
                all.len()
            ));
        }
        if job.holds() {
            wrong.push(format!(
                "{address} has it {} times, though it is to be held",
                all.len()
            ));
        }
        let reasons: Vec<&'static str> = all.iter().filter_map(|mail| uncertain(evidence, mail)).collect();
        // All but one must be such that nobody could know.
        for reason in reasons.iter().take(all.len() - 1) {
            *audit.duplicates.entry(reason).or_default() += 1;
        }
        let unexplained = (all.len() - 1).saturating_sub(reasons.len());
        if unexplained > 0 {
            audit.unexplained += unexplained;
            wrong.push(format!("{address} has it {} times, without a reason", all.len()));
        }
    }
}
