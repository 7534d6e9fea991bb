//! Rolling limits: never more than the limit in any window, wherever it begins, and never less than can be had.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::world::{World, account, in_world, park, request, settlement, until};
use crate::id::AccountKey;
use crate::ledger::admit::{AdmitRequest, Admitted};
use crate::ledger::settle::{Next, Settled};
use crate::ledger::slots::{SlotAnswer, SlotRequest};
use crate::ledger::{Epoch, Row, Slot, WaitReason};
use crate::level::Level;

const SECOND: i64 = 1_000_000;

/// A slot that was used, at the latest moment and for as much as it may be.
struct Use {
    tenant: String,
    account: AccountKey,
    recipients: u32,
    /// When the answer was here: it cannot be used before.
    from: Instant,
    until: Instant,
}

/// A limit, and the uses that it counts.
struct Bound {
    name: &'static str,
    limit: u32,
    window: Duration,
    weight: fn(&Use) -> u32,
    counts: Box<dyn Fn(&Use) -> bool + Send + Sync>,
}

impl Bound {
    fn new(
        name: &'static str,
        limit: u32,
        window: Duration,
        weight: fn(&Use) -> u32,
        counts: impl Fn(&Use) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self {
            name,
            limit,
            window,
            weight,
            counts: Box::new(counts),
        }
    }

    fn of<'a>(&self, uses: &'a [Use]) -> Vec<&'a Use> {
        uses.iter().filter(|u| (self.counts)(u)).collect()
    }

    fn total(&self, uses: &[Use]) -> u32 {
        self.of(uses).into_iter().map(self.weight).sum()
    }
}

fn messages(_: &Use) -> u32 {
    1
}

fn recipients(used: &Use) -> u32 {
    used.recipients
}

/// The most that can have been used in any window of this length.
fn most(uses: &[&Use], window: Duration, weight: impl Fn(&Use) -> u32) -> u32 {
    let mut begins: Vec<_> = uses.iter().map(|u| (u.from, weight(u))).collect();
    let mut ends: Vec<_> = uses.iter().map(|u| (u.until, weight(u))).collect();
    begins.sort();
    ends.sort();
    // A window that begins at the last moment of some slot: in it is all that began before its end and had not ended
    // before its beginning.
    let (mut i, mut begun, mut ended, mut most) = (0, 0, 0, 0);
    for (at, weight) in ends {
        while i < begins.len() && begins[i].0 <= at + window {
            begun += begins[i].1;
            i += 1;
        }
        most = most.max(begun - ended);
        ended += weight;
    }
    most
}

fn slot_request(row: &Row, recipients: u32) -> SlotRequest {
    SlotRequest {
        tenant: row.tenant.clone(),
        id: row.id.clone(),
        lease: row.lease.clone(),
        account: row.account.clone(),
        recipients,
        keep: false,
    }
}

/// One worker for a while: admits, parks what is denied, releases, takes slots anew, gives slots back.
async fn hammer(world: World, seed: u64, end: Instant) -> Vec<Use> {
    let epoch = world.epoch().await;
    let mut random = SmallRng::seed_from_u64(seed);
    let mut uses = Vec::new();
    let mut number = 0;
    while Instant::now() < end {
        let batch: Vec<AdmitRequest> = (0..random.random_range(1..30))
            .map(|_| {
                number += 1;
                let (tenant, key) =
                    [("a", "a/1"), ("a", "a/2"), ("b", "b/1"), ("b", "-/shared")][random.random_range(0..4)];
                let mut request = request(&epoch, tenant, &format!("{seed}-{number}"));
                request.account = account(key);
                request.recipients = random.random_range(1..4);
                request
            })
            .collect();
        let mut rows = Vec::new();
        let mut parked = Vec::new();
        for answer in world.ledger.admit(&batch).await.unwrap() {
            match answer {
                Admitted::Go(row) => rows.push((*row, Instant::now())),
                Admitted::Behind(row) | Admitted::Wait { row, .. } => {
                    parked.push(park(&row, WaitReason::Rate, Duration::ZERO));
                }
                other => panic!("{other:?}"),
            }
        }
        if !parked.is_empty() {
            let settled = world.settle(&parked).await;
            assert!(settled.iter().all(|s| *s == Settled::Written));
        }
        for released in world.release(&epoch, Level::Medium, 40).await {
            rows.push((released.row, Instant::now()));
        }
        use_slots(&world, &mut random, rows, &mut uses).await;
    }
    uses
}

