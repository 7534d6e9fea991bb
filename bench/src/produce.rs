//! Jobs, published with confirms.

use std::fmt::Write as _;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};

use crate::Failed;
use crate::installation::{JOBS, REPORTS_QUEUE};

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
            deferred: false,
            parked: false,
            expiring: false,
        }
    }
}

impl Jobs {
    fn job(&self, run: &str, text: &str, n: usize) -> (String, String) {
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
            r#"{{"id":"{run}-{n}","tenant":"{tenant}","to":[{to}],"subject":"Order {n}","text":"{text}"{when}}}"#
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
        // JSON's line ends; lines of an ordinary length, so that nobody has to encode them.
        let line = "Lorem ipsum dolor sit amet, consetetur sadipscing elitr, sed diam.\\r\\n";
        let text = line.repeat(jobs.text.div_ceil(line.len()));
        stream::iter(0..jobs.count)
            .map(|n| {
                let (key, job) = jobs.job(run, &text, n);
                self.one(key, job)
            })
            .buffer_unordered(IN_FLIGHT.min(1 + (64 << 20) / text.len()))
            .try_collect::<()>()
            .await
    }

    /// Publishes one job and returns once it is confirmed.
    pub(crate) async fn one(&self, key: String, job: String) -> Result<(), Failed> {
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into());
        let options = BasicPublishOptions::default();
        let publishing = self.channel.basic_publish(
            "mail.jobs".into(),
            key.into(),
            options,
            job.as_bytes(),
            properties,
        );
        if publishing.await?.await?.is_ack() {
            Ok(())
        } else {
            Err("a job was not confirmed".into())
        }
    }

    /// A job of its own, for when the time it takes is measured.
    pub(crate) async fn single(&self, run: &str, jobs: &Jobs, n: usize) -> Result<(), Failed> {
        let text = "Lorem ipsum dolor sit amet. ".repeat(jobs.text / 28);
        let (key, job) = jobs.job(run, &text, n);
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
