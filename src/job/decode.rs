//! From a message to a valid [`MailJob`], or to a [`Rejection`] that names everything wrong with it.
//!
//! ```text
//! properties → inflate → UTF-8 → strict JSON → fields → digest
//! ```
//!
//! The contract for producers is `docs/contract.md`.

use std::borrow::Cow;
use std::fmt;

use super::errors::{Errors, ROOT, excerpt};
use super::fields::JobTenant;
use super::inflate::Trouble;
use super::json::{Bounds, Document, Node};
use super::smtp_override::Listed;
use super::{MailJob, fields, inflate as inflating, json, values};
use crate::config::JobLimits;
use crate::id::{JobId, TenantId};
use crate::report::FieldError;

pub use super::inflate::gzip;
pub use super::sealing::{SealError, may_hold_other_secret, may_hold_secret, seal_override, without_secrets};
pub use super::smtp_override::{OverrideError, SealedBy, parse_override};

/// Major and minor version of the job contract this build understands (header `x-contract`).
pub const CONTRACT: (u32, u32) = (1, 0);

/// The AMQP `type` of a job.
pub const MESSAGE_TYPE: &str = "mail.job.v1";

/// A message as it came, reduced to what decoding needs.
#[derive(Clone, Copy, Default)]
pub struct Incoming<'a> {
    /// The body, still compressed if it came so.
    pub body: &'a [u8],
    /// AMQP `content_type`.
    pub content_type: Option<&'a str>,
    /// AMQP `content_encoding`.
    pub content_encoding: Option<&'a str>,
    /// AMQP `type`.
    pub message_type: Option<&'a str>,
    /// The header `compression` that kombu sets.
    pub compression: Option<&'a str>,
    /// The header `x-contract`.
    pub contract: Option<&'a str>,
    /// The tenant in the routing key; `None` if the message came through the default exchange.
    pub key_tenant: Option<&'a str>,
}

impl fmt::Debug for Incoming<'_> {
    /// Without the body: it may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("bytes", &self.body.len())
            .field("content_type", &self.content_type)
            .field("content_encoding", &self.content_encoding)
            .field("message_type", &self.message_type)
            .field("compression", &self.compression)
            .field("contract", &self.contract)
            .field("key_tenant", &self.key_tenant)
            .finish()
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident => $name:literal,)+) => {
        /// Why a message is no job; the word in dead letters, reports and metrics.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum RejectReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl RejectReason {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }
    };
}

reasons! {
    /// More bytes than allowed, before or after decompression, or more JSON values than any valid job has.
    TooLarge => "too_large",
    /// An unknown encoding, or compressed data that is broken.
    BadEncoding => "bad_encoding",
    /// The AMQP `type` names something else.
    WrongType => "wrong_type",
    /// The AMQP `content_type` names something else than JSON in UTF-8.
    WrongContentType => "wrong_content_type",
    /// Not UTF-8.
    NotUtf8 => "not_utf8",
    /// Not JSON.
    NotJson => "not_json",
    /// Nested too deeply.
    TooDeep => "too_deep",
    /// A name occurs twice in an object.
    DuplicateKey => "duplicate_key",
    /// The tenant in the body is not that of the routing key.
    TenantMismatch => "tenant_mismatch",
    /// A field is missing, unknown or not as it must be.
    Invalid => "invalid",
    /// There is no such tenant.
    UnknownTenant => "unknown_tenant",
    /// The tenant has no such account.
    UnknownAccount => "unknown_account",
    /// It was published so long ago that the ledger may have forgotten whether it was sent: a human decides.
    OlderThanLedger => "older_than_ledger",
    /// The producer uses a newer contract than this build knows: another worker may understand it.
    ContractTooNew => "contract_too_new",
}

/// A message that is no valid job. Safe to log, to store and to send to the tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Why.
    pub reason: RejectReason,
    /// Everything that is wrong; at least one entry, at most [`super::bounds::MAX_ERRORS`] and one that counts the rest.
    pub errors: Vec<FieldError>,
    /// Whom to tell: the tenant of the routing key, else the one the body names, if its form is valid.
    pub tenant: Option<TenantId>,
    /// The job's id, if it could be read and its form is valid.
    pub id: Option<JobId>,
}

