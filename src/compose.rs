//! Compose: from a job, its sender and its files to the mail as it goes over the wire (RFC 5322, RFC 2045 ff.). Pure:
//! the same input gives the same bytes, on every attempt.
//!
//! The mail is written straight into one buffer, so that a large attachment is copied once, while being encoded.

use std::borrow::Cow;

use bytes::Bytes;
use jiff::{Timestamp, tz::TimeZone};
use url::Url;

use crate::address::{Address, Mailbox};
use crate::attachment::{Prepared, rewrite};
use crate::failure::{Class, Failure, Fault, Stage};
use crate::job::bounds::MAX_LIST_URL;
use crate::job::{ListUnsubscribe, MailJob};

mod body;
mod header;
pub mod media;
mod message_id;
mod part;
#[cfg(test)]
mod tests;

pub use message_id::message_id;

/// Everything that decides how a mail looks.
#[derive(Debug, Clone, Copy)]
pub struct Composition<'a> {
    /// Subject, bodies, visible recipients and further headers.
    pub job: &'a MailJob,
    /// The author. For a fallback send that is the platform's address with the display name to show.
    pub from: &'a Mailbox,
    /// Where answers go, if not where the job says. For a fallback send that is the original author.
    pub reply_to: Option<&'a [Mailbox]>,
    /// Envelope sender (RFC 5321 §4.1.1.2); none is the null reverse-path `<>`.
    pub envelope_from: Option<&'a Address>,
    /// Recipients that still wait for this mail.
    pub recipients: &'a [Address],
    /// Message-ID with its angle brackets, see [`message_id()`].
    pub message_id: &'a str,
    /// The Date header; the same on every attempt.
    pub date: Timestamp,
    /// Attachments and links.
    pub prepared: &'a Prepared,
}

/// A mail ready to be sent.
#[derive(Debug, Clone)]
pub struct Email {
    /// Header and body with CRLF line ends, ending in CRLF; not dot-stuffed. Lines have at most 998 bytes.
    pub message: Bytes,
    /// Envelope sender; none is `<>`. Its domain is in ASCII form.
    pub envelope_from: Option<Address>,
    /// Envelope recipients in the order of [`Composition::recipients`], their domains in ASCII form.
    pub recipients: Vec<Address>,
    /// Whether the server must offer SMTPUTF8 (RFC 6531): an address has a local part outside ASCII.
    pub needs_utf8: bool,
    /// Whether the message has bytes above 127, so that the server must offer 8BITMIME (RFC 6152). Only together with
    /// [`Email::needs_utf8`]: bodies and all other header fields are encoded.
    pub is_8bit: bool,
}

/// Builds the mail.
///
/// # Errors
/// A permanent content failure if the job holds something that cannot stand in a mail: a header field that only
/// postroom may write, or an unusable address or unsubscribe URL.
pub fn compose(composition: &Composition<'_>) -> Result<Email, Failure> {
    let envelope_from = composition.envelope_from.map(header::wire_address).transpose()?;
    let recipients = composition
        .recipients
        .iter()
        .map(header::wire_address)
        .collect::<Result<Vec<_>, _>>()?;

    let (text, html) = bodies(composition);
    let content = part::Content {
        text: text.as_deref(),
        html: html.as_deref(),
        parts: &composition.prepared.parts,
    };
    let mut out = String::with_capacity(content.size_hint() + 2048);
    write_header(composition, &mut out)?;
    let is_8bit = !out.is_ascii();
    part::write(&content, composition.message_id, &mut out);
    if !out.ends_with("\r\n") {
        out.push_str("\r\n");
    }

    let outside_ascii = |address: &Address| !AsRef::<str>::as_ref(address).is_ascii();
    let needs_utf8 = is_8bit || envelope_from.iter().chain(&recipients).any(outside_ascii);
    Ok(Email {
        message: out.into(),
        envelope_from,
        recipients,
        needs_utf8,
        is_8bit,
    })
}

