//! Reports: what tenants are told. The same JSON goes to the reports exchange and to webhooks.

use std::fmt::Write as _;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::failure::{Failure, Reply};
use crate::id::{AccountKey, JobId, TenantId};

/// The type of a report; its name is part of the routing key `report.<tenant>.<type>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReportType {
    /// The SMTP server took the mail for at least one recipient. Never "delivered".
    Sent,
    /// The job waits; not final.
    Deferred,
    /// Nobody got it, and nobody will. Final.
    Failed,
    /// Never attempted: the job could not be read or is not allowed.
    Rejected,
    /// Its `expires_at` passed first. Final.
    Expired,
    /// Cancelled before it was sent. Final.
    Cancelled,
    /// Nobody knows whether the server took it, and the policy says `hold`; not final.
    Uncertain,
}

impl ReportType {
    /// Every type.
    pub const ALL: [Self; 7] = [
        Self::Sent,
        Self::Deferred,
        Self::Failed,
        Self::Rejected,
        Self::Expired,
        Self::Cancelled,
        Self::Uncertain,
    ];

    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sent => "mail.sent",
            Self::Deferred => "mail.deferred",
            Self::Failed => "mail.failed",
            Self::Rejected => "mail.rejected",
            Self::Expired => "mail.expired",
            Self::Cancelled => "mail.cancelled",
            Self::Uncertain => "mail.uncertain",
        }
    }

    /// Whether nothing more follows about this job.
    #[must_use]
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Deferred | Self::Uncertain)
    }
}

/// A report as published: `{type, timestamp, data}`. The event id travels as AMQP `message_id` and as `webhook-id`.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Deterministic event id, see [`event_id`]; not part of the body.
    #[serde(skip)]
    pub id: String,
    /// What happened.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// When it happened.
    pub timestamp: Timestamp,
    /// The particulars.
    pub data: ReportData,
}

/// A report and its JSON, made once: what is published is what was stored, byte for byte. Small: it goes from hand to hand.
#[derive(Debug, Clone)]
pub struct ReportMessage(Box<Written>);

#[derive(Debug, Clone)]
struct Written {
    report: Report,
    json: OnceLock<String>,
}

impl ReportMessage {
    /// The JSON, as it is stored, published and delivered.
    #[must_use]
    pub fn json(&self) -> &str {
        // Strings, numbers and checked JSON values: serialising cannot fail.
        self.0
            .json
            .get_or_init(|| serde_json::to_string(&self.0.report).unwrap_or_default())
    }

    /// The particulars, to be changed; the JSON is made anew.
    pub fn data_mut(&mut self) -> &mut ReportData {
        self.0.json.take();
        &mut self.0.report.data
    }
}

impl From<Report> for ReportMessage {
    fn from(report: Report) -> Self {
        Self(Box::new(Written {
            report,
            json: OnceLock::new(),
        }))
    }
}

impl Deref for ReportMessage {
    type Target = Report;

    fn deref(&self) -> &Report {
        &self.0.report
    }
}

/// `data` of a job's report. Consumers ignore fields they do not know.
#[derive(Debug, Clone, Serialize)]
pub struct ReportData {
    /// The producer's job id; absent only for a rejected job whose id could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<JobId>,
    /// Whose.
    pub tenant: TenantId,
    /// The account the job is for; `null` when none could be found.
    pub account: Option<Arc<str>>,
    /// Who really sent, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sender: Option<Sender>,
    /// Which attempt this was, from 1; 0 before the first. One that a limit splits into parts is one. One that its worker's death cut short does not count, unless held.
    pub attempt: u32,
    /// Message-ID of the mail, with angle brackets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message_id: Option<Arc<str>>,
    /// One entry per recipient, cumulative over attempts.
    pub recipients: Vec<RecipientResult>,
    /// Some recipients got it and some did not.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub partial: bool,
    /// A fixed, documented word saying why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The same in a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Failure class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<&'static str>,
    /// Whose fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<&'static str>,
    /// Stage at which it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<&'static str>,
    /// The invalid fields of a rejected job, as JSON pointers with what is allowed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// Nothing more follows about this job.
    #[serde(rename = "final")]
    pub is_final: bool,
    /// Rises with every report of the job; the highest is the latest, whatever the order of arrival.
    pub sequence: i64,
    /// AMQP `correlation_id` of the job, else its id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<Arc<str>>,
    /// W3C trace context of the producer, as in the job's header; of the attempt, if it has a span.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// When the next attempt is expected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_attempt_at: Option<Timestamp>,
    /// Attempts of which nobody knows the outcome: a worker died over them, or the connection broke at the end.
    #[serde(skip_serializing_if = "is_zero")]
    pub uncertain_attempts: u32,
    /// How long things took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
    /// The job's batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<String>,
    /// The job's tags.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// The job's metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Value>,
    /// Attachments that were replaced by links.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<LinkedFile>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde's skip_serializing_if passes a reference"
)]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// Who really sent a mail.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Sender {
    /// `override`, `account` or `platform`.
    pub via: &'static str,
    /// `tenant/account` of the sending account; absent for an override.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub account: Option<AccountKey>,
    /// Why the platform sent: `not_configured`, `unhealthy` or `send_error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
}

