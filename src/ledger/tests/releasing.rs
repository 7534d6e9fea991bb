//! The way out of the waiting room: levels, turns, order, and who gets what.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use super::world::{
    RELEASE, RELEASE_EXPIRED, World, account, all, done, in_world, job, park, request, result, settlement,
    tenant, until,
};
use crate::ledger::admit::{AdmitRequest, Admitted};
use crate::ledger::release::{ReleaseRequest, Released};
use crate::ledger::settle::{Next, Settled};
use crate::ledger::{Epoch, WaitReason};
use crate::level::Level;
use crate::report::{RecipientStatus, ReportType};

/// Puts jobs into the waiting room straight away: `tenant/main` of each tenant, oldest first.
pub(super) async fn fill(
    world: &World,
    tenant: &str,
    account: &str,
    level: Level,
    count: usize,
    size: usize,
) {
    world
        .run(&format!(
            "INSERT INTO {{s}}.job (tenant, id, state, level, account, digest, born, seq, created_at, updated_at, due_at,
                                    reason, body, body_size, properties)
             SELECT '{tenant}', '{account}-{level}-' || i, 2, {}, '{account}', '', 0, 0, now(), now(),
                    now() - interval '1 hour' + i * interval '1 ms', 1, repeat('x', {size})::bytea, {size},
                    '{{\"recipients\": 1}}'
             FROM generate_series(1, {count}) i;
             INSERT INTO {{s}}.lane SELECT '{account}', {}, '{tenant}', now() - interval '1 hour', {count}",
            level as i16, level as i16
        ))
        .await;
}

fn ids(released: &[Released]) -> Vec<String> {
    released.iter().map(|r| r.row.id.to_string()).collect()
}

#[tokio::test]
async fn twenty_thousand_of_one_tenant_do_not_delay_another() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        fill(&world, "big", "big/main", Level::Low, 20_000, 1).await;
        world.run("ANALYZE {s}.job").await;
        // A turn of the big one first, so that the small one comes after it.
        world.release(&epoch, Level::Low, 10).await;
        fill(&world, "small", "small/main", Level::Low, 3, 1).await;
        let mut others = 0;
        let mut mine = 0;
        while mine < 3 {
            let released = world.release(&epoch, Level::Low, 20).await;
            mine += released
                .iter()
                .filter(|r| r.row.tenant == tenant("small"))
                .count();
            others += released
                .iter()
                .filter(|r| r.row.tenant != tenant("small"))
                .count();
            assert!(others <= 40, "{others} others went first");
        }
        // Inside one account too.
        fill(&world, "big", "-/shared", Level::Low, 1000, 1).await;
        fill(&world, "small", "-/shared", Level::Low, 1, 1).await;
        let mut only = all(Level::Low, 10);
        only.only = Some(account("-/shared"));
        let released = world.ledger.release(&epoch, &only).await.unwrap();
        assert!(
            released.iter().any(|r| r.row.tenant == tenant("small")),
            "{:?}",
            ids(&released)
        );
        assert_eq!(released.len(), 6, "five of the other: its half");
    })
    .await;
}

#[tokio::test]
async fn the_oldest_go_first_and_not_before_their_time() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        fill(&world, "acme", "acme/main", Level::High, 30, 1).await;
        world
            .run("UPDATE {s}.job SET due_at = now() + interval '1 hour' WHERE id LIKE '%-1'")
            .await;
        assert!(
            world.release(&epoch, Level::Medium, 10).await.is_empty(),
            "another level"
        );
        let first = world.release(&epoch, Level::High, 10).await;
        let expected: Vec<_> = (2..12).map(|n| format!("acme/main-high-{n}")).collect();
        assert_eq!(ids(&first), expected);
        assert_eq!(world.ledger.due_levels().await.unwrap(), [Level::High]);
        assert_eq!(world.release(&epoch, Level::High, 100).await.len(), 19);
        assert!(world.release(&epoch, Level::High, 100).await.is_empty());
        assert!(
            world.ledger.due_levels().await.unwrap().is_empty(),
            "nothing to look at for an hour"
        );
    })
    .await;
}

