//! The producer: publishes with confirms, and again under the same id what was not confirmed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::{sleep, timeout};

use super::installation::Installation;
use super::plan::{Expect, Job, Plan};

/// For one answer of the broker.
const ANSWER: Duration = Duration::from_secs(10);
/// For everything to be confirmed, after the last job is due.
const LIMIT: Duration = Duration::from_mins(3);
/// Publishes awaiting their confirms at once.
const WINDOW: usize = 200;
/// Between two looks at what is due.
const LOOK: Duration = Duration::from_millis(20);

/// What became of publishing a job.
#[derive(Debug, Clone, Default)]
pub struct Published {
    /// How often it was tried.
    pub times: usize,
    /// When the broker first confirmed it.
    pub confirmed: Option<Instant>,
}

/// Publishes all jobs at their times; one result per job.
///
/// # Errors
/// If not everything is confirmed in time.
pub async fn run(town: &Installation, plan: &Plan, begun: Instant) -> Result<Vec<Published>, String> {
    let mut published = vec![Published::default(); plan.jobs.len()];
    let times = plan.jobs.iter().enumerate();
    let mut due: BinaryHeap<Reverse<(Duration, usize)>> =
        times.map(|(n, job)| Reverse((job.at, n))).collect();
    let last = plan.jobs.last().map_or(Duration::ZERO, |job| job.at);
    let mut link: Option<(Connection, Channel)> = None;
    while !due.is_empty() {
        if begun.elapsed() > last + LIMIT {
            return Err(format!("{} jobs are not confirmed after {LIMIT:?}", due.len()));
        }
        let batch = take_due(&mut due, begun.elapsed());
        if batch.is_empty() {
            sleep(LOOK).await;
            continue;
        }
        if link.is_none() {
            link = connect(&town.scratch.amqp_url()).await;
        }
        let confirmed = if let Some((_, channel)) = &link {
            let each = batch
                .iter()
                .map(|number| publish(town, channel, &plan.jobs[*number]));
            join_all(each).await
        } else {
            sleep(LOOK * 10).await;
            vec![false; batch.len()]
        };
        for (number, confirmed) in batch.into_iter().zip(confirmed) {
            let (state, job) = (&mut published[number], &plan.jobs[number]);
            state.times += usize::from(link.is_some());
            if confirmed {
                if state.confirmed.is_none() {
                    state.confirmed = Some(Instant::now());
                    due.extend(job.again.map(|later| Reverse((begun.elapsed() + later, number))));
                }
            } else {
                due.push(Reverse((begun.elapsed(), number)));
                if link
                    .as_ref()
                    .is_some_and(|(connection, _)| !connection.status().connected())
                {
                    link = None;
                }
            }
        }
    }
    Ok(published)
}

fn take_due(due: &mut BinaryHeap<Reverse<(Duration, usize)>>, now: Duration) -> Vec<usize> {
    let mut batch = Vec::new();
    while batch.len() < WINDOW && due.peek().is_some_and(|Reverse((at, _))| *at <= now) {
        batch.extend(due.pop().map(|Reverse((_, number))| number));
    }
    batch
}

async fn connect(url: &str) -> Option<(Connection, Channel)> {
    let connecting = async {
        let connection = Box::pin(Connection::connect(url, ConnectionProperties::default())).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok::<_, lapin::Error>((connection, channel))
    };
    timeout(ANSWER, connecting).await.ok()?.ok()
}

/// Whether the broker has it.
async fn publish(town: &Installation, channel: &Channel, job: &Job) -> bool {
    let now = jiff::Timestamp::now().as_second();
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_type("mail.job.v1".into())
        .with_delivery_mode(2)
        .with_timestamp(now as u64);
    let options = BasicPublishOptions {
        mandatory: true,
        ..BasicPublishOptions::default()
    };
    let key = format!("{}.{}", job.level, job.tenant);
    let body = job.body(town.start);
    let publishing = async {
        channel
            .basic_publish("mail.jobs".into(), key.into(), options, &body, properties)
            .await?
            .await
    };
    matches!(timeout(ANSWER, publishing).await, Ok(Ok(Confirmation::Ack(None))))
}

/// Cancels what is to be cancelled while it waits for its time; the jobs for which that was accepted.
pub async fn cancel(town: &Installation, plan: &Plan, begun: Instant) -> Vec<usize> {
    let mut accepted = Vec::new();
    for (number, job) in plan.jobs.iter().enumerate() {
        if job.expect != Expect::Cancelled {
            continue;
        }
        let from = job.at + Duration::from_secs(1);
        sleep(from.saturating_sub(begun.elapsed())).await;
        // What could not be cancelled before its time is sent, and that is right, too.
        while begun.elapsed() < from + Duration::from_secs(12) {
            match town.postroom(&["job", "cancel", job.tenant, &job.id], "").await {
                Ok(_) => {
                    accepted.push(number);
                    break;
                }
                Err(_) => sleep(Duration::from_millis(500)).await,
            }
        }
    }
    accepted
}
