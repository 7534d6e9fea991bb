//! Outcomes, reports, and what happens to statements that come twice or too late.

use std::time::Duration;

use super::world::{body, done, in_world, job, park, report, request, result, settlement, tenant};
use crate::ledger::WaitReason;
use crate::ledger::odd::Cancel;
use crate::ledger::outbox::ReportKey;
use crate::ledger::settle::{Next, Settled};
use crate::level::Level;
use crate::report::{RecipientStatus, ReportType};

fn key(id: &str, sequence: i64) -> ReportKey {
    ReportKey {
        tenant: tenant("acme"),
        id: job(id),
        sequence,
    }
}

#[tokio::test]
async fn an_outcome_drops_the_body_and_leaves_its_report_in_the_outbox() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "1", WaitReason::Retry).await;
        let row = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        let mut sent = done(&row, ReportType::Sent);
        sent.attempts = 1;
        sent.message_id = Some("<1@acme>".to_owned());
        sent.recipients = Some(vec![result("a@b.example", RecipientStatus::Accepted)]);
        assert_eq!(world.settle_one(sent).await, Settled::Written);
        for (column, value) in [
            ("state", Some("3")),
            ("outcome", Some("mail.sent")),
            ("attempt", Some("1")),
            ("body", None),
            ("body_size", None),
            ("due_at", None),
            ("reason", None),
            ("message_id", Some("<1@acme>")),
            ("cardinality(outbox)", Some("1")),
            ("(seq - born)", Some("1")),
        ] {
            assert_eq!(
                world.column("acme", "1", column).await.as_deref(),
                value,
                "{column}"
            );
        }
        assert_eq!(
            world.ledger.forget_old(Duration::ZERO, 10).await.unwrap(),
            0,
            "a report is owed"
        );
        world
            .ledger
            .clear_outbox(&[key("1", row.sequence + 1)])
            .await
            .unwrap();
        assert_eq!(
            world
                .ledger
                .forget_old(Duration::from_hours(1), 10)
                .await
                .unwrap(),
            0,
            "too young"
        );
        assert_eq!(world.ledger.forget_old(Duration::ZERO, 10).await.unwrap(), 1);
    })
    .await;
}

#[tokio::test]
async fn clearing_removes_exactly_the_published_report() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let mut deferred = park(&row, WaitReason::Retry, Duration::ZERO);
        deferred.report = Some(report(&row, ReportType::Deferred));
        world.settle_one(deferred).await;
        let row = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        world.settle_one(done(&row, ReportType::Sent)).await;
        let (first, second) = (row.born + 1, row.born + 2);
        assert_eq!(
            world.column("acme", "1", "outbox_seq").await,
            Some(format!("{{{first},{second}}}"))
        );
        // Twice, and one that was never there.
        for _ in 0..2 {
            world
                .ledger
                .clear_outbox(&[key("1", first), key("1", 7), key("none", first)])
                .await
                .unwrap();
            assert_eq!(
                world.column("acme", "1", "outbox_seq").await,
                Some(format!("{{{second}}}"))
            );
        }
        world
            .run("UPDATE {s}.job SET outbox_at = clock_timestamp()")
            .await;
        let owed = world
            .ledger
            .owed_reports(10, Duration::from_mins(1))
            .await
            .unwrap();
        assert_eq!(owed.len(), 1);
        assert_eq!(owed[0].reports[0].0, second);
        assert!(owed[0].reports[0].1.contains("mail.sent"));
        assert!(
            world
                .ledger
                .owed_reports(10, Duration::from_mins(1))
                .await
                .unwrap()
                .is_empty(),
            "leased"
        );
        world.ledger.clear_outbox(&[key("1", second)]).await.unwrap();
        assert_eq!(world.column("acme", "1", "outbox").await, None);
        assert_eq!(world.column("acme", "1", "outbox_at").await, None);
    })
    .await;
}

