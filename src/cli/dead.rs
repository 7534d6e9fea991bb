//! `postroom dead`: the queues where messages wait for an operator. Plain AMQP, no plugin.
//!
//! A queue is walked by taking message after message without acknowledging; what stays is given back at the end.

mod letter;

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use comfy_table::Table;
use comfy_table::presets;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection};
use tokio::time::timeout;

use crate::broker::{self, BrokerError, PublishError, Publisher, Topology};
use crate::config;
use crate::telemetry::metrics::Metrics;
use letter::Letter;

/// For one request to the broker.
const LIMIT: Duration = Duration::from_secs(15);

/// `postroom dead …`
#[derive(Debug, Clone, Subcommand)]
pub enum DeadCommand {
    /// List dead messages with their reason
    List(Filter),
    /// Show dead messages with headers and body; secrets are hidden, sealed bodies stay sealed
    Show(Filter),
    /// Publish dead messages again, where they were published first
    Replay(Filter),
    /// Delete dead messages
    Drop(Filter),
}

/// Which queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum DeadQueue {
    /// Jobs that could not be processed
    #[default]
    Jobs,
    /// Reports that could not be processed
    Reports,
    /// Messages whose routing key no queue wanted
    Unroutable,
}

/// Which messages.
#[derive(Debug, Clone, Default, Args)]
pub struct Filter {
    /// Which queue to look into
    #[arg(long, value_enum, default_value_t)]
    pub queue: DeadQueue,
    /// Only messages with this reason
    #[arg(long)]
    pub reason: Option<String>,
    /// Only messages of this tenant
    #[arg(long)]
    pub tenant: Option<String>,
    /// Only messages with this job id or AMQP message id
    #[arg(long)]
    pub id: Option<String>,
    /// At most this many
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// All of them; replay and drop ask for this or for another filter
    #[arg(long)]
    pub all: bool,
    /// One JSON object per line
    #[arg(long)]
    pub json: bool,
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum DeadError {
    /// Nothing says which messages are meant.
    #[error("say which: --id, --reason, --tenant, --limit or --all")]
    Unspecific,
    /// The broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The replay is not known to be stored; the message stays dead.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The body cannot be unsealed.
    #[error("cannot open the sealed message {id}: {reason}")]
    Sealed {
        /// Which.
        id: String,
        /// Why.
        reason: String,
    },
    /// Metrics could not be set up.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// Standard output.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

impl DeadError {
    /// Whether the command was used wrongly (exit code 2) rather than having failed.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Unspecific)
    }
}

impl From<lapin::Error> for DeadError {
    fn from(error: lapin::Error) -> Self {
        Self::Broker(error.into())
    }
}

/// Opens a body that was sealed as a whole.
pub type Unseal<'a> = &'a (dyn Fn(&str) -> Result<Vec<u8>, String> + Send + Sync);

/// Runs the command.
///
/// # Errors
/// See [`DeadError`]. What was done before the error stays done.
pub async fn run(
    command: &DeadCommand,
    config: &config::Broker,
    unseal: Unseal<'_>,
    out: &mut (dyn Write + Send),
) -> Result<(), DeadError> {
    let (filter, action) = match command {
        DeadCommand::List(filter) => (filter, Action::List),
        DeadCommand::Show(filter) => (filter, Action::Show),
        DeadCommand::Replay(filter) => (filter, Action::Replay),
        DeadCommand::Drop(filter) => (filter, Action::Drop),
    };
    if matches!(action, Action::Replay | Action::Drop) && !filter.is_specific() {
        return Err(DeadError::Unspecific);
    }
    let topology = Topology::new(&config.prefix, &config.extra_queues);
    let connection = broker::connect(config, "dead").await?;
    let walk = Walk {
        action,
        filter,
        unseal,
        publisher: Publisher::on(&connection, Arc::new(Metrics::new()?)).await?,
        topology,
    };
    let result = walk.run(&connection, out).await;
    broker::close(&connection).await;
    result
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    List,
    Show,
    Replay,
    Drop,
}

struct Walk<'a> {
    action: Action,
    filter: &'a Filter,
    unseal: Unseal<'a>,
    publisher: Publisher,
    topology: Topology,
}