impl fmt::Display for Rejection {
    /// Reason and errors in one line of at most about 1000 characters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LISTED: usize = 5;
        let shown = self.errors.len().min(LISTED);
        write!(f, "{}: {}", self.reason.as_str(), Listed(&self.errors[..shown]))?;
        match self.errors.len() - shown {
            0 => Ok(()),
            rest => write!(f, " (and {rest} more)"),
        }
    }
}

impl std::error::Error for Rejection {}

/// Decodes a message.
///
/// # Errors
/// A [`Rejection`] with all errors of the job at once.
pub fn decode(incoming: &Incoming<'_>, limits: &JobLimits) -> Result<MailJob, Rejection> {
    let properties = check_properties(incoming);
    let body = match inflating::plain(incoming, limits) {
        Ok(body) => body,
        Err(trouble) => return Err(refuse(properties.err().unwrap_or(trouble), incoming, &Node::Null)),
    };
    // After an error, tenant and id are still looked for, so that somebody can be told.
    let (text, trouble) = match text_of(&body) {
        Ok(text) => (Cow::Borrowed(text), None),
        Err(trouble) => (String::from_utf8_lossy(&body), Some(trouble)),
    };
    let document = json::parse(text.trim_start_matches('\u{feff}'), bounds(limits));
    let syntax = document
        .syntax
        .as_deref()
        .map(|error| (RejectReason::NotJson, not_json(error)));
    match properties.err().or(trouble).or(syntax) {
        Some(trouble) => Err(refuse(trouble, incoming, &document.root)),
        None => read(document, incoming, limits),
    }
}

/// The plain JSON of a message, as it may be stored once its override is sealed.
///
/// # Errors
/// If it is too large or its compressed data is broken.
pub fn inflate<'a>(incoming: &Incoming<'a>, limits: &JobLimits) -> Result<Cow<'a, [u8]>, Rejection> {
    inflating::plain(incoming, limits).map_err(|trouble| refuse(trouble, incoming, &Node::Null))
}

fn read(document: Document<'_>, incoming: &Incoming<'_>, limits: &JobLimits) -> Result<MailJob, Rejection> {
    let mut errors = Errors::default();
    let (body_tenant, id) = identity(&document.root);
    let flaws = document.flaws;
    document.report(&mut errors);
    let mismatch = body_tenant
        .as_ref()
        .zip(incoming.key_tenant)
        .is_some_and(|(body, key)| body.as_str() != key);
    if mismatch {
        errors.push(&ROOT.key("tenant"), "is not the tenant in the routing key");
    }
    let job = match document.root {
        Node::Object(entries) => fields::job(entries, document.text, limits, &mut errors),
        other => {
            errors.push(&ROOT, not_an_object(&other));
            None
        }
    };
    if let Some(job) = job {
        return Ok(job);
    }
    let reason = match () {
        () if flaws.too_many => RejectReason::TooLarge,
        () if flaws.too_deep => RejectReason::TooDeep,
        () if flaws.duplicate => RejectReason::DuplicateKey,
        () if mismatch => RejectReason::TenantMismatch,
        () => RejectReason::Invalid,
    };
    Err(Rejection {
        reason,
        errors: errors.into_list(),
        tenant: addressee(incoming, body_tenant),
        id,
    })
}

fn refuse((reason, message): Trouble, incoming: &Incoming<'_>, root: &Node<'_>) -> Rejection {
    let (tenant, id) = identity(root);
    Rejection {
        reason,
        errors: vec![FieldError {
            pointer: String::new(),
            message,
        }],
        tenant: addressee(incoming, tenant),
        id,
    }
}

/// Whom to tell. The broker checks who may publish under a routing key; nobody checks the body. So a message under
/// one tenant's key cannot cause reports to another.
fn addressee(incoming: &Incoming<'_>, body: Option<TenantId>) -> Option<TenantId> {
    match incoming.key_tenant {
        Some(key) => key.parse::<JobTenant>().ok().map(|tenant| tenant.0),
        None => body,
    }
}