#[tokio::test]
async fn accounts_can_be_left_out_or_singled_out() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        for (level, name) in [
            (Level::Low, "a"),
            (Level::Medium, "a"),
            (Level::Immediate, "a"),
            (Level::Medium, "b"),
        ] {
            fill(&world, name, &format!("{name}/main"), level, 2, 1).await;
        }
        let mut without = all(Level::Medium, 10);
        without.exclude = vec![account("a/main")];
        let released = world.ledger.release(&epoch, &without).await.unwrap();
        assert_eq!(ids(&released), ["b/main-medium-1", "b/main-medium-2"]);
        let only = ReleaseRequest {
            only: Some(account("a/main")),
            ..all(Level::Medium, 3)
        };
        let released = world.ledger.release(&epoch, &only).await.unwrap();
        assert_eq!(
            ids(&released),
            ["a/main-immediate-1", "a/main-immediate-2", "a/main-medium-1"]
        );
        assert_eq!(released[0].level, Level::Immediate);
        let both = ReleaseRequest {
            exclude: vec![account("a/main")],
            ..only
        };
        assert!(world.ledger.release(&epoch, &both).await.unwrap().is_empty());
    })
    .await;
}

#[tokio::test]
async fn bodies_are_bounded_in_bytes_but_one_always_goes() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        fill(&world, "acme", "acme/main", Level::Low, 10, 1000).await;
        let sized = |most_bytes| ReleaseRequest {
            most_bytes,
            ..all(Level::Low, 10)
        };
        assert_eq!(world.ledger.release(&epoch, &sized(2500)).await.unwrap().len(), 3);
        assert_eq!(world.ledger.release(&epoch, &sized(1)).await.unwrap().len(), 1);
        assert_eq!(world.ledger.release(&epoch, &sized(0)).await.unwrap().len(), 0);
        assert_eq!(
            world.ledger.release(&epoch, &sized(1 << 20)).await.unwrap().len(),
            6
        );
    })
    .await;
}

/// A request of a job that expires so many seconds from now.
fn expiring(epoch: &Arc<Epoch>, tenant: &str, id: &str, seconds: i64) -> AdmitRequest {
    AdmitRequest {
        expires_at: Some(Timestamp::now() + SignedDuration::from_secs(seconds)),
        ..request(epoch, tenant, id)
    }
}

#[tokio::test]
async fn what_has_expired_comes_out_whatever_its_account_or_its_limit_says() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let expired = async || {
            world
                .ledger
                .release_expired(&epoch, (9, 1 << 20), None)
                .await
                .unwrap()
        };
        for (tenant, id, seconds) in [
            ("ill", "soon", 1),
            ("ill", "later", 3600),
            ("limited", "soon", 1),
            ("limited", "whenever", 0),
        ] {
            let mut request = expiring(&epoch, tenant, id, seconds);
            request.expires_at = request.expires_at.filter(|_| seconds > 0);
            let row = world.go(request).await;
            world
                .settle_one(park(&row, WaitReason::Rate, Duration::ZERO))
                .await;
        }
        world
            .limit("limited/main", &[(1, 3_600_000_000, "messages")])
            .await;
        world
            .run(
                "INSERT INTO {s}.account_health (account, state, faults, opened_at, until)
                 VALUES ('ill/main', 1, 5, clock_timestamp(), clock_timestamp() + interval '1 hour');
                 UPDATE {s}.rate SET next_at = 9e18;
                 UPDATE {s}.lane SET next_at = clock_timestamp() + interval '1 hour'",
            )
            .await;
        assert!(expired().await.is_empty(), "not before");
        let mut out = Vec::new();
        until("two have expired", async || {
            out.extend(expired().await);
            out.len() == 2
        })
        .await;
        assert_eq!(ids(&out), ["soon", "soon"]);
        assert!(out.iter().all(|job| job.row.slot.is_none() && !job.row.overdue));
        assert_eq!(world.fifo("ill/main", Level::Medium, "ill").await, Some(1));
        world.assert_lanes_count_right().await;
        for job in out {
            let told = world.settle_one(done(&job.row, ReportType::Expired)).await;
            assert_eq!(told, Settled::Written);
        }
    })
    .await;
}

#[tokio::test]
async fn an_expired_job_that_cannot_be_read_rests_like_any_other() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let expired = async || {
            let found = world.ledger.release_expired(&epoch, (9, 1 << 20), None).await;
            ids(&found.unwrap())
        };
        world.parked(&epoch, "acme", "newer", WaitReason::Contract).await;
        world.parked(&epoch, "acme", "tried", WaitReason::Retry).await;
        world
            .run(
                "UPDATE {s}.job SET expires_at = clock_timestamp() - interval '1 hour',
                     due_at = clock_timestamp() + interval '1 minute'",
            )
            .await;
        assert_eq!(expired().await, ["tried"]);
        world.run("UPDATE {s}.job SET due_at = clock_timestamp()").await;
        assert_eq!(expired().await, ["newer"]);
    })
    .await;
}

