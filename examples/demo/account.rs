//! Adding up: what was published, what the SMTP servers took, what the webhooks said, what the ledger and the dead-letter
//! queue hold. Every difference is named.

mod figures;
mod limits;
mod links;
mod mail;
mod message;
mod seen;

use std::collections::{HashMap, HashSet};

use crate::plan::{Expect, Kind, NEWS_CONNECTIONS, NEWS_LIMITS, Outcome, Plan, SHARES};
use crate::run::Times;
use crate::setup::World;

use links::Link;
use seen::Seen;

/// One line of the table.
pub(crate) struct Row {
    pub(crate) kind: Kind,
    pub(crate) published: usize,
    /// SMTP transactions.
    pub(crate) mails: usize,
    /// Final reports.
    pub(crate) finals: usize,
    /// As expected, by outcome.
    pub(crate) outcomes: Vec<(Outcome, usize)>,
    pub(crate) good: bool,
}

/// The result.
#[derive(Default)]
pub(crate) struct Audit {
    pub(crate) rows: Vec<Row>,
    pub(crate) checks: Vec<(bool, String)>,
    /// Differences, each with the job it concerns.
    pub(crate) problems: Vec<String>,
    pub(crate) figures: Vec<(&'static str, String)>,
}

impl Audit {
    /// Looks at everything and compares.
    pub(crate) async fn of(world: &World, plan: &Plan, times: &Times) -> Result<Self, String> {
        let seen = Seen::gather(world).await?;
        let mut audit = Self::default();
        audit.messages(plan, &seen);
        audit.strays(plan, &seen);
        audit.finals(plan, &seen);
        audit.signatures(world, &seen);
        audit.dead_letters(plan, &seen);
        audit.limits(world, &seen);
        audit.urgent(&seen);
        audit.duplicates(plan, &seen);
        audit.links(world, plan, &seen).await;
        audit.figures = figures::figures(world, plan, &seen, times);
        Ok(audit)
    }

    /// Notes a check with the differences it found.
    pub(crate) fn check(&mut self, text: String, problems: Vec<String>) {
        self.checks.push((problems.is_empty(), text));
        self.problems.extend(problems);
    }

    pub(crate) fn is_good(&self) -> bool {
        self.problems.is_empty() && self.checks.iter().all(|(good, _)| *good)
    }

    /// Every message by itself, added up by kind.
    fn messages(&mut self, plan: &Plan, seen: &Seen) {
        for share in SHARES {
            let mut row = Row {
                kind: share.kind,
                published: 0,
                mails: 0,
                finals: 0,
                outcomes: Vec::new(),
                good: true,
            };
            for message in plan.messages.iter().filter(|message| message.kind == share.kind) {
                let problems = message::differences(message, seen);
                row.published += 1;
                if message.has_final() {
                    row.mails += message::mails(message, seen).len();
                    row.finals += message::finals(message, seen);
                }
                let outcome = message.outcome();
                match row.outcomes.iter_mut().find(|(known, _)| *known == outcome) {
                    Some((_, count)) => *count += 1,
                    None => row.outcomes.push((outcome, 1)),
                }
                row.good &= problems.is_empty();
                self.problems.extend(problems);
            }
            self.rows.push(row);
        }
        // Unreadable bodies have no id: their reports are counted together.
        let unreadable = plan.count(|message| message.id.is_none());
        let told = seen.finals.get(&None).map_or(0, Vec::len);
        if let Some(row) = self.rows.iter_mut().find(|row| row.kind == Kind::Malformed) {
            row.finals = told;
            row.good &= told == unreadable;
        }
        if told != unreadable {
            self.problems.push(format!(
                "unreadable bodies: {told} final reports, expected {unreadable}"
            ));
        }
    }

    /// Mails and reports of jobs that nobody published.
    fn strays(&mut self, plan: &Plan, seen: &Seen) {
        let known: HashSet<&str> = plan
            .messages
            .iter()
            .filter_map(|message| message.id.as_deref())
            .collect();
        let unknown =
            |what: &str, id: &str| (!known.contains(id)).then(|| format!("{what} of unknown job `{id}`"));
        let mails = seen.mails.keys().filter_map(|id| unknown("a mail", id));
        let reports = seen.hooks.iter().map(|hook| hook.text("job"));
        let reports = reports
            .filter(|id| !id.is_empty())
            .filter_map(|id| unknown("a report", id));
        let problems = mails.chain(reports).collect();
        self.check(
            "what was published, what the SMTP server took and what was reported agree, job by job"
                .to_owned(),
            problems,
        );
        let good = self.rows.iter().all(|row| row.good);
        if let Some((first, _)) = self.checks.last_mut() {
            *first &= good;
        }
    }

