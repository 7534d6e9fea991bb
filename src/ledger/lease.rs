//! Leases. A lease is (epoch, claim): the epoch is this worker as Postgres knows it, kept alive by heartbeats; the
//! claim is drawn once per delivery or release. Whoever holds it may act; it says nothing about what is true.

use std::collections::HashSet;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio_util::sync::CancellationToken;

use super::{Ledger, micros};
use crate::db::DbError;
use crate::id::{JobId, TenantId};

/// One life of a worker. Dies when its heartbeats stop for longer than the lease, and never comes back.
#[derive(Debug)]
pub struct Epoch {
    number: i64,
    lease: Duration,
    /// When the last successful heartbeat was *sent*, on a clock that runs while the machine sleeps.
    beat: AtomicI64,
    claims: AtomicI64,
    /// Claims that somebody in this process works on.
    held: Mutex<HashSet<i64>>,
    /// The next claim number as it was at the last two looks for forgotten leases.
    looks: Mutex<[i64; 2]>,
    /// Blocks of claims, first and number, under which a statement may have leased jobs without our hearing of it.
    lost: Mutex<Vec<(i64, usize)>>,
    dead: CancellationToken,
}

/// The right to act on one job. The epoch knows the claim as long as a clone of this lives.
#[derive(Debug, Clone)]
pub struct Lease {
    /// The worker's life.
    pub epoch: Arc<Epoch>,
    /// Number of this claim within it.
    pub claim: i64,
    _held: Arc<Held>,
}

/// Takes a claim off its epoch's list when nobody works on it any more.
#[derive(Debug)]
struct Held {
    epoch: Arc<Epoch>,
    claim: i64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.epoch.held().remove(&self.claim);
    }
}

impl Lease {
    /// Whether this worker may still begin the write that ends the message.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.epoch.is_fresh()
    }
}

impl Epoch {
    fn new(number: i64, lease: Duration, sent: i64) -> Self {
        Self {
            number,
            lease,
            beat: AtomicI64::new(sent),
            claims: AtomicI64::new(1),
            held: Mutex::default(),
            looks: Mutex::default(),
            lost: Mutex::default(),
            dead: CancellationToken::new(),
        }
    }

    /// A fresh epoch that no database knows.
    #[cfg(test)]
    pub(crate) fn for_tests() -> Arc<Self> {
        Arc::new(Self::new(1, Duration::from_secs(45), boot_nanos()))
    }

    /// Its number in the database.
    #[must_use]
    pub fn number(&self) -> i64 {
        self.number
    }

    /// A lease under a new claim, to ask for.
    #[must_use]
    pub fn claim(self: &Arc<Self>) -> Lease {
        self.lease(self.claims.fetch_add(1, Ordering::Relaxed))
    }

    /// The lease of a claim that was granted.
    #[must_use]
    pub fn lease(self: &Arc<Self>, claim: i64) -> Lease {
        self.held().insert(claim);
        Lease {
            epoch: Arc::clone(self),
            claim,
            _held: Arc::new(Held {
                epoch: Arc::clone(self),
                claim,
            }),
        }
    }

    /// Claims being worked on, and the number below which every other claim was drawn before the look before this one.
    #[must_use]
    pub fn look(&self) -> (Vec<i64>, i64) {
        let next = self.claims.load(Ordering::Relaxed);
        let mut looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let before = looks[0];
        *looks = [looks[1], next];
        drop(looks);
        (self.held().iter().copied().collect(), before)
    }

    fn held(&self) -> MutexGuard<'_, HashSet<i64>> {
        // One insert or remove at a time: a panic elsewhere cannot leave it half done.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the answer to a statement that leased under these claims did not come.
    pub fn lose(&self, first: i64, count: usize) {
        self.lost
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((first, count));
    }

