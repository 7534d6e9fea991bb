//! What a server took from a worker that had lost its lease by then.

use crate::db::DbError;
use crate::id::{JobId, TenantId};
use crate::ledger::Ledger;
use crate::report::{RecipientResult, RecipientStatus, ReportType};

impl Ledger {
    /// A worker lost its lease, but the server took the mail for some recipients: that is true whoever holds the lease.
    /// `results` has one entry per recipient of the job; what is not an acceptance is dropped and counts as untried.
    /// `attempts`: how many that worker knows of, its own included. Returns whether the job was final already, which makes this send a duplicate.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn merge_acceptance(
        &self,
        tenant: &TenantId,
        id: &JobId,
        results: &[RecipientResult],
        message_id: &str,
        attempts: u32,
    ) -> Result<bool, DbError> {
        let mut client = self.db.client().await?;
        let transaction = client.transaction().await?;
        let Some(mut row) = self.lock(&transaction, tenant, id).await? else {
            return Ok(true);
        };
        if row.state == 3 {
            return Ok(true);
        }
        let known = row.recipients.clone();
        row.recipients = with_acceptances(row.recipients, results);
        row.message_id = Some(message_id.to_owned());
        row.attempts = row.attempts.max(attempts as i32);
        if row.recipients.iter().any(RecipientResult::is_open) {
            let json = serde_json::to_value(&row.recipients).unwrap_or_default();
            // Who holds the lease now does not know what is new: see `settle_v1` for what becomes of its outcome.
            let is_new = row.recipients != known;
            let sql = self.db.sql(
                "UPDATE {s}.job SET recipients = $3, message_id = $4, attempt = $5, merged = state = 1 AND (merged OR $6)
                 WHERE tenant = $1 AND id = $2",
            );
            transaction
                .execute(
                    &sql,
                    &[
                        &tenant.as_str(),
                        &id.as_str(),
                        &json,
                        &message_id,
                        &row.attempts,
                        &is_new,
                    ],
                )
                .await?;
        } else {
            let report = row.report(ReportType::Sent, "accepted_after_lost_lease");
            self.finish(&transaction, &row, report, None).await?;
        }
        transaction.commit().await?;
        Ok(false)
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