#[tokio::test]
async fn a_settlement_repeated_after_a_lost_commit_is_written_once() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(10, 60_000_000, "messages")]).await;
        world.go(request(&epoch, "acme", "other")).await;
        let rows = [
            world.go(request(&epoch, "acme", "done")).await,
            world.go(request(&epoch, "acme", "park")).await,
            world.go(request(&epoch, "acme", "back")).await,
            world.go(request(&epoch, "acme", "hold")).await,
        ];
        let mut batch = vec![
            done(&rows[0], ReportType::Failed),
            park(&rows[1], WaitReason::Busy, Duration::ZERO),
            settlement(&rows[2], Next::GiveBack),
            settlement(&rows[3], Next::Hold { body: Some(body()) }),
        ];
        for settlement in &mut batch {
            settlement.refund = true;
        }
        for _ in 0..3 {
            assert_eq!(world.ledger.settle(&batch).await.unwrap(), [Settled::Written; 4]);
        }
        assert_eq!(world.used("acme/main").await, 1, "each slot went back once");
        assert_eq!(
            world
                .column("acme", "done", "cardinality(outbox)")
                .await
                .as_deref(),
            Some("1")
        );
        assert_eq!(world.fifo("acme/main", Level::Medium, "acme").await, Some(1));
        assert_eq!(
            [
                world.state("acme", "done").await,
                world.state("acme", "park").await
            ],
            [3, 2]
        );
        assert_eq!(
            [
                world.state("acme", "back").await,
                world.state("acme", "hold").await
            ],
            [0, 4]
        );
    })
    .await;
}

#[tokio::test]
async fn two_copies_of_a_settlement_at_once_give_its_slot_back_once() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.limit("acme/main", &[(100, 60_000_000, "messages")]).await;
        for n in 0..30 {
            let used = world.go(request(&epoch, "acme", &format!("used{n}"))).await;
            let row = world.go(request(&epoch, "acme", &format!("{n}"))).await;
            drop(used);
            let mut back = settlement(&row, Next::GiveBack);
            back.refund = true;
            let copies = [(); 4].map(|()| world.settle_one(back.clone()));
            let answers = futures_util::future::join_all(copies).await;
            assert_eq!(answers, [Settled::Written; 4]);
            assert_eq!(world.used("acme/main").await, n + 1);
        }
    })
    .await;
}

#[tokio::test]
async fn a_slot_goes_back_once_though_a_cancel_refuses_the_first_settlement() {
    in_world(|world| async move {
        world.limit("acme/main", &[(5, 3_600_000_000, "messages")]).await;
        let epoch = world.epoch().await;
        world.go(request(&epoch, "acme", "sent")).await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        world.ledger.cancel(&row.tenant, &row.id).await.unwrap();
        let mut back = settlement(&row, Next::GiveBack);
        back.refund = true;
        assert_eq!(world.settle_one(back).await, Settled::Cancelled);
        assert_eq!(world.used("acme/main").await, 2);
        let mut cancelled = done(&row, ReportType::Cancelled);
        cancelled.refund = true;
        assert_eq!(world.settle_one(cancelled).await, Settled::Written);
        assert_eq!(world.used("acme/main").await, 1);
    })
    .await;
}

#[tokio::test]
async fn whoever_lost_the_lease_writes_nothing() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        let row = world.go(request(&old, "acme", "1")).await;
        world.silence(&old).await;
        world.ledger.takeover(&new, Duration::from_mins(1)).await.unwrap();
        let settlements = |row| {
            [
                done(row, ReportType::Failed),
                park(row, WaitReason::Retry, Duration::ZERO),
                settlement(row, Next::GiveBack),
                settlement(row, Next::Hold { body: Some(body()) }),
            ]
        };
        // Open, leased by another, over.
        for (n, late) in settlements(&row).into_iter().enumerate() {
            assert_eq!(world.settle_one(late).await, Settled::LeaseLost, "open {n}");
        }
        assert_eq!(world.state("acme", "1").await, 0);
        let owner = world.go(request(&new, "acme", "1")).await;
        for (n, late) in settlements(&row).into_iter().enumerate() {
            assert_eq!(world.settle_one(late).await, Settled::LeaseLost, "leased {n}");
        }
        assert_eq!(
            world.settle_one(done(&owner, ReportType::Sent)).await,
            Settled::Written
        );
        for (n, late) in settlements(&row).into_iter().enumerate() {
            assert_eq!(world.settle_one(late).await, Settled::LeaseLost, "over {n}");
        }
        assert_eq!(
            world.column("acme", "1", "outcome").await.as_deref(),
            Some("mail.sent")
        );
        assert_eq!(
            world.column("acme", "1", "cardinality(outbox)").await.as_deref(),
            Some("1")
        );
        // A job that nobody knows.
        world.run("DELETE FROM {s}.job").await;
        assert_eq!(
            world.settle_one(done(&row, ReportType::Sent)).await,
            Settled::LeaseLost
        );
    })
    .await;
}