async fn use_slots(world: &World, random: &mut SmallRng, rows: Vec<(Row, Instant)>, uses: &mut Vec<Use>) {
    let mut finished = Vec::new();
    let (mut anew, mut spent) = (Vec::new(), Vec::new());
    for (row, from) in rows {
        match random.random_range(0..10) {
            0 => {
                // Never used: it goes back, however often that is said.
                let mut back = settlement(&row, Next::GiveBack);
                back.refund = true;
                finished.push(back);
            }
            1 => anew.push(row),
            _ => spent.push((row, from)),
        }
    }
    if !anew.is_empty() {
        let requests: Vec<_> = anew.iter().map(|row| slot_request(row, 2)).collect();
        let answers = world.ledger.take_slots(&requests).await.unwrap();
        for (mut row, answer) in anew.into_iter().zip(answers) {
            if let SlotAnswer::Granted(slot) = answer {
                row.slot = Some(slot);
                spent.push((row, Instant::now()));
            } else {
                finished.push(park(&row, WaitReason::Rate, Duration::ZERO));
            }
        }
    }
    for (row, from) in spent {
        let Some(Slot {
            recipients,
            until: Some(until),
        }) = row.slot
        else {
            panic!("{row:?}")
        };
        if from < until {
            let (tenant, account) = (row.tenant.to_string(), row.account.clone());
            uses.push(Use {
                tenant,
                account,
                recipients,
                from,
                until,
            });
        }
    }
    for _ in 0..2 {
        if !finished.is_empty() {
            world.ledger.settle(&finished).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_window_ever_holds_more_than_its_limit_and_all_of_it_is_used() {
    in_world(|world| async move {
        world
            .limit("a/1", &[(200, SECOND, "messages"), (400, 3 * SECOND, "messages")])
            .await;
        world.limit("a/2", &[(300, SECOND, "recipients")]).await;
        world.limit("a/", &[(350, SECOND, "messages")]).await;
        world.limit("b/", &[(150, SECOND / 2, "recipients")]).await;
        world.limit("-/shared", &[(60, SECOND, "messages")]).await;
        let second = Duration::from_secs(1);
        let of = |key: &'static str| move |u: &Use| u.account == account(key);
        let bounds = [
            Bound::new("a/1", 200, second, messages, of("a/1")),
            Bound::new("a/1 in three", 400, 3 * second, messages, of("a/1")),
            Bound::new("a/2", 300, second, recipients, of("a/2")),
            Bound::new("a/", 350, second, messages, |u| u.tenant == "a"),
            Bound::new("b/", 150, second / 2, recipients, |u| u.tenant == "b"),
            Bound::new("-/shared", 60, second, messages, of("-/shared")),
        ];
        let mut uses = Vec::new();
        // On a slow machine slots grow too old to be used before their answer is read: it takes more time then.
        for round in 0..10 {
            let end = Instant::now() + Duration::from_millis(3500);
            let mut workers = tokio::task::JoinSet::new();
            for seed in 0..8 {
                workers.spawn(hammer(world.clone(), 8 * round + seed, end));
            }
            uses.extend(workers.join_all().await.into_iter().flatten());
            if bounds.iter().all(|bound| bound.total(&uses) >= bound.limit / 2) {
                break;
            }
        }
        for bound in bounds {
            let most = most(&bound.of(&uses), bound.window, bound.weight);
            assert!(most <= bound.limit, "{}: {most} of {}", bound.name, bound.limit);
            let total = bound.total(&uses);
            assert!(total >= bound.limit / 2, "{}: only {total} in all", bound.name);
        }
        world.assert_lanes_count_right().await;
    })
    .await;
}

/// Admits so many jobs at once; how many got a slot, and how long the first that did not is to wait.
async fn grab(
    world: &World,
    epoch: &std::sync::Arc<Epoch>,
    name: &str,
    count: usize,
) -> (usize, Option<Duration>) {
    let batch: Vec<_> = (0..count)
        .map(|n| request(epoch, "acme", &format!("{name}-{n}")))
        .collect();
    let answers = world.ledger.admit(&batch).await.unwrap();
    let granted = answers.iter().filter(|a| matches!(a, Admitted::Go(_))).count();
    let wait = answers.iter().find_map(|a| match a {
        Admitted::Wait {
            delay,
            reason: WaitReason::Rate,
            ..
        } => Some(*delay),
        _ => None,
    });
    (granted, wait)
}

#[tokio::test]
async fn of_several_limits_the_narrowest_holds() {
    let (minute, hour, day) = (60 * SECOND, 3600 * SECOND, 86400 * SECOND);
    let narrow = (3, hour, "messages");
    for limits in [
        [narrow, (10, day, "messages")],
        [(10, minute, "messages"), narrow],
        [narrow, (10, hour, "recipients")],
        [(10, minute, "messages"), (3, minute, "recipients")],
    ] {
        in_world(|world| async move {
            let epoch = world.epoch().await;
            world.limit("acme/main", &limits).await;
            let mut granted = Vec::new();
            for n in 0..3 {
                granted.push(grab(&world, &epoch, &format!("{n}"), 2).await.0);
            }
            assert_eq!(granted, [2, 1, 0], "{limits:?}");
            let used: Vec<i32> = world
                .one("SELECT used FROM {s}.rate WHERE key = 'acme/main'")
                .await;
            assert_eq!(used, [3, 3], "{limits:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_slot_is_good_for_as_long_as_the_shortest_window_allows_in_whatever_order_limits_are_given() {
    let (minute, day) = ((10, 60 * SECOND, "messages"), (10, 86400 * SECOND, "messages"));
    for limits in [[minute, day], [day, minute]] {
        in_world(|world| async move {
            let epoch = world.epoch().await;
            world.limit("acme/main", &limits).await;
            let row = world.go(request(&epoch, "acme", "1")).await;
            // A 120th of a minute, of which the worker uses half; of a day it would be twelve minutes.
            let until = row.slot.unwrap().until.unwrap();
            assert!(until <= Instant::now() + Duration::from_millis(500), "{limits:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn what_has_left_the_window_is_subtracted_when_jobs_are_counted_together() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let limits = [
            (1000, SECOND / 5, "messages"),
            (10_000, 86400 * SECOND, "messages"),
        ];
        world.limit("acme/main", &limits).await;
        assert_eq!(grab(&world, &epoch, "first", 10).await.0, 10);
        let mut n = 0;
        until("the first have left the short window", async || {
            n += 1;
            assert_eq!(grab(&world, &epoch, &format!("later{n}"), 1).await.0, 1);
            let used: Vec<i32> = world
                .one("SELECT used FROM {s}.rate WHERE key = 'acme/main'")
                .await;
            assert_eq!(used[1], 10 + n, "nothing has left the long one");
            used[0] <= n
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn the_whole_limit_may_be_used_at_once_and_again_soon_after_its_window() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(50, SECOND, "messages")]).await;
        for turn in 0..3 {
            let begun = Instant::now();
            let (granted, wait) = grab(&world, &epoch, &format!("{turn}"), 60).await;
            assert_eq!(granted, 50, "{turn}");
            let wait = wait.unwrap();
            // Seen from the moment before the first slot, which may have been granted a while ago.
            let whole = wait + begun.elapsed();
            // A second, its sixtieth, and the quarter of a second for which a slot is good.
            let longest = Duration::from_millis(1267);
            assert!(
                whole > Duration::from_millis(1200) && wait <= longest,
                "{wait:?}, {whole:?}"
            );
            tokio::time::sleep(wait).await;
        }
        for (window, key) in [(60, "minute/main"), (3600, "hour/main"), (86400, "day/main")] {
            world.limit(key, &[(1, window * SECOND, "messages")]).await;
            let tenant = key.split('/').next().unwrap();
            let begun = Instant::now();
            world.go(request(&epoch, tenant, "1")).await;
            let Admitted::Wait { delay, .. } = world.admit_one(request(&epoch, tenant, "2")).await else {
                panic!()
            };
            let (window, whole) = (Duration::from_secs(window as u64), delay + begun.elapsed());
            assert!(whole > window + window / 120, "{delay:?}, {whole:?}");
            assert!(delay <= window + window / 60, "{delay:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_clock_that_steps_back_reopens_nothing() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(5, SECOND, "messages")]).await;
        // The clock was ten seconds ahead when somebody sent last.
        world
            .run("UPDATE {s}.rate SET last = {s}.micros(clock_timestamp()) + 10000000")
            .await;
        assert_eq!(grab(&world, &epoch, "first", 6).await.0, 5);
        let begun = Instant::now();
        let mut turn = 0;
        while begun.elapsed() < Duration::from_millis(1600) {
            // Not even if somebody had forgotten that it is shut.
            world.run("UPDATE {s}.rate SET next_at = 0").await;
            assert_eq!(grab(&world, &epoch, &format!("{turn}"), 2).await.0, 0);
            turn += 1;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_unused_slot_goes_back_exactly_once() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world
            .limit(
                "acme/main",
                &[(5, 60 * SECOND, "messages"), (9, 60 * SECOND, "recipients")],
            )
            .await;
        world.limit("acme/", &[(100, 60 * SECOND, "recipients")]).await;
        let mut rows = Vec::new();
        for n in 0..3 {
            let mut large = request(&epoch, "acme", &format!("large{n}"));
            large.recipients = 3;
            rows.push(world.go(large).await);
        }
        assert_eq!(grab(&world, &epoch, "full", 1).await.0, 0);
        let back: Vec<_> = rows[..2]
            .iter()
            .map(|row| {
                let mut back = settlement(row, Next::GiveBack);
                back.refund = true;
                back
            })
            .collect();
        for _ in 0..3 {
            world.ledger.settle(&back).await.unwrap();
        }
        assert_eq!(world.used("acme/").await, 3);
        // Six recipients are free, but only four messages.
        assert_eq!(grab(&world, &epoch, "again", 6).await.0, 4);
    })
    .await;
}

#[tokio::test]
async fn a_slot_whose_time_is_over_or_that_was_never_counted_does_not_go_back() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let refund = async |row: &Row| {
            let mut back = settlement(row, Next::GiveBack);
            back.refund = true;
            assert_eq!(world.settle_one(back).await, Settled::Written);
        };
        world.limit("acme/main", &[(2, SECOND / 5, "messages")]).await;
        let old = world.go(request(&epoch, "acme", "old")).await;
        // Its window, and the time for which it was good.
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert_eq!(grab(&world, &epoch, "new", 3).await.0, 2);
        refund(&old).await;
        assert_eq!(world.used("acme/main").await, 2);

        // Granted under the tenant's limit alone; the account's is younger.
        world.limit("young/", &[(100, 86400 * SECOND, "messages")]).await;
        let before = world.go(request(&epoch, "young", "before")).await;
        world
            .limit("young/main", &[(10, 86400 * SECOND, "messages")])
            .await;
        world.go(request(&epoch, "young", "after")).await;
        refund(&before).await;
        assert_eq!(world.used("young/main").await, 1);
        assert_eq!(world.used("young/").await, 1);
    })
    .await;
}

#[tokio::test]
async fn an_envelope_larger_than_the_limit_is_granted_in_parts() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world
            .limit(
                "acme/main",
                &[(10, 60 * SECOND, "recipients"), (500, 60 * SECOND, "messages")],
            )
            .await;
        world.limit("acme/", &[(7, SECOND, "recipients")]).await;
        let mut huge = request(&epoch, "acme", "huge");
        huge.recipients = 25;
        let row = world.go(huge).await;
        assert_eq!(row.slot.map(|slot| slot.recipients), Some(7));
        // Used; the rest needs slots of its own.
        let mut next = slot_request(&row, 18);
        next.keep = true;
        let answer = world.ledger.take_slots(&[next]).await.unwrap().remove(0);
        assert!(
            matches!(answer, SlotAnswer::Denied(wait) if wait > Duration::from_secs(50)),
            "{answer:?}"
        );
        assert_eq!(world.used("acme/main").await, 7);
    })
    .await;
}

#[tokio::test]
async fn what_does_not_fit_is_not_overtaken_and_waits_only_for_what_it_needs() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(4, 60 * SECOND, "recipients")]).await;
        world.go(request(&epoch, "acme", "1")).await;
        world.run("SELECT pg_sleep(1.1)").await; // another bucket
        let sized = |id: &str, recipients| {
            let mut request = request(&epoch, "acme", id);
            request.recipients = recipients;
            request
        };
        assert!(matches!(world.admit_one(sized("2", 2)).await, Admitted::Go(_)));
        let answers = world
            .ledger
            .admit(&[sized("two", 2), sized("one", 1), sized("four", 4)])
            .await
            .unwrap();
        for answer in &answers {
            // The head needs one recipient more, which the first job's bucket gives back before the second's.
            let Admitted::Wait { delay, .. } = answer else {
                panic!("{answers:?}")
            };
            assert!(*delay < Duration::from_mins(1), "{answers:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn limits_change_while_jobs_wait() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(5, 60 * SECOND, "messages")]).await;
        assert_eq!(grab(&world, &epoch, "first", 5).await.0, 5);
        let Admitted::Wait { row, reason, delay } = world.admit_one(request(&epoch, "acme", "waits")).await
        else {
            panic!()
        };
        world.settle_one(park(&row, reason, delay)).await;
        assert!(world.release(&epoch, Level::Medium, 1).await.is_empty());
        // Lower than what is used: waits, without harm.
        world.limit("acme/main", &[(2, 60 * SECOND, "messages")]).await;
        assert!(world.release(&epoch, Level::Medium, 1).await.is_empty());
        assert_eq!(grab(&world, &epoch, "second", 1).await.0, 0);
        assert_eq!(world.used("acme/main").await, 5, "what was sent still counts");
        // One more than is used: one goes at once.
        world.limit("acme/main", &[(6, 60 * SECOND, "messages")]).await;
        assert_eq!(world.release(&epoch, Level::Medium, 5).await.len(), 1);
        // None at all, in both ways to say it.
        for none in [&[][..], &[(0, 60 * SECOND, "messages")]] {
            world.limit("acme/main", &[(1, 60 * SECOND, "messages")]).await;
            grab(&world, &epoch, &format!("fill{}", none.len()), 2).await;
            let id = format!("again{}", none.len());
            let Admitted::Wait { row, reason, delay } = world.admit_one(request(&epoch, "acme", &id)).await
            else {
                panic!()
            };
            world.settle_one(park(&row, reason, delay)).await;
            assert!(world.release(&epoch, Level::Medium, 1).await.is_empty());
            world.limit("acme/main", none).await;
            assert_eq!(world.release(&epoch, Level::Medium, 5).await.len(), 1);
        }
    })
    .await;
}

#[tokio::test]
async fn a_raised_limit_wakes_every_lane_that_counts_against_it() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        // A tenant's own account, a borrowed one, and the owner's limit over all borrowers; waiting for a retry counts too.
        for (tenant, key, limited) in [
            ("a", "a/main", "a/"),
            ("b", "-/shared", "b/"),
            ("c", "-/shared", "-/"),
        ] {
            world.limit(limited, &[(1, 3600 * SECOND, "messages")]).await;
            let on = |id: &str| {
                let mut request = request(&epoch, tenant, id);
                request.account = account(key);
                request
            };
            let retried = world.go(on("1")).await;
            world
                .settle_one(park(&retried, WaitReason::Retry, Duration::ZERO))
                .await;
            assert!(
                world.release(&epoch, Level::Medium, 9).await.is_empty(),
                "{limited}"
            );
            world.limit(limited, &[(2, 3600 * SECOND, "messages")]).await;
            assert_eq!(
                world.release(&epoch, Level::Medium, 9).await.len(),
                1,
                "{limited}"
            );
            world.limit(limited, &[]).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_slot_given_back_wakes_those_who_wait_for_it() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        for key in ["acme/main", "acme/"] {
            world.limit(key, &[(1, 86400 * SECOND, "messages")]).await;
            let id = |name: &str| format!("{name}-{}", key.len());
            let first = world.go(request(&epoch, "acme", &id("first"))).await;
            let answer = world.admit_one(request(&epoch, "acme", &id("waits"))).await;
            let Admitted::Wait { row, reason, delay } = answer else {
                panic!()
            };
            world.settle_one(park(&row, reason, delay)).await;
            assert!(world.release(&epoch, Level::Medium, 1).await.is_empty());
            let mut failed = super::world::done(&first, crate::report::ReportType::Failed);
            failed.refund = true;
            world.settle_one(failed).await;
            world.assert_lanes_are_right().await;
            assert_eq!(world.release(&epoch, Level::Medium, 1).await.len(), 1, "{key}");
            world.limit(key, &[]).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_job_parked_after_its_limit_was_opened_does_not_wait_for_the_old_time() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(1, 86400 * SECOND, "messages")]).await;
        world.go(request(&epoch, "acme", "1")).await;
        let Admitted::Wait { row, reason, delay } = world.admit_one(request(&epoch, "acme", "2")).await
        else {
            panic!()
        };
        world.limit("acme/main", &[(2, 86400 * SECOND, "messages")]).await;
        world.settle_one(park(&row, reason, delay)).await;
        assert_eq!(world.release(&epoch, Level::Medium, 1).await.len(), 1);
    })
    .await;
}

