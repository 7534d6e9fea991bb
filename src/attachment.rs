//! Attachments: getting them (from the job or an http(s) URL), holding them within bounds, and moving large ones to
//! the object store, with a link in the mail instead.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join_all;
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::compose::media;
use crate::config;
use crate::egress::EgressGuard;
use crate::failure::{Class, Failure, Fault, Stage};
use crate::id::TenantId;
use crate::job::{Attachment, Source};
use crate::telemetry::metrics::Metrics;

mod cache;
mod fetch;
mod memory;
pub mod rewrite;
mod size;
mod store;
#[cfg(test)]
mod tests;

use cache::Cache;
use fetch::Fetcher;
use memory::{Budget, Held, Memory};
pub use store::{StorageError, Store};

/// Content above this is hashed on a thread for blocking work.
const HASH_INLINE: usize = 256 << 10;

/// Share of the memory for attachments that the cache may use besides it.
const CACHE_SHARE: u64 = 4;

/// What a tenant wants done with large attachments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LargeFiles {
    /// Size in bytes above which an attachment is large; none is never.
    pub threshold: Option<u64>,
    /// What is done with it.
    pub action: LargeFileAction,
}

/// What is done with an attachment above the threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LargeFileAction {
    /// It is attached anyway, with a warning in the log.
    #[default]
    Warn,
    /// The mail fails.
    Reject,
    /// It goes to the object store, and a link to it into the mail.
    Rewrite,
}

impl LargeFileAction {
    /// The name in flags and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Warn => "warn",
            Self::Reject => "reject",
            Self::Rewrite => "rewrite",
        }
    }
}

impl fmt::Display for LargeFileAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for LargeFileAction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "warn" => Ok(Self::Warn),
            "reject" => Ok(Self::Reject),
            "rewrite" => Ok(Self::Rewrite),
            other => Err(format!(
                "`{other}` is not an action for large files; use one of: warn, reject, rewrite"
            )),
        }
    }
}

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
    held: Option<Held>,
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

/// The files of a job, ready to be composed. Keep it until the mail has been composed; what it holds of the memory
/// for attachments is free when it is dropped.
#[derive(Debug, Default)]
pub struct Prepared {
    /// Files that go into the mail, in the order of the job.
    pub parts: Vec<Part>,
    /// Files that became links, in the order of the job.
    pub links: Vec<Link>,
    /// Sentences for the log: what was large and attached nevertheless.
    pub warnings: Vec<String>,
}

/// Gets attachments, for the whole process.
#[derive(Debug)]
pub struct Attachments {
    fetcher: Fetcher,
    memory: Memory,
    cache: Cache,
    store: Option<Store>,
    metrics: Arc<Metrics>,
}

/// What became of one attachment.
enum Outcome {
    Attached(Part, Option<String>),
    Linked(Link),
}

/// Content with its digest, if that was needed so far.
struct Content {
    bytes: Bytes,
    held: Option<Held>,
    digest: Option<[u8; 32]>,
}

