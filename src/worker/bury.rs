//! Dead letters: what cannot be a job goes there with the reason, and its tenant is told. Dead letter confirmed, report
//! confirmed, then the acknowledgement: nothing is dropped on the way.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::Worker;
use super::arrival::{Arrival, incoming, storable, told, trace_parent};
use super::delivery::Properties;
use crate::broker::{DeadLetter, Delivery, PublishError, Receipt};
use crate::config::JobLimits;
use crate::directory::overrides;
use crate::fail_point::{self, Point};
use crate::id::{AccountId, JobId, TenantId};
use crate::job::MailJob;
use crate::job::decode::{self, Rejection};
use crate::ledger::Row;
use crate::ledger::batches::pauses;
use crate::ledger::odd::CRASH_LOOP;
use crate::ledger::release::Released;
use crate::memory::Held;
use crate::report::{FieldError, Report, ReportData, ReportMessage, ReportType, event_id};

impl Worker {
    /// Buries a decoded job that the ledger does not take.
    pub fn bury(self: &Arc<Self>, arrival: Box<Arrival>, refusal: Refusal) {
        let worker = Arc::clone(self);
        self.tasks.spawn(async move {
            let job = &arrival.job;
            let (reason, detail) = (refusal.reason(), refusal.detail());
            tracing::warn!(job = %job.id, tenant = %job.tenant, reason, "dead-lettered: {detail}");
            let (tenant, id) = (job.tenant.clone(), job.id.clone());
            let report = refusal.report(job, &arrival.delivery);
            let death = Death {
                reason,
                detail,
                tenant: Some(&tenant),
                id: Some(&id),
                kept: Kept::Message,
            };
            let ended = &arrival.ended;
            worker
                .bury_with(arrival.delivery, &death, Some(report), ended)
                .await;
        });
    }

    /// Buries a leased job over which workers crash: dead letter confirmed, outcome written, then acknowledged. If the
    /// dead letter cannot be published the lease is kept, and whoever comes next tries again.
    pub(super) fn bury_poison(self: &Arc<Self>, doomed: Doomed) {
        let worker = Arc::clone(self);
        self.tasks.spawn(async move { worker.bury_doomed(doomed).await });
    }

