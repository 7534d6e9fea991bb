//! What calls about one job read, as the server counts it: no more where there are thousands of everything. Whether the planner
//! believes the tables to be empty, because they were when it looked first, has no statistics, or good ones.

use std::sync::Arc;
use std::time::Duration;

use super::world::{
    World, absorb, account, all, done, fault, in_world_of, job, park, request, settlement, tenant,
};
use crate::db::reading::{analyze, never_analyzed, rows_read};
use crate::ledger::odd::Decision;
use crate::ledger::settle::Next;
use crate::ledger::slots::SlotRequest;
use crate::ledger::{Epoch, WaitReason};
use crate::level::Level;
use crate::report::ReportType;

/// Rows of each kind that no call is about.
const MANY: u32 = 3000;
/// As many as autovacuum waits for before it looks at a table.
const FEW: u32 = 60;
/// Rows and index entries that a call may read, in all tables together.
const MOST: i64 = 300;

#[tokio::test]
async fn a_call_about_one_job_does_not_read_thousands_of_others() {
    // One connection: it keeps its plans from the time when there was nothing, and counts what it reads.
    in_world_of(1, |world| async move {
        never_analyzed(&world.db).await;
        let mut calls = Calls::new(&world).await;
        calls.settle_on_plans().await;
        world.crowd("many", MANY).await;
        calls.make("planned-when-empty").await;
        world.run("DISCARD PLANS").await;
        calls.make("never-analyzed").await;
        assert!(calls.dear.is_empty(), "{:#?}", calls.dear);
    })
    .await;
}

#[tokio::test]
async fn a_call_about_one_job_does_not_read_thousands_that_came_since_the_tables_were_analyzed() {
    in_world_of(1, |world| async move {
        never_analyzed(&world.db).await;
        let mut calls = Calls::new(&world).await;
        world.crowd("few", FEW).await;
        analyze(&world.db).await;
        calls.settle_on_plans().await;
        world.crowd("many", MANY).await;
        calls.make("analyzed-when-small").await;
        analyze(&world.db).await;
        calls.make("analyzed").await;
        assert!(calls.dear.is_empty(), "{:#?}", calls.dear);
    })
    .await;
}

/// Reports that pass through the outbox, and what a look at it may read then: as many below the lowest that is owed are
/// searched too.
const PASSING: i64 = 10_000;
const BELOW: i64 = 2000;

#[tokio::test]
async fn a_look_at_the_outbox_does_not_walk_what_has_passed_while_a_snapshot_keeps_it() {
    in_world_of(1, |world| async move {
        never_analyzed(&world.db).await;
        let backup = world.db.reserved().unwrap().client().await.unwrap();
        let snapshot = world.db.sql("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM {s}.outbox");
        backup.batch_execute(&snapshot).await.unwrap();
        assert_eq!(world.backlog().await.0, 0);
        let passing = format!(
            "INSERT INTO {{s}}.outbox (tenant, id, seq, due_at, created_at, body)
             SELECT 'acme', 'passing', i, now(), now(), '{{}}' FROM generate_series(1, {PASSING}) i;
             DELETE FROM {{s}}.outbox"
        );
        world.run(&passing).await;
        world.backlog().await;
        let (owed, read) = world.backlog().await;
        assert!(owed == 0 && read <= BELOW + MOST, "{read} read");
        let before = rows_read(&world.db).await;
        let swept = world.ledger.owed_reports(10, Duration::ZERO).await.unwrap();
        let read = rows_read(&world.db).await - before;
        assert!(swept.is_empty() && read <= BELOW + MOST, "{read} read");

        // A number drawn long ago that is committed now is found by the search of the whole.
        world
            .run("INSERT INTO {s}.outbox (n, tenant, id, seq, due_at, created_at, body) SELECT 1, 'acme', 'late', 1, now(), now(), '{}'")
            .await;
        assert_eq!(world.backlog().await.0, 0);
        world.ledger.find_late_reports(Duration::from_mins(5)).await.unwrap();
        assert_eq!(world.backlog().await.0, 1);
        let swept = world.ledger.owed_reports(10, Duration::ZERO).await.unwrap();
        assert_eq!(swept.len(), 1);
    })
    .await;
}

