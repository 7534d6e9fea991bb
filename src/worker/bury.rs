//! Dead letters: what cannot be a job goes there with the reason, and its tenant is told. Dead letter confirmed, report
//! confirmed, then the acknowledgement: nothing is dropped on the way.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::Worker;
use super::arrival::{Arrival, incoming, storable, told};
use crate::broker::{DeadLetter, Delivery, PublishError};
use crate::directory::overrides;
use crate::fail_point::{self, Point};
use crate::id::{JobId, TenantId};
use crate::job::decode::{self, Rejection};
use crate::ledger::batches::pauses;
use crate::report::{FieldError, Report, ReportData, ReportType, event_id};

impl Worker {
    /// Buries a decoded job that cannot be taken: another content under a known id, or one the database refuses.
    pub fn bury(self: &Arc<Self>, arrival: Arrival, reason: &'static str, detail: &str) {
        let worker = Arc::clone(self);
        let detail = detail.to_owned();
        self.tasks.spawn(async move {
            let job = &arrival.job;
            tracing::warn!(job = %job.id, tenant = %job.tenant, reason, "dead-lettered: {detail}");
            let (tenant, id) = (job.tenant.clone(), job.id.clone());
            let errors = vec![FieldError {
                pointer: "/id".to_owned(),
                message: detail.clone(),
            }];
            // Not final: the first job under this id stands, and has its own reports.
            let report = rejection_report(&tenant, Some(&id), reason, errors, &arrival.delivery, false);
            let death = Death {
                reason,
                detail: &detail,
                tenant: Some(&tenant),
                id: Some(&id),
                report: Some(report),
            };
            worker.bury_with(arrival.delivery, death, &arrival.ended).await;
        });
    }

    pub(super) async fn bury_rejected(
        &self,
        delivery: Delivery,
        rejection: Rejection,
        ended: &CancellationToken,
    ) {
        let reason = rejection.reason.as_str();
        let detail = rejection.to_string();
        let tenant = told(&rejection);
        let report = tenant.map(|tenant| {
            let errors = rejection.errors.clone();
            rejection_report(tenant, rejection.id.as_ref(), reason, errors, &delivery, true)
        });
        let death = Death {
            reason,
            detail: &detail,
            tenant,
            id: rejection.id.as_ref(),
            report,
        };
        self.bury_with(delivery, death, ended).await;
    }

    /// Dead letter, report, acknowledgement; each only when the one before is confirmed.
    async fn bury_with(&self, delivery: Delivery, death: Death<'_>, ended: &CancellationToken) {
        let (body, sealed) = self.harmless_body(&delivery, death.tenant.zip(death.id));
        let letter = DeadLetter {
            reason: death.reason,
            detail: death.detail,
            tenant: death.tenant.map(TenantId::as_str),
            body: body.as_deref(),
            sealed,
        };
        let mut waits = pauses();
        while let Err(error) = self
            .publisher
            .dead_letter(&self.topology, &delivery, &letter)
            .await
        {
            if wait_again(&error, &mut waits, ended).await {
                return;
            }
        }
        fail_point::hit(Point::DeadLettered, death.id.map(JobId::as_str));
        if let Some(report) = death.report {
            while let Err(error) = self.publish_report(&report).await {
                if wait_again(&error, &mut waits, ended).await {
                    return;
                }
            }
        }
        delivery.receipt.ack();
    }

    /// What of the body may lie in a queue: a plain override sealed, under the job's name so that it opens when the job
    /// is replayed; the whole sealed if the job has no readable name, or it cannot be read or changed in place, and may
    /// hold a secret. `None`: as it came.
    fn harmless_body(
        &self,
        delivery: &Delivery,
        job: Option<(&TenantId, &JobId)>,
    ) -> (Option<Vec<u8>>, bool) {
        let keys = self.pipeline.keys.encryption.current();
        let whole = || {
            (
                Some(keys.seal(&delivery.body, super::DEAD_BODY).into_bytes()),
                true,
            )
        };
        let Ok(plain) = decode::inflate(&incoming(delivery), &self.limits) else {
            return whole();
        };
        if !decode::may_hold_secret(&plain) {
            return (None, false);
        }
        let Some((tenant, id)) = job else {
            return whole();
        };
        let aad = overrides::aad(tenant, id);
        match decode::seal_override(&plain, |secret| keys.seal(secret, &aad)) {
            Ok(Cow::Owned(changed))
                if matches!(plain, Cow::Borrowed(_)) && !decode::may_hold_other_secret(&changed) =>
            {
                (Some(changed), false)
            }
            _ => whole(),
        }
    }
}

/// Why something is buried, and who is told.
struct Death<'a> {
    reason: &'static str,
    detail: &'a str,
    tenant: Option<&'a TenantId>,
    id: Option<&'a JobId>,
    report: Option<Report>,
}

/// Waits before the next try; whether to give up, because the broker has taken the delivery back.
async fn wait_again(
    error: &PublishError,
    waits: &mut (impl Iterator<Item = Duration> + Send),
    ended: &CancellationToken,
) -> bool {
    tracing::warn!(%error, "a dead letter or its report was not confirmed; trying again");
    tokio::select! {
        () = ended.cancelled() => true,
        () = tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))) => false,
    }
}

fn rejection_report(
    tenant: &crate::id::TenantId,
    id: Option<&crate::id::JobId>,
    reason: &str,
    errors: Vec<FieldError>,
    delivery: &Delivery,
    is_final: bool,
) -> Report {
    let digest = Sha256::digest(&delivery.body);
    let mut number = "r".to_owned();
    for byte in &digest[..8] {
        let _ = write!(number, "{byte:02x}");
    }
    let subject = id.map_or("-", crate::id::JobId::as_str);
    let correlation = delivery
        .correlation_id()
        .map(storable)
        .or_else(|| id.map(ToString::to_string));
    Report {
        id: event_id(tenant.as_str(), "job", subject, &number),
        kind: ReportType::Rejected.as_str(),
        timestamp: Timestamp::now(),
        data: ReportData {
            job: id.cloned(),
            tenant: tenant.clone(),
            account: None,
            sender: None,
            attempt: 0,
            message_id: None,
            recipients: Vec::new(),
            partial: false,
            reason: Some(reason.to_owned()),
            detail: errors.first().map(|error| error.message.clone()),
            class: None,
            fault: None,
            stage: Some("decode"),
            errors,
            is_final,
            sequence: 0,
            correlation_id: correlation,
            next_attempt_at: None,
            uncertain_attempts: 0,
            timings: None,
            batch: None,
            tags: Vec::new(),
            metadata: None,
            links: Vec::new(),
        },
    }
}
