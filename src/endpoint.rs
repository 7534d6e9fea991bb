//! Webhook endpoints: where a tenant's reports go. Several per tenant, each with an event filter; those of the
//! platform (`-`) get the reports of tenants without one, or of all.

mod replay;
mod store;

use std::time::Duration;

use jiff::Timestamp;
use secrecy::SecretString;
use url::Url;

use crate::db::DbError;
use crate::report::ReportType;

pub use replay::{Replay, replay};
pub use store::{list, remove, set, show, stored_secret};

/// Name of an endpoint when none is given.
pub const DEFAULT_NAME: &str = "default";
/// In an event filter: every type, now and later.
pub const ALL_EVENTS: &str = "*";
/// Types of reports that are not about a job's own outcome.
const OTHER_EVENTS: [&str; 3] = ["account.unhealthy", "account.recovered", "endpoint.disabled"];

/// Why an endpoint cannot be changed or used as asked.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The database.
    #[error(transparent)]
    Database(#[from] DbError),
    /// There is no such tenant.
    #[error("tenant `{0}` does not exist; `postroom tenant set {0}` creates it")]
    UnknownTenant(String),
    /// There is no such endpoint.
    #[error(
        "tenant `{tenant}` has no endpoint `{name}`; `postroom endpoint list {tenant}` shows what it has"
    )]
    Unknown {
        /// Whose.
        tenant: String,
        /// The name asked for.
        name: String,
    },
    /// A new endpoint needs a URL.
    #[error("tenant `{tenant}` has no endpoint `{name}` yet: a new one needs --url")]
    UrlMissing {
        /// Whose.
        tenant: String,
        /// The name asked for.
        name: String,
    },
    /// The event is not remembered, or not the tenant's.
    #[error(
        "event `{0}` is not remembered for this tenant: it is older than the retention, or no endpoint wanted it"
    )]
    UnknownEvent(String),
    /// Another rotation would drop one of two secrets that sign.
    #[error(
        "an earlier rotation is not over before {until:.0}, and both of its secrets sign: say with --receiver-has which of \
         them the receiver knows, `current` or `previous`; that one goes on signing beside the new one"
    )]
    Rotating {
        /// When it is over.
        until: Timestamp,
    },
    /// Only endpoints of the platform can be for all tenants.
    #[error("--all is for endpoints of the platform (tenant `-`) only")]
    NotPlatform,
}

impl From<tokio_postgres::Error> for EndpointError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error.into())
    }
}

/// Credentials sent with each webhook, ready for use.
#[derive(Debug, Clone)]
pub enum Auth {
    /// None; the signature is proof enough.
    None,
    /// `Authorization: Bearer …` (RFC 6750).
    Bearer(SecretString),
    /// `Authorization: Basic …` (RFC 7617).
    Basic {
        /// Without a colon.
        username: String,
        /// Anything.
        password: SecretString,
    },
}

/// What to change about an endpoint; `None` leaves a thing as it is. Secrets are sealed already.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// Where to POST.
    pub url: Option<String>,
    /// A new signing secret, sealed.
    pub secret: Option<String>,
    /// How long the previous secret signs as well.
    pub keep_previous: Duration,
    /// During an earlier rotation: which secret that is to be.
    pub receiver_has: Option<Known>,
    /// New credentials.
    pub auth: Option<SealedAuth>,
    /// A new filter: `None` inside is the default, all but `mail.deferred`.
    pub events: Option<Option<Vec<String>>>,
    /// For the reports of all tenants.
    pub all_tenants: Option<bool>,
    /// Switch it on or off.
    pub enabled: Option<bool>,
}

/// Which of the two secrets that sign during a rotation a receiver knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Known {
    /// The one that the rotation gave.
    Current,
    /// The one from before it.
    Previous,
}

/// [`Auth`] as it is stored.
#[derive(Debug, Clone)]
pub enum SealedAuth {
    /// None.
    None,
    /// A sealed token.
    Bearer(String),
    /// With a sealed password.
    Basic {
        /// Without a colon.
        username: String,
        /// Sealed.
        password: String,
    },
}

