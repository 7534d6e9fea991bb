//! `smtp_override`: reading it, in clear or the plaintext of a sealed one. What is written is made by [`super::sealing`].
//! No message here shows a value.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use jiff::Timestamp;
use secrecy::SecretString;

use super::bounds::{MAX_HOST, MAX_PASSWORD, MAX_SEALED, MAX_USERNAME};
use super::errors::{Errors, Pointer, ROOT};
use super::json::{self, Entries, Node};
use super::object::Fields;
use super::{OverrideServer, SmtpOverride, TlsMode, values};
use crate::id::TenantId;
use crate::report::FieldError;

/// Fields of an `smtp_override` in clear, and of one sealed by us.
pub(super) const OVERRIDE_FIELDS: &[&str] = &[
    "host",
    "port",
    "tls",
    "username",
    "password",
    "allow_plaintext_auth",
];

/// Fields of the payload of a JWE.
pub(super) const SEALED_FIELDS: &[&str] = &[
    "tenant",
    "expires_at",
    "exp",
    "host",
    "port",
    "tls",
    "username",
    "password",
    "allow_plaintext_auth",
];

/// Who sealed an override.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SealedBy {
    /// The producer, as compact JWE. Its payload must name tenant and expiry.
    Jwe,
    /// We did, when a plain one had to be written somewhere. Tenant and job are bound to it as additional data.
    Us,
}

/// Why an opened override cannot be used. Never holds any of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OverrideError {
    /// It is not what the contract says.
    #[error("the sealed smtp_override is invalid: {}", Listed(.0))]
    Invalid(Vec<FieldError>),
    /// Its time has passed.
    #[error("the sealed smtp_override has expired")]
    Expired,
    /// It was made for another tenant.
    #[error("the sealed smtp_override is for another tenant")]
    OtherTenant,
}

impl OverrideError {
    /// The fixed word for reports.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "override_invalid",
            Self::Expired => "override_expired",
            Self::OtherTenant => "override_other_tenant",
        }
    }
}

/// Field errors in one line.
pub(super) struct Listed<'a>(pub(super) &'a [FieldError]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            let place = if error.pointer.is_empty() {
                "the job"
            } else {
                &error.pointer
            };
            write!(f, "{separator}{place} {}", error.message)?;
        }
        Ok(())
    }
}

/// The field of a job: an object, or a sealed string.
pub(super) fn read(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<SmtpOverride> {
    match node {
        Node::Object(entries) => {
            let mut fields = Fields::new(entries, OVERRIDE_FIELDS, at, errors);
            server(&mut fields, at, errors).map(SmtpOverride::Plain)
        }
        Node::String(text) if is_sealed(&text) => {
            Some(SmtpOverride::Sealed(SecretString::from(text.into_owned())))
        }
        Node::String(_) => {
            errors.push(
                at,
                "must be an object, or a compact JWE (five parts joined by dots)",
            );
            None
        }
        other => {
            values::mistyped(&other, "an object or a sealed string", at, errors);
            None
        }
    }
}

/// Whether a text has the form of a compact JWE (RFC 7516 §7.1) or of our own sealing.
pub(super) fn is_sealed(text: &str) -> bool {
    let is_base64url = |part: &str| {
        part.bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    let is_base64 = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'='))
    };
    if text.len() > MAX_SEALED {
        return false;
    }
    if let Some(ours) = text.strip_prefix("v1:") {
        return ours
            .split_once(':')
            .is_some_and(|(key, sealed)| !key.is_empty() && is_base64(sealed));
    }
    let mut parts = text.split('.');
    let is_full = |part: Option<&str>| part.is_some_and(|part| !part.is_empty() && is_base64url(part));
    // With `alg: dir` the second part, the encrypted key, is empty; another `alg` is refused when it is opened.
    is_full(parts.next())
        && parts.next().is_some_and(is_base64url)
        && is_full(parts.next())
        && is_full(parts.next())
        && is_full(parts.next())
        && parts.next().is_none()
}

