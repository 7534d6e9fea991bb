//! Outcomes, reports, and what happens to statements that come twice or too late.

use std::time::Duration;

use super::world::{World, body, done, in_world, job, park, report, request, result, settlement};
use crate::ledger::WaitReason;
use crate::ledger::batches::Batches;
use crate::ledger::odd::{Cancel, Decision, Resolved};
use crate::ledger::outbox::{Backlog, ReportNumber};
use crate::ledger::settle::{Next, Settled};
use crate::level::Level;
use crate::report::{RecipientStatus, ReportMessage, ReportType};

#[tokio::test]
async fn an_outcome_drops_the_body_and_leaves_its_report_in_the_outbox() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "1", WaitReason::Retry).await;
        let row = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        let mut sent = done(&row, ReportType::Sent);
        sent.attempts = 1;
        sent.message_id = Some("<1@acme>".into());
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
            ("(seq - born)", Some("1")),
        ] {
            assert_eq!(
                world.column("acme", "1", column).await.as_deref(),
                value,
                "{column}"
            );
        }
        assert_eq!(world.owed("1").await[0].1, row.sequence + 1);
        assert_eq!(
            world.ledger.forget_old(Duration::from_hours(1)).await.unwrap(),
            0,
            "too young"
        );
        assert_eq!(world.ledger.forget_old(Duration::ZERO).await.unwrap(), 1);
        assert_eq!(world.owed("1").await.len(), 1, "what it owes stays owed");
    })
    .await;
}

#[tokio::test]
async fn everything_old_is_forgotten_at_once_and_nothing_else() {
    in_world(|world| async move {
        // More than one statement deletes, many of the same moment, and what is not final.
        world
            .run(
                "INSERT INTO {s}.job (tenant, id, state, level, account, digest, born, seq, created_at, updated_at, finished_at)
                     SELECT 'acme', 'old' || i, (ARRAY[3, 5, 6])[1 + i % 3], 1, 'acme/main', '', 0, 0, now(), now(),
                            now() - interval '2 hours' + i / 100 * interval '1 second'
                     FROM generate_series(1, 4500) i;
                 INSERT INTO {s}.job (tenant, id, state, level, account, digest, born, seq, created_at, updated_at, finished_at)
                     SELECT 'acme', 'young' || i, 3, 1, 'acme/main', '', 0, 0, now(), now(), now() FROM generate_series(1, 50) i;
                 INSERT INTO {s}.job (tenant, id, state, level, account, digest, born, seq, created_at, updated_at)
                     VALUES ('acme', 'held', 4, 1, 'acme/main', '', 0, 0, now() - interval '1 day', now() - interval '1 day')",
            )
            .await;
        let forgotten = world.ledger.forget_old(Duration::from_hours(1)).await.unwrap();
        assert_eq!(forgotten, 4500);
        let left: Vec<String> = world
            .one("SELECT array_agg(DISTINCT rtrim(id, '0123456789') ORDER BY rtrim(id, '0123456789')) FROM {s}.job")
            .await;
        assert_eq!(left, ["held", "young"]);
        assert_eq!(world.one::<i64>("SELECT count(*) FROM {s}.job").await, 51);
    })
    .await;
}

#[tokio::test]
async fn clearing_removes_exactly_the_published_report() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let mut deferred = park(&row, WaitReason::Retry, Duration::ZERO);
        deferred.report = Some(report(&row, ReportType::Deferred).into());
        world.settle_one(deferred).await;
        let row = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        world.settle_one(done(&row, ReportType::Sent)).await;
        let (first, second) = (row.born + 1, row.born + 2);
        let owed = world.owed("1").await;
        assert_eq!((owed[0].1, owed[1].1, owed.len()), (first, second, 2));
        // Twice, and one that was never there.
        for _ in 0..2 {
            world
                .ledger
                .clear_outbox(&[owed[0].0, ReportNumber(1 << 40)])
                .await
                .unwrap();
            assert_eq!(world.owed("1").await, owed[1..]);
        }
        world.ledger.clear_outbox(&[owed[1].0]).await.unwrap();
        assert_eq!(world.owed("1").await, []);
    })
    .await;
}

