//! Lives of workers: heartbeats, takeovers, and what ends with them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::world::{World, absorb, account, in_world, job, request, result, settlement, tenant};
use crate::ledger::lease::Beat;
use crate::ledger::odd::{Decision, Resolved};
use crate::ledger::settle::{Next, Settled};
use crate::ledger::{Epoch, WaitReason};
use crate::level::Level;
use crate::report::RecipientStatus;

const DEADLINE: Duration = Duration::from_mins(25);

async fn age(world: &World, epoch: &Epoch, column: &str, age: &str) {
    world
        .run(&format!(
            "UPDATE {{s}}.worker SET {column} = clock_timestamp() - interval '{age}' WHERE epoch = {}",
            epoch.number()
        ))
        .await;
}

async fn steady(world: &World, epoch: &Epoch) -> Duration {
    match world.ledger.heartbeat(epoch).await.unwrap() {
        Beat::Alive { steady } => steady,
        Beat::Dead => panic!("dead"),
    }
}

#[tokio::test]
async fn heartbeats_are_steady_until_one_comes_late() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        age(&world, &epoch, "steady_since", "1 hour").await;
        age(&world, &epoch, "heartbeat_at", "20 seconds").await;
        assert!(steady(&world, &epoch).await > Duration::from_mins(59));
        age(&world, &epoch, "heartbeat_at", "23 seconds").await;
        assert!(
            steady(&world, &epoch).await < Duration::from_secs(5),
            "half a lease is a gap"
        );
        assert!(epoch.is_fresh());
    })
    .await;
}

#[tokio::test]
async fn a_dead_epoch_never_comes_back() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        world.silence(&old).await;
        world.ledger.takeover(&new, DEADLINE).await.unwrap();
        assert!(old.is_fresh(), "it does not know yet");
        assert_eq!(world.ledger.heartbeat(&old).await.unwrap(), Beat::Dead);
        assert!(!old.is_fresh() && old.died().is_cancelled());
        assert_eq!(world.ledger.heartbeat(&old).await.unwrap(), Beat::Dead);
        world.run("DELETE FROM {s}.worker").await;
        assert_eq!(
            world.ledger.heartbeat(&new).await.unwrap(),
            Beat::Dead,
            "without a row as well"
        );
    })
    .await;
}

#[tokio::test]
async fn only_a_steady_living_worker_takes_over_and_only_from_the_silent() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.epoch().await);
        world.go(request(&old, "acme", "1")).await;
        let opened = async |by: &Arc<Epoch>| world.ledger.takeover(by, DEADLINE).await.unwrap().opened;
        assert_eq!(opened(&new).await, 0, "nobody is silent");
        world.silence(&old).await;
        assert_eq!(opened(&new).await, 0, "new workers know nothing of outages");
        age(&world, &new, "steady_since", "44 seconds").await;
        assert_eq!(opened(&new).await, 0);
        age(&world, &new, "steady_since", "1 hour").await;
        age(&world, &new, "heartbeat_at", "46 seconds").await;
        assert_eq!(opened(&new).await, 0, "silent itself");
        assert!(
            matches!(world.ledger.heartbeat(&old).await.unwrap(), Beat::Alive { .. }),
            "nothing was done"
        );
        world.silence(&old).await;
        age(&world, &new, "heartbeat_at", "1 second").await;
        world
            .run(&format!(
                "UPDATE {{s}}.worker SET dead = true WHERE epoch = {}",
                new.number()
            ))
            .await;
        assert_eq!(opened(&new).await, 0, "dead itself");
        world
            .run(&format!(
                "UPDATE {{s}}.worker SET dead = false WHERE epoch = {}",
                new.number()
            ))
            .await;
        age(&world, &old, "heartbeat_at", "44 seconds").await;
        assert_eq!(opened(&new).await, 0, "not silent for long enough");
        age(&world, &old, "heartbeat_at", "46 seconds").await;
        assert_eq!(opened(&new).await, 1);
        assert_eq!(opened(&new).await, 0, "once");
    })
    .await;
}

