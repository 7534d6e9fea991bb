//! A schema of its own, and short ways to say what tests say often.

use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt as _;
use jiff::Timestamp;
use tokio_postgres::types::FromSqlOwned;

use crate::config;
use crate::db::{self, Checkout, Database};
use crate::id::{AccountKey, JobId, TenantId};
use crate::ledger::admit::{Absorb, AdmitRequest, Admitted, Want};
use crate::ledger::health::{AccountFault, Evidence};
use crate::ledger::outbox::ReportNumber;
use crate::ledger::release::{ReleaseRequest, Released};
use crate::ledger::settle::{Body, Next, Settled, Settlement};
use crate::ledger::{Epoch, Ledger, Row, WaitReason};
use crate::level::Level;
use crate::report::{RecipientResult, RecipientStatus, Report, ReportData, ReportType, event_id};
use crate::telemetry::metrics::Metrics;

/// Longest a test waits for something that must come.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// The parameters of `release_v1` and `release_expired_v1`.
pub(super) const RELEASE: [&str; 8] = [
    "bigint", "smallint", "integer", "bigint", "bigint", "text[]", "text", "bigint",
];
pub(super) const RELEASE_EXPIRED: [&str; 5] = ["bigint", "integer", "bigint", "bigint", "bigint"];
/// A lease long enough that no test outlives it by accident.
pub(super) const LEASE: Duration = Duration::from_secs(45);

#[derive(Clone)]
pub(super) struct World {
    pub(super) ledger: Ledger,
    pub(super) db: Database,
}

/// Runs a test in a fresh schema and drops the schema, however the test ends.
pub(super) async fn in_world<F, Fut>(test: F)
where
    F: FnOnce(World) -> Fut,
    Fut: Future<Output = ()>,
{
    in_world_of(12, test).await;
}

/// The same, with at most so many connections.
pub(super) async fn in_world_of<F, Fut>(pool_size: usize, test: F)
where
    F: FnOnce(World) -> Fut,
    Fut: Future<Output = ()>,
{
    let url = std::env::var("POSTROOM_TEST_DATABASE_URL")
        .expect("POSTROOM_TEST_DATABASE_URL must name a Postgres server for tests: run `make test`");
    let config = config::Database {
        url: url.into(),
        schema: format!("t_ledger_{}", uuid::Uuid::new_v4().simple()),
        ca_file: None,
        pool_size,
    };
    db::migrate(&config).await.unwrap();
    let db = Database::connect(&config).unwrap();
    let ledger = Ledger::new(db.clone(), Arc::new(Metrics::new().unwrap()));
    let world = World { ledger, db };
    let result = AssertUnwindSafe(test(world.clone())).catch_unwind().await;
    world.run("DROP SCHEMA {s} CASCADE").await;
    if let Err(panic) = result {
        resume_unwind(panic);
    }
}

impl World {
    /// Runs statements.
    pub(super) async fn run(&self, sql: &str) {
        let sql = self.db.sql(sql);
        self.db.client().await.unwrap().batch_execute(&sql).await.unwrap();
    }

    /// The first answer of a function that leases is one that nobody can read: what it did is committed. `parameters`: their
    /// types. To be called before its first call.
    pub(super) async fn loses_the_first_answer(&self, function: &str, parameters: &[&str]) {
        let nothing: Vec<_> = parameters.iter().map(|kind| format!("NULL::{kind}")).collect();
        let given: Vec<_> = (1..=parameters.len())
            .map(|number| format!("${number}"))
            .collect();
        let (types, nothing, given) = (parameters.join(", "), nothing.join(", "), given.join(", "));
        self.run(&format!(
            "ALTER FUNCTION {{s}}.{function} RENAME TO unheard;
             CREATE VIEW {{s}}.answer AS SELECT * FROM {{s}}.unheard({nothing});
             CREATE SEQUENCE {{s}}.answers;
             CREATE FUNCTION {{s}}.{function}({types}) RETURNS SETOF {{s}}.answer LANGUAGE plpgsql AS $$
             DECLARE
                 r record; is_first boolean := nextval('{{s}}.answers') = 1;
             BEGIN
                 FOR r IN SELECT * FROM {{s}}.unheard({given}) LOOP
                     IF is_first THEN r.claim := NULL; END IF;
                     RETURN NEXT r;
                 END LOOP;
             END $$"
        ))
        .await;
    }