#[tokio::test]
async fn of_a_settlement_that_cannot_be_written_as_it_is_who_has_the_mail_is_kept() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let mut deferred = park(&row, WaitReason::Retry, Duration::ZERO);
        let mut accepted = result("ann@example.org", RecipientStatus::Accepted);
        accepted.text = Some("taken\0".into());
        let open = result("bob@example.org", RecipientStatus::Deferred);
        deferred.recipients = Some(vec![accepted, open]);
        let (_, answer) = Batches::new(&world.ledger).settle(deferred).await;
        assert_eq!(answer.settled, Settled::Written);
        let row = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        let left: Vec<_> = row.recipients.iter().map(|r| (&*r.address, r.status)).collect();
        assert_eq!(
            left,
            [
                ("ann@example.org", RecipientStatus::Accepted),
                ("bob@example.org", RecipientStatus::Deferred)
            ]
        );
    })
    .await;
}

#[tokio::test]
async fn nothing_is_committed_without_the_disk_but_what_may_happen_twice() {
    in_world(|world| async move {
        let client = world.holding("SELECT {s}.clear_outbox_v1('{}')").await;
        let setting = "SELECT current_setting('synchronous_commit')";
        let cleared: String = client.query_one(setting, &[]).await.unwrap().get(0);
        client.batch_execute("COMMIT").await.unwrap();
        let after: String = client.query_one(setting, &[]).await.unwrap().get(0);
        assert_eq!((cleared.as_str(), after.as_str()), ("off", "on"));
        let hurried: Vec<String> = world
            .one(
                "SELECT array_agg(proname::text ORDER BY proname) FROM pg_proc
                 WHERE pronamespace = '{s}'::regnamespace AND prosrc LIKE '%synchronous_commit%'",
            )
            .await;
        assert_eq!(
            hurried,
            ["clear_outbox_v1", "outbox_backlog_v1", "webhook_lease_v1"]
        );
    })
    .await;
}

#[tokio::test]
async fn overdue_reports_are_taken_in_their_order_and_rest_for_a_while() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let mut deferred = park(&row, WaitReason::Retry, Duration::ZERO);
        deferred.report = Some(report(&row, ReportType::Deferred).into());
        world.settle_one(deferred).await;
        let row = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        world.settle_one(done(&row, ReportType::Sent)).await;
        let take = async || {
            world
                .ledger
                .owed_reports(10, Duration::from_mins(1))
                .await
                .unwrap()
        };
        assert!(take().await.is_empty(), "its worker may be publishing them");
        world
            .run("UPDATE {s}.outbox SET due_at = clock_timestamp()")
            .await;
        let owed = take().await;
        let stored = world.owed("1").await;
        for (owed, (number, sequence, text)) in owed.iter().zip(&stored) {
            assert_eq!(
                (owed.number, owed.sequence, &owed.json),
                (*number, *sequence, text)
            );
        }
        assert_eq!((owed.len(), stored.len()), (2, 2));
        assert!(owed[0].json.contains("mail.deferred") && owed[1].json.contains("mail.sent"));
        assert!(take().await.is_empty(), "leased");
        world.ledger.leave_reports(&[owed[1].number]).await.unwrap();
        let again: Vec<_> = take().await.iter().map(|owed| owed.number).collect();
        assert_eq!(again, [owed[1].number], "left to whoever comes first");
    })
    .await;
}

#[tokio::test]
async fn the_backlog_of_reports_has_the_age_of_the_oldest_also_while_somebody_has_taken_it() {
    in_world(|world| async move {
        let backlog = async |most| {
            world
                .run("UPDATE {s}.outbox_census SET next_at = '-infinity'")
                .await;
            world.ledger.outbox_backlog(most, Duration::ZERO).await.unwrap()
        };
        assert_eq!(backlog(10).await, Backlog::default());
        let epoch = world.epoch().await;
        for id in ["1", "2"] {
            let row = world.go(request(&epoch, "acme", id)).await;
            world.settle_one(done(&row, ReportType::Sent)).await;
        }
        assert_eq!(backlog(10).await.owed, 2);
        assert!(backlog(10).await.oldest < Duration::from_secs(9));
        world
            .run(
                "UPDATE {s}.outbox SET due_at = clock_timestamp(), created_at = clock_timestamp() - interval '9 s'
                 WHERE id = '1'",
            )
            .await;
        for taken in [1, 0] {
            let owed = world.ledger.owed_reports(10, Duration::from_mins(1)).await;
            assert_eq!(owed.unwrap().len(), taken);
            let oldest = backlog(10).await.oldest;
            assert!(oldest >= Duration::from_secs(9), "{oldest:?}");
        }
    })
    .await;
}

