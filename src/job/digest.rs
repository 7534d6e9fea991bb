//! What "the same content" means: SHA-256 over a canonical form of the decoded job.
//!
//! Independent of everything JSON and the contract leave to the producer's taste: order of members, white space,
//! null or absent, one address or a list of one, notation of addresses and times, compression. Fields that later
//! versions add must write nothing when absent, so that digests stay what they were.

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{MailJob, Source};
use crate::address::Mailbox;

/// The digest of a job; its own `digest` and its `smtp_override` do not count.
pub(super) fn digest(job: &MailJob) -> [u8; 32] {
    let mut canon = Canon(Sha256::new());
    canon.put("job", b"1");
    canon.put("id", job.id.as_str().as_bytes());
    canon.put("tenant", job.tenant.as_str().as_bytes());
    canon.text("account", job.account.as_ref().map(crate::id::AccountId::as_str));
    canon.mailboxes("from", job.from.as_slice());
    canon.mailboxes("to", &job.to);
    canon.mailboxes("cc", &job.cc);
    canon.mailboxes("bcc", &job.bcc);
    canon.mailboxes("reply_to", &job.reply_to);
    canon.text("return_path", job.return_path.as_ref().map(AsRef::as_ref));
    canon.text("subject", job.subject.as_deref());
    canon.text("text", job.text.as_deref());
    canon.text("html", job.html.as_deref());
    canon.headers(&job.headers);
    canon.text("locale", job.locale.as_deref());
    if let Some(list) = &job.list_unsubscribe {
        canon.text("list_unsubscribe.url", list.url.as_deref());
        canon.text("list_unsubscribe.mailto", list.mailto.as_ref().map(AsRef::as_ref));
    }
    canon.attachments(job);
    canon.time("send_at", job.send_at);
    canon.time("expires_at", job.expires_at);
    canon.text("batch", job.batch.as_deref());
    for tag in &job.tags {
        canon.put("tag", tag.as_bytes());
    }
    if let Some(metadata) = &job.metadata {
        canon.put("metadata", b"");
        canon.value(metadata);
    }
    canon.text("fallback", job.fallback.map(super::Fallback::as_str));
    canon.text("on_uncertain", job.on_uncertain.map(super::OnUncertain::as_str));
    canon.0.finalize().into()
}

/// Writes named byte strings with their lengths, so that no two sequences of them run together.
struct Canon(Sha256);

impl Canon {
    fn put(&mut self, name: &str, value: &[u8]) {
        self.0.update([name.len() as u8]);
        self.0.update(name);
        self.0.update((value.len() as u64).to_be_bytes());
        self.0.update(value);
    }

    fn text(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.put(name, value.as_bytes());
        }
    }

    fn time(&mut self, name: &str, value: Option<jiff::Timestamp>) {
        if let Some(value) = value {
            self.put(name, &value.as_nanosecond().to_be_bytes());
        }
    }

    fn mailboxes(&mut self, field: &str, mailboxes: &[Mailbox]) {
        for mailbox in mailboxes {
            self.put(field, AsRef::<str>::as_ref(&mailbox.address).as_bytes());
            self.text("name", mailbox.name.as_deref());
        }
    }

    fn headers(&mut self, headers: &[(String, String)]) {
        let mut sorted: Vec<_> = headers.iter().collect();
        sorted.sort_unstable();
        for (name, value) in sorted {
            self.put("header", name.as_bytes());
            self.put("value", value.as_bytes());
        }
    }

    fn attachments(&mut self, job: &MailJob) {
        for attachment in &job.attachments {
            self.put("attachment", attachment.filename.as_bytes());
            self.text("content_type", attachment.content_type.as_deref());
            self.put("inline", &[u8::from(attachment.inline)]);
            self.text("content_id", attachment.content_id.as_deref());
            match &attachment.source {
                // A digest given with the content was verified; without one it is made here.
                Source::Bytes(bytes) => {
                    let digest = attachment.sha256.unwrap_or_else(|| Sha256::digest(bytes).into());
                    self.put("bytes", &digest);
                }
                Source::Url(url) => {
                    self.put("url", url.as_str().as_bytes());
                    if let Some(digest) = &attachment.sha256 {
                        self.put("sha256", digest);
                    }
                }
            }
        }
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.put("null", b""),
            Value::Bool(value) => self.put("bool", &[u8::from(*value)]),
            Value::Number(value) => self.put("number", value.to_string().as_bytes()),
            Value::String(value) => self.put("string", value.as_bytes()),
            Value::Array(items) => {
                self.put("array", &(items.len() as u64).to_be_bytes());
                for item in items {
                    self.value(item);
                }
            }
            Value::Object(members) => {
                self.put("object", &(members.len() as u64).to_be_bytes());
                let mut sorted: Vec<_> = members.iter().collect();
                sorted.sort_unstable_by_key(|(name, _)| *name);
                for (name, value) in sorted {
                    self.put("member", name.as_bytes());
                    self.value(value);
                }
            }
        }
    }
}
