//! `postroom account`.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use secrecy::SecretString;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::limits::{self, LimitFlags};
use super::tenant::of_directory;
use super::{CliError, table};
use crate::directory::limits::{parse_period, period_text};
use crate::directory::row::parse_mailbox;
use crate::directory::store::{AccountChange, StoredAccount};
use crate::directory::{Store, ca};
use crate::id::{AccountId, TenantId};
use crate::job::TlsMode;

/// Longest password read, in bytes.
const MAX_PASSWORD: u64 = 4_096;

/// What can be done with accounts.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Create an account, or change what is named. A new one needs --host, --port and --tls; a tenant's first account
    /// becomes its default.
    Set(Box<SetArgs>),
    /// Show an account, without its password.
    Show(ShowArgs),
    /// List the accounts of a tenant, or all.
    List(ListArgs),
    /// Remove an account with its limits.
    Remove {
        /// The tenant; `-` is the platform.
        tenant: TenantId,
        /// The account.
        account: AccountId,
    },
}

impl Command {
    /// Whether it stores a secret, so that the keys are needed.
    pub(super) fn seals(&self) -> bool {
        matches!(self, Self::Set(args) if args.password_stdin)
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct ListArgs {
    /// Only this tenant's; `-` is the platform.
    tenant: Option<TenantId>,
    /// Only those whose circuit breaker is not closed.
    #[arg(long)]
    unhealthy: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct ShowArgs {
    /// The tenant; `-` is the platform.
    tenant: TenantId,
    /// The account.
    account: AccountId,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct SetArgs {
    /// The tenant; `-` is the platform.
    tenant: TenantId,
    /// The account.
    account: AccountId,
    /// SMTP server: host name or address.
    #[arg(long)]
    host: Option<String>,
    /// Its port.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// How connections are protected.
    #[arg(long, value_name = "none|starttls|implicit")]
    tls: Option<TlsMode>,
    /// User name for AUTH; '' removes user name and password.
    #[arg(long, value_name = "U")]
    username: Option<String>,
    /// Read the password from standard input; a line break at its end is taken off.
    #[arg(long)]
    password_stdin: bool,
    /// Send the password over connections without TLS as well (=false takes it back).
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    allow_plaintext_auth: Option<bool>,
    /// Certificate authorities of the server, PEM, besides the system's; '' removes them.
    #[arg(long, value_name = "FILE")]
    // Not a path: clap refuses empty ones.
    ca_file: Option<OsString>,
    /// From address of mails whose job names none: a@b or 'Name <a@b>'; '' removes it.
    #[arg(long, value_name = "ADDRESS")]
    from: Option<String>,
    /// Connections at once, over all workers; 0 for no cap.
    #[arg(long, value_name = "N")]
    max_connections: Option<u32>,
    /// Attempts before a mail fails; 0 for the default.
    #[arg(long, value_name = "N")]
    max_attempts: Option<u32>,
    /// Age at which a mail that keeps being deferred fails, such as 12h or 3d; 0 for the default.
    #[arg(long, value_name = "D", value_parser = parse_period)]
    max_age: Option<Duration>,
    /// Make it the tenant's default, instead of the one that is.
    #[arg(long)]
    default: bool,
    #[command(flatten)]
    limits: LimitFlags,
}

/// Runs a command; `input` is where a password comes from.
pub(super) async fn run(
    command: Command,
    store: &Store,
    input: &mut dyn Read,
    out: &mut dyn Write,
) -> Result<(), CliError> {
    match command {
        Command::Set(args) => set(*args, store, input, out).await,
        Command::Show(args) => {
            let account = store
                .account(&args.tenant, &args.account)
                .await
                .map_err(of_directory)?;
            let health = store.health(&account.key()).await.map_err(of_directory)?;
            if args.json {
                return Ok(table::json(out, &as_json(&account, health.as_ref()))?);
            }
            let mut pairs = as_pairs(&account);
            pairs.push((
                "health",
                health.as_ref().map_or_else(|| "good".to_owned(), in_words),
            ));
            Ok(table::pairs(out, pairs)?)
        }
        Command::List(args) => list(&args, store, out).await,
        Command::Remove { tenant, account } => {
            store
                .remove_account(&tenant, &account)
                .await
                .map_err(of_directory)?;
            writeln!(out, "account {tenant}/{account} removed")?;
            Ok(())
        }
    }
}

async fn list(args: &ListArgs, store: &Store, out: &mut dyn Write) -> Result<(), CliError> {
    let accounts = match &args.tenant {
        Some(tenant) => store.accounts(tenant).await,
        None => store.all_accounts().await,
    };
    let mut accounts = accounts.map_err(of_directory)?;
    let unhealthy = store.unhealthy().await.map_err(of_directory)?;
    if args.unhealthy {
        accounts.retain(|account| unhealthy.contains_key(&account.key()));
    }
    let listed = accounts
        .iter()
        .map(|account| (account, unhealthy.get(&account.key())));
    if args.json {
        let all = listed.map(|(account, health)| as_json(account, health));
        return Ok(table::json(out, &all.collect::<Value>())?);
    }
    let header = [
        "TENANT",
        "ACCOUNT",
        "SERVER",
        "TLS",
        "USER",
        "FROM",
        "LIMITS",
        "CONNECTIONS",
        "DEFAULT",
        "HEALTH",
    ];
    let rows = listed.map(|(account, health)| as_row(account, health));
    Ok(table::columns(out, &header, rows.collect())?)
}

async fn set(
    args: SetArgs,
    store: &Store,
    input: &mut dyn Read,
    out: &mut dyn Write,
) -> Result<(), CliError> {
    let change = AccountChange {
        host: args.host,
        port: args.port,
        tls: args.tls,
        username: args.username,
        password: args.password_stdin.then(|| read_password(input)).transpose()?,
        allow_plaintext_auth: args.allow_plaintext_auth,
        ca_pem: args.ca_file.as_deref().map(read_authorities).transpose()?,
        from: args.from.as_deref().map(read_from).transpose()?,
        limits: args.limits.changes(),
        max_connections: args.max_connections,
        max_attempts: args.max_attempts,
        max_age: args.max_age,
        make_default: args.default,
    };
    let account = store
        .set_account(&args.tenant, &args.account, &change)
        .await
        .map_err(of_directory)?;
    writeln!(out, "account {} saved", account.key())?;
    if account.tls == TlsMode::None && account.username.is_some() && !account.allow_plaintext_auth {
        writeln!(
            out,
            "note: without TLS the password is not sent: use --tls starttls, or --allow-plaintext-auth"
        )?;
    }
    Ok(())
}

/// All of the input but a line break at its end.
fn read_password(input: &mut dyn Read) -> Result<SecretString, CliError> {
    // With its full size at once: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_PASSWORD as usize + 64));
    input.take(MAX_PASSWORD + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_PASSWORD {
        return Err(CliError::Usage(format!(
            "the password is longer than {MAX_PASSWORD} bytes"
        )));
    }
    let text = str::from_utf8(&bytes).map_err(|_| CliError::Usage("the password is not UTF-8".to_owned()))?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() {
        return Err(CliError::Usage(
            "--password-stdin: standard input is empty".to_owned(),
        ));
    }
    Ok(text.into())
}

fn read_authorities(path: &OsStr) -> Result<String, CliError> {
    if path.is_empty() {
        return Ok(String::new());
    }
    let path = Path::new(path);
    let shown = path.display();
    let mut pem = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(ca::MAX_PEM as u64 + 1).read_to_end(&mut pem))
        .map_err(|error| CliError::Usage(format!("--ca-file {shown}: {error}")))?;
    ca::check_pem(&pem).map_err(|error| CliError::Usage(format!("--ca-file {shown}: {error}")))
}

fn read_from(text: &str) -> Result<Option<crate::address::Mailbox>, CliError> {
    if text.is_empty() {
        return Ok(None);
    }
    let mailbox = parse_mailbox(text).map_err(|error| CliError::Usage(format!("--from: {error}")))?;
    Ok(Some(mailbox))
}

/// With its health, if that is not good.
fn as_json(account: &StoredAccount, health: Option<&Value>) -> Value {
    let mut shown = json!({
        "tenant": account.tenant,
        "account": account.id,
        "host": account.host,
        "port": account.port,
        "tls": account.tls.as_str(),
        "username": account.username,
        "has_password": account.password.is_some(),
        "allow_plaintext_auth": account.allow_plaintext_auth,
        "has_ca": account.ca_pem.is_some(),
        "from": account.from.as_ref().map(ToString::to_string),
        "limits": limits::json(&account.limits),
        "max_connections": account.max_connections,
        "max_attempts": account.max_attempts,
        "max_age": account.max_age.map(period_text),
        "default": account.is_default,
        "version": account.version,
    });
    if let Some(health) = health {
        shown["health"] = health.clone();
    }
    shown
}

/// The state of the breaker, and when that changes next.
fn state_of(health: &Value) -> (&'static str, &'static str) {
    match health["state"].as_str() {
        Some("half_open") => ("unhealthy, being probed", "probe due back"),
        _ => ("unhealthy", "next probe"),
    }
}

/// The same in a line.
fn in_words(health: &Value) -> String {
    let text = |name: &str| health[name].as_str().unwrap_or("-").to_owned();
    let (state, until) = state_of(health);
    let (since, until_at, detail) = (text("since"), text("until"), text("detail"));
    format!("{state} since {since}, {until} {until_at}: {detail}")
}

fn as_pairs(account: &StoredAccount) -> Vec<(&'static str, String)> {
    vec![
        ("account", account.key().to_string()),
        ("server", format!("{}:{}", account.host, account.port)),
        ("tls", account.tls.to_string()),
        ("user name", table::or_dash(account.username.as_ref())),
        (
            "password",
            if account.password.is_some() { "set" } else { "-" }.to_owned(),
        ),
        ("plaintext auth", table::yes(account.allow_plaintext_auth)),
        ("own authorities", table::yes(account.ca_pem.is_some())),
        ("from", table::or_dash(account.from.as_ref())),
        ("limits", limits::shown(&account.limits)),
        ("max connections", table::or_dash(account.max_connections)),
        ("max attempts", table::or_dash(account.max_attempts)),
        ("max age", table::or_dash(account.max_age.map(period_text))),
        ("default", table::yes(account.is_default)),
    ]
}

fn as_row(account: &StoredAccount, health: Option<&Value>) -> Vec<String> {
    vec![
        account.tenant.to_string(),
        account.id.to_string(),
        format!("{}:{}", account.host, account.port),
        account.tls.to_string(),
        table::or_dash(account.username.as_ref()),
        table::or_dash(account.from.as_ref()),
        limits::shown(&account.limits),
        table::or_dash(account.max_connections),
        table::yes(account.is_default),
        health.map_or("good", |health| state_of(health).0).to_owned(),
    ]
}

#[cfg(test)]
mod tests;
