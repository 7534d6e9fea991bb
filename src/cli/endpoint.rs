//! `postroom endpoint`: where a tenant's reports go.

mod args;
mod print;

use std::io::{self, BufRead, Write};

use secrecy::{ExposeSecret as _, SecretString};

use super::table;
use crate::bridge::signature::{self, InvalidSecret, SigningKey};
use crate::db::Database;
use crate::endpoint::{self, Change, Endpoint, EndpointError, Replay, SealedAuth};
use crate::secret::Keyring;
use crate::secret::stored::{StoredError, verify_sealing};

pub use args::{EndpointCommand, EventFilter, ListArgs, NameArgs, ReplayArgs, SetArgs, ShowArgs};

/// Longest line read from standard input for a secret, in bytes.
const MAX_SECRET: u64 = 8 << 10;

/// Why the command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EndpointCommandError {
    /// The endpoint or the database.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The secret read from standard input.
    #[error(transparent)]
    Secret(#[from] InvalidSecret),
    /// Nothing on standard input.
    #[error("no {0} on standard input")]
    Missing(&'static str),
    /// A token or password that no header may carry.
    #[error("the {0} may only have printable ASCII characters")]
    Unprintable(&'static str),
    /// Cut off, it would be stored and never work.
    #[error("the {0} is too long; at most {MAX_SECRET} bytes")]
    TooLong(&'static str),
    /// Secrets are stored sealed.
    #[error("POSTROOM_ENCRYPTION_KEYS is not set: secrets of endpoints are stored sealed")]
    NoKeys,
    /// The keys do not fit what is stored.
    #[error(transparent)]
    Keys(#[from] StoredError),
    /// Reading or writing.
    #[error("standard input or output: {0}")]
    Io(#[from] io::Error),
}

impl EndpointCommandError {
    /// Whether other arguments or input would do: exit code 2, else 1.
    #[must_use]
    pub fn is_wrong_use(&self) -> bool {
        match self {
            Self::Endpoint(error) => {
                matches!(
                    error,
                    EndpointError::UrlMissing { .. } | EndpointError::NotPlatform
                )
            }
            Self::Secret(_) | Self::Missing(_) | Self::Unprintable(_) | Self::TooLong(_) | Self::NoKeys => {
                true
            }
            Self::Keys(_) | Self::Io(_) => false,
        }
    }
}

/// Standard input, output and error of a command.
pub struct Streams<'a> {
    /// Where secrets are read from.
    pub input: &'a mut dyn BufRead,
    /// Where results go.
    pub output: &'a mut dyn Write,
    /// Where remarks go.
    pub remarks: &'a mut dyn Write,
}

impl std::fmt::Debug for Streams<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Streams")
    }
}

/// Carries out `postroom endpoint …`. Only a `set` that stores a secret needs the keys.
///
/// # Errors
/// With a sentence for the operator; [`EndpointCommandError::is_wrong_use`] tells the exit code.
pub async fn run(
    command: EndpointCommand,
    db: &Database,
    keyring: Option<&Keyring>,
    streams: Streams<'_>,
) -> Result<(), EndpointCommandError> {
    match command {
        EndpointCommand::Set(args) => set(*args, db, keyring, streams).await,
        EndpointCommand::Show(ShowArgs { which, json }) => {
            let found = endpoint::show(db, &which.tenant, &which.name).await?;
            let printed = if json {
                table::json(streams.output, &found)
            } else {
                print::one(&found, streams.output)
            };
            Ok(printed?)
        }
        EndpointCommand::List(ListArgs { tenant, json }) => {
            let found = endpoint::list(db, tenant.as_ref()).await?;
            let printed = if json {
                table::json(streams.output, &found)
            } else {
                print::table(&found, streams.output)
            };
            Ok(printed?)
        }
        EndpointCommand::Remove(which) => Ok(endpoint::remove(db, &which.tenant, &which.name).await?),
        EndpointCommand::Replay(args) => replay(args, db, streams).await,
    }
}

async fn set(
    args: SetArgs,
    db: &Database,
    keyring: Option<&Keyring>,
    streams: Streams<'_>,
) -> Result<(), EndpointCommandError> {
    let mut secret = new_secret(&args, streams.input)?;
    let (secret_sealed, auth) = if args.seals() {
        let keyring = keyring.ok_or(EndpointCommandError::NoKeys)?;
        // Sealed with a wrong key it would be lost to every bridge.
        verify_sealing(db, keyring).await?;
        // A script that says the same again does not rotate.
        let current = current_secret(&args.which, db, keyring).await?;
        secret =
            secret.filter(|new| current.is_none_or(|current| current.expose_secret() != new.expose_secret()));
        sealed(&args, secret.as_ref(), keyring, streams.input)?
    } else {
        (None, args.no_auth.then_some(SealedAuth::None))
    };
    let NameArgs { tenant, name } = &args.which;
    let change = Change {
        url: args.url,
        secret: secret_sealed,
        keep_previous: args.rotate_keep,
        receiver_has: args.receiver_has,
        auth,
        events: args.events.map(|filter| filter.0),
        all_tenants: args.all,
        enabled: if args.enable {
            Some(true)
        } else {
            args.disable.then_some(false)
        },
    };
    let before = endpoint::show(db, tenant, name).await.ok();
    endpoint::set(db, tenant, name, &change).await?;
    if let Some(secret) = secret.as_ref().filter(|_| args.generate_secret) {
        writeln!(streams.output, "{}", secret.expose_secret())?;
    }
    let after = endpoint::show(db, tenant, name).await?;
    remark(&after, streams.remarks)?;
    match before {
        Some(before) => remark_change(&before, &after, streams.remarks),
        None => Ok(()),
    }
}

/// The endpoint's signing secret. One that cannot be opened is as good as none.
async fn current_secret(
    which: &NameArgs,
    db: &Database,
    keyring: &Keyring,
) -> Result<Option<SecretString>, EndpointCommandError> {
    let NameArgs { tenant, name } = which;
    let stored = endpoint::stored_secret(db, tenant, name).await?;
    let aad = endpoint::secret_aad(tenant.as_str(), name.as_str());
    Ok(stored.and_then(|sealed| keyring.open(&sealed, &aad).ok()))
}

/// What is stored of the secret and of new credentials.
fn sealed(
    args: &SetArgs,
    secret: Option<&SecretString>,
    keyring: &Keyring,
    input: &mut dyn BufRead,
) -> Result<(Option<String>, Option<SealedAuth>), EndpointCommandError> {
    let NameArgs { tenant, name } = &args.which;
    let seal = |secret: &SecretString, aad: &str| keyring.seal(secret.expose_secret().as_bytes(), aad);
    let secret = secret.map(|s| seal(s, &endpoint::secret_aad(tenant.as_str(), name.as_str())));
    let auth = new_auth(args, input, |secret| {
        seal(secret, &endpoint::credential_aad(tenant.as_str(), name.as_str()))
    })?;
    Ok((secret, auth))
}

/// A new signing secret, made or read.
fn new_secret(args: &SetArgs, input: &mut dyn BufRead) -> Result<Option<SecretString>, EndpointCommandError> {
    let secret = if args.generate_secret {
        signature::generate()
    } else if args.secret_stdin {
        read_secret(input, "signing secret")?
    } else {
        return Ok(None);
    };
    SigningKey::parse(&secret)?;
    Ok(Some(secret))
}

/// New credentials, read and sealed.
fn new_auth(
    args: &SetArgs,
    input: &mut dyn BufRead,
    seal: impl Fn(&SecretString) -> String,
) -> Result<Option<SealedAuth>, EndpointCommandError> {
    if let Some(username) = args.basic_user.clone() {
        let password = seal(&read_secret(input, "password")?);
        return Ok(Some(SealedAuth::Basic { username, password }));
    }
    if args.bearer_stdin {
        let token = read_secret(input, "bearer token")?;
        if !token.expose_secret().bytes().all(|b| b.is_ascii_graphic()) {
            return Err(EndpointCommandError::Unprintable("bearer token"));
        }
        return Ok(Some(SealedAuth::Bearer(seal(&token))));
    }
    Ok(args.no_auth.then_some(SealedAuth::None))
}

/// What the operator should know about an endpoint just set.
fn remark(endpoint: &Endpoint, out: &mut dyn Write) -> Result<(), EndpointCommandError> {
    let Endpoint { tenant, name, .. } = endpoint;
    if endpoint.url.starts_with("http:") {
        writeln!(
            out,
            "warning: reports travel to {tenant}/{name} in clear; use an https URL"
        )?;
    }
    if !endpoint.has_secret {
        writeln!(
            out,
            "warning: deliveries to {tenant}/{name} are not signed; add --generate-secret"
        )?;
    }
    if !endpoint.enabled {
        writeln!(out, "note: {tenant}/{name} is disabled; --enable switches it on")?;
    }
    Ok(())
}

/// What the change itself leaves to do.
fn remark_change(
    before: &Endpoint,
    after: &Endpoint,
    out: &mut dyn Write,
) -> Result<(), EndpointCommandError> {
    let Endpoint { tenant, name, .. } = after;
    if let (Some(since), true) = (before.disabled_at, after.enabled) {
        writeln!(
            out,
            "note: reports since {since} were not queued for it: postroom endpoint replay {tenant} {name} --since {since}"
        )?;
    }
    Ok(())
}

async fn replay(args: ReplayArgs, db: &Database, streams: Streams<'_>) -> Result<(), EndpointCommandError> {
    let ReplayArgs {
        which,
        event,
        since,
        until,
        failed,
    } = args;
    let what = match (event, since) {
        (Some(event), _) => Replay::Event(event),
        (None, Some(since)) if !failed => Replay::Received { since, until },
        (None, since) => Replay::Failed { since, until },
    };
    let replayed = endpoint::replay(db, &which.tenant, &which.name, &what).await?;
    writeln!(streams.output, "{replayed} events will be sent again")?;
    Ok(())
}

/// One line, without its end.
fn read_secret(input: &mut dyn BufRead, what: &'static str) -> Result<SecretString, EndpointCommandError> {
    let mut line = zeroize::Zeroizing::new(String::new());
    // Room for the end of the line.
    io::Read::take(input, MAX_SECRET + 2).read_line(&mut line)?;
    let secret = line.trim_end_matches(['\r', '\n']);
    if secret.len() as u64 > MAX_SECRET {
        return Err(EndpointCommandError::TooLong(what));
    }
    if secret.is_empty() {
        return Err(EndpointCommandError::Missing(what));
    }
    if secret.chars().any(char::is_control) {
        return Err(EndpointCommandError::Unprintable(what));
    }
    Ok(secret.into())
}