    /// A connection in the middle of a transaction that has run this.
    pub(super) async fn holding(&self, sql: &str) -> Checkout {
        let client = self.db.client().await.unwrap();
        client.batch_execute("BEGIN").await.unwrap();
        client.batch_execute(&self.db.sql(sql)).await.unwrap();
        client
    }

    /// The first column of the only row.
    pub(super) async fn one<T: FromSqlOwned>(&self, sql: &str) -> T {
        let sql = self.db.sql(sql);
        let client = self.db.client().await.unwrap();
        client.query_one(&sql, &[]).await.unwrap().get(0)
    }

    /// Limits of a key: (limit, window in µs, unit).
    pub(super) async fn limit(&self, key: &str, limits: &[(i32, i64, &str)]) {
        let limits: Vec<_> = limits
            .iter()
            .map(|(limit, per, unit)| serde_json::json!({"limit": limit, "per": per, "unit": unit}))
            .collect();
        let sql = self.db.sql("SELECT {s}.set_limits_v1($1, $2)");
        let client = self.db.client().await.unwrap();
        client
            .execute(&sql, &[&key, &serde_json::Value::from(limits)])
            .await
            .unwrap();
    }

    pub(super) async fn epoch(&self) -> Arc<Epoch> {
        self.ledger.register("test", LEASE, Duration::ZERO).await.unwrap()
    }

    /// An epoch that may take over: its heartbeats have come for long enough.
    pub(super) async fn steady_epoch(&self) -> Arc<Epoch> {
        let epoch = self.epoch().await;
        self.run(&format!(
            "UPDATE {{s}}.worker SET steady_since = clock_timestamp() - interval '1 hour' WHERE epoch = {}",
            epoch.number()
        ))
        .await;
        epoch
    }

    /// Makes a worker's heartbeats old enough to be taken over from.
    pub(super) async fn silence(&self, epoch: &Epoch) {
        self.run(&format!(
            "UPDATE {{s}}.worker SET heartbeat_at = clock_timestamp() - interval '1 hour' WHERE epoch = {}",
            epoch.number()
        ))
        .await;
    }

    pub(super) async fn admit_one(&self, request: AdmitRequest) -> Admitted {
        self.ledger.admit(&[request]).await.unwrap().remove(0)
    }

