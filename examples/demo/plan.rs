//! What is published, and what must come of it, as data. Nothing here talks to anybody.

mod draft;
mod jobs;
mod kind;
mod letter;
mod seal;

use std::collections::HashSet;

use jiff::Timestamp;
use postroom::level::Level;

pub(crate) use kind::{Kind, Outcome, SHARES, Share, TOTAL};
pub(crate) use letter::{Delivered, File};
pub(crate) use seal::SealingKey;

/// Attachments above this many bytes become links; the tenants are set up with it.
pub(crate) const LARGE_FILE_BYTES: usize = 64 << 10;

/// Mails per period that the account `acme/news` may send: what `account set` is told and what the SMTP server checks.
pub(crate) const NEWS_LIMITS: [(u32, u64); 2] = [(25, 1), (50, 3)];

/// Connections that `acme/news` may have, over both workers.
pub(crate) const NEWS_CONNECTIONS: u32 = 3;

/// The From address of the platform's account.
pub(crate) const PLATFORM_FROM: &str = "post@platform.example";

/// One message to be published.
pub(crate) struct Message {
    pub(crate) kind: Kind,
    pub(crate) level: Level,
    /// The tenant in the routing key.
    pub(crate) tenant: &'static str,
    /// The id in its body; none if the body cannot be read.
    pub(crate) id: Option<String>,
    pub(crate) body: Vec<u8>,
    /// Published with `content_encoding: gzip`.
    pub(crate) gzip: bool,
    /// Only when the job whose id it repeats has had its final report.
    pub(crate) after_original: bool,
    pub(crate) expect: Expect,
}

/// What must come of a message.
pub(crate) enum Expect {
    /// `mail.sent`, and these mails at the server.
    Sent(Box<Mail>),
    /// `mail.failed` for this reason, and no mail.
    Failed(&'static str),
    /// `mail.expired`, and no mail.
    Expired,
    /// A dead letter and a final `mail.rejected` for this reason, and no mail.
    Rejected(&'static str),
    /// A dead letter and a `mail.rejected` that is not final: the first job of this id stands.
    Conflict,
    /// Nothing: it is answered by what is known of its id.
    Duplicate,
}

/// A mail as it must arrive.
#[derive(Clone)]
pub(crate) struct Mail {
    /// The user who must have logged in at the SMTP server: it tells which account sent.
    pub(crate) login: &'static str,
    /// `account`, `platform` or `override`.
    pub(crate) via: &'static str,
    pub(crate) from: &'static str,
    /// Everybody who must get it, each once.
    pub(crate) accepted: Vec<String>,
    /// Everybody whom the server refuses.
    pub(crate) refused: Vec<String>,
    /// Recipients that must not appear in the mail.
    pub(crate) hidden: Vec<String>,
    /// SMTP transactions it takes until everybody has it.
    pub(crate) mails: usize,
    /// At least so many attempts.
    pub(crate) attempts: u64,
    pub(crate) subject: String,
    pub(crate) text: Option<String>,
    pub(crate) html: Option<String>,
    pub(crate) files: Vec<File>,
    pub(crate) not_before: Option<Timestamp>,
}

impl Mail {
    /// Files that must arrive as links.
    pub(crate) fn links(&self) -> usize {
        let linked = |file: &&File| file.delivered == Delivered::Linked;
        self.files.iter().filter(linked).count()
    }
}

/// What the jobs refer to: servers and files that exist only now.
pub(crate) struct Surroundings {
    pub(crate) now: Timestamp,
    /// Port of the SMTP server that jobs bring along, and the password of its user.
    pub(crate) own_port: u16,
    pub(crate) own_password: String,
    pub(crate) sealing: SealingKey,
    /// Files to be fetched, by URL.
    pub(crate) fetched: Vec<(String, File)>,
    /// One that cannot be had the first time.
    pub(crate) fetched_late: (String, File),
    /// One above the threshold.
    pub(crate) fetched_large: (String, File),
}

/// The user who logs in at the jobs' own server.
pub(crate) const OWN_LOGIN: &str = "ann";

/// All messages in the order in which they are published.
pub(crate) struct Plan {
    pub(crate) messages: Vec<Message>,
}

impl Plan {
    pub(crate) fn new(around: &Surroundings) -> Self {
        let mut messages: Vec<Message> = kind::SHARES
            .iter()
            .flat_map(|share| (0..share.count).map(move |n| jobs::message(share.kind, n, around)))
            .collect();
        // As it is with real producers: all sorts at the same time. The newsletter's urgent mail comes last of all.
        let last = |message: &Message| (message.after_original, message.kind == Kind::Urgent);
        let len = messages.len();
        let mut order: Vec<usize> = (0..len).collect();
        order.sort_by_key(|&index| (last(&messages[index]), index * 617 % len));
        let mut slots: Vec<Option<Message>> = messages.drain(..).map(Some).collect();
        let messages = order
            .into_iter()
            .filter_map(|index| slots[index].take())
            .collect();
        Self { messages }
    }

    /// Jobs that must get a final report, as (tenant, id).
    pub(crate) fn jobs_with_final(&self) -> HashSet<(&str, &str)> {
        self.messages.iter().filter_map(Message::job_with_final).collect()
    }

    pub(crate) fn count(&self, which: impl Fn(&Message) -> bool) -> usize {
        self.messages.iter().filter(|message| which(message)).count()
    }
}

impl Message {
    /// Whether a final report answers this very message.
    pub(crate) fn has_final(&self) -> bool {
        !matches!(self.expect, Expect::Conflict | Expect::Duplicate)
    }

    /// Tenant and id, if a final report must name them.
    pub(crate) fn job_with_final(&self) -> Option<(&str, &str)> {
        self.has_final()
            .then(|| Some((self.tenant, self.id.as_deref()?)))
            .flatten()
    }

    /// How it counts in the sum.
    pub(crate) fn outcome(&self) -> Outcome {
        match &self.expect {
            Expect::Sent(mail) if mail.refused.is_empty() => Outcome::Sent,
            Expect::Sent(_) => Outcome::Partial,
            Expect::Failed(_) => Outcome::Failed,
            Expect::Expired => Outcome::Expired,
            Expect::Rejected(_) | Expect::Conflict => Outcome::Rejected,
            Expect::Duplicate => Outcome::Duplicate,
        }
    }

    /// The reason on its dead letter, if it must become one.
    pub(crate) fn dead_reason(&self) -> Option<&'static str> {
        match self.expect {
            Expect::Rejected(reason) => Some(reason),
            Expect::Conflict => Some("id_conflict"),
            _ => None,
        }
    }

    /// How it is called in messages.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.tenant, self.id.as_deref().unwrap_or("(unreadable)"))
    }
}
