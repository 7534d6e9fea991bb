//! What the bridge does beside: forgets old events, measures its backlog, publishes the reports it owes.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_postgres::types::{ToSql, Type};
use tokio_util::sync::CancellationToken;

use super::source::ReportSink;
use super::{Bridge, BridgeError};

/// How often the backlog is measured and owed reports are looked for.
const OFTEN: Duration = Duration::from_secs(15);
/// Between two measurements, by how long the first took: a large backlog takes long to count, and that is not to become
/// more than a fiftieth of what the database does.
const REST: u32 = 50;
/// How often old events are looked for.
const SELDOM: Duration = Duration::from_mins(5);
/// Events per deletion: short transactions, which block nobody.
const CHUNK: i64 = 1000;
/// Between two of them, so that webhooks come first.
const PAUSE: Duration = Duration::from_millis(50);

impl Bridge {
    /// Works until shutdown. Trouble with the database is told and tried again at the next round.
    pub(super) async fn upkeep<K: ReportSink>(&self, sink: &K, shutdown: &CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.watch(sink) => {}
            // By itself: after a shorter retention it takes hours.
            () = self.keep_forgetting() => {}
        }
    }

    async fn watch<K: ReportSink>(&self, sink: &K) {
        let mut often = interval(OFTEN);
        often.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut resting = Resting(Instant::now());
        loop {
            let (round, done) = tokio::select! {
                () = self.owed.notified() => ("publish", self.publish_owed(sink).await),
                _ = often.tick() => ("measure", async {
                    self.publish_owed(sink).await?;
                    resting.around(self.measure()).await
                }.await),
            };
            told(round, done);
        }
    }

    async fn keep_forgetting(&self) {
        let mut seldom = interval(SELDOM);
        seldom.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            seldom.tick().await;
            told("forget", self.forget().await.map(|_| ()));
        }
    }

    /// Deletes events older than the retention with their deliveries. One that an enabled endpoint still waits for
    /// stays. Answers how many went.
    ///
    /// # Errors
    /// If the database cannot do it now; what went before stays gone.
    pub async fn forget(&self) -> Result<u64, BridgeError> {
        // The time of the statement, not that of the clock, which no index is used for.
        let sql = self.database.sql(
            "WITH gone AS ( \
               DELETE FROM {s}.webhook_event WHERE id = ANY (ARRAY( \
                 SELECT v.id FROM {s}.webhook_event v \
                  WHERE v.received_at < statement_timestamp() - make_interval(secs => $1) \
                    AND v.received_at >= coalesce($3, '-infinity') \
                    AND (SELECT true FROM {s}.webhook_delivery d JOIN {s}.endpoint e ON e.id = d.endpoint \
                          WHERE d.event = v.id AND d.state = 'pending' AND e.enabled LIMIT 1) IS NULL \
                  ORDER BY v.received_at LIMIT $2 FOR UPDATE SKIP LOCKED)) \
               RETURNING received_at) \
             SELECT count(*), max(received_at) FROM gone",
        );
        let retention = self.config.retention.as_secs_f64();
        self.forget_previous_secrets().await?;
        let mut forgotten = 0;
        // The next search begins where this one ended, and not among those just gone and those that stay.
        let mut since: Option<Timestamp> = None;
        loop {
            let row = self
                .within(async {
                    let client = self.database.client().await?;
                    let arguments: [(&(dyn ToSql + Sync), Type); 3] = [
                        (&retention, Type::FLOAT8),
                        (&CHUNK, Type::INT8),
                        (&since, Type::TIMESTAMPTZ),
                    ];
                    Ok(client.query_typed_one(&sql, &arguments).await?)
                })
                .await?;
            let gone: i64 = row.try_get(0)?;
            forgotten += gone.unsigned_abs();
            if gone < CHUNK {
                break;
            }
            since = row.try_get(1)?;
            tokio::time::sleep(PAUSE).await;
        }
        if forgotten > 0 {
            tracing::info!(events = forgotten, "forgot old webhook events");
        }
        Ok(forgotten)
    }

    /// What no longer signs need not be kept.
    async fn forget_previous_secrets(&self) -> Result<(), BridgeError> {
        let sql = self.database.sql(
            "UPDATE {s}.endpoint SET previous_secret = NULL, previous_secret_until = NULL \
             WHERE previous_secret_until < clock_timestamp()",
        );
        self.within(async {
            let client = self.database.client().await?;
            client.execute_typed(&sql, &[]).await?;
            Ok(())
        })
        .await
    }

    /// Sets the gauges of the backlog. Disabled endpoints do not count: nobody waits for them.
    pub(super) async fn measure(&self) -> Result<(), BridgeError> {
        let sql = self.database.sql(
            "SELECT p.pending, coalesce(extract(epoch FROM clock_timestamp() - v.received_at), 0)::bigint FROM ( \
               SELECT count(*) AS pending, min(d.event) AS oldest \
                 FROM {s}.webhook_delivery d JOIN {s}.endpoint e ON e.id = d.endpoint AND e.enabled \
                WHERE d.state = 'pending') p \
             LEFT JOIN {s}.webhook_event v ON v.id = p.oldest",
        );
        let row = self
            .within(async {
                let client = self.database.client().await?;
                Ok(client.query_typed_one(&sql, &[]).await?)
            })
            .await?;
        self.metrics.webhook_pending.set(row.try_get(0)?);
        self.metrics.webhook_oldest.set(row.try_get(1)?);
        Ok(())
    }
}

/// Until when the backlog is not measured.
struct Resting(Instant);

impl Resting {
    /// Does the work unless it is too early. Also what fails is followed by a rest: a count that took too long would else be
    /// begun again at once, by every bridge.
    async fn around(
        &mut self,
        work: impl Future<Output = Result<(), BridgeError>>,
    ) -> Result<(), BridgeError> {
        let begun = Instant::now();
        if begun < self.0 {
            return Ok(());
        }
        let done = work.await;
        self.0 = begun + begun.elapsed() * REST;
        done
    }
}

fn told(round: &str, done: Result<(), BridgeError>) {
    if let Err(error) = done {
        tracing::warn!(%error, round, "upkeep of the bridge failed, will try again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::DbError;

    #[tokio::test(start_paused = true)]
    async fn a_measurement_that_took_long_is_followed_by_a_rest_even_if_it_failed() {
        let mut resting = Resting(Instant::now());
        let slow = Duration::from_secs(30);
        let failing = async {
            tokio::time::sleep(slow).await;
            Err(BridgeError::Database(DbError::Timeout))
        };
        assert!(resting.around(failing).await.is_err());
        let too_early = async { Err(BridgeError::Database(DbError::Timeout)) };
        assert!(
            resting.around(too_early).await.is_ok(),
            "it was tried again at once"
        );
        tokio::time::advance(slow * REST).await;
        let tried = async { Err(BridgeError::Database(DbError::Timeout)) };
        assert!(resting.around(tried).await.is_err());
    }
}
