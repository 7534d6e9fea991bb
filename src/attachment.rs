//! Attachments: getting them (from the job or an http(s) URL), holding them within bounds, and moving large ones to
//! the object store, with a link in the mail instead.

use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Mutex;

use crate::compose::media;
use crate::config;
use crate::egress::EgressGuard;
use crate::failure::{Class, Failure, Fault, Stage};
use crate::id::TenantId;
use crate::job::{Attachment, Source};
use crate::telemetry::metrics::Metrics;

mod buffer;
mod cache;
mod coding;
mod digest;
mod fetch;
mod memory;
mod policy;
mod prepared;
pub mod rewrite;
mod size;
mod slots;
mod store;
#[cfg(test)]
mod tests;

use buffer::Wanted;
use cache::Cache;
use digest::{Content, sha256, verified};
use fetch::Fetcher;
use memory::{Budget, Held, Memory};
pub use policy::{LargeFileAction, LargeFiles};
pub use prepared::{Link, Part, Prepared, Reservation};
use slots::{Slot, Slots};
pub use store::{StorageError, Store};

/// Time limit of all files of a job together, with their uploads. With the transaction's limits it stays below the broker's 30
/// minutes for an unacknowledged job.
const TOGETHER: Duration = Duration::from_mins(5);

/// How long a mail stands in line for its turn. It holds a permit meanwhile, and a place at its account, which other tenants may
/// share; the waiting room costs neither.
const LINE: Duration = Duration::from_secs(3);

/// Gets attachments, for the whole process.
#[derive(Debug)]
pub struct Attachments {
    fetcher: Fetcher,
    /// Mails whose files are fetched.
    mails: Slots,
    memory: Memory,
    cache: Cache,
    store: Option<Store>,
    /// Time limit of all files of a job together.
    together: Duration,
    /// Time limit of the line before.
    line: Duration,
    metrics: Arc<Metrics>,
}

/// The right to fetch the files of a mail, until dropped. The mails of a tenant take turns as wholes: were it their files, all
/// mails would have some of their files, and none would have all in time.
#[derive(Debug)]
pub struct Turn<'a> {
    _slot: Option<Slot<'a>>,
}

/// What holds for all files of a job.
struct OneJob<'a> {
    tenant: &'a TenantId,
    large: &'a LargeFiles,
    budget: Budget<'a>,
    /// Had by the file that is being fetched, of those that may become links: they need memory one at a time, however many
    /// there are.
    turn: Mutex<()>,
}

/// What became of one attachment.
enum Outcome {
    Attached(Part, Option<String>),
    Linked(Link),
}

