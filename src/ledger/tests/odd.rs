//! Cancels, releases by hand, late acceptances: in every state a job can be in.

use std::time::Duration;

use super::world::{World, body, done, in_world, job, park, request, result, settlement, tenant};
use crate::ledger::admit::Admitted;
use crate::ledger::odd::{Cancel, Decision, ManualRelease, Resolved};
use crate::ledger::settle::{Body, Next, Settled};
use crate::ledger::{Row, WaitReason};
use crate::level::Level;
use crate::report::RecipientStatus::{Accepted, Deferred, Pending, Refused};
use crate::report::{RecipientResult, ReportType};

async fn cancel(world: &World, id: &str) -> Cancel {
    world.ledger.cancel(&tenant("acme"), &job(id)).await.unwrap()
}

async fn by_hand(world: &World, id: &str) -> ManualRelease {
    world
        .ledger
        .release_by_hand(&tenant("acme"), &job(id))
        .await
        .unwrap()
}

async fn merge(world: &World, id: &str, results: &[RecipientResult]) -> bool {
    let (tenant, id) = (tenant("acme"), job(id));
    world
        .ledger
        .merge_acceptance(&tenant, &id, results, "<1@acme>", 1)
        .await
        .unwrap()
}

/// The reports owed for a job: (type, final, sequence above its birth).
async fn reports(world: &World, id: &str) -> Vec<(String, bool, i64)> {
    let born: i64 = world.column("acme", id, "born").await.unwrap().parse().unwrap();
    let owed = world.owed(id).await;
    owed.iter()
        .map(|(_, _, text)| {
            let report: serde_json::Value = serde_json::from_str(text).unwrap();
            (
                report["type"].as_str().unwrap().to_owned(),
                report["data"]["final"].as_bool().unwrap(),
                report["data"]["sequence"].as_i64().unwrap() - born,
            )
        })
        .collect()
}

async fn held(world: &World, id: &str) {
    let epoch = world.epoch().await;
    let row = world.go(request(&epoch, "acme", id)).await;
    let hold = settlement(&row, Next::Hold { body: Some(body()) });
    assert_eq!(world.settle_one(hold).await, Settled::Written);
}

#[tokio::test]
async fn a_cancel_before_the_job_comes_meets_it_at_the_door() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        assert_eq!(cancel(&world, "1").await, Cancel::Noted);
        assert_eq!(cancel(&world, "1").await, Cancel::Noted);
        let Admitted::Cancelled(row) = world.admit_one(request(&epoch, "acme", "1")).await else {
            panic!()
        };
        // Its worker dies before it can say so; the next one hears the same.
        world.settle_one(settlement(&row, Next::GiveBack)).await;
        world.run("UPDATE {s}.job SET state = 0").await;
        let Admitted::Cancelled(row) = world.admit_one(request(&epoch, "acme", "1")).await else {
            panic!()
        };
        assert_eq!(
            world.settle_one(done(&row, ReportType::Cancelled)).await,
            Settled::Written
        );
        assert_eq!(
            reports(&world, "1").await,
            [("mail.cancelled".to_owned(), true, 1)]
        );
        assert_eq!(world.ledger.forget_old(Duration::ZERO).await.unwrap(), 1);
        // Stones are cleared away in time.
        cancel(&world, "never").await;
        assert_eq!(world.ledger.forget_old(Duration::ZERO).await.unwrap(), 1);
    })
    .await;
}

