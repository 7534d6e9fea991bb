//! A job that this worker has leased, with everything needed to make an attempt at it.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::Attempt;
use crate::id::AccountId;
use crate::job::{MailJob, Source};
use crate::ledger::Row;
use crate::level::Level;
use crate::memory::Held;

/// Bytes of all files of a job together that are composed in no time, and smaller than what tenants call large.
const SMALL_FILES: usize = 1 << 20;

/// Clocks of workers and of the database differ by less.
const CLOCKS: SignedDuration = SignedDuration::from_mins(1);

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
    /// When somebody let it go by hand, for the first time.
    pub released: Option<Timestamp>,
    /// Bytes of the memory that it takes, whoever holds them.
    pub weight: u64,
    /// Its share of the memory, free with it; of a new job its delivery has that.
    pub held: Option<Held>,
}

impl Task {
    /// Whether it may not be sent any more.
    #[must_use]
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.job.expires_at.is_some_and(|at| at <= now)
    }

    /// An attempt at it of which nothing is known yet but whose it is.
    #[must_use]
    pub fn begin(&self) -> Attempt {
        let known = &self.row.recipients;
        let recipients = if known.is_empty() {
            self.job.all_pending()
        } else {
            known.clone()
        };
        let mut attempt = Attempt::of(recipients, self.row.message_id.clone());
        let admitted = || self.row.account.stored_by(&self.row.tenant).map(Arc::from);
        attempt.account = self.job.account.as_ref().map(AccountId::shared).or_else(admitted);
        attempt
    }

    /// How long it has waited for its first attempt, if it has had none and that is known. The time until `send_at` is no wait.
    #[must_use]
    pub fn age(&self, now: Timestamp) -> Option<Duration> {
        // A lease that ended without an outcome may have been an attempt; one that goes on has results.
        if self.row.attempts > 0 || self.row.uncertain > 0 || !self.row.recipients.is_empty() {
            return None;
        }
        let since = self.published?.max(self.job.send_at.unwrap_or(Timestamp::MIN));
        Some(Duration::try_from(now.duration_since(since)).unwrap_or_default())
    }

    /// The Date of its mail: when it first could go. Made of what never changes from its first attempt on, so that a mail
    /// sent again is the same.
    #[must_use]
    pub fn date(&self) -> Timestamp {
        let created = self.row.created;
        self.due().map_or(created, |due| due.max(created))
    }

    /// How long it still has to wait if it comes before its time: one that was taken over while it was being parked.
    #[must_use]
    pub fn is_early_by(&self, now: Timestamp) -> Option<Duration> {
        let early = self.due()?.duration_since(now);
        Duration::try_from(early).ok().filter(|_| early > CLOCKS)
    }

    /// When it may go, if its producer or an operator has said so.
    fn due(&self) -> Option<Timestamp> {
        let send_at = self.job.send_at?;
        Some(self.released.map_or(send_at, |released| released.min(send_at)))
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
    use crate::id::AccountKey;
    use crate::job::decode::{self, Incoming};
    use crate::ledger::Epoch;

    /// A task of the tenant's default account, first claimed at this second.
    fn task(created: i64, more: &str) -> Task {
        let body = format!(r#"{{"id":"1","tenant":"acme","to":"a@example.org","text":"t"{more}}}"#);
        let incoming = Incoming {
            body: body.as_bytes(),
            ..Incoming::default()
        };
        let job = decode::decode(&incoming, &crate::config::JobLimits::default()).unwrap();
        let (account, lease) = (AccountKey::from_stored("acme/main"), Epoch::for_tests().claim());
        Task {
            row: Row::new(job.tenant.clone(), job.id.clone(), account, lease, created * 1000),
            correlation_id: job.id.shared(),
            job: Arc::new(job),
            level: Level::High,
            traceparent: None,
            published: None,
            new: false,
            released: None,
            weight: 0,
            held: None,
        }
    }

    #[test]
    fn a_deferred_or_expired_job_of_the_default_account_names_it() {
        assert_eq!(task(0, "").begin().account.as_deref(), Some("main"));
        let named = task(0, r#","account":"second""#);
        assert_eq!(named.begin().account.as_deref(), Some("second"));
        let mut borrowed = task(0, "");
        borrowed.row.account = AccountKey::from_stored("-/default");
        assert_eq!(borrowed.begin().account, None);
    }

    fn second(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn a_scheduled_mail_is_dated_when_it_is_due() {
        let day = 86_400;
        let monday = second(1_793_606_400).as_second();
        let friday = monday + 4 * day;
        let mut scheduled = task(monday, r#","send_at":"2026-11-06T08:00:00Z""#);
        let due = "2026-11-06T08:00:00Z".parse().unwrap();
        assert_eq!(scheduled.date(), due);
        assert_eq!(task(monday, "").date(), second(monday));
        let late = task(friday + day, r#","send_at":"2026-11-06T08:00:00Z""#);
        assert_eq!(late.date(), second(friday + day));
        // Let go by hand before its time: the same at the attempts after it.
        scheduled.released = Some(second(monday + day));
        assert_eq!(scheduled.date(), second(monday + day));
        // Once it has been due, that changes nothing.
        scheduled.released = Some(second(friday + 2 * day));
        assert_eq!(scheduled.date(), due);
    }

    #[test]
    fn a_job_is_early_before_its_time_unless_somebody_let_it_go() {
        let due: Timestamp = "2026-11-06T08:00:00Z".parse().unwrap();
        let before = |seconds: i64| due - SignedDuration::from_secs(seconds);
        let mut scheduled = task(0, r#","send_at":"2026-11-06T08:00:00Z""#);
        let hour = Some(Duration::from_hours(1));
        assert_eq!(scheduled.is_early_by(before(3600)), hour);
        assert_eq!(scheduled.is_early_by(before(1)), None, "by another clock");
        assert_eq!(scheduled.is_early_by(before(-3600)), None);
        assert_eq!(task(0, "").is_early_by(before(3600)), None);
        scheduled.released = Some(before(3600));
        assert_eq!(scheduled.is_early_by(before(3600)), None);
    }

    #[test]
    fn the_age_of_a_job_runs_until_its_first_attempt_from_when_it_could_have_been_sent() {
        let at = |seconds: i64| second(1_800_000_000 + seconds);
        let published = |send_at: Option<i64>| {
            let more = send_at.map_or_else(String::new, |send_at| format!(r#","send_at":"{}""#, at(send_at)));
            Task {
                published: Some(at(100)),
                ..task(1, &more)
            }
        };
        let age = |task: &Task| task.age(at(160)).map(|age| age.as_secs());
        assert_eq!(age(&published(None)), Some(60));
        assert_eq!(age(&published(Some(50))), Some(60));
        assert_eq!(age(&published(Some(150))), Some(10));
        assert_eq!(age(&published(Some(170))), Some(0), "a clock that is ahead");
        assert_eq!(age(&task(1, "")), None);
        let [mut tried, mut perhaps, mut begun] = [(); 3].map(|()| published(None));
        (tried.row.attempts, perhaps.row.uncertain) = (1, 1);
        begun.row.recipients = begun.job.all_pending();
        assert_eq!([&tried, &perhaps, &begun].map(age), [None; 3]);
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
