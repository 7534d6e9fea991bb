//! `postroom dead`: the queues where messages wait for an operator. Plain AMQP, no plugin.

mod letter;
mod walk;

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use crate::broker::{self, BrokerError, PublishError, Publisher, Topology};
use crate::config;
use crate::level::Level;
use crate::telemetry::metrics::Metrics;
use walk::{Action, Walk};

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
    Replay(Replay),
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
    /// Only messages with this job id or AMQP message id; replay and drop want --tenant too if several tenants use it
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

/// Which messages are published again, and how.
#[derive(Debug, Clone, Default, Args)]
pub struct Replay {
    /// Which.
    #[command(flatten)]
    pub filter: Filter,
    /// With --queue unroutable: the level of jobs whose routing key names none, such as a misspelt one
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<Level>,
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum DeadError {
    /// Nothing says which messages are meant.
    #[error("say which: --id, --reason, --tenant, --limit or --all")]
    Unspecific,
    /// A level where keys have one.
    #[error("--level is for --queue unroutable: jobs elsewhere keep the level of their key")]
    Level,
    /// An id that several tenants use.
    #[error(
        "`{id}` is in the dead letters of several tenants: {}; say whose with --tenant",
        shown(tenants)
    )]
    Ambiguous {
        /// The id.
        id: String,
        /// Whose letters have it; empty for those that name no tenant.
        tenants: Vec<String>,
    },
    /// Nothing has the id.
    #[error(
        "no message here has the id `{0}`, or another filter leaves it out; those that another `postroom dead` is reading \
         are hidden until it has done so"
    )]
    Unknown(String),
    /// The broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The replay is not known to be stored; the message stays dead.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Some could not be replayed, for reasons that the output names; the others were.
    #[error("could not be replayed and left where they are: {left}")]
    Left {
        /// How many.
        left: usize,
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
        matches!(self, Self::Unspecific | Self::Level | Self::Ambiguous { .. })
    }
}

fn shown(tenants: &[String]) -> String {
    let named = tenants.iter().map(|tenant| match tenant.as_str() {
        "" => "none (--tenant '')".to_owned(),
        tenant => format!("`{tenant}`"),
    });
    named.collect::<Vec<_>>().join(", ")
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
        DeadCommand::Replay(Replay { filter, level }) => (filter, Action::Replay(*level)),
        DeadCommand::Drop(filter) => (filter, Action::Drop),
    };
    if matches!(action, Action::Replay(_) | Action::Drop) && !filter.is_specific() {
        return Err(DeadError::Unspecific);
    }
    if matches!(action, Action::Replay(Some(_))) && filter.queue != DeadQueue::Unroutable {
        return Err(DeadError::Level);
    }
    let topology = Topology::new(&config.prefix, &config.extra_queues);
    let connection = broker::connect(config, "dead").await?;
    let walk = Walk {
        action,
        filter: filter.clone(),
        unseal,
        publisher: Publisher::on(&connection, Arc::new(Metrics::new()?)).await?,
        topology,
    };
    let result = walk.run(&connection, out).await;
    broker::close(&connection).await;
    result
}

impl Filter {
    fn is_specific(&self) -> bool {
        self.all
            || self.reason.is_some()
            || self.tenant.is_some()
            || self.id.is_some()
            || self.limit.is_some()
    }
}