/// The job's bodies with the links to large files in them.
fn bodies<'a>(composition: &Composition<'a>) -> (Option<Cow<'a, str>>, Option<Cow<'a, str>>) {
    let job = composition.job;
    let links = &composition.prepared.links;
    let (text, html) = (job.text.as_deref(), job.html.as_deref());
    if links.is_empty() {
        return (text.map(Cow::Borrowed), html.map(Cow::Borrowed));
    }
    let locale = job.locale.as_deref();
    // A job without any body gets a plain one, to hold the links.
    let text = text.or(if html.is_none() { Some("") } else { None });
    (
        text.map(|text| rewrite::into_text(text, links, locale).into()),
        html.map(|html| rewrite::into_html(html, links, locale).into()),
    )
}

fn write_header(composition: &Composition<'_>, out: &mut String) -> Result<(), Failure> {
    let job = composition.job;
    // First: a server that does not know BDAT may read this one field as a command, see `smtp::probe`.
    header::verbatim(out, "Date", &date(composition.date));
    header::mailboxes(out, "From", std::slice::from_ref(composition.from))?;
    header::mailboxes(out, "Reply-To", composition.reply_to.unwrap_or(&job.reply_to))?;
    if job.to.is_empty() && job.cc.is_empty() {
        header::verbatim(out, "To", "undisclosed-recipients:;");
    }
    header::mailboxes(out, "To", &job.to)?;
    header::mailboxes(out, "Cc", &job.cc)?;
    if let Some(subject) = &job.subject {
        header::unstructured(out, "Subject", subject);
    }
    header::verbatim(out, "Message-ID", composition.message_id);
    for (name, value) in &job.headers {
        if !header::may_be_given(name, job.list_unsubscribe.is_some()) {
            return Err(refused(
                "header_forbidden",
                "a header field of the job is malformed or may not be set",
            ));
        }
        header::given(out, name, value);
    }
    if let Some(unsubscribe) = &job.list_unsubscribe {
        write_unsubscribe(unsubscribe, out)?;
    }
    header::verbatim(out, "X-Postroom-ID", job.id.as_str());
    header::verbatim(out, "MIME-Version", "1.0");
    Ok(())
}

/// List-Unsubscribe (RFC 2369) and, with a URL, one-click (RFC 8058).
fn write_unsubscribe(unsubscribe: &ListUnsubscribe, out: &mut String) -> Result<(), Failure> {
    let mut ways = Vec::with_capacity(2);
    let mut one_click = false;
    if let Some(text) = &unsubscribe.url {
        let (is_https, way) = Url::parse(text)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .map(|url| (url.scheme() == "https", ListUnsubscribe::way(url.as_str())))
            .filter(|(_, way)| way.len() <= MAX_LIST_URL)
            .ok_or_else(|| {
                refused(
                    "invalid_unsubscribe",
                    "list_unsubscribe.url is not a usable web address",
                )
            })?;
        one_click = is_https;
        ways.push(format!("<{way}>"));
    }
    if let Some(address) = &unsubscribe.mailto {
        let address = header::wire_address(address)?;
        let user = percent_encoding::utf8_percent_encode(address.user(), header::ATTRIBUTE);
        ways.push(format!("<mailto:{user}@{}>", address.domain()));
    }
    if !ways.is_empty() {
        header::verbatim(out, "List-Unsubscribe", &ways.join(",\r\n "));
    }
    if one_click {
        header::verbatim(out, "List-Unsubscribe-Post", "List-Unsubscribe=One-Click");
    }
    Ok(())
}

/// The date in the form of RFC 5322 §3.3.
fn date(at: Timestamp) -> String {
    let zoned = at.to_zoned(TimeZone::UTC);
    // Only a year beyond 9999 cannot be written, which no clock gives.
    jiff::fmt::rfc2822::to_string(&zoned).unwrap_or_else(|_| "Thu, 1 Jan 1970 00:00:00 +0000".to_owned())
}

fn refused(reason: &'static str, message: &str) -> Failure {
    Failure::permanent(Class::Content, Fault::Sender, Stage::Compose, reason, message)
}
