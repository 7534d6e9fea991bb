//! Intake: from a delivery to an arrival that can be admitted, or to the dead letters.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::Worker;
use super::delivery::Properties;
use crate::address::masked_in;
use crate::broker::Delivery;
use crate::broker::dead_letter::REPLAY;
use crate::directory::{Via, sender};
use crate::failure::Failure;
use crate::id::{AccountKey, TenantId};
use crate::job::MailJob;
use crate::job::decode::{self, Incoming, RejectReason, Rejection};
use crate::ledger::batches::pauses;
use crate::level::Level;
use crate::pipeline::Verdict;

/// How long a job of a newer contract is kept before it goes back to its queue.
const TOO_NEW: Duration = Duration::from_secs(10);

/// A decoded job in hand, and what is acknowledged in its end. Boxed from the start: it is large, and goes from hand to hand.
#[derive(Debug)]
pub struct Arrival {
    /// What is acknowledged in the end.
    pub delivery: Delivery,
    /// The job.
    pub job: Arc<MailJob>,
    /// The account that is to send, as far as can be told now.
    pub account: AccountKey,
    /// Connections of that account in this worker.
    pub connections: usize,
    /// The platform may send it while its account is in trouble.
    pub may_detour: bool,
    /// The level of its queue.
    pub level: Level,
    /// What travels with the body.
    pub properties: Properties,
    /// When it came.
    pub since: Instant,
    /// Cancelled when its session with the broker is over: it will be delivered again.
    pub ended: CancellationToken,
}

impl Arrival {
    /// Whether the broker has taken it back.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// Leaves it to the broker to deliver it again.
    pub fn give_back(self: Box<Self>) {
        self.delivery.receipt.give_back();
    }

    /// It has a durable owner: the broker may forget it.
    pub fn ack(self: Box<Self>) {
        self.delivery.receipt.ack();
    }
}

/// A delivery that is a valid job.
#[derive(Debug)]
pub struct Decoded {
    delivery: Delivery,
    job: MailJob,
    since: Instant,
}

impl Worker {
    /// Reads the job in a delivery. `None`: it was dealt with.
    pub fn decode(self: &Arc<Self>, delivery: Delivery, ended: &CancellationToken) -> Option<Decoded> {
        let since = Instant::now();
        // A defect of ours met here must not end the session: after as many deliveries as the queue allows it is dead.
        let decoded = std::panic::catch_unwind(AssertUnwindSafe(|| {
            decode::decode(&incoming(&delivery), &self.limits)
        }));
        let Ok(decoded) = decoded else {
            delivery.receipt.give_back();
            return None;
        };
        self.metrics
            .stage
            .with_label_values(&["decode"])
            .observe(since.elapsed().as_secs_f64());
        let job = match decoded {
            Ok(job) => job,
            Err(rejection) => {
                self.reject(delivery, rejection, None, ended);
                return None;
            }
        };
        if self.is_older_than_ledger(&delivery) {
            self.reject(delivery, too_old(&job), Some(job), ended);
            return None;
        }
        Some(Decoded { delivery, job, since })
    }

    /// Reads the tenants of these jobs together, as far as they are not known. If that fails, each is asked for by itself.
    pub async fn know_tenants(&self, decoded: &[Decoded]) {
        let tenants: Vec<TenantId> = decoded.iter().map(|decoded| decoded.job.tenant.clone()).collect();
        if let Err(error) = self.pipeline.directory.prefetch(&tenants).await {
            tracing::debug!(%error, "tenants are not known yet");
        }
    }

    /// Turns a job into an arrival: who is to send it. `None`: it was dealt with.
    pub async fn receive(
        self: &Arc<Self>,
        decoded: Decoded,
        level: Level,
        ended: &CancellationToken,
    ) -> Option<Box<Arrival>> {
        let Decoded { delivery, job, since } = decoded;
        let properties = properties(&delivery, &job);
        let (account, connections, may_detour) = match self.expected_account(&job).await {
            Ok(found) => found,
            Err(failure) => {
                self.reject(delivery, rejected(&job, &failure), Some(job), ended);
                return None;
            }
        };
        let ended = ended.clone();
        Some(Box::new(Arrival {
            delivery,
            job: Arc::new(job),
            account,
            connections,
            may_detour,
            level,
            properties,
            since,
            ended,
        }))
    }

