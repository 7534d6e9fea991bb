//! A job that this worker has leased, with everything needed to make an attempt at it.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::job::{MailJob, Source};
use crate::ledger::Row;
use crate::level::Level;
use crate::memory::Held;

/// Bytes of all files of a job together that are composed in no time, and smaller than what tenants call large.
const SMALL_FILES: usize = 1 << 20;

/// A leased job.
#[derive(Debug)]
pub struct Task {
    /// The job.
    pub job: Arc<MailJob>,
    /// What the ledger knows of it, and the lease.
    pub row: Row,
    /// Its level.
    pub level: Level,
    /// AMQP `correlation_id`, else the job's id.
    pub correlation_id: Arc<str>,
    /// W3C trace context of the producer.
    pub traceparent: Option<String>,
    /// It came from RabbitMQ just now rather than out of the waiting room.
    pub new: bool,
    /// Its share of the memory, free with it.
    pub held: Option<Held>,
}

impl Task {
    /// Whether it may not be sent any more.
    #[must_use]
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.job.expires_at.is_some_and(|at| at <= now)
    }

    /// Whether it can be composed at once: nothing has to be fetched, and its files are so small that hardly anybody wants
    /// them uploaded. A slot taken with its admission is good for long enough then; else it is given back, and another taken.
    #[must_use]
    pub fn is_self_contained(job: &MailJob) -> bool {
        let sizes = job.attachments.iter().map(|file| match &file.source {
            Source::Bytes(bytes) => Some(bytes.len()),
            Source::Url(_) => None,
        });
        sizes
            .sum::<Option<usize>>()
            .is_some_and(|bytes| bytes <= SMALL_FILES)
    }
}

/// The database's clock, as far as this process knows it: its own, corrected by what heartbeats found.
#[derive(Debug, Default)]
pub struct SharedClock {
    offset_micros: std::sync::atomic::AtomicI64,
}

impl SharedClock {
    /// Now, on the database's clock.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        let offset = self.offset_micros.load(std::sync::atomic::Ordering::Relaxed);
        let now = Timestamp::now();
        now.checked_add(SignedDuration::from_micros(offset))
            .unwrap_or(now)
    }

    /// Corrects the clock: the database said `theirs` at about our time `ours`, give or take `half_trip`. Differences
    /// within that are noise.
    pub fn correct(&self, theirs: Timestamp, ours: Timestamp, half_trip: Duration) {
        let offset = theirs.as_microsecond() - ours.as_microsecond();
        let noise = half_trip.as_micros() as i64 + 1_000;
        let offset = if offset.abs() <= noise { 0 } else { offset };
        self.offset_micros
            .store(offset, std::sync::atomic::Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shared_clock_follows_the_database_but_not_the_noise() {
        let clock = SharedClock::default();
        let ours = Timestamp::now();
        clock.correct(
            ours + SignedDuration::from_secs(100),
            ours,
            Duration::from_millis(5),
        );
        assert!(clock.now() > Timestamp::now() + SignedDuration::from_secs(99));
        clock.correct(
            ours + SignedDuration::from_millis(3),
            ours,
            Duration::from_millis(5),
        );
        assert!(clock.now() <= Timestamp::now());
    }
}
