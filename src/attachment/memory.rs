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

    /// Reserves memory for so many bytes.
    pub(super) async fn reserve(&self, bytes: u64) -> Result<Held, Failure> {
        let memory = self.memory;
        if self
            .used
            .fetch_add(bytes, Ordering::Relaxed)
            .saturating_add(bytes)
            > memory.total
        {
            return Err(Failure::permanent(
                Class::Content,
                Fault::Sender,
                Stage::Fetch,
                "attachments_too_large",
                format!(
                    "the attachments together are larger than the {} a worker may hold",
                    size::human(memory.total, '.')
                ),
            ));
        }
        let count = u32::try_from(units(bytes)).unwrap_or(u32::MAX);
        let permit = tokio::time::timeout(
            memory.patience,
            Arc::clone(&memory.permits).acquire_many_owned(count),
        );
        let Ok(Ok(permit)) = permit.await else {
            let mut failure = Failure::transient(
                Class::Local,
                Fault::Us,
                Stage::Fetch,
                "attachment_memory",
                "the memory for attachments was full",
            );
            failure.retry_after = Some(COME_BACK);
            return Err(failure);
        };
        let metrics = Arc::clone(&memory.metrics);
        metrics.attachment_bytes.add(bytes as i64);
        Ok(Held {
            permit,
            bytes,
            metrics,
        })
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

    /// Adds another reservation to this one.
    pub(super) fn join(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
        if let Some(permit) = other.permit.split(other.permit.num_permits()) {
            self.permit.merge(permit);
        }
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
