//! The outbox: reports that are written but not yet confirmed by the broker.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Ledger, micros};
use crate::db::DbError;

/// Names one report in the outbox, for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReportNumber(pub i64);

/// A report that should have been published by now.
#[derive(Debug)]
pub struct Owed {
    /// Its number here.
    pub number: ReportNumber,
    /// Whose.
    pub tenant: String,
    /// About which job.
    pub id: String,
    /// Its number among the reports of the job.
    pub sequence: i64,
    /// The report.
    pub json: String,
}

/// What waits in the outbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Reports owed, as far as they were counted.
    pub owed: i64,
    /// Age of the oldest; zero if there is none.
    pub oldest: Duration,
}

impl Ledger {
    /// Removes exactly these reports.
    ///
    /// # Errors
    /// If the database cannot be asked; the reports are then published again later, under the same ids.
    pub async fn clear_outbox(&self, batch: &[ReportNumber]) -> Result<(), DbError> {
        let numbers: Vec<i64> = batch.iter().map(|number| number.0).collect();
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&self.sql.clear).await?;
        let sent = std::time::Instant::now();
        client.execute(&statement, &[&numbers]).await?;
        self.observe("clear", batch.len(), sent.elapsed());
        Ok(())
    }

    /// Takes up to `most` reports that are overdue, those of one job in their order; nobody else takes them for the time
    /// `hold`. Searched for from where the [backlog](Self::outbox_backlog) began when it was asked for last.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn owed_reports(&self, most: i32, hold: Duration) -> Result<Vec<Owed>, DbError> {
        let sql = self
            .db
            .sql("SELECT * FROM {s}.owed_reports_v1($1, $2::bigint * interval '1 microsecond', $3)");
        let first = self.outbox_first.load(Ordering::Relaxed);
        let rows = self
            .db
            .client()
            .await?
            .query(&sql, &[&most, &micros(hold), &first])
            .await?;
        rows.iter()
            .map(|row| {
                Ok(Owed {
                    number: ReportNumber(row.try_get("number")?),
                    tenant: row.try_get("tenant")?,
                    id: row.try_get("id")?,
                    sequence: row.try_get("seq")?,
                    json: row.try_get("report")?,
                })
            })
            .collect()
    }

    /// Leaves reports that were taken, and could not be published, to whoever comes first.
    ///
    /// # Errors
    /// If the database cannot be asked; they then rest until the time is over for which they were taken.
    pub async fn leave_reports(&self, batch: &[ReportNumber]) -> Result<(), DbError> {
        if batch.is_empty() {
            return Ok(());
        }
        let numbers: Vec<i64> = batch.iter().map(|number| number.0).collect();
        let sql = self.db.sql("SELECT {s}.leave_reports_v1($1)");
        self.db.client().await?.execute(&sql, &[&numbers]).await?;
        Ok(())
    }

    /// How many reports are owed, counted up to `most` or what other workers ask for, and since when the oldest is, resting or
    /// not. One worker counts for all, not more often than `every` and with a fiftieth of its time at most, but every ten
    /// seconds.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn outbox_backlog(&self, most: i64, every: Duration) -> Result<Backlog, DbError> {
        let sql = self.db.sql(
            "SELECT owed, oldest_us, first_n FROM {s}.outbox_backlog_v1($1, $2::bigint * interval '1 microsecond')",
        );
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&sql).await?;
        let row = client.query_one(&statement, &[&most, &micros(every)]).await?;
        self.outbox_first.store(row.try_get(2)?, Ordering::Relaxed);
        Ok(Backlog {
            owed: row.try_get(0)?,
            oldest: super::slots::wait(row.try_get(1)?),
        })
    }

    /// Looks for reports below the number at which searches begin, so that they begin there: it was drawn long before it was
    /// committed. One worker does that for all, not more often than `every`.
    ///
    /// # Errors
    /// If the database cannot be asked; it is then searched again when that time is over.
    pub async fn find_late_reports(&self, every: Duration) -> Result<(), DbError> {
        let due = self
            .db
            .sql("SELECT {s}.outbox_search_due_v1($1::bigint * interval '1 microsecond')");
        let client = self.db.client().await?;
        let is_due: bool = client.query_one(&due, &[&micros(every)]).await?.try_get(0)?;
        if is_due {
            let search = self.db.sql("SELECT {s}.outbox_search_v1()");
            client.execute(&search, &[]).await?;
        }
        Ok(())
    }
}