impl World {
    /// How many reports are owed, counted now, and what was read for that.
    async fn backlog(&self) -> (i64, i64) {
        self.run("UPDATE {s}.outbox_census SET next_at = '-infinity'")
            .await;
        let before = rows_read(&self.db).await;
        let backlog = self.ledger.outbox_backlog(100, Duration::ZERO).await.unwrap();
        (backlog.owed, rows_read(&self.db).await - before)
    }

    /// Thousands of everything, as an installation that runs for long has them; some of it of the same tenant and account.
    async fn crowd(&self, who: &str, number: u32) {
        let columns = "tenant, id, state, level, account, digest, born, seq, created_at, updated_at";
        let many = format!("FROM generate_series(1, {number}) i");
        let waiting = format!("{columns}, due_at, reason, body, body_size, properties");
        for sql in [
            "INSERT INTO {s}.worker (epoch, name, version, lease, deadline)
             SELECT (SELECT coalesce(max(epoch), 0) FROM {s}.worker) + i, 'other', '1', '45 s', '25 min' FROM generate_series(1, 20) i"
                .to_owned(),
            format!(
                "INSERT INTO {{s}}.job ({columns}, epoch, claim, leased_at)
                 SELECT 'acme', '{who}-leased' || i, 1, 1, 'acme/main', '', 0, 0, now(), now(),
                        (SELECT max(epoch) FROM {{s}}.worker) - i % 20, i, now() {many}"
            ),
            format!(
                "INSERT INTO {{s}}.job ({columns}, finished_at)
                 SELECT 'acme', '{who}-done' || i, 3, 1, 'acme/main', '', 0, 0, now(), now(), now() {many}"
            ),
            format!(
                "INSERT INTO {{s}}.job ({waiting}, expires_at)
                 SELECT 'acme', '{who}-later' || i, 2, 2, 'acme/main', '', 0, 0, now(), now(), now() + interval '1 hour', 3, 'x', 1,
                        '{{}}', now() + interval '2 hours' {many};
                 INSERT INTO {{s}}.lane VALUES ('acme/main', 2, 'acme', now() + interval '1 hour') ON CONFLICT DO NOTHING"
            ),
            format!("SELECT {{s}}.set_limits_v1('other/{who}' || i, '[{{\"limit\": 1, \"per\": 60000000, \"unit\": \"messages\"}}]') {many}"),
            format!(
                "INSERT INTO {{s}}.job ({waiting})
                 SELECT 'other', '{who}-queued' || i, 2, 3, 'other/{who}' || i, '', 0, 0, now(), now(), now(), 1, 'x', 1, '{{}}' {many};
                 INSERT INTO {{s}}.lane SELECT 'other/{who}' || i, 3, 'other', now() + interval '1 hour', 1 {many}"
            ),
            format!(
                "INSERT INTO {{s}}.outbox (tenant, id, seq, due_at, created_at, body)
                 SELECT 'acme', '{who}-done' || i, 1, now() + interval '1 hour', now(), '{{}}' {many}"
            ),
            format!("INSERT INTO {{s}}.connection_cap SELECT 'other/{who}' || i, 2 {many}"),
            format!("INSERT INTO {{s}}.connection_lease SELECT 'other/{who}' || i, (SELECT max(epoch) FROM {{s}}.worker), 1 {many}"),
            format!(
                "INSERT INTO {{s}}.account_health (account, state, faults, until)
                 SELECT 'other/{who}' || i, i % 2, 5 * (i % 3), now() + interval '1 hour' {many}"
            ),
        ] {
            self.run(&sql).await;
        }
    }
}

/// What workers and operators ask of the ledger about one job. Not what looks for all there is of a kind by its purpose: accounts
/// in trouble, owed events, the leases and reports of the dead, how much waits.
struct Calls<'a> {
    world: &'a World,
    epoch: Arc<Epoch>,
    /// Which time, and part of the names of its jobs.
    time: String,
    /// Rounds made while there was little.
    rounds: usize,
    /// Calls that read too much.
    dear: Vec<String>,
}

