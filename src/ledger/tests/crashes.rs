//! Jobs that crash whoever works on them, and jobs that only were in bad company.

use std::sync::Arc;
use std::time::Duration;

use super::world::{World, absorb, body, in_world, job, park, report, request, settlement, tenant};
use crate::ledger::admit::Admitted;
use crate::ledger::odd::{Decision, Resolved};
use crate::ledger::settle::{Next, Settled};
use crate::ledger::{Row, WaitReason};
use crate::level::Level;
use crate::report::{RecipientStatus, ReportType};

const DEADLINE: Duration = Duration::from_mins(25);

impl World {
    /// The worker that holds these jobs dies, and another takes them over.
    async fn dies(&self, row: &Row) {
        let heir = self.steady_epoch().await;
        self.silence(&row.lease.epoch).await;
        self.ledger.takeover(&heir, DEADLINE).await.unwrap();
    }

    /// Leased by a worker of its own.
    async fn leased(&self, id: &str) -> Row {
        let epoch = self.epoch().await;
        self.go(request(&epoch, "acme", id)).await
    }

    async fn column_of(&self, id: &str, column: &str) -> i32 {
        let value = self.column("acme", id, column).await;
        value.unwrap().parse().unwrap()
    }
}

#[tokio::test]
async fn bad_company_makes_a_suspect_and_convicts_at_the_twentieth_death_only() {
    in_world(|world| async move {
        for deaths in 1..=20 {
            let row = world.leased("1").await;
            assert!(!row.is_poison());
            world.dies(&row).await;
            assert_eq!(world.column_of("1", "crashes").await, 1);
            assert_eq!(world.column_of("1", "deaths").await, deaths);
        }
        assert!(world.leased("1").await.is_poison());
    })
    .await;
}

#[tokio::test]
async fn a_job_that_crashes_workers_while_it_is_watched_is_poison_at_the_third_crash() {
    in_world(|world| async move {
        for (crashes, watched) in [(0, false), (1, true), (2, true)] {
            let row = world.leased("1").await;
            assert_eq!(
                (row.crashes, row.is_suspect(), row.is_poison()),
                (crashes, watched, false)
            );
            assert_eq!(row.is_prime_suspect(), crashes == 2);
            if watched {
                assert!(world.ledger.mark_suspect(&row, true).await.unwrap());
            }
            world.dies(&row).await;
        }
        assert!(world.leased("1").await.is_poison());
    })
    .await;
}

#[tokio::test]
async fn what_crashed_after_the_watch_was_over_is_no_evidence() {
    in_world(|world| async move {
        let row = world.leased("1").await;
        world.dies(&row).await;
        for _ in 0..5 {
            let row = world.leased("1").await;
            assert!(world.ledger.mark_suspect(&row, true).await.unwrap());
            assert!(world.ledger.mark_suspect(&row, false).await.unwrap());
            world.dies(&row).await;
            assert_eq!(world.column_of("1", "crashes").await, 1);
            assert!(
                !world.ledger.mark_suspect(&row, true).await.unwrap(),
                "the lease is lost"
            );
        }
    })
    .await;
}

#[tokio::test]
async fn panics_are_counted_where_they_were_caught() {
    in_world(|world| async move {
        for crashes in 1..=3 {
            let epoch = world.epoch().await;
            let row = if crashes == 1 {
                world.go(request(&epoch, "acme", "1")).await
            } else {
                world.release(&epoch, Level::Medium, 1).await.remove(0).row
            };
            let mut panicked = park(&row, WaitReason::Retry, Duration::ZERO);
            (panicked.crashed, panicked.uncertain) = (true, true);
            assert_eq!(world.settle_one(panicked).await, Settled::Written);
            assert_eq!(world.column_of("1", "crashes").await, crashes);
            assert_eq!(world.column_of("1", "uncertain").await, crashes);
        }
        let epoch = world.epoch().await;
        let released = world.release(&epoch, Level::Medium, 1).await.remove(0);
        assert!(released.row.is_poison());
    })
    .await;
}

#[tokio::test]
async fn a_buried_job_is_final_and_begins_anew_only_when_it_is_replayed() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let row = world.parked(&epoch, "acme", "1", WaitReason::Retry).await;
        world.run("UPDATE {s}.job SET crashes = 3, attempt = 7").await;
        assert!(
            world.ledger.dead_letter(&row, |_| ()).await.unwrap().is_none(),
            "that lease is over"
        );
        let row = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        let (told, _) = world
            .ledger
            .dead_letter(&row, |data| data.tags.push("t".to_owned()))
            .await
            .unwrap()
            .unwrap();
        assert_eq!((told.kind, told.data.is_final), ("mail.failed", true));
        assert_eq!(told.data.reason.as_deref(), Some("crash_loop"));
        assert_eq!(told.data.tags, ["t"]);
        assert_eq!(world.state("acme", "1").await, 6);
        assert_eq!(world.column("acme", "1", "body").await, None);
        // The original delivery, once more: the dead letter stands for it.
        let again = world.admit_one(request(&epoch, "acme", "1")).await;
        assert!(matches!(again, Admitted::Done), "{again:?}");
        let mut replayed = request(&epoch, "acme", "1");
        replayed.replay = true;
        let fresh = world.go(replayed).await;
        assert_eq!((fresh.attempts, fresh.crashes, fresh.deaths), (0, 0, 0));
        assert!(!fresh.is_suspect());
        assert_eq!(fresh.born, row.born, "the same mail");
        assert!(fresh.sequence > row.sequence, "reports go on");
        assert!(fresh.created >= row.created);
        let former = world.column("acme", "1", "properties::text").await;
        assert_eq!(former, None, "it knows nothing of its former life");
        let mut sent = settlement(&fresh, Next::Done(ReportType::Sent));
        sent.report = Some(report(&fresh, ReportType::Sent).into());
        assert_eq!(world.settle_one(sent).await, Settled::Written);
        assert_eq!(world.owed("1").await.len(), 2);
    })
    .await;
}