#[tokio::test]
async fn a_cancel_ends_what_is_not_in_flight() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "busy", WaitReason::Busy).await;
        world.parked(&epoch, "acme", "retry", WaitReason::Retry).await;
        world.parked(&epoch, "acme", "stays", WaitReason::Busy).await;
        let mut low = request(&epoch, "acme", "low");
        low.level = Level::Low;
        let row = world.go(low).await;
        world
            .settle_one(park(&row, WaitReason::Busy, Duration::ZERO))
            .await;
        let open = world.go(request(&epoch, "acme", "open")).await;
        world.settle_one(settlement(&open, Next::GiveBack)).await;
        for id in ["busy", "retry", "open"] {
            assert_eq!(cancel(&world, id).await, Cancel::Cancelled, "{id}");
            assert_eq!(
                reports(&world, id).await,
                [("mail.cancelled".to_owned(), true, 1)],
                "{id}"
            );
            assert_eq!(world.column("acme", id, "body").await, None);
            assert_eq!(cancel(&world, id).await, Cancel::TooLate, "{id}");
        }
        assert!(matches!(
            world.admit_one(request(&epoch, "acme", "open")).await,
            Admitted::Done
        ));
        // Each lane has lost its own, and only those that were counted.
        assert_eq!(world.fifo("acme/main", Level::Medium, "acme").await, Some(1));
        assert_eq!(world.fifo("acme/main", Level::Low, "acme").await, Some(1));
        world.assert_lanes_are_right().await;
        assert_eq!(world.release(&epoch, Level::Medium, 9).await.len(), 1);
    })
    .await;
}

#[tokio::test]
async fn a_waiting_job_that_is_cancelled_reports_every_recipient() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let stored = r#"{"id": "1", "tenant": "acme", "to": "Ann <ann@example.org>", "cc": ["bob@example.org",
                         "ann@EXAMPLE.org"], "text": "Hello"}"#;
        for (id, bytes) in [("1", stored), ("unreadable", "{}")] {
            let row = world.go(request(&epoch, "acme", id)).await;
            let body = Some(Body {
                bytes: bytes.into(),
                ..body()
            });
            let (reason, delay) = (WaitReason::Schedule, Duration::from_hours(1));
            world
                .settle_one(settlement(&row, Next::Park { reason, delay, body }))
                .await;
            assert_eq!(cancel(&world, id).await, Cancel::Cancelled);
        }
        let report: serde_json::Value = serde_json::from_str(&world.owed("1").await[0].2).unwrap();
        assert_eq!(report["type"], "mail.cancelled");
        let pending = |address: &str| serde_json::json!({"address": address, "status": "pending"});
        let everybody = [pending("ann@example.org"), pending("bob@example.org")];
        assert_eq!(report["data"]["recipients"], serde_json::json!(everybody));
    })
    .await;
}

#[tokio::test]
async fn a_cancelled_job_that_somebody_has_got_already_was_sent() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.go(request(&epoch, "acme", "1")).await;
        let mut retry = park(&row, WaitReason::Retry, Duration::from_mins(1));
        retry.recipients = Some(vec![
            result("a@b.example", Accepted),
            result("c@d.example", Deferred),
        ]);
        world.settle_one(retry).await;
        assert_eq!(cancel(&world, "1").await, Cancel::Cancelled);
        assert_eq!(reports(&world, "1").await, [("mail.sent".to_owned(), true, 1)]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_that_races_with_admission_is_never_lost() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        for n in 0..60 {
            let id = format!("{n}");
            let both = tokio::join!(cancel(&world, &id), world.admit_one(request(&epoch, "acme", &id)));
            match both {
                (Cancel::Noted, Admitted::Cancelled(_)) => {}
                (Cancel::InFlight, Admitted::Go(row) | Admitted::Cancelled(row)) => {
                    let settled = world.settle_one(settlement(&row, Next::GiveBack)).await;
                    assert_eq!(settled, Settled::Cancelled);
                }
                other => panic!("{other:?}"),
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_job_to_be_held_is_held_although_an_acceptance_was_merged_under_its_lease() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let owner = world.go(request(&epoch, "acme", "1")).await;
        let mine = [result("a@b.example", Accepted), result("c@d.example", Deferred)];
        assert!(!merge(&world, "1", &mine).await);
        // It knows nothing of that, and not what became of its own mail.
        let mut uncertain = done(&owner, ReportType::Uncertain);
        uncertain.next = Next::Hold { body: Some(body()) };
        uncertain.recipients = Some(vec![
            result("a@b.example", Pending),
            result("c@d.example", Pending),
        ]);
        for _ in 0..2 {
            assert_eq!(world.settle_one(uncertain.clone()).await, Settled::Written);
        }
        assert_eq!(world.state("acme", "1").await, 4);
        assert_eq!(
            reports(&world, "1").await,
            [("mail.uncertain".to_owned(), false, 1)]
        );
        let (owner, id) = (tenant("acme"), job("1"));
        let resolved = world.ledger.resolve(&owner, &id, Decision::NotSent, "ann").await;
        assert_eq!(resolved.unwrap(), Resolved::Done);
        let row = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        let open: Vec<_> = row.recipients.iter().map(|r| r.status).collect();
        assert_eq!(
            open,
            [Accepted, Pending],
            "the one who has it does not get it again"
        );
    })
    .await;
}