    /// What was noted by [`Self::lose`] since the last call.
    #[must_use]
    pub fn lost(&self) -> Vec<(i64, usize)> {
        std::mem::take(&mut *self.lost.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A block of claim numbers; the first is returned.
    pub fn claim_block(&self, count: usize) -> i64 {
        self.claims.fetch_add(count as i64, Ordering::Relaxed)
    }

    /// Whether no other worker can have taken over yet: the last heartbeat was sent less than two thirds of the lease
    /// ago. The last third is the margin for the write that follows the question.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        !self.dead.is_cancelled() && self.silence() < self.lease * 2 / 3
    }

    /// Time since the last successful heartbeat was sent.
    #[must_use]
    pub fn silence(&self) -> Duration {
        Duration::from_nanos(u64::try_from(boot_nanos() - self.beat.load(Ordering::Acquire)).unwrap_or(0))
    }

    /// Cancelled when the database said that this epoch is dead.
    #[must_use]
    pub fn died(&self) -> &CancellationToken {
        &self.dead
    }
}

/// What a heartbeat found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    /// Alive; heartbeats have been unbroken for this long.
    Alive {
        /// On the database's clock.
        steady: Duration,
    },
    /// Another worker declared this epoch dead.
    Dead,
}

/// What a takeover did.
#[derive(Debug, Default)]
pub struct Takeover {
    /// Jobs whose body is in the ledger: they wait again.
    pub moved: i32,
    /// Jobs whose body RabbitMQ has: free for its redelivery.
    pub opened: i32,
    /// Jobs that were in their final write and must not be sent again without a decision.
    pub uncertain: Vec<(TenantId, JobId)>,
}

impl Ledger {
    /// Begins a life. `deadline`: after this time what was marked as in its final write is decided, whatever became of it.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn register(
        &self,
        name: &str,
        lease: Duration,
        deadline: Duration,
    ) -> Result<Arc<Epoch>, DbError> {
        let sql = self.db.sql(
            "INSERT INTO {s}.worker (name, version, lease, deadline)
             VALUES ($1, $2, $3::bigint * interval '1 microsecond', $4::bigint * interval '1 microsecond')
             ON CONFLICT (epoch) DO NOTHING RETURNING epoch",
        );
        let client = self.vital.client().await?;
        loop {
            let sent = boot_nanos();
            let row = client
                .query_opt(
                    &sql,
                    &[
                        &name,
                        &env!("CARGO_PKG_VERSION"),
                        &micros(lease),
                        &micros(deadline),
                    ],
                )
                .await?;
            // None: another one began in the same microsecond.
            if let Some(row) = row {
                return Ok(Arc::new(Epoch::new(row.try_get(0)?, lease, sent)));
            }
        }
    }

    /// Says that this worker lives.
    ///
    /// # Errors
    /// If the database cannot be asked; the epoch then grows stale by itself.
    pub async fn heartbeat(&self, epoch: &Epoch) -> Result<Beat, DbError> {
        let sql = self
            .db
            .sql("SELECT steady_us FROM {s}.heartbeat_v1($1, $2::bigint * interval '1 microsecond')");
        let client = self.vital.client().await?;
        let sent = boot_nanos();
        let gap = micros(epoch.lease / 2);
        // A connection that nobody answers at must not be waited for: the next heartbeat needs another one.
        let asked =
            tokio::time::timeout(epoch.lease / 4, client.query_opt(&sql, &[&epoch.number, &gap])).await;
        let Ok(row) = asked else {
            client.give_up();
            return Err(DbError::Timeout);
        };
        let Some(row) = row? else {
            epoch.dead.cancel();
            return Ok(Beat::Dead);
        };
        epoch.beat.store(sent, Ordering::Release);
        Ok(Beat::Alive {
            steady: Duration::from_micros(row.try_get::<_, i64>(0)?.max(0) as u64),
        })
    }

    /// Ends a life that holds no lease any more.
    ///
    /// # Errors
    /// If the database cannot be asked; the epoch then dies by silence.
    pub async fn retire(&self, epoch: &Epoch) -> Result<(), DbError> {
        let sql = self.db.sql(
            "WITH gone AS (DELETE FROM {s}.connection_lease WHERE epoch = $1)
             UPDATE {s}.worker SET dead = true WHERE epoch = $1",
        );
        self.db.client().await?.execute(&sql, &[&epoch.number]).await?;
        Ok(())
    }

    /// Takes over the jobs of workers that have been silent for a whole lease: theirs, or this worker's if that is longer.
    /// Does nothing unless this worker's own heartbeats have been unbroken for as long: after an outage of the database
    /// everybody looks dead.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn takeover(&self, epoch: &Epoch, deadline: Duration) -> Result<Takeover, DbError> {
        let sql = self.db.sql(
            "SELECT * FROM {s}.takeover_v1($1, $2::bigint * interval '1 microsecond',
                                           $3::bigint * interval '1 microsecond', 1000)",
        );
        let client = self.db.client().await?;
        let rows = client
            .query(&sql, &[&epoch.number, &micros(epoch.lease), &micros(deadline)])
            .await?;
        drop(client);
        self.end_cancelled().await?;
        let mut takeover = Takeover::default();
        for row in rows {
            takeover.moved += row.try_get::<_, i32>("moved")?;
            takeover.opened += row.try_get::<_, i32>("opened")?;
            let (tenant, id): (Option<&str>, Option<&str>) = (row.try_get("tenant")?, row.try_get("id")?);
            if let (Some(Ok(tenant)), Some(Ok(id))) = (tenant.map(str::parse), id.map(str::parse)) {
                takeover.uncertain.push((tenant, id));
            }
        }
        Ok(takeover)
    }
}

