//! Jobs, published with confirms.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};

use crate::Failed;
use crate::installation::{JOBS, REPORTS, REPORTS_QUEUE};

/// Unconfirmed at once.
const IN_FLIGHT: usize = 512;

/// What the jobs of a run are like.
#[derive(Debug, Clone)]
pub(crate) struct Jobs {
    pub(crate) count: usize,
    /// `free`, `limited`, `many-limits`, `tls`: the tenants are `free-0`, `free-1`, …
    pub(crate) tenants: &'static str,
    pub(crate) accounts: usize,
    pub(crate) recipients: usize,
    /// Bytes of the text.
    pub(crate) text: usize,
    /// Bytes of a PDF. Then the text is HTML with umlauts and bare line feeds, as programs write it.
    pub(crate) pdf: usize,
    /// Every second job goes to somebody who is put off the first time.
    pub(crate) deferred: bool,
    /// Not before next century.
    pub(crate) parked: bool,
    /// Not after this century.
    pub(crate) expiring: bool,
}

impl Default for Jobs {
    fn default() -> Self {
        Self {
            count: 0,
            tenants: "free",
            accounts: 1,
            recipients: 1,
            text: 1400,
            pdf: 0,
            deferred: false,
            parked: false,
            expiring: false,
        }
    }
}

impl Jobs {
    /// The bodies and files of each job, as JSON.
    fn content(&self) -> String {
        if self.pdf == 0 {
            // JSON's line ends; lines of an ordinary length, so that nobody has to encode them.
            let line = r"Lorem ipsum dolor sit amet, consetetur sadipscing elitr, sed diam.\r\n";
            return format!(r#""text":"{}""#, line.repeat(self.text.div_ceil(line.len())));
        }
        let line = r#"<td style=\"padding: 4px 12px\">Stück: zwölf Gläser. Grüße an alle</td>\n"#;
        let html = line.repeat(self.text.div_ceil(line.len()));
        // Bytes that look like compressed ones.
        let pdf: Vec<u8> = (0..self.pdf as u32)
            .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
            .collect();
        let pdf = STANDARD.encode(pdf);
        format!(r#""html":"{html}","attachments":[{{"filename":"invoice.pdf","base64":"{pdf}"}}]"#)
    }

    fn job(&self, run: &str, content: &str, n: usize) -> (String, String) {
        let tenant = format!("{}-{}", self.tenants, n % self.accounts);
        let who = if self.deferred && n.is_multiple_of(2) {
            "later"
        } else {
            "ann"
        };
        let mut to = String::new();
        for recipient in 0..self.recipients {
            let comma = if recipient == 0 { "" } else { "," };
            let _ = write!(to, r#"{comma}"{who}-{run}-{n}-{recipient}@example.org""#);
        }
        let when = if self.parked {
            r#","send_at":"2200-01-01T00:00:00Z""#
        } else if self.expiring {
            r#","expires_at":"2100-01-01T00:00:00Z""#
        } else {
            ""
        };
        let job = format!(
            r#"{{"id":"{run}-{n}","tenant":"{tenant}","to":[{to}],"subject":"Order {n}",{content}{when}}}"#
        );
        (format!("medium.{tenant}"), job)
    }
}

/// A connection to the broker.
#[derive(Debug)]
pub(crate) struct Producer {
    channel: Channel,
    _connection: Connection,
}

impl Producer {
    pub(crate) async fn connect(url: &str) -> Result<Self, Failed> {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self {
            channel,
            _connection: connection,
        })
    }

    /// Publishes all, with ids of this run.
    pub(crate) async fn publish(&self, run: &str, jobs: &Jobs) -> Result<(), Failed> {
        let content = jobs.content();
        stream::iter(0..jobs.count)
            .map(|n| {
                let (key, job) = jobs.job(run, &content, n);
                self.one(key, job)
            })
            .buffer_unordered(IN_FLIGHT.min(1 + (64 << 20) / content.len()))
            .try_collect::<()>()
            .await
    }

    /// Publishes a report for each of them, as a worker does.
    pub(crate) async fn publish_reports(&self, run: &str, jobs: &Jobs) -> Result<(), Failed> {
        stream::iter(0..jobs.count)
            .map(|n| {
                let tenant = format!("{}-{}", jobs.tenants, n % jobs.accounts);
                let report = format!(
                    r#"{{"type":"mail.sent","timestamp":"2026-01-01T00:00:00Z","data":{{"job":"{run}-{n}","tenant":"{tenant}","account":"main","attempt":1,"message_id":"<{run}-{n}@example.com>","recipients":[{{"address":"ann-{run}-{n}@example.org","status":"accepted","code":250,"enhanced_code":"2.0.0","text":"taken"}}],"final":true,"sequence":1700000000000,"correlation_id":"{run}-{n}","uncertain_attempts":0}}}}"#
                );
                let properties = BasicProperties::default()
                    .with_message_id(format!("evt_{run}{n}").into())
                    .with_type("mail.report.v1".into());
                self.confirmed(REPORTS, format!("report.{tenant}.mail.sent"), report, properties)
            })
            .buffer_unordered(IN_FLIGHT)
            .try_collect::<()>()
            .await
    }

    /// Publishes one job and returns once it is confirmed.
    pub(crate) async fn one(&self, key: String, job: String) -> Result<(), Failed> {
        self.confirmed("mail.jobs", key, job, BasicProperties::default())
            .await
    }

    async fn confirmed(
        &self,
        exchange: &str,
        key: String,
        body: String,
        properties: BasicProperties,
    ) -> Result<(), Failed> {
        let properties = properties
            .with_delivery_mode(2)
            .with_content_type("application/json".into());
        let options = BasicPublishOptions::default();
        let publishing =
            self.channel
                .basic_publish(exchange.into(), key.into(), options, body.as_bytes(), properties);
        if publishing.await?.await?.is_ack() {
            Ok(())
        } else {
            Err("a message was not confirmed".into())
        }
    }

    /// A job of its own, for when the time it takes is measured.
    pub(crate) async fn single(&self, run: &str, jobs: &Jobs, n: usize) -> Result<(), Failed> {
        let (key, job) = jobs.job(run, &jobs.content(), n);
        self.one(key, job).await
    }

    /// Reports that have arrived.
    pub(crate) async fn reports(&self) -> Result<u64, Failed> {
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let queue = self
            .channel
            .queue_declare(REPORTS_QUEUE.into(), passive, FieldTable::default())
            .await?;
        Ok(u64::from(queue.message_count()))
    }

    /// Empties the queues between two runs.
    pub(crate) async fn purge(&self) -> Result<(), Failed> {
        for queue in [JOBS, REPORTS_QUEUE] {
            self.channel
                .queue_purge(queue.into(), QueuePurgeOptions::default())
                .await?;
        }
        Ok(())
    }
}
