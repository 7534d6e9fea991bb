//! What an operator decides about a job: to cancel it, to let it run now, what became of one that is held.

use deadpool_postgres::Transaction;

use super::Locked;
use crate::db::DbError;
use crate::id::{JobId, TenantId};
use crate::ledger::Ledger;
use crate::report::{RecipientStatus, ReportType};

/// What became of a cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancel {
    /// It will not be sent.
    Cancelled,
    /// It is being sent; cancelled if this attempt does not succeed.
    InFlight,
    /// It is over already.
    TooLate,
    /// Nobody has seen this job yet; it will be cancelled when it comes.
    Noted,
    /// It is held, and may have been sent: that is for [`Ledger::resolve`] to decide.
    Held,
}

/// What became of a release by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ManualRelease {
    /// It runs as soon as its limits allow.
    Released,
    /// It does not wait.
    NotWaiting,
    /// It is held, and may have been sent: that is for [`Ledger::resolve`] to decide.
    Held,
    /// There is no such job.
    Unknown,
}

/// What somebody found out about a held job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The server took it: it is over, as sent.
    Sent,
    /// The server did not take it: it is tried again.
    NotSent,
    /// It is over, as failed, whatever became of it.
    Failed,
}

impl Decision {
    /// The word in the ledger and in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::NotSent => "not_sent",
            Self::Failed => "failed",
        }
    }
}

/// What became of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolved {
    /// It is carried out.
    Done,
    /// The job is not held; its state instead: 0 open, 1 sending, 2 waiting, 3 done, 5 cancelled, 6 dead.
    NotHeld(i16),
    /// There is no such job.
    Unknown,
}

