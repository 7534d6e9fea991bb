//! What the bridge's calls read, see `ledger::tests::reading`.

use std::time::Duration;

use super::world::World;
use crate::bridge::queue::{Leased, Outcome, Settled};
use crate::db::reading::{analyze, never_analyzed, rows_read};

/// Rows of each kind that no call is about.
const MANY: u32 = 3000;
/// As many as autovacuum waits for before it looks at a table.
const FEW: u32 = 60;
/// Rows and index entries that a call may read, in all tables together.
const MOST: i64 = 300;

impl World {
    async fn one_endpoint(&self) {
        self.sql(
            "INSERT INTO {s}.endpoint (tenant, name, url) VALUES ('acme', 'hook', 'https://acme.example/hook')",
        )
        .await;
        self.sql("INSERT INTO {s}.endpoint_lane (endpoint) SELECT id FROM {s}.endpoint")
            .await;
    }

    /// Thousands of tenants with endpoints and of events: delivered, waiting for their time, and such as nobody wants.
    async fn crowd(&self, who: &str, number: u32) {
        let many = format!("FROM generate_series(1, {number}) i");
        for sql in [
            format!("INSERT INTO {{s}}.tenant (id) SELECT '{who}' || i {many}"),
            format!("INSERT INTO {{s}}.endpoint (tenant, name, url) SELECT '{who}' || i, 'hook', 'https://acme.example/hook' {many}"),
            format!(
                "INSERT INTO {{s}}.endpoint_lane (endpoint, due_at)
                 SELECT id, now() + interval '1 hour' FROM {{s}}.endpoint WHERE tenant LIKE '{who}%'"
            ),
            format!(
                "INSERT INTO {{s}}.webhook_event (event_id, tenant, type, body)
                 SELECT '{who}' || i, (ARRAY['acme', '{who}1'])[1 + i % 2], 'mail.sent', '' {many}"
            ),
            format!(
                "INSERT INTO {{s}}.webhook_delivery (event, endpoint, state, next_at)
                 SELECT v.id, e.id, (ARRAY['pending', 'delivered', 'failed'])[1 + v.id % 3], now() + interval '1 hour'
                 FROM {{s}}.webhook_event v JOIN {{s}}.endpoint e USING (tenant) WHERE v.event_id LIKE '{who}%'"
            ),
        ] {
            self.sql(&sql).await;
        }
    }

    /// What each call reads that delivers one event.
    async fn delivers_one(&self, time: &str) -> Vec<String> {
        let bridge = self.bridge();
        let mut dear = Vec::new();
        let mut before = rows_read(&self.database).await;
        let mut count = async |call: &str, most: i64| {
            let read = rows_read(&self.database).await;
            if read - before > most {
                dear.push(format!("{time}: {call}: {}", read - before));
            }
            before = read;
        };
        assert_eq!(self.record(&[(time, "acme", "mail.sent")]).await, 1);
        count("record", MOST).await;
        let leased = bridge.lease(10, 4).await.unwrap();
        count("lease", MOST).await;
        assert_eq!(leased.len(), 1, "{time}");
        bridge.settle(&[delivered(&leased[0])]).await.unwrap();
        count("settle", MOST).await;
        assert!(bridge.lease(10, 4).await.unwrap().is_empty());
        count("lease nothing", MOST).await;
        assert_eq!(bridge.forget().await.unwrap(), 0);
        // It looks at all endpoints for secrets that are no longer needed.
        count("forget what is old", MOST + i64::from(FEW + MANY)).await;
        dear
    }
}

fn delivered(leased: &Leased) -> Settled {
    Settled {
        event: leased.event,
        endpoint: leased.endpoint,
        version: leased.version,
        lease: leased.lease,
        outcome: Outcome::Delivered,
        status: Some(200),
        error: None,
        blame: false,
        pause: 0.0,
        gone: false,
    }
}

#[tokio::test]
async fn a_delivery_does_not_read_thousands_of_others() {
    let mut world = World::connected(&["acme"], 1).await;
    world.config.retention = Duration::from_hours(720);
    never_analyzed(&world.database).await;
    world.one_endpoint().await;
    for n in 0..7 {
        world.delivers_one(&format!("empty{n}")).await;
    }
    world.crowd("few", FEW).await;
    analyze(&world.database).await;
    for n in 0..7 {
        world.delivers_one(&format!("small{n}")).await;
    }
    world.crowd("many", MANY).await;
    let mut dear = world.delivers_one("analyzed-when-small").await;
    world.sql("DISCARD PLANS").await;
    dear.extend(world.delivers_one("planned-anew").await);
    analyze(&world.database).await;
    dear.extend(world.delivers_one("analyzed").await);
    assert!(dear.is_empty(), "{dear:#?}");
}

#[tokio::test]
async fn replaying_what_failed_reads_only_that() {
    let world = World::connected(&["acme"], 1).await;
    never_analyzed(&world.database).await;
    world.one_endpoint().await;
    world.crowd("many", MANY).await;
    world
        .sql(
            "INSERT INTO {s}.endpoint (tenant, name, url) VALUES ('acme', 'few', 'https://acme.example/few')",
        )
        .await;
    world
        .sql(
            "INSERT INTO {s}.endpoint_lane (endpoint) SELECT id FROM {s}.endpoint WHERE name = 'few' AND tenant = 'acme'",
        )
        .await;
    let give_up = "INSERT INTO {s}.webhook_delivery (event, endpoint, state) \
                   SELECT v.id, e.id, 'failed' FROM {s}.webhook_event v, {s}.endpoint e \
                    WHERE e.name = 'few' AND v.id IN (7, 1500, 2900) \
                   ON CONFLICT (event, endpoint) DO UPDATE SET state = 'failed'";
    for time in ["never analyzed", "analyzed"] {
        for arguments in [
            &["replay", "acme", "few", "--failed"][..],
            &["replay", "acme", "few", "--failed", "--since", "1h"],
        ] {
            world.sql(give_up).await;
            let before = rows_read(&world.database).await;
            let (output, _) = world.endpoint(arguments, "").await.unwrap();
            let read = rows_read(&world.database).await - before;
            assert_eq!(output, "3 events will be sent again\n");
            assert!(read <= MOST, "{time}: {arguments:?}: {read} rows");
        }
        analyze(&world.database).await;
    }
}
