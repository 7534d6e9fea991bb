//! The ledger in Postgres: who may act on a job, what has become of it, what waits, and what is owed.
//!
//! All decisions are made by the functions of `schema/migrations/V2__ledger.sql`, on the database's clock; this module
//! calls them in batches. Concurrent calls of many jobs become one statement (see [`coalesce`]).

pub mod admit;
pub mod batches;
pub mod caps;
pub mod coalesce;
pub mod forget;
pub mod health;
pub mod lease;
pub mod odd;
pub mod outbox;
pub mod park;
pub mod release;
pub mod settle;
pub mod slots;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use jiff::Timestamp;

use crate::db::{Database, DbError};
use crate::id::{AccountKey, JobId, TenantId};
use crate::report::RecipientResult;
use crate::retry::Breaker;
use crate::telemetry::metrics::Metrics;

pub use health::Known;
pub use lease::{Epoch, Lease};
pub use slots::Slot;

/// Why a job waits; the number is the one in the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i16)]
pub enum WaitReason {
    /// A rate limit of its account or tenant.
    Rate = 1,
    /// A passing failure; tried again later.
    Retry = 2,
    /// Its `send_at`.
    Schedule = 3,
    /// All connections of its account are in use while others' jobs stand behind it.
    Busy = 4,
    /// It follows a newer contract than this worker knows.
    Contract = 5,
    /// A key that this worker does not have.
    Key = 6,
    /// Its account's circuit breaker is open.
    Unhealthy = 7,
}

impl WaitReason {
    /// Every reason.
    pub const ALL: [Self; 7] = [
        Self::Rate,
        Self::Retry,
        Self::Schedule,
        Self::Busy,
        Self::Contract,
        Self::Key,
        Self::Unhealthy,
    ];

    /// The name in reports, metrics and listings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Retry => "retry",
            Self::Schedule => "schedule",
            Self::Busy => "busy",
            Self::Contract => "contract",
            Self::Key => "key",
            Self::Unhealthy => "unhealthy",
        }
    }

    /// The reason stored as a number, if it is one.
    #[must_use]
    pub fn from_number(number: i16) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| *reason as i16 == number)
    }
}

/// What the ledger knows of a job that this worker has leased.
#[derive(Debug, Clone)]
pub struct Row {
    /// Whose.
    pub tenant: TenantId,
    /// Which.
    pub id: JobId,
    /// The account whose limits the job was last counted under.
    pub account: AccountKey,
    /// The lease under which this worker may act.
    pub lease: Lease,
    /// First number of the job's reports; part of its identity.
    pub born: i64,
    /// Number of its latest report.
    pub sequence: i64,
    /// Attempts made so far.
    pub attempts: u32,
    /// When the job was first claimed.
    pub created: Timestamp,
    /// When an attempt was first found to need another one: the age of retries counts from here.
    pub tried: Option<Timestamp>,
    /// Results of earlier attempts; empty before the first.
    pub recipients: Vec<RecipientResult>,
    /// Message-ID of earlier attempts.
    pub message_id: Option<Arc<str>>,
    /// Attempts and leases of which nobody knows the outcome.
    pub uncertain: u32,
    /// Suspicion that it crashes whoever works on it: see [`Row::is_poison`].
    pub crashes: u32,
    /// Workers that died with it in their hands.
    pub deaths: u32,
    /// It is the one job that may try an account in trouble.
    pub probe: bool,
    /// It has waited for the end of its account's trouble for as long as retries may take.
    pub overdue: bool,
    /// The slot granted with the lease, if one was.
    pub slot: Option<Slot>,
}

/// Crashes that a job is convicted by.
const CRASH_LOOP: u32 = 3;
/// Deaths of workers with it in their hands, whatever they died of, after which it goes to the dead letters all the same.
const DEADLY: u32 = 20;

impl Row {
    /// The row of a job that has just been born, in the second that `born` names.
    #[must_use]
    pub fn new(tenant: TenantId, id: JobId, account: AccountKey, lease: Lease, born: i64) -> Self {
        Self {
            tenant,
            id,
            account,
            lease,
            born,
            sequence: born,
            attempts: 0,
            created: Timestamp::from_second(born / 1000).unwrap_or_default(),
            tried: None,
            recipients: Vec::new(),
            message_id: None,
            uncertain: 0,
            crashes: 0,
            deaths: 0,
            probe: false,
            overdue: false,
            slot: None,
        }
    }

    /// Whether a worker died over it, or a panic was caught: what it does to us is watched.
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        self.crashes > 0
    }

    /// Whether it is watched alone, since one more crash convicts it.
    #[must_use]
    pub fn is_prime_suspect(&self) -> bool {
        self.crashes + 1 >= CRASH_LOOP
    }

    /// Whether it is to be buried rather than tried again.
    #[must_use]
    pub fn is_poison(&self) -> bool {
        self.crashes >= CRASH_LOOP || self.deaths >= DEADLY
    }
}

