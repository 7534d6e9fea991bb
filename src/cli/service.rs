//! What `postroom worker` and `postroom bridge` have in common: signals, the HTTP port, and an orderly end.

use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::broker;
use crate::config::{self, FromSettings, Sources};
use crate::db::Database;
use crate::health::{self, HealthError, Readiness, Server};
use crate::secret::Keys;
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::{self, Exporter, Traces};

/// How long tasks may take to notice the hard token.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long the last spans may take at the end.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// When to try again after keys could not be checked.
const KEYS_AGAIN: Duration = Duration::from_secs(5);

/// A long-running process, before and after its own work.
#[derive(Debug)]
pub struct Service {
    /// Tokens, and tasks that belong to the process.
    pub shutdown: Shutdown,
    /// What `/readyz` asks.
    pub readiness: Readiness,
    /// What `/metrics` shows.
    pub metrics: Arc<Metrics>,
    /// Makes spans, if there is a collector.
    pub traces: Option<Arc<Traces>>,
    exporter: Option<Exporter>,
    sources: Sources,
    http: Option<(CancellationToken, JoinHandle<()>)>,
}

/// Why a process cannot start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Signal handlers cannot be installed.
    #[error("cannot listen to signals")]
    Signals(#[source] std::io::Error),
    /// A metric's name is taken: a mistake in the table of metrics.
    #[error("cannot register metrics")]
    Metrics(#[from] prometheus::Error),
    /// The port cannot be opened.
    #[error(transparent)]
    Http(#[from] HealthError),
    /// Spans cannot be exported.
    #[error(transparent)]
    Traces(#[from] traces::SetupError),
    /// A task died; its error has been logged.
    #[error("a part of the process died")]
    Crashed,
}

impl Service {
    /// Listens to signals and opens the port. Nothing is ready until its component says so. The name, such as `worker`,
    /// tells the metrics of one kind of process from those of another.
    ///
    /// # Errors
    /// If any of it cannot be had.
    pub async fn start(
        name: &str,
        telemetry: &config::Telemetry,
        traces: Option<&config::Traces>,
        process: config::Process,
        sources: &Sources,
    ) -> Result<Self, ServiceError> {
        let shutdown = Shutdown::new();
        shutdown
            .listen(process.grace_period)
            .map_err(ServiceError::Signals)?;
        let (readiness, metrics) = (Readiness::default(), Arc::new(Metrics::new()?));
        metrics
            .build_info
            .with_label_values(&[env!("CARGO_PKG_VERSION"), name])
            .set(1);
        for dependency in ["amqp", "database"] {
            metrics.connected.with_label_values(&[dependency]).set(0);
        }
        let exporter = match traces {
            None => None,
            Some(traces) => Some(Exporter::start(traces, name, Arc::clone(&metrics))?),
        };
        let http = match telemetry.http_addr {
            None => None,
            Some(addr) => {
                let server = Server::bind(addr, readiness.clone(), Arc::clone(&metrics)).await?;
                // It ends after everything else: while the process drains it is alive, and not ready.
                let end = CancellationToken::new();
                Some((end.clone(), tokio::spawn(server.run(end))))
            }
        };
        let (soft, told) = (shutdown.soft.clone(), readiness.clone());
        // As soon as it is told to end, not when it has drained: no new traffic, no rollout that counts on it.
        tokio::spawn(async move {
            soft.cancelled().await;
            told.component("shutdown").not_ready("shutting down");
        });
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "starting");
        Ok(Self {
            shutdown,
            readiness,
            metrics,
            traces: traces
                .zip(exporter.as_ref())
                .map(|(config, exporter)| Traces::new(config.sampler, exporter)),
            exporter,
            sources: sources.clone(),
            http,
        })
    }

    /// Lets a component of readiness follow the session with the broker. Register it before any other becomes ready:
    /// nobody may be told that the process can work while it has no session.
    pub fn follow_broker(&self, amqp: health::Handle, mut connected: watch::Receiver<bool>) {
        let soft = self.shutdown.soft.clone();
        self.shutdown.spawn("readiness", async move {
            loop {
                if *connected.borrow_and_update() {
                    amqp.ready();
                } else {
                    amqp.not_ready("no session with RabbitMQ");
                }
                tokio::select! {
                    () = soft.cancelled() => return,
                    changed = connected.changed() => if changed.is_err() { return },
                }
            }
        });
    }

    /// Reads the keys again with every SIGHUP. What cannot be used is told, and the keys in use stay.
    pub fn follow_keys(&self, keys: Keys, database: Database) {
        let (sources, soft) = (self.sources.clone(), self.shutdown.soft.clone());
        let mut reloads = self.shutdown.reloads();
        self.shutdown.spawn("keys", async move {
            loop {
                tokio::select! {
                    () = soft.cancelled() => return,
                    changed = reloads.changed() => if changed.is_err() { return },
                }
                while !reload(&keys, &sources, &database).await {
                    tokio::select! {
                        () = soft.cancelled() => return,
                        () = tokio::time::sleep(KEYS_AGAIN) => {}
                    }
                }
            }
        });
    }

    /// Reads the URLs of broker and database again with every SIGHUP, for connections that are opened from then on. What
    /// cannot be used is told, and the URL in use stays.
    pub fn follow_urls(&self, broker: watch::Sender<SecretString>, database: Database) {
        let (sources, soft) = (self.sources.clone(), self.shutdown.soft.clone());
        let mut reloads = self.shutdown.reloads();
        self.shutdown.spawn("urls", async move {
            loop {
                tokio::select! {
                    () = soft.cancelled() => return,
                    changed = reloads.changed() => if changed.is_err() { return },
                }
                let changed = read_again::<config::Broker>(&sources).and_then(|new| {
                    broker::vhost(&new.url).map_err(|error| error.to_string())?;
                    broker.send_replace(new.url);
                    Ok(())
                });
                if let Err(error) = changed {
                    tracing::error!(error, "POSTROOM_AMQP_URL: the URL in use stays");
                }
                let changed = read_again::<config::Database>(&sources)
                    .and_then(|new| database.reconnect(&new).map_err(|error| error.to_string()));
                if let Err(error) = changed {
                    tracing::error!(error, "POSTROOM_DATABASE_URL: the URL in use stays");
                }
            }
        });
    }

    /// Waits for the soft token, then for the tasks to end, at most until the hard token; closes the port.
    ///
    /// # Errors
    /// [`ServiceError::Crashed`] if a task died.
    pub async fn finish(self) -> Result<(), ServiceError> {
        self.shutdown.soft.cancelled().await;
        let complete = self.shutdown.drained(PATIENCE).await;
        if let Some(exporter) = self.exporter {
            exporter.finish(LAST_SPANS).await;
        }
        if let Some((end, server)) = self.http {
            end.cancel();
            // It bounds itself, and an error has been logged.
            let _ = server.await;
        }
        tracing::info!(complete, "ended");
        if self.shutdown.crashed() {
            Err(ServiceError::Crashed)
        } else {
            Ok(())
        }
    }
}

/// A section as it is now; an error names everything that is wrong.
fn read_again<T: FromSettings>(sources: &Sources) -> Result<T, String> {
    config::load(sources).map_err(|errors| {
        let errors: Vec<_> = errors.iter().map(ToString::to_string).collect();
        errors.join("; ")
    })
}

/// Whether it is decided: the keys are replaced, or are no good.
async fn reload(keys: &Keys, sources: &Sources, database: &Database) -> bool {
    let config: config::Keys = match read_again(sources) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!(error, "the keys in use stay");
            return true;
        }
    };
    match keys.replace(&config, database).await {
        Ok(()) => true,
        Err(error) if error.is_passing() => {
            tracing::warn!(%error, "the new keys cannot be checked, will try again; the keys in use stay");
            false
        }
        Err(error) => {
            tracing::error!(%error, "the keys in use stay");
            true
        }
    }
}
