//! What a delivery is, in every state its job can be in.

use std::time::Duration;

use jiff::Timestamp;

use super::world::{absorb, account, done, in_world, job, park, request, settlement, tenant};
use crate::ledger::WaitReason;
use crate::ledger::admit::{Admitted, Want};
use crate::ledger::settle::{Next, Settled};
use crate::ledger::slots::{SlotAnswer, SlotRequest};
use crate::level::Level;
use crate::report::ReportType;

fn hours(n: i64) -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second() + n * 3600).unwrap()
}

#[tokio::test]
async fn a_new_job_goes_with_a_slot_for_all_its_recipients() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let mut new = request(&epoch, "acme", "1");
        new.recipients = 3;
        let Admitted::Go(row) = world.admit_one(new).await else {
            panic!()
        };
        assert_eq!(
            row.slot.map(|slot| (slot.recipients, slot.until)),
            Some((3, None))
        );
        assert_eq!(row.born, row.sequence);
        assert_eq!(row.born % 1000, 0);
        let mut claim = request(&epoch, "acme", "2");
        claim.want = Want::Claim;
        assert_eq!(world.go(claim).await.slot, None);
    })
    .await;
}

#[tokio::test]
async fn times_are_looked_at_before_limits_and_limits_before_a_busy_account() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("shut/main", &[(1, 60_000_000, "messages")]).await;
        world.go(request(&epoch, "shut", "first")).await;
        let mut expired = request(&epoch, "shut", "expired");
        expired.expires_at = Some(hours(-1));
        expired.send_at = Some(hours(1));
        assert!(matches!(world.admit_one(expired).await, Admitted::Expired(_)));
        let mut scheduled = request(&epoch, "shut", "scheduled");
        scheduled.send_at = Some(hours(1));
        scheduled.want = Want::Park;
        let Admitted::Wait { reason, delay, .. } = world.admit_one(scheduled).await else {
            panic!()
        };
        assert_eq!(reason, WaitReason::Schedule);
        assert!(delay > Duration::from_mins(59) && delay < Duration::from_mins(61));
        for (n, want) in [Want::Slot, Want::Claim, Want::Park].into_iter().enumerate() {
            let mut over = request(&epoch, "shut", &format!("over{n}"));
            over.want = want;
            let Admitted::Wait { reason, delay, .. } = world.admit_one(over).await else {
                panic!()
            };
            assert_eq!(reason, WaitReason::Rate, "{want:?}");
            assert!(
                delay > Duration::from_secs(55) && delay < Duration::from_secs(62),
                "{delay:?}"
            );
        }
        let mut busy = request(&epoch, "free", "busy");
        busy.want = Want::Park;
        let answer = world.admit_one(busy).await;
        assert!(matches!(
            answer,
            Admitted::Wait {
                reason: WaitReason::Busy,
                delay: Duration::ZERO,
                ..
            }
        ));
    })
    .await;
}

#[tokio::test]
async fn each_job_of_a_batch_goes_by_its_own_times() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world
            .limit("limited/main", &[(100, 60_000_000, "messages")])
            .await;
        for owner in ["free", "limited"] {
            for (send_at, expires_at, expected) in [
                (None, None, "Go"),
                (None, Some(1), "Go"),
                (Some(-1), Some(1), "Go"),
                (Some(1), None, "Wait"),
                (Some(1), Some(2), "Wait"),
                (None, Some(-1), "Expired"),
            ] {
                // Beside one that could go at any time: what is decided for a batch as a whole is decided right.
                let name = format!("{send_at:?}{expires_at:?}").replace(['(', ')'], "-");
                let beside = request(&epoch, owner, &format!("{name}beside"));
                let mut timed = request(&epoch, owner, &name);
                timed.send_at = send_at.map(hours);
                timed.expires_at = expires_at.map(hours);
                let answers = world.ledger.admit(&[beside, timed]).await.unwrap();
                assert!(
                    matches!(answers[0], Admitted::Go(_)),
                    "{owner} {name}: {answers:?}"
                );
                let answer = format!("{:?}", answers[1]);
                assert!(answer.starts_with(expected), "{owner} {name}: {answer}");
            }
        }
        assert_eq!(world.used("limited/main").await, 6 + 3);
    })
    .await;
}

