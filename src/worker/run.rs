//! The boot story of `postroom worker`, and its end.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::admission::Admission;
use super::arrival::{Arrival, Decoded};
use super::intake::Intake;
use super::load::Load;
use super::permits::Permits;
use super::reporter::{Reporter, sweep};
use super::{Worker, dispatcher, housekeeping, intake, park, pause};
use crate::attachment::{Attachments, StorageError};
use crate::broker::{BrokerError, Delivery, Session, Subscription, Supervisor};
use crate::cli::{Service, ServiceError};
use crate::config;
use crate::db::{Database, DbError};
use crate::directory::Directory;
use crate::egress::EgressGuard;
use crate::health;
use crate::id::AccountKey;
use crate::ledger::batches::Batches;
use crate::ledger::{Epoch, Ledger};
use crate::level::Level;
use crate::memory::Memory;
use crate::pipeline::attempt::Pipeline;
use crate::pipeline::task::SharedClock;
use crate::secret::{Keys, KeysError};
use crate::smtp::{CapsError, ConnectionCaps, Pools};
use crate::telemetry::metrics::Metrics;

/// What `postroom worker` is started with.
#[derive(Debug)]
pub struct Settings {
    /// RabbitMQ.
    pub broker: config::Broker,
    /// Postgres.
    pub database: config::Database,
    /// Key rings.
    pub keys: config::Keys,
    /// The SMTP client.
    pub smtp: config::Smtp,
    /// The object store.
    pub storage: Option<config::Storage>,
    /// Fetching attachments.
    pub fetch: config::Fetch,
    /// Bounds of a job.
    pub limits: config::JobLimits,
    /// Its own bounds.
    pub worker: config::Worker,
    /// Networks beyond public ones.
    pub egress: config::Egress,
}