    /// The account whose limits the job counts against, its connections here, and whether the platform may stand in for it. An account that cannot send today
    /// is no error: the attempt will tell. A tenant or a named account that does not exist is.
    async fn expected_account(&self, job: &MailJob) -> Result<(AccountKey, usize, bool), Failure> {
        let unknown = || {
            (
                AccountKey::from_stored(&format!("{}/", job.tenant)),
                self.pool_size,
                false,
            )
        };
        let mut waits = pauses();
        loop {
            match self.pipeline.resolve(job).await {
                Ok((_, chosen)) if chosen.via == Via::Override => {
                    return Ok((AccountKey::for_override(&job.tenant), self.permits_total, false));
                }
                Ok((entries, chosen)) => {
                    let cap = chosen
                        .account
                        .max_connections
                        .map_or(usize::MAX, |cap| cap as usize);
                    let platform = entries.platform.as_deref();
                    let may_detour = sender::may_detour(&chosen, job, &entries.tenant, platform);
                    let key = chosen.account.key.clone();
                    return Ok((key, self.pool_size.min(cap), may_detour));
                }
                Err(Verdict::Failed(failure))
                    if ["tenant_not_found", "account_not_found"].contains(&failure.reason) =>
                {
                    return Err(failure);
                }
                Err(Verdict::Failed(_)) => return Ok(unknown()),
                // The directory cannot be read: nothing is decided, nothing acknowledged.
                Err(_) => tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))).await,
            }
        }
    }

    /// Whether a job was published so long ago that it may have been sent and forgotten: an old backlog, a broker
    /// restored from a backup. One without a timestamp counts as new, and one replayed by hand has been decided about.
    fn is_older_than_ledger(&self, delivery: &Delivery) -> bool {
        let Some(sent) = delivery.timestamp().and_then(|sent| i64::try_from(sent).ok()) else {
            return false;
        };
        // The last thirtieth is the margin for clocks.
        let memory = self.retention.as_secs() / 30 * 29;
        let age = self.clock.now().as_second().saturating_sub(sent);
        u64::try_from(age).is_ok_and(|age| age > memory) && !delivery.has_header(REPLAY)
    }

    /// Dead-letters a delivery that is no valid job, or a `job` that is not allowed, and tells its tenant, then acknowledges
    /// it. Beside the queue: the next delivery does not wait for the confirms.
    fn reject(
        self: &Arc<Self>,
        delivery: Delivery,
        rejection: Rejection,
        job: Option<MailJob>,
        ended: &CancellationToken,
    ) {
        if rejection.reason == RejectReason::ContractTooNew {
            return self.leave_to_newer(delivery, &rejection, ended);
        }
        let (worker, ended) = (Arc::clone(self), ended.clone());
        self.tasks.spawn(async move {
            tracing::warn!(
                reason = rejection.reason.as_str(),
                tenant = rejection.tenant.as_ref().map(tracing::field::display),
                job = rejection.id.as_ref().map(tracing::field::display),
                "dead-lettered: {}",
                masked_in(&rejection.to_string())
            );
            worker.metrics.jobs.with_label_values(&["rejected"]).inc();
            worker
                .bury_rejected(delivery, rejection, job.as_ref(), &ended)
                .await;
        });
    }

    /// A newer worker understands it; this one must not be the judge. It goes to the end of its queue as it came: given
    /// back it would stand at the head again, and reach the queue's delivery limit.
    fn leave_to_newer(
        self: &Arc<Self>,
        delivery: Delivery,
        rejection: &Rejection,
        ended: &CancellationToken,
    ) {
        tracing::warn!(queue = %delivery.queue, "left to newer workers: {rejection}");
        self.metrics.jobs.with_label_values(&["too_new"]).inc();
        let (worker, ended) = (Arc::clone(self), ended.clone());
        // Not among the tasks that an ending worker waits for: then the broker takes the delivery back by itself.
        tokio::spawn(async move {
            tokio::select! {
                () = ended.cancelled() => return,
                () = tokio::time::sleep(TOO_NEW) => {}
            }
            // Through an exchange of somebody else's it might reach more queues than this one.
            let is_ours = delivery.exchange == worker.topology.jobs_exchange();
            if is_ours && worker.publisher.send_on(&delivery).await.is_ok() {
                delivery.receipt.ack();
            } else {
                delivery.receipt.give_back();
            }
        });
    }
}

