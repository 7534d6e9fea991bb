//! The database as a component of readiness: waited for at start, looked at while running.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Database, DbError};
use crate::health::Handle;
use crate::telemetry::metrics::Metrics;

/// Between two looks at a database that works.
const INTERVAL: Duration = Duration::from_secs(5);
/// After the first failure; doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Pauses do not become longer than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

impl Database {
    /// Waits at start until the database can be worked with. `Ok(false)` if the process was told to end first.
    ///
    /// # Errors
    /// What waiting does not help against: an old schema or server, or `synchronous_commit` off.
    pub async fn wait_until_usable(
        &self,
        handle: &Handle,
        soft: &CancellationToken,
    ) -> Result<bool, DbError> {
        let mut pause = FIRST_PAUSE;
        loop {
            let checked = tokio::select! {
                checked = self.check() => checked,
                () = soft.cancelled() => return Ok(false),
            };
            match checked {
                Ok(()) => {
                    handle.ready();
                    return Ok(true);
                }
                Err(error) if !error.is_retryable() => return Err(error),
                Err(error) => handle.not_ready(error.to_string()),
            }
            if soft
                .run_until_cancelled(tokio::time::sleep(pause))
                .await
                .is_none()
            {
                return Ok(false);
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Keeps the handle and the metrics of the pool true until the token is cancelled; to be called once the database
    /// is usable. Never gives up: whatever is wrong may be put right.
    pub async fn watch(self, handle: Handle, metrics: Arc<Metrics>, soft: CancellationToken) {
        let connected = metrics.connected.with_label_values(&["database"]);
        connected.set(1);
        let mut pause = INTERVAL;
        while soft
            .run_until_cancelled(tokio::time::sleep(pause))
            .await
            .is_some()
        {
            let Some(checked) = soft.run_until_cancelled(self.check()).await else {
                return;
            };
            self.show(&metrics);
            match checked {
                Ok(()) => {
                    handle.ready();
                    connected.set(1);
                    pause = INTERVAL;
                }
                // All connections at work is load, not failure: whoever waits for one says so if it lasts.
                Err(DbError::PoolTimeout(_)) if self.status().available == 0 && self.status().size > 0 => {}
                Err(error) => {
                    handle.not_ready(error.to_string());
                    connected.set(0);
                    pause = FIRST_PAUSE.max(pause / 2);
                }
            }
        }
    }

    /// The pool as it is now; the connection of the last look is back in it.
    fn show(&self, metrics: &Metrics) {
        let pool = self.status();
        let busy = pool.size.saturating_sub(pool.available);
        for (state, count) in [("idle", pool.available), ("busy", busy)] {
            metrics
                .database_connections
                .with_label_values(&[state])
                .set(count as i64);
        }
        metrics.database_waiting.set(pool.waiting as i64);
    }
}
