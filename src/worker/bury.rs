//! Dead letters: what cannot be a job goes there with the reason, and its tenant is told. Dead letter confirmed, report
//! confirmed, then the acknowledgement: nothing is dropped on the way.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::Worker;
use super::arrival::{Arrival, plain, told};
use crate::broker::{DeadLetter, Delivery};
use crate::job::decode::{self, Rejection};
use crate::ledger::batches::pauses;
use crate::report::{FieldError, Report, ReportData, ReportType, event_id};

impl Worker {
    /// Buries a decoded job that cannot be taken: another content under a known id, or one the database refuses.
    pub fn bury(self: &Arc<Self>, arrival: Arrival, reason: &'static str, detail: &str) {
        let worker = Arc::clone(self);
        let detail = detail.to_owned();
        let buried = async move {
            let job = &arrival.job;
            tracing::warn!(job = %job.id, tenant = %job.tenant, reason, "dead-lettered: {detail}");
            let (tenant, id) = (job.tenant.clone(), job.id.clone());
            let errors = vec![FieldError { pointer: "/id".to_owned(), message: detail.clone() }];
            // Not final: the first job under this id stands, and has its own reports.
            let report = rejection_report(&tenant, Some(&id), reason, errors, &arrival.delivery, false);
            worker.bury_with(arrival.delivery, reason, &detail, Some(report)).await;
        };
        self.tasks.spawn(buried);
    }

    pub(super) async fn bury_rejected(&self, delivery: Delivery, rejection: Rejection) {
        let reason = rejection.reason.as_str();
        let detail = rejection.to_string();
        let report = told(&rejection).map(|tenant| {
            let errors = rejection.errors.clone();
            rejection_report(tenant, rejection.id.as_ref(), reason, errors, &delivery, true)
        });
        self.bury_with(delivery, reason, &detail, report).await;
    }

    async fn bury_with(&self, delivery: Delivery, reason: &str, detail: &str, report: Option<Report>) {
        let (body, sealed) = self.harmless_body(&delivery);
        let letter = DeadLetter { reason, detail, body: body.as_deref(), sealed };
        let mut waits = pauses();
        while let Err(error) = self.broker.dead_letter(&delivery, &letter).await {
            if delivery.is_stale() {
                return;
            }
            tracing::warn!(%error, "a dead letter was not confirmed; trying again");
            tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))).await;
        }
        self.metrics.dead_lettered.with_label_values(&[reason]).inc();
        if let Some(report) = report {
            let json = serde_json::to_string(&report).unwrap_or_default();
            while let Err(error) = self.broker.publish_report(&report.id, report.data.tenant.as_str(), report.kind, None, &json).await {
                if delivery.is_stale() {
                    return;
                }
                tracing::warn!(%error, "a report was not confirmed; trying again");
                tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))).await;
            }
        }
        delivery.ack();
    }

    /// What of the body may lie in a queue: a plain override sealed; the whole sealed if it cannot be read and may
    /// hold a secret. `None`: as it came.
    fn harmless_body(&self, delivery: &Delivery) -> (Option<Vec<u8>>, bool) {
        let Some(plain) = plain(delivery, &self.limits) else {
            // Not even inflated: what cannot be looked into is kept closed.
            return (Some(self.seal_whole(&delivery.body)), true);
        };
        let sealed = decode::seal_override(&plain, |secret| self.pipeline.keys.seal(secret, DEAD_OVERRIDE));
        match sealed {
            Ok(std::borrow::Cow::Borrowed(same)) if !decode::may_hold_secret(same) => (None, false),
            Ok(std::borrow::Cow::Owned(changed)) if !decode::may_hold_secret_besides_override(&changed) => (Some(changed), false),
            _ => (Some(self.seal_whole(&delivery.body)), true),
        }
    }

    fn seal_whole(&self, body: &[u8]) -> Vec<u8> {
        self.pipeline.keys.seal(body, super::DEAD_BODY).into_bytes()
    }
}

/// Additional data of overrides sealed in dead letters whose job could not be read.
const DEAD_OVERRIDE: &str = "override:dead";

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
        number.push_str(&format!("{byte:02x}"));
    }
    let subject = id.map_or("-", crate::id::JobId::as_str);
    let correlation = delivery.correlation_id.clone().or_else(|| id.map(ToString::to_string));
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
