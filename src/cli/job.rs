//! `postroom job`: what the ledger knows of jobs; cancel and release.

mod list;

use std::io::Write;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{CliError, table};
use crate::config;
use crate::db::Database;
use crate::id::{AccountKey, JobId, TenantId};
use crate::ledger::health;
use crate::ledger::odd::{Cancel, Decision, ManualRelease, Resolved};
use crate::ledger::{Ledger, WaitReason};
use crate::telemetry::metrics::Metrics;

pub use list::ListArgs;

/// `postroom job …`
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// List jobs, newest first
    List(ListArgs),
    /// Show what is known of one job
    Show(OneArgs),
    /// Cancel a job that was not sent; one that has not come yet is cancelled when it comes, one that is held is refused
    Cancel(NameArgs),
    /// Let a waiting job run now (its account's limits still hold)
    Release(NameArgs),
    /// Decide about a job that is held because nobody knows whether it was sent
    Resolve(ResolveArgs),
}

/// One job.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// Its tenant
    pub tenant: TenantId,
    /// Its id
    pub id: JobId,
}

/// What became of a held job.
#[derive(Debug, Args)]
#[group(required = true, multiple = false, id = "decision", args = ["sent", "not_sent", "failed"])]
pub struct ResolveArgs {
    /// Which
    #[command(flatten)]
    pub name: NameArgs,
    /// The server took it: it ends as sent
    #[arg(long)]
    pub sent: bool,
    /// The server did not take it: it is sent again
    #[arg(long)]
    pub not_sent: bool,
    /// Whatever became of it, it ends as failed
    #[arg(long)]
    pub failed: bool,
    /// Who decides, for the record; by default $USER
    #[arg(long, value_name = "NAME")]
    pub by: Option<String>,
}