impl Ledger {
    /// Ends jobs whose cancel could not be granted while they were leased, and whose lease has ended since without an
    /// outcome.
    async fn end_cancelled(&self) -> Result<(), DbError> {
        let sql = self
            .db
            .sql("SELECT tenant, id FROM {s}.job WHERE cancel AND state IN (0, 2) LIMIT 1000");
        let rows = self.db.client().await?.query(&sql, &[]).await?;
        for row in rows {
            let (tenant, id): (&str, &str) = (row.try_get(0)?, row.try_get(1)?);
            if let (Ok(tenant), Ok(id)) = (tenant.parse(), id.parse()) {
                self.cancel(&tenant, &id).await?;
            }
        }
        Ok(())
    }
}

/// Nanoseconds of a clock that is monotonic and counts suspended time too.
fn boot_nanos() -> i64 {
    #[cfg(target_os = "linux")]
    let clock = ClockId::Boottime;
    #[cfg(not(target_os = "linux"))]
    let clock = ClockId::Monotonic;
    let now = clock_gettime(clock);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_fresh_until_two_thirds_of_its_lease_have_passed_in_silence() {
        let lease = Duration::from_secs(45);
        let now = boot_nanos();
        let sent = |ago: u64| now - Duration::from_secs(ago).as_nanos() as i64;
        assert!(Epoch::new(1, lease, sent(0)).is_fresh());
        assert!(Epoch::new(1, lease, sent(29)).is_fresh());
        assert!(!Epoch::new(1, lease, sent(31)).is_fresh());
    }

    #[test]
    fn a_claim_is_known_while_any_copy_of_its_lease_lives() {
        let epoch = Epoch::for_tests();
        let lease = epoch.claim();
        let copy = lease.clone();
        drop(lease);
        assert_eq!(epoch.look().0, [copy.claim]);
        drop(copy);
        assert!(epoch.look().0.is_empty());
    }

    #[test]
    fn only_claims_drawn_two_looks_ago_count_as_old() {
        let epoch = Epoch::for_tests();
        let first = epoch.claim().claim;
        assert_eq!(epoch.look().1, 0);
        let later = epoch.claim().claim;
        assert_eq!(epoch.look().1, 0);
        let before = epoch.look().1;
        assert!(first < before && before <= later, "{first} {before} {later}");
    }

    #[test]
    fn an_epoch_declared_dead_is_never_fresh_again() {
        let epoch = Epoch::new(1, Duration::from_secs(45), boot_nanos());
        epoch.dead.cancel();
        assert!(!epoch.is_fresh());
    }
}