/// The delivery as decoding wants it.
pub(super) fn incoming(delivery: &Delivery) -> Incoming<'_> {
    Incoming {
        body: &delivery.body,
        content_type: delivery.content_type(),
        content_encoding: delivery.content_encoding(),
        message_type: delivery.kind(),
        compression: delivery.header("compression"),
        contract: delivery.header("x-contract"),
        key_tenant: key_tenant(delivery),
    }
}

/// The tenant in the routing key `<level>.<tenant>`; what came through the default exchange names the queue there.
fn key_tenant(delivery: &Delivery) -> Option<&str> {
    if delivery.came_through_default_exchange() {
        return None;
    }
    delivery.routing_key.split_once('.').map(|(_, tenant)| tenant)
}

/// The body as plain JSON. A body that decoded once inflates again.
pub(super) fn plain(delivery: &Delivery, limits: &crate::config::JobLimits) -> Option<Bytes> {
    match decode::inflate(&incoming(delivery), limits).ok()? {
        std::borrow::Cow::Borrowed(_) => Some(delivery.body.clone()),
        std::borrow::Cow::Owned(bytes) => Some(bytes.into()),
    }
}

fn properties(delivery: &Delivery, job: &MailJob) -> Properties {
    Properties {
        correlation_id: delivery.correlation_id().map(storable),
        traceparent: trace_parent(delivery),
        published: published(delivery),
        contract: delivery.header("x-contract").map(str::to_owned),
        recipients: job.recipients().count(),
        tags: job.tags.clone(),
        metadata: job.metadata.clone(),
        released_at: None,
    }
}

fn published(delivery: &Delivery) -> Option<Timestamp> {
    if delivery.has_header(REPLAY) {
        return None;
    }
    Timestamp::from_second(delivery.timestamp()?.try_into().ok()?).ok()
}

/// A property as reports and the ledger can hold it: Postgres has no NUL in JSON, and a line no line ends.
pub(super) fn storable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// The header `traceparent`, if it has the form of one.
pub(super) fn trace_parent(delivery: &Delivery) -> Option<String> {
    let text = delivery.header("traceparent")?;
    crate::report::is_traceparent(text).then(|| text.to_owned())
}

/// A decoded job of which nobody knows whether it was sent already.
fn too_old(job: &MailJob) -> Rejection {
    let message = "it was published longer ago than outcomes are remembered (POSTROOM_RETENTION), so it may have been \
                   sent already; `postroom dead replay` sends it all the same";
    Rejection {
        reason: RejectReason::OlderThanLedger,
        errors: vec![crate::report::FieldError {
            pointer: String::new(),
            message: message.to_owned(),
        }],
        tenant: Some(job.tenant.clone()),
        id: Some(job.id.clone()),
    }
}

/// A decoded job that nobody can send for: its tenant or account does not exist.
fn rejected(job: &MailJob, failure: &Failure) -> Rejection {
    let (reason, pointer) = if failure.reason == "account_not_found" {
        (RejectReason::UnknownAccount, "/account")
    } else {
        (RejectReason::UnknownTenant, "/tenant")
    };
    Rejection {
        reason,
        errors: vec![crate::report::FieldError {
            pointer: pointer.to_owned(),
            message: failure.message.clone(),
        }],
        tenant: Some(job.tenant.clone()),
        id: Some(job.id.clone()),
    }
}

/// The tenant a rejection is told to, if there is one.
pub(super) fn told(rejection: &Rejection) -> Option<&TenantId> {
    rejection.tenant.as_ref().filter(|tenant| !tenant.is_platform())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_producers_properties_can_be_stored() {
        assert_eq!(storable("a\0b\nc"), "a\u{fffd}b\u{fffd}c");
    }
}
