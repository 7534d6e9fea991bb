//! The command line: parsing, what each command needs from the settings, exit codes.
//!
//! To mount a command: a variant in `Command` and an arm in `Invocation::dispatch`. Its settings are in
//! `settings::sections` already.

mod account;
mod bridge;
pub mod dead;
pub mod endpoint;
mod error;
mod healthcheck;
pub mod job;
mod key;
mod limits;
mod migrate;
pub mod send;
mod service;
mod settings;
mod table;
mod tenant;
pub mod topology;
mod worker;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{FromArgMatches as _, Parser, Subcommand};

use crate::config::{self, FromSettings, Sources};
use crate::db::Database;
use crate::directory::Store;
use crate::secret::Keyring;
use crate::telemetry;

pub use error::CliError;
pub use service::{Service, ServiceError};

/// Outbound mail worker for RabbitMQ and Postgres.
#[derive(Debug, Parser)]
#[command(
    name = "postroom",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
enum Command {
    /// Consume jobs and send mail. Any number of copies may run.
    Worker,
    /// Forward reports to webhooks. Any number of copies may run.
    Bridge,
    /// Create the database schema, or bring it up to date.
    Migrate(migrate::Args),
    /// Exchanges, queues and bindings on the broker.
    #[command(subcommand)]
    Topology(topology::TopologyCommand),
    /// Look at jobs; cancel or release them.
    #[command(subcommand)]
    Job(job::JobCommand),
    /// Look at dead messages; replay or drop them.
    #[command(subcommand)]
    Dead(dead::DeadCommand),
    /// Publish one job.
    Send(send::SendArgs),
    /// Tenants: who may send.
    #[command(subcommand)]
    Tenant(tenant::Command),
    /// SMTP accounts of tenants.
    #[command(subcommand)]
    Account(account::Command),
    /// Webhook endpoints of tenants.
    #[command(subcommand)]
    Endpoint(endpoint::EndpointCommand),
    /// Keys of stored secrets.
    #[command(subcommand)]
    Key(key::Command),
    /// Ask a running process whether it is ready; for containers without curl.
    Healthcheck,
}

/// Done.
const DONE: u8 = 0;
/// Tried and failed.
const FAILED: u8 = 1;
/// Wrong use: arguments or settings.
const WRONG_USE: u8 = 2;

/// A parsed command line with the settings it comes with.
#[derive(Debug)]
pub struct Invocation {
    command: Command,
    sources: Sources,
}

impl Invocation {
    /// Parses arguments, the program's name first.
    ///
    /// # Errors
    /// With the exit code, if there is nothing to run: help was asked for (and printed), or the arguments are wrong
    /// (and it was said why).
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, ExitCode> {
        Self::try_parse(args).map_err(|error| {
            // Nobody to tell if even that fails.
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { WRONG_USE } else { DONE })
        })
    }

    fn try_parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let matches = settings::command().try_get_matches_from(args)?;
        let cli = Cli::from_arg_matches(&matches)?;
        Ok(Self {
            command: cli.command,
            sources: Sources::of_process(settings::flags(&matches)),
        })
    }

    /// Starts logging. If the settings for it are wrong, with the defaults: the command tells all wrong settings.
    pub fn start_logging(&self) {
        let wanted = config::load(&self.sources).or_else(|_| config::load(&Sources::default()));
        // It fails only if somebody else has started it.
        let _ = wanted.map(|wanted| telemetry::init(&wanted));
    }

    /// Runs the command, prints its error if it has one, and gives the exit code.
    pub async fn run(self) -> ExitCode {
        for warning in self.sources.unknown() {
            tracing::warn!("{warning}");
        }
        let is_service = matches!(self.command, Command::Worker | Command::Bridge);
        let mut out = std::io::stdout();
        let result = self
            .dispatch(&mut out)
            .await
            .and_then(|()| out.flush().map_err(CliError::from));
        match result {
            Ok(()) => ExitCode::from(DONE),
            // `postroom job list | head`: who reads has seen enough.
            Err(error) if error.is_broken_pipe() => ExitCode::from(DONE),
            Err(error) => {
                let text = table::safe_lines(&error.to_string());
                let _ = writeln!(std::io::stderr(), "postroom: {text}");
                // Whoever looks at the log of a service looks for its last line.
                if is_service {
                    tracing::error!(%error, "this process cannot go on");
                }
                ExitCode::from(error.exit_code())
            }
        }
    }

    async fn dispatch(self, out: &mut (dyn Write + Send)) -> Result<(), CliError> {
        let sources = self.sources;
        match self.command {
            Command::Worker => Box::pin(worker::run(&sources)).await,
            Command::Bridge => Box::pin(bridge::run(&sources)).await,
            Command::Endpoint(command) => endpoint(command, &sources, out).await,
            Command::Topology(command) => topology(&command, &sources, out).await,
            Command::Job(command) => job::run(command, &load(&sources)?, out).await,
            Command::Dead(command) => dead(&command, &sources, out).await,
            Command::Send(args) => Ok(send::run(&args, &load(&sources)?, out).await?),
            Command::Migrate(args) => migrate::run(&args, &load(&sources)?, out).await,
            Command::Tenant(command) => {
                let store = Store::new(Database::connect(&load(&sources)?)?, None);
                tenant::run(command, &store, out).await
            }
            Command::Account(command) => {
                let keys = if command.seals() {
                    Some(Arc::new(encryption_keys(&sources)?))
                } else {
                    None
                };
                let store = Store::new(Database::connect(&load(&sources)?)?, keys);
                account::run(command, &store, &mut std::io::stdin(), out).await
            }
            Command::Key(key::Command::Generate(args)) => key::generate(&args, out),
            Command::Key(key::Command::Rotate) => {
                let keys = encryption_keys(&sources)?;
                key::rotate(&Database::connect(&load(&sources)?)?, &keys, out).await
            }
            Command::Healthcheck => healthcheck::run(&load(&sources)?, out).await,
        }
    }
}