#[tokio::test]
async fn what_comes_from_another_account_does_not_overtake_what_waits_for_the_limit() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(4, 60 * SECOND, "recipients")]).await;
        let mut moves = request(&epoch, "acme", "moves");
        moves.account = account("acme/other");
        let moves = world.go(moves).await;
        let mut large = request(&epoch, "acme", "large");
        large.recipients = 3;
        assert!(matches!(world.admit_one(large.clone()).await, Admitted::Go(_)));
        large.id = super::world::job("larger");
        assert!(matches!(world.admit_one(large).await, Admitted::Wait { .. }));
        // There is room for one recipient, which is kept for the envelope of three.
        let mut small = slot_request(&moves, 1);
        small.account = account("acme/main");
        let answer = world.ledger.take_slots(&[small]).await.unwrap().remove(0);
        assert!(matches!(answer, SlotAnswer::Denied(_)), "{answer:?}");
    })
    .await;
}

#[tokio::test]
async fn a_limit_known_to_be_shut_is_answered_without_its_lock() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(1, 60 * SECOND, "messages")]).await;
        assert_eq!(grab(&world, &epoch, "denied", 2).await.0, 1);
        let locked = world.holding("SELECT 1 FROM {s}.rate FOR UPDATE").await;
        let answer = tokio::time::timeout(Duration::from_secs(5), grab(&world, &epoch, "shut", 3)).await;
        assert_eq!(answer.unwrap().0, 0);
        // An open one is waited for.
        world.limit("free/main", &[(1, 60 * SECOND, "messages")]).await;
        locked
            .batch_execute(&world.db.sql("SELECT 1 FROM {s}.rate FOR UPDATE"))
            .await
            .unwrap();
        let waits = world.admit_one(request(&epoch, "free", "1"));
        tokio::pin!(waits);
        assert!(
            tokio::time::timeout(Duration::from_millis(200), &mut waits)
                .await
                .is_err()
        );
        locked.batch_execute("ROLLBACK").await.unwrap();
        assert!(matches!(waits.await, Admitted::Go(_)));
    })
    .await;
}

