//! The outbox: reports that are written but not yet confirmed by the broker.

use std::time::Duration;

use super::{Ledger, micros};
use crate::db::DbError;
use crate::id::{JobId, TenantId};

/// Names one report of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportKey {
    /// Whose.
    pub tenant: TenantId,
    /// Which job.
    pub id: JobId,
    /// Which report.
    pub sequence: i64,
}

/// A job whose reports should have been published by now.
#[derive(Debug)]
pub struct Owed {
    /// Whose.
    pub tenant: TenantId,
    /// Which job.
    pub id: JobId,
    /// The reports as JSON, each with its number.
    pub reports: Vec<(i64, String)>,
    /// Since when.
    pub waiting: Duration,
}

impl Ledger {
    /// Removes exactly these reports.
    ///
    /// # Errors
    /// If the database cannot be asked; the reports are then published again later, under the same ids.
    pub async fn clear_outbox(&self, batch: &[ReportKey]) -> Result<(), DbError> {
        let tenants: Vec<&str> = batch.iter().map(|k| k.tenant.as_str()).collect();
        let ids: Vec<&str> = batch.iter().map(|k| k.id.as_str()).collect();
        let sequences: Vec<i64> = batch.iter().map(|k| k.sequence).collect();
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.clear).await?;
        let sent = std::time::Instant::now();
        client.execute(&statement, &[&tenants, &ids, &sequences]).await?;
        self.observe("clear", batch.len(), sent.elapsed());
        Ok(())
    }

    /// Takes up to `most` jobs whose reports are overdue; nobody else takes them for the time `hold`.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn owed_reports(&self, most: i32, hold: Duration) -> Result<Vec<Owed>, DbError> {
        let sql = self
            .db
            .sql("SELECT * FROM {s}.owed_reports_v1($1, $2::bigint * interval '1 microsecond')");
        let rows = self
            .db
            .client()
            .await?
            .query(&sql, &[&most, &micros(hold)])
            .await?;
        let mut owed = Vec::with_capacity(rows.len());
        for row in rows {
            let (tenant, id): (&str, &str) = (row.try_get("tenant")?, row.try_get("id")?);
            let reports: Vec<String> = row.try_get("reports")?;
            let sequences: Vec<i64> = row.try_get("seqs")?;
            if let (Ok(tenant), Ok(id)) = (tenant.parse(), id.parse()) {
                owed.push(Owed {
                    tenant,
                    id,
                    reports: sequences.into_iter().zip(reports).collect(),
                    waiting: super::slots::wait(row.try_get("waiting_us")?),
                });
            }
        }
        Ok(owed)
    }

    /// How many jobs owe a report, counted up to `most`.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn outbox_size(&self, most: i64) -> Result<i64, DbError> {
        let sql = self
            .db
            .sql("SELECT count(*) FROM (SELECT FROM {s}.job WHERE outbox IS NOT NULL LIMIT $1) o");
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&sql).await?;
        Ok(client.query_one(&statement, &[&most]).await?.try_get(0)?)
    }

    /// Forgets final jobs older than `retention` that owe no report, at most `most` at a time. Returns how many.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn forget_old(&self, retention: Duration, most: i64) -> Result<u64, DbError> {
        let sql = self.db.sql(
            "DELETE FROM {s}.job WHERE ctid = ANY (ARRAY(
                 SELECT ctid FROM {s}.job WHERE state IN (3, 5, 6) AND outbox IS NULL
                     AND finished_at < clock_timestamp() - $1::bigint * interval '1 microsecond' LIMIT $2
                 FOR UPDATE SKIP LOCKED))",
        );
        let client = self.db.client().await?;
        Ok(client.execute(&sql, &[&micros(retention), &most]).await?)
    }
}