/// Leased, while what an earlier owner's server took for the last of three recipients is merged. Its own attempt reaches
/// the first, and knows nothing of that.
async fn merged_beside_its_own(world: &World, id: &str) -> (Row, Vec<RecipientResult>) {
    const THREE: [&str; 3] = ["a@b.example", "c@d.example", "e@f.example"];
    let told = |statuses: [_; 3]| std::iter::zip(THREE, statuses).map(|(to, status)| result(to, status));
    let owner = world.go(request(&world.epoch().await, "acme", id)).await;
    let late: Vec<_> = told([Deferred, Deferred, Accepted]).collect();
    assert!(!merge(world, id, &late).await);
    (owner, told([Accepted, Pending, Pending]).collect())
}

/// What is known of each recipient.
async fn known(world: &World, id: &str) -> String {
    let statuses = "jsonb_path_query_array(recipients, '$[*].status')";
    world.column("acme", id, statuses).await.unwrap()
}

const ONE_IS_LEFT: &str = r#"["accepted", "pending", "accepted"]"#;

#[tokio::test]
async fn a_held_job_that_is_let_go_reaches_neither_whom_it_reached_itself_nor_whom_an_earlier_attempt_did() {
    in_world(|world| async move {
        let (owner, mine) = merged_beside_its_own(&world, "1").await;
        // The first transaction is answered, the second one breaks off.
        let mut uncertain = settlement(&owner, Next::Hold { body: Some(body()) });
        uncertain.recipients = Some(mine);
        assert_eq!(world.settle_one(uncertain).await, Settled::Written);
        assert_eq!(known(&world, "1").await, ONE_IS_LEFT);
        let (owner, id) = (tenant("acme"), job("1"));
        let resolved = world.ledger.resolve(&owner, &id, Decision::NotSent, "ann").await;
        assert_eq!(resolved.unwrap(), Resolved::Done);
        let epoch = world.epoch().await;
        let row = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        let statuses = row.recipients.iter().map(|r| r.status);
        assert_eq!(statuses.collect::<Vec<_>>(), [Accepted, Pending, Accepted]);
    })
    .await;
}

#[tokio::test]
async fn whom_an_attempt_reached_is_known_before_its_next_write_whatever_was_merged() {
    in_world(|world| async move {
        let (mut owner, mine) = merged_beside_its_own(&world, "1").await;
        owner.recipients = mine;
        assert_eq!(world.ledger.mark_data(&[owner]).await.unwrap(), [true]);
        assert_eq!(known(&world, "1").await, ONE_IS_LEFT);
    })
    .await;
}

#[tokio::test]
async fn an_outcome_that_an_acceptance_overtook_leaves_whom_it_reached_even_if_its_worker_then_dies() {
    in_world(|world| async move {
        let (owner, mine) = merged_beside_its_own(&world, "1").await;
        let mut retry = park(&owner, WaitReason::Retry, Duration::ZERO);
        retry.recipients = Some(mine.clone());
        assert_eq!(world.settle_one(retry).await, Settled::LeaseLost);
        assert_eq!(known(&world, "1").await, ONE_IS_LEFT);
        // Its worker lives, and says the same when somebody has the job who knows: that one's outcome stands.
        let next = world.go(request(&world.epoch().await, "acme", "1")).await;
        assert!(!merge(&world, "1", &mine).await);
        assert_eq!(
            world.settle_one(done(&next, ReportType::Sent)).await,
            Settled::Written
        );
    })
    .await;
}

