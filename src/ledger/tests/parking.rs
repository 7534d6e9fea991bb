//! Parking at once: what admission and settlement would have left behind, in one statement.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::world::{
    World, account, body, done, in_world, job, park, report, request, row_of, settlement, tenant, until,
};
use crate::ledger::admit::{AdmitRequest, Admitted, Want};
use crate::ledger::park::{Birth, ParkRequest, Parked};
use crate::ledger::settle::{Body, Next, Settled};
use crate::ledger::{Epoch, WaitReason};
use crate::level::Level;
use crate::report::{ReportMessage, ReportType};

/// A job that waits for its time, as both ways take it.
struct Later {
    request: AdmitRequest,
    send_at: Timestamp,
    body: Body,
    report: Option<ReportMessage>,
}

impl Later {
    fn new(epoch: &Arc<Epoch>, owner: &str, id: &str, after: SignedDuration) -> Self {
        let send_at = Timestamp::now().checked_add(after).unwrap();
        let mut request = request(epoch, owner, id);
        (request.want, request.send_at) = (Want::Park, Some(send_at));
        Self {
            request,
            send_at,
            body: body(),
            report: None,
        }
    }

    /// The same with a report, should it be born in this way.
    fn reported(mut self, birth: &Birth) -> Self {
        let row = row_of(&self.request, birth.born);
        self.report = Some(report(&row, ReportType::Deferred).into());
        self
    }

    fn as_new(&self) -> ParkRequest<'_> {
        ParkRequest {
            tenant: &self.request.tenant,
            id: &self.request.id,
            level: self.request.level,
            account: &self.request.account,
            digest: &self.request.digest,
            send_at: self.send_at,
            expires_at: self.request.expires_at,
            batch: self.request.batch.as_deref(),
            body: &self.body,
            report: self.report.as_ref(),
        }
    }
}

const HOUR: SignedDuration = SignedDuration::from_hours(1);

fn birth(epoch: &Arc<Epoch>, jobs: usize) -> Birth {
    Birth::new(Arc::clone(epoch), jobs, Timestamp::now())
}

async fn park_all(world: &World, birth: &Birth, jobs: &[&Later]) -> Vec<Option<Parked>> {
    let requests: Vec<_> = jobs.iter().map(|later| later.as_new()).collect();
    world.ledger.park(birth, &requests).await.unwrap()
}

/// Everything there is of the only job, its lane and its report; times as minutes from `begun`, numbers from its birth.
async fn everything(world: &World, begun: Timestamp) -> Value {
    let mut all: Value = world
        .one(
            "SELECT jsonb_build_object('job', (SELECT to_jsonb(x) FROM {s}.job x), 'lane', (SELECT to_jsonb(l) FROM {s}.lane l),
                                       'outbox', (SELECT to_jsonb(o) FROM {s}.outbox o))",
        )
        .await;
    let born = all["job"]["born"].as_i64().unwrap();
    let (job, outbox) = (all["job"]["report"].clone(), all["outbox"]["n"].clone());
    assert_eq!(job, outbox);
    for part in all.as_object_mut().unwrap().values_mut() {
        let Some(columns) = part.as_object_mut() else {
            continue;
        };
        for (name, value) in columns {
            match name.as_str() {
                "claim" | "report" | "n" if !value.is_null() => *value = "a number".into(),
                "born" => *value = (born % 1000).into(),
                "seq" => *value = (value.as_i64().unwrap() - born).into(),
                name if name.ends_with("_at") && !value.is_null() && *value != "-infinity" => {
                    let time: Timestamp = value.as_str().unwrap().parse().unwrap();
                    // The two ways were gone seconds apart.
                    *value = (time.duration_since(begun).as_secs_f64() / 60.0).round().into();
                }
                "body" if is_json(value) => {
                    let mut report: Value = serde_json::from_str(value.as_str().unwrap()).unwrap();
                    report["id"] = Value::Null;
                    report["timestamp"] = Value::Null;
                    report["data"]["sequence"] = (report["data"]["sequence"].as_i64().unwrap() - born).into();
                    *value = report;
                }
                _ => {}
            }
        }
    }
    all
}

fn is_json(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.starts_with('{'))
}