    async fn bury_doomed(self: &Arc<Self>, doomed: Doomed) {
        let Doomed {
            delivery,
            row,
            ended,
            job,
            properties,
        } = doomed;
        tracing::error!(job = %row.id, tenant = %row.tenant, crashes = row.crashes, deaths = row.deaths,
            "dead-lettered: {CRASH_LOOP}");
        let death = Death {
            reason: "crash_loop",
            detail: CRASH_LOOP,
            tenant: Some(&row.tenant),
            id: Some(&row.id),
            kept: if job.is_some() { Kept::Lease } else { Kept::Stored },
        };
        let mut waits = pauses();
        if !self.send_off(&delivery, &death, &mut waits, &ended).await {
            return;
        }
        let job = job.or_else(|| read_again(&delivery));
        let settled = loop {
            let complete = |data: &mut ReportData| complete(data, job.as_deref(), &properties);
            match self.ledger.dead_letter(&row, complete).await {
                Ok(settled) => break settled,
                Err(error) => self.database_trouble("dead letter", &error),
            }
            tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))).await;
        };
        match settled {
            Some((report, number)) => {
                self.metrics.jobs.with_label_values(&["failed"]).inc();
                delivery.receipt.ack();
                self.reporter.publish(self, report, number);
            }
            // Somebody else has the lease, and perhaps no body but this one. If the outcome is written the message is
            // answered as a repeat when it comes again.
            None => delivery.receipt.give_back(),
        }
    }

    /// Buries what is no valid job, or names what does not exist: then there is a `job`.
    pub(super) async fn bury_rejected(
        &self,
        delivery: Delivery,
        rejection: Rejection,
        job: Option<&MailJob>,
        ended: &CancellationToken,
    ) {
        let reason = rejection.reason.as_str();
        let detail = rejection.to_string();
        let tenant = told(&rejection);
        let report = tenant.map(|tenant| {
            let rejected = Rejected {
                tenant,
                id: rejection.id.as_ref(),
                reason,
                errors: rejection.errors.clone(),
                job,
                is_final: true,
            };
            rejected.report(&delivery)
        });
        let death = Death {
            reason,
            detail: &detail,
            tenant,
            id: rejection.id.as_ref(),
            kept: Kept::Message,
        };
        self.bury_with(delivery, &death, report, ended).await;
    }

    /// Dead letter, report, acknowledgement; each only when the one before is confirmed.
    async fn bury_with(
        &self,
        delivery: Delivery,
        death: &Death<'_>,
        report: Option<Report>,
        ended: &CancellationToken,
    ) {
        let mut waits = pauses();
        if !self.send_off(&delivery, death, &mut waits, ended).await {
            return;
        }
        if let Some(report) = report.map(ReportMessage::from) {
            while let Err(error) = self.publish_report(&report).await {
                if wait_again(&error, &mut waits, ended).await {
                    return;
                }
            }
        }
        delivery.receipt.ack();
    }

    /// Publishes the dead letter until it is confirmed; `false`: given up before.
    async fn send_off(
        &self,
        delivery: &Delivery,
        death: &Death<'_>,
        waits: &mut (impl Iterator<Item = Duration> + Send),
        ended: &CancellationToken,
    ) -> bool {
        let (body, sealed) = match death.kept {
            Kept::Stored => (None, false),
            Kept::Message | Kept::Lease => self.harmless_body(delivery, death.tenant.zip(death.id)),
        };
        let body = body.map(Bytes::from);
        let (body, gzip) = if sealed {
            (body, false)
        } else {
            self.packed(delivery, body).await
        };
        let letter = DeadLetter {
            reason: death.reason,
            detail: death.detail,
            tenant: death.tenant.map(TenantId::as_str),
            body: body.as_deref(),
            sealed,
            gzip,
        };
        while let Err(error) = self
            .publisher
            .dead_letter(&self.topology, delivery, &letter)
            .await
        {
            let is_over = death.kept != Kept::Message && self.tasks.is_closed();
            if is_over || wait_again(&error, waits, ended).await {
                return false;
            }
        }
        fail_point::hit(Point::DeadLettered, death.id.map(JobId::as_str));
        true
    }

    /// Compresses a plain body that is larger than a job may come: one that was inflated when it was stored, or grew when
    /// its override was sealed. As it is it could not be replayed, and RabbitMQ may not take it.
    async fn packed(&self, delivery: &Delivery, body: Option<Bytes>) -> (Option<Bytes>, bool) {
        let plain = body.clone().unwrap_or_else(|| delivery.body.clone());
        if plain.len() <= self.limits.max_bytes {
            return (body, false);
        }
        match tokio::task::spawn_blocking(move || decode::gzip(&plain)).await {
            Ok(Ok(packed)) => (Some(packed.into()), true),
            Ok(Err(_)) | Err(_) => (body, false),
        }
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

/// The job in a body out of the waiting room, if reading it is not what crashes.
fn read_again(delivery: &Delivery) -> Option<Arc<MailJob>> {
    let read = || decode::decode(&incoming(delivery), &JobLimits::STORED).ok();
    std::panic::catch_unwind(AssertUnwindSafe(read))
        .ok()?
        .map(Arc::new)
}

/// A leased job that is to be buried, and what is known of it.
#[derive(Debug)]
pub struct Doomed {
    delivery: Delivery,
    row: Row,
    ended: CancellationToken,
    job: Option<Arc<MailJob>>,
    properties: Properties,
}

impl Doomed {
    /// One whose body RabbitMQ has.
    #[must_use]
    pub fn arrived(arrival: Box<Arrival>, row: Row) -> Self {
        Self {
            delivery: arrival.delivery,
            row,
            ended: arrival.ended,
            job: Some(arrival.job),
            properties: arrival.properties,
        }
    }

    /// One out of the waiting room, as its producer published it; `held` is the memory it takes.
    #[must_use]
    pub fn stored(released: Released, properties: Properties, exchange: &str, held: Option<Held>) -> Self {
        let Released { row, level, body, .. } = released;
        let mut headers = lapin::types::FieldTable::default();
        for (name, value) in [
            ("x-contract", properties.contract.as_deref()),
            ("traceparent", properties.traceparent.as_deref()),
        ] {
            if let Some(value) = value {
                headers.insert(name.into(), lapin::types::AMQPValue::LongString(value.into()));
            }
        }
        let mut amqp = crate::broker::Properties::default()
            .with_content_type("application/json".into())
            .with_type("mail.job.v1".into())
            .with_headers(headers)
            .with_timestamp(u64::try_from(row.created.as_second()).unwrap_or(0));
        let correlation = properties.correlation_id.as_deref();
        if let Some(id) = correlation.and_then(|id| lapin::types::ShortString::try_new(id).ok()) {
            amqp = amqp.with_correlation_id(id);
        }
        // By this name it is found among the dead even if its body has to be compressed.
        if let Ok(id) = lapin::types::ShortString::try_new(row.id.as_str()) {
            amqp = amqp.with_message_id(id);
        }
        let delivery = Delivery {
            level: Some(level),
            queue: "".into(),
            generation: 0,
            redelivered: true,
            exchange: exchange.to_owned(),
            routing_key: format!("{level}.{}", row.tenant),
            properties: amqp,
            body,
            held,
            receipt: Receipt::none(),
        };
        Self {
            delivery,
            row,
            ended: CancellationToken::new(),
            job: None,
            properties,
        }
    }
}

/// What the ledger does not know of a job, for its last report.
fn complete(data: &mut ReportData, job: Option<&MailJob>, properties: &Properties) {
    data.tags.clone_from(&properties.tags);
    data.metadata.clone_from(&properties.metadata);
    if let Some(correlation) = &properties.correlation_id {
        data.correlation_id = Some(correlation.as_str().into());
    }
    data.traceparent.clone_from(&properties.traceparent);
    if let Some(job) = job.filter(|_| data.recipients.is_empty()) {
        data.recipients = job.all_pending();
    }
}

/// What is buried, and why.
struct Death<'a> {
    reason: &'static str,
    detail: &'a str,
    tenant: Option<&'a TenantId>,
    id: Option<&'a JobId>,
    kept: Kept,
}

