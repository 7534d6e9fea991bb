//! Admission: claims job ids, and answers for every delivery what it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::slots::wait;
use super::{Lease, Ledger, Row, Slot, WaitReason, recipients, timestamp};
use crate::db::DbError;
use crate::fail_point::{self, Point};
use crate::id::{AccountKey, JobId, TenantId};
use crate::job::MailJob;
use crate::level::Level;

/// One delivery to be admitted. Keys within a batch must differ.
#[derive(Debug, Clone)]
pub struct AdmitRequest {
    /// Whose.
    pub tenant: TenantId,
    /// Which.
    pub id: JobId,
    /// The level of its queue.
    pub level: Level,
    /// The account that is to send.
    pub account: AccountKey,
    /// A claim of this worker, drawn for this delivery.
    pub lease: Lease,
    /// Recipients of the envelope.
    pub recipients: u32,
    /// Digest of its content.
    pub digest: [u8; 32],
    /// Not before.
    pub send_at: Option<Timestamp>,
    /// Not after.
    pub expires_at: Option<Timestamp>,
    /// Its batch.
    pub batch: Option<String>,
    /// What to ask for.
    pub want: Want,
    /// It need not wait for an account in trouble: the platform may send it.
    pub detour: bool,
    /// An operator took it out of the dead letters: it begins anew.
    pub replay: bool,
}

impl AdmitRequest {
    /// The request of a decoded job.
    #[must_use]
    pub fn new(job: &MailJob, level: Level, account: AccountKey, lease: Lease, want: Want) -> Self {
        Self {
            tenant: job.tenant.clone(),
            id: job.id.clone(),
            level,
            account,
            lease,
            recipients: job.recipients().count() as u32,
            digest: job.digest,
            send_at: job.send_at,
            expires_at: job.expires_at,
            batch: job.batch.clone(),
            want,
            detour: false,
            replay: false,
        }
    }
}

/// What a delivery asks of admission; the number is the one the function takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i16)]
pub enum Want {
    /// The claim alone: the slot is taken when the mail is ready.
    Claim = 0,
    /// The claim and a slot.
    Slot = 1,
    /// The claim, to be parked: the account has no connection free.
    Park = 2,
}

/// What a delivery is.
#[derive(Debug)]
pub enum Admitted {
    /// Leased to this worker: go on.
    Go(Box<Row>),
    /// Leased to this worker, but older jobs of its account wait: release those first.
    Behind(Box<Row>),
    /// Leased to this worker, to be parked.
    Wait {
        /// The leased row.
        row: Box<Row>,
        /// Why.
        reason: WaitReason,
        /// For how long, as far as is known.
        delay: Duration,
    },
    /// Leased to this worker; its `expires_at` has passed.
    Expired(Box<Row>),
    /// Leased to this worker; it was cancelled before it came.
    Cancelled(Box<Row>),
    /// Leased by somebody else: the body is to be absorbed.
    InFlight,
    /// In the waiting room already.
    Waiting,
    /// Held until somebody decides about its uncertain outcome; the body is to be absorbed.
    Held,
    /// Final; a report that is still owed is published without it.
    Done,
    /// Another content has been seen under this id.
    Conflict,
}