#[tokio::test]
async fn jobs_of_the_dead_wait_here_or_are_open_for_their_redelivery() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        world.go(request(&old, "acme", "open")).await;
        world.go(request(&old, "acme", "absorbed")).await;
        world.ledger.absorb(&[absorb("acme", "absorbed")]).await.unwrap();
        world.parked(&old, "acme", "released", WaitReason::Busy).await;
        world.release(&old, Level::Medium, 1).await;
        world.silence(&old).await;
        let takeover = world.ledger.takeover(&new, DEADLINE).await.unwrap();
        assert_eq!((takeover.moved, takeover.opened), (2, 1));
        assert!(takeover.uncertain.is_empty());
        world.assert_lanes_are_right().await;
        let open = world.go(request(&new, "acme", "open")).await;
        assert_eq!(open.uncertain, 1, "nobody knows what became of that lease");
        let mut released: Vec<_> = world
            .release(&new, Level::Medium, 10)
            .await
            .into_iter()
            .map(|r| (r.row.id.to_string(), r.row.uncertain))
            .collect();
        released.sort();
        assert_eq!(released, [("absorbed".to_owned(), 1), ("released".to_owned(), 1)]);
    })
    .await;
}

#[tokio::test]
async fn epochs_without_a_row_are_found_wherever_they_lie_between_the_living() {
    in_world(|world| async move {
        let mut epochs = Vec::new();
        for place in 0..6 {
            let epoch = if place == 1 {
                world.steady_epoch().await
            } else {
                world.epoch().await
            };
            world.go(request(&epoch, "acme", &place.to_string())).await;
            epochs.push(epoch);
        }
        for gone in [0, 2, 3, 5] {
            world
                .run(&format!(
                    "DELETE FROM {{s}}.worker WHERE epoch = {}",
                    epochs[gone].number()
                ))
                .await;
        }
        let takeover = world.ledger.takeover(&epochs[1], DEADLINE).await.unwrap();
        assert_eq!(takeover.opened, 4);
        for living in ["1", "4"] {
            assert_eq!(world.state("acme", living).await, 1);
        }
    })
    .await;
}

#[tokio::test]
async fn a_worker_that_outlives_a_restore_does_not_take_another_ones_epoch_for_its_own() {
    in_world(|world| async move {
        let old = world.epoch().await;
        // As a dump from before its life leaves it: neither the row nor the counters behind it.
        world.run("TRUNCATE {s}.worker RESTART IDENTITY").await;
        let new = world.epoch().await;
        assert_ne!(old.number(), new.number());
        assert_eq!(world.ledger.heartbeat(&old).await.unwrap(), Beat::Dead);
    })
    .await;
}

#[tokio::test]
async fn workers_that_begin_at_once_get_epochs_of_their_own() {
    in_world(|world| async move {
        // Twenty numbers a second make sure that they meet.
        world
            .run("ALTER TABLE {s}.worker ALTER epoch SET DEFAULT (extract(epoch FROM clock_timestamp()) * 20)::bigint")
            .await;
        let mut numbers = HashSet::new();
        for _ in 0..4 {
            assert!(numbers.insert(world.epoch().await.number()));
        }
    })
    .await;
}

#[tokio::test]
async fn a_search_for_the_dead_does_not_read_what_the_living_have_leased() {
    const LIVING: i64 = 20;
    in_world(|world| async move {
        let (one, two) = (world.epoch().await, world.epoch().await);
        for number in 0..LIVING {
            let epoch = if number % 2 == 0 { &one } else { &two };
            world.go(request(epoch, "acme", &number.to_string())).await;
        }
        let client = world.db.client().await.unwrap();
        let read = async |dead: &str| {
            let sql = world.db.sql(&format!(
                "BEGIN; SELECT {dead};
                 SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables
                 WHERE relid = '{{s}}.job'::regclass; ROLLBACK"
            ));
            let answers = client.simple_query(&sql).await.unwrap();
            let rows = answers.iter().filter_map(|answer| match answer {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
                _ => None,
            });
            rows.last().unwrap().parse::<i64>().unwrap()
        };
        assert_eq!(read("{s}.dead_epochs()").await, 0);
        // Among those without a row it finds all.
        world.run("DELETE FROM {s}.worker").await;
        assert_eq!(read("{s}.dead_epochs()").await, LIVING);
    })
    .await;
}

