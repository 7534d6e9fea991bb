//! What a worker does besides mail: heartbeats, taking over from the dead, forgetting the old, counting the waiting.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Worker, expiry, reporter};
use crate::fail_point::{self, Point};
use crate::ledger::lease::Beat;

/// Between two heartbeats of a worker that has been silent for too long.
const SILENT: Duration = Duration::from_secs(1);
/// How often the accounts in trouble are read: so old may this worker's view of them be.
const HEALTH: Duration = Duration::from_secs(1);
/// How often waiting jobs are counted.
const CENSUS: Duration = Duration::from_secs(15);
/// Up to where.
const MOST: i64 = 200_000;

/// Runs all of it until `stop`. Heartbeats go on until `end`: what is still in flight needs its leases.
pub async fn run(worker: Arc<Worker>, stop: CancellationToken, end: CancellationToken) {
    tokio::join!(
        beat(Arc::clone(&worker), end),
        every(CENSUS, stop.clone(), || count_waiting(&worker)),
        every(worker.lease / 3, stop.clone(), || take_over(&worker)),
        every(Duration::from_mins(5), stop.clone(), || forget(&worker, &stop)),
        expiry::run(Arc::clone(&worker), stop.clone()),
        every(HEALTH, stop.clone(), || refresh_health(&worker)),
        every(Duration::from_secs(2), stop.clone(), || reporter::measure(
            &worker
        )),
        every(Duration::from_mins(1), stop.clone(), || find_forgotten(&worker)),
        every(Duration::from_mins(1), stop.clone(), || reporter::find_late(
            &worker
        )),
    );
}

async fn every<F, Fut>(period: Duration, stop: CancellationToken, mut work: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = ()>,
{
    let mut ticks = tokio::time::interval(period.max(Duration::from_millis(200)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => work().await,
        }
    }
}

/// Heartbeats; a dead epoch is replaced by a new one, and everything leased under it fails its last question.
async fn beat(worker: Arc<Worker>, end: CancellationToken) {
    let period = worker.lease / 6;
    loop {
        // Nothing is leased until a heartbeat came through again.
        let pause = if worker.epoch().is_fresh() {
            period
        } else {
            SILENT.min(period)
        };
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        let epoch = worker.epoch();
        match worker.ledger.heartbeat(&epoch).await {
            Ok(Beat::Alive { .. }) => {
                worker.database_works();
                // Only now: asking a server that does not answer would put off the next heartbeat.
                if let Err(error) = worker.correct_clock().await {
                    worker.database_trouble("clock", &error);
                }
            }
            Ok(Beat::Dead) => {
                tracing::error!(
                    epoch = epoch.number(),
                    "another worker took over: this one was silent for longer than its lease; starting anew"
                );
                worker.renew_epoch().await;
            }
            Err(error) => worker.database_trouble("heartbeat", &error),
        }
    }
}

async fn take_over(worker: &Arc<Worker>) {
    match worker
        .ledger
        .takeover(&worker.epoch(), worker.attempt_deadline)
        .await
    {
        Ok(takeover) => {
            if takeover.moved + takeover.opened > 0 {
                tracing::warn!(
                    waiting = takeover.moved,
                    open = takeover.opened,
                    "took over the jobs of workers that have gone silent"
                );
                worker.nudge.notify_one();
                fail_point::hit(Point::TakenOver, []);
            }
            for (tenant, id) in takeover.uncertain {
                if let Err(error) = worker.ledger.hold_uncertain(&tenant, &id).await {
                    worker.database_trouble("hold", &error);
                }
            }
        }
        Err(error) => worker.database_trouble("takeover", &error),
    }
}

async fn refresh_health(worker: &Arc<Worker>) {
    if let Err(error) = worker.ledger.refresh_health().await {
        worker.database_trouble("health", &error);
    }
}

/// Ends when it is time to end: millions may have become too old at once, and anybody can go on with them. Each statement
/// is whole or nothing, whether its answer is waited for or not.
async fn forget(worker: &Arc<Worker>, stop: &CancellationToken) {
    let forgetting = async {
        if let Err(error) = worker.ledger.forget_health().await {
            worker.database_trouble("forget", &error);
        }
        if let Err(error) = worker.ledger.forget_old(worker.retention).await {
            worker.database_trouble("forget", &error);
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = forgetting => {}
    }
}

/// Leases whose statement was answered into the void.
async fn find_forgotten(worker: &Arc<Worker>) {
    match worker.ledger.forgotten(&worker.epoch()).await {
        Ok(0) => {}
        Ok(found) => {
            tracing::warn!(
                found,
                "jobs were leased by statements whose answer got lost; they wait again"
            );
            worker.nudge.notify_one();
        }
        Err(error) => worker.database_trouble("forgotten", &error),
    }
}

async fn count_waiting(worker: &Arc<Worker>) {
    if let Ok(census) = worker.ledger.census(MOST, CENSUS).await {
        worker.metrics.held.set(census.held);
        for reason in crate::ledger::WaitReason::ALL {
            let count = census
                .waiting
                .iter()
                .find(|(r, _)| *r == reason)
                .map_or(0, |(_, count)| *count);
            worker
                .metrics
                .waiting
                .with_label_values(&[reason.as_str()])
                .set(count);
        }
    }
}
