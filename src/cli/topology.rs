//! `postroom topology`: exchanges, queues and bindings on the broker.

use std::io::{self, Write};

use clap::Subcommand;
use secrecy::ExposeSecret as _;

use crate::broker::{self, BrokerError, Topology};
use crate::config;

/// `postroom topology …`
#[derive(Debug, Clone, Subcommand)]
pub enum TopologyCommand {
    /// Declare the exchanges, queues and bindings that are missing. Changes and deletes nothing that is there
    Apply,
    /// Say what is missing or different; change nothing
    Check,
    /// Print RabbitMQ definitions (JSON) for `rabbitmqctl import_definitions` or the management UI
    Print,
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum TopologyCommandError {
    /// The broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// Standard output.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Runs the command.
///
/// # Errors
/// See [`TopologyCommandError`].
pub async fn run(
    command: &TopologyCommand,
    config: &config::Broker,
    out: &mut (dyn Write + Send),
) -> Result<(), TopologyCommandError> {
    let topology = Topology::new(&config.prefix, &config.extra_queues);
    if let TopologyCommand::Print = command {
        let vhost = if config.url.expose_secret().is_empty() {
            "/".to_owned()
        } else {
            broker::vhost(&config.url)?
        };
        let definitions = topology.definitions(&vhost);
        return Ok(writeln!(out, "{definitions:#}")?);
    }
    let connection = broker::connect(config, "topology").await?;
    let said = match command {
        TopologyCommand::Apply => topology.apply(&connection).await.map(|applied| {
            let mut lines: Vec<_> = applied
                .created
                .iter()
                .map(|name| format!("created {name}\n"))
                .collect();
            lines.push(format!("{} already there\n", applied.present));
            lines.concat()
        }),
        _ => topology
            .check(&connection)
            .await
            .map(|()| "every exchange and queue is as it should be\n".to_owned()),
    };
    broker::close(&connection).await;
    out.write_all(said?.as_bytes())?;
    Ok(())
}
