//! Publishes the plan with confirms and watches until everything has come back.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join_all;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::{sleep, timeout};

use crate::hook::{Hook, hooks};
use crate::plan::{Message, Outcome, Plan, TOTAL};
use crate::process::metrics;
use crate::screen::{Progress, Screen};
use crate::setup::World;
use crate::waiting::WaitingRoom;

/// For everything to come back, from the first publish on. What is missing then is named.
const LIMIT: Duration = Duration::from_mins(1);
/// For one answer of the broker.
const BROKER_LIMIT: Duration = Duration::from_secs(10);
/// Publishes awaiting their confirms at once.
const WINDOW: usize = 100;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(150);
/// After the last report that must come: one that must not come would come now.
const QUIET: Duration = Duration::from_secs(1);

/// When things happened.
pub(crate) struct Times {
    pub(crate) started: SystemTime,
    /// Publishing the first wave took so long, confirms included.
    pub(crate) publishing: Duration,
    /// When each message of the plan was confirmed, in the order of the plan.
    pub(crate) confirmed: Vec<Option<SystemTime>>,
}

/// The producer's side, and the eyes on everything else.
pub(crate) struct Run<'a> {
    world: &'a World,
    plan: &'a Plan,
    channel: Channel,
    connection: Connection,
    begun: Instant,
    times: Times,
    progress: Progress,
    published: u64,
    waiting: WaitingRoom,
}

/// Publishes everything and waits for what must come of it, or for the time limit.
pub(crate) async fn run(screen: &Screen, world: &World, plan: &Plan) -> Result<Times, String> {
    let mut run = Run::new(screen, world, plan).await?;
    let begun = Instant::now();
    run.publish(false).await?;
    run.times.publishing = begun.elapsed();
    run.second_wave().await?;
    let counts = run.until_all_is_there().await;
    run.progress.finish(&counts);
    let _ = timeout(BROKER_LIMIT, run.connection.close(200, "done".into())).await;
    Ok(run.times)
}

impl<'a> Run<'a> {
    async fn new(screen: &Screen, world: &'a World, plan: &'a Plan) -> Result<Self, String> {
        let failed = |error: lapin::Error| format!("publishing: {error}");
        let url = world.scratch.amqp_url();
        let url_of_database = world.scratch.database_url();
        let connecting = Box::pin(Connection::connect(&url, ConnectionProperties::default()));
        let connection = timeout(BROKER_LIMIT, connecting)
            .await
            .map_err(|_| "the broker does not answer")?
            .map_err(failed)?;
        let channel = connection.create_channel().await.map_err(failed)?;
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await
            .map_err(failed)?;
        let of = |outcome| plan.count(|message| message.outcome() == outcome) as u64;
        let mut bars = vec![("published", TOTAL as u64)];
        bars.extend(Outcome::ALL.map(|outcome| (outcome.name(), of(outcome))));
        Ok(Self {
            world,
            plan,
            channel,
            connection,
            begun: Instant::now(),
            times: Times {
                started: SystemTime::now(),
                publishing: Duration::ZERO,
                confirmed: vec![None; plan.messages.len()],
            },
            progress: screen.progress(&bars),
            published: 0,
            waiting: WaitingRoom::open(&url_of_database).await?,
        })
    }

    /// Publishes one of the two waves, some confirms at a time.
    async fn publish(&mut self, after_original: bool) -> Result<(), String> {
        let plan = self.plan;
        let wave: Vec<(usize, &Message)> = plan
            .messages
            .iter()
            .enumerate()
            .filter(|(_, message)| message.after_original == after_original)
            .collect();
        for window in wave.chunks(WINDOW) {
            let confirms = window.iter().map(|(_, message)| self.publish_one(message));
            for result in join_all(confirms).await {
                result?;
            }
            let now = SystemTime::now();
            for (index, _) in window {
                self.times.confirmed[*index] = Some(now);
            }
            self.published += window.len() as u64;
            self.look().await;
        }
        Ok(())
    }

