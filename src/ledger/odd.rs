//! The rare ways a job changes: somebody cancels or releases it by hand, a worker that lost its lease brings an
//! acceptance, an uncertain send is found, one that crashes workers is buried. Each is one transaction over one locked row.

mod acceptance;
mod burial;
mod operators;
mod uncertain;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use deadpool_postgres::Transaction;
use jiff::Timestamp;
use serde_json::Value;

use super::outbox::ReportNumber;
use super::{Ledger, recipients};
use crate::config::JobLimits;
use crate::db::DbError;
use crate::id::{AccountKey, JobId, TenantId};
use crate::job::decode::{self, Incoming};
use crate::report::{
    RecipientResult, RecipientStatus, Report, ReportData, ReportMessage, ReportType, event_id,
};

pub use burial::CRASH_LOOP;
pub use operators::{Cancel, Decision, ManualRelease, Resolved};

/// A locked row, as far as these ways need it.
struct Locked {
    tenant: TenantId,
    id: JobId,
    state: i16,
    /// Epoch and claim.
    lease: (Option<i64>, Option<i64>),
    sequence: i64,
    attempts: i32,
    account: String,
    level: i16,
    /// Whether it is counted among those that keep their order in the lane.
    in_order: bool,
    message_id: Option<String>,
    batch: Option<String>,
    recipients: Vec<RecipientResult>,
    properties: Value,
    uncertain: i32,
}

impl Ledger {
    async fn lock(
        &self,
        transaction: &Transaction<'_>,
        tenant: &TenantId,
        id: &JobId,
    ) -> Result<Option<Locked>, DbError> {
        let sql = self.db.sql(
            "SELECT state, epoch, claim, seq, attempt, account, level, coalesce(reason IN (1, 4, 7), false) AS in_order,
                    message_id, batch, recipients, properties, uncertain,
                    CASE WHEN recipients IS NULL AND state IN (2, 4) THEN body END AS untried
             FROM {s}.job WHERE tenant = $1 AND id = $2 FOR UPDATE",
        );
        let Some(row) = transaction
            .query_opt(&sql, &[&tenant.as_str(), &id.as_str()])
            .await?
        else {
            return Ok(None);
        };
        let properties = row.try_get::<_, Option<Value>>("properties")?.unwrap_or_default();
        let recipients = match row.try_get::<_, Option<&[u8]>>("untried")? {
            Some(body) => untried(body, &properties),
            None => recipients(row.try_get("recipients")?),
        };
        Ok(Some(Locked {
            tenant: tenant.clone(),
            id: id.clone(),
            state: row.try_get("state")?,
            lease: (row.try_get("epoch")?, row.try_get("claim")?),
            sequence: row.try_get("seq")?,
            attempts: row.try_get("attempt")?,
            account: row.try_get("account")?,
            level: row.try_get("level")?,
            in_order: row.try_get("in_order")?,
            message_id: row.try_get("message_id")?,
            batch: row.try_get("batch")?,
            recipients,
            properties,
            uncertain: row.try_get("uncertain")?,
        }))
    }

    /// Puts a report of a locked job into the outbox. `first`: whose worker publishes it; for a while it is left to that.
    async fn owe(
        &self,
        transaction: &Transaction<'_>,
        row: &Locked,
        report: &ReportMessage,
        first: Option<i64>,
    ) -> Result<ReportNumber, DbError> {
        let sql = self.db.sql(
            "INSERT INTO {s}.outbox (tenant, id, seq, epoch, due_at, created_at, body)
             VALUES ($1, $2, $3, $4::bigint, clock_timestamp() + CASE WHEN $4::bigint IS NULL THEN interval '0'
                     ELSE interval '30 seconds' END, clock_timestamp(), $5) RETURNING n",
        );
        let number = transaction
            .query_one(
                &sql,
                &[
                    &row.tenant.as_str(),
                    &row.id.as_str(),
                    &report.data.sequence,
                    &first,
                    &report.json(),
                ],
            )
            .await?;
        Ok(ReportNumber(number.try_get(0)?))
    }

