//! Circuit breakers of accounts, shared by all workers: one row in Postgres per account with recent trouble, and this
//! process's view of it. What is decided is decided by the functions of `V2__ledger.sql` as part of admission, release and
//! settlement; the view only keeps jobs that are already under way from trying what has failed meanwhile.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::Notify;
use tokio_postgres::Row;

use super::{Ledger, micros};
use crate::address::masked_in;
use crate::db::{Database, DbError};
use crate::failure::Failure;
use crate::id::AccountKey;

/// Most accounts of which trouble is known here; beyond them only admission and release hold jobs back.
const MOST: i64 = 10_000;
/// Longest text kept of a fault, in bytes.
const MAX_DETAIL: usize = 300;

/// What an attempt says about an account that it used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// The account.
    pub account: AccountKey,
    /// What is wrong with it or its server; `None`: the server works.
    pub fault: Option<AccountFault>,
}

/// A fault of an account or its server, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountFault {
    /// The failure's class.
    pub class: &'static str,
    /// Its fixed word.
    pub reason: &'static str,
    /// The same in a sentence, addresses masked, bounded.
    pub detail: String,
}

impl AccountFault {
    /// The fault in a failure.
    #[must_use]
    pub fn of(failure: &Failure) -> Self {
        let text = failure.to_string();
        let mut detail = masked_in(&text).into_owned();
        detail.retain(|c| !c.is_control());
        let end = (0..=MAX_DETAIL.min(detail.len()))
            .rev()
            .find(|i| detail.is_char_boundary(*i));
        detail.truncate(end.unwrap_or(0));
        Self {
            class: failure.class.as_str(),
            reason: failure.reason,
            detail,
        }
    }
}

/// What became of an account's breaker; the number is the one in the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It opened.
    Opened,
    /// It closed.
    Recovered,
    /// Its probe failed.
    OpenedAgain,
    /// Its probe never came to the server.
    Unproved,
}

impl Change {
    fn from_number(number: i16) -> Option<Self> {
        Some(match number {
            1 => Self::Opened,
            2 => Self::Recovered,
            3 => Self::OpenedAgain,
            4 => Self::Unproved,
            _ => return None,
        })
    }

    /// The label of the metric.
    fn as_str(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Recovered => "recovered",
            Self::OpenedAgain => "opened_again",
            Self::Unproved => "unproved",
        }
    }
}

/// Accounts in trouble, as far as this process knows.
#[derive(Debug, Default)]
pub struct Known {
    ill: RwLock<HashMap<AccountKey, Ill>>,
    any: AtomicBool,
    events: Notify,
}

#[derive(Debug, Clone, Copy)]
struct Ill {
    until: Instant,
    /// When the statement that told it was sent: an older one does not overrule it.
    told: Instant,
}

impl Known {
    /// How long the account is left alone; zero if it waits for a probe. `None`: it is well.
    #[must_use]
    pub fn wait(&self, account: &AccountKey) -> Option<Duration> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let ill = self.ill.read().unwrap_or_else(PoisonError::into_inner);
        let ill = ill.get(account)?;
        Some(ill.until.saturating_duration_since(Instant::now()))
    }

    /// Resolves when an event about an account is owed.
    pub async fn event(&self) {
        self.events.notified().await;
    }

    /// Notes what a statement sent at `told` said: in trouble for so long, or well.
    pub(super) fn note(&self, account: &AccountKey, wait: Option<Duration>, told: Instant) {
        if wait.is_none() && !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut ill = self.ill.write().unwrap_or_else(PoisonError::into_inner);
        if ill.get(account).is_some_and(|known| known.told > told) {
            return;
        }
        match wait {
            Some(wait) => {
                let until = Instant::now() + wait;
                ill.insert(account.clone(), Ill { until, told });
            }
            None => {
                ill.remove(account);
            }
        }
        self.any.store(!ill.is_empty(), Ordering::Release);
    }

    /// Takes over everything that a statement sent at `told` said; what was learned later stays.
    fn replace(&self, rows: Vec<(AccountKey, Duration)>, told: Instant) {
        let now = Instant::now();
        let mut ill = self.ill.write().unwrap_or_else(PoisonError::into_inner);
        ill.retain(|_, known| known.told > told);
        for (account, wait) in rows {
            let until = now + wait;
            ill.entry(account).or_insert(Ill { until, told });
        }
        self.any.store(!ill.is_empty(), Ordering::Release);
    }
}

