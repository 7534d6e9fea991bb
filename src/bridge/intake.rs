//! Takes reports into Postgres: recorded once by event id and fanned out to endpoints, committed, then acked.

use std::time::Duration;

use bytes::Bytes;
use tokio_postgres::types::Type;
use tokio_util::sync::CancellationToken;

use super::source::{Delivery, ReportSource};
use super::{Bridge, BridgeError, body};
use crate::db::DbError;
use crate::fail_point::{self, Point};
use crate::id::TenantId;

/// Reports per statement. Their bodies are below 20 kB each, so a batch is below 10 MB.
const BATCH: usize = 500;
/// Waits between attempts to record a batch while the database is away.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(15);

/// A report ready to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncomingReport {
    /// Its id, the same for every repeat.
    pub event_id: String,
    /// Whose.
    pub tenant: TenantId,
    /// What happened, such as `mail.sent`.
    pub kind: String,
    /// The JSON as webhooks will get it.
    pub body: Bytes,
}

/// Why something in the reports queue is not a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotAReport {
    /// A fixed word, for `x-dead-reason`.
    pub reason: &'static str,
    /// What is wrong.
    pub detail: String,
}

impl IncomingReport {
    /// Reads what lay in the queue.
    ///
    /// # Errors
    /// If there is no usable event id, the routing key is not `report.<tenant>.<type>`, or the body is not a report.
    pub fn read(event_id: Option<&str>, routing_key: &str, bytes: &Bytes) -> Result<Self, NotAReport> {
        let refuse = |reason, detail: &str| NotAReport {
            reason,
            detail: detail.to_owned(),
        };
        // No dot: it separates id, timestamp and body in what is signed.
        let event_id = event_id
            .filter(|id| {
                (1..=255).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic() && b != b'.')
            })
            .ok_or_else(|| {
                refuse(
                    "invalid_event_id",
                    "`message_id` must be printable ASCII without spaces and dots",
                )
            })?;
        let (tenant, kind) = routing_key
            .strip_prefix("report.")
            .and_then(|rest| rest.split_once('.'))
            .and_then(|(tenant, kind)| Some((tenant.parse().ok()?, kind)))
            .filter(|(_, kind)| is_event_type(kind))
            .ok_or_else(|| {
                refuse(
                    "invalid_routing_key",
                    "the routing key must be `report.<tenant>.<type>`",
                )
            })?;
        let body = body::fitted(bytes).map_err(|detail| NotAReport {
            reason: "invalid_report",
            detail,
        })?;
        Ok(Self {
            event_id: event_id.to_owned(),
            tenant,
            kind: kind.to_owned(),
            body,
        })
    }
}

