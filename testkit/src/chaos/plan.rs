//! The jobs of a campaign, drawn from its seed.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::{SignedDuration, Timestamp};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use super::Settings;

/// A tenant of the campaign, and what is particular about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "one switch per setting of a tenant")]
pub struct Tenant {
    /// Its id.
    pub name: &'static str,
    /// Which SMTP server its account is at.
    pub server: usize,
    /// `on_uncertain` is `hold`.
    pub hold: bool,
    /// The account has a rolling limit.
    pub limited: bool,
    /// The platform may send for it.
    pub fallback: bool,
    /// Large attachments become links.
    pub links: bool,
    /// Part of the jobs, in percent.
    share: u32,
}

const fn tenant(name: &'static str, server: usize, share: u32) -> Tenant {
    Tenant {
        name,
        server,
        share,
        hold: false,
        limited: false,
        fallback: false,
        links: false,
    }
}

/// SMTP servers of the campaign.
pub const SERVERS: usize = 3;

/// All tenants.
pub const TENANTS: [Tenant; 5] = [
    tenant("acme", 0, 40),
    Tenant {
        limited: true,
        ..tenant("globex", 1, 20)
    },
    Tenant {
        hold: true,
        ..tenant("initech", 0, 20)
    },
    Tenant {
        fallback: true,
        ..tenant("hooli", 2, 10)
    },
    Tenant {
        links: true,
        ..tenant("umbrella", 2, 10)
    },
];

/// Attachments above this many bytes become links, where the tenant says so.
pub const LARGE: usize = 20_000;

/// What must become of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Sent, to those recipients that exist.
    Sent,
    /// Nobody of its recipients exists.
    Refused,
    /// It came too late.
    Expired,
    /// Cancelled while it waits for its time.
    Cancelled,
    /// No valid job, or for nobody.
    Rejected,
}

/// What is different about a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Many,
    Later,
    Unknown,
    Partly,
    Attachment,
    Large,
    Scheduled,
    Expired,
    Cancelled,
    NoTenant,
}

const KINDS: [(Kind, u32); 11] = [
    (Kind::Plain, 61),
    (Kind::Many, 10),
    (Kind::Later, 6),
    (Kind::Unknown, 2),
    (Kind::Partly, 3),
    (Kind::Attachment, 6),
    (Kind::Large, 5),
    (Kind::Scheduled, 4),
    (Kind::Expired, 1),
    (Kind::Cancelled, 1),
    (Kind::NoTenant, 1),
];

/// A job to be published.
#[derive(Debug, Clone)]
pub struct Job {
    /// Unique over all tenants.
    pub id: String,
    /// Whose; an unknown one for jobs to be rejected.
    pub tenant: &'static str,
    /// `immediate`, `high`, `medium` or `low`.
    pub level: &'static str,
    /// When it is published, from the beginning.
    pub at: Duration,
    /// It is published once more, so much later.
    pub again: Option<Duration>,
    /// What must become of it.
    pub expect: Expect,
    kind: Kind,
}

