//! Rate slots: the right to write MAIL FROM, valid only briefly.

use std::time::{Duration, Instant};

use super::{Lease, Ledger};
use crate::db::DbError;
use crate::id::{AccountKey, JobId, TenantId};

/// A granted slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Recipients it covers: the envelope may not be larger.
    pub recipients: u32,
    /// MAIL FROM must be written before; `None` when nothing is limited.
    pub until: Option<Instant>,
}

impl Slot {
    /// The slot of a send that nothing limits.
    #[must_use]
    pub fn unlimited() -> Self {
        Self {
            recipients: u32::MAX,
            until: None,
        }
    }

    /// Reads what the database granted. `sent` is when the statement was sent. Half of the validity stays for the way
    /// to the server.
    pub(super) fn new(granted: i32, valid_us: Option<i64>, sent: Instant) -> Option<Self> {
        let recipients = u32::try_from(granted).ok().filter(|n| *n > 0)?;
        let until = valid_us.map(|us| sent + Duration::from_micros(us.max(0) as u64) / 2);
        Some(Self { recipients, until })
    }

    /// Whether it may still be used.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }
}

/// Asks for a slot.
#[derive(Debug, Clone)]
pub struct SlotRequest {
    /// Whose job.
    pub tenant: TenantId,
    /// Which.
    pub id: JobId,
    /// Its lease.
    pub lease: Lease,
    /// The account that will really send.
    pub account: AccountKey,
    /// Recipients of the envelope.
    pub recipients: u32,
    /// The slot the job had before was used: it counts, and does not go back.
    pub keep: bool,
}

/// The answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotAnswer {
    /// Go.
    Granted(Slot),
    /// Over a limit: not before this long.
    Denied(Duration),
    /// The job is somebody else's by now.
    LeaseLost,
}

impl Ledger {
    /// Takes the slots of a batch of leased jobs, each anew if it had one.
    ///
    /// # Errors
    /// If the database cannot be asked; nothing is granted then.
    pub async fn take_slots(&self, batch: &[SlotRequest]) -> Result<Vec<SlotAnswer>, DbError> {
        let tenants: Vec<&str> = batch.iter().map(|r| r.tenant.as_str()).collect();
        let ids: Vec<&str> = batch.iter().map(|r| r.id.as_str()).collect();
        let claims: Vec<i64> = batch.iter().map(|r| r.lease.claim).collect();
        let accounts: Vec<&str> = batch.iter().map(|r| r.account.as_str()).collect();
        let costs: Vec<i32> = batch.iter().map(|r| r.recipients.max(1) as i32).collect();
        let keep: Vec<bool> = batch.iter().map(|r| r.keep).collect();
        let Some(epoch) = batch.first().map(|r| r.lease.epoch.number()) else {
            return Ok(Vec::new());
        };
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.slots).await?;
        let sent = Instant::now();
        let rows = client
            .query(
                &statement,
                &[&epoch, &tenants, &ids, &claims, &accounts, &costs, &keep],
            )
            .await?;
        self.observe("slots", batch.len(), sent.elapsed());
        let mut answers = vec![SlotAnswer::LeaseLost; batch.len()];
        for row in rows {
            let granted: i32 = row.try_get("granted")?;
            let answer = match Slot::new(granted, row.try_get("valid_us")?, sent) {
                Some(slot) => SlotAnswer::Granted(slot),
                None if granted < 0 => SlotAnswer::LeaseLost,
                None => SlotAnswer::Denied(wait(row.try_get("wait_us")?)),
            };
            if let Some(place) = answers.get_mut(row.try_get::<_, i32>("idx")? as usize) {
                *place = answer;
            }
        }
        self.count_answers(&answers);
        Ok(answers)
    }

    fn count_answers(&self, answers: &[SlotAnswer]) {
        for answer in answers {
            let label = match answer {
                SlotAnswer::Granted(_) => "granted",
                SlotAnswer::Denied(_) => "denied",
                SlotAnswer::LeaseLost => "lost",
            };
            self.count_slot(label);
        }
    }

    /// Counts one answer, wherever it was given: to admission, to a release, or to a mail that is ready.
    pub(super) fn count_slot(&self, answer: &str) {
        self.metrics.slots.with_label_values(&[answer]).inc();
    }
}

/// A wait told by the database.
pub(super) fn wait(us: Option<i64>) -> Duration {
    Duration::from_micros(us.unwrap_or(0).max(0) as u64)
}
