//! The waiting room's books under everything that moves jobs at once.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::world::{
    World, account, all, body, done, in_world, job, park, request, settlement, tenant, until,
};
use crate::ledger::admit::{Admitted, Want};
use crate::ledger::park::{Birth, ParkRequest};
use crate::ledger::settle::{Next, Settled, Settlement};
use crate::ledger::{Row, WaitReason};
use crate::level::Level;
use crate::report::ReportType;

const ACCOUNTS: [(&str, &str); 4] = [("a", "a/1"), ("a", "a/2"), ("b", "-/shared"), ("c", "-/shared")];
const KEYS: [&str; 5] = ["a/", "a/1", "-/", "-/shared", "c/"];
const REASONS: [WaitReason; 4] = [
    WaitReason::Rate,
    WaitReason::Retry,
    WaitReason::Schedule,
    WaitReason::Busy,
];

/// One worker that does anything at random.
struct Walker {
    world: World,
    random: SmallRng,
    seed: u64,
    number: u32,
    mine: VecDeque<Row>,
}

impl Walker {
    async fn walk(mut self, end: Instant) {
        let epoch = self.world.epoch().await;
        while Instant::now() < end {
            match self.random.random_range(0..13) {
                12 => self.park_at_once(&epoch).await,
                0..3 => self.admit(&epoch).await,
                3..6 => self.release(&epoch).await,
                6..9 => self.settle().await,
                9 => self.cancel_or_release_by_hand().await,
                10 => self.limit().await,
                _ => self.come_and_go().await,
            }
        }
        // Nothing stays leased.
        let rest: Vec<_> = self.mine.drain(..).map(|row| retry(&row)).collect();
        for (settlement, answer) in rest.iter().zip(self.world.settle(&rest).await) {
            if answer == Settled::Cancelled {
                self.world
                    .settle_one(done(&settlement.row, ReportType::Cancelled))
                    .await;
            }
        }
    }

