//! The arguments of `postroom endpoint`.

use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::{Span, SpanRelativeTo, Timestamp};

use crate::endpoint::{self, DEFAULT_NAME, Known};
use crate::id::{AccountId, TenantId};

/// Webhook endpoints.
#[derive(Debug, Subcommand)]
pub enum EndpointCommand {
    /// Create an endpoint, or change what is named
    Set(Box<SetArgs>),
    /// Show an endpoint
    Show(ShowArgs),
    /// List endpoints
    List(ListArgs),
    /// Remove an endpoint; what waits for it is never sent
    Remove(NameArgs),
    /// Send remembered events again
    Replay(ReplayArgs),
}

/// Which endpoint.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// Tenant, `-` for the platform
    pub tenant: TenantId,
    /// Name of the endpoint
    #[arg(default_value = DEFAULT_NAME)]
    pub name: AccountId,
}

/// `postroom endpoint set`.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "they are flags")]
pub struct SetArgs {
    /// Which endpoint.
    #[command(flatten)]
    pub which: NameArgs,
    /// Where to POST; needed for a new endpoint
    #[arg(long, value_parser = parse_url)]
    pub url: Option<String>,
    /// Read the signing secret (`whsec_…`) from standard input
    #[arg(long, conflicts_with = "generate_secret")]
    pub secret_stdin: bool,
    /// Make a signing secret and print it, this one time
    #[arg(long)]
    pub generate_secret: bool,
    /// How long the previous signing secret signs as well, such as `24h`; `0` for not at all
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = parse_duration)]
    pub rotate_keep: Duration,
    /// While an earlier rotation is not over: which of its secrets the receiver knows; that one goes on signing
    #[arg(long, value_enum)]
    pub receiver_has: Option<Known>,
    /// Read a bearer token from standard input (on the line after the secret, if both are read)
    #[arg(long, conflicts_with_all = ["basic_user", "no_auth"])]
    pub bearer_stdin: bool,
    /// User name for basic authentication; needs --password-stdin
    #[arg(long, value_name = "USER", requires = "password_stdin", conflicts_with = "no_auth", value_parser = parse_user)]
    pub basic_user: Option<String>,
    /// Read the password for basic authentication from standard input (after the secret, if both are read)
    #[arg(long, requires = "basic_user")]
    pub password_stdin: bool,
    /// Send no Authorization header any more
    #[arg(long)]
    pub no_auth: bool,
    /// Events to send, separated by commas; `default` is all but mail.deferred, `*` is all
    #[arg(long, value_name = "EVENTS", value_parser = parse_events)]
    pub events: Option<EventFilter>,
    /// For the reports of all tenants, not only of those without an endpoint; tenant `-` only
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL")]
    pub all: Option<bool>,
    /// Switch it on again; what waited for it is sent
    #[arg(long, conflicts_with = "disable")]
    pub enable: bool,
    /// Switch it off; what waits for it is kept
    #[arg(long)]
    pub disable: bool,
}

impl SetArgs {
    /// Whether it stores a secret, so that the keys are needed.
    pub(in crate::cli) fn seals(&self) -> bool {
        self.secret_stdin || self.generate_secret || self.bearer_stdin || self.basic_user.is_some()
    }
}

/// The value of `--events`: `None` is the default filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventFilter(pub Option<Vec<String>>);

/// `postroom endpoint show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Which endpoint.
    #[command(flatten)]
    pub which: NameArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `postroom endpoint list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only this tenant's
    pub tenant: Option<TenantId>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `postroom endpoint replay`.
#[derive(Debug, Args)]
#[group(required = true, multiple = true, id = "events", args = ["event", "since", "failed"])]
pub struct ReplayArgs {
    /// Which endpoint.
    #[command(flatten)]
    pub which: NameArgs,
    /// This event, whatever the filter says
    #[arg(long, value_name = "ID", conflicts_with_all = ["since", "until", "failed"])]
    pub event: Option<String>,
    /// Events received from then on: a time (RFC 3339), or how long ago, such as `2h` or `3d`
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub since: Option<Timestamp>,
    /// Events received before then
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub until: Option<Timestamp>,
    /// Only those that were given up
    #[arg(long)]
    pub failed: bool,
}

fn parse_url(text: &str) -> Result<String, String> {
    endpoint::parse_url(text).map(String::from)
}

fn parse_user(text: &str) -> Result<String, String> {
    if text.is_empty() || text.contains(':') || text.chars().any(char::is_control) {
        return Err("a user name has no colon and no control characters (RFC 7617)".to_owned());
    }
    Ok(text.to_owned())
}

fn parse_events(text: &str) -> Result<EventFilter, String> {
    if text == "default" {
        return Ok(EventFilter(None));
    }
    let events: Result<Vec<String>, String> = text
        .split(',')
        .map(|name| endpoint::parse_event(name.trim()))
        .collect();
    Ok(EventFilter(Some(events?)))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let problem = || format!("`{text}` is not a duration such as `24h` or `7d`");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let span: Span = text.parse().map_err(|_| problem())?;
    let days_are_24_hours = SpanRelativeTo::days_are_24_hours();
    let duration = span.to_duration(days_are_24_hours).map_err(|_| problem())?;
    Duration::try_from(duration).map_err(|_| problem())
}

fn parse_time(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let ago =
        parse_duration(text).map_err(|_| format!("`{text}` is neither a time (RFC 3339) nor a duration"))?;
    Timestamp::now()
        .checked_sub(ago)
        .map_err(|_| format!("`{text}` ago is before all time"))
}
