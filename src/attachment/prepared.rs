//! Files ready for the mail.

use bytes::Bytes;
use jiff::Timestamp;

use super::memory::Held;
use crate::compose::media;
use crate::job::Attachment;

/// A file that goes into the mail. Holds its share of the memory for attachments until it is dropped.
#[derive(Debug)]
pub struct Part {
    /// Name shown to the reader.
    pub filename: String,
    /// Media type.
    pub content_type: String,
    /// Content-ID without angle brackets.
    pub content_id: Option<String>,
    /// Shown inside the HTML body.
    pub inline: bool,
    /// The content.
    pub bytes: Bytes,
    pub(super) held: Option<Held>,
}

impl Part {
    /// A part with this content, which is not counted against the memory for attachments.
    #[must_use]
    pub fn new(attachment: &Attachment, bytes: Bytes) -> Self {
        let declared = attachment.content_type.as_deref();
        Self {
            filename: attachment.filename.clone(),
            content_type: media::media_type(&attachment.filename, declared).to_owned(),
            content_id: attachment.content_id.clone(),
            inline: attachment.inline,
            bytes,
            held: None,
        }
    }

    /// Bytes of the memory for attachments that this part occupies.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.held.as_ref().map_or(0, Held::bytes)
    }
}

/// A file that was put into the object store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Name shown to the reader.
    pub filename: String,
    /// Size in bytes.
    pub size: u64,
    /// Where the reader gets it.
    pub url: String,
    /// When `url` stops working; none if it does not by itself.
    pub expires_at: Option<Timestamp>,
}

/// The files of a job, ready to be composed. What it holds of the memory for attachments is free when it is dropped;
/// see [`Prepared::into_reservation`].
#[derive(Debug, Default)]
pub struct Prepared {
    /// Files that go into the mail, in the order of the job.
    pub parts: Vec<Part>,
    /// Files that became links, in the order of the job.
    pub links: Vec<Link>,
    /// Sentences for the log: what was large and attached nevertheless.
    pub warnings: Vec<String>,
}

impl Prepared {
    /// Drops the content, which the composed mail holds a copy of, and keeps its share of the memory: to be held until
    /// the mail has been sent.
    #[must_use]
    pub fn into_reservation(self) -> Reservation {
        Reservation {
            _held: self.parts.into_iter().filter_map(|part| part.held).collect(),
        }
    }
}

/// A share of the memory for attachments, free when this is dropped.
#[derive(Debug, Default)]
pub struct Reservation {
    _held: Vec<Held>,
}
