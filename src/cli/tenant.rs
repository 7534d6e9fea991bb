//! `postroom tenant`.

use std::io::Write;

use serde_json::{Value, json};

use super::limits::{self, LimitFlags};
use super::{CliError, table};
use crate::attachment::LargeFileAction;
use crate::directory::store::{StoredTenant, TenantChange};
use crate::directory::{DirectoryError, Store};
use crate::id::TenantId;
use crate::job::{Fallback, OnUncertain};

/// What can be done with tenants.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Create a tenant, or change what is named.
    Set(SetArgs),
    /// Show a tenant.
    Show(ShowArgs),
    /// List all tenants.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Remove a tenant with its accounts, limits and webhook endpoints; reports that wait for those are never sent. Jobs that
    /// come later are refused as `unknown_tenant`.
    Remove {
        /// The tenant.
        tenant: TenantId,
        /// Even if jobs of it wait: they fail with `tenant_not_found`.
        #[arg(long)]
        fail_waiting: bool,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct ShowArgs {
    /// The tenant; `-` is the platform.
    tenant: TenantId,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct SetArgs {
    /// The tenant; `-` is the platform.
    tenant: TenantId,
    /// Name for people, and the display name when the platform sends for it; '' removes it.
    #[arg(long)]
    name: Option<String>,
    /// Whether the platform's default account may send when the tenant's own cannot.
    #[arg(long, value_name = "never|platform")]
    fallback: Option<Fallback>,
    /// What to do when nobody knows whether a server took a mail.
    #[arg(long, value_name = "resend|hold")]
    on_uncertain: Option<OnUncertain>,
    /// Size in bytes above which an attachment is large; 0 for never.
    #[arg(long, value_name = "N")]
    large_file_bytes: Option<u64>,
    /// What to do with large attachments.
    #[arg(long, value_name = "warn|reject|rewrite")]
    large_file_action: Option<LargeFileAction>,
    #[command(flatten)]
    limits: LimitFlags,
}

/// Runs a command.
pub(super) async fn run(command: Command, store: &Store, out: &mut dyn Write) -> Result<(), CliError> {
    match command {
        Command::Set(args) => set(args, store, out).await,
        Command::Show(args) => {
            let tenant = store.tenant(&args.tenant).await.map_err(of_directory)?;
            if args.json {
                return Ok(table::json(out, &as_json(&tenant))?);
            }
            Ok(table::pairs(out, as_pairs(&tenant))?)
        }
        Command::List { json } => {
            let tenants = store.tenants().await.map_err(of_directory)?;
            if json {
                return Ok(table::json(out, &tenants.iter().map(as_json).collect::<Value>())?);
            }
            let header = [
                "TENANT",
                "NAME",
                "FALLBACK",
                "ON UNCERTAIN",
                "LIMITS",
                "LARGE FILES",
            ];
            Ok(table::columns(
                out,
                &header,
                tenants.iter().map(as_row).collect(),
            )?)
        }
        Command::Remove { tenant, fail_waiting } => {
            if !fail_waiting {
                store.check_none_waits(&tenant).await.map_err(of_directory)?;
            }
            store.remove_tenant(&tenant).await.map_err(of_directory)?;
            writeln!(out, "tenant {tenant} removed")?;
            Ok(())
        }
    }
}

async fn set(args: SetArgs, store: &Store, out: &mut dyn Write) -> Result<(), CliError> {
    let change = TenantChange {
        name: args.name,
        fallback: args.fallback,
        on_uncertain: args.on_uncertain,
        limits: args.limits.changes(),
        large_file_bytes: args.large_file_bytes,
        large_file_action: args.large_file_action,
    };
    store
        .set_tenant(&args.tenant, &change)
        .await
        .map_err(of_directory)?;
    writeln!(out, "tenant {} saved", args.tenant)?;
    Ok(())
}

fn as_json(tenant: &StoredTenant) -> Value {
    json!({
        "tenant": tenant.id,
        "name": tenant.name,
        "fallback": tenant.fallback.as_str(),
        "on_uncertain": tenant.on_uncertain.as_str(),
        "limits": limits::json(&tenant.limits),
        "large_file_bytes": tenant.large_files.threshold,
        "large_file_action": tenant.large_files.action.as_str(),
    })
}

fn as_pairs(tenant: &StoredTenant) -> Vec<(&'static str, String)> {
    vec![
        ("tenant", tenant.id.to_string()),
        ("name", table::or_dash(tenant.name.as_ref())),
        ("fallback", tenant.fallback.to_string()),
        ("on uncertain", tenant.on_uncertain.to_string()),
        ("limits", limits::shown(&tenant.limits)),
        ("large files", large_files(tenant)),
    ]
}

fn as_row(tenant: &StoredTenant) -> Vec<String> {
    as_pairs(tenant).into_iter().map(|(_, value)| value).collect()
}

fn large_files(tenant: &StoredTenant) -> String {
    let policy = &tenant.large_files;
    policy.threshold.map_or_else(
        || "-".to_owned(),
        |bytes| format!("{} above {bytes} bytes", policy.action.as_str()),
    )
}

/// Wrong use or failure.
pub(super) fn of_directory(error: DirectoryError) -> CliError {
    if error.is_wrong_use() {
        CliError::Usage(error.to_string())
    } else {
        error.into()
    }
}