/// Why a worker cannot start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The keys cannot be read, or do not fit what is stored.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The database cannot be used.
    #[error(transparent)]
    Database(#[from] DbError),
    /// The broker cannot be used.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The object store cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The SMTP client cannot be set up.
    #[error(transparent)]
    Smtp(#[from] crate::smtp::TlsSetupError),
    /// The process.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

/// Runs a worker until it is told to end.
///
/// # Errors
/// If it cannot start for a reason that waiting does not cure, or a part of it died.
pub async fn run(settings: Settings, service: Service) -> Result<(), WorkerError> {
    let worked = Box::pin(work(settings, &service)).await;
    // Also of one that could not begin: no part of it is to be found dead.
    service.shutdown.soft.cancel();
    let finished = service.finish().await;
    worked?;
    Ok(finished?)
}

/// From its settings to the end of its last job.
async fn work(settings: Settings, service: &Service) -> Result<(), WorkerError> {
    let database = Database::connect(&settings.database)?;
    let supervisor = Supervisor::new(settings.broker.clone(), Arc::clone(&service.metrics)).leaving_reports();
    service.follow_urls(supervisor.url(), database.clone());
    let ready = service.readiness.component("database");
    let amqp = service.readiness.component("amqp");
    let intake = service.readiness.component("intake");
    if !database.wait_until_usable(&ready, &service.shutdown.soft).await? {
        return Ok(());
    }
    let keys = Keys::open(&settings.keys, &database).await?;
    service.follow_keys(keys.clone(), database.clone());
    let (worker, arrivals) = build(settings, service, keys, database, ready, &supervisor).await?;
    // Before the first job: by a host's own clock it might seem expired.
    if let Err(error) = worker.correct_clock().await {
        worker.database_trouble("clock", &error);
    }
    let end = CancellationToken::new();
    let parts = Parts {
        worker: Arc::clone(&worker),
        service,
        amqp,
        intake,
        end: end.clone(),
    };
    let takers = parts.start(arrivals);
    let soft = service.shutdown.soft.clone();
    let drained = Drained {
        worker: Arc::clone(&worker),
        takers,
        hard: service.shutdown.hard.clone(),
    };
    let serving = supervisor.run(&soft, |session| {
        serve(Arc::clone(&worker), session, soft.clone(), drained.clone())
    });
    let served = Box::pin(serving).await;
    if served.is_err() {
        soft.cancel();
    }
    let complete = drained.wait().await;
    end.cancel();
    worker.pipeline.pools.close().await;
    // What is still in flight is nobody else's until the lease runs out.
    if complete && let Err(error) = worker.ledger.retire(&worker.epoch()).await {
        tracing::warn!(%error, "this worker could not sign off; its leases run out by themselves");
    }
    Ok(served?)
}

/// The ledger as a worker uses it.
fn open_ledger(
    database: &Database,
    metrics: Arc<Metrics>,
    settings: &config::Worker,
) -> Result<Ledger, DbError> {
    let ledger = Ledger::new(database.clone(), metrics).with_vital(database.reserved()?);
    Ok(ledger.with_breaker(settings.breaker))
}

/// After this time an attempt has met all its time limits. What comes before the transaction, attachments above all, is
/// part of it.
fn attempt_deadline(timeouts: config::SmtpTimeouts) -> Duration {
    timeouts.final_reply + 3 * timeouts.attempt
}

/// Puts a worker together.
async fn build(
    settings: Settings,
    service: &Service,
    keys: Keys,
    database: Database,
    ready: health::Handle,
    supervisor: &Supervisor,
) -> Result<(Arc<Worker>, mpsc::Receiver<Box<Arrival>>), WorkerError> {
    let (metrics, name) = (Arc::clone(&service.metrics), host_name());
    let ledger = open_ledger(&database, Arc::clone(&metrics), &settings.worker)?;
    let (lease, attempt_deadline) = (settings.worker.lease, attempt_deadline(settings.smtp.timeouts));
    let epoch = ledger.register(&name, lease, attempt_deadline).await?;
    let guard = Arc::new(EgressGuard::new(settings.egress));
    let caps = Arc::new(Caps::new(&ledger, &epoch));
    let (arrivals, taken) = mpsc::channel(64);
    let (clock, batches) = (Arc::new(SharedClock::default()), Batches::new(&ledger));
    let pool_size = settings.smtp.pool_size;
    let memory = Memory::new(settings.worker.job_memory, metrics.job_bytes.clone());
    let directory = Directory::new(database, keys.encryption.clone(), settings.worker.retry);
    let pipeline = Pipeline {
        directory: Arc::new(directory),
        attachments: Attachments::new(
            settings.fetch,
            settings.storage.as_ref(),
            Arc::clone(&guard),
            Arc::clone(&metrics),
        )?,
        pools: Pools::new(
            settings.smtp,
            guard,
            Arc::clone(&caps) as Arc<dyn ConnectionCaps>,
            Arc::clone(&metrics),
        )?,
        batches: batches.clone(),
        memory: Arc::clone(&memory),
        keys,
        installation_secret: ledger.installation_secret().await?,
        unknown_tenant: settings.worker.unknown_tenant,
        clock: Arc::clone(&clock),
        metrics: Arc::clone(&metrics),
        alone: tokio::sync::Semaphore::new(1),
    };
    let worker = Arc::new(Worker {
        permits: Permits::new(settings.worker.concurrency, Arc::clone(&metrics)),
        permits_total: settings.worker.concurrency,
        memory,
        load: Load::new(settings.worker.concurrency),
        pool_size,
        limits: settings.limits,
        retry: settings.worker.retry,
        deferred_report_after: settings.worker.deferred_report_after,
        lease,
        attempt_deadline,
        retention: settings.worker.retention,
        publisher: supervisor.publisher(),
        topology: supervisor.topology().clone(),
        connected: supervisor.connected(),
        reporter: Reporter::new(settings.worker.outbox_limit),
        tasks: TaskTracker::new(),
        nudge: Notify::new(),
        pause: pause::Pause::default(),
        database: ready,
        epoch: RwLock::new(epoch),
        caps,
        arrivals,
        name,
        ledger,
        batches,
        pipeline,
        clock,
        metrics,
        traces: service.traces.clone(),
    });
    Ok((worker, taken))
}

/// The parts that run beside the sessions with the broker.
struct Parts<'a> {
    worker: Arc<Worker>,
    service: &'a Service,
    amqp: health::Handle,
    intake: health::Handle,
    end: CancellationToken,
}

impl Parts<'_> {
    /// Starts them. The tracker is empty when nothing new can begin any more: admission has ended and given back what it
    /// had in hand, and the dispatcher takes nothing out of the waiting room.
    fn start(self, arrivals: mpsc::Receiver<Box<Arrival>>) -> TaskTracker {
        let soft = self.service.shutdown.soft.clone();
        let spawn = &self.service.shutdown;
        let takers = TaskTracker::new();
        let (entrance, for_later) = park::Entrance::new();
        let parking = park::run(Arc::clone(&self.worker), for_later, soft.clone());
        spawn.spawn("parking", takers.track_future(parking));
        let admission = Admission::new(Arc::clone(&self.worker), entrance).run(arrivals, soft.clone());
        spawn.spawn("admission", takers.track_future(admission));
        let dispatcher = dispatcher::run(Arc::clone(&self.worker), soft.clone());
        spawn.spawn("dispatcher", takers.track_future(dispatcher));
        takers.close();
        let pauses = pause::run(Arc::clone(&self.worker), self.intake, soft.clone());
        spawn.spawn("pauses", pauses);
        spawn.spawn("outbox", sweep::run(Arc::clone(&self.worker), soft.clone()));
        spawn.spawn(
            "housekeeping",
            housekeeping::run(Arc::clone(&self.worker), soft.clone(), self.end),
        );
        let database = self.worker.ledger.database().clone();
        spawn.spawn(
            "database",
            database.watch(
                self.worker.database.clone(),
                Arc::clone(&self.worker.metrics),
                soft.clone(),
            ),
        );
        self.service
            .follow_broker(self.amqp, self.worker.connected.clone());
        takers
    }
}