#[tokio::test]
async fn what_has_expired_lately_is_found_without_what_was_looked_for_before() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        for (id, ago) in [("old", "1 hour"), ("new", "1 second")] {
            world.parked(&epoch, "acme", id, WaitReason::Retry).await;
            let expire = format!(
                "UPDATE {{s}}.job SET expires_at = clock_timestamp() - interval '{ago}' WHERE id = '{id}'"
            );
            world.run(&expire).await;
        }
        for (recent, found) in [(Some(Duration::from_mins(5)), "new"), (None, "old")] {
            let expired = world.ledger.release_expired(&epoch, (9, 1 << 20), recent).await;
            assert_eq!(ids(&expired.unwrap()), [found]);
        }
    })
    .await;
}

#[tokio::test]
async fn expired_jobs_come_out_in_parts_and_each_once_over_two_workers() {
    in_world(|world| async move {
        let (one, two) = (world.epoch().await, world.epoch().await);
        fill(&world, "acme", "acme/main", Level::High, 30, 1000).await;
        world
            .run("UPDATE {s}.job SET expires_at = due_at; UPDATE {s}.job SET cancel = true WHERE id LIKE '%-30'")
            .await;
        assert_eq!(
            world.ledger.release_expired(&one, (100, 2500), None).await.unwrap().len(),
            3
        );
        let (first, second) = tokio::join!(
            world.ledger.release_expired(&one, (20, 1 << 20), None),
            world.ledger.release_expired(&two, (20, 1 << 20), None)
        );
        let mut all = ids(&first.unwrap());
        all.extend(ids(&second.unwrap()));
        all.extend(ids(&world
            .ledger
            .release_expired(&two, (20, 1 << 20), None)
            .await
            .unwrap()));
        assert_eq!(all.len(), 26, "the cancelled one ends as such");
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 26);
        world.assert_lanes_count_right().await;
    })
    .await;
}

#[tokio::test]
async fn limited_lanes_get_exactly_their_room_and_others_the_rest() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        for name in ["a", "b", "c"] {
            fill(&world, name, &format!("{name}/main"), Level::Low, 100, 1).await;
        }
        world.limit("a/main", &[(3, 60_000_000, "messages")]).await;
        world.limit("b/", &[(7, 60_000_000, "recipients")]).await;
        let mut count: HashMap<String, usize> = HashMap::new();
        loop {
            let released = world.release(&epoch, Level::Low, 20).await;
            if released.is_empty() {
                break;
            }
            for job in released {
                assert_eq!(
                    job.row.slot.unwrap().until.is_some(),
                    job.row.tenant != tenant("c")
                );
                *count.entry(job.row.tenant.to_string()).or_default() += 1;
            }
        }
        let expected = [("a", 3), ("b", 7), ("c", 100)].map(|(name, n)| (name.to_owned(), n));
        assert_eq!(count, HashMap::from(expected));
        world.assert_lanes_are_right().await;
    })
    .await;
}