#[tokio::test]
async fn what_may_have_been_sent_is_neither_cancelled_nor_let_go_without_a_decision() {
    in_world(|world| async move {
        held(&world, "held").await;
        assert_eq!(cancel(&world, "held").await, Cancel::Held);
        assert_eq!(by_hand(&world, "held").await, ManualRelease::Held);
        assert_eq!(world.state("acme", "held").await, 4);
        assert_eq!(reports(&world, "held").await, []);
        assert_eq!(
            world.column("acme", "held", "cancel").await.as_deref(),
            Some("false")
        );
    })
    .await;
}

#[tokio::test]
async fn only_what_waits_can_be_released_by_hand() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        assert_eq!(by_hand(&world, "none").await, ManualRelease::Unknown);
        let row = world.go(request(&epoch, "acme", "leased")).await;
        assert_eq!(by_hand(&world, "leased").await, ManualRelease::NotWaiting);
        world.settle_one(done(&row, ReportType::Sent)).await;
        assert_eq!(by_hand(&world, "leased").await, ManualRelease::NotWaiting);

        let row = world.go(request(&epoch, "acme", "waits")).await;
        world
            .settle_one(park(&row, WaitReason::Schedule, Duration::from_hours(9)))
            .await;
        world.parked(&epoch, "acme", "busy", WaitReason::Busy).await;
        world
            .run("UPDATE {s}.lane SET next_at = clock_timestamp() + interval '1 hour'")
            .await;
        for id in ["waits", "busy", "busy"] {
            assert_eq!(by_hand(&world, id).await, ManualRelease::Released, "{id}");
            world.assert_lanes_are_right().await;
        }
        assert_eq!(world.release(&epoch, Level::Medium, 9).await.len(), 2);
        // A held job that is to be sent again enters its lane anew; one that once waited for its turn is not counted there.
        for reason in ["NULL", "1"] {
            held(&world, reason).await;
            world
                .run(&format!(
                    "UPDATE {{s}}.job SET reason = {reason} WHERE id = '{reason}'"
                ))
                .await;
            let (owner, id) = (tenant("acme"), job(reason));
            let resolved = world.ledger.resolve(&owner, &id, Decision::NotSent, "ann").await;
            assert_eq!(resolved.unwrap(), Resolved::Done);
            world.assert_lanes_are_right().await;
        }
        assert_eq!(world.release(&epoch, Level::Medium, 9).await.len(), 2);
    })
    .await;
}

#[tokio::test]
async fn the_first_release_by_hand_of_a_waiting_job_is_noted() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "1", WaitReason::Schedule).await;
        let mut noted = Vec::new();
        for _ in 0..2 {
            assert_eq!(by_hand(&world, "1").await, ManualRelease::Released);
            let at = world.column("acme", "1", "properties->>'released_at'").await;
            noted.push(at.unwrap().parse::<jiff::Timestamp>().unwrap());
        }
        assert_eq!(noted[0], noted[1]);
        let released = world.release(&epoch, Level::Medium, 1).await.remove(0);
        assert!(noted[0] > released.row.created);
        assert_eq!(released.properties["recipients"], 1);
    })
    .await;
}

