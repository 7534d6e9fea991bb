//! Disables endpoints that are gone or have been failing for days, and says so in a report of the bridge's own.

use std::collections::BTreeSet;

use jiff::Timestamp;
use tokio_postgres::types::Type;

use super::queue::Settled;
use super::source::{OwnReport, ReportSink};
use super::{Bridge, BridgeError};
use crate::report;

/// Own reports published at a time.
const BATCH: i64 = 100;
/// The type of the report.
const DISABLED: &str = "endpoint.disabled";

impl Bridge {
    /// Disables what the outcomes ask for. If it fails now, the next attempt's outcome asks again.
    pub(super) async fn disable(&self, outcomes: &[Settled], failing: &[i64]) {
        let of = |asks: &dyn Fn(&Settled) -> bool| -> BTreeSet<(i64, i64)> {
            let asking = outcomes.iter().filter(|outcome| asks(outcome));
            asking
                .map(|outcome| (outcome.endpoint, outcome.version))
                .collect()
        };
        let gone = of(&|outcome| outcome.gone)
            .into_iter()
            .map(|called| (called, "gone"));
        let failing = of(&|outcome| failing.contains(&outcome.endpoint));
        for (called, reason) in gone.chain(failing.into_iter().map(|called| (called, "failing"))) {
            match self.disable_one(called, reason).await {
                Ok(true) => self.owed.notify_one(),
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, reason, "cannot disable an endpoint, will try again"),
            }
        }
    }

    /// Whether it was enabled until now, and as it was called.
    async fn disable_one(&self, called: (i64, i64), reason: &'static str) -> Result<bool, BridgeError> {
        let Some((tenant, name)) = self.within(self.disable_and_owe(called, reason)).await? else {
            return Ok(false);
        };
        self.metrics.webhook_disabled.with_label_values(&[reason]).inc();
        tracing::error!(
            tenant,
            endpoint = name,
            reason,
            "endpoint disabled; when its receiver works again: postroom endpoint set {tenant} {name} --enable"
        );
        Ok(true)
    }

    /// Disables an endpoint of this version and owes the report about it, in one transaction. Its tenant and name, if it was
    /// enabled. What was changed since may have another URL, which has said nothing yet.
    async fn disable_and_owe(
        &self,
        (endpoint, version): (i64, i64),
        reason: &'static str,
    ) -> Result<Option<(String, String)>, BridgeError> {
        let mut client = self.database.client().await?;
        let transaction = client.transaction().await?;
        let sql = self.database.sql(
            "UPDATE {s}.endpoint SET enabled = false, disabled_reason = $2, disabled_at = clock_timestamp(), \
             version = version + 1, updated_at = clock_timestamp() \
             WHERE id = $1 AND enabled AND version = $3 RETURNING tenant, name, version, disabled_at",
        );
        let Some(row) = transaction
            .query_typed_opt(
                &sql,
                &[
                    (&endpoint, Type::INT8),
                    (&reason, Type::TEXT),
                    (&version, Type::INT8),
                ],
            )
            .await?
        else {
            return Ok(None);
        };
        let (tenant, name): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let (version, at): (i64, Timestamp) = (row.try_get(2)?, row.try_get(3)?);
        // The number of the endpoint makes the id unique if one of the same name is made anew.
        let event_id = report::event_id(&tenant, "endpoint", &name, &format!("{endpoint}.{version}"));
        let body = serde_json::json!({
            "type": DISABLED,
            "timestamp": at,
            "data": {"tenant": tenant, "endpoint": name, "reason": reason},
        })
        .to_string();
        let sql = self
            .database
            .sql("INSERT INTO {s}.event_outbox (event_id, tenant, type, body) VALUES ($1, $2, $3, $4)");
        transaction
            .execute_typed(
                &sql,
                &[
                    (&event_id, Type::TEXT),
                    (&tenant, Type::TEXT),
                    (&DISABLED, Type::TEXT),
                    (&body.as_bytes(), Type::BYTEA),
                ],
            )
            .await?;
        transaction.commit().await?;
        Ok(Some((tenant, name)))
    }

    /// Publishes the reports that are owed; each goes from the outbox when its publish is confirmed.
    pub(super) async fn publish_owed<K: ReportSink>(&self, sink: &K) -> Result<(), BridgeError> {
        let sql = self
            .database
            .sql("SELECT event_id, tenant, type, body FROM {s}.event_outbox ORDER BY created_at LIMIT $1");
        let rows = self
            .within(async {
                let client = self.database.client().await?;
                Ok(client.query_typed(&sql, &[(&BATCH, Type::INT8)]).await?)
            })
            .await?;
        for row in rows {
            let event_id: String = row.try_get(0)?;
            let report = OwnReport {
                event_id: event_id.clone(),
                routing_key: report::routing_key(row.try_get(1)?, row.try_get(2)?),
                body: row.try_get(3)?,
            };
            if let Err(error) = sink.publish(report).await {
                tracing::warn!(error, "cannot publish a report of the bridge, will try again");
                return Ok(());
            }
            let sql = self
                .database
                .sql("DELETE FROM {s}.event_outbox WHERE event_id = $1");
            self.within(async {
                let client = self.database.client().await?;
                Ok(client.execute_typed(&sql, &[(&event_id, Type::TEXT)]).await?)
            })
            .await?;
        }
        Ok(())
    }
}