#[tokio::test]
async fn a_borrowed_account_counts_on_borrower_owner_and_account() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let keys = ["acme/", "-/", "-/shared"];
        for key in keys {
            world.limit(key, &[(10, 60 * SECOND, "messages")]).await;
        }
        let mut borrowed = request(&epoch, "acme", "1");
        borrowed.account = account("-/shared");
        let row = world.go(borrowed).await;
        let mut used = HashMap::new();
        for key in keys {
            used.insert(key, world.used(key).await);
        }
        assert!(used.values().all(|n| *n == 1), "{used:?}");
        // The real sender turns out to be another account: one slot back, the other taken.
        world.limit("acme/own", &[(10, 60 * SECOND, "messages")]).await;
        let mut other = slot_request(&row, 1);
        other.account = account("acme/own");
        let answer = world.ledger.take_slots(&[other]).await.unwrap().remove(0);
        assert!(matches!(answer, SlotAnswer::Granted(_)));
        for (key, count) in [("acme/", 1), ("-/", 0), ("-/shared", 0), ("acme/own", 1)] {
            assert_eq!(world.used(key).await, count, "{key}");
        }
    })
    .await;
}

#[tokio::test]
async fn slots_are_only_for_those_who_hold_the_lease() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(10, 60 * SECOND, "messages")]).await;
        let over = world.go(request(&epoch, "acme", "over")).await;
        let kept = world.go(request(&epoch, "acme", "kept")).await;
        world
            .settle_one(super::world::done(&over, crate::report::ReportType::Sent))
            .await;
        let mut unknown = slot_request(&kept, 1);
        unknown.id = super::world::job("unknown");
        let batch = [slot_request(&over, 1), unknown, slot_request(&kept, 1)];
        let answers = world.ledger.take_slots(&batch).await.unwrap();
        assert!(
            matches!(
                answers[..],
                [
                    SlotAnswer::LeaseLost,
                    SlotAnswer::LeaseLost,
                    SlotAnswer::Granted(_)
                ]
            ),
            "{answers:?}"
        );
        assert_eq!(world.used("acme/main").await, 2);
        // Said twice, as after a lost answer: still one slot for the job.
        let copies = [(); 5].map(|()| world.ledger.take_slots(&batch[2..]));
        futures_util::future::try_join_all(copies).await.unwrap();
        assert_eq!(world.used("acme/main").await, 2);
    })
    .await;
}

#[tokio::test]
async fn slots_are_counted_wherever_they_are_granted_or_denied() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(2, 3600 * SECOND, "messages")]).await;
        let count = |answer: &str| world.ledger.metrics.slots.with_label_values(&[answer]).get();
        world.go(request(&epoch, "acme", "1")).await;
        let row = world.go(request(&epoch, "acme", "2")).await;
        assert_eq!((count("granted"), count("denied")), (2, 0));
        let denied = world.admit_one(request(&epoch, "acme", "3")).await;
        assert!(matches!(denied, Admitted::Wait { .. }), "{denied:?}");
        assert_eq!((count("granted"), count("denied")), (2, 1));
        let again = world.ledger.take_slots(&[slot_request(&row, 1)]).await.unwrap();
        assert!(matches!(again[0], SlotAnswer::Granted(_)), "{again:?}");
        assert_eq!((count("granted"), count("denied")), (3, 1));
    })
    .await;
}