impl Ledger {
    /// Admits a batch.
    ///
    /// # Errors
    /// If the database cannot be asked. Repeating the call with the same claims is safe, whatever became of the first.
    pub async fn admit(&self, batch: &[AdmitRequest]) -> Result<Vec<Admitted>, DbError> {
        let Some(epoch) = batch.first().map(|r| r.lease.epoch.number()) else {
            return Ok(Vec::new());
        };
        // Slots are granted in this order: the more urgent first.
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_by_key(|place| batch[*place].level);
        let columns = Columns::new(&order.iter().map(|place| &batch[*place]).collect::<Vec<_>>());
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.admit).await?;
        let sent = Instant::now();
        let rows = client
            .query(
                &statement,
                &[
                    &epoch,
                    &columns.claims,
                    &columns.tenants,
                    &columns.ids,
                    &columns.levels,
                    &columns.accounts,
                    &columns.costs,
                    &columns.digests,
                    &columns.send_at,
                    &columns.expires_at,
                    &columns.wants,
                    &columns.batches,
                    &columns.detours,
                    &columns.replays,
                ],
            )
            .await?;
        self.observe("admit", batch.len(), sent.elapsed());
        let mut answers: Vec<Option<Admitted>> = batch.iter().map(|_| None).collect();
        for row in &rows {
            let index = order.get(row.try_get::<_, i32>(column::IDX)? as usize).copied();
            let index = index.unwrap_or(usize::MAX);
            if let (Some(place), Some(request)) = (answers.get_mut(index), batch.get(index)) {
                let ill = row
                    .try_get::<_, Option<i64>>(column::ILL_US)?
                    .map(|us| wait(Some(us)));
                self.health.note(&request.account, ill, sent);
                *place = Some(read(row, request, sent)?);
            }
        }
        self.count_slots(answers.iter().flatten());
        if fail_point::loses(Point::Admitted, batch.iter().map(|r| r.id.as_str())) {
            return Err(DbError::Timeout);
        }
        // The function answers every row; a missing one would be a delivery of which nothing is known.
        Ok(answers
            .into_iter()
            .map(|answer| answer.unwrap_or(Admitted::InFlight))
            .collect())
    }

    /// Stores the bodies of deliveries whose job is in flight elsewhere. Answers for each whether it is safe now.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn absorb(&self, batch: &[Absorb]) -> Result<Vec<bool>, DbError> {
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_by(|a, b| batch[*a].key().cmp(&batch[*b].key()));
        let tenants: Vec<&str> = order.iter().map(|i| batch[*i].tenant.as_str()).collect();
        let ids: Vec<&str> = order.iter().map(|i| batch[*i].id.as_str()).collect();
        let bodies: Vec<&[u8]> = order.iter().map(|i| batch[*i].body.as_ref()).collect();
        let properties: Vec<&str> = order.iter().map(|i| batch[*i].properties.as_str()).collect();
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.absorb).await?;
        let sent = Instant::now();
        let rows = client
            .query(&statement, &[&tenants, &ids, &bodies, &properties])
            .await?;
        self.observe("absorb", batch.len(), sent.elapsed());
        let mut safe = vec![false; batch.len()];
        for row in rows {
            if let Some(index) = order.get(row.try_get::<_, i32>(0)? as usize) {
                safe[*index] = true;
            }
        }
        if fail_point::loses(Point::Absorbed, ids) {
            return Err(DbError::Timeout);
        }
        Ok(safe)
    }
}

/// A body to be kept for a job that is in flight elsewhere.
#[derive(Debug, Clone)]
pub struct Absorb {
    /// Whose.
    pub tenant: TenantId,
    /// Which.
    pub id: JobId,
    /// The body as it is stored.
    pub body: bytes::Bytes,
    /// Its properties, as JSON.
    pub properties: String,
}

impl Absorb {
    fn key(&self) -> (&TenantId, &JobId) {
        (&self.tenant, &self.id)
    }
}

/// The arguments of `admit_v1`, one array each.
struct Columns<'a> {
    claims: Vec<i64>,
    tenants: Vec<&'a str>,
    ids: Vec<&'a str>,
    levels: Vec<i16>,
    accounts: Vec<&'a str>,
    costs: Vec<i32>,
    digests: Vec<&'a [u8]>,
    send_at: Vec<Option<Timestamp>>,
    expires_at: Vec<Option<Timestamp>>,
    wants: Vec<i16>,
    batches: Vec<Option<&'a str>>,
    detours: Vec<bool>,
    replays: Vec<bool>,
}