/// An endpoint as operators see it; secrets are write-only.
#[derive(Debug, Clone, serde::Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "a view, not a state machine")]
pub struct Endpoint {
    /// Whose.
    pub tenant: String,
    /// Unique within the tenant.
    pub name: String,
    /// Where it POSTs.
    pub url: String,
    /// Whether deliveries are signed.
    pub has_secret: bool,
    /// Until when the previous secret signs as well.
    pub previous_secret_until: Option<Timestamp>,
    /// `none`, `bearer` or `basic`.
    pub auth: String,
    /// For `basic`.
    pub username: Option<String>,
    /// Whether a token or password is stored.
    pub has_credential: bool,
    /// The filter; `None` is all but `mail.deferred`.
    pub events: Option<Vec<String>>,
    /// Whether it gets the reports of all tenants.
    pub all_tenants: bool,
    /// `false`: nothing is sent.
    pub enabled: bool,
    /// `gone` (it answered 410), `failing` (for days) or `operator`.
    pub disabled_reason: Option<String>,
    /// Since when.
    pub disabled_at: Option<Timestamp>,
    /// Since when every attempt has failed.
    pub failing_since: Option<Timestamp>,
    /// HTTP status of the last attempt that failed.
    pub last_status: Option<i32>,
    /// What went wrong then.
    pub last_error: Option<String>,
    /// Deliveries that wait.
    pub pending: i64,
    /// Deliveries given up.
    pub failed: i64,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was changed.
    pub updated_at: Timestamp,
}

/// What binds a sealed signing secret to its place.
#[must_use]
pub fn secret_aad(tenant: &str, name: &str) -> String {
    format!("endpoint:{tenant}/{name}:secret")
}

/// What binds a sealed token or password to its place.
#[must_use]
pub fn credential_aad(tenant: &str, name: &str) -> String {
    format!("endpoint:{tenant}/{name}:credential")
}

/// Checks a webhook's URL. Answers with it, normalised.
///
/// # Errors
/// A sentence saying what is allowed.
pub fn parse_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("not a URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err("a webhook's URL begins with https:// (or http://) and a host".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("no credentials in the URL, where they could be seen: use --basic-user".to_owned());
    }
    if url.fragment().is_some() {
        return Err("a webhook's URL has no fragment (`#…`)".to_owned());
    }
    if text.len() > 2048 {
        return Err("a webhook's URL has at most 2048 characters".to_owned());
    }
    Ok(url)
}

/// Checks one name of an event filter.
///
/// # Errors
/// A sentence with all names there are.
pub fn parse_event(text: &str) -> Result<String, String> {
    if text == ALL_EVENTS || known_events().any(|name| name == text) {
        return Ok(text.to_owned());
    }
    let known: Vec<&str> = known_events().collect();
    Err(format!(
        "`{text}` is not an event; there are {}, `*` for all, and `default` alone for all but mail.deferred",
        known.join(", ")
    ))
}

/// Every type there is.
fn known_events() -> impl Iterator<Item = &'static str> {
    let of_jobs = ReportType::ALL.into_iter().map(ReportType::as_str);
    of_jobs.chain(OTHER_EVENTS)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_can_be_asked_for_is_what_the_schema_of_reports_knows() {
        let schema = include_str!("../schema/mail-report.v1.json");
        let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
        let types = schema["properties"]["type"]["anyOf"][0]["oneOf"]
            .as_array()
            .unwrap();
        let types: BTreeSet<&str> = types.iter().filter_map(|known| known["const"].as_str()).collect();
        assert_eq!(types, known_events().collect());
    }

    #[test]
    fn urls_are_http_with_a_host_and_no_credentials() {
        for good in [
            "https://example.com/hook?x=1",
            "http://10.0.0.1:8080",
            "https://[::1]/",
        ] {
            assert!(parse_url(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "example.com",
            "ftp://example.com",
            "https://u:p@example.com",
            "https://u@example.com",
            "https://e.com/#x",
            "file:///etc",
            "https://",
        ] {
            assert!(parse_url(bad).is_err(), "{bad}");
        }
        assert!(parse_url(&format!("https://example.com/{}", "x".repeat(2048))).is_err());
    }

    #[test]
    fn unknown_event_names_are_refused_with_the_list_of_known_ones() {
        for name in ["mail.sent", "mail.deferred", "endpoint.disabled", "*"] {
            assert_eq!(parse_event(name).as_deref(), Ok(name));
        }
        let error = parse_event("mail.delivered").unwrap_err();
        assert!(
            error.contains("mail.sent") && error.contains("endpoint.disabled"),
            "{error}"
        );
    }
}