#[tokio::test]
async fn a_job_in_its_final_write_is_decided_about_only_after_the_deadline() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        let row = world.go(request(&old, "acme", "1")).await;
        assert_eq!(
            world.ledger.mark_data(std::slice::from_ref(&row)).await.unwrap(),
            [true]
        );
        world.ledger.absorb(&[absorb("acme", "1")]).await.unwrap();
        world.silence(&old).await;
        let takeover = world.ledger.takeover(&new, DEADLINE).await.unwrap();
        assert_eq!(
            (takeover.moved, takeover.opened, takeover.uncertain.len()),
            (0, 0, 0)
        );
        assert_eq!(world.state("acme", "1").await, 1);
        world
            .run("UPDATE {s}.job SET leased_at = clock_timestamp() - interval '26 minutes'")
            .await;
        let takeover = world.ledger.takeover(&new, DEADLINE).await.unwrap();
        assert_eq!(takeover.uncertain, [(tenant("acme"), job("1"))]);
        for _ in 0..2 {
            world
                .ledger
                .hold_uncertain(&tenant("acme"), &job("1"))
                .await
                .unwrap();
            assert_eq!(world.state("acme", "1").await, 4);
            assert_eq!(world.owed("1").await.len(), 1);
        }
        assert!(world.owed("1").await[0].2.contains("mail.uncertain"));
        // The late owner's report has the number of the one just written: it must not pass for it.
        let late = super::world::done(&row, crate::report::ReportType::Sent);
        assert_eq!(world.settle_one(late).await, Settled::LeaseLost);
        assert!(
            world
                .ledger
                .takeover(&new, DEADLINE)
                .await
                .unwrap()
                .uncertain
                .is_empty()
        );
    })
    .await;
}

#[tokio::test]
async fn a_worker_with_a_longer_lease_is_not_taken_for_dead_by_one_with_a_shorter() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.epoch().await);
        let patient = Duration::from_mins(10);
        let patient = world
            .ledger
            .register("patient", patient, Duration::ZERO)
            .await
            .unwrap();
        world.go(request(&old, "acme", "short")).await;
        world.go(request(&patient, "acme", "long")).await;
        let opened = async || world.ledger.takeover(&new, DEADLINE).await.unwrap().opened;
        for epoch in [&old, &patient] {
            age(&world, epoch, "heartbeat_at", "9 minutes").await;
        }
        age(&world, &new, "steady_since", "1 hour").await;
        assert_eq!(opened().await, 1, "the one with the same lease");
        assert_eq!(world.state("acme", "long").await, 1);
        age(&world, &patient, "heartbeat_at", "11 minutes").await;
        age(&world, &new, "steady_since", "9 minutes").await;
        assert_eq!(
            opened().await,
            0,
            "what ended just before that may have silenced both"
        );
        age(&world, &new, "steady_since", "11 minutes").await;
        assert_eq!(opened().await, 1);
    })
    .await;
}

#[tokio::test]
async fn a_worker_with_a_longer_lease_waits_for_its_own_before_it_takes_over() {
    in_world(|world| async move {
        let brief = Duration::from_secs(3);
        let brief = world
            .ledger
            .register("brief", brief, Duration::ZERO)
            .await
            .unwrap();
        let new = world.steady_epoch().await;
        world.go(request(&brief, "acme", "1")).await;
        // An outage of this length leaves no gap in the heartbeats of the other one.
        age(&world, &brief, "heartbeat_at", "20 seconds").await;
        assert_eq!(world.ledger.takeover(&new, DEADLINE).await.unwrap().opened, 0);
        age(&world, &brief, "heartbeat_at", "46 seconds").await;
        assert_eq!(world.ledger.takeover(&new, DEADLINE).await.unwrap().opened, 1);
    })
    .await;
}

