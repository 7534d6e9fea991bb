//! The bytes of jobs that a worker has in hand, bounded by `POSTROOM_MEMORY_BUDGET`.
//!
//! A job is weighed when it comes, by what it will have become when it is sent: its body as received, the decoded job,
//! and the composed mail. The weight is held until the job is over, and with it goes the memory.

use std::sync::Arc;

use prometheus::IntGauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes per permit: a semaphore hands out at most `u32::MAX` permits at once.
const UNIT: u64 = 1024;
/// Bodies up to this size weigh nothing: their number is bounded, by the windows of the consumers and by the permits.
pub const SMALL: u64 = 16 << 10;
/// Body, decoded job, and composed mail (base64 adds a third to what was decoded), each about as large as the plain body.
pub const FACTOR: u64 = 4;

/// Who wants to hold bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// Jobs of the levels `immediate` and `high`: all there is.
    Urgent,
    /// Jobs of the other levels: at most five eighths.
    Bulk,
    /// Jobs out of the waiting room: at most five eighths.
    Room,
}

/// The budget. Whoever waits for a part of it is served in order.
#[derive(Debug)]
pub struct Memory {
    all: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
    room: Arc<Semaphore>,
    total: u64,
    in_use: IntGauge,
}

/// Bytes held, free again when this is dropped.
#[derive(Debug)]
pub struct Held {
    _parts: [Option<OwnedSemaphorePermit>; 2],
    bytes: u64,
    in_use: IntGauge,
}

/// What a job weighs whose plain JSON has so many bytes.
#[must_use]
pub fn weight(plain: u64) -> u64 {
    if plain <= SMALL {
        0
    } else {
        plain.saturating_mul(FACTOR)
    }
}

/// The smallest budget that a job with so many bytes of plain JSON can pass, as any share.
#[must_use]
pub fn least_budget(plain: u64) -> u64 {
    weight(plain).saturating_mul(8).div_ceil(5).next_multiple_of(UNIT)
}

impl Memory {
    /// A budget of so many bytes; `in_use` shows what is held.
    #[must_use]
    pub fn new(total: u64, in_use: IntGauge) -> Arc<Self> {
        let semaphore = |bytes: u64| {
            let units = usize::try_from(bytes / UNIT).unwrap_or(usize::MAX);
            Arc::new(Semaphore::new(units.min(u32::MAX as usize)))
        };
        Arc::new(Self {
            all: semaphore(total),
            bulk: semaphore(part(total)),
            room: semaphore(part(total)),
            total,
            in_use,
        })
    }

    /// Holds bytes, if they are free.
    #[must_use]
    pub fn try_hold(&self, share: Share, bytes: u64) -> Option<Held> {
        let units = self.units(share, bytes);
        let part = match self.bound(share) {
            Some(bound) => Some(Arc::clone(bound).try_acquire_many_owned(units).ok()?),
            None => None,
        };
        let all = Arc::clone(&self.all).try_acquire_many_owned(units).ok()?;
        Some(self.holding(part, Some(all), units))
    }

    /// Holds bytes as soon as they are free. More than the whole share counts as the whole share.
    pub async fn hold(&self, share: Share, bytes: u64) -> Held {
        let units = self.units(share, bytes);
        let part = match self.bound(share) {
            // The semaphores are never closed.
            Some(bound) => Arc::clone(bound).acquire_many_owned(units).await.ok(),
            None => None,
        };
        let all = Arc::clone(&self.all).acquire_many_owned(units).await.ok();
        self.holding(part, all, units)
    }

    /// Bytes that this share could hold now: none while somebody waits for what it would be taken from, who has been given
    /// already what there was.
    #[must_use]
    pub fn free(&self, share: Share) -> u64 {
        let all = self.all.available_permits();
        let free = self
            .bound(share)
            .map_or(all, |bound| all.min(bound.available_permits()));
        free as u64 * UNIT
    }

    /// Whether so many bytes can ever be held beside others that stay.
    #[must_use]
    pub fn fits_beside(&self, held: u64, bytes: u64) -> bool {
        held.div_ceil(UNIT) + bytes.div_ceil(UNIT) <= self.total / UNIT
    }

    /// Most bytes that this share can ever hold.
    #[must_use]
    pub fn most(&self, share: Share) -> u64 {
        match share {
            Share::Urgent => self.total,
            Share::Bulk | Share::Room => part(self.total),
        }
    }

