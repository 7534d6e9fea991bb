//! One attempt at one job, left to right: resolve → fetch → compose → connect → slot → send. What follows from it is
//! decided in [`crate::settlement`].

pub mod attempt;
pub mod evidence;
pub mod resolve;
mod room;
mod suspect;
pub mod task;
mod transact;
mod turns;

use std::sync::Arc;
use std::time::Duration;

use crate::failure::Failure;
use crate::id::AccountKey;
use crate::job::OnUncertain;
use crate::ledger::health::Evidence;
use crate::ledger::{Row, WaitReason};
use crate::report::{LinkedFile, RecipientResult, Sender};
use crate::retry::RetryPolicy;

/// What one attempt found out.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "one per thing that it came to")]
pub struct Attempt {
    /// What it concluded.
    pub verdict: Verdict,
    /// The tenant's account the job is for, by name.
    pub account: Option<Arc<str>>,
    /// Who really sent, or would have.
    pub sender: Option<Sender>,
    /// Message-ID of the mail, once it has one.
    pub message_id: Option<Arc<str>>,
    /// Results so far, of earlier attempts too.
    pub recipients: Vec<RecipientResult>,
    /// The failure worth telling, if any.
    pub failure: Option<Failure>,
    /// Duration of the SMTP transaction.
    pub smtp: Option<Duration>,
    /// Attachments that became links.
    pub links: Vec<LinkedFile>,
    /// It counts as an attempt: something was tried, beyond waiting for room.
    pub started: bool,
    /// MAIL FROM was written since the last slot was taken: that one is used.
    pub reached_mail_from: bool,
    /// The account had no connection free.
    pub found_busy: bool,
    /// When to come back, by the account that sent; `None` if none was found.
    pub retry: Option<RetryPolicy>,
    /// What to do if nobody knows the outcome.
    pub on_uncertain: OnUncertain,
    /// The account that it waits for, if not the one it is counted under.
    pub waits_for: Option<AccountKey>,
    /// What it found out about the accounts it used.
    pub evidence: Vec<Evidence>,
    /// A panic ended it.
    pub crashed: bool,
}

/// What an attempt concluded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The server answered for some recipients: their results tell.
    Attempted,
    /// Nothing was sent.
    Failed(Failure),
    /// Nobody knows whether the server took the mail: the connection was lost after its last byte could have arrived.
    Uncertain(Failure),
    /// No room: the job waits, and this was no attempt.
    Wait {
        /// Why.
        reason: WaitReason,
        /// For how long, as far as is known.
        delay: Duration,
    },
    /// Its `expires_at` has passed.
    Expired,
    /// Somebody cancelled it.
    Cancelled,
    /// This worker may or can not go on with it; nothing was sent.
    GiveBack,
}

impl Attempt {
    /// An attempt at a job of which nothing has been tried yet in this turn.
    #[must_use]
    pub fn of(recipients: Vec<RecipientResult>, message_id: Option<Arc<str>>) -> Self {
        Self {
            verdict: Verdict::GiveBack,
            account: None,
            sender: None,
            message_id,
            recipients,
            failure: None,
            smtp: None,
            links: Vec::new(),
            started: false,
            reached_mail_from: false,
            found_busy: false,
            retry: None,
            on_uncertain: OnUncertain::default(),
            waits_for: None,
            evidence: Vec::new(),
            crashed: false,
        }
    }

    /// Whether nobody knows its outcome.
    #[must_use]
    pub fn is_uncertain(&self) -> bool {
        matches!(self.verdict, Verdict::Uncertain(_))
    }

    /// The number of this attempt.
    #[must_use]
    pub fn number(&self, row: &Row) -> u32 {
        row.attempts + u32::from(self.started)
    }
}