#[tokio::test]
async fn a_job_parked_at_once_is_what_admission_and_settlement_would_have_left() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let begun = Timestamp::now();
        for (owner, told) in [("acme", true), ("acme", false), ("beta", true)] {
            let mut later = Later::new(&epoch, owner, "1", HOUR);
            later.request.expires_at = Some(begun + 2 * HOUR);
            later.request.batch = Some("spring".to_owned());
            later.request.level = Level::Low;
            later.request.account = account("platform/main");

            let Admitted::Wait { row, reason, delay } = world.admit_one(later.request.clone()).await else {
                panic!()
            };
            let mut settled = park(&row, reason, delay);
            settled.report = told.then(|| report(&row, ReportType::Deferred).into());
            settled.refund = true;
            assert_eq!(world.settle_one(settled).await, Settled::Written);
            let before = everything(&world, begun).await;
            world
                .run("DELETE FROM {s}.job; DELETE FROM {s}.lane; DELETE FROM {s}.outbox")
                .await;

            let birth = birth(&epoch, 1);
            if told {
                later = later.reported(&birth);
            }
            let parked = park_all(&world, &birth, &[&later]).await[0].unwrap();
            assert_eq!(parked.report.is_some(), told);
            assert_eq!(everything(&world, begun).await, before);
            assert_eq!(before["job"]["seq"], i64::from(told));
            world.assert_lanes_are_right().await;
            world
                .run("DELETE FROM {s}.job; DELETE FROM {s}.lane; DELETE FROM {s}.outbox")
                .await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_repeat_recognises_what_it_has_parked_until_somebody_has_touched_it() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let birth = birth(&epoch, 3);
        let soon = SignedDuration::from_millis(300);
        let one = Later::new(&epoch, "acme", "1", soon).reported(&birth);
        let two = Later::new(&epoch, "acme", "2", HOUR);
        let known = Later::new(&epoch, "acme", "known", HOUR);
        world.go(request(&epoch, "acme", "known")).await;
        let jobs = [&two, &known, &one];
        let first = park_all(&world, &birth, &jobs).await;
        let number = world.owed("1").await[0].0;
        assert_eq!(
            first,
            [
                Some(Parked { report: None }),
                None,
                Some(Parked { report: Some(number) })
            ]
        );
        assert_eq!(park_all(&world, &birth, &jobs).await, first);
        assert_eq!(world.owed("1").await.len(), 1);
        until("the first is due", async || {
            !world.release(&epoch, Level::Medium, 5).await.is_empty()
        })
        .await;
        assert_eq!(park_all(&world, &birth, &jobs).await, [first[0], None, None]);
        // Another delivery of it is another claim.
        assert_eq!(park_all(&world, &self::birth(&epoch, 1), &[&two]).await, [None]);
        assert!(matches!(world.admit_one(two.request).await, Admitted::Waiting));
        world.assert_lanes_count_right().await;
    })
    .await;
}

#[tokio::test]
async fn what_is_known_due_or_expired_is_left_to_admission_as_it_is() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let rows = "SELECT jsonb_agg(x ORDER BY x.id) FROM {s}.job x";
        world
            .ledger
            .cancel(&tenant("acme"), &job("cancelled"))
            .await
            .unwrap();
        let row = world.go(request(&epoch, "acme", "open")).await;
        world.settle_one(settlement(&row, Next::GiveBack)).await;
        world.go(request(&epoch, "acme", "leased")).await;
        let row = world.go(request(&epoch, "acme", "sent")).await;
        world.settle_one(done(&row, ReportType::Sent)).await;
        let before: Value = world.one(rows).await;
        let mut jobs: Vec<_> = ["cancelled", "open", "leased", "sent"]
            .map(|id| Later::new(&epoch, "acme", id, HOUR))
            .into();
        jobs.push(Later::new(&epoch, "acme", "due", SignedDuration::from_secs(-1)));
        let mut expired = Later::new(&epoch, "acme", "expired", HOUR);
        expired.request.expires_at = Some(Timestamp::now() - HOUR);
        jobs.push(expired);
        let jobs: Vec<_> = jobs.iter().collect();
        let birth = birth(&epoch, jobs.len());
        assert_eq!(park_all(&world, &birth, &jobs).await, [None; 6]);
        assert_eq!(world.one::<Value>(rows).await, before);
        assert_eq!(world.one::<i64>("SELECT count(*) FROM {s}.lane").await, 0);
        let answers: Vec<_> = jobs.iter().map(|later| later.request.clone()).collect();
        let answers = world.ledger.admit(&answers).await.unwrap();
        assert!(
            matches!(
                answers[..],
                [
                    Admitted::Cancelled(_),
                    Admitted::Wait { .. },
                    Admitted::InFlight,
                    Admitted::Done,
                    Admitted::Wait { .. },
                    Admitted::Expired(_)
                ]
            ),
            "{answers:?}"
        );
    })
    .await;
}

