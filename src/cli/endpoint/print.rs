//! How endpoints are shown.

use std::io::{self, Write};

use comfy_table::{Table, presets};

use crate::endpoint::Endpoint;

pub(super) fn json<T: serde::Serialize>(value: &T, out: &mut dyn Write) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

fn state(endpoint: &Endpoint) -> String {
    match (&endpoint.disabled_reason, endpoint.failing_since) {
        (Some(reason), _) => format!("disabled ({reason})"),
        (None, Some(since)) => format!("failing since {since:.0}"),
        (None, None) => "enabled".to_owned(),
    }
}

fn events(endpoint: &Endpoint) -> String {
    endpoint
        .events
        .as_ref()
        .map_or_else(|| "all but mail.deferred".to_owned(), |events| events.join(", "))
}

pub(super) fn table(endpoints: &[Endpoint], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["TENANT", "NAME", "STATE", "PENDING", "FAILED", "EVENTS", "URL"]);
    for e in endpoints {
        let (pending, failed) = (e.pending.to_string(), e.failed.to_string());
        table.add_row([
            &e.tenant,
            &e.name,
            &state(e),
            &pending,
            &failed,
            &events(e),
            &e.url,
        ]);
    }
    writeln!(out, "{table}")
}

pub(super) fn one(endpoint: &Endpoint, out: &mut dyn Write) -> io::Result<()> {
    let auth = match &endpoint.username {
        Some(username) => format!("basic as {username}"),
        None => endpoint.auth.clone(),
    };
    let signed = match (endpoint.has_secret, endpoint.previous_secret_until) {
        (false, _) => "no".to_owned(),
        (true, None) => "yes".to_owned(),
        (true, Some(until)) => format!("yes, with the previous secret too until {until:.0}"),
    };
    let tenants = match (&*endpoint.tenant, endpoint.all_tenants) {
        ("-", true) => "all",
        ("-", false) => "those without an endpoint",
        (tenant, _) => tenant,
    };
    let last = match (&endpoint.last_error, endpoint.failing_since) {
        (Some(error), Some(_)) => error.as_str(),
        _ => "-",
    };
    for (label, value) in [
        ("endpoint", format!("{}/{}", endpoint.tenant, endpoint.name)),
        ("url", endpoint.url.clone()),
        ("state", state(endpoint)),
        ("tenants", tenants.to_owned()),
        ("events", events(endpoint)),
        ("signed", signed),
        ("auth", auth),
        ("pending", endpoint.pending.to_string()),
        ("failed", endpoint.failed.to_string()),
        ("last error", last.to_owned()),
        ("created", format!("{:.0}", endpoint.created_at)),
        ("updated", format!("{:.0}", endpoint.updated_at)),
    ] {
        writeln!(out, "{label:<11} {value}")?;
    }
    Ok(())
}