#[tokio::test]
async fn buried_jobs_are_forgotten_like_others() {
    in_world(|world| async move {
        let row = world.leased("1").await;
        world.ledger.dead_letter(&row, |_| ()).await.unwrap().unwrap();
        assert_eq!(world.ledger.forget_old(Duration::ZERO).await.unwrap(), 1);
    })
    .await;
}

#[tokio::test]
async fn reports_of_the_dead_are_published_at_once() {
    in_world(|world| async move {
        let (dying, living) = (world.epoch().await, world.epoch().await);
        for (epoch, id) in [(&dying, "theirs"), (&living, "ours")] {
            let row = world.go(request(epoch, "acme", id)).await;
            let mut sent = settlement(&row, Next::Done(ReportType::Sent));
            sent.report = Some(report(&row, ReportType::Sent).into());
            world.settle_one(sent).await;
        }
        let owed = async || {
            world
                .ledger
                .owed_reports(10, Duration::from_mins(1))
                .await
                .unwrap()
        };
        assert!(owed().await.is_empty(), "their workers may be publishing them");
        world.silence(&dying).await;
        let heir = world.steady_epoch().await;
        world.ledger.takeover(&heir, DEADLINE).await.unwrap();
        let ids: Vec<_> = owed().await.iter().map(|o| o.id.clone()).collect();
        assert_eq!(ids, ["theirs"]);
    })
    .await;
}

/// A held job with one recipient refused before and one of whom nobody knows.
async fn held(world: &World, id: &str) -> Row {
    let row = world.leased(id).await;
    let mut hold = settlement(&row, Next::Hold { body: Some(body()) });
    hold.uncertain = true;
    hold.recipients = Some(vec![
        super::world::result("a@b.example", RecipientStatus::Pending),
        super::world::result("c@d.example", RecipientStatus::Refused),
    ]);
    assert_eq!(world.settle_one(hold).await, Settled::Written);
    row
}

#[tokio::test]
async fn a_held_job_ends_as_somebody_decides() {
    in_world(|world| async move {
        for (decision, kind, status, partial) in [
            (Decision::Sent, "mail.sent", "accepted", true),
            (Decision::Failed, "mail.failed", "refused", false),
        ] {
            let id = decision.as_str();
            held(&world, id).await;
            let (owner, name) = (tenant("acme"), job(id));
            let answer = world
                .ledger
                .resolve(&owner, &name, decision, "ann")
                .await
                .unwrap();
            assert_eq!(answer, Resolved::Done);
            assert_eq!(world.state("acme", id).await, 3);
            let (_, _, text) = world.owed(id).await.remove(0);
            let told: serde_json::Value = serde_json::from_str(&text).unwrap();
            let data = &told["data"];
            assert_eq!(
                (told["type"].as_str(), data["reason"].as_str()),
                (Some(kind), Some("resolved_by_hand"))
            );
            assert_eq!(
                (&data["final"], &data["uncertain_attempts"]),
                (&true.into(), &1.into())
            );
            assert_eq!(data["recipients"][0]["status"], status);
            assert_eq!(data["recipients"][1]["status"], "refused");
            assert_eq!(data["partial"] == true, partial);
            assert_eq!(world.column("acme", id, "resolved").await.as_deref(), Some(id));
            assert_eq!(
                world.column("acme", id, "resolved_by").await.as_deref(),
                Some("ann")
            );
            assert!(world.column("acme", id, "resolved_at").await.is_some());
            let again = world
                .ledger
                .resolve(&owner, &name, decision, "bob")
                .await
                .unwrap();
            assert_eq!(again, Resolved::NotHeld(3));
        }
    })
    .await;
}

#[tokio::test]
async fn a_held_job_that_was_not_sent_is_tried_again_with_whom_is_open() {
    in_world(|world| async move {
        held(&world, "1").await;
        let (owner, name) = (tenant("acme"), job("1"));
        let answer = world
            .ledger
            .resolve(&owner, &name, Decision::NotSent, "ann")
            .await;
        assert_eq!(answer.unwrap(), Resolved::Done);
        let epoch = world.epoch().await;
        let released = world.release(&epoch, Level::Medium, 1).await.remove(0).row;
        assert_eq!(released.uncertain, 1);
        assert_eq!(released.recipients.iter().filter(|r| r.is_open()).count(), 1);
        assert_eq!(
            world.column("acme", "1", "resolved").await.as_deref(),
            Some("not_sent")
        );
    })
    .await;
}

#[tokio::test]
async fn there_is_nothing_to_decide_about_a_job_that_is_not_held() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "waits", WaitReason::Retry).await;
        world.go(request(&epoch, "acme", "leased")).await;
        world.ledger.absorb(&[absorb("acme", "leased")]).await.unwrap();
        let decide = async |id: &str| {
            let answer = world
                .ledger
                .resolve(&tenant("acme"), &job(id), Decision::Sent, "ann")
                .await;
            answer.unwrap()
        };
        assert_eq!(decide("waits").await, Resolved::NotHeld(2));
        assert_eq!(decide("leased").await, Resolved::NotHeld(1));
        assert_eq!(decide("unknown").await, Resolved::Unknown);
        let _kept: Arc<_> = epoch;
    })
    .await;
}