/// Tenant and id, where the body names each exactly once and in valid form.
fn identity(root: &Node<'_>) -> (Option<TenantId>, Option<JobId>) {
    let Node::Object(entries) = root else {
        return (None, None);
    };
    let only = |wanted: &str| {
        let mut found = entries.iter().filter(|(name, _)| name == wanted);
        match (found.next(), found.next()) {
            (Some((_, Node::String(text))), None) => Some(&**text),
            _ => None,
        }
    };
    (
        only("tenant").and_then(|text| text.parse::<JobTenant>().ok().map(|tenant| tenant.0)),
        only("id").and_then(|text| text.parse().ok()),
    )
}

fn text_of(body: &[u8]) -> Result<&str, Trouble> {
    let text = std::str::from_utf8(body).map_err(|error| {
        let message = format!(
            "is not UTF-8 (byte {}){}",
            error.valid_up_to(),
            inflating::guess(body)
        );
        (RejectReason::NotUtf8, message)
    })?;
    if text.starts_with('\u{feff}') {
        let message = "begins with a byte order mark; send UTF-8 without one".to_owned();
        return Err((RejectReason::NotJson, message));
    }
    Ok(text)
}

fn bounds(limits: &JobLimits) -> Bounds {
    Bounds {
        depth: limits.max_depth,
        // Room for every address and attachment as an object, and for the largest metadata.
        values: 5_000 + 4 * limits.max_recipients + 16 * limits.max_attachments,
    }
}

fn not_json(error: &str) -> String {
    let hint = if error.contains("hex escape") {
        "; surrogates must come in pairs"
    } else {
        ""
    };
    format!("is not JSON: {error}{hint}")
}

fn not_an_object(node: &Node<'_>) -> String {
    let hint = match node {
        Node::Array(_) => "; send one message per job",
        Node::String(_) => "; it was probably encoded twice",
        _ => "",
    };
    format!("must be a JSON object, not {}{hint}", node.kind())
}

/// Checks everything but the body.
fn check_properties(incoming: &Incoming<'_>) -> Result<(), Trouble> {
    check_contract(incoming.contract)?;
    match incoming.message_type {
        None | Some("" | MESSAGE_TYPE) => {}
        Some(other) => {
            let message = format!(
                "has the AMQP type {}; use `{MESSAGE_TYPE}` or none",
                excerpt(other)
            );
            return Err((RejectReason::WrongType, message));
        }
    }
    match incoming.content_type {
        Some(other) if !is_json(other) => {
            let message = format!(
                "has the content_type {}; use `application/json` (in UTF-8) or none",
                excerpt(other)
            );
            Err((RejectReason::WrongContentType, message))
        }
        _ => Ok(()),
    }
}

fn check_contract(header: Option<&str>) -> Result<(), Trouble> {
    let Some(text) = header else {
        return Ok(());
    };
    let version = text
        .split_once('.')
        .and_then(|(major, minor)| Some((values::decimal(major)?, values::decimal(minor)?)));
    match version {
        Some(version) if version > CONTRACT => Err((
            RejectReason::ContractTooNew,
            format!(
                "needs contract {}.{}; this worker knows {}.{}",
                version.0, version.1, CONTRACT.0, CONTRACT.1
            ),
        )),
        Some((major, _)) if major == CONTRACT.0 => Ok(()),
        _ => Err((
            RejectReason::Invalid,
            format!("has the header x-contract {}; it must be `1.N`", excerpt(text)),
        )),
    }
}

/// `application/json` or `application/…+json`, in UTF-8 if it names a charset at all.
fn is_json(content_type: &str) -> bool {
    let lower = content_type.trim().to_ascii_lowercase();
    let mut parts = lower.split(';').map(str::trim);
    let essence = parts.next().unwrap_or("");
    let named = matches!(essence, "" | "application/json" | "text/json")
        || (essence.starts_with("application/") && essence.ends_with("+json"));
    named
        && parts
            .filter_map(|parameter| parameter.strip_prefix("charset="))
            .all(|charset| matches!(charset.trim_matches('"'), "utf-8" | "utf8" | "us-ascii"))
}
