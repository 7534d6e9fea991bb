//! Release: waiting jobs that may run now, leased to a worker that has room for them.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::slots::wait;
use super::{Epoch, Ledger, Row, Slot, WaitReason, micros, recipients, timestamp};
use crate::db::DbError;
use crate::fail_point::{self, Point};
use crate::id::AccountKey;
use crate::level::Level;
use std::ops::Range;
use std::sync::Arc;

/// What to release.
#[derive(Debug, Clone)]
pub struct ReleaseRequest {
    /// The level.
    pub level: Level,
    /// Most jobs.
    pub most: usize,
    /// Most bytes of bodies.
    pub most_bytes: u64,
    /// Accounts that have no room in this worker.
    pub exclude: Vec<AccountKey>,
    /// Only this account, at this level and the more urgent ones.
    pub only: Option<AccountKey>,
    /// Jobs that have waited for so long for the end of their account's trouble are given up, unless the account says
    /// otherwise.
    pub max_age: Duration,
}

/// A job out of the waiting room.
#[derive(Debug)]
pub struct Released {
    /// What the ledger knows.
    pub row: Row,
    /// Its level.
    pub level: Level,
    /// Connections that its account may have over all workers.
    pub cap: usize,
    /// Why it waited.
    pub reason: Option<WaitReason>,
    /// Its body, as stored.
    pub body: Bytes,
    /// What came with it.
    pub properties: serde_json::Value,
}

impl Ledger {
    /// Levels that have something due. Cheap.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn due_levels(&self) -> Result<Vec<Level>, DbError> {
        let sql = self.db.sql("SELECT level FROM {s}.due_levels_v1()");
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&sql).await?;
        let rows = client.query(&statement, &[]).await?;
        Ok(rows
            .iter()
            .filter_map(|row| Level::from_index(row.try_get(0).ok()?))
            .collect())
    }

    /// Leases due jobs, lanes in turn, oldest first, each with its slot.
    ///
    /// # Errors
    /// If the database cannot be asked. What was leased by a statement whose answer got lost is taken back by the next
    /// release; if that statement was still running then, by [`Ledger::forgotten`].
    pub async fn release(
        &self,
        epoch: &Arc<Epoch>,
        request: &ReleaseRequest,
    ) -> Result<Vec<Released>, DbError> {
        self.take_back(epoch).await?;
        let base = epoch.claim_block(request.most);
        let released = self.release_under(epoch, request, base).await;
        if released.is_err() {
            epoch.lose(base, request.most);
        }
        released
    }

    /// Leases up to `most` waiting jobs that have expired, whatever they wait for, to be told so.
    ///
    /// # Errors
    /// As for [`Self::release`].
    pub async fn release_expired(
        &self,
        epoch: &Arc<Epoch>,
        (most, most_bytes): (usize, u64),
        recent: Option<Duration>,
    ) -> Result<Vec<Released>, DbError> {
        self.take_back(epoch).await?;
        let base = epoch.claim_block(most);
        let expired = self.expired_under(epoch, (most, most_bytes), base, recent).await;
        if expired.is_err() {
            epoch.lose(base, most);
        }
        expired
    }

    async fn expired_under(
        &self,
        epoch: &Arc<Epoch>,
        (most, most_bytes): (usize, u64),
        base: i64,
        recent: Option<Duration>,
    ) -> Result<Vec<Released>, DbError> {
        let sql = self
            .db
            .sql("SELECT * FROM {s}.release_expired_v1($1, $2, $3, $4, $5)");
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&sql).await?;
        let sent = Instant::now();
        let rows = client
            .query(
                &statement,
                &[
                    &epoch.number(),
                    &(most as i32),
                    &(most_bytes as i64),
                    &base,
                    &recent.map(micros),
                ],
            )
            .await?;
        self.observe("expire", rows.len(), sent.elapsed());
        let expired = rows.iter().map(|row| read(row, epoch, sent));
        expired.filter_map(Result::transpose).collect()
    }

    async fn release_under(
        &self,
        epoch: &Arc<Epoch>,
        request: &ReleaseRequest,
        base: i64,
    ) -> Result<Vec<Released>, DbError> {
        let exclude: Vec<&str> = request.exclude.iter().map(AccountKey::as_str).collect();
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.release).await?;
        let sent = Instant::now();
        let rows = client
            .query(
                &statement,
                &[
                    &epoch.number(),
                    &(request.level as i16),
                    &(request.most as i32),
                    &(request.most_bytes as i64),
                    &base,
                    &exclude,
                    &request.only.as_ref().map(AccountKey::as_str),
                    &micros(request.max_age),
                ],
            )
            .await?;
        self.observe("release", rows.len(), sent.elapsed());
        for row in &rows {
            let account = AccountKey::from_stored(row.try_get("account")?);
            let ill = row.try_get::<_, Option<i64>>("ill_us")?;
            self.health.note(&account, ill.map(|us| wait(Some(us))), sent);
        }
        let released = rows.iter().map(|row| read(row, epoch, sent));
        let released: Vec<Released> = released.filter_map(Result::transpose).collect::<Result<_, _>>()?;
        for _ in released.iter().filter(|job| job.row.slot.is_some()) {
            self.count_slot("granted");
        }
        let ids = released.iter().map(|job| job.row.id.as_str());
        if !released.is_empty() && fail_point::loses(Point::Released, ids) {
            return Err(DbError::Timeout);
        }
        Ok(released)
    }

    /// Jobs that this epoch has leased under old claims nobody works on: a statement leased them and its answer never
    /// came. They wait again, or are held if they were marked in their final write; how many is returned. To be called at intervals longer than any statement may take.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn forgotten(&self, epoch: &Epoch) -> Result<u64, DbError> {
        let (known, before) = epoch.look();
        self.unlease(epoch, &known, 0..before).await
    }

    /// What the last releases leased without our hearing of it waits again.
    async fn take_back(&self, epoch: &Epoch) -> Result<(), DbError> {
        let lost = epoch.lost();
        for (number, (first, count)) in lost.iter().enumerate() {
            let taken = self.unlease(epoch, &[], *first..first + *count as i64).await;
            if let Err(error) = taken {
                lost[number..]
                    .iter()
                    .for_each(|(first, count)| epoch.lose(*first, *count));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Jobs leased under these claims, without those known to be worked on, wait again; accounts that one of them was to probe
    /// wait for the next.
    async fn unlease(&self, epoch: &Epoch, known: &[i64], claims: Range<i64>) -> Result<u64, DbError> {
        let sql = self.db.sql(
            "WITH lost AS (
                 UPDATE {s}.job SET state = CASE WHEN body IS NULL THEN 0 ELSE 2 END, claim = NULL, phase = 0,
                     merged = false, marked = false, due_at = least(due_at, clock_timestamp()), reason = 2,
                     slot_at = NULL, slot_cost = NULL, updated_at = clock_timestamp()
                 WHERE state = 1 AND epoch = $1 AND claim >= $3 AND claim < $4 AND claim <> ALL ($2) AND phase = 0
                 RETURNING tenant, id, state)
             SELECT {s}.touch_lanes(array_agg(tenant), array_agg(id)), count(*)
             FROM lost HAVING count(*) > 0",
        );
        let client = self.db.client().await?;
        let row = client
            .query_opt(&sql, &[&epoch.number(), &known, &claims.start, &claims.end])
            .await?;
        let marked = self.db.sql(
            "SELECT tenant, id, claim FROM {s}.job
             WHERE state = 1 AND epoch = $1 AND claim >= $3 AND claim < $4 AND claim <> ALL ($2) AND phase = 1",
        );
        let marked = client
            .query(&marked, &[&epoch.number(), &known, &claims.start, &claims.end])
            .await?;
        drop(client);
        for row in &marked {
            let (tenant, id): (&str, &str) = (row.try_get(0)?, row.try_get(1)?);
            if let (Ok(tenant), Ok(id)) = (tenant.parse(), id.parse()) {
                let lease = (epoch.number(), row.try_get(2)?);
                self.hold_marked(&tenant, &id, Some(lease)).await?;
            }
        }
        self.free_probes(epoch, known, claims).await?;
        let waiting = row.map_or(Ok(0), |row| row.try_get::<_, i64>(1))?.max(0) as u64;
        Ok(waiting + marked.len() as u64)
    }

    /// Nobody comes back from the probes under these claims, without those known to be worked on: the next job may try.
    async fn free_probes(&self, epoch: &Epoch, known: &[i64], claims: Range<i64>) -> Result<(), DbError> {
        let sql = self.db.sql(
            "WITH freed AS (
                 UPDATE {s}.account_health SET state = 1, until = clock_timestamp(), epoch = NULL, claim = NULL
                 WHERE state = 2 AND epoch = $1 AND claim >= $3 AND claim < $4 AND claim <> ALL ($2)
                 RETURNING account)
             SELECT {s}.wake_lanes(array_agg(account), false) FROM freed HAVING count(*) > 0",
        );
        let client = self.db.client().await?;
        client
            .execute(&sql, &[&epoch.number(), &known, &claims.start, &claims.end])
            .await?;
        Ok(())
    }
}