    fn finals(&mut self, plan: &Plan, seen: &Seen) {
        let jobs = plan.jobs_with_final();
        let exactly_one = |(tenant, id): &(&str, &str)| seen.finals_of(tenant, id).len() == 1;
        let unreadable = plan.finals() - jobs.len();
        // What is wrong was named job by job.
        let good = jobs.iter().filter(|job| exactly_one(job)).count();
        let repeats = seen.hooks.len() - seen.events;
        self.checks.push((
            good == jobs.len(),
            format!(
                "exactly one final report for each of {good} jobs (of {}) and {unreadable} unreadable bodies; \
                 {repeats} webhooks repeated",
                jobs.len()
            ),
        ));
    }

    fn signatures(&mut self, world: &World, seen: &Seen) {
        let wrong = |hook: &crate::run::Hook| {
            let (path, secret) = world.endpoint(hook.text("tenant"));
            let id = format!("{}/{}", hook.text("tenant"), hook.text("job"));
            if hook.request.path != path {
                return Some(format!(
                    "{id}: its report went to {}, expected {path}",
                    hook.request.path
                ));
            }
            let error = hook.request.verify(secret).err()?;
            Some(format!("{id}: signature of {}: {error}", hook.request.event_id()))
        };
        let problems: Vec<String> = seen.hooks.iter().filter_map(wrong).collect();
        let text = format!(
            "{} webhooks at the right endpoint with a good Standard Webhooks signature",
            seen.hooks.len() - problems.len()
        );
        self.check(text, problems);
    }

    fn dead_letters(&mut self, plan: &Plan, seen: &Seen) {
        let mut expected: HashMap<&str, usize> = HashMap::new();
        for reason in plan.messages.iter().filter_map(|message| message.dead_reason()) {
            *expected.entry(reason).or_default() += 1;
        }
        let reasons: HashSet<&str> = expected
            .keys()
            .copied()
            .chain(seen.dead.keys().map(String::as_str))
            .collect();
        let mut reasons: Vec<_> = reasons.into_iter().collect();
        reasons.sort_unstable();
        let (mut found, mut problems) = (Vec::new(), Vec::new());
        for reason in reasons {
            let want = expected.get(reason).copied().unwrap_or(0);
            let have = seen.dead.get(reason).copied().unwrap_or(0);
            found.push(format!("{have} {reason}"));
            if want != have {
                problems.push(format!("dead letters `{reason}`: {have}, expected {want}"));
            }
        }
        self.check(format!("dead letters: {}", found.join(", ")), problems);
    }

    fn limits(&mut self, world: &World, seen: &Seen) {
        let times = seen.times_of("acme-news");
        let (mut found, mut problems) = (Vec::new(), Vec::new());
        for (limit, seconds) in NEWS_LIMITS {
            let most = limits::most_within(&times, std::time::Duration::from_secs(seconds));
            found.push(format!("at most {most} in any {seconds} s (allowed {limit})"));
            if most > limit as usize {
                problems.push(format!(
                    "acme/news: {most} mails within {seconds} s, allowed {limit}"
                ));
            }
        }
        let open = world
            .smtp
            .counters()
            .max_open_by_user
            .get("acme-news")
            .copied()
            .unwrap_or(0);
        if open > u64::from(NEWS_CONNECTIONS) {
            problems.push(format!(
                "acme/news: {open} connections at once, allowed {NEWS_CONNECTIONS}"
            ));
        }
        let text = format!(
            "rate limits by the SMTP server's clock: {}; {open} connections at once (allowed {NEWS_CONNECTIONS})",
            found.join(", ")
        );
        self.check(text, problems);
    }

    /// The urgent mail of the limited account was published last of all.
    fn urgent(&mut self, seen: &Seen) {
        let id = Kind::Urgent.id(0);
        let news = seen.mails_of_login("acme-news");
        let overtaken = match news.iter().position(|mail| mail.id == id) {
            Some(position) => news.len() - 1 - position,
            None => 0,
        };
        let problems = if overtaken == 0 {
            vec![format!(
                "acme/{id}: expected to overtake waiting newsletters, was last"
            )]
        } else {
            Vec::new()
        };
        self.check(
            format!(
                "the immediate mail of the limited account, published last, overtook {overtaken} of its mails"
            ),
            problems,
        );
    }

    fn duplicates(&mut self, plan: &Plan, seen: &Seen) {
        let want = plan.count(|message| matches!(message.expect, Expect::Duplicate)) as u64;
        let problems = if seen.duplicates == want {
            Vec::new()
        } else {
            vec![format!(
                "duplicates counted by the workers: {}, expected {want}",
                seen.duplicates
            )]
        };
        let text = format!(
            "{} repeated jobs recognised, before and after their outcome",
            seen.duplicates
        );
        self.check(text, problems);
    }

    async fn links(&mut self, world: &World, plan: &Plan, seen: &Seen) {
        let links: Vec<Link> = plan
            .messages
            .iter()
            .flat_map(|message| message::links(message, seen))
            .collect();
        let (count, problems) = links::download(world, &links).await;
        let files: HashSet<&str> = links.iter().map(Link::path).collect();
        let text = format!(
            "{count} links in mails lead to {} stored files, byte for byte; without its signature a link is refused",
            files.len()
        );
        self.check(text, problems);
    }
}
