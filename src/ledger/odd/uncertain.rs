//! Jobs whose worker died in the final write: held, since nobody knows whether they were sent.

use crate::db::DbError;
use crate::id::{JobId, TenantId};
use crate::ledger::Ledger;
use crate::report::{ReportMessage, ReportType};

impl Ledger {
    /// Holds a job whose worker died in its final write.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn hold_uncertain(&self, tenant: &TenantId, id: &JobId) -> Result<(), DbError> {
        self.hold_marked(tenant, id, None).await
    }

    /// Holds a job that is marked in its final write, if its epoch is dead or this (epoch, claim) is its lease.
    pub(in crate::ledger) async fn hold_marked(
        &self,
        tenant: &TenantId,
        id: &JobId,
        lease: Option<(i64, i64)>,
    ) -> Result<(), DbError> {
        let mut client = self.db.client().await?;
        let transaction = client.transaction().await?;
        let Some(mut row) = self.lock(&transaction, tenant, id).await? else {
            return Ok(());
        };
        if row.state != 1 {
            return Ok(());
        }
        // The attempt that it was marked in.
        row.attempts += 1;
        let mut report = row.report(ReportType::Uncertain, "worker_died_while_sending");
        report.data.uncertain_attempts += 1;
        let report = ReportMessage::from(report);
        let number = self.owe(&transaction, &row, &report, None).await?;
        let sql = self.db.sql(
            "UPDATE {s}.job SET state = 4, claim = NULL, phase = 0, marked = false, slot_at = NULL, slot_cost = NULL, merged = false,
                 reason = NULL, attempt = attempt + 1, uncertain = uncertain + 1, seq = $3, report = $4, updated_at = clock_timestamp()
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
            self.tell_held(tenant, id);
        }
        Ok(())
    }

    /// No attempt of this process ended so: nothing else counts or logs it.
    fn tell_held(&self, tenant: &TenantId, id: &JobId) {
        self.metrics.jobs.with_label_values(&["uncertain"]).inc();
        tracing::warn!(
            job = %id,
            tenant = %tenant,
            "its worker was lost in the final write, and nobody knows whether it was sent: held until somebody decides \
             (postroom job resolve)"
        );
    }
}
