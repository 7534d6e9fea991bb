//! Sessions with the broker, one after the other. Any error ends the session; the supervisor builds a new one.
//!
//! lapin's own recovery is off: it would replay deliveries into the same stream without a sign that the old ones can no
//! longer be acknowledged.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::StreamExt as _;
use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, Connection, Event};
use secrecy::SecretString;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::acker::Acker;
use super::topology::TopologyError;
use super::{BrokerError, Consumer, Publisher, Subscription, Topology, close, connect, consumer};
use crate::config::{self, TopologyMode};
use crate::telemetry::metrics::Metrics;

/// Shortest and longest pause before the next session; jittered, so that workers do not return in step.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// A session that lived this long was a good one: the next pause is short again.
const GOOD_SESSION: Duration = Duration::from_mins(1);
/// For one request on a channel.
const REQUEST_LIMIT: Duration = Duration::from_secs(15);
/// How long whoever serves a session may take to notice its end.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);

/// Keeps a session alive, for as long as the process wants one.
#[derive(Debug)]
pub struct Supervisor {
    config: config::Broker,
    url: watch::Sender<SecretString>,
    topology: Topology,
    publisher: Publisher,
    connected: watch::Sender<bool>,
    metrics: Arc<Metrics>,
}

/// What a session and everything made from it share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) generation: u64,
    pub(super) ended: CancellationToken,
    pub(super) metrics: Arc<Metrics>,
    reason: Mutex<Option<String>>,
    ackers: Mutex<Vec<Acker>>,
}

impl Shared {
    /// Ends the session; the first reason is kept.
    pub(super) fn fail(&self, reason: impl Into<String>) {
        let mut kept = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.ended.is_cancelled() {
            kept.get_or_insert_with(|| reason.into());
        }
        drop(kept);
        self.ended.cancel();
    }

    fn reason(&self) -> Option<String> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Two connections to the broker: one consumes and acknowledges, the other publishes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Session {
    shared: Arc<Shared>,
    consume: Arc<Connection>,
    publisher: Publisher,
}

impl Session {
    /// Rises with every session of the process; deliveries of an older one can no longer be acknowledged.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.shared.generation
    }

    /// Cancelled when the session is over.
    #[must_use]
    pub fn ended(&self) -> &CancellationToken {
        &self.shared.ended
    }

    /// The process's publisher, see [`Supervisor::publisher`].
    #[must_use]
    pub fn publisher(&self) -> &Publisher {
        &self.publisher
    }

    /// Consumes a queue on a channel of its own: an error on one does not touch the others' deliveries.
    ///
    /// # Errors
    /// If the broker refuses, such as when the queue is missing, or does not answer.
    pub async fn consume(&self, subscription: Subscription) -> Result<Consumer, BrokerError> {
        let opening = self.open_consumer(&subscription);
        let (channel, stream) =
            timeout(REQUEST_LIMIT, opening)
                .await
                .map_err(|_| BrokerError::Timeout {
                    what: "basic.consume",
                })??;
        let acker = Acker::start(channel.clone(), subscription.prefetch, Arc::clone(&self.shared));
        self.shared
            .ackers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(acker.clone());
        Ok(Consumer::new(
            subscription,
            channel,
            stream,
            acker,
            Arc::clone(&self.shared),
        ))
    }

    async fn open_consumer(
        &self,
        subscription: &Subscription,
    ) -> Result<(Channel, lapin::Consumer), BrokerError> {
        let channel = self.consume.create_channel().await?;
        let stream = consumer::open(&channel, &subscription.queue, subscription.prefetch).await?;
        Ok((channel, stream))
    }

    /// Writes every acknowledgement handed in so far.
    async fn flush(&self) {
        let ackers = self
            .shared
            .ackers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for acker in ackers {
            acker.flush().await;
        }
    }
}

impl Supervisor {
    /// Connects nothing yet.
    #[must_use]
    pub fn new(config: config::Broker, metrics: Arc<Metrics>) -> Self {
        Self {
            topology: Topology::new(&config.prefix, &config.extra_queues),
            publisher: Publisher::new(Arc::clone(&metrics)),
            connected: watch::Sender::new(false),
            url: watch::Sender::new(config.url.clone()),
            config,
            metrics,
        }
    }

    /// The same for a process that needs no reports itself, see [`Topology::leaving_reports`].
    #[must_use]
    pub fn leaving_reports(mut self) -> Self {
        self.topology = self.topology.leaving_reports();
        self
    }

    /// A publisher that outlives sessions; between them it fails at once.
    #[must_use]
    pub fn publisher(&self) -> Publisher {
        self.publisher.clone()
    }

    /// Where sessions connect: a URL sent here is that of the next one. It must be well-formed, see [`super::vhost`].
    #[must_use]
    pub fn url(&self) -> watch::Sender<SecretString> {
        self.url.clone()
    }

