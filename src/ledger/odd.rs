//! The rare ways a job changes: somebody cancels or releases it by hand, a worker that lost its lease brings an
//! acceptance, an uncertain send is found. Each is one transaction over one locked row.

use std::sync::Arc;

use deadpool_postgres::Transaction;
use jiff::Timestamp;
use serde_json::Value;

use super::outbox::ReportNumber;
use super::{Ledger, Row, recipients};
use crate::db::DbError;
use crate::id::{JobId, TenantId};
use crate::report::{
    RecipientResult, RecipientStatus, Report, ReportData, ReportMessage, ReportType, event_id,
};

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
}

/// What became of a release by hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ManualRelease {
    /// It runs as soon as its limits allow.
    Released,
    /// It does not wait.
    NotWaiting,
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

/// What is told about a job that is buried.
pub const CRASH_LOOP: &str = "workers crashed over this job again and again; it is in the dead letters";

/// A locked row, as far as these ways need it.
struct Locked {
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
            0 | 2 | 4 => {
                let report = manual_report(&row, tenant, id, ReportType::Cancelled, "cancelled");
                self.finish(&transaction, (tenant, id), &report.into(), None)
                    .await?;
                self.leave_lane(&transaction, &row, tenant).await?;
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
            5 => Cancel::Noted,
            _ => Cancel::TooLate,
        };
        transaction.commit().await?;
        Ok(answer)
    }

    /// Lets a waiting (or held) job run now.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn release_by_hand(&self, tenant: &TenantId, id: &JobId) -> Result<ManualRelease, DbError> {
        let mut client = self.db.client().await?;
        let transaction = client.transaction().await?;
        let Some(row) = self.lock(&transaction, tenant, id).await? else {
            return Ok(ManualRelease::Unknown);
        };
        if row.state != 2 && row.state != 4 {
            return Ok(ManualRelease::NotWaiting);
        }
        self.let_go(&transaction, &row, tenant, id).await?;
        transaction.commit().await?;
        Ok(ManualRelease::Released)
    }

    /// Makes a locked job that waits or is held run now.
    async fn let_go(
        &self,
        transaction: &Transaction<'_>,
        row: &Locked,
        tenant: &TenantId,
        id: &JobId,
    ) -> Result<(), DbError> {
        // A held job enters its lane anew; a waiting one keeps its place in it, and how it is counted there. An earlier
        // cancel is overruled.
        let sql = self.db.sql(
            "UPDATE {s}.job SET state = CASE WHEN body IS NULL THEN 0 ELSE 2 END, cancel = false, due_at = now(),
                 reason = CASE WHEN state = 2 THEN reason ELSE 2 END, updated_at = clock_timestamp()
             WHERE tenant = $1 AND id = $2",
        );
        transaction
            .execute(&sql, &[&tenant.as_str(), &id.as_str()])
            .await?;
        let wake = self.db.sql(
            "UPDATE {s}.lane SET next_at = clock_timestamp(), oldest_at = least(oldest_at, now())
             WHERE account = $1 AND level = $2 AND tenant = $3",
        );
        let woken = transaction
            .execute(&wake, &[&row.account, &row.level, &tenant.as_str()])
            .await?;
        if woken == 0 {
            let enter = self.db.sql("SELECT {s}.touch_lanes(ARRAY[$1], ARRAY[$2])");
            transaction
                .execute(&enter, &[&tenant.as_str(), &id.as_str()])
                .await?;
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
            self.let_go(&transaction, &row, tenant, id).await?;
        } else {
            for open in row.recipients.iter_mut().filter(|r| r.is_open()) {
                open.record(status, None);
            }
            let mut report = manual_report(&row, tenant, id, kind, "resolved_by_hand");
            report.data.detail = Some(format!("decided by hand: {}", decision.as_str()));
            self.finish(&transaction, (tenant, id), &report.into(), None)
                .await?;
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

    /// Ends a leased job whose dead letter has just been confirmed: it stays known, and begins anew only when it is
    /// replayed. `complete` adds to the report what only the job itself tells. Returns the report and its number in the
    /// outbox; `None`: the lease is lost.
    ///
    /// # Errors
    /// If the database cannot be asked. Repeating the call changes nothing.
    pub async fn dead_letter(
        &self,
        leased: &Row,
        complete: impl FnOnce(&mut ReportData) + Send,
    ) -> Result<Option<(ReportMessage, ReportNumber)>, DbError> {
        let (tenant, id) = (&leased.tenant, &leased.id);
        let mut client = self.db.client().await?;
        let transaction = client.transaction().await?;
        let Some(row) = self.lock(&transaction, tenant, id).await? else {
            return Ok(None);
        };
        let epoch = leased.lease.epoch.number();
        if row.state != 1 || row.lease != (Some(epoch), Some(leased.lease.claim)) {
            return Ok(None);
        }
        let mut report = manual_report(&row, tenant, id, ReportType::Failed, "crash_loop");
        report.data.detail = Some(CRASH_LOOP.to_owned());
        complete(&mut report.data);
        let report = ReportMessage::from(report);
        let number = self
            .finish(&transaction, (tenant, id), &report, Some(epoch))
            .await?;
        let sql = self.db.sql(
            "UPDATE {s}.job SET state = 6, marked = false, last_error = $3 WHERE tenant = $1 AND id = $2",
        );
        let error = format!("crash_loop: {CRASH_LOOP}");
        transaction
            .execute(&sql, &[&tenant.as_str(), &id.as_str(), &error])
            .await?;
        transaction.commit().await?;
        Ok(Some((report, number)))
    }

    /// A worker lost its lease, but the server took the mail for some recipients: that is true whoever holds the lease.
    /// `results` has one entry per recipient of the job; what is not an acceptance is dropped and counts as untried.
    /// Returns whether the job was final already, which makes this send a duplicate.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn merge_acceptance(
        &self,
        tenant: &TenantId,
        id: &JobId,
        results: &[RecipientResult],
        message_id: &str,
    ) -> Result<bool, DbError> {
        let mut client = self.db.client().await?;
        let transaction = client.transaction().await?;
        let Some(mut row) = self.lock(&transaction, tenant, id).await? else {
            return Ok(true);
        };
        if row.state == 3 {
            return Ok(true);
        }
        row.recipients = with_acceptances(row.recipients, results);
        row.message_id = Some(message_id.to_owned());
        if row.recipients.iter().any(RecipientResult::is_open) {
            let json = serde_json::to_value(&row.recipients).unwrap_or_default();
            // Who holds the lease now does not know: see `settle_v1` for what becomes of its outcome.
            let sql = self.db.sql(
                "UPDATE {s}.job SET recipients = $3, message_id = $4, merged = state = 1
                 WHERE tenant = $1 AND id = $2",
            );
            transaction
                .execute(&sql, &[&tenant.as_str(), &id.as_str(), &json, &message_id])
                .await?;
        } else {
            let report = manual_report(&row, tenant, id, ReportType::Sent, "accepted_after_lost_lease");
            self.finish(&transaction, (tenant, id), &report.into(), None)
                .await?;
            self.leave_lane(&transaction, &row, tenant).await?;
        }
        transaction.commit().await?;
        Ok(false)
    }

    /// Holds a job whose worker died in its final write.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn hold_uncertain(&self, tenant: &TenantId, id: &JobId) -> Result<(), DbError> {
        self.hold_marked(tenant, id, None).await
    }

    /// Holds a job that is marked in its final write, if its epoch is dead or this (epoch, claim) is its lease.
    pub(super) async fn hold_marked(
        &self,
        tenant: &TenantId,
        id: &JobId,
        lease: Option<(i64, i64)>,
    ) -> Result<(), DbError> {
        let mut client = self.db.client().await?;
        let transaction = client.transaction().await?;
        let Some(row) = self.lock(&transaction, tenant, id).await? else {
            return Ok(());
        };
        if row.state != 1 {
            return Ok(());
        }
        let mut report = manual_report(
            &row,
            tenant,
            id,
            ReportType::Uncertain,
            "worker_died_while_sending",
        );
        report.data.uncertain_attempts += 1;
        let report = ReportMessage::from(report);
        let number = self.owe(&transaction, (tenant, id), &report, None).await?;
        let sql = self.db.sql(
            "UPDATE {s}.job SET state = 4, claim = NULL, phase = 0, marked = false, slot_at = NULL, slot_cost = NULL, merged = false,
                 reason = NULL, uncertain = uncertain + 1, seq = $3, report = $4, updated_at = clock_timestamp()
             WHERE tenant = $1 AND id = $2 AND phase = 1
                 AND ((epoch = $5 AND claim = $6)
                      OR NOT EXISTS (SELECT FROM {s}.worker w WHERE w.epoch = job.epoch AND NOT w.dead))",
        );
        let (epoch, claim) = lease.unzip();
        let held = transaction
            .execute(
                &sql,
                &[
                    &tenant.as_str(),
                    &id.as_str(),
                    &report.data.sequence,
                    &number.0,
                    &epoch,
                    &claim,
                ],
            )
            .await?;
        // Else the report goes with the transaction.
        if held > 0 {
            transaction.commit().await?;
        }
        Ok(())
    }

    async fn lock(
        &self,
        transaction: &Transaction<'_>,
        tenant: &TenantId,
        id: &JobId,
    ) -> Result<Option<Locked>, DbError> {
        let sql = self.db.sql(
            "SELECT state, epoch, claim, seq, attempt, account, level, coalesce(reason IN (1, 4, 7), false) AS in_order,
                    message_id, batch, recipients, properties, uncertain
             FROM {s}.job WHERE tenant = $1 AND id = $2 FOR UPDATE",
        );
        let Some(row) = transaction
            .query_opt(&sql, &[&tenant.as_str(), &id.as_str()])
            .await?
        else {
            return Ok(None);
        };
        Ok(Some(Locked {
            state: row.try_get("state")?,
            lease: (row.try_get("epoch")?, row.try_get("claim")?),
            sequence: row.try_get("seq")?,
            attempts: row.try_get("attempt")?,
            account: row.try_get("account")?,
            level: row.try_get("level")?,
            in_order: row.try_get("in_order")?,
            message_id: row.try_get("message_id")?,
            batch: row.try_get("batch")?,
            recipients: recipients(row.try_get("recipients")?),
            properties: row.try_get::<_, Option<Value>>("properties")?.unwrap_or_default(),
            uncertain: row.try_get("uncertain")?,
        }))
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

    /// Puts a report of a locked job into the outbox. `first`: whose worker publishes it; for a while it is left to that.
    async fn owe(
        &self,
        transaction: &Transaction<'_>,
        (tenant, id): (&TenantId, &JobId),
        report: &ReportMessage,
        first: Option<i64>,
    ) -> Result<ReportNumber, DbError> {
        let sql = self.db.sql(
            "INSERT INTO {s}.outbox (tenant, id, seq, epoch, due_at, created_at, body)
             VALUES ($1, $2, $3, $4::bigint, clock_timestamp() + CASE WHEN $4::bigint IS NULL THEN interval '0'
                     ELSE interval '30 seconds' END, clock_timestamp(), $5) RETURNING n",
        );
        let row = transaction
            .query_one(
                &sql,
                &[
                    &tenant.as_str(),
                    &id.as_str(),
                    &report.data.sequence,
                    &first,
                    &report.json(),
                ],
            )
            .await?;
        Ok(ReportNumber(row.try_get(0)?))
    }

    async fn finish(
        &self,
        transaction: &Transaction<'_>,
        (tenant, id): (&TenantId, &JobId),
        report: &ReportMessage,
        first: Option<i64>,
    ) -> Result<ReportNumber, DbError> {
        let number = self.owe(transaction, (tenant, id), report, first).await?;
        let sql = self.db.sql(
            "UPDATE {s}.job SET state = 3, claim = CASE WHEN state <> 1 THEN claim END, outcome = $3, seq = $4,
                 recipients = $5, message_id = $6, body = NULL, body_size = NULL, due_at = NULL, reason = NULL,
                 slot_at = NULL, slot_cost = NULL, phase = 0, merged = false,
                 finished_at = clock_timestamp(), updated_at = clock_timestamp(), report = $7
             WHERE tenant = $1 AND id = $2",
        );
        let recipients = serde_json::to_value(&report.data.recipients).unwrap_or_default();
        transaction
            .execute(
                &sql,
                &[
                    &tenant.as_str(),
                    &id.as_str(),
                    &report.kind,
                    &report.data.sequence,
                    &recipients,
                    &report.data.message_id.as_deref(),
                    &number.0,
                ],
            )
            .await?;
        Ok(number)
    }

    /// One waiting job less in its lane; the lane itself goes when its turn finds it empty.
    async fn leave_lane(
        &self,
        transaction: &Transaction<'_>,
        row: &Locked,
        tenant: &TenantId,
    ) -> Result<(), DbError> {
        if row.state != 2 {
            return Ok(());
        }
        let sql = self.db.sql(
            "UPDATE {s}.lane SET fifo = greatest(fifo - $4, 0), next_at = least(next_at, clock_timestamp())
             WHERE account = $1 AND level = $2 AND tenant = $3",
        );
        let counted = i64::from(row.in_order);
        transaction
            .execute(&sql, &[&row.account, &row.level, &tenant.as_str(), &counted])
            .await?;
        Ok(())
    }
}