/// What keeps it from being lost until it is buried.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// Its message alone.
    Message,
    /// Its lease as well: whoever has that next tries again, so a worker that stops does not wait.
    Lease,
    /// Its lease, with a body out of the waiting room: sealed already, under the job's name.
    Stored,
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

/// Why the ledger does not take a job.
#[derive(Debug)]
pub enum Refusal {
    /// Another content has been seen under its id.
    IdConflict,
    /// Postgres says this about it.
    ByDatabase(String),
}

impl Refusal {
    fn reason(&self) -> &'static str {
        match self {
            Self::IdConflict => "id_conflict",
            Self::ByDatabase(_) => "refused_by_database",
        }
    }

    fn detail(&self) -> &str {
        match self {
            Self::IdConflict => {
                "another job with different content has been published under this id; ids must be unique per tenant"
            }
            Self::ByDatabase(error) => error,
        }
    }

    fn report(&self, job: &MailJob, delivery: &Delivery) -> Report {
        let is_conflict = matches!(self, Self::IdConflict);
        let rejected = Rejected {
            tenant: &job.tenant,
            id: Some(&job.id),
            reason: self.reason(),
            errors: vec![FieldError {
                pointer: if is_conflict { "/id" } else { "" }.to_owned(),
                message: self.detail().to_owned(),
            }],
            job: Some(job),
            // The first job under this id stands, and has its own reports.
            is_final: !is_conflict,
        };
        rejected.report(delivery)
    }
}

/// What is told about a message that is not taken.
struct Rejected<'a> {
    tenant: &'a TenantId,
    id: Option<&'a JobId>,
    reason: &'a str,
    errors: Vec<FieldError>,
    /// The job, if it could be read.
    job: Option<&'a MailJob>,
    is_final: bool,
}

