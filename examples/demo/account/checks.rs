//! What must hold over all jobs together. Each check gives its line for the screen and the differences it found.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use super::links::{Link, download};
use super::message;
use super::seen::Seen;
use crate::hook::Hook;
use crate::plan::{Expect, Kind, Message, NEWS_CONNECTIONS, NEWS_LIMITS, Plan};
use crate::run::Times;
use crate::setup::World;

type Check = (String, Vec<String>);

/// The sides tell of no other jobs than those published; what they tell of those is compared by
/// [`message::differences`].
pub(super) fn all_agree(plan: &Plan, seen: &Seen) -> Check {
    let ids = plan.messages.iter().filter_map(|message| message.id.as_deref());
    let known: HashSet<&str> = ids.collect();
    let unknown =
        |what: &str, id: &str| (!known.contains(id)).then(|| format!("{what} of an unknown job `{id}`"));
    let mails = seen.mails.keys().filter_map(|id| unknown("a mail", id));
    let reported = seen.hooks.iter().map(|hook| hook.text("job"));
    let reports = reported
        .filter(|id| !id.is_empty())
        .filter_map(|id| unknown("a report", id));
    let problems = mails.chain(reports).collect();
    let text = "what was published, what the SMTP servers took, what was reported and what the ledger says agree, \
                job by job";
    (text.to_owned(), problems)
}

/// Which jobs these are is told by [`message::differences`].
pub(super) fn one_final_report_each(plan: &Plan, seen: &Seen) -> Check {
    let jobs = plan.jobs_with_final();
    let good = jobs
        .iter()
        .filter(|(tenant, id)| seen.finals_of(tenant, id).len() == 1)
        .count();
    let repeated = seen.hooks.len() - seen.events.len();
    let text = format!("exactly one final report for each job ({good}); {repeated} webhooks came twice");
    let missing = jobs.len() - good;
    let problems =
        (missing > 0).then(|| format!("{missing} jobs without exactly one final report, see there"));
    (text, problems.into_iter().collect())
}

pub(super) fn signatures(world: &World, seen: &Seen) -> Check {
    let wrong = |hook: &Hook| {
        let (path, secret) = world.endpoint(hook.text("tenant"));
        let job = format!("{}/{}", hook.text("tenant"), hook.text("job"));
        if hook.request.path != path {
            return Some(format!(
                "{job}: its report went to {}, expected {path}",
                hook.request.path
            ));
        }
        let error = hook.request.verify(secret).err()?;
        Some(format!(
            "{job}: signature of {}: {error}",
            hook.request.event_id()
        ))
    };
    let problems: Vec<String> = seen.hooks.iter().filter_map(wrong).collect();
    let good = seen.hooks.len() - problems.len();
    let text = format!("{good} webhooks at the right endpoint with a good Standard Webhooks signature");
    (text, problems)
}

pub(super) fn dead_letters(plan: &Plan, seen: &Seen) -> Check {
    let mut expected: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in plan.messages.iter().filter_map(Message::dead_reason) {
        *expected.entry(reason).or_default() += 1;
    }
    let found = seen.dead.keys().map(String::as_str);
    let reasons: BTreeSet<&str> = expected.keys().copied().chain(found).collect();
    let (mut counts, mut problems) = (Vec::new(), Vec::new());
    for reason in reasons {
        let want = expected.get(reason).copied().unwrap_or(0);
        let have = seen.dead.get(reason).copied().unwrap_or(0);
        counts.push(format!("{have} {reason}"));
        if want != have {
            problems.push(format!("{have} dead letters `{reason}`, expected {want}"));
        }
    }
    (format!("dead letters: {}", counts.join(", ")), problems)
}

pub(super) fn rate_limits(seen: &Seen) -> Check {
    let mails = seen.mails_of_login("acme-news");
    let times: Vec<Instant> = mails.iter().map(|mail| mail.received.at).collect();
    let (mut counts, mut problems) = (Vec::new(), Vec::new());
    for (limit, seconds) in NEWS_LIMITS {
        let most = most_within(&times, Duration::from_secs(seconds));
        counts.push(format!("{most} in any {seconds} s (allowed {limit})"));
        if most > limit as usize {
            problems.push(format!(
                "acme/news: {most} mails within {seconds} s, allowed {limit}"
            ));
        }
    }
    let text = format!(
        "limits of acme/news by the SMTP server's clock: at most {}",
        counts.join(" and ")
    );
    (text, problems)
}

/// The largest number of mails within any interval of this length, wherever it begins. `times` is sorted.
fn most_within(times: &[Instant], period: Duration) -> usize {
    let mut first = 0;
    let mut most = 0;
    for (last, time) in times.iter().enumerate() {
        while times[first] + period <= *time {
            first += 1;
        }
        most = most.max(last + 1 - first);
    }
    most
}

pub(super) fn connections(world: &World) -> Check {
    let counters = world.smtp.counters();
    let open = counters.max_open_by_user.get("acme-news").copied().unwrap_or(0);
    let text = format!(
        "connections of acme/news over both workers: at most {open} at once (allowed {NEWS_CONNECTIONS})"
    );
    let problem = (open > u64::from(NEWS_CONNECTIONS)).then(|| text.clone());
    (text, problem.into_iter().collect())
}

/// It was published last of all: it must leave before those that still wait then.
pub(super) fn urgent_mail(plan: &Plan, seen: &Seen, times: &Times) -> Check {
    /// As many may have been on their way already.
    const ON_THEIR_WAY: usize = 10;
    let id = Kind::Urgent.id(0);
    let mails = seen.mails_of_login("acme-news");
    let overtaken = mails
        .iter()
        .position(|mail| mail.id == id)
        .map_or(0, |position| mails.len() - 1 - position);
    let confirmed = plan.messages.iter().zip(&times.confirmed);
    let published = confirmed
        .filter(|(message, _)| message.kind == Kind::Urgent)
        .find_map(|(_, confirmed)| *confirmed);
    let waiting = mails
        .iter()
        .filter(|mail| published.is_none_or(|published| mail.received.time > published))
        .count();
    let text = format!("acme/news's immediate mail, published last, overtook {overtaken} waiting ones");
    let problem = (overtaken == 0 && waiting > ON_THEIR_WAY)
        .then(|| format!("acme/{id}: came last, expected before {waiting} waiting mails of lower levels"));
    (text, problem.into_iter().collect())
}

pub(super) fn repeats(plan: &Plan, seen: &Seen) -> Check {
    let want = plan.count(|message| matches!(message.expect, Expect::Duplicate)) as u64;
    let have = seen.repeats;
    let text = format!("{have} repeated jobs recognised, before and after their outcome");
    let problem = (have != want).then(|| format!("{have} repeated jobs recognised, expected {want}"));
    (text, problem.into_iter().collect())
}

pub(super) async fn links(world: &World, plan: &Plan, seen: &Seen) -> Check {
    let of = |message| message::links(message, seen);
    let links: Vec<Link> = plan.messages.iter().flat_map(of).collect();
    let (good, problems) = download(world, &links).await;
    let files: HashSet<&str> = links.iter().map(Link::path).collect();
    let text = format!(
        "{good} links in mails lead to {} stored files, byte for byte; without its signature a link is refused",
        files.len()
    );
    (text, problems)
}
