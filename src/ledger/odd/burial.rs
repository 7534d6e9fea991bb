//! The end of a job over which workers crash.

use crate::db::DbError;
use crate::ledger::outbox::ReportNumber;
use crate::ledger::{Ledger, Row};
use crate::report::{ReportData, ReportMessage, ReportType};

/// What is told about a job that is buried.
pub const CRASH_LOOP: &str = "workers crashed over this job again and again; it is in the dead letters";

impl Ledger {
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
        let mut report = row.report(ReportType::Failed, "crash_loop");
        report.data.detail = Some(CRASH_LOOP.to_owned());
        complete(&mut report.data);
        let told = self.finish(&transaction, &row, report, Some(epoch)).await?;
        let sql = self.db.sql(
            "UPDATE {s}.job SET state = 6, marked = false, last_error = $3 WHERE tenant = $1 AND id = $2",
        );
        let error = format!("crash_loop: {CRASH_LOOP}");
        transaction
            .execute(&sql, &[&tenant.as_str(), &id.as_str(), &error])
            .await?;
        transaction.commit().await?;
        Ok(Some(told))
    }
}