/// Puts this many reports into the outbox.
async fn owe(world: &World, reports: i64) {
    let sql = format!(
        "INSERT INTO {{s}}.outbox (tenant, id, seq, due_at, created_at, body)
         SELECT 'acme', 'owed', i, now(), now(), '{{}}' FROM generate_series(1, {reports}) i"
    );
    world.run(&sql).await;
}

#[tokio::test]
async fn the_backlog_is_counted_again_within_seconds_however_long_it_took_and_whatever_the_clock_did() {
    in_world(|world| async move {
        let long = Duration::from_hours(1);
        let backlog = async || world.ledger.outbox_backlog(10, long).await.unwrap().owed;
        assert_eq!(backlog().await, 0);
        owe(&world, 1).await;
        assert_eq!(backlog().await, 0, "as it was counted last");
        let ahead: f64 = world
            .one("SELECT extract(epoch FROM next_at - clock_timestamp())::float8 FROM {s}.outbox_census")
            .await;
        assert!(ahead <= 10.0, "{ahead} s");
        world
            .run("UPDATE {s}.outbox_census SET next_at = clock_timestamp() + interval '1 hour'")
            .await;
        assert_eq!(backlog().await, 1, "the clock was set back");
    })
    .await;
}

#[tokio::test]
async fn a_worker_with_a_higher_limit_does_not_get_what_one_with_a_lower_has_counted() {
    in_world(|world| async move {
        owe(&world, 3).await;
        let long = Duration::from_hours(1);
        for (most, owed) in [(2, 2), (9, 3)] {
            let backlog = world.ledger.outbox_backlog(most, long).await.unwrap();
            assert_eq!(backlog.owed, owed);
        }
        world
            .run("UPDATE {s}.outbox_census SET next_at = '-infinity'")
            .await;
        for most in [2, 9] {
            let backlog = world.ledger.outbox_backlog(most, long).await.unwrap();
            assert_eq!(backlog.owed, 3, "counted by the other for both");
        }
    })
    .await;
}

#[tokio::test]
async fn the_whole_outbox_is_searched_by_one_for_all_and_after_a_failure_not_at_once_again() {
    in_world(|world| async move {
        let every = Duration::from_mins(5);
        let searches = async || world.ledger.find_late_reports(every).await;
        let rename = async |from: &str, to: &str| {
            let sql = format!("ALTER FUNCTION {{s}}.{from}() RENAME TO {to}");
            world.run(&sql).await;
        };
        rename("outbox_search_v1", "away").await;
        searches().await.unwrap_err();
        searches().await.unwrap();
        rename("away", "outbox_search_v1").await;
        for whole_at in ["'-infinity'", "clock_timestamp() + interval '1 hour'"] {
            owe(&world, 1).await;
            let hidden = format!("UPDATE {{s}}.outbox_census SET first_n = 1000, whole_at = {whole_at}");
            world.run(&hidden).await;
            searches().await.unwrap();
            let first: i64 = world.one("SELECT first_n FROM {s}.outbox_census").await;
            assert_eq!(first, 1, "{whole_at}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_settlement_repeated_after_a_lost_commit_clears_its_report_by_its_number() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let rows = [
            world.go(request(&epoch, "acme", "1")).await,
            world.go(request(&epoch, "acme", "2")).await,
            world.go(request(&epoch, "acme", "3")).await,
        ];
        let first = [
            done(&rows[0], ReportType::Sent),
            done(&rows[1], ReportType::Failed),
        ];
        let written = world.ledger.settle(&first).await.unwrap();
        for (n, id) in ["1", "2"].iter().enumerate() {
            assert_eq!(written[n].report, Some(world.owed(id).await[0].0));
        }
        // The answer was lost, and another one is in the batch by now.
        let again = [
            done(&rows[2], ReportType::Sent),
            first[1].clone(),
            first[0].clone(),
        ];
        let repeated = world.ledger.settle(&again).await.unwrap();
        assert_eq!([repeated[1], repeated[2]], [written[1], written[0]]);
        assert_eq!(repeated[0].report, Some(world.owed("3").await[0].0));
        world
            .ledger
            .clear_outbox(&[repeated[2].report.unwrap()])
            .await
            .unwrap();
        assert_eq!(world.owed("1").await, []);
        assert_eq!((world.owed("2").await.len(), world.owed("3").await.len()), (1, 1));
    })
    .await;
}

#[tokio::test]
async fn a_repeated_settlement_is_not_told_the_number_of_another_report() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let mut deferred = park(&row, WaitReason::Retry, Duration::ZERO);
        deferred.report = Some(report(&row, ReportType::Deferred).into());
        let batch = [deferred];
        let written = world.ledger.settle(&batch).await.unwrap()[0];
        assert!(written.report.is_some());
        world.ledger.cancel(&row.tenant, &row.id).await.unwrap();
        let repeated = world.ledger.settle(&batch).await.unwrap()[0];
        assert_eq!((repeated.settled, repeated.report), (Settled::Written, None));
        assert_eq!(world.owed("1").await.len(), 2);

        // Without a report of its own there is none to be told of.
        let row = world.go(request(&epoch, "acme", "2")).await;
        let batch = [park(&row, WaitReason::Retry, Duration::ZERO)];
        for _ in 0..2 {
            let answer = world.ledger.settle(&batch).await.unwrap()[0];
            assert_eq!((answer.settled, answer.report), (Settled::Written, None));
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_published_is_what_was_stored() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let mut sent = done(&row, ReportType::Sent);
        let data = sent.report.as_mut().unwrap().data_mut();
        data.detail = Some("a detail".to_owned());
        let batch = [sent];
        world.ledger.settle(&batch).await.unwrap();
        let json = batch[0].report.as_ref().map(ReportMessage::json);
        assert_eq!(Some(world.owed("1").await[0].2.as_str()), json);
    })
    .await;
}