#[tokio::test]
async fn a_late_acceptance_of_all_recipients_ends_any_job_as_sent() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        let accepted = [result("a@b.example", Accepted)];
        let merge = async |id: &str| merge(&world, id, &accepted).await;
        let mut rows = Vec::new();
        for id in ["open", "waiting", "leased", "held", "over"] {
            rows.push(world.go(request(&old, "acme", id)).await);
        }
        world.silence(&old).await;
        world.ledger.takeover(&new, Duration::from_mins(1)).await.unwrap();
        world.parked(&new, "acme", "waiting", WaitReason::Busy).await;
        let owner = world.go(request(&new, "acme", "leased")).await;
        held(&world, "held").await;
        let over = world.go(request(&new, "acme", "over")).await;
        world.settle_one(done(&over, ReportType::Failed)).await;
        for id in ["open", "waiting", "leased", "held"] {
            assert!(!merge(id).await, "{id}");
            assert_eq!(
                reports(&world, id).await,
                [("mail.sent".to_owned(), true, 1)],
                "{id}"
            );
            assert_eq!(
                world.column("acme", id, "message_id").await.as_deref(),
                Some("<1@acme>")
            );
            let told: serde_json::Value = serde_json::from_str(&world.owed(id).await[0].2).unwrap();
            assert_eq!(told["data"]["attempt"], 1, "{id}");
            assert_eq!(
                world.column("acme", id, "attempt").await.as_deref(),
                Some("1"),
                "{id}"
            );
            assert!(merge(id).await, "{id}: now it is final");
        }
        assert!(merge("over").await && merge("unknown").await);
        world.assert_lanes_are_right().await;
        // Its owner by lease has a report of the same number: it must not be published.
        let failed = done(&owner, ReportType::Failed);
        assert_eq!(world.settle_one(failed).await, Settled::LeaseLost);
        assert_eq!(
            world.column("acme", "leased", "outcome").await.as_deref(),
            Some("mail.sent")
        );
    })
    .await;
}

#[tokio::test]
async fn a_late_acceptance_of_some_leaves_the_others_to_be_tried() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        let mine = [result("a@b.example", Accepted), result("c@d.example", Refused)];
        world.go(request(&old, "acme", "1")).await;
        world.silence(&old).await;
        world.ledger.takeover(&new, Duration::from_mins(1)).await.unwrap();
        let merge = async || merge(&world, "1", &mine).await;
        assert!(!merge().await);
        // The refusal came from somebody without a lease: it is not what is true.
        let row = world.go(request(&new, "acme", "1")).await;
        let statuses =
            |recipients: &[RecipientResult]| recipients.iter().map(|r| r.status).collect::<Vec<_>>();
        assert_eq!(statuses(&row.recipients), [Accepted, Pending]);
        assert_eq!(row.message_id.as_deref(), Some("<1@acme>"));
        // What is known already stays as it is.
        let mut retry = park(&row, WaitReason::Retry, Duration::ZERO);
        retry.recipients = Some(vec![
            result("a@b.example", Accepted),
            result("c@d.example", Deferred),
        ]);
        world.settle_one(retry).await;
        assert!(!merge().await);
        let released = world.release(&new, Level::Medium, 1).await.remove(0);
        assert_eq!(statuses(&released.row.recipients), [Accepted, Deferred]);
    })
    .await;
}

#[tokio::test]
async fn an_acceptance_merged_under_a_lease_is_not_overwritten_by_its_owner() {
    in_world(|world| async move {
        let (old, new) = (world.epoch().await, world.steady_epoch().await);
        for (id, parked) in [("open", false), ("here", true)] {
            world.go(request(&old, "acme", id)).await;
            world.silence(&old).await;
            world.run("UPDATE {s}.worker SET dead = false").await;
            world.ledger.takeover(&new, Duration::from_mins(1)).await.unwrap();
            let owner = world.go(request(&new, "acme", id)).await;
            if parked {
                world
                    .ledger
                    .absorb(&[super::world::absorb("acme", id)])
                    .await
                    .unwrap();
            }
            let mine = [result("a@b.example", Accepted), result("c@d.example", Deferred)];
            assert!(!merge(&world, id, &mine).await);
            // It knows nothing of that, and failed.
            let mut failed = done(&owner, ReportType::Failed);
            failed.recipients = Some(vec![
                result("a@b.example", Refused),
                result("c@d.example", Refused),
            ]);
            assert_eq!(world.settle_one(failed.clone()).await, Settled::LeaseLost);
            assert_eq!(world.settle_one(failed).await, Settled::LeaseLost);
            world.assert_lanes_are_right().await;
            let row = if parked {
                world.release(&new, Level::Medium, 1).await.remove(0).row
            } else {
                world.go(request(&new, "acme", id)).await
            };
            assert_eq!(
                row.recipients.iter().map(|r| r.status).collect::<Vec<_>>(),
                [Accepted, Pending]
            );
            assert_eq!(
                world.settle_one(done(&row, ReportType::Sent)).await,
                Settled::Written
            );
        }
    })
    .await;
}
