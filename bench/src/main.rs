//! Side-by-side benchmarks: `make bench`. The product with all its guarantees on beside programs that do the same without
//! them, through one broker into one SMTP sink, in turn.
//!
//! | module | |
//! |---|---|
//! | [`sink`] | the SMTP server that all of them send to, and how it is told what to be |
//! | [`contestant`] | the programs that are compared, and how they are run |
//! | [`installation`] | virtual host, database, accounts, jobs |
//! | [`load`] | what is measured |
//! | [`run`] | the rounds |
//! | [`figures`], [`table`] | what came out |
//! | [`model`] | how many workers a number of mails a day takes, from measured costs |
#![expect(clippy::print_stdout, reason = "it is a tool for people")]

mod contestant;
mod figures;
mod installation;
mod load;
mod model;
mod processes;
mod produce;
mod run;
mod sink;
mod table;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What goes wrong is told, and ends the run.
type Failed = Box<dyn std::error::Error + Send + Sync>;

/// Benchmarks of postroom
#[derive(Debug, Parser)]
#[command(name = "postroom-bench")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure, print a table, write JSON
    Run(run::Options),
    /// How many workers, connections and databases a number of mails a day takes
    Model(model::Options),
    /// The SMTP server that all contestants send to
    #[command(hide = true)]
    Sink(sink::Options),
    /// The plain composition: lapin, lettre's bare connection, a confirmed report, ack
    #[command(hide = true)]
    Plain(contestant::Options),
    /// The same with lettre's pool as released
    #[command(hide = true)]
    Pool(contestant::Options),
}

// One thread, for all that is compared: what the plain composition is best with, and a sink that costs little.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Run(options) => Box::pin(run::run(options)).await,
        Command::Model(options) => model::run(&options),
        Command::Sink(options) => sink::run(options).await,
        Command::Plain(options) => Box::pin(contestant::plain(options)).await,
        Command::Pool(options) => Box::pin(contestant::pool(options)).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("postroom-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
