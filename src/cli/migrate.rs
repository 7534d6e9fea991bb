//! `postroom migrate`: the one command that needs the right to change the schema.

use std::io::Write;

use super::CliError;
use crate::config;
use crate::db;

/// Arguments of `postroom migrate`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Also let this role work with the schema, without the right to change it: the role of workers and bridges.
    #[arg(long, value_name = "ROLE")]
    grant: Option<String>,
}

/// Applies what is missing and says what was done.
pub(super) async fn run(args: &Args, config: &config::Database, out: &mut dyn Write) -> Result<(), CliError> {
    let migrated = db::migrate(config).await?;
    if migrated.applied.is_empty() {
        writeln!(
            out,
            "schema {} is up to date (version {})",
            config.schema, migrated.to
        )?;
    } else {
        let names = migrated.applied.join(", ");
        writeln!(
            out,
            "schema {}: version {} -> {} ({names})",
            config.schema, migrated.from, migrated.to
        )?;
    }
    if let Some(role) = &args.grant {
        db::grant(config, role).await?;
        writeln!(out, "schema {}: role {role} may work with it", config.schema)?;
    }
    Ok(())
}