#[tokio::test]
async fn a_cancel_in_flight_stops_everything_but_an_outcome() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let cancel = world.ledger.cancel(&row.tenant, &row.id).await.unwrap();
        assert_eq!(cancel, Cancel::InFlight);
        let late = park(&row, WaitReason::Retry, Duration::ZERO);
        assert_eq!(world.settle_one(late).await, Settled::Cancelled);
        assert_eq!(
            world.settle_one(settlement(&row, Next::GiveBack)).await,
            Settled::Cancelled
        );
        assert_eq!(world.state("acme", "1").await, 1);
        assert_eq!(
            world.settle_one(done(&row, ReportType::Cancelled)).await,
            Settled::Written
        );
        assert_eq!(
            world.ledger.cancel(&row.tenant, &row.id).await.unwrap(),
            Cancel::TooLate
        );

        // Nobody knows whether this one went out: that is not "cancelled".
        let row = world.go(request(&epoch, "acme", "2")).await;
        world.ledger.cancel(&row.tenant, &row.id).await.unwrap();
        let hold = settlement(&row, Next::Hold { body: Some(body()) });
        assert_eq!(world.settle_one(hold).await, Settled::Written);
        assert_eq!(world.state("acme", "2").await, 4);
    })
    .await;
}

#[tokio::test]
async fn a_job_parked_again_over_a_limit_and_one_given_back_keep_their_places() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        for id in ["1", "2", "3"] {
            world.parked(&epoch, "acme", id, WaitReason::Busy).await;
        }
        for back in [true, false] {
            let row = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
            assert_eq!(row.id, job("1"));
            let next = if back {
                settlement(&row, Next::GiveBack)
            } else {
                park(&row, WaitReason::Rate, Duration::ZERO)
            };
            assert_eq!(world.settle_one(next).await, Settled::Written);
            world.assert_lanes_are_right().await;
        }
        let order: Vec<_> = world
            .release(&epoch, Level::Medium, 3)
            .await
            .into_iter()
            .map(|r| r.row.id.to_string())
            .collect();
        assert_eq!(order, ["1", "2", "3"]);
    })
    .await;
}

#[tokio::test]
async fn an_attempts_results_and_delay_come_back_with_the_job() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let mut retry = park(&row, WaitReason::Retry, Duration::from_millis(300));
        retry.attempts = 1;
        retry.error = Some("451 later".to_owned());
        retry.recipients = Some(vec![
            result("a@b.example", RecipientStatus::Accepted),
            result("c@d.example", RecipientStatus::Deferred),
        ]);
        world.settle_one(retry.clone()).await;
        assert!(
            world.release(&epoch, Level::Medium, 1).await.is_empty(),
            "not yet"
        );
        let mut released = Vec::new();
        super::world::until("the retry is due", async || {
            released = world.release(&epoch, Level::Medium, 1).await;
            !released.is_empty()
        })
        .await;
        assert_eq!(released[0].row.attempts, 1);
        assert_eq!(Some(&released[0].row.recipients), retry.recipients.as_ref());
        assert_eq!(released[0].reason, Some(WaitReason::Retry));
        assert_eq!(
            released[0].row.slot.map(|slot| slot.recipients),
            Some(1),
            "only what is open is paid for"
        );
    })
    .await;
}

#[tokio::test]
async fn the_beginning_of_the_final_write_is_marked_only_under_the_lease() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        let lost = world.go(request(&old, "acme", "lost")).await;
        world.silence(&old).await;
        world.ledger.takeover(&new, Duration::from_mins(1)).await.unwrap();
        let kept = world.go(request(&old, "acme", "kept")).await;
        assert_eq!(
            world.ledger.mark_data(&[lost, kept]).await.unwrap(),
            [false, true]
        );
        assert_eq!(world.column("acme", "kept", "phase").await.as_deref(), Some("1"));
    })
    .await;
}