impl Rejected<'_> {
    fn report(self, delivery: &Delivery) -> Report {
        let id = self.id;
        let subject = id.map_or("-", JobId::as_str);
        let correlation = delivery
            .correlation_id()
            .map(storable)
            .or_else(|| id.map(ToString::to_string));
        let job = self.job;
        Report {
            id: event_id(self.tenant.as_str(), "job", subject, &self.number(&delivery.body)),
            kind: ReportType::Rejected.as_str(),
            timestamp: Timestamp::now(),
            data: ReportData {
                job: id.cloned(),
                tenant: self.tenant.clone(),
                account: job.and_then(|job| job.account.as_ref().map(AccountId::shared)),
                sender: None,
                attempt: 0,
                message_id: None,
                recipients: Vec::new(),
                partial: false,
                reason: Some(self.reason.to_owned()),
                detail: self.errors.first().map(|error| error.message.clone()),
                class: None,
                fault: None,
                stage: Some("decode"),
                errors: self.errors,
                is_final: self.is_final,
                sequence: 0,
                correlation_id: correlation.map(Arc::from),
                traceparent: trace_parent(delivery),
                next_attempt_at: None,
                uncertain_attempts: 0,
                timings: None,
                batch: job.and_then(|job| job.batch.clone()),
                tags: job.map(|job| job.tags.clone()).unwrap_or_default(),
                metadata: job.and_then(|job| job.metadata.clone()),
                links: Vec::new(),
            },
        }
    }

    /// What its event is numbered by: the same when the message comes again, and another when it is refused for another
    /// reason.
    fn number(&self, body: &[u8]) -> String {
        let digest = Sha256::new_with_prefix(self.reason)
            .chain_update([0])
            .chain_update(body)
            .finalize();
        let mut number = "r".to_owned();
        for byte in &digest[..8] {
            let _ = write!(number, "{byte:02x}");
        }
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::decode::Incoming;

    const BODY: &str = r#"{"id":"1","tenant":"acme","account":"second","to":"a@example.org","text":"t","batch":"spring",
                           "tags":["x"],"metadata":{"order":7}}"#;

    fn job() -> MailJob {
        let incoming = Incoming {
            body: BODY.as_bytes(),
            ..Incoming::default()
        };
        decode::decode(&incoming, &crate::config::JobLimits::default()).unwrap()
    }

    fn rejected<'a>(reason: &'a str, job: &'a MailJob) -> Rejected<'a> {
        Rejected {
            tenant: &job.tenant,
            id: Some(&job.id),
            reason,
            errors: Vec::new(),
            job: Some(job),
            is_final: true,
        }
    }

    #[test]
    fn a_job_that_the_database_refuses_is_rejected_for_good() {
        let refused = Refusal::ByDatabase("22021: no".to_owned()).report(&job(), &Delivery::for_tests(BODY));
        assert!(refused.data.is_final);
        assert_eq!(refused.data.reason.as_deref(), Some("refused_by_database"));
        assert_eq!(refused.data.errors[0].pointer, "");
        let conflict = Refusal::IdConflict.report(&job(), &Delivery::for_tests(BODY));
        assert!(!conflict.data.is_final, "the first job stands");
        assert_eq!(conflict.data.errors[0].pointer, "/id");
    }

    #[test]
    fn a_job_rejected_for_another_reason_has_another_event_id() {
        let job = job();
        let id = |reason, body| rejected(reason, &job).report(&Delivery::for_tests(body)).id;
        assert_eq!(id("unknown_tenant", BODY), id("unknown_tenant", BODY));
        assert_ne!(id("unknown_tenant", BODY), id("unknown_account", BODY));
        assert_ne!(id("unknown_tenant", BODY), id("unknown_tenant", "{}"));
    }

    #[test]
    fn a_rejected_job_that_could_be_read_echoes_metadata_tags_and_batch() {
        let job = job();
        let data = rejected("unknown_account", &job)
            .report(&Delivery::for_tests(BODY))
            .data;
        assert_eq!(data.metadata, Some(serde_json::json!({"order": 7})));
        assert_eq!(
            (data.tags, data.batch.as_deref()),
            (vec!["x".to_owned()], Some("spring"))
        );
        assert_eq!(data.account.as_deref(), Some("second"));
    }
}