/// The state of an account's breaker, for listings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// `open` or `half_open`.
    pub state: &'static str,
    /// Since when it is not closed.
    pub since: Option<Timestamp>,
    /// When a probe may go, or must have come back.
    pub until: Option<Timestamp>,
    /// Faults in a row.
    pub faults: i32,
    /// The latest of them: a fixed word.
    pub reason: Option<String>,
    /// The same in a sentence.
    pub detail: Option<String>,
}

impl Health {
    /// As listings show it.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "state": self.state,
            "since": self.since.map(|at| at.to_string()),
            "until": self.until.map(|at| at.to_string()),
            "faults": self.faults,
            "reason": self.reason,
            "detail": self.detail,
        })
    }
}

/// An event of an account, owed to the reports exchange.
#[derive(Debug, Clone)]
pub struct AccountEvent {
    /// Its id.
    pub id: String,
    /// Whose account.
    pub tenant: String,
    /// `account.unhealthy` or `account.recovered`.
    pub kind: String,
    /// The JSON.
    pub body: String,
}

impl Ledger {
    /// This process's view of accounts in trouble.
    #[must_use]
    pub fn health(&self) -> &Known {
        &self.health
    }

    /// Reads the accounts in trouble. Cheap: where all is well there is nothing to read.
    ///
    /// # Errors
    /// If the database cannot be asked; the view stays as it was.
    pub async fn refresh_health(&self) -> Result<(), DbError> {
        let sql = self.db.sql(
            "SELECT account, greatest({s}.micros({s}.ill_until(h)) - {s}.micros(clock_timestamp()), 0) FROM {s}.account_health h
             WHERE state > 0 LIMIT $1",
        );
        let told = Instant::now();
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&sql).await?;
        let rows = client.query(&statement, &[&MOST]).await?;
        let rows = rows
            .iter()
            .map(|row| Ok((AccountKey::from_stored(row.try_get(0)?), wait(row.try_get(1)?))))
            .collect::<Result<Vec<_>, tokio_postgres::Error>>()?;
        self.metrics.unhealthy_accounts.set(rows.len() as i64);
        self.health.replace(rows, told);
        Ok(())
    }

    /// Notes a transition that came with an answer.
    pub(super) fn note_change(&self, row: &Row, told: Instant) -> Result<(), DbError> {
        let account = AccountKey::from_stored(row.try_get("account")?);
        let Some(change) = Change::from_number(row.try_get("change")?) else {
            return Ok(());
        };
        let ill = (change != Change::Recovered).then(|| row.try_get("until_us").map(wait));
        self.health.note(&account, ill.transpose()?, told);
        self.metrics
            .breaker_changes
            .with_label_values(&[change.as_str()])
            .inc();
        match change {
            Change::Opened => {
                tracing::warn!(%account, "account is unhealthy: its mail waits until a probe succeeds");
            }
            Change::Recovered => tracing::info!(%account, "account has recovered"),
            Change::OpenedAgain | Change::Unproved => tracing::debug!(%account, ?change, "probe"),
        }
        if matches!(change, Change::Opened | Change::Recovered) {
            self.health.events.notify_one();
        }
        Ok(())
    }

    /// The breaker of an account; see [`read`].
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn account_health(&self, account: &AccountKey) -> Result<Option<Health>, DbError> {
        read(&self.db, account).await
    }

    /// Takes up to `most` events that are owed; nobody else takes them for the time `hold`.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn owed_account_events(&self, most: i32, hold: Duration) -> Result<Vec<AccountEvent>, DbError> {
        let sql = self.db.sql(
            "SELECT event_id, tenant, type, body FROM {s}.owed_account_events_v1($1, $2::bigint * interval '1 microsecond')",
        );
        let client = self.db.client().await?;
        let statement = client.prepare_cached(&sql).await?;
        let rows = client.query(&statement, &[&most, &micros(hold)]).await?;
        let event = |row: &Row| {
            Ok(AccountEvent {
                id: row.try_get(0)?,
                tenant: row.try_get(1)?,
                kind: row.try_get(2)?,
                body: row.try_get(3)?,
            })
        };
        rows.iter().map(event).collect()
    }

    /// Strikes off an event that was published.
    ///
    /// # Errors
    /// If the database cannot be asked; it is then published again, under the same id.
    pub async fn clear_account_event(&self, id: &str) -> Result<(), DbError> {
        let sql = self.db.sql("DELETE FROM {s}.account_event WHERE event_id = $1");
        self.db.client().await?.execute(&sql, &[&id]).await?;
        Ok(())
    }

    /// Forgets accounts whose trouble is over for longer than any attempt takes, and those that are gone: an attempt that
    /// ended after its account was removed has noted how it ended.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn forget_health(&self) -> Result<u64, DbError> {
        let sql = self.db.sql(
            "DELETE FROM {s}.account_health WHERE account IN (SELECT h.account FROM {s}.account_health h
                 WHERE h.state = 0 AND h.noted_at < clock_timestamp() - interval '30 minutes'
                     OR NOT EXISTS (SELECT FROM {s}.account a
                                    WHERE a.tenant = split_part(h.account, '/', 1) AND a.id = split_part(h.account, '/', 2))
                 FOR UPDATE OF h SKIP LOCKED)",
        );
        Ok(self.db.client().await?.execute(&sql, &[]).await?)
    }
}