/// One job, to be shown.
#[derive(Debug, Args)]
pub struct OneArgs {
    /// Which
    #[command(flatten)]
    pub name: NameArgs,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

const STATES: [&str; 7] = [
    "open",
    "sending",
    "waiting",
    "done",
    "uncertain",
    "cancelled",
    "dead",
];

/// Runs the command.
///
/// # Errors
/// If the database cannot be asked, the job does not exist, or it is too late for what is asked.
pub async fn run(
    command: JobCommand,
    config: &config::Database,
    out: &mut (dyn Write + Send),
) -> Result<(), CliError> {
    let database = Database::connect(config)?;
    match command {
        JobCommand::List(args) => list::run(&database, &args, out).await,
        JobCommand::Show(args) => show(&database, &args, out).await,
        JobCommand::Cancel(name) => cancel(&ledger(database)?, &name, out).await,
        JobCommand::Release(name) => release(&ledger(database)?, &name, out).await,
        JobCommand::Resolve(args) => resolve(&ledger(database)?, &args, out).await,
    }
}

fn ledger(database: Database) -> Result<Ledger, CliError> {
    Ok(Ledger::new(database, std::sync::Arc::new(Metrics::new()?)))
}

async fn show(database: &Database, args: &OneArgs, out: &mut (dyn Write + Send)) -> Result<(), CliError> {
    let sql = database.sql(&format!("{SELECT} WHERE tenant = $1 AND id = $2"));
    let key = &args.name;
    let row = database
        .client()
        .await?
        .query_opt(&sql, &[&key.tenant.as_str(), &key.id.as_str()])
        .await?;
    let Some(row) = row else { return Err(unknown(key)) };
    let mut job = object(&row)?;
    if let Some(account) = job["account"].as_str() {
        let health = health::read(database, &AccountKey::from_stored(account)).await?;
        if let Some(health) = health {
            job["account_health"] = health.to_json();
        }
    }
    if args.json {
        return Ok(writeln!(out, "{}", table::safe_json(&job.to_string()))?);
    }
    print(&job, out)
}

/// A line for each thing that is known.
fn print(job: &Value, out: &mut (dyn Write + Send)) -> Result<(), CliError> {
    for (name, value) in job.as_object().into_iter().flatten() {
        match value {
            Value::Null => {}
            Value::String(text) => writeln!(out, "{name:<16} {}", table::safe(text))?,
            Value::Array(recipients) if name == "recipients" => {
                for recipient in recipients {
                    let of = |key: &str| table::safe(recipient[key].as_str().unwrap_or_default());
                    writeln!(
                        out,
                        "{:<16} {} {} {}",
                        "recipient",
                        of("address"),
                        of("status"),
                        of("text")
                    )?;
                }
            }
            Value::Object(health) => {
                for (key, value) in health {
                    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                    writeln!(out, "{:<16} {key}: {}", "account health", table::safe(&text))?;
                }
            }
            other => writeln!(out, "{name:<16} {}", table::safe_json(&other.to_string()))?,
        }
    }
    Ok(())
}

/// Why a held job is neither let go nor cancelled.
const HELD: &str = "is held because nobody knows whether it was sent: find out, and say so with \
                    `postroom job resolve --sent`, `--not-sent` (it is sent again) or `--failed`";

async fn cancel(ledger: &Ledger, key: &NameArgs, out: &mut (dyn Write + Send)) -> Result<(), CliError> {
    let said = match ledger.cancel(&key.tenant, &key.id).await? {
        Cancel::Cancelled => "cancelled",
        Cancel::InFlight => "in flight: it is cancelled unless the attempt under way succeeds",
        Cancel::Noted => "not here yet: it will be cancelled when it comes",
        Cancel::TooLate => {
            return Err(refused(
                key,
                "is over already; `postroom job show` tells how it ended",
            ));
        }
        Cancel::Held => return Err(refused(key, HELD)),
    };
    Ok(writeln!(out, "{said}")?)
}

async fn release(ledger: &Ledger, key: &NameArgs, out: &mut (dyn Write + Send)) -> Result<(), CliError> {
    match ledger.release_by_hand(&key.tenant, &key.id).await? {
        ManualRelease::Released => Ok(writeln!(out, "released")?),
        ManualRelease::NotWaiting => Err(refused(key, "does not wait; `postroom job show` tells its state")),
        ManualRelease::Held => Err(refused(key, HELD)),
        ManualRelease::Unknown => Err(unknown(key)),
    }
}

async fn resolve(ledger: &Ledger, args: &ResolveArgs, out: &mut (dyn Write + Send)) -> Result<(), CliError> {
    let (decision, said) = match (args.sent, args.not_sent) {
        (true, _) => (Decision::Sent, "settled as sent"),
        (_, true) => (Decision::NotSent, "released: it is sent again"),
        _ => (Decision::Failed, "settled as failed"),
    };
    let by = args.by.clone().or_else(|| std::env::var("USER").ok());
    let by: String = by
        .unwrap_or_else(|| "unknown".to_owned())
        .chars()
        .take(100)
        .collect();
    let key = &args.name;
    match ledger.resolve(&key.tenant, &key.id, decision, &by).await? {
        Resolved::Done => Ok(writeln!(out, "{said}")?),
        Resolved::Unknown => Err(unknown(key)),
        Resolved::NotHeld(state) => Err(refused(
            key,
            match state {
                1 => "is being sent: there is nothing to decide unless its outcome turns out uncertain",
                2 => "waits: `postroom job release` lets it run now, `postroom job cancel` ends it",
                6 => {
                    "is in the dead letters: `postroom dead replay` sends it, `postroom dead drop` forgets it"
                }
                3 | 5 => "is over already; `postroom job show` tells how it ended",
                _ => "is on its way to a worker: there is nothing to decide",
            },
        )),
    }
}

/// The command cannot do this to this job.
#[derive(Debug, thiserror::Error)]
#[error("job `{id}` of tenant `{tenant}` {why}")]
struct Refused {
    tenant: TenantId,
    id: JobId,
    why: &'static str,
}

fn refused(key: &NameArgs, why: &'static str) -> CliError {
    Refused {
        tenant: key.tenant.clone(),
        id: key.id.clone(),
        why,
    }
    .into()
}

fn unknown(key: &NameArgs) -> CliError {
    refused(key, "is not in the ledger")
}

const SELECT: &str = "SELECT tenant, id, level, state, account, attempt, uncertain, cancel, reason, due_at, outcome,
    last_error, message_id, batch, created_at, updated_at, finished_at, recipients, body_size, crashes, resolved, resolved_by, resolved_at,
    EXISTS (SELECT FROM {s}.outbox o WHERE o.tenant = job.tenant AND o.id = job.id) AS owed FROM {s}.job";

fn object(row: &tokio_postgres::Row) -> Result<Value, tokio_postgres::Error> {
    let time = |name: &str| {
        row.try_get::<_, Option<Timestamp>>(name)
            .map(|at| at.map(|at| at.to_string()))
    };
    let state: i16 = row.try_get("state")?;
    let level = crate::level::Level::from_index(row.try_get("level")?);
    let reason = row
        .try_get::<_, Option<i16>>("reason")?
        .and_then(WaitReason::from_number);
    let waits = state == 2;
    Ok(json!({
        "tenant": row.try_get::<_, &str>("tenant")?,
        "job": row.try_get::<_, &str>("id")?,
        "level": level.map(crate::level::Level::as_str),
        "state": STATES.get(usize::try_from(state).unwrap_or(usize::MAX)),
        "outcome": row.try_get::<_, Option<&str>>("outcome")?,
        "account": row.try_get::<_, &str>("account")?,
        "attempts": row.try_get::<_, i32>("attempt")?,
        "uncertain_attempts": row.try_get::<_, i32>("uncertain")?,
        "cancel_requested": row.try_get::<_, bool>("cancel")?,
        "reason": reason.filter(|_| waits).map(WaitReason::as_str),
        "next_attempt_at": time("due_at")?.filter(|_| waits),
        "last_error": row.try_get::<_, Option<&str>>("last_error")?,
        "message_id": row.try_get::<_, Option<&str>>("message_id")?,
        "batch": row.try_get::<_, Option<&str>>("batch")?,
        "created_at": time("created_at")?,
        "updated_at": time("updated_at")?,
        "finished_at": time("finished_at")?,
        "recipients": row.try_get::<_, Option<Value>>("recipients")?,
        "report_owed": row.try_get::<_, bool>("owed")?,
        "body_bytes": row.try_get::<_, Option<i32>>("body_size")?,
        "crashes": row.try_get::<_, i16>("crashes")?,
        "resolved": row.try_get::<_, Option<&str>>("resolved")?,
        "resolved_by": row.try_get::<_, Option<&str>>("resolved_by")?,
        "resolved_at": time("resolved_at")?,
    }))
}