impl Attachments {
    /// Opens the object store, if one is configured (nothing is sent to it yet), and warns if its links will not last.
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
        if store.as_ref().is_some_and(Store::links_die_early) {
            tracing::warn!(
                "links to attachments will stop working when the credentials that sign them expire, after hours rather \
                 than POSTROOM_LINK_LIFETIME: give a long-lived access key, or set POSTROOM_STORAGE_PUBLIC_URL"
            );
        }
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
            cache: Cache::new(limits.cache()),
            mails: Slots::new(limits.concurrency),
            fetcher: Fetcher::new(limits, guard).map_err(|_| StorageError::HttpClient)?,
            store,
            together: TOGETHER,
            line: LINE,
            metrics,
        })
    }

    /// Waits until it is the turn of a mail with these attachments, at once if none has to be fetched. `None`: too many of its
    /// tenant, or of all, are before it.
    pub async fn turn(&self, tenant: &TenantId, attachments: &[Attachment]) -> Option<Turn<'_>> {
        let fetches = attachments.iter().any(|a| matches!(a.source, Source::Url(_)));
        if !fetches {
            return Some(Turn { _slot: None });
        }
        let slot = tokio::time::timeout(self.line, self.mails.take(tenant)).await;
        Some(Turn {
            _slot: Some(slot.ok()??),
        })
    }

    /// Gets all attachments of a job whose [`Turn`] it is, each by the tenant's policy. The first failure ends it: nobody waits, or has others
    /// wait, for the files of a mail that is not sent.
    ///
    /// # Errors
    /// A content failure for a file that is missing, wrong or too large; a transient one while a file or the object
    /// store cannot be reached, or if all together take too long; nothing is left out silently.
    pub async fn prepare(
        &self,
        tenant: &TenantId,
        attachments: &[Attachment],
        large: &LargeFiles,
    ) -> Result<Prepared, Failure> {
        if attachments.is_empty() {
            return Ok(Prepared::default());
        }
        let job = OneJob {
            tenant,
            large,
            budget: self.memory.budget(),
            turn: Mutex::new(()),
        };
        let outcomes = tokio::time::timeout(self.together, self.all(&job, attachments)).await;
        let mut prepared = Prepared::default();
        for outcome in outcomes.map_err(|_| not_in_time(self.together))?? {
            match outcome {
                Outcome::Attached(part, warning) => {
                    prepared.parts.push(part);
                    prepared.warnings.extend(warning);
                }
                Outcome::Linked(link) => prepared.links.push(link),
            }
        }
        Ok(prepared)
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

    /// What becomes of each, in the order of the job.
    async fn all(&self, job: &OneJob<'_>, attachments: &[Attachment]) -> Result<Vec<Outcome>, Failure> {
        let each = attachments.iter().enumerate().map(|(place, attachment)| {
            // Boxed: one such future is large.
            Box::pin(async move { Ok((place, self.one(job, attachment).await?)) })
        });
        let each: FuturesUnordered<_> = each.collect();
        let mut done: Vec<(usize, Outcome)> = each.try_collect().await?;
        done.sort_unstable_by_key(|(place, _)| *place);
        Ok(done.into_iter().map(|(_, outcome)| outcome).collect())
    }

    async fn one(&self, job: &OneJob<'_>, attachment: &Attachment) -> Result<Outcome, Failure> {
        let large = job.large;
        let threshold = large.threshold.filter(|_| !attachment.inline).unwrap_or(u64::MAX);
        let cap = if large.action == LargeFileAction::Reject {
            threshold
        } else {
            u64::MAX
        };
        let _turn = if job.may_become_link(attachment) {
            Some(job.turn.lock().await)
        } else {
            None
        };
        let content = self.content(job, attachment, cap).await?;
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
                let link = self.upload(job.tenant, attachment, &content).await?;
                job.budget.give_back(content.held.as_ref().map_or(0, Held::bytes));
                Ok(Outcome::Linked(link))
            }
        }
    }

    /// The content, verified.
    async fn content(&self, job: &OneJob<'_>, attachment: &Attachment, cap: u64) -> Result<Content, Failure> {
        let (tenant, budget) = (job.tenant, &job.budget);
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
        let wanted = Wanted {
            filename: &attachment.filename,
            cap,
        };
        let fetched = self.fetcher.fetch(tenant, url, wanted, budget).await;
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

impl OneJob<'_> {
    /// Whether it has to be fetched, and goes to the object store if it turns out to be large.
    fn may_become_link(&self, attachment: &Attachment) -> bool {
        self.large.action == LargeFileAction::Rewrite
            && self.large.threshold.is_some()
            && !attachment.inline
            && matches!(attachment.source, Source::Url(_))
    }
}

fn part(attachment: &Attachment, content: Content) -> Part {
    Part {
        held: content.held,
        ..Part::new(attachment, content.bytes)
    }
}

fn not_in_time(limit: Duration) -> Failure {
    Failure::transient(
        Class::Infrastructure,
        Fault::Sender,
        Stage::Fetch,
        "attachment_unreachable",
        format!(
            "the attachments did not come within {} seconds, which all of a mail have together",
            limit.as_secs()
        ),
    )
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
    .naming_a_file()
}
