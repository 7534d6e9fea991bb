//! Settlement: outcome, report and what follows, in one transaction.

use std::borrow::Borrow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio_postgres::types::ToSql;

use super::health::Evidence;
use super::outbox::ReportNumber;
use super::{Ledger, Row, WaitReason, micros};
use crate::db::DbError;
use crate::fail_point::{self, Point};
use crate::id::AccountKey;
use crate::report::{RecipientResult, ReportMessage, ReportType};

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
    pub message_id: Option<Arc<str>>,
    /// The report, numbered `row.sequence + 1`.
    pub report: Option<ReportMessage>,
    /// The slot was not used: it goes back.
    pub refund: bool,
    /// What went wrong, for listings.
    pub error: Option<String>,
    /// Nobody knows the outcome of this attempt.
    pub uncertain: bool,
    /// A panic ended this attempt.
    pub crashed: bool,
    /// The account it waits for, if that is another than the row's.
    pub account: Option<AccountKey>,
    /// What the attempt says about the accounts it used.
    pub evidence: Vec<Evidence>,
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

/// The answer to a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// What became of it.
    pub settled: Settled,
    /// Its report's number in the outbox, if it is written. Of a repeated settlement too, unless the job has had another
    /// report since: that one, and this, are then left to the sweeper.
    pub report: Option<ReportNumber>,
}

impl Answer {
    /// The lease belongs to somebody else.
    pub const LEASE_LOST: Self = Self {
        settled: Settled::LeaseLost,
        report: None,
    };
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
    pub async fn settle<S>(&self, batch: &[S]) -> Result<Vec<Answer>, DbError>
    where
        S: Borrow<Settlement>,
    {
        let batch: Vec<&Settlement> = batch.iter().map(Borrow::borrow).collect();
        let Some(epoch) = batch.first().map(|s| s.row.lease.epoch.number()) else {
            return Ok(Vec::new());
        };
        let columns = Columns::new(&batch);
        let health = HealthColumns::new(&batch);
        let breaker = self.breaker;
        let faults = breaker.faults.max(1) as i32;
        let (cooldown, cap) = (
            micros(breaker.cooldown),
            micros(breaker.cap.max(breaker.cooldown)),
        );
        let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&epoch];
        parameters.extend(columns.parameters());
        parameters.extend(health.parameters());
        parameters.extend::<[&(dyn ToSql + Sync); 3]>([&faults, &cooldown, &cap]);
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.settle).await?;
        let sent = Instant::now();
        let rows = client.query(&statement, &parameters).await?;
        self.observe("settle", batch.len(), sent.elapsed());
        let mut answers = vec![Answer::LEASE_LOST; batch.len()];
        for row in rows {
            let settled = match row.try_get::<_, i16>(1)? {
                1 => Settled::Written,
                3 => Settled::Cancelled,
                _ => Settled::LeaseLost,
            };
            let report = row.try_get::<_, Option<i64>>(2)?.map(ReportNumber);
            let Ok(place) = usize::try_from(row.try_get::<_, i32>(0)?) else {
                self.note_change(&row, sent)?;
                continue;
            };
            if let Some(place) = answers.get_mut(place) {
                *place = Answer { settled, report };
            }
        }
        Ok(answers)
    }

    /// Says that our own work on the content of a suspect begins, or is over. Whether its lease still stands.
    ///
    /// # Errors
    /// If the database cannot be asked: the work must not begin then.
    pub async fn mark_suspect(&self, row: &Row, marked: bool) -> Result<bool, DbError> {
        let sql = self.db.sql("SELECT {s}.mark_suspect_v1($1, $2, $3, $4, $5)");
        let (epoch, claim) = (row.lease.epoch.number(), row.lease.claim);
        let client = self.db.client().await?;
        let answer = client
            .query_one(
                &sql,
                &[&epoch, &row.tenant.as_str(), &row.id.as_str(), &claim, &marked],
            )
            .await?;
        Ok(answer.try_get(0)?)
    }

    /// Says that the write that may end the message begins now, for jobs that are to be held when its outcome stays
    /// unknown: to the recipients of each row, under its Message-ID. Answers for each whether its lease still stands.
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
        let known = |r: &Row| (!r.recipients.is_empty()).then(|| json(&r.recipients)).flatten();
        let recipients: Vec<Option<String>> = batch.iter().map(known).collect();
        let message_ids: Vec<Option<&str>> = batch.iter().map(|r| r.message_id.as_deref()).collect();
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.mark).await?;
        let mut stands = vec![false; batch.len()];
        for row in client
            .query(
                &statement,
                &[&epoch, &tenants, &ids, &claims, &recipients, &message_ids],
            )
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