    /// Admits a job that must go.
    pub(super) async fn go(&self, request: AdmitRequest) -> Row {
        match self.admit_one(request).await {
            Admitted::Go(row) | Admitted::Behind(row) => *row,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn settle_one(&self, settlement: Settlement) -> Settled {
        self.settle(&[settlement]).await.remove(0)
    }

    pub(super) async fn settle(&self, batch: &[Settlement]) -> Vec<Settled> {
        let answers = self.ledger.settle(batch).await.unwrap();
        answers.into_iter().map(|answer| answer.settled).collect()
    }

    /// The reports that a job of acme owes, by their numbers among its reports.
    pub(super) async fn owed(&self, id: &str) -> Vec<(ReportNumber, i64, String)> {
        let sql = self
            .db
            .sql("SELECT n, seq, body FROM {s}.outbox WHERE tenant = 'acme' AND id = $1 ORDER BY seq");
        let client = self.db.client().await.unwrap();
        let rows = client.query(&sql, &[&id]).await.unwrap();
        let owed = |row: &tokio_postgres::Row| (ReportNumber(row.get(0)), row.get(1), row.get(2));
        rows.iter().map(owed).collect()
    }

    /// A job in the waiting room.
    pub(super) async fn parked(&self, epoch: &Arc<Epoch>, tenant: &str, id: &str, reason: WaitReason) -> Row {
        let row = self.go(request(epoch, tenant, id)).await;
        let settled = self.settle_one(park(&row, reason, Duration::ZERO)).await;
        assert_eq!(settled, Settled::Written);
        row
    }

    pub(super) async fn release(&self, epoch: &Arc<Epoch>, level: Level, most: usize) -> Vec<Released> {
        self.ledger.release(epoch, &all(level, most)).await.unwrap()
    }

    pub(super) async fn state(&self, tenant: &str, id: &str) -> i16 {
        self.one(&format!(
            "SELECT state FROM {{s}}.job WHERE tenant = '{tenant}' AND id = '{id}'"
        ))
        .await
    }

    /// One column of a job, as text.
    pub(super) async fn column(&self, tenant: &str, id: &str, column: &str) -> Option<String> {
        self.one(&format!(
            "SELECT {column}::text FROM {{s}}.job WHERE tenant = '{tenant}' AND id = '{id}'"
        ))
        .await
    }

    /// `fifo` of a lane; `None` without a lane.
    pub(super) async fn fifo(&self, account: &str, level: Level, tenant: &str) -> Option<i64> {
        self.one(&format!(
            "SELECT max(fifo) FROM {{s}}.lane WHERE account = '{account}' AND level = {} AND tenant = '{tenant}'",
            level as i16
        ))
        .await
    }

    /// How much counts under the first limit of a key.
    pub(super) async fn used(&self, key: &str) -> i32 {
        self.one(&format!("SELECT used[1] FROM {{s}}.rate WHERE key = '{key}'"))
            .await
    }

    /// The waiting room agrees with itself: every waiting job has a lane that will look at it in time, and lanes count
    /// right.
    pub(super) async fn assert_lanes_are_right(&self) {
        let homeless: i64 = self
            .one(
                "SELECT count(*) FROM {s}.job x WHERE state = 2 AND NOT cancel AND NOT EXISTS (
                     SELECT FROM {s}.lane l WHERE l.account = x.account AND l.level = x.level AND l.tenant = x.tenant)",
            )
            .await;
        assert_eq!(homeless, 0, "waiting jobs without a lane");
        let late: i64 = self
            .one(
                "SELECT count(*) FROM {s}.job x JOIN {s}.lane l USING (account, level, tenant)
                 WHERE x.state = 2 AND NOT x.cancel AND l.next_at > greatest(x.due_at, clock_timestamp(),
                     (SELECT {s}.instant(max(r.next_at)) FROM {s}.rate r
                      WHERE r.key = ANY ({s}.charged_keys(x.tenant, x.account)))) + interval '100 ms'",
            )
            .await;
        assert_eq!(late, 0, "lanes that will be looked at too late");
        self.assert_lanes_count_right().await;
    }

    /// `fifo` is the number of waiting jobs that keep their order, in every lane.
    pub(super) async fn assert_lanes_count_right(&self) {
        let hidden: i64 = self
            .one(
                "SELECT count(*) FROM {s}.job x JOIN {s}.lane l USING (account, level, tenant)
                 WHERE x.state = 2 AND NOT x.cancel AND x.due_at < l.oldest_at",
            )
            .await;
        assert_eq!(hidden, 0, "waiting jobs older than their lane looks for");
        let wrong: Option<String> = self
            .one(
                "SELECT string_agg(format('%s %s: %s for %s', l.account, l.level, l.fifo, c.n), ', ')
                 FROM {s}.lane l LEFT JOIN LATERAL (SELECT count(*) AS n FROM {s}.job x WHERE x.account = l.account
                     AND x.level = l.level AND x.tenant = l.tenant AND x.state = 2 AND x.reason IN (1, 4, 7)) c ON true
                 WHERE l.fifo <> c.n",
            )
            .await;
        assert_eq!(wrong, None, "lanes that count wrong");
    }
}

pub(super) fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

pub(super) fn job(id: &str) -> JobId {
    id.parse().unwrap()
}

pub(super) fn account(key: &str) -> AccountKey {
    AccountKey::from_stored(key)
}

/// A job of the tenant's account `main` with one recipient, at level medium, that wants a slot.
pub(super) fn request(epoch: &Arc<Epoch>, owner: &str, id: &str) -> AdmitRequest {
    AdmitRequest {
        tenant: tenant(owner),
        id: job(id),
        level: Level::Medium,
        account: account(&format!("{owner}/main")),
        lease: epoch.claim(),
        recipients: 1,
        digest: [7; 32],
        send_at: None,
        expires_at: None,
        batch: None,
        want: Want::Slot,
        detour: false,
        replay: false,
    }
}

/// The row of a new job.
pub(super) fn row_of(request: &AdmitRequest, born: i64) -> Row {
    let (tenant, id) = (request.tenant.clone(), request.id.clone());
    Row {
        created: Timestamp::now(),
        ..Row::new(tenant, id, request.account.clone(), request.lease.clone(), born)
    }
}

/// Everything of a level.
pub(super) fn all(level: Level, most: usize) -> ReleaseRequest {
    ReleaseRequest {
        level,
        most,
        most_bytes: 1 << 30,
        exclude: Vec::new(),
        only: None,
        max_age: Duration::from_hours(72),
    }
}

pub(super) fn body() -> Body {
    Body {
        bytes: Bytes::from_static(b"{}"),
        properties: r#"{"recipients": 1}"#.to_owned(),
    }
}

pub(super) fn absorb(owner: &str, id: &str) -> Absorb {
    Absorb {
        tenant: tenant(owner),
        id: job(id),
        body: body().bytes,
        properties: body().properties,
    }
}

pub(super) fn settlement(row: &Row, next: Next) -> Settlement {
    Settlement {
        row: row.clone(),
        next,
        attempts: row.attempts,
        recipients: None,
        message_id: None,
        report: None,
        refund: false,
        error: None,
        uncertain: false,
        crashed: false,
        account: None,
        evidence: Vec::new(),
    }
}

pub(super) fn park(row: &Row, reason: WaitReason, delay: Duration) -> Settlement {
    let body = Some(body());
    settlement(row, Next::Park { reason, delay, body })
}

/// Final, with its report.
pub(super) fn done(row: &Row, kind: ReportType) -> Settlement {
    let mut done = settlement(row, Next::Done(kind));
    done.report = Some(report(row, kind).into());
    done
}

pub(super) fn report(row: &Row, kind: ReportType) -> Report {
    let sequence = row.sequence + 1;
    Report {
        id: event_id(row.tenant.as_str(), "job", row.id.as_str(), &sequence.to_string()),
        kind: kind.as_str(),
        timestamp: Timestamp::now(),
        data: ReportData {
            job: Some(row.id.clone()),
            tenant: row.tenant.clone(),
            account: None,
            sender: None,
            attempt: row.attempts,
            message_id: None,
            recipients: Vec::new(),
            partial: false,
            reason: None,
            detail: None,
            class: None,
            fault: None,
            stage: None,
            errors: Vec::new(),
            is_final: kind.is_final(),
            sequence,
            correlation_id: None,
            traceparent: None,
            next_attempt_at: None,
            uncertain_attempts: row.uncertain,
            timings: None,
            batch: None,
            tags: Vec::new(),
            metadata: None,
            links: Vec::new(),
        },
    }
}

/// The server of this account could not be reached.
pub(super) fn fault(key: &str) -> Evidence {
    let fault = AccountFault {
        class: "infrastructure",
        reason: "connect_failed",
        detail: "connect_failed: no".to_owned(),
    };
    Evidence {
        account: account(key),
        fault: Some(fault),
    }
}

pub(super) fn result(address: &str, status: RecipientStatus) -> RecipientResult {
    RecipientResult {
        status,
        ..RecipientResult::pending(address)
    }
}

/// Asks again until the answer is yes.
pub(super) async fn until(what: &str, mut question: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !question().await {
        assert!(begun.elapsed() < PATIENCE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