impl<'a> Calls<'a> {
    async fn new(world: &'a World) -> Self {
        world.limit("tight/", &[(1, 3_600_000_000, "messages")]).await;
        world.limit("lim/main", &[(1000, 60_000_000, "messages")]).await;
        Self {
            world,
            epoch: world.steady_epoch().await,
            time: String::new(),
            rounds: 0,
            dear: Vec::new(),
        }
    }

    /// Makes all calls as often as the server takes to settle on one plan for all values.
    async fn settle_on_plans(&mut self) {
        for _ in 0..7 {
            self.rounds += 1;
            let name = format!("small{}", self.rounds);
            self.make(&name).await;
        }
        // Small tables are read as a whole.
        self.dear.clear();
    }

    async fn make(&mut self, time: &str) {
        time.clone_into(&mut self.time);
        self.on_the_way_of_a_mail().await;
        self.through_the_waiting_room().await;
        self.of_workers().await;
        self.by_operators().await;
        self.world
            .run("DELETE FROM {s}.account_health WHERE account LIKE 'acme%'")
            .await;
    }

    /// Counts what a call reads.
    async fn of<T>(&mut self, call: &str, future: impl Future<Output = T>) -> T {
        let before = rows_read(&self.world.db).await;
        let answer = future.await;
        let read = rows_read(&self.world.db).await - before;
        if read > MOST {
            self.dear.push(format!("{}: {call}: {read}", self.time));
        }
        answer
    }

    fn name(&self, id: &str) -> String {
        format!("{}-{id}", self.time)
    }

    async fn on_the_way_of_a_mail(&mut self) {
        let (world, epoch) = (self.world, Arc::clone(&self.epoch));
        let ledger = &world.ledger;
        let row = self
            .of("admit", world.go(request(&epoch, "acme", &self.name("a"))))
            .await;
        let again = request(&epoch, "acme", &self.name("a"));
        self.of("admit what is known", world.admit_one(again)).await;
        let limited = request(&epoch, "lim", &self.name("l"));
        let limited = self.of("admit under a limit", world.go(limited)).await;
        let tight = world.go(request(&epoch, "tight", &self.name("t"))).await;
        let denied = request(&epoch, "tight", &self.name("d"));
        self.of("admit over a limit", world.admit_one(denied)).await;
        let slot = SlotRequest {
            tenant: limited.tenant.clone(),
            id: limited.id.clone(),
            lease: limited.lease.clone(),
            account: limited.account.clone(),
            recipients: 1,
            keep: false,
        };
        self.of("take a slot", ledger.take_slots(&[slot])).await.unwrap();
        let marked = std::slice::from_ref(&row);
        self.of("mark in the final write", ledger.mark_data(marked))
            .await
            .unwrap();
        self.of("mark as suspect", ledger.mark_suspect(&row, true))
            .await
            .unwrap();
        self.of("settle", world.settle_one(done(&row, ReportType::Sent)))
            .await;
        self.of(
            "settle under a limit",
            world.settle_one(done(&limited, ReportType::Sent)),
        )
        .await;
        let mut back = settlement(&tight, Next::GiveBack);
        back.refund = true;
        self.of("give a slot back", world.settle_one(back)).await;
        let owed = world.owed(&self.name("a")).await;
        let numbers: Vec<_> = owed.iter().map(|owed| owed.0).collect();
        self.of("leave reports", ledger.leave_reports(&numbers))
            .await
            .unwrap();
        self.of("strike reports off", ledger.clear_outbox(&numbers))
            .await
            .unwrap();
        self.of("outbox backlog", ledger.outbox_backlog(10, Duration::ZERO))
            .await
            .unwrap();
        let capped = account("acme/main");
        self.of("acquire a connection", ledger.acquire_connection(&epoch, &capped))
            .await
            .unwrap();
        self.of(
            "release a connection",
            ledger.release_connection(epoch.number(), &capped),
        )
        .await
        .unwrap();
        self.of(
            "restate connections",
            ledger.restate_connections(&epoch, &[(capped, 1)]),
        )
        .await
        .unwrap();
        self.of("wanted connections", ledger.wanted_connections(&epoch))
            .await
            .unwrap();
    }