#[tokio::test]
async fn a_job_queues_behind_those_that_keep_their_order_at_its_level_or_a_more_urgent_one() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "busy", WaitReason::Busy).await;
        let at = |id: &str, level| {
            let mut request = request(&epoch, "acme", id);
            request.level = level;
            request
        };
        assert!(matches!(
            world.admit_one(at("same", Level::Medium)).await,
            Admitted::Behind(_)
        ));
        assert!(matches!(
            world.admit_one(at("less", Level::Low)).await,
            Admitted::Behind(_)
        ));
        assert!(matches!(
            world.admit_one(at("more", Level::High)).await,
            Admitted::Go(_)
        ));
        assert!(matches!(
            world.admit_one(request(&epoch, "other", "1")).await,
            Admitted::Go(_)
        ));
        // Those that wait for their own time stand in nobody's way.
        world.parked(&epoch, "patient", "retry", WaitReason::Retry).await;
        assert!(matches!(
            world.admit_one(request(&epoch, "patient", "2")).await,
            Admitted::Go(_)
        ));
    })
    .await;
}

#[tokio::test]
async fn a_known_job_is_answered_by_its_state() {
    in_world(|world| async move {
        let (epoch, other) = (world.epoch().await, world.epoch().await);
        let again = |id: &str| request(&other, "acme", id);

        let row = world.go(request(&epoch, "acme", "leased")).await;
        assert!(matches!(
            world.admit_one(again("leased")).await,
            Admitted::InFlight
        ));
        // Another claim of the very same worker is somebody else too.
        assert!(matches!(
            world.admit_one(request(&epoch, "acme", "leased")).await,
            Admitted::InFlight
        ));
        world
            .run(&format!(
                "UPDATE {{s}}.worker SET dead = true WHERE epoch = {}",
                epoch.number()
            ))
            .await;
        assert!(
            matches!(world.admit_one(again("leased")).await, Admitted::InFlight),
            "until it is taken over"
        );

        world.parked(&epoch, "acme", "waiting", WaitReason::Retry).await;
        assert!(matches!(
            world.admit_one(again("waiting")).await,
            Admitted::Waiting
        ));

        let held = world.go(request(&epoch, "acme", "held")).await;
        let outcome = Next::Hold {
            body: Some(super::world::body()),
        };
        assert_eq!(
            world.settle_one(settlement(&held, outcome)).await,
            Settled::Written
        );
        assert!(matches!(world.admit_one(again("held")).await, Admitted::Held));

        assert_eq!(
            world.settle_one(done(&row, ReportType::Sent)).await,
            Settled::Written
        );
        assert!(matches!(world.admit_one(again("leased")).await, Admitted::Done));
    })
    .await;
}

#[tokio::test]
async fn other_content_under_a_known_id_is_a_conflict_whatever_became_of_the_first() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let changed = |id: &str| {
            let mut request = request(&epoch, "acme", id);
            request.digest = [8; 32];
            request
        };
        let row = world.go(request(&epoch, "acme", "1")).await;
        assert!(matches!(world.admit_one(changed("1")).await, Admitted::Conflict));
        world.settle_one(settlement(&row, Next::GiveBack)).await;
        assert!(matches!(world.admit_one(changed("1")).await, Admitted::Conflict));
        assert_eq!(world.state("acme", "1").await, 0);
        let row = world.go(request(&epoch, "acme", "1")).await;
        world.settle_one(done(&row, ReportType::Failed)).await;
        assert!(matches!(world.admit_one(changed("1")).await, Admitted::Conflict));
        world.parked(&epoch, "acme", "2", WaitReason::Retry).await;
        assert!(matches!(world.admit_one(changed("2")).await, Admitted::Conflict));
    })
    .await;
}