impl Job {
    /// The tenant, if there is one.
    #[must_use]
    pub fn owner(&self) -> Option<&'static Tenant> {
        TENANTS.iter().find(|tenant| tenant.name == self.tenant)
    }

    /// Whether it must never be sent twice.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.owner().is_some_and(|tenant| tenant.hold)
    }

    /// Recipients that the servers know.
    #[must_use]
    pub fn good_recipients(&self) -> Vec<String> {
        let names = self.recipients().into_iter();
        names.filter(|name| !name.starts_with("nobody-")).collect()
    }

    /// All recipients.
    #[must_use]
    pub fn recipients(&self) -> Vec<String> {
        let who: &[&str] = match self.kind {
            Kind::Many => &["ann", "bob", "cy"],
            Kind::Later => &["later", "ann"],
            Kind::Unknown => &["nobody"],
            Kind::Partly => &["ann", "nobody"],
            _ => &["ann"],
        };
        who.iter()
            .map(|name| format!("{name}-{}@example.org", self.id))
            .collect()
    }

    /// The body, the same at every call with the same `start`.
    #[must_use]
    pub fn body(&self, start: Timestamp) -> Vec<u8> {
        let after = |seconds: i64| (start + SignedDuration::from_secs(seconds)).to_string();
        let at = self.at.as_secs() as i64;
        let mut job = json!({
            "id": self.id,
            "tenant": self.tenant,
            "to": self.recipients(),
            "subject": format!("Mail {}", self.id),
            "text": "Hello,\n\n.this is it\n",
        });
        let mut set = |name: &str, value: Value| {
            job[name] = value;
        };
        match self.kind {
            Kind::Attachment => set("attachments", self.attachment(LARGE / 4)),
            Kind::Large => set("attachments", self.attachment(LARGE * 3 / 2)),
            Kind::Scheduled => set("send_at", after(at + 3).into()),
            // Long enough to be cancelled before, soon enough to end well if that fails.
            Kind::Cancelled => set("send_at", after(at + 20).into()),
            Kind::Expired => set("expires_at", after(-60).into()),
            _ => {}
        }
        job.to_string().into_bytes()
    }

    fn attachment(&self, bytes: usize) -> Value {
        let mut dice = StdRng::seed_from_u64(self.at.as_nanos() as u64);
        let mut content = vec![0_u8; bytes];
        dice.fill(&mut content[..]);
        json!([{"filename": "file.bin", "base64": STANDARD.encode(content)}])
    }
}

/// All jobs, by the time at which they are published.
#[derive(Debug)]
pub struct Plan {
    /// The jobs.
    pub jobs: Vec<Job>,
    /// How many jobs the limited account may send within the window.
    pub limit: usize,
}

impl Plan {
    /// Draws them.
    #[must_use]
    pub fn draw(settings: &Settings) -> Self {
        let mut dice = StdRng::seed_from_u64(settings.seed);
        let span = settings.span.as_secs_f64();
        let mut times: Vec<f64> = (0..settings.jobs).map(|_| dice.random_range(0.0..span)).collect();
        times.sort_by(f64::total_cmp);
        let jobs = times
            .into_iter()
            .enumerate()
            .map(|(number, at)| draw_job(number, at, &mut dice))
            .collect();
        Self {
            jobs,
            limit: limit(settings),
        }
    }
}

/// What the limited account may send within its window: a little less than what comes, so that the limit is felt, and what
/// waits is gone soon after the end.
#[must_use]
pub fn limit(settings: &Settings) -> usize {
    let share = TENANTS
        .iter()
        .find(|tenant| tenant.limited)
        .map_or(0, |tenant| tenant.share);
    let per_second = settings.jobs as f64 * f64::from(share) / 100.0 / settings.span.as_secs_f64();
    (per_second * settings.window.as_secs_f64() * 0.95)
        .ceil()
        .max(5.0) as usize
}

fn draw_job(number: usize, at: f64, dice: &mut StdRng) -> Job {
    let owner = weighted(&TENANTS.map(|tenant| (tenant, tenant.share)), dice);
    let kind = weighted(&KINDS, dice);
    let level = weighted(
        &[("immediate", 5), ("high", 25), ("medium", 45), ("low", 25)],
        dice,
    );
    let again = dice
        .random_bool(0.03)
        .then(|| Duration::from_secs_f64(dice.random_range(0.0..10.0)));
    Job {
        id: format!("j{number:06}"),
        tenant: if kind == Kind::NoTenant {
            "stranger"
        } else {
            owner.name
        },
        level,
        at: Duration::from_secs_f64(at),
        again,
        expect: match kind {
            Kind::Unknown => Expect::Refused,
            Kind::Expired => Expect::Expired,
            Kind::Cancelled => Expect::Cancelled,
            Kind::NoTenant => Expect::Rejected,
            _ => Expect::Sent,
        },
        kind,
    }
}

fn weighted<T: Copy>(choices: &[(T, u32)], dice: &mut StdRng) -> T {
    let mut left = dice.random_range(0..choices.iter().map(|(_, weight)| weight).sum());
    for (choice, weight) in choices {
        if left < *weight {
            return *choice;
        }
        left -= weight;
    }
    choices[0].0
}