/// Calls the ledger's functions. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ledger {
    db: Database,
    /// For heartbeats: a slow database must not lead to lost leases.
    vital: Database,
    metrics: Arc<Metrics>,
    sql: Arc<Statements>,
    health: Arc<Known>,
    breaker: Breaker,
    /// The number at which a search for owed reports begins.
    outbox_first: Arc<AtomicI64>,
}

/// How many jobs wait, and for what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census {
    /// By reason.
    pub waiting: Vec<(WaitReason, i64)>,
    /// Held: nobody knows whether they were sent, and somebody has to decide.
    pub held: i64,
}

/// The statements of the hot path, with the schema's name put in once.
#[derive(Debug)]
struct Statements {
    admit: String,
    settle: String,
    release: String,
    slots: String,
    absorb: String,
    clear: String,
    mark: String,
    park: String,
}

impl Ledger {
    /// A ledger on this database.
    #[must_use]
    pub fn new(db: Database, metrics: Arc<Metrics>) -> Self {
        let sql = Arc::new(Statements {
            admit: db.sql("SELECT * FROM {s}.admit_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)"),
            settle: db.sql(
                "SELECT * FROM {s}.settle_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17,
                    $18, $19, $20, $21, $22, $23, $24, $25, $26, $27, $28, $29)",
            ),
            release: db.sql("SELECT * FROM {s}.release_v1($1, $2, $3, $4, $5, $6, $7, $8)"),
            slots: db.sql("SELECT * FROM {s}.slots_v1($1, $2, $3, $4, $5, $6, $7)"),
            absorb: db.sql("SELECT idx FROM {s}.absorb_v1($1, $2, $3, $4)"),
            clear: db.sql("SELECT {s}.clear_outbox_v1($1)"),
            mark: db.sql("SELECT idx FROM {s}.mark_data_v1($1, $2, $3, $4, $5, $6)"),
            park: db.sql(
                "SELECT * FROM {s}.park_new_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
            ),
        });
        Self {
            vital: db.clone(),
            db,
            metrics,
            sql,
            health: Arc::default(),
            breaker: Breaker::default(),
            outbox_first: Arc::default(),
        }
    }

    /// The same with breakers that open as told.
    #[must_use]
    pub fn with_breaker(self, breaker: Breaker) -> Self {
        Self { breaker, ..self }
    }

    /// The same with heartbeats through another pool, see [`Database::reserved`].
    #[must_use]
    pub fn with_vital(self, vital: Database) -> Self {
        Self { vital, ..self }
    }

    /// The database for what must not stand behind everything else.
    #[must_use]
    pub fn vital(&self) -> &Database {
        &self.vital
    }

    /// The database underneath.
    #[must_use]
    pub fn database(&self) -> &Database {
        &self.db
    }

    /// The installation's fixed secret, which keys Message-IDs.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn installation_secret(&self) -> Result<Vec<u8>, DbError> {
        let sql = self.db.sql("SELECT secret FROM {s}.installation");
        Ok(self.db.client().await?.query_one(&sql, &[]).await?.try_get(0)?)
    }

    /// How many jobs wait, by reason, and how many are held, counted up to `most` each. One worker counts for all, not more
    /// often than `every` and with a fiftieth of its time at most, so that it stays cheap with a full waiting room.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn census(&self, most: i64, every: Duration) -> Result<Census, DbError> {
        let sql = self
            .db
            .sql("SELECT waiting, held FROM {s}.census_v1($1, $2::bigint * interval '1 microsecond')");
        let client = self.db.client().await?;
        let row = client.query_one(&sql, &[&most, &micros(every)]).await?;
        let counts: Vec<i64> = row.try_get(0)?;
        let reasons = (1..).map(WaitReason::from_number);
        Ok(Census {
            waiting: reasons
                .zip(counts)
                .filter_map(|(reason, count)| Some((reason?, count)))
                .collect(),
            held: row.try_get(1)?,
        })
    }

    fn observe(&self, statement: &str, rows: usize, took: Duration) {
        self.metrics
            .batch_rows
            .with_label_values(&[statement])
            .observe(rows as f64);
        self.metrics
            .batch_seconds
            .with_label_values(&[statement])
            .observe(took.as_secs_f64());
    }
}

/// Reads cumulative recipients as stored.
fn recipients(value: Option<serde_json::Value>) -> Vec<RecipientResult> {
    value
        .and_then(|value| serde_json::from_value(value).ok())
        .unwrap_or_default()
}

/// Microseconds since 1970 as a timestamp; the database never stores one out of range.
fn timestamp(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// A duration in microseconds, as the functions take it.
fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros())
        .unwrap_or(i64::MAX / 4)
        .min(i64::MAX / 4)
}