fn server(fields: &mut Fields<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<OverrideServer> {
    let host_node = fields.take("host");
    if host_node.is_none() {
        errors.push(
            &at.key("host"),
            "is required: the SMTP server's name or IP address",
        );
    }
    let host = host_node.and_then(|node| host(node, &at.key("host"), errors));
    let tls = fields
        .take("tls")
        .and_then(|node| tls_mode(node, &at.key("tls"), errors))
        .unwrap_or_default();
    let port = fields.take("port").map_or(Some(default_port(tls)), |node| {
        port(&node, &at.key("port"), errors)
    });
    let (username, password) = (fields.take("username"), fields.take("password"));
    if username.is_some() != password.is_some() {
        errors.push(at, "needs `username` and `password` together, or neither");
    }
    let username = username.and_then(|node| credential(node, MAX_USERNAME, &at.key("username"), errors));
    let password = password.and_then(|node| credential(node, MAX_PASSWORD, &at.key("password"), errors));
    let credentials = username
        .zip(password)
        .map(|(user, pass)| (user, SecretString::from(pass)));
    let allow_plaintext_auth = fields
        .take("allow_plaintext_auth")
        .and_then(|node| values::boolean(&node, &at.key("allow_plaintext_auth"), errors))
        .unwrap_or(false);
    if tls == TlsMode::None && credentials.is_some() && !allow_plaintext_auth {
        errors.push(
            &at.key("allow_plaintext_auth"),
            "must be true for sending a password without TLS (`tls` is `none`)",
        );
    }
    Some(OverrideServer {
        host: host?,
        port: port?,
        tls,
        credentials,
        allow_plaintext_auth,
    })
}

/// The registered ports (RFC 5321, 6409, 8314).
fn default_port(tls: TlsMode) -> u16 {
    match tls {
        TlsMode::None => 25,
        TlsMode::StartTls => 587,
        TlsMode::Implicit => 465,
    }
}

fn host(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<String> {
    let text = values::string(node, at, errors)?;
    let host = if let Ok(ip) = text.parse::<IpAddr>() {
        Some(ip.to_string())
    } else if text.len() > MAX_HOST || text.contains(['%', '[', ']']) {
        None
    } else {
        url::Host::parse(&text).ok().map(|host| host.to_string())
    };
    if host.is_none() {
        errors.push(
            at,
            "must be a host name or an IP address, without port and scheme",
        );
    }
    host
}

fn tls_mode(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<TlsMode> {
    let text = values::string(node, at, errors)?;
    let mode = text.parse().ok();
    if mode.is_none() {
        errors.push(at, "must be `none`, `starttls` or `implicit`");
    }
    mode
}

fn port(node: &Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<u16> {
    let port = match node {
        Node::Number(number) => number.as_u64().and_then(|port| u16::try_from(port).ok()),
        _ => None,
    };
    let port = port.filter(|port| *port > 0);
    if port.is_none() {
        errors.push(at, "must be a number from 1 to 65535");
    }
    port
}

fn credential(node: Node<'_>, max: usize, at: &Pointer<'_>, errors: &mut Errors) -> Option<String> {
    let text = values::string(node, at, errors)?;
    if text.is_empty() || !values::fits(&text, max) || text.contains(['\0', '\r', '\n']) {
        errors.push(
            at,
            format!("must be 1 to {max} characters without NUL and line breaks"),
        );
        return None;
    }
    Some(text.into_owned())
}

/// Reads the plaintext of a sealed override.
///
/// # Errors
/// If it is invalid; from a producer, also if it expired at or before `now` or names another tenant.
pub fn parse_override(
    bytes: &[u8],
    tenant: &TenantId,
    now: Timestamp,
    sealed_by: SealedBy,
) -> Result<OverrideServer, OverrideError> {
    let mut errors = Errors::default();
    let Some(entries) = entries(bytes, &mut errors) else {
        return Err(OverrideError::Invalid(errors.into_list()));
    };
    let known = match sealed_by {
        SealedBy::Jwe => SEALED_FIELDS,
        SealedBy::Us => OVERRIDE_FIELDS,
    };
    let mut fields = Fields::new(entries, known, &ROOT, &mut errors);
    let claims = (sealed_by == SealedBy::Jwe).then(|| claims(&mut fields, &mut errors));
    let server = server(&mut fields, &ROOT, &mut errors);
    if let Some(claims) = claims {
        if claims.tenant.is_some_and(|named| named != tenant.as_str()) {
            return Err(OverrideError::OtherTenant);
        }
        if claims.expires_at.is_some_and(|time| time <= now) {
            return Err(OverrideError::Expired);
        }
    }
    match server {
        Some(server) if errors.is_empty() => Ok(server),
        _ => Err(OverrideError::Invalid(errors.into_list())),
    }
}

fn entries<'a>(bytes: &'a [u8], errors: &mut Errors) -> Option<Entries<'a>> {
    const BOUNDS: json::Bounds = json::Bounds { depth: 2, values: 64 };
    let Ok(text) = std::str::from_utf8(bytes) else {
        errors.push(&ROOT, "is not UTF-8");
        return None;
    };
    let document = json::parse(text, BOUNDS);
    document.report(errors);
    if document.syntax.is_some() {
        errors.push(&ROOT, "is not JSON");
        return None;
    }
    match document.root {
        Node::Object(entries) => Some(entries),
        other => {
            values::mistyped(&other, "an object", &ROOT, errors);
            None
        }
    }
}

struct Claims {
    tenant: Option<String>,
    expires_at: Option<Timestamp>,
}

fn claims(fields: &mut Fields<'_>, errors: &mut Errors) -> Claims {
    let tenant = fields.take("tenant");
    if tenant.is_none() {
        errors.push(&ROOT.key("tenant"), "is required: the tenant it is for");
    }
    let tenant =
        tenant.and_then(|node| values::string(node, &ROOT.key("tenant"), errors).map(Cow::into_owned));
    let (written, epoch) = (fields.take("expires_at"), fields.take("exp"));
    if written.is_none() && epoch.is_none() {
        errors.push(
            &ROOT.key("expires_at"),
            "is required: until when it may be used (or `exp`)",
        );
    }
    let written = written.and_then(|node| {
        let text = values::string(node, &ROOT.key("expires_at"), errors)?;
        let time = values::instant(&text);
        if time.is_none() {
            errors.push(&ROOT.key("expires_at"), "must be an RFC 3339 time with offset");
        }
        time
    });
    let epoch = epoch.and_then(|node| {
        let time = epoch_seconds(&node);
        if time.is_none() {
            errors.push(
                &ROOT.key("exp"),
                "must be a time in seconds since 1970-01-01T00:00:00Z",
            );
        }
        time
    });
    let expires_at = [written, epoch].into_iter().flatten().min();
    Claims { tenant, expires_at }
}

/// A `NumericDate` (RFC 7519 §2); fractions are cut off.
fn epoch_seconds(node: &Node<'_>) -> Option<Timestamp> {
    let Node::Number(number) = node else {
        return None;
    };
    let seconds = number.as_i64().or_else(|| {
        number
            .as_f64()
            .filter(|seconds| seconds.abs() < 1e15)
            .map(|seconds| seconds.floor() as i64)
    })?;
    Timestamp::from_second(seconds).ok()
}