fn read(row: &tokio_postgres::Row, epoch: &Arc<Epoch>, sent: Instant) -> Result<Option<Released>, DbError> {
    let (tenant, id): (&str, &str) = (row.try_get("tenant")?, row.try_get("id")?);
    let (Ok(tenant), Ok(id)) = (tenant.parse(), id.parse()) else {
        return Ok(None);
    };
    let probe: bool = row.try_get("probe")?;
    Ok(Some(Released {
        row: Row {
            tenant,
            id,
            account: AccountKey::from_stored(row.try_get("account")?),
            lease: epoch.lease(row.try_get("claim")?),
            born: row.try_get("born")?,
            sequence: row.try_get("seq")?,
            attempts: row.try_get::<_, i32>("attempt")?.max(0) as u32,
            created: timestamp(row.try_get("created_us")?),
            tried: row.try_get::<_, Option<i64>>("tried_us")?.map(timestamp),
            recipients: recipients(row.try_get("recipients")?),
            message_id: row.try_get::<_, Option<&str>>("message_id")?.map(Arc::from),
            uncertain: row.try_get::<_, i32>("uncertain")?.max(0) as u32,
            crashes: row.try_get::<_, i32>("crashes")?.max(0) as u32,
            deaths: row.try_get::<_, i32>("deaths")?.max(0) as u32,
            probe,
            // Of an account in trouble nothing else comes out.
            overdue: !probe && row.try_get::<_, Option<i64>>("ill_us")?.is_some(),
            slot: Slot::new(row.try_get("granted")?, row.try_get("valid_us")?, sent),
        },
        level: Level::from_index(row.try_get("level")?).unwrap_or(Level::Medium),
        cap: row
            .try_get::<_, Option<i32>>("cap")?
            .map_or(usize::MAX, |cap| cap.unsigned_abs() as usize),
        reason: row
            .try_get::<_, Option<i16>>("reason")?
            .and_then(WaitReason::from_number),
        body: Bytes::from(row.try_get::<_, Vec<u8>>("body")?),
        properties: row
            .try_get::<_, Option<serde_json::Value>>("properties")?
            .unwrap_or_default(),
    }))
}