/// What is known of each recipient: the acceptances among `results` on top of `known`, which is empty before the first
/// settled attempt.
fn with_acceptances(known: Vec<RecipientResult>, results: &[RecipientResult]) -> Vec<RecipientResult> {
    let accepted = |r: &&RecipientResult| r.status == RecipientStatus::Accepted;
    if known.is_empty() {
        let untried = |r: &RecipientResult| RecipientResult::pending(&r.address);
        return results
            .iter()
            .map(|r| if accepted(&r) { r.clone() } else { untried(r) })
            .collect();
    }
    known
        .into_iter()
        .map(|theirs| {
            let mine = results
                .iter()
                .filter(accepted)
                .find(|mine| mine.address == theirs.address);
            mine.cloned().unwrap_or(theirs)
        })
        .collect()
}

fn manual_report(row: &Locked, tenant: &TenantId, id: &JobId, kind: ReportType, reason: &str) -> Report {
    let sequence = row.sequence + 1;
    let accepted = row
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
        && row
            .recipients
            .iter()
            .any(|r| r.status != RecipientStatus::Accepted);
    let correlation = row.properties.get("correlation_id").and_then(Value::as_str);
    Report {
        id: event_id(tenant.as_str(), "job", id.as_str(), &sequence.to_string()),
        kind: kind.as_str(),
        timestamp: Timestamp::now(),
        data: ReportData {
            job: Some(id.clone()),
            tenant: tenant.clone(),
            account: own_account(row, tenant).map(Arc::from),
            sender: None,
            attempt: row.attempts.max(0) as u32,
            message_id: row.message_id.as_deref().map(Arc::from),
            recipients: row.recipients.clone(),
            partial,
            reason: Some(reason.to_owned()),
            detail: None,
            class: None,
            fault: None,
            stage: None,
            errors: Vec::new(),
            is_final: kind.is_final(),
            sequence,
            correlation_id: Some(correlation.unwrap_or(id.as_str()).into()),
            traceparent: row
                .properties
                .get("traceparent")
                .and_then(Value::as_str)
                .map(str::to_owned),
            next_attempt_at: None,
            uncertain_attempts: row.uncertain.max(0) as u32,
            timings: None,
            batch: row.batch.clone(),
            tags: tags(&row.properties),
            metadata: row.properties.get("metadata").filter(|m| !m.is_null()).cloned(),
            links: Vec::new(),
        },
    }
}

/// The account's name, if it is the tenant's own and stored.
fn own_account(row: &Locked, tenant: &TenantId) -> Option<String> {
    let (owner, account) = row.account.split_once('/')?;
    (owner == tenant.as_str() && !account.is_empty() && !account.starts_with('~')).then(|| account.to_owned())
}

fn tags(properties: &Value) -> Vec<String> {
    let list = properties.get("tags").and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(|tag| tag.as_str().map(str::to_owned))
        .collect()
}
