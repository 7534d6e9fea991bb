//! `postroom key`.

use std::io::Write;

use secrecy::ExposeSecret;

use super::CliError;
use crate::db::Database;
use crate::secret::Keyring;
use crate::secret::stored::{rotate as reseal_all, verify_keys};

/// What can be done with keys.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Print a new random key as `kid:base64`, one entry of `POSTROOM_ENCRYPTION_KEYS` or
    /// `POSTROOM_OVERRIDE_KEYS`.
    Generate(GenerateArgs),
    /// Seal all stored secrets with the active key, so that the others can be removed.
    Rotate,
}

#[derive(Debug, clap::Args)]
pub(super) struct GenerateArgs {
    /// Id of the key: 1 to 64 characters of A-Z a-z 0-9 _ . - (by default made from the date).
    #[arg(long, value_name = "KID")]
    id: Option<String>,
}

/// Prints a fresh key.
pub(super) fn generate(args: &GenerateArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let kid = args.id.clone().unwrap_or_else(dated_kid);
    let entry = Keyring::generate_entry(&kid).map_err(|_| {
        CliError::Usage(format!(
            "--id: a key id must be {}",
            crate::secret::keyring::KID_RULE
        ))
    })?;
    writeln!(out, "{}", entry.expose_secret())?;
    Ok(())
}

/// The date, so that one sees how old a key is, and a random part, so that two of a day differ.
fn dated_kid() -> String {
    format!(
        "k{}-{:04x}",
        jiff::Timestamp::now().strftime("%Y%m%d"),
        rand::random::<u16>()
    )
}

/// Seals everything stored with the active key and says what was done.
pub(super) async fn rotate(db: &Database, keys: &Keyring, out: &mut dyn Write) -> Result<(), CliError> {
    verify_keys(db, keys).await?;
    let rotated = reseal_all(db, keys).await?;
    writeln!(
        out,
        "{} secrets sealed anew with key {}",
        rotated.resealed,
        keys.active()
    )?;
    if rotated.failed == 0 {
        return Ok(());
    }
    for place in &rotated.unopened {
        writeln!(out, "cannot be opened: {place}")?;
    }
    let text = format!("{} secrets could not be opened; set them anew", rotated.failed);
    Err(std::io::Error::other(text).into())
}