/// One session: consumes all job queues until it ends or the worker does; then waits for what is in flight, so that
/// its acknowledgements still find their channel.
async fn serve(
    worker: Arc<Worker>,
    session: Session,
    soft: CancellationToken,
    drained: Drained,
) -> Result<(), BrokerError> {
    let mut paused = worker.pause.watch();
    let mut consumers = tokio::select! {
        biased;
        () = soft.cancelled() => JoinSet::new(),
        () = session.ended().cancelled() => JoinSet::new(),
        () = pause::over(&mut paused) => consume_all(&worker, &session, &soft).await?,
    };
    while consumers.join_next().await.is_some() {}
    if soft.is_cancelled() && !session.ended().is_cancelled() {
        tokio::select! {
            _ = drained.wait() => {}
            () = session.ended().cancelled() => {}
        }
    }
    Ok(())
}

/// Readers of all job queues.
async fn consume_all(
    worker: &Arc<Worker>,
    session: &Session,
    soft: &CancellationToken,
) -> Result<JoinSet<()>, BrokerError> {
    let mut consumers = JoinSet::new();
    for (level, queue) in worker.topology.job_queues() {
        let widest = widest(*level, worker.permits_total);
        let subscription = Subscription {
            queue: queue.as_str().into(),
            level: Some(*level),
            prefetch: widest.min(intake::FIRST),
        };
        let consumer = session.consume(subscription).await?;
        let (kept, taken) = mpsc::channel(widest.into());
        let ends = (soft.clone(), session.ended().clone());
        consumers.spawn(Intake::new(Arc::clone(worker), consumer, widest, kept, ends).run());
        let (worker, ended) = (Arc::clone(worker), session.ended().clone());
        consumers.spawn(decode(worker, taken, *level, ended, soft.clone()));
    }
    Ok(consumers)
}

/// Deliveries whose tenants are read together.
const DECODED_AT_ONCE: usize = 64;
/// A body that takes so long to decode, in bytes, that others have their turn before it.
const LARGE: usize = 64 << 10;

/// Deliveries of one queue, decoded in turn.
async fn decode(
    worker: Arc<Worker>,
    mut kept: mpsc::Receiver<Delivery>,
    level: Level,
    ended: CancellationToken,
    soft: CancellationToken,
) {
    let mut deliveries = Vec::with_capacity(DECODED_AT_ONCE);
    let mut paused = worker.pause.watch();
    while kept.recv_many(&mut deliveries, DECODED_AT_ONCE).await > 0 {
        // What was not begun goes back, by being dropped.
        if soft.is_cancelled() || worker.pause.is_on() {
            deliveries.clear();
            continue;
        }
        let mut decoded = Vec::with_capacity(deliveries.len());
        for delivery in deliveries.drain(..) {
            if delivery.body.len() > LARGE {
                tokio::task::yield_now().await;
            }
            decoded.extend(worker.decode(delivery, &ended));
        }
        // Without the database this waits; what comes out of it goes back when the worker or the session ends, or a pause
        // begins.
        tokio::select! {
            biased;
            () = soft.cancelled() => {}
            () = ended.cancelled() => {}
            () = pause::begun(&mut paused) => {}
            () = receive_all(&worker, decoded, level, &ended) => {}
        }
    }
}