impl<'a> Columns<'a> {
    fn new(batch: &[&'a AdmitRequest]) -> Self {
        Self {
            claims: batch.iter().map(|r| r.lease.claim).collect(),
            tenants: batch.iter().map(|r| r.tenant.as_str()).collect(),
            ids: batch.iter().map(|r| r.id.as_str()).collect(),
            levels: batch.iter().map(|r| r.level as i16).collect(),
            accounts: batch.iter().map(|r| r.account.as_str()).collect(),
            costs: batch.iter().map(|r| r.recipients.max(1) as i32).collect(),
            digests: batch.iter().map(|r| r.digest.as_slice()).collect(),
            send_at: batch.iter().map(|r| r.send_at).collect(),
            expires_at: batch.iter().map(|r| r.expires_at).collect(),
            wants: batch.iter().map(|r| r.want as i16).collect(),
            batches: batch.iter().map(|r| r.batch.as_deref()).collect(),
            detours: batch.iter().map(|r| r.detour).collect(),
            replays: batch.iter().map(|r| r.replay).collect(),
        }
    }
}

impl Ledger {
    /// Counts the slots that were granted, or denied, with the claim.
    fn count_slots<'a>(&self, answers: impl Iterator<Item = &'a Admitted>) {
        for answer in answers {
            match answer {
                Admitted::Go(row) | Admitted::Behind(row) if row.slot.is_some() => self.count_slot("granted"),
                Admitted::Wait {
                    reason: WaitReason::Rate,
                    ..
                } => self.count_slot("denied"),
                _ => {}
            }
        }
    }
}

/// Places of the columns that `admit_v1` returns: looked up by name, each would be searched for in every row.
mod column {
    pub(super) const IDX: usize = 0;
    pub(super) const VERDICT: usize = 1;
    pub(super) const BORN: usize = 2;
    pub(super) const SEQ: usize = 3;
    pub(super) const ATTEMPT: usize = 4;
    pub(super) const CREATED_US: usize = 5;
    pub(super) const GRANTED: usize = 6;
    pub(super) const VALID_US: usize = 8;
    pub(super) const WAIT_US: usize = 9;
    pub(super) const REASON: usize = 10;
    pub(super) const RECIPIENTS: usize = 11;
    pub(super) const MESSAGE_ID: usize = 12;
    pub(super) const UNCERTAIN: usize = 13;
    pub(super) const CRASHES: usize = 14;
    pub(super) const DEATHS: usize = 15;
    pub(super) const ILL_US: usize = 16;
    pub(super) const PROBE: usize = 17;
}

fn read(row: &tokio_postgres::Row, request: &AdmitRequest, sent: Instant) -> Result<Admitted, DbError> {
    let verdict: i16 = row.try_get(column::VERDICT)?;
    let leased = || -> Result<Box<Row>, DbError> {
        Ok(Box::new(Row {
            tenant: request.tenant.clone(),
            id: request.id.clone(),
            account: request.account.clone(),
            lease: request.lease.clone(),
            born: row.try_get(column::BORN)?,
            sequence: row.try_get(column::SEQ)?,
            attempts: row.try_get::<_, i32>(column::ATTEMPT)?.max(0) as u32,
            created: timestamp(row.try_get(column::CREATED_US)?),
            // What has needed another attempt waits for it here, and comes out by a release.
            tried: None,
            recipients: recipients(row.try_get(column::RECIPIENTS)?),
            message_id: row.try_get::<_, Option<&str>>(column::MESSAGE_ID)?.map(Arc::from),
            uncertain: row.try_get::<_, i32>(column::UNCERTAIN)?.max(0) as u32,
            crashes: row.try_get::<_, i32>(column::CRASHES)?.max(0) as u32,
            deaths: row.try_get::<_, i32>(column::DEATHS)?.max(0) as u32,
            probe: row.try_get(column::PROBE)?,
            overdue: false,
            slot: Slot::new(
                row.try_get(column::GRANTED)?,
                row.try_get(column::VALID_US)?,
                sent,
            ),
        }))
    };
    Ok(match verdict {
        1 => Admitted::Go(leased()?),
        2 => Admitted::Wait {
            row: leased()?,
            reason: row
                .try_get::<_, Option<i16>>(column::REASON)?
                .and_then(WaitReason::from_number)
                .unwrap_or(WaitReason::Busy),
            delay: wait(row.try_get(column::WAIT_US)?),
        },
        4 => Admitted::Waiting,
        5 => Admitted::Done,
        6 => Admitted::Conflict,
        7 => Admitted::Held,
        8 => Admitted::Behind(leased()?),
        9 => Admitted::Expired(leased()?),
        10 => Admitted::Cancelled(leased()?),
        _ => Admitted::InFlight,
    })
}