#[tokio::test]
async fn an_open_job_is_claimed_again_as_its_new_delivery_says() {
    in_world(|world| async move {
        let (epoch, other) = (world.epoch().await, world.epoch().await);
        let give_back = async |id: &str| {
            let row = world.go(request(&epoch, "acme", id)).await;
            assert_eq!(
                world.settle_one(settlement(&row, Next::GiveBack)).await,
                Settled::Written
            );
            row
        };
        let first = give_back("1").await;
        let mut again = request(&other, "acme", "1");
        again.account = account("acme/second");
        let row = world.go(again).await;
        assert_eq!(
            (row.born, row.created),
            (first.born, first.created),
            "its identity stays"
        );
        assert_eq!(row.slot, None, "to be taken");
        assert_eq!(
            world.column("acme", "1", "account").await.as_deref(),
            Some("acme/second")
        );

        give_back("2").await;
        let mut late = request(&other, "acme", "2");
        late.expires_at = Some(hours(-1));
        assert!(matches!(world.admit_one(late).await, Admitted::Expired(_)));

        give_back("3").await;
        let mut early = request(&other, "acme", "3");
        early.send_at = Some(hours(1));
        let answer = world.admit_one(early).await;
        assert!(
            matches!(
                answer,
                Admitted::Wait {
                    reason: WaitReason::Schedule,
                    ..
                }
            ),
            "{answer:?}"
        );

        give_back("4").await;
        let mut busy = request(&other, "acme", "4");
        busy.want = Want::Park;
        let answer = world.admit_one(busy).await;
        assert!(
            matches!(
                answer,
                Admitted::Wait {
                    reason: WaitReason::Busy,
                    ..
                }
            ),
            "{answer:?}"
        );
    })
    .await;
}

#[tokio::test]
async fn a_repeated_statement_gets_its_own_answer_again() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let mut early = request(&epoch, "acme", "early");
        early.send_at = Some(hours(1));
        let mut late = request(&epoch, "acme", "late");
        late.expires_at = Some(hours(-1));
        world
            .ledger
            .cancel(&tenant("acme"), &job("cancelled"))
            .await
            .unwrap();
        let batch = [
            request(&epoch, "acme", "go"),
            early,
            late,
            request(&epoch, "acme", "cancelled"),
        ];
        for turn in 0..3 {
            let answers = world.ledger.admit(&batch).await.unwrap();
            assert!(matches!(answers[0], Admitted::Go(_)), "{turn}: {answers:?}");
            assert!(
                matches!(
                    answers[1],
                    Admitted::Wait {
                        reason: WaitReason::Schedule,
                        ..
                    }
                ),
                "{turn}: {answers:?}"
            );
            assert!(matches!(answers[2], Admitted::Expired(_)), "{turn}: {answers:?}");
            assert!(
                matches!(answers[3], Admitted::Cancelled(_)),
                "{turn}: {answers:?}"
            );
        }
    })
    .await;
}

#[tokio::test]
async fn a_slot_granted_by_an_answer_that_got_lost_goes_back_when_the_next_is_taken() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(1, 60_000_000, "messages")]).await;
        let request = request(&epoch, "acme", "1");
        assert!(world.go(request.clone()).await.slot.is_some());
        let row = world.go(request).await;
        assert_eq!(row.slot, None, "its validity is not known any more");
        let again = SlotRequest {
            tenant: row.tenant.clone(),
            id: row.id.clone(),
            lease: row.lease.clone(),
            account: row.account.clone(),
            recipients: 1,
            keep: false,
        };
        let answer = world.ledger.take_slots(&[again]).await.unwrap().remove(0);
        assert!(matches!(answer, SlotAnswer::Granted(_)), "{answer:?}");
        assert_eq!(world.used("acme/main").await, 1);
    })
    .await;
}