/// What happened to one recipient.
#[derive(Debug, Clone, Serialize, serde::Deserialize, PartialEq, Eq)]
pub struct RecipientResult {
    /// The address as in the job.
    pub address: Arc<str>,
    /// `accepted`, `deferred`, `refused` or `pending`.
    pub status: RecipientStatus,
    /// Reply code.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub code: Option<u16>,
    /// Enhanced status code.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub enhanced_code: Option<Arc<str>>,
    /// Reply text.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub text: Option<Arc<str>>,
}

/// State of one recipient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecipientStatus {
    /// The server took the mail for it.
    Accepted,
    /// Refused for now; tried again.
    Deferred,
    /// Refused for good.
    Refused,
    /// It has had no turn yet, in this attempt or in any.
    Pending,
}

impl RecipientResult {
    /// A recipient not tried yet.
    #[must_use]
    pub fn pending(address: &str) -> Self {
        Self {
            address: address.into(),
            status: RecipientStatus::Pending,
            code: None,
            enhanced_code: None,
            text: None,
        }
    }

    /// Notes what the server said about it.
    pub fn record(&mut self, status: RecipientStatus, reply: Option<&Reply>) {
        self.status = status;
        self.code = reply.map(|r| r.code);
        self.enhanced_code = reply.and_then(|r| r.enhanced.clone());
        self.text = reply.map(|r| Arc::clone(&r.text));
    }

    /// What the server said about it last.
    #[must_use]
    pub fn reply(&self) -> Option<Reply> {
        let text = self.text.as_deref().unwrap_or_default();
        Some(Reply {
            code: self.code?,
            enhanced: self.enhanced_code.clone(),
            text: text.into(),
        })
    }

    /// Whether it still waits for the mail.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self.status, RecipientStatus::Pending | RecipientStatus::Deferred)
    }
}

/// One invalid field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FieldError {
    /// JSON pointer (RFC 6901) of the field; empty for the whole body.
    pub pointer: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

/// Durations in milliseconds.
#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq)]
pub struct Timings {
    /// From the job's first claim to the end of this attempt.
    pub total_ms: u64,
    /// The SMTP transaction of this attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smtp_ms: Option<u64>,
}

/// An attachment that became a link.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct LinkedFile {
    /// Its file name.
    pub filename: String,
    /// Size in bytes.
    pub size: u64,
    /// When the link stops working.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

impl ReportData {
    /// Takes over class, fault, stage, reason and sentence of a failure.
    pub fn blame(&mut self, failure: &Failure) {
        self.class = Some(failure.class.as_str());
        self.fault = Some(failure.fault.as_str());
        self.stage = Some(failure.stage.as_str());
        self.reason = Some(failure.reason.to_owned());
        self.detail = Some(failure.message.clone());
    }
}

/// The event id: `evt_` and the first 128 bits, in hex, of SHA-256 over tenant, kind of subject, subject and sequence.
/// Deterministic, so that a repeat is recognised by every receiver.
#[must_use]
pub fn event_id(tenant: &str, kind: &str, subject: &str, sequence: &str) -> String {
    let mut hash = Sha256::new();
    for part in [tenant, kind, subject, sequence] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part.as_bytes());
    }
    let digest = hash.finalize();
    let mut id = String::with_capacity(36);
    id.push_str("evt_");
    for byte in &digest[..16] {
        let _ = write!(id, "{byte:02x}");
    }
    id
}

/// Whether this has the form of a `traceparent` (W3C Trace Context §3.2: 55 characters, later versions may be longer).
#[must_use]
pub fn is_traceparent(text: &str) -> bool {
    const LONGEST: usize = 128;
    (55..=LONGEST).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || b.is_ascii_lowercase() || b == b'-')
}

/// Routing key of a report on the reports exchange.
#[must_use]
pub fn routing_key(tenant: &str, kind: &str) -> String {
    format!("report.{tenant}.{kind}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_context_has_a_form_and_a_length() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert!(is_traceparent(good));
        let bad = [
            "",
            "x",
            "00-\0",
            &good.to_uppercase(),
            &good.replace('-', " "),
            &good.repeat(2000),
        ];
        for bad in bad {
            assert!(!is_traceparent(bad), "{} bytes", bad.len());
        }
    }

    #[test]
    fn event_ids_differ_by_every_part_and_repeat_exactly() {
        let id = event_id("acme", "job", "1", "7");
        assert_eq!(id, event_id("acme", "job", "1", "7"));
        assert_eq!(id.len(), 36);
        for other in [
            event_id("acm", "ejob", "1", "7"),
            event_id("acme", "job", "17", ""),
            event_id("acme", "job", "1", "8"),
        ] {
            assert_ne!(id, other);
        }
    }
}