/// Words of letters, digits and underscores, joined by dots (Standard Webhooks 1.0).
fn is_event_type(text: &str) -> bool {
    text.len() <= 100
        && text
            .split('.')
            .all(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
}

impl Bridge {
    /// Records reports and what is owed to whom, in one statement. Repeats change nothing. Answers how many were new
    /// and wanted by an endpoint.
    ///
    /// # Errors
    /// If the database cannot do it now; nothing was recorded then, or all of it was.
    pub async fn record(&self, batch: &[IncomingReport]) -> Result<u64, BridgeError> {
        let mut batch: Vec<&IncomingReport> = batch.iter().collect();
        // Two bridges that get the same reports in different order must not wait for each other in a circle.
        batch.sort_unstable_by(|a, b| a.event_id.cmp(&b.event_id));
        let event_ids: Vec<&str> = batch.iter().map(|report| &*report.event_id).collect();
        let tenants: Vec<&str> = batch.iter().map(|report| report.tenant.as_str()).collect();
        let kinds: Vec<&str> = batch.iter().map(|report| &*report.kind).collect();
        let bodies: Vec<&[u8]> = batch.iter().map(|report| &*report.body).collect();
        let sql = self.database.sql("SELECT {s}.webhook_record_v1($1, $2, $3, $4)");
        let new: i64 = self
            .within(async {
                let client = self.database.client().await?;
                let row = client
                    .query_typed_one(
                        &sql,
                        &[
                            (&event_ids, Type::TEXT_ARRAY),
                            (&tenants, Type::TEXT_ARRAY),
                            (&kinds, Type::TEXT_ARRAY),
                            (&bodies, Type::BYTEA_ARRAY),
                        ],
                    )
                    .await?;
                Ok(row.try_get(0)?)
            })
            .await?;
        if fail_point::loses(Point::ReportsRecorded, event_ids) {
            return Err(DbError::Timeout.into());
        }
        if new > 0 {
            self.due.notify_one();
        }
        Ok(new.unsigned_abs())
    }

    /// Consumes until shutdown, or until the source is closed for good.
    pub(super) async fn take_in<S: ReportSource>(&self, mut source: S, shutdown: &CancellationToken) {
        loop {
            let batch = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                batch = source.next_batch(BATCH) => batch,
            };
            let Some(batch) = batch else { return };
            if !self.take_batch(&mut source, batch, shutdown).await {
                return;
            }
        }
    }

    /// Whether the batch is settled; if not, it stays unacked and the broker delivers it again.
    async fn take_batch<S: ReportSource>(
        &self,
        source: &mut S,
        batch: Vec<Delivery<S::Handle>>,
        shutdown: &CancellationToken,
    ) -> bool {
        let mut handles = Vec::with_capacity(batch.len());
        let mut reports = Vec::with_capacity(batch.len());
        let mut dead = Vec::new();
        for delivery in batch {
            match IncomingReport::read(
                delivery.event_id.as_deref(),
                &delivery.routing_key,
                &delivery.body,
            ) {
                Ok(report) => {
                    handles.push(delivery.handle);
                    reports.push(report);
                }
                Err(problem) => dead.push((delivery.handle, problem)),
            }
        }
        // Before the others are acked: an ack with `multiple` must not take one along that has no new home yet.
        for (handle, NotAReport { reason, detail }) in dead {
            tracing::warn!(reason, detail, "not a report: dead-lettered");
            source.dead_letter(handle, reason, detail).await;
        }
        if reports.is_empty() {
            return true;
        }
        fail_point::hit(Point::ReportsTaken, reports.iter().map(|r| &*r.event_id));
        if !self.record_until_done(&reports, shutdown).await {
            return false;
        }
        source.ack(handles).await;
        true
    }

    /// Repeats while the database is away: the reports wait unacked, and the broker holds the rest back.
    async fn record_until_done(&self, reports: &[IncomingReport], shutdown: &CancellationToken) -> bool {
        let mut wait = FIRST_WAIT;
        loop {
            match self.record(reports).await {
                Ok(_) => return true,
                Err(error) => {
                    tracing::warn!(%error, reports = reports.len(), "cannot record reports, will try again");
                }
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return false,
                () = tokio::time::sleep(wait) => {}
            }
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] = br#"{"type":"mail.sent","timestamp":"2026-01-01T00:00:00Z","data":{}}"#;

    fn read(
        event_id: Option<&str>,
        routing_key: &str,
        body: &'static [u8],
    ) -> Result<IncomingReport, &'static str> {
        IncomingReport::read(event_id, routing_key, &Bytes::from_static(body))
            .map_err(|problem| problem.reason)
    }

    #[test]
    fn a_report_is_read_from_its_message_id_routing_key_and_body() {
        let report = read(Some("evt_1"), "report.acme.mail.sent", BODY).unwrap();
        assert_eq!(report.event_id, "evt_1");
        assert_eq!(report.tenant.as_str(), "acme");
        assert_eq!(report.kind, "mail.sent");
        assert_eq!(report.body, BODY);
        assert!(read(Some("evt_1"), "report.-.endpoint.disabled", BODY).is_ok());
    }

    #[test]
    fn what_is_not_a_report_says_why() {
        let id = Some("evt_1");
        for (event_id, key, body, reason) in [
            (None, "report.a.mail.sent", BODY, "invalid_event_id"),
            (Some(""), "report.a.mail.sent", BODY, "invalid_event_id"),
            (Some("a b"), "report.a.mail.sent", BODY, "invalid_event_id"),
            (Some("a.b"), "report.a.mail.sent", BODY, "invalid_event_id"),
            (Some("a\0"), "report.a.mail.sent", BODY, "invalid_event_id"),
            (id, "report.a", BODY, "invalid_routing_key"),
            (id, "report..mail.sent", BODY, "invalid_routing_key"),
            (id, "report.a.", BODY, "invalid_routing_key"),
            (id, "report.a.mail..sent", BODY, "invalid_routing_key"),
            (id, "report.a.mail.s\0nt", BODY, "invalid_routing_key"),
            (id, "low.a.mail.sent", BODY, "invalid_routing_key"),
            (id, "report.a.mail.sent", b"{", "invalid_report"),
            (id, "report.a.mail.sent", b"{\"type\":\"x\"}", "invalid_report"),
        ] {
            assert_eq!(
                read(event_id, key, body).err(),
                Some(reason),
                "{event_id:?} {key}"
            );
        }
    }
}
