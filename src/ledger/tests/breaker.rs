//! Circuit breakers: when they open, who probes, and what closes them.

use std::sync::Arc;
use std::time::Duration;

use super::world::{
    LEASE, RELEASE, World, account, all, done, fault, in_world, park, request, settlement, tenant, until,
};
use crate::ledger::admit::{AdmitRequest, Admitted};
use crate::ledger::health::Evidence;
use crate::ledger::settle::{Next, Settled};
use crate::ledger::{Epoch, Row, WaitReason};
use crate::level::Level;
use crate::report::{ReportType, event_id};

const MAIN: &str = "acme/main";

fn works(key: &str) -> Evidence {
    Evidence {
        account: account(key),
        fault: None,
    }
}

impl World {
    /// Settles an attempt that failed, to be tried again at once.
    async fn fails(&self, row: &Row) {
        let mut failed = park(row, WaitReason::Retry, Duration::ZERO);
        failed.evidence.push(fault(row.account.as_str()));
        assert_eq!(self.settle_one(failed).await, Settled::Written);
    }

    async fn succeeds(&self, row: &Row) {
        let mut sent = done(row, ReportType::Sent);
        sent.evidence.push(works(row.account.as_str()));
        assert_eq!(self.settle_one(sent).await, Settled::Written);
    }

    /// Opens acme/main by five jobs that fail.
    async fn open(&self, epoch: &Arc<Epoch>) {
        self.open_by(epoch, "f").await;
    }

    async fn open_by(&self, epoch: &Arc<Epoch>, prefix: &str) {
        let rows = futures_util::future::join_all(
            (0..5).map(async |n| self.go(request(epoch, "acme", &format!("{prefix}{n}"))).await),
        );
        for row in rows.await {
            self.fails(&row).await;
        }
        assert_eq!(self.breaker().await, Some(1));
    }

    /// State of the breaker of acme/main; `None` without a row.
    async fn breaker(&self) -> Option<i16> {
        self.one("SELECT max(state) FROM {s}.account_health WHERE account = 'acme/main'")
            .await
    }

    async fn health(&self, column: &str) -> Option<String> {
        self.one(&format!(
            "SELECT max({column})::text FROM {{s}}.account_health WHERE account = 'acme/main'"
        ))
        .await
    }

    /// Ends the cooldown, or the time of a probe.
    async fn cool(&self) {
        self.run(
            "UPDATE {s}.account_health SET until = clock_timestamp() - interval '1 millisecond';
             UPDATE {s}.lane SET next_at = clock_timestamp() - interval '1 millisecond'",
        )
        .await;
    }

    async fn events(&self) -> Vec<String> {
        let all: Option<Vec<String>> = self
            .one("SELECT array_agg(type ORDER BY created_at) FROM {s}.account_event")
            .await;
        all.unwrap_or_default()
    }

    /// Seconds until the end of the cooldown.
    async fn cooldown(&self) -> f64 {
        self.one("SELECT extract(epoch FROM until - clock_timestamp())::float8 FROM {s}.account_health")
            .await
    }
}

fn waits(answer: &Admitted) -> bool {
    matches!(
        answer,
        Admitted::Wait {
            reason: WaitReason::Unhealthy,
            ..
        }
    )
}

#[tokio::test]
async fn five_faults_in_a_row_open_an_account_and_an_accepted_mail_in_between_begins_the_count_anew() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        for round in ["a", "b"] {
            for n in 0..4 {
                let row = world.go(request(&epoch, "acme", &format!("{round}{n}"))).await;
                world.fails(&row).await;
            }
            assert_eq!(world.breaker().await, Some(0));
            let row = world.go(request(&epoch, "acme", &format!("{round}ok"))).await;
            world.succeeds(&row).await;
            assert_eq!(world.breaker().await, None, "healthy accounts have no row");
        }
        world.open(&epoch).await;
        assert_eq!(world.events().await, ["account.unhealthy"]);
        let other = world.admit_one(request(&epoch, "other", "1")).await;
        assert!(matches!(other, Admitted::Go(_)), "{other:?}");
    })
    .await;
}

