//! The bound on attachment bytes in memory, for all jobs of the process together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::size;
use crate::failure::{Class, Failure, Fault, Stage};
use crate::telemetry::metrics::Metrics;

/// Bytes per permit: a semaphore hands out at most `u32::MAX` permits at once.
const UNIT: u64 = 1024;

/// When to come back after memory was full.
const COME_BACK: Duration = Duration::from_secs(10);

/// The bytes that attachments may occupy.
#[derive(Debug)]
pub(super) struct Memory {
    permits: Arc<Semaphore>,
    total: u64,
    patience: Duration,
    metrics: Arc<Metrics>,
}

/// One job's use of the memory. Jobs take memory piece by piece, so that two of them may wait for each other's: who
/// waits too long gives up, and frees what it has.
#[derive(Debug)]
pub(super) struct Budget<'a> {
    memory: &'a Memory,
    used: AtomicU64,
}

impl Memory {
    /// `total` bytes; a reservation waits at most `patience`.
    pub(super) fn new(total: u64, patience: Duration, metrics: Arc<Metrics>) -> Self {
        let units = usize::try_from(units(total)).unwrap_or(usize::MAX);
        let permits = Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS)));
        Self {
            permits,
            total,
            patience,
            metrics,
        }
    }

    /// For one job.
    pub(super) fn budget(&self) -> Budget<'_> {
        Budget {
            memory: self,
            used: AtomicU64::new(0),
        }
    }
}

impl Budget<'_> {
    /// Largest reservation that can ever succeed, in bytes.
    pub(super) fn total(&self) -> u64 {
        self.memory.total
    }

    /// Counts bytes that files of the job have, whether they are in memory yet or not: what can never fit is known before
    /// anybody waits for it.
    pub(super) fn count(&self, bytes: u64) -> Result<(), Failure> {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) <= self.memory.total {
            return Ok(());
        }
        Err(Failure::permanent(
            Class::Content,
            Fault::Sender,
            Stage::Fetch,
            "attachments_too_large",
            format!(
                "the attachments need more memory at once than the {} of POSTROOM_ATTACHMENT_MEMORY",
                size::human(self.memory.total, '.')
            ),
        ))
    }

    /// Waits for memory for so many bytes, which were counted or soon will be.
    pub(super) async fn hold(&self, bytes: u64) -> Result<Held, Failure> {
        let permit = self.permits(units(bytes)).await?;
        let metrics = Arc::clone(&self.memory.metrics);
        metrics.attachment_bytes.add(bytes as i64);
        Ok(Held {
            permit,
            bytes,
            metrics,
        })
    }

    /// Counts bytes, and waits for memory for them.
    pub(super) async fn reserve(&self, bytes: u64) -> Result<Held, Failure> {
        self.count(bytes)?;
        self.hold(bytes).await
    }

    /// Makes it as many bytes as are wanted if they are free, else waits for the least that is needed: files of one job
    /// must not wait for each other's memory as long as there is enough for what they really have.
    pub(super) async fn grow(&self, held: &mut Held, least: u64, wanted: u64) -> Result<(), Failure> {
        let has = held.permit.num_permits() as u64;
        let more = |to: u64| units(to).saturating_sub(has);
        let at_once = Arc::clone(&self.memory.permits).try_acquire_many_owned(permit_count(more(wanted)));
        let (permit, to) = match at_once {
            Ok(permit) => (permit, wanted),
            Err(_) => (self.permits(more(least)).await?, least),
        };
        held.permit.merge(permit);
        held.metrics.attachment_bytes.add((to - held.bytes) as i64);
        held.bytes = to;
        Ok(())
    }

    async fn permits(&self, units: u64) -> Result<OwnedSemaphorePermit, Failure> {
        let permits = Arc::clone(&self.memory.permits).acquire_many_owned(permit_count(units));
        if let Ok(Ok(permits)) = tokio::time::timeout(self.memory.patience, permits).await {
            return Ok(permits);
        }
        let mut failure = Failure::transient(
            Class::Local,
            Fault::Us,
            Stage::Fetch,
            "attachment_memory",
            "the memory for attachments was full",
        );
        failure.retry_after = Some(COME_BACK);
        Err(failure)
    }

    /// What this job has taken and freed again before its end.
    pub(super) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Reserved memory, free again when this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    permit: OwnedSemaphorePermit,
    bytes: u64,
    metrics: Arc<Metrics>,
}

impl Held {
    /// How much.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives back all but so many bytes.
    pub(super) fn shrink(&mut self, to: u64) {
        let surplus = self.permit.num_permits().saturating_sub(units(to) as usize);
        drop(self.permit.split(surplus));
        self.metrics
            .attachment_bytes
            .sub(self.bytes.saturating_sub(to) as i64);
        self.bytes = self.bytes.min(to);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.metrics.attachment_bytes.sub(self.bytes as i64);
    }
}

fn units(bytes: u64) -> u64 {
    bytes.div_ceil(UNIT)
}

fn permit_count(units: u64) -> u32 {
    u32::try_from(units).unwrap_or(u32::MAX)
}