/// Finds out who is to send each, and hands them to admission.
async fn receive_all(worker: &Arc<Worker>, decoded: Vec<Decoded>, level: Level, ended: &CancellationToken) {
    worker.know_tenants(&decoded).await;
    for decoded in decoded {
        if let Some(arrival) = worker.receive(decoded, level, ended).await {
            worker.arrive(arrival).await;
        }
    }
}

/// Enough in hand to keep the permits busy, little enough not to starve other workers.
fn widest(level: Level, permits: usize) -> u16 {
    let factor = if level <= Level::High { 2 } else { 4 };
    u16::try_from(permits * factor).unwrap_or(u16::MAX).max(32)
}

/// The end of everything in flight.
#[derive(Clone)]
struct Drained {
    worker: Arc<Worker>,
    takers: TaskTracker,
    hard: CancellationToken,
}

impl Drained {
    /// Waits for everything in flight, at most until the hard end. Whether all of it ended.
    async fn wait(&self) -> bool {
        let jobs = &self.worker.tasks;
        let all = async {
            self.takers.wait().await;
            jobs.close();
            jobs.wait().await;
        };
        tokio::pin!(all);
        let mut told = tokio::time::interval(Duration::from_secs(5));
        told.tick().await;
        loop {
            tokio::select! {
                () = &mut all => return true,
                () = self.hard.cancelled() => {
                    tracing::warn!(jobs = jobs.len(), "the grace period is over; what is in flight is left to other workers");
                    return false;
                }
                _ = told.tick() => tracing::info!(
                    jobs = jobs.len(),
                    "waiting for mail in flight; ending now could send it twice"
                ),
            }
        }
    }
}

/// The cluster-wide connection caps, as the pools ask for them.
#[derive(Debug)]
pub(super) struct Caps {
    ledger: Ledger,
    epoch: RwLock<Arc<Epoch>>,
}

impl Caps {
    fn new(ledger: &Ledger, epoch: &Arc<Epoch>) -> Self {
        Self {
            ledger: ledger.clone(),
            epoch: RwLock::new(Arc::clone(epoch)),
        }
    }

    fn epoch(&self) -> Arc<Epoch> {
        Arc::clone(
            &self
                .epoch
                .read()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        )
    }

    /// Leases belong to an epoch; a new one begins with none.
    pub(super) fn renew(&self, epoch: &Arc<Epoch>) {
        *self
            .epoch
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::clone(epoch);
    }
}

impl ConnectionCaps for Caps {
    fn acquire<'a>(&'a self, key: &'a AccountKey, _cap: u32) -> BoxFuture<'a, Result<bool, CapsError>> {
        // The cap itself is read where it is kept, under its lock.
        Box::pin(async move {
            self.ledger
                .acquire_connection(&self.epoch(), key)
                .await
                .map_err(|error| CapsError(error.to_string()))
        })
    }

    fn wanted(&self) -> BoxFuture<'_, Result<Vec<AccountKey>, CapsError>> {
        Box::pin(async move {
            self.ledger
                .wanted_connections(&self.epoch())
                .await
                .map_err(|error| CapsError(error.to_string()))
        })
    }

    fn release<'a>(&'a self, key: &'a AccountKey) -> BoxFuture<'a, Result<(), CapsError>> {
        Box::pin(async move {
            self.ledger
                .release_connection(self.epoch().number(), key)
                .await
                .map_err(|error| CapsError(error.to_string()))
        })
    }

    fn restate<'a>(&'a self, held: &'a [(AccountKey, u32)]) -> BoxFuture<'a, Result<(), CapsError>> {
        Box::pin(async move {
            self.ledger
                .restate_connections(&self.epoch(), held)
                .await
                .map_err(|error| CapsError(error.to_string()))
        })
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{}", name.trim(), std::process::id())
}