#[tokio::test]
async fn of_twins_the_first_is_parked() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let mut twins = ["b", "a", "a", "b"].map(|id| Later::new(&epoch, "acme", id, HOUR));
        twins[2].request.digest = [8; 32];
        let twins: Vec<_> = twins.iter().collect();
        let parked = park_all(&world, &birth(&epoch, 4), &twins).await;
        let places: Vec<_> = parked.iter().map(Option::is_some).collect();
        assert_eq!(places, [true, true, false, false]);
        let other = twins[2].request.clone();
        assert!(matches!(world.admit_one(other).await, Admitted::Conflict));
    })
    .await;
}

#[tokio::test]
async fn a_lane_is_looked_at_when_the_soonest_of_its_jobs_is_due_and_keeps_its_count() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let park_one = async |id, after| {
            let later = Later::new(&epoch, "acme", id, after);
            assert!(park_all(&world, &birth(&epoch, 1), &[&later]).await[0].is_some());
            let hours =
                "SELECT round(extract(epoch FROM next_at - clock_timestamp()) / 3600)::bigint FROM {s}.lane";
            world.one::<i64>(hours).await
        };
        assert_eq!(park_one("1", 3 * HOUR).await, 3);
        assert_eq!(park_one("2", 5 * HOUR).await, 3);
        assert_eq!(park_one("3", HOUR).await, 1);
        // One that keeps its place in front of others.
        let row = world.go(request(&epoch, "acme", "busy")).await;
        let busy = crate::ledger::WaitReason::Busy;
        world.settle_one(park(&row, busy, Duration::ZERO)).await;
        assert_eq!(park_one("4", 2 * HOUR).await, 0);
        assert_eq!(world.fifo("acme/main", Level::Medium, "acme").await, Some(1));
        world.assert_lanes_are_right().await;
    })
    .await;
}

#[tokio::test]
async fn waiting_jobs_are_counted_by_one_for_all_and_not_too_often() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let count = async |most| {
            let every = Duration::from_secs(15);
            let census = world.ledger.census(most, every).await.unwrap();
            census
                .waiting
                .into_iter()
                .filter(|(_, jobs)| *jobs > 0)
                .collect::<Vec<_>>()
        };
        let due = "UPDATE {s}.census SET next_at = '-infinity'";
        for (id, reason) in [
            ("1", WaitReason::Retry),
            ("2", WaitReason::Unhealthy),
            ("3", WaitReason::Retry),
        ] {
            world.parked(&epoch, "acme", id, reason).await;
        }
        let first = [(WaitReason::Retry, 2), (WaitReason::Unhealthy, 1)];
        assert_eq!(count(100).await, first);
        world.parked(&epoch, "acme", "4", WaitReason::Busy).await;
        assert_eq!(count(100).await, first, "it was counted a moment ago");
        world.run(due).await;
        // Somebody else is counting.
        let counting = world.holding("SELECT 1 FROM {s}.census FOR UPDATE").await;
        assert_eq!(count(100).await, first);
        counting.batch_execute("ROLLBACK").await.unwrap();
        let second = [
            (WaitReason::Retry, 2),
            (WaitReason::Busy, 1),
            (WaitReason::Unhealthy, 1),
        ];
        assert_eq!(count(100).await, second);
        world.run(due).await;
        assert_eq!(count(3).await.iter().map(|(_, jobs)| jobs).sum::<i64>(), 3);
    })
    .await;
}

#[tokio::test]
async fn held_jobs_are_counted_until_somebody_has_decided() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        let held = async || {
            world.run("UPDATE {s}.census SET next_at = '-infinity'").await;
            let census = world.ledger.census(100, Duration::ZERO).await;
            census.unwrap().held
        };
        assert_eq!(held().await, 0);
        let row = world.go(request(&epoch, "acme", "1")).await;
        let next = Next::Hold { body: Some(body()) };
        world.settle_one(settlement(&row, next)).await;
        assert_eq!(world.state("acme", "1").await, 4);
        assert_eq!(held().await, 1);
        world.run("UPDATE {s}.job SET state = 3").await;
        assert_eq!(held().await, 0);
    })
    .await;
}

#[tokio::test]
async fn a_count_of_waiting_jobs_that_took_long_is_not_repeated_soon() {
    in_world(|world| async move {
        let slow = world.holding("LOCK {s}.job").await;
        let count = world.ledger.census(100, Duration::ZERO);
        let hold = async {
            until("the count waits", async || {
                world
                    .one::<bool>("SELECT EXISTS (SELECT FROM pg_locks WHERE relation = '{s}.job'::regclass AND NOT granted)")
                    .await
            })
            .await;
            slow.batch_execute("SELECT pg_sleep(0.5); ROLLBACK").await.unwrap();
        };
        let (counted, ()) = tokio::join!(count, hold);
        counted.unwrap();
        let rest = "SELECT next_at > clock_timestamp() + interval '20 seconds' FROM {s}.census";
        assert!(world.one::<bool>(rest).await);
    })
    .await;
}