    /// Names of exchanges and queues.
    #[must_use]
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Whether a session is open, for readiness.
    #[must_use]
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.subscribe()
    }

    /// Runs `serve` with one session after the other until `shutdown`.
    ///
    /// `serve` returns soon after [`Session::ended`]; on shutdown it drains its consumers and then returns, and only then
    /// are the connections closed. If it returns earlier the session ends too.
    ///
    /// # Errors
    /// What only the operator can change: a malformed URL, and at start an exchange or queue with other arguments, or with
    /// `POSTROOM_TOPOLOGY=check` any topology that is not as it should be.
    pub async fn run<F, S>(&self, shutdown: &CancellationToken, mut serve: F) -> Result<(), BrokerError>
    where
        F: FnMut(Session) -> S,
        S: Future<Output = Result<(), BrokerError>>,
    {
        let mut pauses = pauses();
        let mut generation = 0;
        let mut url = self.url.subscribe();
        loop {
            let started = Instant::now();
            let opened = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                opened = Box::pin(self.open(generation + 1)) => opened,
            };
            match opened {
                Ok((session, publish)) => {
                    generation += 1;
                    self.serve(&session, &publish, shutdown, &mut serve).await;
                }
                Err(error @ BrokerError::Url) => return Err(error),
                Err(BrokerError::Topology(wrong)) if generation == 0 && self.is_final(&wrong) => {
                    return Err(wrong.into());
                }
                Err(error) => error!(%error, "no session with RabbitMQ"),
            }
            if started.elapsed() > GOOD_SESSION {
                pauses = self::pauses();
            }
            let pause = pauses.next().unwrap_or(BACKOFF.1);
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
                Ok(()) = url.changed() => {}
            }
        }
    }

    /// Whether only the operator can change it. What is not permitted may be, a moment later, to who declares.
    fn is_final(&self, wrong: &TopologyError) -> bool {
        self.config.topology == TopologyMode::Check || !wrong.different.is_empty()
    }

    /// Connections, topology, the publishing channel.
    async fn open(&self, generation: u64) -> Result<(Session, Connection), BrokerError> {
        let config = config::Broker {
            url: self.url.borrow().clone(),
            ..self.config.clone()
        };
        let consume = connect(&config, "consume").await?;
        match self.config.topology {
            TopologyMode::Apply => {
                let applied = self.topology.apply(&consume).await?;
                if !applied.created.is_empty() {
                    info!(created = applied.created.join(", "), "topology applied");
                }
            }
            TopologyMode::Check => self.topology.check(&consume).await?,
            TopologyMode::Off => {}
        }
        let publish = connect(&config, "publish").await?;
        let channel = publishing_channel(&publish).await?;
        let shared = Arc::new(Shared {
            generation,
            ended: CancellationToken::new(),
            metrics: Arc::clone(&self.metrics),
            reason: Mutex::new(None),
            ackers: Mutex::new(Vec::new()),
        });
        watch_connection(&consume, &shared, None);
        watch_connection(&publish, &shared, Some(self.publisher.clone()));
        self.publisher.attach(channel, Some(Arc::clone(&shared)));
        let session = Session {
            shared,
            consume: Arc::new(consume),
            publisher: self.publisher.clone(),
        };
        Ok((session, publish))
    }

    async fn serve<F, S>(
        &self,
        session: &Session,
        publish: &Connection,
        shutdown: &CancellationToken,
        serve: &mut F,
    ) where
        F: FnMut(Session) -> S,
        S: Future<Output = Result<(), BrokerError>>,
    {
        self.metrics.broker_sessions.inc();
        self.set_connected(true);
        info!(generation = session.generation(), "session with RabbitMQ begun");
        let mut serving = Box::pin(serve(session.clone()));
        let ended = session.ended();
        let served = tokio::select! {
            served = &mut serving => Some(served),
            () = ended.cancelled() => timeout(LEAVE_LIMIT, &mut serving).await.ok(),
        };
        drop(serving);
        self.set_connected(false);
        if let Some(Err(error)) = served {
            session.shared.fail(error.to_string());
        }
        if !ended.is_cancelled() {
            session.flush().await;
        }
        match session.shared.reason() {
            Some(reason) => warn!(
                generation = session.generation(),
                reason, "session with RabbitMQ lost"
            ),
            None if shutdown.is_cancelled() => info!("session with RabbitMQ closed"),
            None => warn!(
                generation = session.generation(),
                "session with RabbitMQ given up"
            ),
        }
        self.publisher.detach();
        ended.cancel();
        tokio::join!(close(&session.consume), close(publish));
    }

    fn set_connected(&self, connected: bool) {
        self.connected.send_replace(connected);
        self.metrics
            .connected
            .with_label_values(&["amqp"])
            .set(i64::from(connected));
    }
}

/// A channel in confirm mode.
pub(super) async fn publishing_channel(connection: &Connection) -> Result<Channel, BrokerError> {
    let opening = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok::<_, lapin::Error>(channel)
    };
    Ok(timeout(REQUEST_LIMIT, opening)
        .await
        .map_err(|_| BrokerError::Timeout {
            what: "confirm.select",
        })??)
}

/// An idle connection notices its end only through its events.
fn watch_connection(connection: &Connection, shared: &Arc<Shared>, publisher: Option<Publisher>) {
    let mut events = connection.events_listener();
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let set_blocked = |blocked| {
            if let Some(publisher) = &publisher {
                publisher.set_blocked(blocked);
            }
        };
        loop {
            let event = tokio::select! {
                () = shared.ended.cancelled() => return,
                event = events.next() => event,
            };
            match event {
                Some(Event::Error(error)) => return shared.fail(error.to_string()),
                None => return shared.fail("the connection is gone"),
                Some(Event::ConnectionBlocked(reason)) => {
                    warn!(reason, "RabbitMQ blocks publishing");
                    set_blocked(true);
                }
                Some(Event::ConnectionUnblocked) => {
                    info!("RabbitMQ no longer blocks publishing");
                    set_blocked(false);
                }
                Some(_) => {}
            }
        }
    });
}

fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(BACKOFF.0)
        .with_max_delay(BACKOFF.1)
        .with_factor(2.0)
        .without_max_times()
        .with_jitter()
        .build()
        // Jitter is added on top of the longest pause.
        .map(|pause| pause.min(BACKOFF.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_half_a_minute_and_go_on() {
        let all: Vec<_> = pauses().take(200).collect();
        assert!(all.iter().all(|pause| (BACKOFF.0..=BACKOFF.1).contains(pause)));
        assert_eq!(all[199], BACKOFF.1);
        assert!(all[0] < Duration::from_secs(2));
    }
}