#[tokio::test]
async fn an_open_account_takes_no_job_no_slot_and_no_attempt() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit(MAIN, &[(100, 60_000_000, "messages")]).await;
        world.open(&epoch).await;
        let used = world.used(MAIN).await;
        let Admitted::Wait { row, reason, delay } = world.admit_one(request(&epoch, "acme", "new")).await
        else {
            panic!("it does not wait");
        };
        assert_eq!(reason, WaitReason::Unhealthy);
        assert!(
            delay > Duration::from_secs(50) && delay < Duration::from_secs(67),
            "{delay:?}"
        );
        world.settle_one(park(&row, reason, delay)).await;
        assert_eq!(world.column("acme", "new", "attempt").await.as_deref(), Some("0"));
        assert_eq!(world.used(MAIN).await, used);
        assert!(
            world.release(&epoch, Level::Medium, 50).await.is_empty(),
            "waiting jobs stay, too"
        );
        assert!(
            world.ledger.due_levels().await.unwrap().is_empty(),
            "and are not looked at"
        );
        world.assert_lanes_count_right().await;
    })
    .await;
}

#[tokio::test]
async fn when_the_cooldown_is_over_exactly_one_job_probes_over_two_workers() {
    in_world(|world| async move {
        let (one, two) = (world.epoch().await, world.epoch().await);
        world.open(&one).await;
        world.cool().await;
        let (first, second) = tokio::join!(
            world.release(&one, Level::Medium, 50),
            world.release(&two, Level::Medium, 50)
        );
        let mut released: Vec<_> = first.into_iter().chain(second).collect();
        assert_eq!(released.len(), 1);
        assert!(released[0].row.probe);
        assert_eq!(world.breaker().await, Some(2));
        assert!(waits(&world.admit_one(request(&two, "acme", "new")).await));
        assert!(world.release(&two, Level::Medium, 50).await.is_empty());
        // It succeeds: everything flows, and the lanes are woken.
        world.succeeds(&released.remove(0).row).await;
        assert_eq!(world.breaker().await, Some(0));
        assert_eq!(world.release(&two, Level::Medium, 50).await.len(), 4);
        let mut events = world.ledger.owed_account_events(10, LEASE).await.unwrap();
        let kinds: Vec<_> = events.iter().map(|event| event.kind.as_str()).collect();
        assert_eq!(kinds, ["account.unhealthy", "account.recovered"]);
        assert!(
            world
                .ledger
                .owed_account_events(10, LEASE)
                .await
                .unwrap()
                .is_empty(),
            "leased"
        );
        let json: serde_json::Value = serde_json::from_str(&events.remove(0).body).unwrap();
        assert_eq!(json["data"]["account"], "main");
        assert_eq!(json["data"]["reason"], "connect_failed");
        assert_eq!(json["data"]["faults"], 5);
        assert!(json["data"]["next_attempt_at"].is_string());
    })
    .await;
}

#[tokio::test]
async fn a_new_job_probes_as_well() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        world.cool().await;
        let batch: Vec<AdmitRequest> = (0..3)
            .map(|n| request(&epoch, "acme", &format!("new{n}")))
            .collect();
        let answers = world.ledger.admit(&batch).await.unwrap();
        let probes = answers
            .iter()
            .filter(|a| matches!(a, Admitted::Go(row) if row.probe))
            .count();
        assert_eq!((probes, answers.iter().filter(|a| waits(a)).count()), (1, 2));
    })
    .await;
}

#[tokio::test]
async fn a_failed_probe_doubles_the_cooldown_up_to_its_cap_and_makes_no_event() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        for expected in [120.0, 240.0, 480.0, 900.0, 900.0] {
            world.cool().await;
            let probe = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
            world.fails(&probe).await;
            let cooldown = world.cooldown().await;
            assert!(
                (0.85 * expected..1.15 * expected).contains(&cooldown),
                "{cooldown} for {expected}"
            );
        }
        assert_eq!(world.events().await, ["account.unhealthy"]);
        world.cool().await;
        let probe = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        world.succeeds(&probe).await;
        world.open_by(&epoch, "next").await;
        assert!(world.cooldown().await < 70.0, "the next outage begins anew");
    })
    .await;
}

