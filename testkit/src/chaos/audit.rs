//! Accounts for every job at both ends: what was published, what the SMTP servers took, what the webhooks said, what the
//! ledger and the queues still hold.

mod accounts;
mod evidence;
mod explain;
mod figures;
mod jobs;

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use super::Settings;
use super::plan::{Expect, TENANTS};

pub use evidence::{Evidence, Hook, Mail};

/// The result.
#[derive(Debug)]
pub struct Audit {
    /// Of the dice.
    pub seed: u64,
    /// When it ended.
    pub date: SystemTime,
    /// How it was set up, in a sentence.
    pub setting: String,
    /// Faults by kind: how many, and for how long together.
    pub faults: BTreeMap<String, (usize, Duration)>,
    /// Jobs by what became of them.
    pub outcomes: BTreeMap<&'static str, usize>,
    /// Jobs published, and publishes (repeats among them).
    pub jobs: usize,
    /// Messages published, repeats among them.
    pub publishes: usize,
    /// Jobs of which nobody heard the end.
    pub lost: usize,
    /// Mails the SMTP servers took.
    pub mails: usize,
    /// Mails they took again for a recipient that had it, with the reason why that may be.
    pub duplicates: BTreeMap<&'static str, usize>,
    /// Those without such a reason.
    pub unexplained: usize,
    /// Circuit breakers that opened, as the webhooks told.
    pub breakers: usize,
    /// Webhooks, and how many of them were repeats under the same event id.
    pub webhooks: usize,
    /// Webhooks that repeated an event.
    pub repeated_webhooks: usize,
    /// Most mails of the limited account in any window, and what is allowed.
    pub limit: (usize, usize),
    /// The longest time from the end of a fault until what it hit worked again, and which fault.
    pub longest_recovery: (Duration, String),
    /// From the last heal until all was over.
    pub quiet_after: Duration,
    /// What must not be.
    pub violations: Vec<String>,
    /// The stories of the first offending jobs.
    pub stories: Vec<String>,
}

/// As many stories are told.
const STORIES: usize = 5;

impl Audit {
    /// Compares.
    #[must_use]
    pub fn of(settings: &Settings, evidence: &Evidence) -> Self {
        let mut audit = Self::new(settings, evidence);
        for job in &evidence.plan.jobs {
            let before = audit.violations.len();
            jobs::check(&mut audit, evidence, job);
            if audit.violations.len() > before && audit.stories.len() < STORIES {
                audit.stories.push(super::story::of(evidence, job));
            }
        }
        audit.strangers(evidence);
        audit.accounts(evidence);
        audit.limit(settings, evidence);
        audit.queues(evidence);
        for happened in &evidence.happened {
            audit.violations.extend(happened.problem.clone());
        }
        audit
    }

    fn new(settings: &Settings, evidence: &Evidence) -> Self {
        let mut faults: BTreeMap<String, (usize, Duration)> = BTreeMap::new();
        for happened in &evidence.happened {
            let entry = faults.entry(happened.kind.name()).or_default();
            entry.0 += 1;
            entry.1 += happened.end.duration_since(happened.start);
        }
        Self {
            seed: settings.seed,
            date: SystemTime::now(),
            setting: format!(
                "{} workers, {} bridges, lease {} s, faults spread over {} s",
                settings.workers,
                settings.bridges,
                settings.lease.as_secs(),
                settings.span.as_secs()
            ),
            faults,
            outcomes: BTreeMap::new(),
            jobs: evidence.plan.jobs.len(),
            publishes: evidence.published.iter().map(|published| published.times).sum(),
            lost: 0,
            mails: evidence.mails.values().map(Vec::len).sum(),
            duplicates: BTreeMap::new(),
            unexplained: 0,
            breakers: 0,
            webhooks: evidence.webhooks,
            repeated_webhooks: evidence.repeated,
            limit: (0, evidence.plan.limit),
            longest_recovery: figures::longest_recovery(evidence),
            quiet_after: Duration::ZERO,
            violations: Vec::new(),
            stories: Vec::new(),
        }
    }

    /// Whether everything adds up.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.violations.is_empty()
    }

    /// Faults injected.
    #[must_use]
    pub fn injected(&self) -> usize {
        self.faults.values().map(|(count, _)| count).sum()
    }

    /// Mails and reports of jobs that nobody published.
    fn strangers(&mut self, evidence: &Evidence) {
        let known: std::collections::HashSet<&str> =
            evidence.plan.jobs.iter().map(|job| job.id.as_str()).collect();
        for id in evidence.mails.keys().chain(evidence.hooks.keys()) {
            if !known.contains(id.as_str()) {
                self.violations
                    .push(format!("a mail or report of an unknown job `{id}`"));
            }
        }
    }

    /// By the clock of the SMTP server, which sees MAIL FROM.
    fn limit(&mut self, settings: &Settings, evidence: &Evidence) {
        for tenant in TENANTS.iter().filter(|tenant| tenant.limited) {
            let mails = evidence.mails.values().flatten();
            let mut times: Vec<Instant> = mails
                .filter(|mail| mail.received.user.as_deref() == Some(tenant.name))
                .map(|mail| mail.received.mail_at)
                .collect();
            times.sort();
            self.limit.0 = figures::most_within(&times, settings.window);
            if self.limit.0 > self.limit.1 {
                self.violations.push(format!(
                    "{}: {} mails within {:?}, allowed {}",
                    tenant.name, self.limit.0, settings.window, self.limit.1
                ));
            }
        }
    }

    /// Nothing is left behind, and the dead letters are those expected.
    fn queues(&mut self, evidence: &Evidence) {
        for (queue, count) in &evidence.queues {
            if *count > 0 {
                self.violations.push(format!("{count} messages left in {queue}"));
            }
        }
        let rejected: std::collections::BTreeSet<&str> = evidence
            .plan
            .jobs
            .iter()
            .filter(|job| job.expect == Expect::Rejected)
            .map(|job| job.id.as_str())
            .collect();
        for letter in &evidence.dead {
            let job = letter["id"].as_str().unwrap_or_default();
            if !rejected.contains(job) {
                self.violations
                    .push(format!("an unexpected dead letter: {letter}"));
            }
        }
        let dead: std::collections::BTreeSet<&str> = evidence
            .dead
            .iter()
            .filter_map(|letter| letter["id"].as_str())
            .collect();
        for job in rejected.difference(&dead) {
            self.violations
                .push(format!("{job}: no dead letter, expected one"));
        }
    }
}
