//! The fields of a job, each checked; everything that is wrong is collected before the job is refused.

use std::borrow::Cow;

use url::Url;

use super::bounds::{MAX_BATCH, MAX_LIST_URL, MAX_LOCALE, MAX_REPLY_TO, MAX_SUBJECT, MAX_TAG, MAX_TAGS};
use super::errors::{Errors, Pointer, ROOT};
use super::json::{Entries, Node};
use super::object::Fields;
use super::{
    ListUnsubscribe, MailJob, address, attachments, digest, headers, metadata, smtp_override, values,
};
use crate::config::JobLimits;
use crate::id::{AccountId, InvalidId, JobId, TenantId};

/// Fields of a job.
pub(super) const JOB_FIELDS: &[&str] = &[
    "id",
    "tenant",
    "account",
    "from",
    "to",
    "cc",
    "bcc",
    "reply_to",
    "return_path",
    "subject",
    "text",
    "html",
    "headers",
    "locale",
    "list_unsubscribe",
    "attachments",
    "send_at",
    "expires_at",
    "batch",
    "tags",
    "metadata",
    "smtp_override",
    "fallback",
    "on_uncertain",
];

/// Fields of `list_unsubscribe`.
pub(super) const LIST_UNSUBSCRIBE_FIELDS: &[&str] = &["url", "mailto"];

/// A tenant a job may name; the platform is none.
pub(super) struct JobTenant(pub(super) TenantId);

impl std::str::FromStr for JobTenant {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let tenant: TenantId = text.parse()?;
        if tenant.is_platform() {
            return Err(InvalidId(TenantId::RULE));
        }
        Ok(Self(tenant))
    }
}

/// Reads a job from the members of its object, which is what `body` is. `None` only if `errors` says why.
pub(super) fn job(
    entries: Entries<'_>,
    body: &str,
    limits: &JobLimits,
    errors: &mut Errors,
) -> Option<MailJob> {
    let mut reader = Reader {
        fields: Fields::new(entries, JOB_FIELDS, &ROOT, errors),
        errors,
    };
    let id = reader.required::<JobId>("id", JobId::RULE);
    let tenant = reader.required::<JobTenant>("tenant", TenantId::RULE);
    let people = reader.people(limits);
    let content = reader.content(limits);
    let account = reader.parsed::<AccountId>("account", AccountId::RULE);
    let (send_at, expires_at) = reader.times();
    let batch = reader.with("batch", |node, at, errors| {
        values::label(node, MAX_BATCH, at, errors)
    });
    let tags = reader.with("tags", tags).unwrap_or_default();
    let metadata = reader.with("metadata", |node, at, errors| {
        metadata::read(node, body, at, errors)
    });
    let smtp_override = reader.with("smtp_override", smtp_override::read);
    let fallback = reader.parsed("fallback", "`never` or `platform`");
    let on_uncertain = reader.parsed("on_uncertain", "`resend` or `hold`");
    if !errors.is_empty() {
        return None;
    }
    let mut job = MailJob {
        id: id?,
        tenant: tenant?.0,
        account,
        from: people.from,
        to: people.to,
        cc: people.cc,
        bcc: people.bcc,
        reply_to: people.reply_to,
        return_path: people.return_path,
        subject: content.subject,
        text: content.text,
        html: content.html,
        headers: content.headers,
        locale: content.locale,
        list_unsubscribe: content.list_unsubscribe,
        attachments: content.attachments,
        send_at,
        expires_at,
        batch: batch.map(Cow::into_owned),
        tags,
        metadata,
        smtp_override,
        fallback,
        on_uncertain,
        digest: [0; 32],
    };
    job.digest = digest::digest(&job);
    Some(job)
}

struct People {
    from: Option<crate::address::Mailbox>,
    to: Vec<crate::address::Mailbox>,
    cc: Vec<crate::address::Mailbox>,
    bcc: Vec<crate::address::Mailbox>,
    reply_to: Vec<crate::address::Mailbox>,
    return_path: Option<crate::address::Address>,
}

struct Content {
    subject: Option<String>,
    text: Option<String>,
    html: Option<String>,
    headers: Vec<(String, String)>,
    locale: Option<String>,
    list_unsubscribe: Option<ListUnsubscribe>,
    attachments: Vec<super::Attachment>,
}

struct Reader<'a, 'e> {
    fields: Fields<'a>,
    errors: &'e mut Errors,
}

