//! The connection to Postgres: one bounded pool per process, every wait with a limit, TLS as the URL asks for it.
//!
//! Statements name the schema themselves (`{s}` in their text, see [`Database::sql`]) instead of relying on
//! `search_path`, so that they mean the same behind a `PgBouncer` in transaction mode.

mod connect;
mod error;
mod migrate;
mod pool;
mod tls;
mod watch;

#[cfg(test)]
pub(crate) mod reading;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{Pool, QueueMode, Timeouts};

use crate::config;

pub use error::DbError;
pub use migrate::{Migrated, grant, migrate, newest_version};
pub use pool::Checkout;

/// Oldest supported server: what [`Database::check`] wants `server_version_num` to be at least.
pub const MIN_SERVER_VERSION: i32 = 13_00_00;

/// How long a caller waits for a free connection.
const WAIT: Duration = Duration::from_secs(10);
/// How long opening a connection may take: TCP, TLS and authentication.
const CREATE: Duration = Duration::from_secs(10);
/// How long handing a used connection out again may take.
const RECYCLE: Duration = Duration::from_secs(5);
/// How long a caller may hold a connection before it is taken for dead: longer than the server lets a statement run.
const PATIENCE: Duration = Duration::from_secs(40);

/// A handle to the pool; cheap to clone.
#[derive(Clone)]
pub struct Database {
    pool: Pool<pool::Manager>,
    connector: connect::Connector,
    age: pool::Age,
    schema: Arc<str>,
    quoted: Arc<str>,
}

/// How the pool is doing, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolStatus {
    /// Open connections.
    pub size: usize,
    /// Open connections nobody uses.
    pub available: usize,
    /// Callers that wait for one.
    pub waiting: usize,
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database")
            .field("schema", &self.schema)
            .field("pool", &self.pool.status())
            .finish_non_exhaustive()
    }
}

impl Database {
    /// Builds the pool. Opens nothing: the first [`client`](Self::client) connects.
    ///
    /// # Errors
    /// If the URL or a certificate file cannot be used.
    pub fn connect(config: &config::Database) -> Result<Self, DbError> {
        Self::connect_with(config, WAIT, PATIENCE)
    }

    fn connect_with(config: &config::Database, wait: Duration, patience: Duration) -> Result<Self, DbError> {
        let (connector, age) = (connect::Connector::new(config)?, pool::Age::default());
        Ok(Self {
            pool: pool(&connector, &age, config.pool_size.max(1), wait, patience)?,
            connector,
            age,
            schema: config.schema.as_str().into(),
            quoted: quote(&config.schema).into(),
        })
    }

    /// The same database through one connection of its own: what must not stand behind the statements of all others.
    ///
    /// # Errors
    /// If no pool can be built.
    pub fn reserved(&self) -> Result<Self, DbError> {
        Ok(Self {
            pool: pool(&self.connector, &self.age, 1, WAIT, PATIENCE)?,
            ..self.clone()
        })
    }

    /// Opens new connections as this says: another password, another host. The schema and the size of the pool stay, and
    /// so do connections that are open.
    ///
    /// # Errors
    /// If the URL or a certificate file cannot be used; everything stays as it was then.
    pub fn reconnect(&self, config: &config::Database) -> Result<(), DbError> {
        self.connector.replace(config)
    }

    /// To be told of what failed: if the server takes no writes, no connection that is open now is used again, be it
    /// [reserved](Self::reserved). A name leads to the new primary for whoever asks for it anew.
    pub fn learn_from(&self, error: &DbError) {
        if error.is_read_only() {
            self.age.renew();
        }
    }

    /// A connection of the pool; returned to it when dropped.
    ///
    /// # Errors
    /// [`DbError::PoolTimeout`] if none became free in time, [`DbError::Connect`] if the server cannot be reached.
    pub async fn client(&self) -> Result<Checkout, DbError> {
        Ok(Checkout::new(self.pool.get().await?))
    }

    /// The statement with every `{s}` replaced by the quoted name of the schema.
    #[must_use]
    pub fn sql(&self, text: &str) -> String {
        text.replace("{s}", &self.quoted)
    }

    /// Name of the schema, unquoted.
    #[must_use]
    pub fn schema(&self) -> &str {
        &self.schema
    }

    /// How the pool is doing now.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        let status = self.pool.status();
        PoolStatus {
            size: status.size,
            available: status.available,
            waiting: status.waiting,
        }
    }

    /// Whether this server can be worked with: version, durability, whether it takes writes, and the schema's version.
    ///
    /// `synchronous_commit=off` is refused: it would acknowledge mail that a crash of the server forgets.
    ///
    /// # Errors
    /// [`DbError::ServerTooOld`], [`DbError::NotDurable`], [`DbError::ReadOnly`], [`DbError::SchemaVersion`], or any
    /// trouble on the way.
    pub async fn check(&self) -> Result<(), DbError> {
        let client = self.client().await?;
        let row = client
            .query_one(
                "SELECT current_setting('server_version_num')::int4, current_setting('synchronous_commit'),
                        current_setting('transaction_read_only')::boolean",
                &[],
            )
            .await?;
        let version: i32 = row.try_get(0)?;
        if version < MIN_SERVER_VERSION {
            return Err(DbError::ServerTooOld {
                found: version / 10_000,
            });
        }
        if row.try_get::<_, &str>(1)? == "off" {
            return Err(DbError::NotDurable);
        }
        if row.try_get(2)? {
            self.age.renew();
            return Err(DbError::ReadOnly);
        }
        drop(client);
        self.check_schema_version().await
    }

    /// Whether the schema is at least as new as this program. A newer one is fine: migrations first expand and
    /// contract only when no older program runs any more.
    ///
    /// # Errors
    /// [`DbError::SchemaVersion`] if `postroom migrate` has to run first, or any trouble on the way.
    pub async fn check_schema_version(&self) -> Result<(), DbError> {
        let client = self.client().await?;
        let found = migrate::version(&client, &self.quoted).await?;
        let expected = newest_version();
        if found.is_some_and(|found| found >= expected) {
            return Ok(());
        }
        Err(DbError::SchemaVersion {
            schema: self.schema.to_string(),
            expected,
            found: found.unwrap_or(0),
        })
    }

    /// Closes the pool: callers waiting get an error, connections close as they come back.
    pub fn close(&self) {
        self.pool.close();
    }
}

fn pool(
    connector: &connect::Connector,
    age: &pool::Age,
    size: usize,
    wait: Duration,
    patience: Duration,
) -> Result<Pool<pool::Manager>, DbError> {
    let manager = pool::Manager {
        connector: connector.clone(),
        patience,
        age: age.clone(),
    };
    Pool::builder(manager)
        .max_size(size)
        // A connection has its plans and caches: the fewer are in use, the warmer they are.
        .queue_mode(QueueMode::Lifo)
        .timeouts(Timeouts {
            wait: Some(wait),
            create: Some(CREATE),
            recycle: Some(RECYCLE),
        })
        .runtime(Runtime::Tokio1)
        .build()
        .map_err(|error| DbError::Setup(error.to_string()))
}

/// The future's output, or [`DbError::Timeout`].
async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Result<T, DbError> {
    tokio::time::timeout(limit, future)
        .await
        .map_err(|_| DbError::Timeout)
}

/// A quoted identifier.
fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