#[tokio::test]
async fn a_job_in_its_final_write_is_decided_about_only_after_the_deadline_of_its_own_worker() {
    in_world(|world| async move {
        let hour = Duration::from_hours(1);
        let registered = world.ledger.register("patient", Duration::from_secs(45), hour);
        let (old, new) = (registered.await.unwrap(), world.steady_epoch().await);
        let row = world.go(request(&old, "acme", "1")).await;
        world.ledger.mark_data(std::slice::from_ref(&row)).await.unwrap();
        world.silence(&old).await;
        for (leased, uncertain) in [("59 minutes", 0), ("61 minutes", 1)] {
            world
                .run(&format!(
                    "UPDATE {{s}}.job SET leased_at = clock_timestamp() - interval '{leased}'"
                ))
                .await;
            let takeover = world.ledger.takeover(&new, DEADLINE).await.unwrap();
            assert_eq!(takeover.uncertain.len(), uncertain, "{leased}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_job_held_because_its_worker_died_is_counted_as_uncertain_once() {
    in_world(|world| async move {
        let counted = || world.ledger.metrics.jobs.with_label_values(&["uncertain"]).get();
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        let row = world.go(request(&old, "acme", "1")).await;
        world.ledger.mark_data(std::slice::from_ref(&row)).await.unwrap();
        world.ledger.hold_uncertain(&row.tenant, &row.id).await.unwrap();
        assert_eq!(counted(), 0, "its worker lives");
        world.silence(&old).await;
        world.ledger.takeover(&new, DEADLINE).await.unwrap();
        for _ in 0..2 {
            world.ledger.hold_uncertain(&row.tenant, &row.id).await.unwrap();
            assert_eq!(counted(), 1);
        }
    })
    .await;
}

#[tokio::test]
async fn a_job_held_after_its_worker_died_names_its_recipients_and_message_id() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        let mut row = world.go(request(&old, "acme", "1")).await;
        row.recipients = vec![result("ann@example.org", RecipientStatus::Pending)];
        row.message_id = Some("<1@acme>".into());
        assert_eq!(world.ledger.mark_data(&[row]).await.unwrap(), [true]);
        world.silence(&old).await;
        let takeover = world.ledger.takeover(&new, Duration::ZERO).await.unwrap();
        assert_eq!(takeover.uncertain, [(tenant("acme"), job("1"))]);
        let (owner, id) = (tenant("acme"), job("1"));
        world.ledger.hold_uncertain(&owner, &id).await.unwrap();
        let decided = world.ledger.resolve(&owner, &id, Decision::Sent, "ann").await;
        assert_eq!(decided.unwrap(), Resolved::Done);
        let owed = world.owed("1").await;
        for ((_, _, report), (kind, status)) in owed
            .iter()
            .zip([("mail.uncertain", "pending"), ("mail.sent", "accepted")])
        {
            let report: serde_json::Value = serde_json::from_str(report).unwrap();
            assert_eq!(report["type"], kind);
            assert_eq!(report["data"]["message_id"], "<1@acme>");
            assert_eq!(report["data"]["attempt"], 1, "the mark was of one");
            let told = serde_json::json!([{"address": "ann@example.org", "status": status}]);
            assert_eq!(report["data"]["recipients"], told);
        }
        assert_eq!(owed.len(), 2);
    })
    .await;
}

#[tokio::test]
async fn a_mark_does_not_overwrite_what_an_earlier_owner_has_brought_about() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let mut row = world.go(request(&epoch, "acme", "1")).await;
        let accepted = result("a@b.example", RecipientStatus::Accepted);
        let results = [accepted, result("c@d.example", RecipientStatus::Pending)];
        let merged = world
            .ledger
            .merge_acceptance(&row.tenant, &row.id, &results, "<1@acme>", 1)
            .await;
        assert!(!merged.unwrap());
        row.recipients = ["a@b.example", "c@d.example"]
            .map(|address| result(address, RecipientStatus::Pending))
            .to_vec();
        assert_eq!(world.ledger.mark_data(&[row]).await.unwrap(), [true]);
        let status = "recipients->0->>'status'";
        assert_eq!(
            world.column("acme", "1", status).await.as_deref(),
            Some("accepted")
        );
    })
    .await;
}