/// The sections that a command needs; `T` is one or a tuple. The settings of the log are checked with them.
fn load<T: FromSettings>(sources: &Sources) -> Result<T, CliError> {
    config::load::<(config::Telemetry, T)>(sources)
        .map(|(_, wanted)| wanted)
        .map_err(CliError::Config)
}

/// `topology print` needs no broker.
async fn topology(
    command: &topology::TopologyCommand,
    sources: &Sources,
    out: &mut (dyn Write + Send),
) -> Result<(), CliError> {
    let broker = match command {
        topology::TopologyCommand::Print => load::<config::BrokerNames>(sources)?.0,
        _ => load(sources)?,
    };
    Ok(topology::run(command, &broker, out).await?)
}

/// Sealed dead letters are opened with the keys at rest, if they are at hand.
async fn dead(
    command: &dead::DeadCommand,
    sources: &Sources,
    out: &mut (dyn Write + Send),
) -> Result<(), CliError> {
    let broker: config::Broker = load(sources)?;
    // Most letters are not sealed: what is wrong with the keys is said of one that is.
    let keys = encryption_keys(sources).map_err(|error| error.to_string());
    let unseal = |sealed: &str| {
        let keys = keys.as_ref().map_err(Clone::clone)?;
        let opened = keys
            .open_bytes(sealed, crate::worker::DEAD_BODY)
            .map_err(|error| error.to_string())?;
        Ok(opened.to_vec())
    };
    match dead::run(command, &broker, &unseal, out).await {
        Err(error) if error.is_usage() => Err(CliError::Usage(error.to_string())),
        other => Ok(other?),
    }
}

/// Secrets come in on standard input; remarks, such as a new secret's fate, go to standard error.
async fn endpoint(
    command: endpoint::EndpointCommand,
    sources: &Sources,
    out: &mut (dyn Write + Send),
) -> Result<(), CliError> {
    let seals = matches!(&command, endpoint::EndpointCommand::Set(args) if args.seals());
    let keys = if seals {
        Some(encryption_keys(sources)?)
    } else {
        None
    };
    let database = Database::connect(&load(sources)?)?;
    let streams = endpoint::Streams {
        input: &mut std::io::BufReader::new(std::io::stdin()),
        output: out,
        remarks: &mut std::io::stderr(),
    };
    match endpoint::run(command, &database, keys.as_ref(), streams).await {
        Err(error) if error.is_wrong_use() => Err(CliError::Usage(error.to_string())),
        other => Ok(other?),
    }
}

/// The keys of stored secrets; wrong ones are wrong use, as any other setting.
fn encryption_keys(sources: &Sources) -> Result<Keyring, CliError> {
    let keys: config::Keys = load(sources)?;
    Keyring::parse(&keys.encryption)
        .map_err(|error| CliError::Usage(format!("POSTROOM_ENCRYPTION_KEYS: {error}")))
}