/// The arguments of `settle_v1` that have one value per settlement, in its order; what is nearly always nothing has none at
/// all if no settlement of the batch has one (see [`sparse`]).
struct Columns<'a> {
    tenants: Vec<&'a str>,
    ids: Vec<&'a str>,
    claims: Vec<i64>,
    kinds: Vec<i16>,
    outcomes: Vec<Option<&'a str>>,
    attempts: Vec<i32>,
    recipients: Vec<Option<String>>,
    reports: Vec<Option<&'a str>>,
    message_ids: Vec<Option<&'a str>>,
    sequences: Vec<Option<i64>>,
    refunds: Vec<Option<bool>>,
    delays: Vec<Option<i64>>,
    reasons: Vec<Option<i16>>,
    bodies: Vec<Option<&'a [u8]>>,
    properties: Vec<Option<&'a str>>,
    errors: Vec<Option<&'a str>>,
    uncertain: Vec<Option<i16>>,
    crashed: Vec<Option<i16>>,
    accounts: Vec<Option<&'a str>>,
}

impl<'a> Columns<'a> {
    fn new(batch: &[&'a Settlement]) -> Self {
        let recipients = |s: &&Settlement| s.recipients.as_ref().and_then(json);
        let sequence = |s: &&Settlement| s.report.as_ref().map(|r| r.data.sequence);
        Self {
            tenants: batch.iter().map(|s| s.row.tenant.as_str()).collect(),
            ids: batch.iter().map(|s| s.row.id.as_str()).collect(),
            claims: batch.iter().map(|s| s.row.lease.claim).collect(),
            kinds: batch.iter().map(|s| s.kind()).collect(),
            outcomes: batch.iter().map(|s| outcome(s)).collect(),
            attempts: batch.iter().map(|s| s.attempts as i32).collect(),
            recipients: batch.iter().map(recipients).collect(),
            reports: batch
                .iter()
                .map(|s| s.report.as_ref().map(ReportMessage::json))
                .collect(),
            message_ids: batch.iter().map(|s| s.message_id.as_deref()).collect(),
            sequences: batch.iter().map(sequence).collect(),
            refunds: sparse(batch, |s| s.refund.then_some(true)),
            delays: sparse(batch, delay),
            reasons: sparse(batch, reason),
            bodies: sparse(batch, |s| s.body().map(|b| b.bytes.as_ref())),
            properties: sparse(batch, |s| s.body().map(|b| b.properties.as_str())),
            errors: sparse(batch, |s| s.error.as_deref()),
            uncertain: sparse(batch, |s| s.uncertain.then_some(1)),
            crashed: sparse(batch, |s| s.crashed.then_some(1)),
            accounts: sparse(batch, |s| s.account.as_ref().map(AccountKey::as_str)),
        }
    }

    fn parameters(&self) -> [&(dyn ToSql + Sync); 19] {
        [
            &self.tenants,
            &self.ids,
            &self.claims,
            &self.kinds,
            &self.outcomes,
            &self.attempts,
            &self.recipients,
            &self.message_ids,
            &self.reports,
            &self.sequences,
            &self.refunds,
            &self.delays,
            &self.reasons,
            &self.bodies,
            &self.properties,
            &self.errors,
            &self.uncertain,
            &self.crashed,
            &self.accounts,
        ]
    }
}

/// What attempts say about accounts, each with the place of its settlement.
#[derive(Default)]
struct HealthColumns<'a> {
    places: Vec<i32>,
    accounts: Vec<&'a str>,
    kinds: Vec<i16>,
    classes: Vec<Option<&'a str>>,
    reasons: Vec<Option<&'a str>>,
    details: Vec<Option<&'a str>>,
}

impl<'a> HealthColumns<'a> {
    fn new(batch: &[&'a Settlement]) -> Self {
        let mut columns = Self::default();
        for (place, settlement) in batch.iter().enumerate() {
            for evidence in &settlement.evidence {
                let fault = evidence.fault.as_ref();
                columns.places.push(place as i32);
                columns.accounts.push(evidence.account.as_str());
                columns.kinds.push(if fault.is_some() { 2 } else { 1 });
                columns.classes.push(fault.map(|f| f.class));
                columns.reasons.push(fault.map(|f| f.reason));
                columns.details.push(fault.map(|f| f.detail.as_str()));
            }
        }
        columns
    }

    fn parameters(&self) -> [&(dyn ToSql + Sync); 6] {
        [
            &self.places,
            &self.accounts,
            &self.kinds,
            &self.classes,
            &self.reasons,
            &self.details,
        ]
    }
}

/// One value per settlement, or none at all if all are nothing: what is not there costs nothing on the way, and there.
fn sparse<'a, T>(batch: &[&'a Settlement], value: impl Fn(&'a Settlement) -> Option<T>) -> Vec<Option<T>> {
    let values: Vec<Option<T>> = batch.iter().map(|s| value(s)).collect();
    if values.iter().any(Option::is_some) {
        values
    } else {
        Vec::new()
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