#[tokio::test]
async fn a_final_write_is_not_held_while_its_worker_lives() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        world.ledger.mark_data(std::slice::from_ref(&row)).await.unwrap();
        // Somebody found it uncertain under its former owner; since then it has been settled and leased again.
        world.ledger.hold_uncertain(&row.tenant, &row.id).await.unwrap();
        assert_eq!(world.state("acme", "1").await, 1);
        assert_eq!(world.owed("1").await, []);
        assert_eq!(
            world.settle_one(settlement(&row, Next::GiveBack)).await,
            Settled::Written
        );
    })
    .await;
}

#[tokio::test]
async fn what_an_epoch_leased_without_a_row_is_taken_over_too() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        world
            .run(&format!(
                "DELETE FROM {{s}}.worker WHERE epoch = {}",
                old.number()
            ))
            .await;
        // Its process slept for days, and has just woken up.
        world.go(request(&old, "acme", "1")).await;
        assert_eq!(world.ledger.takeover(&new, DEADLINE).await.unwrap().opened, 1);
    })
    .await;
}

#[tokio::test]
async fn rows_of_the_dead_go_once_they_hold_nothing() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        let row = world.go(request(&old, "acme", "1")).await;
        world.ledger.mark_data(std::slice::from_ref(&row)).await.unwrap();
        age(&world, &old, "heartbeat_at", "2 days").await;
        world.ledger.takeover(&new, DEADLINE).await.unwrap();
        let workers = async || world.one::<i64>("SELECT count(*) FROM {s}.worker").await;
        assert_eq!(workers().await, 2);
        world
            .run("UPDATE {s}.job SET leased_at = leased_at - interval '1 hour'")
            .await;
        world.ledger.hold_uncertain(&row.tenant, &row.id).await.unwrap();
        world.ledger.takeover(&new, DEADLINE).await.unwrap();
        assert_eq!(workers().await, 1);
    })
    .await;
}

#[tokio::test]
async fn a_job_cancelled_under_a_worker_that_died_ends_as_cancelled() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        world.parked(&old, "acme", "here", WaitReason::Busy).await;
        world.release(&old, Level::Medium, 1).await;
        world.go(request(&old, "acme", "away")).await;
        // Cancelled before it came, and seen by a worker that then died.
        world.ledger.cancel(&tenant("acme"), &job("early")).await.unwrap();
        world.admit_one(request(&old, "acme", "early")).await;
        for id in ["here", "away"] {
            world.ledger.cancel(&tenant("acme"), &job(id)).await.unwrap();
        }
        world.silence(&old).await;
        world.ledger.takeover(&new, DEADLINE).await.unwrap();
        assert!(world.release(&new, Level::Medium, 9).await.is_empty());
        for id in ["here", "away", "early"] {
            assert_eq!(
                world.column("acme", id, "outcome").await.as_deref(),
                Some("mail.cancelled"),
                "{id}"
            );
            assert_eq!(world.owed(id).await.len(), 1);
        }
        world.assert_lanes_are_right().await;
    })
    .await;
}

#[tokio::test]
async fn two_takeovers_at_once_move_every_job_once() {
    in_world(|world| async move {
        let old = world.epoch().await;
        for n in 0..200 {
            world.go(request(&old, "acme", &format!("{n}"))).await;
        }
        world.silence(&old).await;
        let mut heirs = Vec::new();
        for _ in 0..4 {
            heirs.push(world.steady_epoch().await);
        }
        let takeovers = heirs.iter().map(|heir| world.ledger.takeover(heir, DEADLINE));
        let takeovers = futures_util::future::try_join_all(takeovers).await.unwrap();
        assert_eq!(takeovers.iter().map(|t| t.opened).sum::<i32>(), 200);
    })
    .await;
}

