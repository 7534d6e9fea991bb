//! What is over for long enough is forgotten: an id that comes again then is a new job.

use std::time::Duration;

use jiff::Timestamp;

use super::{Ledger, micros};
use crate::db::DbError;

/// Jobs deleted in one statement: short transactions, which block nobody.
const CHUNK: i64 = 2000;
/// Between two of them, so that mail comes first.
const REST: Duration = Duration::from_millis(100);

impl Ledger {
    /// Forgets all jobs that have been final for longer than `retention`; returns how many. A report that one still owes
    /// stays owed.
    ///
    /// # Errors
    /// If the database cannot be asked; what went before stays gone.
    pub async fn forget_old(&self, retention: Duration) -> Result<u64, DbError> {
        // The time of the statement, not that of the clock: what may change under a statement is not looked up in an index.
        let sql = self.db.sql(
            "WITH gone AS (
                 DELETE FROM {s}.job WHERE ctid = ANY (ARRAY(
                     SELECT ctid FROM {s}.job WHERE state IN (3, 5, 6) AND finished_at >= coalesce($3::timestamptz, '-infinity')
                         AND finished_at < statement_timestamp() - $1::bigint * interval '1 microsecond'
                     ORDER BY finished_at LIMIT $2 FOR UPDATE SKIP LOCKED))
                 RETURNING finished_at)
             SELECT count(*), max(finished_at) FROM gone",
        );
        let mut forgotten = 0;
        // The next search begins where this one ended, and not among the index entries of those just gone.
        let mut since: Option<Timestamp> = None;
        loop {
            let client = self.db.client().await?;
            let row = client
                .query_one(&sql, &[&micros(retention), &CHUNK, &since])
                .await?;
            drop(client);
            let gone: i64 = row.try_get(0)?;
            forgotten += gone.unsigned_abs();
            if gone < CHUNK {
                return Ok(forgotten);
            }
            since = row.try_get(1)?;
            tokio::time::sleep(REST).await;
        }
    }
}