#[tokio::test]
async fn the_probe_of_a_dead_worker_is_taken_up_by_the_next() {
    in_world(|world| async move {
        let (one, two) = (world.epoch().await, world.steady_epoch().await);
        world.open(&one).await;
        world.cool().await;
        assert_eq!(world.release(&one, Level::Medium, 1).await.len(), 1);
        assert!(world.release(&two, Level::Medium, 1).await.is_empty());
        world.silence(&one).await;
        world.ledger.takeover(&two, LEASE).await.unwrap();
        let released = world.release(&two, Level::Medium, 9).await;
        assert_eq!(released.len(), 1);
        assert!(released[0].row.probe);
    })
    .await;
}

#[tokio::test]
async fn a_probe_that_comes_back_too_late_no_longer_counts() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        world.cool().await;
        let late = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        world.cool().await;
        let next = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        assert!(next.probe);
        world.fails(&late).await;
        assert_eq!(world.breaker().await, Some(2), "the second one is under way");
        world.succeeds(&next).await;
        assert_eq!(world.breaker().await, Some(0));
    })
    .await;
}

#[tokio::test]
async fn a_probe_that_never_came_to_the_server_lets_the_next_one_try_at_once() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        world.cool().await;
        let probe = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        world
            .settle_one(park(&probe, WaitReason::Retry, Duration::from_mins(1)))
            .await;
        assert_eq!(world.breaker().await, Some(1));
        let next = world.release(&epoch, Level::Medium, 9).await;
        assert_eq!(next.len(), 1);
        assert!(next[0].row.probe);
    })
    .await;
}

#[tokio::test]
async fn a_probe_whose_lease_was_answered_into_the_void_is_taken_up_by_the_next_release() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        world.cool().await;
        world.loses_the_first_answer("release_v1", &RELEASE).await;
        let asked = all(Level::Medium, 1);
        assert!(world.ledger.release(&epoch, &asked).await.is_err());
        assert_eq!(
            world.breaker().await,
            Some(2),
            "the probe is on its way to nobody"
        );
        let again = world.release(&epoch, Level::Medium, 1).await;
        assert!(again.len() == 1 && again[0].row.probe, "{again:?}");
        // One that somebody works on stays the only one.
        let _ = epoch.look();
        let _ = epoch.look();
        world.ledger.forgotten(&epoch).await.unwrap();
        assert_eq!(world.breaker().await, Some(2));
        assert!(world.release(&epoch, Level::Medium, 1).await.is_empty());
        world.succeeds(&again[0].row).await;
        assert_eq!(world.breaker().await, Some(0));
    })
    .await;
}

#[tokio::test]
async fn what_was_under_way_when_an_account_opened_neither_prolongs_nor_ends_it() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let requests: Vec<_> = (0..60)
            .map(|n| request(&epoch, "acme", &format!("s{n}")))
            .collect();
        let mut rows: Vec<Row> = world
            .ledger
            .admit(&requests)
            .await
            .unwrap()
            .into_iter()
            .map(|answer| match answer {
                Admitted::Go(row) => *row,
                other => panic!("{other:?}"),
            })
            .collect();
        let late = rows.split_off(40);
        let settlements: Vec<_> = rows
            .iter()
            .map(|row| {
                let mut failed = park(row, WaitReason::Retry, Duration::from_mins(5));
                failed.evidence.push(fault(MAIN));
                failed
            })
            .collect();
        world.ledger.settle(&settlements).await.unwrap();
        let (faults, until) = (world.health("faults").await, world.health("until").await);
        assert_eq!(faults.as_deref(), Some("5"));
        for row in &late[..10] {
            world.fails(row).await;
        }
        world.succeeds(&late[10]).await;
        assert_eq!(
            (world.health("faults").await, world.health("until").await),
            (faults, until)
        );
        assert_eq!(world.breaker().await, Some(1));
        // It recovers; time-outs of connections from before say nothing about now.
        world.cool().await;
        let probe = world.go(request(&epoch, "acme", "probe")).await;
        world.succeeds(&probe).await;
        for row in &late[11..] {
            world.fails(row).await;
        }
        assert_eq!(
            (world.breaker().await, world.health("faults").await.as_deref()),
            (Some(0), Some("0"))
        );
        assert_eq!(world.events().await, ["account.unhealthy", "account.recovered"]);
    })
    .await;
}