    /// Ends a locked job with this report, which is owed from now on. `first`: as for [`Self::owe`].
    async fn finish(
        &self,
        transaction: &Transaction<'_>,
        row: &Locked,
        report: Report,
        first: Option<i64>,
    ) -> Result<(ReportMessage, ReportNumber), DbError> {
        let report = ReportMessage::from(report);
        let number = self.owe(transaction, row, &report, first).await?;
        let sql = self.db.sql(
            "UPDATE {s}.job SET state = 3, claim = CASE WHEN state <> 1 THEN claim END, outcome = $3, seq = $4,
                 recipients = $5, message_id = $6, body = NULL, body_size = NULL, due_at = NULL, reason = NULL,
                 slot_at = NULL, slot_cost = NULL, phase = 0, merged = false, attempt = $8,
                 finished_at = clock_timestamp(), updated_at = clock_timestamp(), report = $7
             WHERE tenant = $1 AND id = $2",
        );
        let recipients = serde_json::to_value(&report.data.recipients).unwrap_or_default();
        transaction
            .execute(
                &sql,
                &[
                    &row.tenant.as_str(),
                    &row.id.as_str(),
                    &report.kind,
                    &report.data.sequence,
                    &recipients,
                    &report.data.message_id.as_deref(),
                    &number.0,
                    &row.attempts,
                ],
            )
            .await?;
        self.leave_lane(transaction, row).await?;
        Ok((report, number))
    }

    /// One waiting job less in its lane; the lane itself goes when its turn finds it empty.
    async fn leave_lane(&self, transaction: &Transaction<'_>, row: &Locked) -> Result<(), DbError> {
        if row.state != 2 {
            return Ok(());
        }
        let sql = self.db.sql(
            "UPDATE {s}.lane SET fifo = greatest(fifo - $4, 0), next_at = least(next_at, clock_timestamp())
             WHERE account = $1 AND level = $2 AND tenant = $3",
        );
        let counted = i64::from(row.in_order);
        transaction
            .execute(&sql, &[&row.account, &row.level, &row.tenant.as_str(), &counted])
            .await?;
        Ok(())
    }
}

impl Locked {
    /// The next report of the job.
    fn report(&self, kind: ReportType, reason: &str) -> Report {
        let sequence = self.sequence + 1;
        let accepted = self
            .recipients
            .iter()
            .any(|r| r.status == RecipientStatus::Accepted);
        // Somebody has it already: whatever ends the job, that is what is true.
        let kind = if accepted && matches!(kind, ReportType::Cancelled | ReportType::Failed) {
            ReportType::Sent
        } else {
            kind
        };
        let partial = accepted
            && self
                .recipients
                .iter()
                .any(|r| r.status != RecipientStatus::Accepted);
        let correlation = self.properties.get("correlation_id").and_then(Value::as_str);
        Report {
            id: event_id(
                self.tenant.as_str(),
                "job",
                self.id.as_str(),
                &sequence.to_string(),
            ),
            kind: kind.as_str(),
            timestamp: Timestamp::now(),
            data: ReportData {
                job: Some(self.id.clone()),
                tenant: self.tenant.clone(),
                account: AccountKey::from_stored(&self.account)
                    .stored_by(&self.tenant)
                    .map(Arc::from),
                sender: None,
                attempt: self.attempts.max(0) as u32,
                message_id: self.message_id.as_deref().map(Arc::from),
                recipients: self.recipients.clone(),
                partial,
                reason: Some(reason.to_owned()),
                detail: None,
                class: None,
                fault: None,
                stage: None,
                errors: Vec::new(),
                is_final: kind.is_final(),
                sequence,
                correlation_id: Some(correlation.unwrap_or(self.id.as_str()).into()),
                traceparent: self
                    .properties
                    .get("traceparent")
                    .and_then(Value::as_str)
                    .map(str::to_owned),
                next_attempt_at: None,
                uncertain_attempts: self.uncertain.max(0) as u32,
                timings: None,
                batch: self.batch.clone(),
                tags: tags(&self.properties),
                metadata: self.properties.get("metadata").filter(|m| !m.is_null()).cloned(),
                links: Vec::new(),
            },
        }
    }
}

/// Whom a stored job is for of which nobody was tried yet; nobody if it cannot be read.
fn untried(body: &[u8], properties: &Value) -> Vec<RecipientResult> {
    let incoming = Incoming {
        body,
        contract: properties.get("contract").and_then(Value::as_str),
        ..Incoming::default()
    };
    // To read it may be what crashes workers.
    let read = || decode::decode(&incoming, &JobLimits::STORED).map(|job| job.all_pending());
    let read = std::panic::catch_unwind(AssertUnwindSafe(read));
    read.ok().and_then(Result::ok).unwrap_or_default()
}

fn tags(properties: &Value) -> Vec<String> {
    let list = properties.get("tags").and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(|tag| tag.as_str().map(str::to_owned))
        .collect()
}
