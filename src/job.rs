//! The job: a valid request to send one mail. [`decode`] is the only way to make one from foreign bytes.

use std::fmt;

use jiff::Timestamp;
use secrecy::SecretString;

use crate::address::{Address, Mailbox};
use crate::id::{AccountId, JobId, TenantId};
use crate::report::RecipientResult;

mod address;
mod attachments;
pub mod bounds;
pub mod decode;
mod digest;
mod errors;
mod fields;
mod headers;
mod inflate;
mod json;
mod metadata;
mod object;
mod sealing;
mod smtp_override;
#[cfg(test)]
mod tests;
mod values;

/// A valid job (contract `mail.job.v1`). Fields as in `schema/mail-job.v1.json`.
#[derive(Debug, Clone)]
pub struct MailJob {
    /// The idempotency key, unique per tenant.
    pub id: JobId,
    /// Whose mail this is; never the platform.
    pub tenant: TenantId,
    /// The account to send through; else the tenant's default.
    pub account: Option<AccountId>,
    /// Author; else the account's `from`.
    pub from: Option<Mailbox>,
    /// Visible recipients.
    pub to: Vec<Mailbox>,
    /// Visible copies.
    pub cc: Vec<Mailbox>,
    /// Recipients that never appear in the mail.
    pub bcc: Vec<Mailbox>,
    /// Where answers go.
    pub reply_to: Vec<Mailbox>,
    /// Envelope sender; else the address of `from`.
    pub return_path: Option<Address>,
    /// Subject line.
    pub subject: Option<String>,
    /// Plain body.
    pub text: Option<String>,
    /// HTML body.
    pub html: Option<String>,
    /// Further headers in order, names and values free of CR, LF and NUL, none structural.
    pub headers: Vec<(String, String)>,
    /// BCP 47 language tag, for texts that postroom adds.
    pub locale: Option<String>,
    /// RFC 2369 and RFC 8058 headers.
    pub list_unsubscribe: Option<ListUnsubscribe>,
    /// Files.
    pub attachments: Vec<Attachment>,
    /// Not before.
    pub send_at: Option<Timestamp>,
    /// Not after.
    pub expires_at: Option<Timestamp>,
    /// Campaign or batch; echoed in reports.
    pub batch: Option<String>,
    /// For the tenant's statistics; echoed in reports.
    pub tags: Vec<String>,
    /// The producer's own data, echoed in reports (JSON object, at most 4 KiB).
    pub metadata: Option<serde_json::Value>,
    /// An SMTP server for this job alone.
    pub smtp_override: Option<SmtpOverride>,
    /// Overrides the tenant's fallback policy.
    pub fallback: Option<Fallback>,
    /// Overrides the tenant's policy for uncertain outcomes.
    pub on_uncertain: Option<OnUncertain>,
    /// SHA-256 over the decoded job without `smtp_override` (whose sealing is random): what "the same content" means
    /// when an id is repeated.
    pub digest: [u8; 32],
}

impl MailJob {
    /// All recipients in the order to, cc, bcc, each address once (compared as written, the domain without case).
    pub fn recipients(&self) -> impl Iterator<Item = &Address> {
        let mut seen = std::collections::HashSet::new();
        self.to
            .iter()
            .chain(&self.cc)
            .chain(&self.bcc)
            .map(|mailbox| &mailbox.address)
            .filter(move |a| seen.insert((a.user().to_owned(), a.domain().to_ascii_lowercase())))
    }

    /// What is known of them before anybody was tried.
    #[must_use]
    pub fn all_pending(&self) -> Vec<RecipientResult> {
        self.recipients()
            .map(|address| RecipientResult::pending(address.as_ref()))
            .collect()
    }
}

/// `list_unsubscribe` of a job; at least one of the two is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListUnsubscribe {
    /// https URL that takes the one-click POST of RFC 8058.
    pub url: Option<String>,
    /// Address for `mailto:`.
    pub mailto: Option<Address>,
}

impl ListUnsubscribe {
    /// A URL as it is written into the header: a comma separates ways, and angle brackets end one.
    pub(crate) fn way(url: &str) -> String {
        url.replace(',', "%2C").replace('<', "%3C").replace('>', "%3E")
    }
}

/// One file of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Name shown to the reader, without path separators or control characters.
    pub filename: String,
    /// Media type; else guessed from the name by [`crate::compose`].
    pub content_type: Option<String>,
    /// Shown inside the HTML body rather than as a file; has a `content_id` then.
    pub inline: bool,
    /// Content-ID without angle brackets, as `cid:` refers to it.
    pub content_id: Option<String>,
    /// Expected SHA-256 of the content.
    pub sha256: Option<[u8; 32]>,
    /// Where the content comes from.
    pub source: Source,
}

/// Where an attachment's content comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum Source {
    /// It was in the job.
    Bytes(bytes::Bytes),
    /// To be fetched with GET from an http(s) URL.
    Url(url::Url),
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
            // A query may hold a signature or token.
            Self::Url(url) => write!(f, "Url({}…)", url.host_str().unwrap_or("")),
        }
    }
}

/// Whether the platform's account may send when the tenant's own cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fallback {
    /// It may not: the outcome is `mail.failed`.
    #[default]
    Never,
    /// It may.
    Platform,
}

/// What to do with a mail of which nobody knows whether the server took it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnUncertain {
    /// Send again, with the same Message-ID.
    #[default]
    Resend,
    /// Wait for a decision.
    Hold,
}

/// `smtp_override` as it came.
#[derive(Debug, Clone)]
pub enum SmtpOverride {
    /// In clear; sealed before it is written anywhere.
    Plain(OverrideServer),
    /// A compact JWE, or the form in which postroom itself seals a plain one.
    Sealed(SecretString),
}

/// The server of an opened override. Used for one send and dropped.
#[derive(Debug, Clone)]
pub struct OverrideServer {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// TLS mode.
    pub tls: TlsMode,
    /// User name and password; both or none.
    pub credentials: Option<(String, SecretString)>,
    /// Whether the password may be sent over an unencrypted connection.
    pub allow_plaintext_auth: bool,
}

/// How a connection to an SMTP server is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TlsMode {
    /// Not at all.
    None,
    /// STARTTLS, required (RFC 3207).
    #[default]
    StartTls,
    /// TLS from the first byte (RFC 8314).
    Implicit,
}

macro_rules! wire_names {
    ($type:ident, $what:literal, $($variant:ident => $name:literal),+ $(,)?) => {
        impl $type {
            /// The name on the wire, in flags and in the database.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }

        impl std::str::FromStr for $type {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($name => Ok(Self::$variant),)+
                    other => Err(format!(
                        concat!("`{}` is not a ", $what, "; use one of: {}"),
                        other, [$($name),+].join(", ")
                    )),
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

wire_names!(Fallback, "fallback policy", Never => "never", Platform => "platform");
wire_names!(OnUncertain, "policy for uncertain outcomes", Resend => "resend", Hold => "hold");
wire_names!(TlsMode, "TLS mode", None => "none", StartTls => "starttls", Implicit => "implicit");