#[tokio::test]
async fn workers_that_find_the_trouble_at_once_open_it_once() {
    in_world(|world| async move {
        let epochs = [world.epoch().await, world.epoch().await, world.epoch().await];
        let mut jobs = Vec::new();
        for (n, epoch) in epochs.iter().cycle().take(30).enumerate() {
            jobs.push(world.go(request(epoch, "acme", &format!("j{n}"))).await);
        }
        futures_util::future::join_all(jobs.iter().map(|row| world.fails(row))).await;
        assert_eq!(world.events().await, ["account.unhealthy"]);
        assert_eq!(world.health("openings").await.as_deref(), Some("1"));
        assert_eq!(world.health("faults").await.as_deref(), Some("5"));
    })
    .await;
}

#[tokio::test]
async fn a_settlement_that_comes_twice_counts_once() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        for _ in 0..3 {
            world.fails(&row).await;
        }
        assert_eq!(world.health("faults").await.as_deref(), Some("1"));
    })
    .await;
}

#[tokio::test]
async fn jobs_that_may_take_a_detour_go_without_the_account() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        let mut detour = request(&epoch, "acme", "detour");
        detour.detour = true;
        let row = world.go(detour).await;
        assert!(!row.probe && row.slot.is_none());
        assert!(
            world.ledger.health().wait(&account(MAIN)).is_some(),
            "and it is known here"
        );
        // Somebody has to probe, even if nobody waits.
        world.cool().await;
        let mut probe = request(&epoch, "acme", "probe");
        probe.detour = true;
        assert!(world.go(probe).await.probe);
    })
    .await;
}

#[tokio::test]
async fn a_job_that_waits_for_another_account_than_before_waits_in_that_ones_lane() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        let mut elsewhere = request(&epoch, "acme", "1");
        elsewhere.account = account("-/default");
        let row = world.go(elsewhere).await;
        let mut waits = park(&row, WaitReason::Unhealthy, Duration::ZERO);
        waits.account = Some(account(MAIN));
        world.settle_one(waits).await;
        assert_eq!(world.column("acme", "1", "account").await.as_deref(), Some(MAIN));
        assert!(world.release(&epoch, Level::Medium, 50).await.is_empty());
        world.assert_lanes_count_right().await;
    })
    .await;
}

#[tokio::test]
async fn what_has_waited_for_an_open_account_for_too_long_comes_out_to_be_given_up() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        let mut request = all(Level::Medium, 50);
        request.max_age = Duration::from_hours(1);
        world
            .run(
                "UPDATE {s}.job SET due_at = due_at - interval '2 hours' WHERE id = 'f1';
                 UPDATE {s}.lane SET next_at = clock_timestamp(), oldest_at = '-infinity'",
            )
            .await;
        let due_before_the_trouble = world.ledger.release(&epoch, &request).await.unwrap();
        assert!(due_before_the_trouble.is_empty(), "{due_before_the_trouble:?}");
        world
            .run(
                "UPDATE {s}.account_health SET opened_at = opened_at - interval '2 hours';
                 UPDATE {s}.lane SET next_at = clock_timestamp()",
            )
            .await;
        let released = world.ledger.release(&epoch, &request).await.unwrap();
        let ids: Vec<_> = released.iter().map(|r| r.row.id.as_str()).collect();
        assert_eq!(ids, ["f1"]);
        assert!(!released[0].row.probe && released[0].row.overdue);
        assert!(world.ledger.health().wait(&account(MAIN)).is_some());
        assert!(world.ledger.release(&epoch, &request).await.unwrap().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_changed_account_is_tried_at_once() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        world.run("SELECT {s}.reset_health_v1('acme/main')").await;
        let probe = world.release(&epoch, Level::Medium, 9).await;
        assert_eq!(probe.len(), 1);
        world.fails(&probe[0].row).await;
        assert!(world.cooldown().await < 70.0, "the cooldown begins anew");
        world.run("SELECT {s}.reset_health_v1('acme/main')").await;
        let probe = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        world.succeeds(&probe).await;
        assert_eq!(world.events().await, ["account.unhealthy", "account.recovered"]);
        assert_eq!(world.release(&epoch, Level::Medium, 9).await.len(), 4);
    })
    .await;
}