    async fn through_the_waiting_room(&mut self) {
        let (world, epoch) = (self.world, Arc::clone(&self.epoch));
        let ledger = &world.ledger;
        let row = world.go(request(&epoch, "acme", &self.name("w"))).await;
        self.of(
            "park",
            world.settle_one(park(&row, WaitReason::Retry, Duration::ZERO)),
        )
        .await;
        self.of("due levels", ledger.due_levels()).await.unwrap();
        let mut released = self.of("release", world.release(&epoch, Level::Medium, 1)).await;
        assert_eq!(released.len(), 1, "{}", self.time);
        let mut failed = park(&released.remove(0).row, WaitReason::Retry, Duration::ZERO);
        failed.evidence.push(fault("acme/main"));
        self.of("settle with a fault", world.settle_one(failed)).await;
        self.of("account health", ledger.account_health(&account("acme/main")))
            .await
            .unwrap();
        let mut only = all(Level::Medium, 1);
        only.only = Some(account("acme/main"));
        let released = self
            .of("release of one account", ledger.release(&epoch, &only))
            .await
            .unwrap();
        assert_eq!(released.len(), 1, "{}", self.time);
        self.of("forgotten leases", ledger.forgotten(&epoch))
            .await
            .unwrap();
        let expired = self.name("e");
        world.parked(&epoch, "acme", &expired, WaitReason::Schedule).await;
        let expire = format!("UPDATE {{s}}.job SET expires_at = now() WHERE id = '{expired}'");
        world.run(&expire).await;
        let released = self
            .of(
                "release what has expired",
                ledger.release_expired(&epoch, (9, 1 << 20), None),
            )
            .await
            .unwrap();
        assert_eq!(released.len(), 1, "{}", self.time);
        world
            .settle_one(done(&released[0].row, ReportType::Expired))
            .await;
    }

    async fn of_workers(&mut self) {
        let (world, epoch) = (self.world, Arc::clone(&self.epoch));
        self.of("heartbeat", world.ledger.heartbeat(&epoch))
            .await
            .unwrap();
        let month = Duration::from_hours(720);
        self.of("forget what is old", world.ledger.forget_old(month))
            .await
            .unwrap();
        self.of("late reports", world.ledger.find_late_reports(Duration::ZERO))
            .await
            .unwrap();
        self.of("register", world.epoch()).await;
    }

    async fn by_operators(&mut self) {
        let (world, epoch) = (self.world, Arc::clone(&self.epoch));
        let ledger = &world.ledger;
        let (acme, of) = (tenant("acme"), |id: String| job(&id));
        for id in ["c", "r", "u", "m"] {
            world
                .parked(&epoch, "acme", &self.name(id), WaitReason::Schedule)
                .await;
        }
        let (cancelled, unknown) = (of(self.name("c")), of(self.name("x")));
        self.of("cancel", ledger.cancel(&acme, &cancelled)).await.unwrap();
        self.of("cancel what is unknown", ledger.cancel(&acme, &unknown))
            .await
            .unwrap();
        let (by_hand, resolved, merged) = (of(self.name("r")), of(self.name("u")), of(self.name("m")));
        self.of("release by hand", ledger.release_by_hand(&acme, &by_hand))
            .await
            .unwrap();
        self.of(
            "resolve",
            ledger.resolve(&acme, &resolved, Decision::Failed, "me"),
        )
        .await
        .unwrap();
        self.of(
            "merge an acceptance",
            ledger.merge_acceptance(&acme, &merged, &[], "<1@acme>", 1),
        )
        .await
        .unwrap();
        let held = world.go(request(&epoch, "acme", &self.name("h"))).await;
        self.of("hold as uncertain", ledger.hold_uncertain(&acme, &held.id))
            .await
            .unwrap();
        let body = absorb("acme", &self.name("h"));
        self.of("absorb", ledger.absorb(&[body])).await.unwrap();
    }
}
