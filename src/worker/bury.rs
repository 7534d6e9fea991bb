//! Dead letters: what cannot be a job goes there with the reason, and its tenant is told. Dead letter confirmed, report
//! confirmed, then the acknowledgement: nothing is dropped on the way.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::Worker;
use super::arrival::{Arrival, incoming, storable, told, trace_parent};
use super::delivery::Properties;
use crate::broker::{DeadLetter, Delivery, PublishError, Receipt};
use crate::directory::overrides;
use crate::fail_point::{self, Point};
use crate::id::{JobId, TenantId};
use crate::job::MailJob;
use crate::job::decode::{self, Rejection};
use crate::ledger::Row;
use crate::ledger::batches::pauses;
use crate::ledger::odd::CRASH_LOOP;
use crate::ledger::release::Released;
use crate::memory::Held;
use crate::report::{FieldError, Report, ReportData, ReportMessage, ReportType, event_id};

impl Worker {
    /// Buries a decoded job that cannot be taken: another content under a known id, or one the database refuses.
    pub fn bury(self: &Arc<Self>, arrival: Box<Arrival>, reason: &'static str, detail: &str) {
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
        let job = job.or_else(|| self.read_again(&delivery));
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

    /// The job in a body out of the waiting room, if reading it is not what crashes.
    fn read_again(&self, delivery: &Delivery) -> Option<Arc<MailJob>> {
        let read = || decode::decode(&incoming(delivery), &self.limits).ok();
        std::panic::catch_unwind(AssertUnwindSafe(read))
            .ok()?
            .map(Arc::new)
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
        let letter = DeadLetter {
            reason: death.reason,
            detail: death.detail,
            tenant: death.tenant.map(TenantId::as_str),
            body: body.as_deref(),
            sealed,
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
            correlation_id: correlation.map(Arc::from),
            traceparent: trace_parent(delivery),
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
