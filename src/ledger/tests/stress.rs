//! Many clients over the same rows in any order: nobody may be thrown out.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::world::{World, absorb, account, in_world, park, report, request, settlement};
use crate::db::DbError;
use crate::ledger::admit::Admitted;
use crate::ledger::settle::Next;
use crate::ledger::slots::SlotRequest;
use crate::ledger::{Row, WaitReason};
use crate::level::Level;
use crate::report::ReportType;

const TENANTS: [&str; 3] = ["a", "b", "c"];

async fn client(world: World, seed: u64, end: Instant) -> Result<u32, DbError> {
    let epoch = world.epoch().await;
    let mut random = SmallRng::seed_from_u64(seed);
    let mut calls = 0;
    let mut round = 0;
    while Instant::now() < end {
        round += 1;
        // The same ids in every client, in another order.
        let mut names: Vec<(usize, usize)> = (0..3).flat_map(|t| (0..12).map(move |n| (t, n))).collect();
        names.shuffle(&mut random);
        let batch: Vec<_> = names
            .iter()
            .map(|(t, n)| {
                let mut request = request(&epoch, TENANTS[*t], &format!("{round}-{n}"));
                request.account = account(["a/1", "b/1", "-/shared"][(t + n) % 3]);
                request
            })
            .collect();
        let mut rows: Vec<Row> = Vec::new();
        let mut bodies = Vec::new();
        for (answer, request) in world.ledger.admit(&batch).await?.into_iter().zip(&batch) {
            match answer {
                Admitted::Go(row) | Admitted::Behind(row) | Admitted::Wait { row, .. } => rows.push(*row),
                _ => bodies.push(absorb(request.tenant.as_str(), request.id.as_str())),
            }
        }
        world.ledger.absorb(&bodies).await?;
        rows.extend(
            world
                .release(&epoch, Level::Medium, 30)
                .await
                .into_iter()
                .map(|r| r.row),
        );
        rows.shuffle(&mut random);
        let slots: Vec<_> = rows.iter().map(|row| slot(row, &mut random)).collect();
        world.ledger.take_slots(&slots).await?;
        world.ledger.mark_data(&rows).await?;
        let settlements: Vec<_> = rows
            .iter()
            .map(|row| {
                let mut next = match random.random_range(0..4) {
                    0 => settlement(row, Next::Done(ReportType::Sent)),
                    1 => settlement(row, Next::GiveBack),
                    _ => park(row, WaitReason::Rate, Duration::ZERO),
                };
                next.refund = random.random_bool(0.5);
                next.report = Some(report(row, ReportType::Sent).into());
                next
            })
            .collect();
        let copy = world.ledger.settle(&settlements);
        let (answers, copies) = tokio::try_join!(world.ledger.settle(&settlements), copy)?;
        let numbers = answers.iter().chain(&copies).filter_map(|answer| answer.report);
        let mut numbers: Vec<_> = numbers.collect();
        numbers.shuffle(&mut random);
        world.ledger.clear_outbox(&numbers).await?;
        world.ledger.owed_reports(5, Duration::ZERO).await?;
        if seed == 0 {
            world
                .limit(
                    ["a/", "-/shared", "b/1"][round % 3],
                    &[(random.random_range(20..300), 200_000, "messages")],
                )
                .await;
        }
        calls += 8;
    }
    Ok(calls)
}

fn slot(row: &Row, random: &mut SmallRng) -> SlotRequest {
    SlotRequest {
        tenant: row.tenant.clone(),
        id: row.id.clone(),
        lease: row.lease.clone(),
        account: account(["a/1", "b/1", "-/shared"][random.random_range(0..3)]),
        recipients: 1,
        keep: false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overlapping_batches_in_any_order_never_fail() {
    in_world(|world| async move {
        for name in ["a/", "-/shared", "b/1", "c/"] {
            world.limit(name, &[(100, 200_000, "messages")]).await;
        }
        let end = Instant::now() + Duration::from_secs(4);
        let mut clients = tokio::task::JoinSet::new();
        for seed in 0..8 {
            clients.spawn(client(world.clone(), seed, end));
        }
        for calls in clients.join_all().await {
            // A deadlock (40P01) would be here.
            assert!(calls.unwrap() > 0);
        }
    })
    .await;
}
