//! The boot story of `postroom bridge`, and the broker as it sees it.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Bridge, BridgeError, Delivery, OwnReport, ReportSink, ReportSource};
use crate::broker::{
    self, BrokerError, DeadLetter, Properties, Publisher, Session, Subscription, Supervisor, Topology,
};
use crate::cli::{Service, ServiceError};
use crate::config;
use crate::db::{Database, DbError};
use crate::egress::EgressGuard;
use crate::secret::{Keys, KeysError};

/// Reports in hand at once.
const PREFETCH: u16 = 500;
/// AMQP `type` of a report.
const MESSAGE_TYPE: &str = "mail.report.v1";

/// What `postroom bridge` is started with.
#[derive(Debug)]
pub struct Settings {
    /// RabbitMQ.
    pub broker: config::Broker,
    /// Postgres.
    pub database: config::Database,
    /// Key rings.
    pub keys: config::Keys,
    /// Its own bounds.
    pub webhook: config::Webhook,
    /// Networks beyond public ones.
    pub egress: config::Egress,
}

/// Why a bridge cannot start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The keys cannot be read, or do not fit what is stored.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The database cannot be used.
    #[error(transparent)]
    Database(#[from] DbError),
    /// The broker cannot be used.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The bridge cannot be set up.
    #[error(transparent)]
    Bridge(#[from] BridgeError),
    /// The process.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// Runs a bridge until it is told to end.
///
/// # Errors
/// If it cannot start for a reason that waiting does not cure, or a part of it died.
pub async fn run(settings: Settings, service: Service) -> Result<(), RunError> {
    let worked = Box::pin(work(settings, &service)).await;
    // Also of one that could not begin: no part of it is to be found dead.
    service.shutdown.soft.cancel();
    let finished = service.finish().await;
    worked?;
    Ok(finished?)
}

/// From its settings to the end of its sessions.
async fn work(settings: Settings, service: &Service) -> Result<(), RunError> {
    let database = Database::connect(&settings.database)?;
    let (metrics, watched) = (Arc::clone(&service.metrics), Arc::clone(&service.metrics));
    let supervisor = Supervisor::new(settings.broker, Arc::clone(&metrics));
    service.follow_urls(supervisor.url(), database.clone());
    let ready = service.readiness.component("database");
    let amqp = service.readiness.component("amqp");
    let soft = service.shutdown.soft.clone();
    if !database.wait_until_usable(&ready, &soft).await? {
        return Ok(());
    }
    let keys = Keys::open(&settings.keys, &database).await?;
    service.follow_keys(keys.clone(), database.clone());
    let guard = Arc::new(EgressGuard::new(settings.egress));
    let bridge = Bridge::new(
        database.clone(),
        keys.encryption,
        guard,
        settings.webhook,
        metrics,
    )?
    .with_traces(service.traces.clone());
    let (reports, taken) = mpsc::channel(usize::from(PREFETCH));
    let (publisher, topology) = (supervisor.publisher(), supervisor.topology().clone());
    let source = Source {
        taken,
        publisher: publisher.clone(),
        topology: topology.clone(),
    };
    let sink = Sink {
        publisher,
        exchange: topology.reports_exchange(),
    };
    // Ends when everything taken in has been recorded: only then may the connections go.
    let done = CancellationToken::new();
    let (ended, shutdown) = (done.clone(), service.shutdown.clone());
    service.shutdown.spawn("bridge", async move {
        let _ended = ended.drop_guard();
        bridge.run(source, sink, shutdown).await;
    });
    service
        .shutdown
        .spawn("database", database.watch(ready, watched, soft.clone()));
    service.follow_broker(amqp, supervisor.connected());
    let queue = topology.reports_queue();
    let serving = supervisor.run(&soft, |session| {
        serve(
            session,
            queue.clone(),
            reports.clone(),
            soft.clone(),
            done.clone(),
        )
    });
    Ok(Box::pin(serving).await?)
}

/// One session: hands reports on until it ends or the bridge does.
async fn serve(
    session: Session,
    queue: String,
    reports: mpsc::Sender<broker::Delivery>,
    soft: CancellationToken,
    done: CancellationToken,
) -> Result<(), BrokerError> {
    let subscription = Subscription {
        queue: queue.into(),
        level: None,
        prefetch: PREFETCH,
    };
    let mut consumer = session.consume(subscription).await?;
    loop {
        let delivery = tokio::select! {
            biased;
            () = soft.cancelled() => break,
            delivery = consumer.next() => delivery,
        };
        let Some(delivery) = delivery else { return Ok(()) };
        // Closed only when the bridge has ended; dropped, the report goes back to its queue.
        if reports.send(delivery).await.is_err() {
            break;
        }
    }
    if consumer.stop().await.is_ok() {
        while consumer.next().await.is_some() {}
    }
    tokio::select! {
        () = done.cancelled() => {}
        () = session.ended().cancelled() => {}
    }
    Ok(())
}

/// Reports of all sessions, in turn.
struct Source {
    taken: mpsc::Receiver<broker::Delivery>,
    publisher: Publisher,
    topology: Topology,
}

impl ReportSource for Source {
    type Handle = broker::Delivery;

    async fn next_batch(&mut self, max: usize) -> Option<Vec<Delivery<Self::Handle>>> {
        let mut batch = Vec::new();
        if self.taken.recv_many(&mut batch, max).await == 0 {
            return None;
        }
        let batch = batch.into_iter().map(|handle| Delivery {
            event_id: handle.message_id().map(str::to_owned),
            routing_key: handle.routing_key.clone(),
            body: handle.body.clone(),
            handle,
        });
        Some(batch.collect())
    }

    async fn ack(&mut self, batch: Vec<Self::Handle>) {
        for delivery in batch {
            delivery.receipt.ack();
        }
    }

    async fn dead_letter(&mut self, handle: Self::Handle, reason: &'static str, detail: String) {
        let letter = DeadLetter {
            reason,
            detail: &detail,
            ..DeadLetter::default()
        };
        match self.publisher.dead_letter(&self.topology, &handle, &letter).await {
            Ok(()) => handle.receipt.ack(),
            Err(error) => {
                // Given back it comes again, and after enough rounds the queue's own dead-letter exchange takes it.
                tracing::warn!(%error, "a malformed report could not be dead-lettered; it will be delivered again");
                handle.receipt.give_back();
            }
        }
    }
}

/// The bridge's own reports.
struct Sink {
    publisher: Publisher,
    exchange: String,
}

impl ReportSink for Sink {
    async fn publish(&self, report: OwnReport) -> Result<(), String> {
        let properties = Properties::default()
            .with_message_id(report.event_id.as_str().into())
            .with_type(MESSAGE_TYPE.into())
            .with_content_type("application/json".into())
            .with_app_id("postroom".into());
        let published = self
            .publisher
            .publish(&self.exchange, &report.routing_key, properties, &report.body);
        published.await.map_err(|error| error.to_string())
    }
}