#[tokio::test]
async fn connections_of_all_workers_together_stay_below_the_cap() {
    in_world(|world| async move {
        let key = account("acme/main");
        world
            .run("SELECT {s}.set_connection_cap_v1('acme/main', 3)")
            .await;
        let mut workers = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (world, key) = (world.clone(), key.clone());
            workers.spawn(async move {
                let epoch = world.epoch().await;
                for _ in 0..15 {
                    if world.ledger.acquire_connection(&epoch, &key).await.unwrap() {
                        let held: i64 = world
                            .one("SELECT sum(held)::bigint FROM {s}.connection_lease")
                            .await;
                        assert!(held <= 3, "{held}");
                        world
                            .ledger
                            .release_connection(epoch.number(), &key)
                            .await
                            .unwrap();
                    }
                }
            });
        }
        workers.join_all().await;
        assert_eq!(
            world
                .one::<i64>("SELECT count(*) FROM {s}.connection_lease")
                .await,
            0
        );
    })
    .await;
}

#[tokio::test]
async fn a_worker_can_say_what_it_really_has_and_moves_nobody_elses_count() {
    in_world(|world| async move {
        let (kept, gone) = (account("acme/main"), account("acme/old"));
        let (mine, other) = (world.epoch().await, world.epoch().await);
        for key in [&kept, &gone] {
            for epoch in [&mine, &mine, &other] {
                assert!(world.ledger.acquire_connection(epoch, key).await.unwrap());
            }
        }
        let news = account("acme/new");
        let held = [(kept.clone(), 1), (news, 3)];
        for _ in 0..2 {
            world.ledger.restate_connections(&mine, &held).await.unwrap();
            let left: Vec<String> = world
                .one(
                    "SELECT array_agg(account || ' ' || held ORDER BY account, epoch)
                     FROM {s}.connection_lease",
                )
                .await;
            assert_eq!(left, ["acme/main 1", "acme/main 1", "acme/new 3", "acme/old 1"]);
        }
        world.ledger.retire(&mine).await.unwrap();
        world.ledger.restate_connections(&mine, &held).await.unwrap();
        let left: i64 = world.one("SELECT sum(held) FROM {s}.connection_lease").await;
        assert_eq!(left, 2, "the dead have nothing");
    })
    .await;
}

#[tokio::test]
async fn connections_end_with_their_worker_and_are_wanted_back_from_the_living() {
    in_world(|world| async move {
        let key = account("acme/main");
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        let acquire = async |epoch: &Arc<Epoch>| world.ledger.acquire_connection(epoch, &key).await.unwrap();
        assert!(acquire(&old).await, "no cap, no limit");
        world
            .run("SELECT {s}.set_connection_cap_v1('acme/main', 2)")
            .await;
        assert!(acquire(&old).await);
        assert!(world.ledger.wanted_connections(&old).await.unwrap().is_empty());
        assert!(!acquire(&new).await, "what was taken before the cap counts");
        assert_eq!(
            world.ledger.wanted_connections(&old).await.unwrap(),
            std::slice::from_ref(&key)
        );
        assert!(
            world.ledger.wanted_connections(&new).await.unwrap().is_empty(),
            "it has none to give"
        );
        world.ledger.release_connection(old.number(), &key).await.unwrap();
        assert!(acquire(&new).await);
        // One that waits for a final reply keeps its connections until the deadline.
        let row = world.go(request(&old, "acme", "1")).await;
        world.ledger.mark_data(std::slice::from_ref(&row)).await.unwrap();
        world.silence(&old).await;
        world.ledger.takeover(&new, DEADLINE).await.unwrap();
        assert!(!acquire(&new).await);
        world
            .run("UPDATE {s}.job SET leased_at = leased_at - interval '1 hour'")
            .await;
        world.ledger.hold_uncertain(&row.tenant, &row.id).await.unwrap();
        world.ledger.takeover(&new, DEADLINE).await.unwrap();
        assert!(acquire(&new).await);
        assert!(!acquire(&old).await, "the dead get nothing");
        world.ledger.retire(&new).await.unwrap();
        assert_eq!(
            world
                .one::<i64>("SELECT count(*) FROM {s}.connection_lease")
                .await,
            0
        );
    })
    .await;
}