#[tokio::test]
async fn a_settlement_that_postgres_refuses_is_written_without_details_and_published_as_stored() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let mut sent = done(&row, ReportType::Sent);
        let mut foreign = result("a@b.example", RecipientStatus::Accepted);
        foreign.text = Some("\0".into());
        let data = sent.report.as_mut().unwrap().data_mut();
        data.detail = Some("a detail".to_owned());
        data.recipients = vec![foreign.clone()];
        sent.recipients = Some(vec![foreign]);
        let (_, answer) = Batches::new(&world.ledger).settle(sent).await;
        assert_eq!((answer.settled, answer.report), (Settled::Written, None));
        let (_, _, stored) = world.owed("1").await.remove(0);
        assert!(
            stored.contains("a@b.example") && !stored.contains("a detail"),
            "{stored}"
        );
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
            assert_eq!(world.settle(&batch).await, [Settled::Written; 4]);
        }
        assert_eq!(world.used("acme/main").await, 1, "each slot went back once");
        assert_eq!(world.owed("done").await.len(), 1);
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
        assert_eq!(world.owed("1").await.len(), 1);
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
async fn the_age_of_retries_counts_from_the_first_failure_and_anew_after_a_decision() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "1", WaitReason::Schedule).await;
        let turn = async || {
            super::world::until("it is due", async || {
                !world.ledger.due_levels().await.unwrap().is_empty()
            })
            .await;
            world.release(&epoch, Level::Medium, 1).await.remove(0).row
        };
        let row = turn().await;
        assert_eq!(row.tried, None, "it waited for its time");
        world
            .settle_one(park(&row, WaitReason::Retry, Duration::ZERO))
            .await;
        let row = turn().await;
        let first = row.tried.expect("it was tried");
        assert!(first > row.created);
        world
            .settle_one(park(&row, WaitReason::Retry, Duration::ZERO))
            .await;
        let row = turn().await;
        assert_eq!(row.tried, Some(first));
        world
            .settle_one(settlement(&row, Next::Hold { body: Some(body()) }))
            .await;
        let (owner, id) = (super::world::tenant("acme"), job("1"));
        let decided = world.ledger.resolve(&owner, &id, Decision::NotSent, "ann").await;
        assert_eq!(decided.unwrap(), Resolved::Done);
        assert_eq!(turn().await.tried, None);
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
