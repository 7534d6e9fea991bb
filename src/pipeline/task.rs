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
    /// When its producer published it, if that is known and tells how late it is.
    pub published: Option<Timestamp>,
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

    /// How long it has waited for its first attempt, if it has had none and that is known. The time until `send_at` is no wait.
    #[must_use]
    pub fn age(&self, now: Timestamp) -> Option<Duration> {
        // A lease that ended without an outcome may have been an attempt.
        if self.row.attempts > 0 || self.row.uncertain > 0 {
            return None;
        }
        let since = self.published?.max(self.job.send_at.unwrap_or(Timestamp::MIN));
        Some(Duration::try_from(now.duration_since(since)).unwrap_or_default())
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
    use crate::config::JobLimits;
    use crate::id::AccountKey;
    use crate::job::decode::{self, Incoming};
    use crate::ledger::Epoch;

    /// So many seconds after some moment.
    fn second(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    /// A task of a job that was published at second 100.
    fn task(send_at: Option<Timestamp>) -> Task {
        let mut body = serde_json::json!({"id": "1", "tenant": "acme", "to": "a@example.org", "subject": "s", "text": "t"});
        if let Some(at) = send_at {
            body["send_at"] = at.to_string().into();
        }
        let body = body.to_string();
        let incoming = Incoming {
            body: body.as_bytes(),
            ..Incoming::default()
        };
        let job = Arc::new(decode::decode(&incoming, &JobLimits::default()).unwrap());
        let (tenant, account) = (job.tenant.clone(), AccountKey::from_stored("acme/main"));
        let lease = Epoch::for_tests().claim();
        Task {
            row: Row::new(tenant, job.id.clone(), account, lease, 1000),
            level: Level::High,
            correlation_id: job.id.shared(),
            traceparent: None,
            published: Some(second(100)),
            new: true,
            held: None,
            job,
        }
    }

    #[test]
    fn the_age_of_a_job_runs_until_its_first_attempt_from_when_it_could_have_been_sent() {
        let age = |task: &Task| task.age(second(160)).map(|age| age.as_secs());
        assert_eq!(age(&task(None)), Some(60));
        assert_eq!(age(&task(Some(second(50)))), Some(60));
        assert_eq!(age(&task(Some(second(150)))), Some(10));
        assert_eq!(age(&task(Some(second(170)))), Some(0), "a clock that is ahead");
        let mut unknown = task(None);
        unknown.published = None;
        assert_eq!(age(&unknown), None);
        let (mut tried, mut perhaps) = (task(None), task(None));
        (tried.row.attempts, perhaps.row.uncertain) = (1, 1);
        assert_eq!((age(&tried), age(&perhaps)), (None, None));
    }

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