/// The breaker of an account; `None`: closed.
///
/// # Errors
/// If the database cannot be asked.
pub async fn read(db: &Database, account: &AccountKey) -> Result<Option<Health>, DbError> {
    let sql = db.sql(&format!("{SELECT} AND account = $1"));
    let client = db.client().await?;
    let row = client.query_opt(&sql, &[&account.as_str()]).await?;
    Ok(row.as_ref().map(health).transpose()?)
}

/// The state of all breakers that are not closed, by account.
///
/// # Errors
/// If the database cannot be asked.
pub async fn read_all(db: &Database) -> Result<HashMap<AccountKey, Health>, DbError> {
    let rows = db.client().await?.query(&db.sql(SELECT), &[]).await?;
    let health = |row| {
        Ok((
            AccountKey::from_stored(Row::try_get(row, "account")?),
            health(row)?,
        ))
    };
    rows.iter().map(health).collect()
}

const SELECT: &str =
    "SELECT account, state, opened_at, until, faults, reason, detail FROM {s}.account_health WHERE state > 0";

fn health(row: &Row) -> Result<Health, tokio_postgres::Error> {
    let state: i16 = row.try_get("state")?;
    Ok(Health {
        state: if state == 1 { "open" } else { "half_open" },
        since: row.try_get("opened_at")?,
        until: row.try_get("until")?,
        faults: row.try_get("faults")?,
        reason: row.try_get("reason")?,
        detail: row.try_get("detail")?,
    })
}

/// A wait told by the database.
pub(super) fn wait(us: Option<i64>) -> Duration {
    Duration::from_micros(us.unwrap_or(0).max(0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::{Class, Fault, Reply, Stage};

    fn key(text: &str) -> AccountKey {
        AccountKey::from_stored(text)
    }

    #[test]
    fn what_was_told_later_is_not_overruled_by_what_was_told_before() {
        let known = Known::default();
        let (early, late) = (Instant::now(), Instant::now() + Duration::from_millis(1));
        let minute = Some(Duration::from_mins(1));
        assert_eq!(known.wait(&key("a/b")), None);
        known.note(&key("a/b"), minute, late);
        known.note(&key("a/b"), None, early);
        known.replace(Vec::new(), early);
        assert!(known.wait(&key("a/b")) > Some(Duration::from_secs(50)));
        assert_eq!(known.wait(&key("a/c")), None);
        known.replace(
            vec![(key("a/c"), Duration::ZERO)],
            late + Duration::from_millis(1),
        );
        assert_eq!(known.wait(&key("a/b")), None);
        assert_eq!(known.wait(&key("a/c")), Some(Duration::ZERO), "its probe is due");
    }

    #[test]
    fn a_fault_is_shown_without_addresses_and_bounded() {
        let failure = Failure::transient(Class::Auth, Fault::Sender, Stage::Auth, "auth_refused", "no");
        let reply = Reply::new(
            535,
            &format!("user ann@acme.example is unknown {}", "ü".repeat(900)),
        );
        let fault = AccountFault::of(&failure.with_reply(reply));
        assert!(fault.detail.contains("***@acme.example"), "{}", fault.detail);
        assert!(fault.detail.len() <= MAX_DETAIL && !fault.detail.contains("ann"));
        assert_eq!((fault.class, fault.reason), ("auth", "auth_refused"));
    }
}