    async fn admit(&mut self, epoch: &std::sync::Arc<crate::ledger::Epoch>) {
        let batch: Vec<_> = (0..self.random.random_range(1..12))
            .map(|_| {
                self.number += 1;
                let (tenant, key) = *ACCOUNTS.choose(&mut self.random).unwrap();
                let mut request = request(epoch, tenant, &format!("{}-{}", self.seed, self.number));
                request.account = account(key);
                request.level = Level::ALL[self.random.random_range(1..3)];
                request.want = *[Want::Claim, Want::Slot, Want::Park]
                    .choose(&mut self.random)
                    .unwrap();
                request.recipients = self.random.random_range(1..4);
                request
            })
            .collect();
        for answer in self.world.ledger.admit(&batch).await.unwrap() {
            match answer {
                Admitted::Go(row)
                | Admitted::Behind(row)
                | Admitted::Wait { row, .. }
                | Admitted::Cancelled(row) => {
                    self.mine.push_back(*row);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// New jobs that are due in a moment, some of them while their statement runs; the statement may come twice at once.
    async fn park_at_once(&mut self, epoch: &std::sync::Arc<crate::ledger::Epoch>) {
        let now = Timestamp::now();
        let jobs: Vec<_> = (0..self.random.random_range(1..12))
            .map(|_| {
                self.number += 1;
                let (owner, key) = *ACCOUNTS.choose(&mut self.random).unwrap();
                let id = job(&format!("{}-{}", self.seed, self.number));
                let level = Level::ALL[self.random.random_range(1..3)];
                let after = SignedDuration::from_millis(self.random.random_range(0..60));
                (tenant(owner), id, account(key), level, now + after)
            })
            .collect();
        let body = body();
        let requests: Vec<_> = jobs
            .iter()
            .map(|(tenant, id, account, level, send_at)| ParkRequest {
                tenant,
                id,
                level: *level,
                account,
                digest: &[7; 32],
                send_at: *send_at,
                expires_at: None,
                batch: None,
                body: &body,
                report: None,
            })
            .collect();
        let birth = Birth::new(std::sync::Arc::clone(epoch), requests.len(), now);
        let copies = if self.random.random_bool(0.2) { 2 } else { 1 };
        let answers = (0..copies).map(|_| self.world.ledger.park(&birth, &requests));
        for answer in futures_util::future::join_all(answers).await {
            answer.unwrap();
        }
    }

    async fn release(&mut self, epoch: &std::sync::Arc<crate::ledger::Epoch>) {
        let mut what = all(
            Level::ALL[self.random.random_range(1..3)],
            self.random.random_range(1..10),
        );
        if self.random.random_bool(0.3) {
            what.only = Some(account(ACCOUNTS.choose(&mut self.random).unwrap().1));
        }
        let released = self.world.ledger.release(epoch, &what).await.unwrap();
        self.mine.extend(released.into_iter().map(|r| r.row));
    }

    async fn settle(&mut self) {
        let count = self.random.random_range(0..20).min(self.mine.len());
        let batch: Vec<_> = self.mine.drain(..count).collect();
        let batch: Vec<Settlement> = batch.iter().map(|row| self.settlement(row)).collect();
        if batch.is_empty() {
            return;
        }
        let copies = if self.random.random_bool(0.2) { 2 } else { 1 };
        let answers = (0..copies).map(|_| self.world.settle(&batch));
        let answers = futures_util::future::join_all(answers).await;
        for (settlement, answer) in batch.iter().zip(&answers[0]) {
            match answer {
                Settled::Written => {}
                Settled::Cancelled => {
                    self.world
                        .settle_one(done(&settlement.row, ReportType::Cancelled))
                        .await;
                }
                // The other copy wrote it, and somebody has leased or cancelled it since.
                Settled::LeaseLost => assert_eq!(copies, 2),
            }
        }
    }

    fn settlement(&mut self, row: &Row) -> Settlement {
        let mut settlement = match self.random.random_range(0..8) {
            0 => done(row, ReportType::Sent),
            1 => settlement(row, Next::GiveBack),
            _ => {
                let delay = Duration::from_millis(self.random.random_range(0..200));
                park(row, *REASONS.choose(&mut self.random).unwrap(), delay)
            }
        };
        settlement.refund = self.random.random_bool(0.5);
        settlement
    }

    async fn cancel_or_release_by_hand(&mut self) {
        let (tenant, id) = (
            tenant(ACCOUNTS.choose(&mut self.random).unwrap().0),
            self.some_job(),
        );
        if self.random.random_bool(0.5) {
            self.world.ledger.release_by_hand(&tenant, &id).await.unwrap();
        } else if self.number > 0 {
            self.world.ledger.cancel(&tenant, &id).await.unwrap();
        }
    }

    fn some_job(&mut self) -> crate::id::JobId {
        let number = self.random.random_range(0..=self.number);
        job(&format!("{}-{number}", self.random.random_range(0..4)))
    }

    async fn limit(&mut self) {
        let key = *KEYS.choose(&mut self.random).unwrap();
        let unit = *["messages", "recipients"].choose(&mut self.random).unwrap();
        let limit = self.random.random_range(0..40);
        self.world
            .limit(key, &[(limit, 300_000, unit), (limit * 2, 86_400_000_000, unit)])
            .await;
    }

    /// A worker leases something and dies over it; another one takes it over.
    async fn come_and_go(&mut self) {
        let short = self.world.epoch().await;
        self.world.release(&short, Level::Medium, 3).await;
        self.world.silence(&short).await;
        let heir = self.world.steady_epoch().await;
        self.world
            .ledger
            .takeover(&heir, Duration::from_mins(1))
            .await
            .unwrap();
        self.world.ledger.retire(&heir).await.unwrap();
    }
}

fn retry(row: &Row) -> Settlement {
    park(row, WaitReason::Retry, Duration::ZERO)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_waiting_job_is_ever_lost_or_miscounted() {
    for seed in [1, 2] {
        in_world(|world| async move {
            let end = Instant::now() + Duration::from_millis(2500);
            let mut workers = tokio::task::JoinSet::new();
            for n in 0..4 {
                let random = SmallRng::seed_from_u64(seed * 1000 + n);
                let walker = Walker {
                    world: world.clone(),
                    random,
                    seed: n,
                    number: 0,
                    mine: VecDeque::new(),
                };
                workers.spawn(walker.walk(end));
            }
            workers.join_all().await;
            let heir = world.steady_epoch().await;
            world
                .ledger
                .takeover(&heir, Duration::from_mins(1))
                .await
                .unwrap();
            let leased: i64 = world.one("SELECT count(*) FROM {s}.job WHERE state = 1").await;
            assert_eq!(leased, 0, "seed {seed}");
            world.assert_lanes_count_right().await;
            for key in KEYS {
                world.limit(key, &[]).await;
            }
            world.assert_lanes_are_right().await;
            until("every waiting job is released", async || {
                for level in Level::ALL {
                    world.release(&heir, level, 500).await;
                }
                world
                    .one::<i64>("SELECT count(*) FROM {s}.job WHERE state = 2")
                    .await
                    == 0
            })
            .await;
            until("empty lanes are gone", async || {
                for level in Level::ALL {
                    world.release(&heir, level, 500).await;
                }
                world.one::<i64>("SELECT count(*) FROM {s}.lane").await == 0
            })
            .await;
            let sums: i64 = world
                .one("SELECT count(*) FROM {s}.job WHERE state IN (1, 3)")
                .await;
            assert!(sums > 100, "seed {seed}: {sums}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_job_parked_over_a_limit_that_is_gone_by_then_does_not_wait_for_it() {
    in_world(|world| async move {
        let epoch = world.epoch().await;
        world.parked(&epoch, "acme", "1", WaitReason::Rate).await;
        world.assert_lanes_are_right().await;
        assert_eq!(world.release(&epoch, Level::Medium, 1).await.len(), 1);
    })
    .await;
}