#[tokio::test]
async fn an_immediate_job_goes_before_twenty_thousand_low_ones_of_its_limited_account() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(2, 200_000, "messages")]).await;
        fill(&world, "acme", "acme/main", Level::Low, 20_000, 1).await;
        world.run("ANALYZE {s}.job").await;
        assert_eq!(world.release(&epoch, Level::Low, 10).await.len(), 2);
        let mut urgent = request(&epoch, "acme", "urgent");
        urgent.level = Level::Immediate;
        let Admitted::Wait { row, reason, delay } = world.admit_one(urgent).await else {
            panic!()
        };
        assert_eq!(
            world.settle_one(park(&row, reason, delay)).await,
            Settled::Written
        );
        // Low is asked for first, again and again.
        let mut others = 0;
        until("the urgent job leaves", async || {
            others += world.release(&epoch, Level::Low, 10).await.len();
            !world.release(&epoch, Level::Immediate, 10).await.is_empty()
        })
        .await;
        assert_eq!(others, 0);
        until("the others go on", async || {
            !world.release(&epoch, Level::Low, 10).await.is_empty()
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn tenants_take_turns_at_a_limited_shared_account() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("-/shared", &[(1, 100_000, "messages")]).await;
        let names: Vec<String> = (0..6).map(|n| format!("t{n}")).collect();
        for name in &names {
            fill(&world, name, "-/shared", Level::Low, 100, 1).await;
        }
        let mut order = Vec::new();
        until("two rounds", async || {
            let released = world.release(&epoch, Level::Low, 4).await;
            assert!(released.len() <= 1);
            order.extend(released.into_iter().map(|r| r.row.tenant.to_string()));
            order.len() == 12
        })
        .await;
        for round in order.chunks(6) {
            assert_eq!(round.iter().collect::<HashSet<_>>().len(), 6, "{order:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn no_more_leave_at_a_time_than_may_have_connections_but_all_that_new_ones_make_way_for() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world
            .run("SELECT {s}.set_connection_cap_v1('acme/main', 2)")
            .await;
        fill(&world, "acme", "acme/main", Level::Low, 20, 1).await;
        fill(&world, "free", "free/main", Level::Low, 3, 1).await;
        let released = world.release(&epoch, Level::Low, 20).await;
        let caps: HashMap<_, _> = released
            .iter()
            .map(|r| (r.row.tenant.to_string(), r.cap))
            .collect();
        assert_eq!(caps["acme"], 2);
        assert_eq!(caps["free"], usize::MAX);
        assert_eq!(released.iter().filter(|r| r.cap == 2).count(), 2);
        // New jobs that stand aside for these would overtake the rest.
        let behind = ReleaseRequest {
            only: Some(account("acme/main")),
            ..all(Level::Low, 5)
        };
        assert_eq!(world.ledger.release(&epoch, &behind).await.unwrap().len(), 5);
    })
    .await;
}

#[tokio::test]
async fn shut_lanes_do_not_hide_the_open_one_behind_them() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("-/shared", &[(1, 60_000_000, "messages")]).await;
        for n in 0..200 {
            fill(&world, &format!("t{n}"), "-/shared", Level::Low, 1, 1).await;
        }
        assert_eq!(world.release(&epoch, Level::Low, 3).await.len(), 1);
        fill(&world, "open", "open/main", Level::Low, 1, 1).await;
        world
            .run("UPDATE {s}.lane SET next_at = now() WHERE account = 'open/main'")
            .await;
        assert_eq!(
            ids(&world.release(&epoch, Level::Low, 3).await),
            ["open/main-low-1"]
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_release_at_once_never_get_the_same_job_and_leave_none() {
    in_world(|world| async move {
        for n in 0..5 {
            fill(
                &world,
                &format!("t{n}"),
                &format!("t{n}/main"),
                Level::Low,
                200,
                1,
            )
            .await;
        }
        world.limit("t0/main", &[(100_000, 60_000_000, "messages")]).await;
        let mut workers = tokio::task::JoinSet::new();
        for _ in 0..6 {
            let world = world.clone();
            workers.spawn(async move {
                let epoch = world.epoch().await;
                let mut mine = Vec::new();
                let begun = Instant::now();
                while !world.ledger.due_levels().await.unwrap().is_empty() {
                    assert!(begun.elapsed() < super::world::PATIENCE);
                    for job in world.release(&epoch, Level::Low, 17).await {
                        mine.push((job.row.tenant.to_string(), job.row.id.to_string()));
                    }
                }
                mine
            });
        }
        let got: Vec<_> = workers.join_all().await.into_iter().flatten().collect();
        assert_eq!(got.len(), 1000);
        assert_eq!(got.iter().collect::<HashSet<_>>().len(), 1000);
        assert_eq!(
            world.one::<i64>("SELECT count(*) FROM {s}.lane").await,
            0,
            "empty lanes are gone"
        );
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_got_lost_is_found_again() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "1", WaitReason::Busy).await;
        let kept = world.go(request(&epoch, "acme", "kept")).await;
        drop(world.release(&epoch, Level::Medium, 1).await);
        drop(world.go(request(&epoch, "acme", "open")).await);
        assert_eq!(
            world.ledger.forgotten(&epoch).await.unwrap(),
            0,
            "it may still be on its way"
        );
        assert_eq!(
            world.ledger.forgotten(&epoch).await.unwrap(),
            0,
            "it may still be on its way"
        );
        assert_eq!(world.ledger.forgotten(&epoch).await.unwrap(), 2);
        assert_eq!(
            [world.state("acme", "1").await, world.state("acme", "open").await],
            [2, 0]
        );
        world.assert_lanes_are_right().await;
        assert_eq!(ids(&world.release(&epoch, Level::Medium, 1).await), ["1"]);
        assert_eq!(
            world.settle_one(settlement(&kept, Next::GiveBack)).await,
            Settled::Written
        );
    })
    .await;
}

#[tokio::test]
async fn a_job_that_somebody_is_working_on_is_passed_over() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        fill(&world, "acme", "acme/main", Level::Low, 3, 1).await;
        let locked = world.db.client().await.unwrap();
        locked.batch_execute("BEGIN").await.unwrap();
        let sql = world
            .db
            .sql("SELECT 1 FROM {s}.job WHERE id LIKE '%-1' FOR UPDATE");
        locked.batch_execute(&sql).await.unwrap();
        let released =
            tokio::time::timeout(Duration::from_secs(5), world.release(&epoch, Level::Low, 9)).await;
        assert_eq!(ids(&released.unwrap()), ["acme/main-low-2", "acme/main-low-3"]);
        locked.batch_execute("ROLLBACK").await.unwrap();
        drop(locked);
        let last = world.release(&epoch, Level::Low, 9).await;
        assert_eq!(ids(&last), ["acme/main-low-1"], "its lane has not forgotten it");
        assert_eq!(
            world
                .ledger
                .cancel(&tenant("acme"), &job("acme/main-low-1"))
                .await
                .unwrap(),
            crate::ledger::odd::Cancel::InFlight
        );
    })
    .await;
}