    async fn publish_one(&self, message: &Message) -> Result<(), String> {
        let name = message.name();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let mut properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_type("mail.job.v1".into())
            .with_delivery_mode(2)
            .with_timestamp(now.unwrap_or_default().as_secs());
        if message.gzip {
            properties = properties.with_content_encoding("gzip".into());
        }
        let key = format!("{}.{}", message.level, message.tenant);
        let options = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let publishing = async {
            self.channel
                .basic_publish("mail.jobs".into(), key.into(), options, &message.body, properties)
                .await?
                .await
        };
        match timeout(BROKER_LIMIT, publishing).await {
            Ok(Ok(Confirmation::Ack(None))) => Ok(()),
            Ok(Ok(other)) => Err(format!("{name} was not taken by the broker: {other:?}")),
            Ok(Err(error)) => Err(format!("{name} could not be published: {error}")),
            Err(_) => Err(format!("{name} was not confirmed within {BROKER_LIMIT:?}")),
        }
    }

    /// Repeats and conflicts whose original must have had its final report.
    async fn second_wave(&mut self) -> Result<(), String> {
        let late = self.plan.messages.iter().filter(|message| message.after_original);
        let originals: HashSet<&str> = late.filter_map(|message| message.id.as_deref()).collect();
        while self.begun.elapsed() < LIMIT {
            let (hooks, _) = self.look().await;
            let is_there = |id: &&str| {
                hooks
                    .iter()
                    .any(|hook| hook.is_final() && hook.text("job") == *id)
            };
            if originals.iter().all(is_there) {
                break;
            }
            sleep(LOOK).await;
        }
        self.publish(true).await
    }

    /// Until every report is there that must come and nothing more has come for a while.
    async fn until_all_is_there(&mut self) -> Vec<(&'static str, u64)> {
        let of = |outcome| self.plan.count(|message| message.outcome() == outcome) as u64;
        let wanted: HashMap<_, _> = Outcome::ALL.map(|outcome| (outcome.name(), of(outcome))).into();
        let mut complete: Option<Instant> = None;
        loop {
            let (_, counts) = self.look().await;
            let reached =
                |(name, count): &(&'static str, u64)| wanted.get(name).is_none_or(|want| count >= want);
            if counts.iter().all(reached) {
                let since = *complete.get_or_insert_with(Instant::now);
                if since.elapsed() >= QUIET && self.queues_are_empty().await {
                    return counts;
                }
            }
            if self.begun.elapsed() > LIMIT {
                return counts;
            }
            sleep(LOOK).await;
        }
    }

    /// What has come so far, shown as well.
    async fn look(&self) -> (Vec<Hook>, Vec<(&'static str, u64)>) {
        let hooks = hooks(self.world);
        let pages = metrics(&self.world.workers, &self.world.http).await;
        let sum = |series: &str| pages.iter().map(|page| page.sum(series)).sum::<f64>() as u64;
        let count = |outcome| match outcome {
            Outcome::Duplicate => sum("postroom_jobs_total{outcome=\"duplicate\"}"),
            outcome => hooks
                .iter()
                .filter(|hook| hook.outcome() == Some(outcome))
                .count() as u64,
        };
        let mut counts = vec![("published", self.published)];
        counts.extend(Outcome::ALL.map(|outcome| (outcome.name(), count(outcome))));
        self.progress.update(&counts, &self.waiting.shown().await);
        (hooks, counts)
    }

    async fn queues_are_empty(&self) -> bool {
        for queue in ["immediate", "high", "medium", "low"]
            .map(|level| format!("mail.jobs.{level}"))
            .into_iter()
            .chain(["mail.reports.bridge".to_owned()])
        {
            let options = QueueDeclareOptions {
                passive: true,
                ..QueueDeclareOptions::default()
            };
            let declaring = self
                .channel
                .queue_declare(queue.into(), options, FieldTable::default());
            match timeout(BROKER_LIMIT, declaring).await {
                Ok(Ok(queue)) if queue.message_count() == 0 => {}
                _ => return false,
            }
        }
        true
    }
}