    fn bound(&self, share: Share) -> Option<&Arc<Semaphore>> {
        match share {
            Share::Urgent => None,
            Share::Bulk => Some(&self.bulk),
            Share::Room => Some(&self.room),
        }
    }

    fn units(&self, share: Share, bytes: u64) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT).min(self.most(share) / UNIT)).unwrap_or(u32::MAX)
    }

    fn holding(
        &self,
        part: Option<OwnedSemaphorePermit>,
        all: Option<OwnedSemaphorePermit>,
        units: u32,
    ) -> Held {
        let bytes = u64::from(units) * UNIT;
        self.in_use.add(bytes as i64);
        Held {
            _parts: [part, all],
            bytes,
            in_use: self.in_use.clone(),
        }
    }
}

impl Held {
    /// How many.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.in_use.sub(self.bytes as i64);
    }
}

fn part(total: u64) -> u64 {
    total / 8 * 5
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(total: u64) -> Arc<Memory> {
        Memory::new(total, IntGauge::new("held", "held").unwrap())
    }

    #[test]
    fn no_share_takes_more_than_it_may_and_what_is_dropped_is_free_again() {
        let memory = memory(800 * UNIT);
        let bulk = memory.try_hold(Share::Bulk, 500 * UNIT).unwrap();
        assert!(memory.try_hold(Share::Bulk, UNIT).is_none());
        assert_eq!(memory.free(Share::Room), 300 * UNIT);
        let urgent = memory.try_hold(Share::Urgent, 300 * UNIT).unwrap();
        assert!(memory.try_hold(Share::Room, UNIT).is_none());
        assert_eq!(memory.in_use.get(), 800 * UNIT as i64);
        drop((bulk, urgent));
        assert_eq!(memory.free(Share::Urgent), 800 * UNIT);
        assert_eq!(memory.in_use.get(), 0);
    }

    #[test]
    fn a_refused_hold_leaves_nothing_behind() {
        let memory = memory(800 * UNIT);
        let urgent = memory.try_hold(Share::Urgent, 700 * UNIT).unwrap();
        assert!(memory.try_hold(Share::Bulk, 200 * UNIT).is_none());
        drop(urgent);
        assert_eq!(memory.free(Share::Bulk), 500 * UNIT);
    }

    #[tokio::test]
    async fn the_large_are_not_passed_by_the_small_for_ever() {
        let memory = memory(800 * UNIT);
        let first = memory.try_hold(Share::Bulk, 400 * UNIT).unwrap();
        let large = memory.hold(Share::Bulk, 500 * UNIT);
        tokio::pin!(large);
        assert!(futures_util::poll!(&mut large).is_pending());
        assert!(
            memory.try_hold(Share::Bulk, UNIT).is_none(),
            "the large one is next"
        );
        assert_eq!(memory.free(Share::Bulk), 0);
        drop(first);
        drop(large.await);
        assert_eq!(memory.free(Share::Bulk), 500 * UNIT);
    }

    #[tokio::test]
    async fn who_waits_for_a_share_keeps_nobody_from_the_others() {
        let memory = memory(800 * UNIT);
        let bulk = memory.try_hold(Share::Bulk, 300 * UNIT).unwrap();
        let more = memory.hold(Share::Bulk, 400 * UNIT);
        tokio::pin!(more);
        assert!(futures_util::poll!(&mut more).is_pending());
        let free = [Share::Bulk, Share::Room, Share::Urgent].map(|share| memory.free(share) / UNIT);
        assert_eq!(free, [0, 500, 500]);
        let room = memory.try_hold(Share::Room, 500 * UNIT).unwrap();
        drop(bulk);
        // Now it waits for what there is in all, and is next.
        assert!(futures_util::poll!(&mut more).is_pending());
        assert!(memory.try_hold(Share::Urgent, UNIT).is_none());
        assert_eq!([memory.free(Share::Room), memory.free(Share::Urgent)], [0, 0]);
        drop(room);
        drop(more.await);
        assert_eq!(memory.free(Share::Urgent), 800 * UNIT);
    }

    #[tokio::test]
    async fn the_largest_job_passes_the_smallest_budget_that_is_allowed() {
        let plain = 8 << 20;
        let memory = memory(least_budget(plain));
        for share in [Share::Bulk, Share::Room, Share::Urgent] {
            assert!(weight(plain) <= memory.most(share));
            assert!(memory.try_hold(share, weight(plain)).is_some());
        }
        assert_eq!(weight(SMALL), 0);
    }
}
