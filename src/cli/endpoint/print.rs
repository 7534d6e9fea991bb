//! How endpoints are shown.

use std::io::{self, Write};

use crate::cli::table::{self, safe};
use crate::endpoint::Endpoint;

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
    let header = ["TENANT", "NAME", "STATE", "PENDING", "FAILED", "EVENTS", "URL"];
    let row = |e: &Endpoint| {
        vec![
            e.tenant.clone(),
            e.name.clone(),
            state(e),
            e.pending.to_string(),
            e.failed.to_string(),
            events(e),
            e.url.clone(),
        ]
    };
    table::columns(out, &header, endpoints.iter().map(row).collect())
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
        writeln!(out, "{label:<11} {}", safe(&value))?;
    }
    Ok(())
}
