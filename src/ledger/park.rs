//! Parking at once: new jobs that are to be sent later go straight into the waiting room, without a lease in between.

use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;

use super::outbox::ReportNumber;
use super::settle::Body;
use super::{Epoch, Ledger};
use crate::db::DbError;
use crate::fail_point::{self, Point};
use crate::id::{AccountKey, JobId, TenantId};
use crate::level::Level;
use crate::report::ReportMessage;

/// A delivery to be parked, should nobody know its job yet.
#[derive(Debug, Clone, Copy)]
pub struct ParkRequest<'a> {
    /// Whose.
    pub tenant: &'a TenantId,
    /// Which.
    pub id: &'a JobId,
    /// The level of its queue.
    pub level: Level,
    /// The account that is to send.
    pub account: &'a AccountKey,
    /// Digest of its content.
    pub digest: &'a [u8; 32],
    /// Not before.
    pub send_at: Timestamp,
    /// Not after.
    pub expires_at: Option<Timestamp>,
    /// Its batch.
    pub batch: Option<&'a str>,
    /// As it is stored.
    pub body: &'a Body,
    /// The report that it waits, if there is to be one: number `born + 1`.
    pub report: Option<&'a ReportMessage>,
}

/// What makes a call of [`Ledger::park`] the same when it is repeated.
#[derive(Debug, Clone)]
pub struct Birth {
    /// Who calls.
    pub epoch: Arc<Epoch>,
    /// The first of as many claims as there are requests.
    pub claims: i64,
    /// What reports are numbered from, see [`born`].
    pub born: i64,
}

impl Birth {
    /// Of so many jobs at this time on the database's clock.
    #[must_use]
    pub fn new(epoch: Arc<Epoch>, jobs: usize, now: Timestamp) -> Self {
        let claims = epoch.claim_block(jobs);
        let born = born(now);
        Self { epoch, claims, born }
    }
}

/// The number that the reports of a job born now are counted from: its birth second, with room for a thousand.
#[must_use]
pub fn born(now: Timestamp) -> i64 {
    now.as_second() * 1000
}

/// A job that is in the waiting room now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parked {
    /// Its report's number in the outbox.
    pub report: Option<ReportNumber>,
}

impl Ledger {
    /// Puts new jobs into the waiting room. `None`: known already, due or expired by now; admission decides about it.
    ///
    /// # Errors
    /// If the database cannot be asked. Repeating the call with the same birth is safe, whatever became of the first.
    pub async fn park(
        &self,
        birth: &Birth,
        batch: &[ParkRequest<'_>],
    ) -> Result<Vec<Option<Parked>>, DbError> {
        let columns = Columns::new(batch);
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.park).await?;
        let sent = Instant::now();
        let rows = client
            .query(
                &statement,
                &[
                    &birth.epoch.number(),
                    &birth.claims,
                    &birth.born,
                    &columns.tenants,
                    &columns.ids,
                    &columns.levels,
                    &columns.accounts,
                    &columns.digests,
                    &columns.send_at,
                    &columns.expires_at,
                    &columns.batches,
                    &columns.bodies,
                    &columns.properties,
                    &columns.reports,
                ],
            )
            .await?;
        self.observe("park", batch.len(), sent.elapsed());
        let mut answers = vec![None; batch.len()];
        for row in rows {
            let report = row.try_get::<_, Option<i64>>(1)?.map(ReportNumber);
            if let Some(place) = answers.get_mut(row.try_get::<_, i32>(0)? as usize) {
                *place = Some(Parked { report });
            }
        }
        if fail_point::loses(Point::Settled, batch.iter().map(|job| job.id.as_str())) {
            return Err(DbError::Timeout);
        }
        Ok(answers)
    }
}

/// The arguments of `park_new_v1`, one array each.
struct Columns<'a> {
    tenants: Vec<&'a str>,
    ids: Vec<&'a str>,
    levels: Vec<i16>,
    accounts: Vec<&'a str>,
    digests: Vec<&'a [u8]>,
    send_at: Vec<Timestamp>,
    expires_at: Vec<Option<Timestamp>>,
    batches: Vec<Option<&'a str>>,
    bodies: Vec<&'a [u8]>,
    properties: Vec<&'a str>,
    reports: Vec<Option<&'a str>>,
}

impl<'a> Columns<'a> {
    fn new(batch: &[ParkRequest<'a>]) -> Self {
        Self {
            tenants: batch.iter().map(|job| job.tenant.as_str()).collect(),
            ids: batch.iter().map(|job| job.id.as_str()).collect(),
            levels: batch.iter().map(|job| job.level as i16).collect(),
            accounts: batch.iter().map(|job| job.account.as_str()).collect(),
            digests: batch.iter().map(|job| job.digest.as_slice()).collect(),
            send_at: batch.iter().map(|job| job.send_at).collect(),
            expires_at: batch.iter().map(|job| job.expires_at).collect(),
            batches: batch.iter().map(|job| job.batch).collect(),
            bodies: batch.iter().map(|job| job.body.bytes.as_ref()).collect(),
            properties: batch.iter().map(|job| job.body.properties.as_str()).collect(),
            reports: batch
                .iter()
                .map(|job| job.report.map(ReportMessage::json))
                .collect(),
        }
    }
}
