//! Settlement: outcome, report and what follows, in one transaction.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{Ledger, Row, WaitReason, micros};
use crate::db::DbError;
use crate::fail_point::{self, Point};
use crate::report::{RecipientResult, Report, ReportType};

/// What is to be written about a job that this worker has leased.
#[derive(Debug, Clone)]
pub struct Settlement {
    /// The leased row.
    pub row: Row,
    /// What becomes of the job.
    pub next: Next,
    /// Attempts made, this one included.
    pub attempts: u32,
    /// Cumulative results; `None` leaves what is there.
    pub recipients: Option<Vec<RecipientResult>>,
    /// Message-ID of the mail, once it has one.
    pub message_id: Option<String>,
    /// The report, numbered `row.sequence + 1`.
    pub report: Option<Report>,
    /// The slot was not used: it goes back.
    pub refund: bool,
    /// What went wrong, for listings.
    pub error: Option<String>,
}

/// What becomes of a job.
#[derive(Debug, Clone)]
pub enum Next {
    /// It is over.
    Done(ReportType),
    /// It waits.
    Park {
        /// Why.
        reason: WaitReason,
        /// For how long.
        delay: Duration,
        /// The body, unless the ledger has it already.
        body: Option<Body>,
    },
    /// As if it had never been leased: back to RabbitMQ, or to the waiting room if its body is there.
    GiveBack,
    /// Nobody knows whether it was sent: it is held until somebody decides.
    Hold {
        /// The body, unless the ledger has it already.
        body: Option<Body>,
    },
}

/// A body as it is stored.
#[derive(Debug, Clone)]
pub struct Body {
    /// The JSON, uncompressed, plain overrides sealed.
    pub bytes: Bytes,
    /// What came with it, as JSON; see [`crate::worker::delivery`].
    pub properties: String,
}

/// What became of a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// It is written.
    Written,
    /// The lease belongs to somebody else; nothing was written.
    LeaseLost,
    /// The job was cancelled in between; nothing was written, it is to be settled as cancelled.
    Cancelled,
}

impl Settlement {
    /// Bytes it brings to the statement.
    #[must_use]
    pub fn weight(&self) -> usize {
        self.body().map_or(0, |body| body.bytes.len()) + 1024
    }

    fn body(&self) -> Option<&Body> {
        match &self.next {
            Next::Park { body, .. } | Next::Hold { body } => body.as_ref(),
            Next::Done(_) | Next::GiveBack => None,
        }
    }

    fn kind(&self) -> i16 {
        match self.next {
            Next::Done(_) => 1,
            Next::Park { .. } => 2,
            Next::GiveBack => 3,
            Next::Hold { .. } => 4,
        }
    }
}