impl Walk<'_> {
    async fn run(&self, connection: &Connection, out: &mut (dyn Write + Send)) -> Result<(), DeadError> {
        let queue = self.filter.queue.name(&self.topology);
        let channel = connection.create_channel().await?;
        let walked = self.walk(&channel, &queue, out).await;
        // Everything taken and not acknowledged goes back to its place.
        let options = BasicNackOptions {
            multiple: true,
            requeue: true,
        };
        if channel.status().connected() {
            let _ = timeout(LIMIT, channel.basic_nack(0, options)).await;
            let _ = timeout(LIMIT, channel.close(200, "done".into())).await;
        }
        walked
    }

    /// At most as many messages as there are now: a replayed one may be dead again at once.
    async fn walk(
        &self,
        channel: &Channel,
        queue: &str,
        out: &mut (dyn Write + Send),
    ) -> Result<(), DeadError> {
        let mut done = 0;
        let mut rows = Vec::new();
        for _ in 0..depth(channel, queue).await? {
            if self.filter.limit.is_some_and(|limit| done >= limit) {
                break;
            }
            let getting = channel.basic_get(queue.into(), BasicGetOptions::default());
            let Some(message) = answered(getting, "basic.get").await? else {
                break;
            };
            let tag = message.delivery.delivery_tag;
            let letter = Letter::new(message.delivery);
            if !self.filter.matches(&letter) {
                continue;
            }
            done += 1;
            match self.action {
                Action::List if self.filter.json => writeln!(out, "{}", letter.summary())?,
                Action::List => rows.push(letter.row()),
                Action::Show if self.filter.json => writeln!(out, "{}", letter.full())?,
                Action::Show => writeln!(out, "{:#}", letter.full())?,
                Action::Replay => {
                    self.replay(&letter).await?;
                    answered(channel.basic_ack(tag, BasicAckOptions::default()), "basic.ack").await?;
                }
                Action::Drop => {
                    answered(channel.basic_ack(tag, BasicAckOptions::default()), "basic.ack").await?;
                }
            }
        }
        self.conclude(done, rows, out)
    }

    fn conclude(
        &self,
        done: usize,
        rows: Vec<[String; 7]>,
        out: &mut (dyn Write + Send),
    ) -> Result<(), DeadError> {
        match self.action {
            Action::List if !self.filter.json => {
                let mut table = Table::new();
                table
                    .load_style(presets::NOTHING)
                    .set_header(["ID", "TENANT", "KEY", "REASON", "SINCE", "BYTES", "DETAIL"]);
                table.add_rows(rows);
                writeln!(out, "{table}")?;
            }
            Action::Replay => writeln!(out, "{done} replayed")?,
            Action::Drop => writeln!(out, "{done} dropped")?,
            Action::List | Action::Show => {}
        }
        Ok(())
    }

    async fn replay(&self, letter: &Letter) -> Result<(), DeadError> {
        let opened;
        let body = if letter.is_sealed() {
            let sealed = String::from_utf8_lossy(letter.body());
            opened = (self.unseal)(&sealed).map_err(|reason| DeadError::Sealed {
                id: letter.id().to_owned(),
                reason,
            })?;
            &opened
        } else {
            letter.body()
        };
        let (exchange, key) = letter.destination(self.filter.queue, &self.topology);
        self.publisher
            .publish(&exchange, &key, letter.replay_properties(), body)
            .await?;
        Ok(())
    }
}

impl DeadQueue {
    fn name(self, topology: &Topology) -> String {
        match self {
            Self::Jobs => topology.dead_jobs_queue(),
            Self::Reports => topology.dead_reports_queue(),
            Self::Unroutable => topology.unroutable_queue(),
        }
    }
}

impl Filter {
    fn is_specific(&self) -> bool {
        self.all
            || self.reason.is_some()
            || self.tenant.is_some()
            || self.id.is_some()
            || self.limit.is_some()
    }

    fn matches(&self, letter: &Letter) -> bool {
        let is = |wanted: &Option<String>, value: &str| wanted.as_deref().is_none_or(|w| w == value);
        is(&self.reason, letter.reason())
            && is(&self.tenant, letter.tenant())
            && self.id.as_deref().is_none_or(|id| letter.has_id(id))
    }
}

async fn depth(channel: &Channel, queue: &str) -> Result<u32, DeadError> {
    let options = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let declaring = channel.queue_declare(queue.into(), options, FieldTable::default());
    Ok(answered(declaring, "queue.declare").await?.message_count())
}

async fn answered<T>(
    request: impl Future<Output = lapin::Result<T>>,
    what: &'static str,
) -> Result<T, DeadError> {
    match timeout(LIMIT, request).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(BrokerError::Timeout { what }.into()),
    }
}