#[tokio::test]
async fn a_changed_account_is_tried_at_once_although_a_release_is_just_putting_its_mail_off() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        world
            .run("UPDATE {s}.lane SET next_at = clock_timestamp() - interval '1 second'")
            .await;
        // A release that saw the account in trouble, and is about to commit.
        let mut client = world.db.client().await.unwrap();
        let release = client.transaction().await.unwrap();
        let put_off = world
            .db
            .sql("UPDATE {s}.lane SET next_at = clock_timestamp() + interval '1 minute'");
        release.batch_execute(&put_off).await.unwrap();
        let change = world.run("SELECT {s}.reset_health_v1('acme/main')");
        let release = async {
            until("the change waits for the release", async || {
                let waiting: i64 = world
                    .one("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%{s}.reset_health%'")
                    .await;
                waiting > 0
            })
            .await;
            release.commit().await.unwrap();
        };
        tokio::join!(change, release);
        assert_eq!(world.release(&epoch, Level::Medium, 9).await.len(), 1);
    })
    .await;
}

#[tokio::test]
async fn events_have_the_id_that_reports_have() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.open(&epoch).await;
        let number = world.health("event").await.unwrap();
        let id: String = world.one("SELECT event_id FROM {s}.account_event").await;
        assert_eq!(id, event_id("acme", "account", "main", &number));
        world.ledger.clear_account_event(&id).await.unwrap();
        assert!(world.events().await.is_empty());
    })
    .await;
}

#[tokio::test]
async fn trouble_long_over_is_forgotten_and_trouble_that_lasts_is_not() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world
            .run(
                "INSERT INTO {s}.tenant (id) VALUES ('acme');
                 INSERT INTO {s}.account (tenant, id, host, port, tls) VALUES ('acme', 'main', 'h', 25, 'none')",
            )
            .await;
        world.open(&epoch).await;
        let age = "UPDATE {s}.account_health SET noted_at = noted_at - interval '1 hour'";
        world.run(age).await;
        assert_eq!(world.ledger.forget_health().await.unwrap(), 0);
        world.cool().await;
        let probe = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        world.succeeds(&probe).await;
        assert_eq!(world.ledger.forget_health().await.unwrap(), 0);
        world.run(age).await;
        assert_eq!(world.ledger.forget_health().await.unwrap(), 1);
    })
    .await;
}

#[tokio::test]
async fn trouble_of_an_account_that_is_gone_is_forgotten() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        // By attempts that end after the account was removed.
        world.open(&epoch).await;
        assert_eq!(world.ledger.forget_health().await.unwrap(), 1);
        assert_eq!(world.breaker().await, None);
    })
    .await;
}

#[tokio::test]
async fn the_view_of_a_worker_follows_the_ledger() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let known = || world.ledger.health().wait(&account(MAIN));
        assert_eq!(known(), None);
        world.open(&epoch).await;
        assert!(known().is_some(), "told by the settlement");
        world.run("DELETE FROM {s}.account_health").await;
        world.ledger.refresh_health().await.unwrap();
        assert_eq!(known(), None);
        let given_back = world.go(request(&epoch, "acme", "x")).await;
        world.settle_one(settlement(&given_back, Next::GiveBack)).await;
        assert_eq!(world.ledger.account_health(&account(MAIN)).await.unwrap(), None);
        assert_eq!(tenant("acme").as_str(), "acme");
    })
    .await;
}