#[tokio::test]
async fn a_forgotten_job_that_was_marked_in_its_final_write_is_held_and_not_released() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "1", WaitReason::Retry).await;
        let mut released = world.release(&epoch, Level::Medium, 1).await;
        let row = released.remove(0).row;
        assert_eq!(
            world.ledger.mark_data(std::slice::from_ref(&row)).await.unwrap(),
            [true]
        );
        world.ledger.forgotten(&epoch).await.unwrap();
        world.ledger.forgotten(&epoch).await.unwrap();
        assert_eq!(world.ledger.forgotten(&epoch).await.unwrap(), 0, "it is in hand");
        drop(row);
        assert_eq!(world.ledger.forgotten(&epoch).await.unwrap(), 1);
        assert_eq!(world.state("acme", "1").await, 4);
        assert!(world.release(&epoch, Level::Medium, 1).await.is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_job_that_comes_back_to_wait_keeps_its_place() {
    in_world(|world| async move {
        let epoch = world.steady_epoch().await;
        for id in ["1", "2", "3"] {
            world.parked(&epoch, "acme", id, WaitReason::Rate).await;
        }
        let first = async || {
            let mut released = world.release(&epoch, Level::Medium, 1).await;
            let released = released.remove(0);
            assert_eq!(released.row.id.as_str(), "1");
            released.row
        };
        let (owner, id) = (tenant("acme"), job("1"));
        // Let go by hand.
        world.ledger.release_by_hand(&owner, &id).await.unwrap();
        drop(first().await);
        // Forgotten by its worker.
        let _ = (epoch.look(), epoch.look());
        assert_eq!(world.ledger.forgotten(&epoch).await.unwrap(), 1);
        let row = first().await;
        // Begun anew after somebody else's acceptance.
        let accepted = [
            result("a@b.example", RecipientStatus::Accepted),
            result("c@d.example", RecipientStatus::Deferred),
        ];
        let merged = world
            .ledger
            .merge_acceptance(&owner, &id, &accepted, "<1@acme>", 1);
        merged.await.unwrap();
        let failed = done(&row, ReportType::Failed);
        assert_eq!(world.settle_one(failed).await, Settled::LeaseLost);
        // Taken over from the dead.
        let doomed = world.epoch().await;
        let leased = world.release(&doomed, Level::Medium, 1).await;
        assert_eq!(ids(&leased), ["1"]);
        world.silence(&doomed).await;
        let deadline = Duration::from_mins(1);
        assert_eq!(world.ledger.takeover(&epoch, deadline).await.unwrap().moved, 1);
        first().await;
        world.assert_lanes_are_right().await;
    })
    .await;
}

#[tokio::test]
async fn what_was_leased_by_a_release_whose_answer_got_lost_is_released_by_the_next_one() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "1", WaitReason::Busy).await;
        world.loses_the_first_answer("release_v1", &RELEASE).await;
        let asked = all(Level::Medium, 1);
        assert!(world.ledger.release(&epoch, &asked).await.is_err());
        assert_eq!(world.state("acme", "1").await, 1, "leased all the same");
        assert_eq!(ids(&world.release(&epoch, Level::Medium, 1).await), ["1"]);
        world.assert_lanes_are_right().await;
    })
    .await;
}

#[tokio::test]
async fn what_expired_and_was_leased_by_a_statement_whose_answer_got_lost_is_told_by_the_next_one() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "1", WaitReason::Schedule).await;
        world
            .run("UPDATE {s}.job SET expires_at = clock_timestamp() - interval '1 minute'")
            .await;
        world
            .loses_the_first_answer("release_expired_v1", &RELEASE_EXPIRED)
            .await;
        let expired = async || world.ledger.release_expired(&epoch, (9, 1 << 20), None).await;
        assert!(expired().await.is_err());
        assert_eq!(world.state("acme", "1").await, 1, "leased all the same");
        assert_eq!(ids(&expired().await.unwrap()), ["1"]);
    })
    .await;
}