#[tokio::test]
async fn of_equal_ids_in_several_workers_exactly_one_goes_and_the_slots_of_the_others_go_back() {
    in_world(|world| async move {
        world
            .limit("acme/main", &[(100_000, 60_000_000, "messages")])
            .await;
        let mut workers = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let world = world.clone();
            workers.spawn(async move {
                let epoch = world.epoch().await;
                let mut won = 0;
                for round in 0..20 {
                    let batch: Vec<_> = (0..20)
                        .map(|n| request(&epoch, "acme", &format!("{round}-{n}")))
                        .collect();
                    for answer in world.ledger.admit(&batch).await.unwrap() {
                        match answer {
                            Admitted::Go(_) => won += 1,
                            Admitted::InFlight => {}
                            other => panic!("{other:?}"),
                        }
                    }
                }
                won
            });
        }
        let won: Vec<i32> = workers.join_all().await;
        assert_eq!(won.iter().sum::<i32>(), 400, "{won:?}");
        assert_eq!(world.used("acme/main").await, 400);
    })
    .await;
}

#[tokio::test]
async fn the_more_urgent_of_a_batch_get_the_last_slots() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(1, 60_000_000, "messages")]).await;
        let mut batch = vec![
            request(&epoch, "acme", "low"),
            request(&epoch, "acme", "immediate"),
        ];
        batch[0].level = Level::Low;
        batch[1].level = Level::Immediate;
        let answers = world.ledger.admit(&batch).await.unwrap();
        assert!(matches!(answers[0], Admitted::Wait { .. }), "{answers:?}");
        assert!(matches!(answers[1], Admitted::Go(_)), "{answers:?}");
    })
    .await;
}

#[tokio::test]
async fn a_body_is_absorbed_only_where_the_ledger_takes_it_over() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "leased")).await;
        let open = world.go(request(&epoch, "acme", "open")).await;
        world.settle_one(settlement(&open, Next::GiveBack)).await;
        world.parked(&epoch, "acme", "waiting", WaitReason::Retry).await;
        let over = world.go(request(&epoch, "acme", "over")).await;
        world.settle_one(done(&over, ReportType::Sent)).await;
        let batch = ["waiting", "unknown", "open", "leased", "over"].map(|id| absorb("acme", id));
        assert_eq!(
            world.ledger.absorb(&batch).await.unwrap(),
            [true, false, false, true, true]
        );
        assert_eq!(
            world.column("acme", "over", "body").await,
            None,
            "bodies end with the outcome"
        );

        // A job given back whose body is here waits here; nothing widens what is there already.
        let mut second = absorb("acme", "leased");
        second.body = bytes::Bytes::from_static(b"other");
        assert_eq!(world.ledger.absorb(&[second]).await.unwrap(), [true]);
        assert_eq!(
            world.settle_one(settlement(&row, Next::GiveBack)).await,
            Settled::Written
        );
        assert_eq!(world.state("acme", "leased").await, 2);
        let released = world.release(&epoch, Level::Medium, 10).await;
        let bodies: Vec<_> = released
            .iter()
            .filter(|r| r.row.id == job("leased"))
            .map(|r| &r.body)
            .collect();
        assert_eq!(bodies, [b"{}".as_slice()]);
    })
    .await;
}

#[tokio::test]
async fn a_job_may_not_wait_without_its_body() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let mut bare = park(&row, WaitReason::Retry, Duration::ZERO);
        bare.next = Next::Park {
            reason: WaitReason::Retry,
            delay: Duration::ZERO,
            body: None,
        };
        let error = world.ledger.settle(&[bare]).await.unwrap_err();
        assert!(error.is_row_fault(), "{error}");
        assert_eq!(world.state("acme", "1").await, 1);
    })
    .await;
}