impl Ledger {
    /// Cancels a job.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn cancel(&self, tenant: &TenantId, id: &JobId) -> Result<Cancel, DbError> {
        let mut client = self.db.client().await?;
        let transaction = client.transaction().await?;
        let mut row = self.lock(&transaction, tenant, id).await?;
        if row.is_none() {
            if self.note_cancel(&transaction, tenant, id).await? {
                transaction.commit().await?;
                return Ok(Cancel::Noted);
            }
            // It was admitted in this very moment.
            row = self.lock(&transaction, tenant, id).await?;
        }
        let Some(row) = row else {
            return Ok(Cancel::TooLate);
        };
        let answer = match row.state {
            0 | 2 => {
                let report = row.report(ReportType::Cancelled, "cancelled");
                self.finish(&transaction, &row, report, None).await?;
                Cancel::Cancelled
            }
            1 => {
                let sql = self
                    .db
                    .sql("UPDATE {s}.job SET cancel = true WHERE tenant = $1 AND id = $2");
                transaction
                    .execute(&sql, &[&tenant.as_str(), &id.as_str()])
                    .await?;
                Cancel::InFlight
            }
            4 => Cancel::Held,
            5 => Cancel::Noted,
            _ => Cancel::TooLate,
        };
        transaction.commit().await?;
        Ok(answer)
    }

    /// Leaves a stone in the way of a job that has not come yet; `false` if it has come meanwhile.
    async fn note_cancel(
        &self,
        transaction: &Transaction<'_>,
        tenant: &TenantId,
        id: &JobId,
    ) -> Result<bool, DbError> {
        let sql = self.db.sql(
            "INSERT INTO {s}.job (tenant, id, state, level, account, digest, born, seq, cancel, created_at,
                                  updated_at, finished_at)
             SELECT $1, $2, 5, 2, $1 || '/', ''::bytea, b, b, true, clock_timestamp(), clock_timestamp(), clock_timestamp()
             FROM (SELECT floor(extract(epoch FROM clock_timestamp()))::bigint * 1000 AS b) x
             ON CONFLICT DO NOTHING",
        );
        let inserted = transaction
            .execute(&sql, &[&tenant.as_str(), &id.as_str()])
            .await?;
        Ok(inserted == 1)
    }

    /// Lets a waiting job run now.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn release_by_hand(&self, tenant: &TenantId, id: &JobId) -> Result<ManualRelease, DbError> {
        let mut client = self.db.client().await?;
        let transaction = client.transaction().await?;
        let Some(row) = self.lock(&transaction, tenant, id).await? else {
            return Ok(ManualRelease::Unknown);
        };
        match row.state {
            2 => {}
            4 => return Ok(ManualRelease::Held),
            _ => return Ok(ManualRelease::NotWaiting),
        }
        self.let_go(&transaction, &row).await?;
        transaction.commit().await?;
        Ok(ManualRelease::Released)
    }

    /// Makes a locked job that waits or is held run now.
    async fn let_go(&self, transaction: &Transaction<'_>, row: &Locked) -> Result<(), DbError> {
        let (tenant, id) = (row.tenant.as_str(), row.id.as_str());
        // A held job enters its lane anew; a waiting one keeps its place in it, and how it is counted there. An earlier
        // cancel is overruled. The time that a decision took does not count as one of retries. The first release is noted: a
        // mail that goes before its time is dated by it, at every attempt.
        let sql = self.db.sql(
            "UPDATE {s}.job SET state = CASE WHEN body IS NULL THEN 0 ELSE 2 END, cancel = false,
                 due_at = CASE WHEN state = 2 THEN least(due_at, now()) ELSE now() END,
                 tried_at = CASE WHEN state = 2 THEN tried_at END,
                 properties = CASE WHEN state = 2 THEN jsonb_build_object('released_at', {s}.iso(now())) || properties
                                   ELSE properties END,
                 reason = CASE WHEN state = 2 THEN reason ELSE 2 END, updated_at = clock_timestamp()
             WHERE tenant = $1 AND id = $2",
        );
        transaction.execute(&sql, &[&tenant, &id]).await?;
        let wake = self.db.sql(
            "UPDATE {s}.lane SET next_at = clock_timestamp(), oldest_at = least(oldest_at, now())
             WHERE account = $1 AND level = $2 AND tenant = $3",
        );
        let woken = transaction
            .execute(&wake, &[&row.account, &row.level, &tenant])
            .await?;
        if woken == 0 {
            let enter = self.db.sql("SELECT {s}.touch_lanes(ARRAY[$1], ARRAY[$2])");
            transaction.execute(&enter, &[&tenant, &id]).await?;
        }
        Ok(())
    }

    /// Decides about a job that is held because nobody knows whether it was sent. Noted with who decided.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn resolve(
        &self,
        tenant: &TenantId,
        id: &JobId,
        decision: Decision,
        by: &str,
    ) -> Result<Resolved, DbError> {
        let mut client = self.db.client().await?;
        let transaction = client.transaction().await?;
        let Some(mut row) = self.lock(&transaction, tenant, id).await? else {
            return Ok(Resolved::Unknown);
        };
        if row.state != 4 {
            return Ok(Resolved::NotHeld(row.state));
        }
        let (kind, status) = match decision {
            Decision::Sent => (ReportType::Sent, RecipientStatus::Accepted),
            Decision::Failed => (ReportType::Failed, RecipientStatus::Refused),
            Decision::NotSent => (ReportType::Deferred, RecipientStatus::Pending),
        };
        if decision == Decision::NotSent {
            self.let_go(&transaction, &row).await?;
        } else {
            for open in row.recipients.iter_mut().filter(|r| r.is_open()) {
                open.record(status, None);
            }
            let mut report = row.report(kind, "resolved_by_hand");
            report.data.detail = Some(format!("decided by hand: {}", decision.as_str()));
            self.finish(&transaction, &row, report, None).await?;
        }
        let sql = self.db.sql(
            "UPDATE {s}.job SET resolved = $3, resolved_by = $4, resolved_at = clock_timestamp()
             WHERE tenant = $1 AND id = $2",
        );
        transaction
            .execute(&sql, &[&tenant.as_str(), &id.as_str(), &decision.as_str(), &by])
            .await?;
        transaction.commit().await?;
        Ok(Resolved::Done)
    }
}
