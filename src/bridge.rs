//! The bridge: reports → Postgres → webhooks.
//!
//! [`intake`] records each report once by its event id and acks it; from then on Postgres owns it. `dispatch` leases
//! what is due, endpoints in turn, and `client` POSTs it, signed. A dead endpoint holds up only its own reports. A
//! crash between a POST and its settlement repeats the POST under the same event id; nothing else does.

mod body;
mod client;
mod disable;
mod dispatch;
pub mod intake;
mod queue;
mod run;
pub mod schedule;
pub mod signature;
pub mod source;
#[cfg(test)]
mod tests;
mod traced;
mod upkeep;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::config;
use crate::db::{Database, DbError};
use crate::egress::EgressGuard;
use crate::secret::SharedKeyring;
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::Traces;
use client::Client;
pub use run::{RunError, Settings, run};
pub use source::{Delivery, OwnReport, ReportSink, ReportSource};

/// Time limit of one statement with the wait for a connection.
const SQL_LIMIT: Duration = Duration::from_secs(30);
/// How long the last outcomes may take to be written after the hard end.
const LAST_OUTCOMES: Duration = Duration::from_secs(1);

/// Why the bridge cannot work now.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// The database cannot be used now.
    #[error(transparent)]
    Database(#[from] DbError),
    /// The HTTP client cannot be built; the machine has no certificate authorities, most likely.
    #[error("cannot set up the webhook client (are the system's CA certificates installed?): {0}")]
    Client(#[source] reqwest::Error),
}

impl From<tokio_postgres::Error> for BridgeError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error.into())
    }
}

/// A bridge; any number of them share the work through the database.
#[derive(Debug)]
pub struct Bridge {
    database: Database,
    keyring: SharedKeyring,
    client: Client,
    config: config::Webhook,
    metrics: Arc<Metrics>,
    traces: Option<Arc<Traces>>,
    /// Something was recorded that may be due.
    due: Notify,
    /// A report of our own is owed.
    owed: Notify,
}

impl Bridge {
    /// Puts a bridge together; opens nothing.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn new(
        database: Database,
        keyring: impl Into<SharedKeyring>,
        guard: Arc<EgressGuard>,
        config: config::Webhook,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BridgeError> {
        let client = Client::new(guard, config.timeout).map_err(BridgeError::Client)?;
        Ok(Self {
            database,
            keyring: keyring.into(),
            client,
            config,
            metrics,
            traces: None,
            due: Notify::new(),
            owed: Notify::new(),
        })
    }

    /// Makes spans of its POSTs too.
    #[must_use]
    pub fn with_traces(mut self, traces: Option<Arc<Traces>>) -> Self {
        self.traces = traces;
        self
    }

    /// Works until the soft end: then takes nothing more in, finishes POSTs in flight within their time limit, and
    /// returns. At the hard end it records what has been answered, and returns.
    pub async fn run<S: ReportSource, K: ReportSink>(self, source: S, sink: K, shutdown: Shutdown) {
        let (soft, hard) = (&shutdown.soft, &shutdown.hard);
        let work = async {
            tokio::join!(
                Box::pin(self.take_in(source, soft)),
                Box::pin(self.dispatch(soft, hard)),
                Box::pin(self.upkeep(&sink, soft)),
            );
        };
        let late = async {
            hard.cancelled().await;
            tokio::time::sleep(LAST_OUTCOMES).await;
        };
        tokio::select! {
            () = work => {}
            () = late => tracing::warn!("the database did not answer in time at shutdown; reports and webhooks will be repeated"),
        }
    }

    /// Bounds work on the database, and counts what fails: its caller tells of it, and tries again.
    async fn within<T>(&self, work: impl Future<Output = Result<T, BridgeError>>) -> Result<T, BridgeError> {
        let done = tokio::time::timeout(SQL_LIMIT, work)
            .await
            .unwrap_or(Err(BridgeError::Database(DbError::Timeout)));
        if let Err(BridgeError::Database(error)) = &done {
            self.metrics.sql_errors.with_label_values(&[error.class()]).inc();
            self.database.learn_from(error);
        }
        done
    }
}