impl Attachments {
    /// Opens the object store, if one is configured (nothing is sent to it yet).
    ///
    /// # Errors
    /// If the storage settings cannot be used.
    pub fn new(
        limits: config::Fetch,
        storage: Option<&config::Storage>,
        guard: Arc<EgressGuard>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StorageError> {
        let store = storage.map(Store::open).transpose()?;
        Self::with_store(limits, store, guard, metrics)
    }

    /// Like [`Attachments::new`], with a store that is open already.
    ///
    /// # Errors
    /// If no HTTP client can be built.
    pub fn with_store(
        limits: config::Fetch,
        store: Option<Store>,
        guard: Arc<EgressGuard>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StorageError> {
        Ok(Self {
            memory: Memory::new(limits.memory, limits.timeout / 2, Arc::clone(&metrics)),
            cache: Cache::new(limits.memory / CACHE_SHARE),
            fetcher: Fetcher::new(limits, guard).map_err(|_| StorageError::HttpClient)?,
            store,
            metrics,
        })
    }

    /// Gets all attachments of a job, each by the tenant's policy. If several fail, a failure that stays wins over one
    /// that passes.
    ///
    /// # Errors
    /// A content failure for a file that is missing, wrong or too large; a transient one while a file or the object
    /// store cannot be reached; nothing is left out silently.
    pub async fn prepare(
        &self,
        tenant: &TenantId,
        attachments: &[Attachment],
        large: &LargeFiles,
    ) -> Result<Prepared, Failure> {
        let budget = self.memory.budget();
        // Boxed: one such future is large, and most jobs have no attachment at all.
        let each = attachments
            .iter()
            .map(|attachment| Box::pin(self.one(tenant, attachment, large, &budget)));
        let mut prepared = Prepared::default();
        let mut failed: Option<Failure> = None;
        for outcome in join_all(each).await {
            match outcome {
                Ok(Outcome::Attached(part, warning)) => {
                    prepared.parts.push(part);
                    prepared.warnings.extend(warning);
                }
                Ok(Outcome::Linked(link)) => prepared.links.push(link),
                Err(failure) if failed.as_ref().is_none_or(Failure::is_transient) => failed = Some(failure),
                Err(_) => {}
            }
        }
        failed.map_or(Ok(prepared), Err)
    }

    /// Whether the object store takes files. True without one.
    ///
    /// # Errors
    /// What is wrong, for the operator.
    pub async fn check(&self) -> Result<(), StorageError> {
        match &self.store {
            Some(store) => store.check().await,
            None => Ok(()),
        }
    }

    async fn one(
        &self,
        tenant: &TenantId,
        attachment: &Attachment,
        large: &LargeFiles,
        budget: &Budget<'_>,
    ) -> Result<Outcome, Failure> {
        let threshold = large.threshold.filter(|_| !attachment.inline).unwrap_or(u64::MAX);
        let cap = if large.action == LargeFileAction::Reject {
            threshold
        } else {
            u64::MAX
        };
        let content = self.content(tenant, attachment, cap, budget).await?;
        let size = content.bytes.len() as u64;
        if size <= threshold {
            return Ok(Outcome::Attached(part(attachment, content), None));
        }
        match large.action {
            LargeFileAction::Reject => Err(too_large(&attachment.filename, threshold)),
            LargeFileAction::Warn => {
                let warning = format!(
                    "attachment of {} is above the tenant's threshold of {}",
                    size::human(size, '.'),
                    size::human(threshold, '.'),
                );
                Ok(Outcome::Attached(part(attachment, content), Some(warning)))
            }
            LargeFileAction::Rewrite => {
                let link = self.upload(tenant, attachment, &content).await?;
                budget.give_back(content.held.as_ref().map_or(0, Held::bytes));
                Ok(Outcome::Linked(link))
            }
        }
    }

    /// The content, verified.
    async fn content(
        &self,
        tenant: &TenantId,
        attachment: &Attachment,
        cap: u64,
        budget: &Budget<'_>,
    ) -> Result<Content, Failure> {
        let url = match &attachment.source {
            Source::Bytes(bytes) => return verified(attachment, bytes.clone(), None).await,
            Source::Url(url) => url,
        };
        let known = attachment
            .sha256
            .and_then(|digest| self.cache.get(tenant, &digest));
        if let Some(bytes) = known {
            self.count_fetch("cached");
            if bytes.len() as u64 > cap {
                return Err(too_large(&attachment.filename, cap));
            }
            let held = Some(budget.reserve(bytes.len() as u64).await?);
            return Ok(Content {
                bytes,
                held,
                digest: attachment.sha256,
            });
        }
        let fetched = self.fetcher.fetch(url, &attachment.filename, cap, budget).await;
        self.count_fetch(if fetched.is_ok() { "ok" } else { "failed" });
        let (bytes, held) = fetched?;
        let content = verified(attachment, bytes, Some(held)).await?;
        if let Some(digest) = content.digest {
            self.cache.put(tenant, digest, &content.bytes);
        }
        Ok(content)
    }

    async fn upload(
        &self,
        tenant: &TenantId,
        attachment: &Attachment,
        content: &Content,
    ) -> Result<Link, Failure> {
        let Some(store) = &self.store else {
            return Err(Failure::permanent(
                Class::Local,
                Fault::Us,
                Stage::Upload,
                "storage_not_configured",
                "a large attachment is to become a link, but POSTROOM_STORAGE_URL is not set",
            ));
        };
        let digest = match content.digest {
            Some(digest) => digest,
            None => sha256(&content.bytes).await?,
        };
        let file = store::File {
            filename: &attachment.filename,
            content_type: media::media_type(&attachment.filename, attachment.content_type.as_deref()),
            bytes: &content.bytes,
        };
        let key = store.key(tenant, &digest, &attachment.filename);
        let result = store.put(&key, &file).await;
        let label = result.as_ref().map_or("failed", |stored| stored.as_str());
        self.metrics.uploads.with_label_values(&[label]).inc();
        if matches!(result?, store::Stored::New) {
            self.metrics.upload_bytes.inc_by(content.bytes.len() as u64);
        }
        let (url, expires_at) = store.link(&key, &attachment.filename).await?;
        let size = content.bytes.len() as u64;
        Ok(Link {
            filename: attachment.filename.clone(),
            size,
            url,
            expires_at,
        })
    }

    fn count_fetch(&self, result: &str) {
        self.metrics.fetches.with_label_values(&[result]).inc();
    }
}

fn part(attachment: &Attachment, content: Content) -> Part {
    Part {
        held: content.held,
        ..Part::new(attachment, content.bytes)
    }
}

/// Checks the content against the digest in the job, if there is one.
async fn verified(attachment: &Attachment, bytes: Bytes, held: Option<Held>) -> Result<Content, Failure> {
    let digest = match attachment.sha256 {
        None => None,
        Some(expected) if sha256(&bytes).await? == expected => Some(expected),
        Some(_) => {
            return Err(Failure::permanent(
                Class::Content,
                Fault::Sender,
                Stage::Fetch,
                "attachment_digest_mismatch",
                format!(
                    "the content of `{}` does not have the sha256 given in the job",
                    attachment.filename
                ),
            ));
        }
    };
    Ok(Content { bytes, held, digest })
}

async fn sha256(bytes: &Bytes) -> Result<[u8; 32], Failure> {
    if bytes.len() <= HASH_INLINE {
        return Ok(Sha256::digest(bytes).into());
    }
    let bytes = bytes.clone();
    tokio::task::spawn_blocking(move || Sha256::digest(&bytes).into())
        .await
        .map_err(|_| {
            Failure::transient(
                Class::Local,
                Fault::Us,
                Stage::Fetch,
                "shutting_down",
                "the worker is stopping",
            )
        })
}

fn too_large(filename: &str, limit: u64) -> Failure {
    let limit = size::human(limit, '.');
    Failure::permanent(
        Class::Content,
        Fault::Sender,
        Stage::Fetch,
        "attachment_too_large",
        format!("`{filename}` is larger than the {limit} that are allowed"),
    )
}