impl Ledger {
    /// Writes a batch of settlements of one epoch.
    ///
    /// # Errors
    /// If the database cannot be asked. Repeating the call is safe.
    pub async fn settle(&self, batch: &[Settlement]) -> Result<Vec<Settled>, DbError> {
        let Some(epoch) = batch.first().map(|s| s.row.lease.epoch.number()) else {
            return Ok(Vec::new());
        };
        let texts = Texts::new(batch);
        let tenants: Vec<&str> = batch.iter().map(|s| s.row.tenant.as_str()).collect();
        let ids: Vec<&str> = batch.iter().map(|s| s.row.id.as_str()).collect();
        let claims: Vec<i64> = batch.iter().map(|s| s.row.lease.claim).collect();
        let kinds: Vec<i16> = batch.iter().map(Settlement::kind).collect();
        let outcomes: Vec<Option<&str>> = batch.iter().map(outcome).collect();
        let attempts: Vec<i32> = batch.iter().map(|s| s.attempts as i32).collect();
        let message_ids: Vec<Option<&str>> = batch.iter().map(|s| s.message_id.as_deref()).collect();
        let sequences: Vec<Option<i64>> = batch
            .iter()
            .map(|s| s.report.as_ref().map(|r| r.data.sequence))
            .collect();
        let refunds: Vec<bool> = batch.iter().map(|s| s.refund).collect();
        let delays: Vec<Option<i64>> = batch.iter().map(delay).collect();
        let reasons: Vec<Option<i16>> = batch.iter().map(reason).collect();
        let bodies: Vec<Option<&[u8]>> = batch
            .iter()
            .map(|s| s.body().map(|body| body.bytes.as_ref()))
            .collect();
        let properties: Vec<Option<&str>> = batch
            .iter()
            .map(|s| s.body().map(|body| body.properties.as_str()))
            .collect();
        let errors: Vec<Option<&str>> = batch.iter().map(|s| s.error.as_deref()).collect();
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.settle).await?;
        let sent = Instant::now();
        let rows = client
            .query(
                &statement,
                &[
                    &epoch,
                    &tenants,
                    &ids,
                    &claims,
                    &kinds,
                    &outcomes,
                    &attempts,
                    &texts.recipients,
                    &message_ids,
                    &texts.reports,
                    &sequences,
                    &refunds,
                    &delays,
                    &reasons,
                    &bodies,
                    &properties,
                    &errors,
                ],
            )
            .await?;
        self.observe("settle", batch.len(), sent.elapsed());
        let mut answers = vec![Settled::LeaseLost; batch.len()];
        for row in rows {
            let answer = match row.try_get::<_, i16>("answer")? {
                1 => Settled::Written,
                3 => Settled::Cancelled,
                _ => Settled::LeaseLost,
            };
            if let Some(place) = answers.get_mut(row.try_get::<_, i32>("idx")? as usize) {
                *place = answer;
            }
        }
        Ok(answers)
    }

    /// Says that the write that may end the message begins now, for jobs that are to be held when its outcome stays
    /// unknown. Answers for each whether its lease still stands.
    ///
    /// # Errors
    /// If the database cannot be asked: the write must not begin then.
    pub async fn mark_data(&self, batch: &[Row]) -> Result<Vec<bool>, DbError> {
        let Some(epoch) = batch.first().map(|r| r.lease.epoch.number()) else {
            return Ok(Vec::new());
        };
        let tenants: Vec<&str> = batch.iter().map(|r| r.tenant.as_str()).collect();
        let ids: Vec<&str> = batch.iter().map(|r| r.id.as_str()).collect();
        let claims: Vec<i64> = batch.iter().map(|r| r.lease.claim).collect();
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.mark).await?;
        let mut stands = vec![false; batch.len()];
        for row in client
            .query(&statement, &[&epoch, &tenants, &ids, &claims])
            .await?
        {
            if let Some(place) = stands.get_mut(row.try_get::<_, i32>(0)? as usize) {
                *place = true;
            }
        }
        if fail_point::loses(Point::DataMarked, ids) {
            return Err(DbError::Timeout);
        }
        Ok(stands)
    }
}

/// The JSON columns, serialised.
struct Texts {
    recipients: Vec<Option<String>>,
    reports: Vec<Option<String>>,
}

impl Texts {
    fn new(batch: &[Settlement]) -> Self {
        Self {
            recipients: batch
                .iter()
                .map(|s| s.recipients.as_ref().and_then(json))
                .collect(),
            reports: batch.iter().map(|s| s.report.as_ref().and_then(json)).collect(),
        }
    }
}

/// JSON that Postgres takes: serialising these types cannot fail, and reply texts hold no NUL
/// (see [`crate::failure::Reply`]).
fn json<T: serde::Serialize>(value: &T) -> Option<String> {
    serde_json::to_string(value).ok()
}

fn outcome(settlement: &Settlement) -> Option<&'static str> {
    match settlement.next {
        Next::Done(kind) => Some(kind.as_str()),
        _ => None,
    }
}

fn delay(settlement: &Settlement) -> Option<i64> {
    match settlement.next {
        Next::Park { delay, .. } => Some(micros(delay)),
        _ => None,
    }
}

fn reason(settlement: &Settlement) -> Option<i16> {
    match settlement.next {
        Next::Park { reason, .. } => Some(reason as i16),
        _ => None,
    }
}
