//! Every report of a world, through a queue of one's own.

use std::collections::HashSet;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Consumer, message::Delivery};
use serde_json::Value;

use super::Amqp;

/// One report as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    /// AMQP `message_id`: the event id.
    pub(crate) id: String,
    pub(crate) key: String,
    /// The body as it came.
    pub(crate) body: Vec<u8>,
    pub(crate) json: Value,
    headers: FieldTable,
}

/// The published schema of reports.
static SCHEMA: LazyLock<jsonschema::Validator> = LazyLock::new(|| {
    let schema = include_str!("../../../schema/mail-report.v1.json");
    let options = jsonschema::draft202012::options().should_validate_formats(true);
    options.build(&serde_json::from_str(schema).unwrap()).unwrap()
});

impl Received {
    /// # Panics
    /// If it is no report of the published schema.
    fn new(delivery: &Delivery) -> Self {
        let id = delivery.properties.message_id().as_ref();
        let json = serde_json::from_slice(&delivery.data).unwrap();
        if let Err(error) = SCHEMA.validate(&json) {
            panic!("{json}: {error} at {}", error.instance_path());
        }
        Self {
            id: id.map(ToString::to_string).unwrap_or_default(),
            key: delivery.routing_key.to_string(),
            body: delivery.data.clone(),
            json,
            headers: delivery.properties.headers().clone().unwrap_or_default(),
        }
    }

    /// `mail.sent`, …
    pub(crate) fn kind(&self) -> &str {
        self.json["type"].as_str().unwrap_or_default()
    }

    pub(crate) fn job(&self) -> &str {
        self.json["data"]["job"].as_str().unwrap_or_default()
    }

    pub(crate) fn tenant(&self) -> &str {
        self.json["data"]["tenant"].as_str().unwrap_or_default()
    }

    /// A header of the AMQP message.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let value = self.headers.inner().get(name)?.as_long_string()?;
        std::str::from_utf8(value.as_bytes()).ok()
    }

    pub(crate) fn reason(&self) -> &str {
        self.json["data"]["reason"].as_str().unwrap_or_default()
    }

    pub(crate) fn is_final(&self) -> bool {
        self.json["data"]["final"] == true
    }
}

/// Collects from the moment it was made.
pub(crate) struct Reports {
    _amqp: Amqp,
    consumer: Consumer,
    all: Vec<Received>,
}

impl Reports {
    pub(crate) async fn collect(url: &str, exchange: &str) -> Self {
        let amqp = Amqp::connect(url).await;
        let options = QueueDeclareOptions {
            exclusive: true,
            auto_delete: true,
            ..QueueDeclareOptions::default()
        };
        let declared = amqp
            .channel
            .queue_declare("".into(), options, FieldTable::default());
        let queue = declared.await.unwrap().name().clone();
        let bound = amqp.channel.queue_bind(
            queue.clone(),
            exchange.into(),
            "#".into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        bound.await.unwrap();
        let options = BasicConsumeOptions {
            no_ack: true,
            ..BasicConsumeOptions::default()
        };
        let consumer = amqp
            .channel
            .basic_consume(queue, "".into(), options, FieldTable::default())
            .await
            .unwrap();
        Self {
            _amqp: amqp,
            consumer,
            all: Vec::new(),
        }
    }

    /// All so far, without waiting for more.
    pub(crate) fn all(&self) -> &[Received] {
        &self.all
    }

    /// Receives until `enough`, and gives all so far.
    ///
    /// # Panics
    /// After 60 s, listing what came.
    pub(crate) async fn until(&mut self, enough: impl FnMut(&[Received]) -> bool) -> &[Received] {
        self.until_within(Duration::from_mins(1), enough).await
    }

    /// [`Reports::until`] with a limit of one's own.
    pub(crate) async fn until_within(
        &mut self,
        limit: Duration,
        mut enough: impl FnMut(&[Received]) -> bool,
    ) -> &[Received] {
        let end = Instant::now() + limit;
        while !enough(&self.all) {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(received) = tokio::time::timeout(left, self.consumer.next()).await else {
                panic!(
                    "not within {limit:?}; {} reports: {}",
                    self.all.len(),
                    self.listing()
                );
            };
            let delivery = received.expect("the consumer of reports ended").unwrap();
            self.all.push(Received::new(&delivery));
        }
        &self.all
    }

    /// Waits for the final report of a job.
    pub(crate) async fn final_of(&mut self, job: &str) -> Received {
        let of_job = |report: &Received| report.job() == job && report.is_final();
        self.until(|all| all.iter().any(of_job)).await;
        self.all.iter().find(|report| of_job(report)).unwrap().clone()
    }

    /// Waits until so many jobs have a final report, and gives the final reports, each event once.
    pub(crate) async fn finals(&mut self, jobs: usize, limit: Duration) -> Vec<Received> {
        let (mut seen, mut done) = (0, HashSet::new());
        let all = self.until_within(limit, |all| {
            let news = all[seen..].iter().filter(|report| report.is_final());
            done.extend(news.map(|report| (report.tenant().to_owned(), report.job().to_owned())));
            seen = all.len();
            done.len() >= jobs
        });
        let mut events = HashSet::new();
        let finals = all.await.iter().filter(|report| report.is_final());
        finals
            .filter(|report| events.insert(report.id.clone()))
            .cloned()
            .collect()
    }

    /// Everything that was reported of a job so far, in order of arrival.
    pub(crate) fn of(&self, job: &str) -> Vec<&Received> {
        self.all.iter().filter(|report| report.job() == job).collect()
    }

    /// Whether nothing more comes within `time`; for what must not happen.
    pub(crate) async fn none_for(&mut self, time: Duration) -> bool {
        match tokio::time::timeout(time, self.consumer.next()).await {
            Ok(Some(delivery)) => {
                self.all.push(Received::new(&delivery.unwrap()));
                false
            }
            Ok(None) => panic!("the consumer of reports ended"),
            Err(_) => true,
        }
    }

    /// Whether nothing but repeats of known events comes within `time`: what a worker that was killed had published but not
    /// struck off is published once more by others.
    pub(crate) async fn nothing_new_for(&mut self, time: Duration) -> bool {
        let until = tokio::time::Instant::now() + time;
        let mut known: HashSet<String> = self.all.iter().map(|report| report.id.clone()).collect();
        while !self
            .none_for(until.saturating_duration_since(tokio::time::Instant::now()))
            .await
        {
            let last = self.all.last().map(|report| report.id.clone());
            if last.is_some_and(|id| known.insert(id)) {
                return false;
            }
        }
        true
    }

    fn listing(&self) -> String {
        let lines = self.all.iter().rev().take(50);
        let lines: Vec<_> = lines
            .map(|report| format!("{} {} {}", report.kind(), report.job(), report.reason()))
            .collect();
        lines.join("\n")
    }
}