impl<'a> Reader<'a, '_> {
    /// Reads an optional field with `read`.
    fn with<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(Node<'a>, &Pointer<'_>, &mut Errors) -> Option<T>,
    ) -> Option<T> {
        let node = self.fields.take(name)?;
        read(node, &ROOT.key(name), self.errors)
    }

    fn parsed<T: std::str::FromStr>(&mut self, name: &str, rule: &str) -> Option<T> {
        self.with(name, |node, at, errors| values::parsed(node, rule, at, errors))
    }

    fn required<T: std::str::FromStr>(&mut self, name: &str, rule: &str) -> Option<T> {
        let Some(node) = self.fields.take(name) else {
            self.errors.push(&ROOT.key(name), format!("is required: {rule}"));
            return None;
        };
        values::parsed(node, rule, &ROOT.key(name), self.errors)
    }

    fn mailboxes(&mut self, name: &str, max: usize, count: &mut usize) -> Vec<crate::address::Mailbox> {
        let node = self.fields.take(name);
        address::mailboxes(node, max, &ROOT.key(name), self.errors, count)
    }

    fn people(&mut self, limits: &JobLimits) -> People {
        let max = limits.max_recipients;
        let mut count = 0;
        let people = People {
            from: self.with("from", |node, at, errors| match node {
                Node::Array(_) => {
                    errors.push(at, "must be one address, not a list");
                    None
                }
                node => address::mailbox(node, at, errors),
            }),
            to: self.mailboxes("to", max, &mut count),
            cc: self.mailboxes("cc", max, &mut count),
            bcc: self.mailboxes("bcc", max, &mut count),
            reply_to: self.mailboxes("reply_to", MAX_REPLY_TO, &mut 0),
            return_path: self.with("return_path", address::nameless),
        };
        if count == 0 {
            self.errors.push(
                &ROOT,
                "needs a recipient: at least one address in `to`, `cc` or `bcc`",
            );
        } else if count > max {
            self.errors.push(
                &ROOT,
                format!("has {count} recipients in `to`, `cc` and `bcc`; at most {max}"),
            );
        }
        people
    }

    fn content(&mut self, limits: &JobLimits) -> Content {
        let (text, html) = (self.fields.take("text"), self.fields.take("html"));
        if text.is_none() && html.is_none() {
            self.errors.push(&ROOT, "needs a body: `text`, `html` or both");
        }
        let has_html = html.is_some();
        let list = self.fields.take("list_unsubscribe");
        let has_list = list.is_some();
        let max = limits.max_attachments;
        Content {
            subject: self
                .with("subject", |node, at, errors| {
                    values::line(node, MAX_SUBJECT, at, errors)
                })
                .map(Cow::into_owned),
            text: text
                .and_then(|node| values::string(node, &ROOT.key("text"), self.errors))
                .map(Cow::into_owned),
            html: html.and_then(|node| html_body(node, &ROOT.key("html"), self.errors)),
            headers: self
                .with("headers", |node, at, errors| {
                    Some(headers::headers(node, has_list, at, errors))
                })
                .unwrap_or_default(),
            locale: self.with("locale", locale),
            list_unsubscribe: list
                .and_then(|node| list_unsubscribe(node, &ROOT.key("list_unsubscribe"), self.errors)),
            attachments: self
                .with("attachments", |node, at, errors| {
                    Some(attachments::attachments(node, has_html, max, at, errors))
                })
                .unwrap_or_default(),
        }
    }

    fn times(&mut self) -> (Option<jiff::Timestamp>, Option<jiff::Timestamp>) {
        let send_at = self.with("send_at", values::time);
        let expires_at = self.with("expires_at", values::time);
        if let (Some(from), Some(until)) = (send_at, expires_at)
            && until <= from
        {
            self.errors
                .push(&ROOT.key("expires_at"), "must be later than `send_at`");
        }
        (send_at, expires_at)
    }
}

fn html_body(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<String> {
    let html = values::string(node, at, errors)?;
    if html.is_empty() {
        // Readers would be shown this blank alternative instead of the text.
        errors.push(at, "must not be empty; leave it out for a plain mail");
    }
    Some(html.into_owned())
}

fn locale(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<String> {
    let text = values::string(node, at, errors)?;
    let mut subtags = text.split(['-', '_']);
    let is_language =
        |tag: &str| (2..=8).contains(&tag.len()) && tag.bytes().all(|b| b.is_ascii_alphabetic());
    let is_subtag =
        |tag: &str| (1..=8).contains(&tag.len()) && tag.bytes().all(|b| b.is_ascii_alphanumeric());
    if text.len() <= MAX_LOCALE && subtags.next().is_some_and(is_language) && subtags.all(is_subtag) {
        return Some(text.replace('_', "-"));
    }
    errors.push(at, "must be a language tag such as `de` or `pt-BR` (BCP 47)");
    None
}

fn list_unsubscribe(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<ListUnsubscribe> {
    let Node::Object(entries) = node else {
        values::mistyped(&node, "an object with `url`, `mailto` or both", at, errors);
        return None;
    };
    let mut fields = Fields::new(entries, LIST_UNSUBSCRIBE_FIELDS, at, errors);
    let (url, mailto) = (fields.take("url"), fields.take("mailto"));
    if url.is_none() && mailto.is_none() {
        errors.push(at, "needs `url`, `mailto` or both");
    }
    Some(ListUnsubscribe {
        url: url.and_then(|node| one_click(node, &at.key("url"), errors)),
        mailto: mailto.and_then(|node| address::nameless(node, &at.key("mailto"), errors)),
    })
}

/// The URL of RFC 8058 in ASCII, as it goes into the header.
fn one_click(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<String> {
    let text = values::string(node, at, errors)?;
    let url = attachments::url(&text, MAX_LIST_URL, &["https"])
        .map(Url::into)
        .filter(|url: &String| ListUnsubscribe::way(url).len() <= MAX_LIST_URL && !url.contains(['<', '>']));
    if url.is_none() {
        errors.push(
            at,
            format!("must be an https URL of at most {MAX_LIST_URL} characters (a comma is three, `%2C`), without user name, password and blanks"),
        );
    }
    url
}

fn tags(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<Vec<String>> {
    let items = match node {
        Node::Array(items) => items,
        other => {
            values::mistyped(&other, "a list of strings", at, errors);
            return None;
        }
    };
    if items.len() > MAX_TAGS {
        errors.push(at, format!("holds {} tags; at most {MAX_TAGS}", items.len()));
        return None;
    }
    let tags = items
        .into_iter()
        .enumerate()
        .filter_map(|(index, item)| values::label(item, MAX_TAG, &at.index(index), errors))
        .map(Cow::into_owned)
        .collect();
    Some(tags)
}
