//! A schema of its own for each test, with whatever acts in it.

use std::io::Cursor;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use postroom_testkit::webhook::{Received, WebhookReceiver};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::bridge::intake::IncomingReport;
use crate::bridge::{Bridge, Delivery, OwnReport, ReportSink, ReportSource};
use crate::cli::endpoint::{self, EndpointCommand, Streams};
use crate::config;
use crate::db::{self, Database};
use crate::egress::EgressGuard;
use crate::secret::Keyring;
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::Metrics;

pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct World {
    pub(super) database: Database,
    settings: config::Database,
    pub(super) keyring: Arc<Keyring>,
    pub(super) config: config::Webhook,
    pub(super) metrics: Arc<Metrics>,
    allow: Vec<ipnet::IpNet>,
}

impl World {
    /// With the given tenants. Everything that is slow in life is quick here.
    pub(super) async fn new(tenants: &[&str]) -> Self {
        Self::connected(tenants, 4).await
    }

    /// The same, with at most so many connections.
    pub(super) async fn connected(tenants: &[&str], pool_size: usize) -> Self {
        let url = std::env::var("POSTROOM_TEST_DATABASE_URL").expect(
            "POSTROOM_TEST_DATABASE_URL must name a Postgres server for tests; `make test` brings one up",
        );
        let settings = config::Database {
            url: url.into(),
            schema: format!("bridge_{}", uuid::Uuid::new_v4().simple()),
            ca_file: None,
            pool_size,
        };
        db::migrate(&settings).await.unwrap();
        let database = Database::connect(&settings).unwrap();
        let world = Self {
            database,
            settings,
            keyring: keyring("k1", 7),
            config: config::Webhook {
                timeout: Duration::from_secs(3),
                concurrency: 16,
                per_endpoint: 4,
                disable_after: Duration::from_hours(120),
                retention: Duration::from_hours(720),
                retry_scale: 1e-7,
            },
            metrics: Arc::new(Metrics::new().unwrap()),
            allow: vec!["127.0.0.0/8".parse().unwrap()],
        };
        for tenant in tenants {
            world
                .sql(&format!("INSERT INTO {{s}}.tenant (id) VALUES ('{tenant}')"))
                .await;
        }
        world
    }

    pub(super) fn forbid_loopback(&mut self) {
        self.allow.clear();
    }

    /// One more bridge, as configured now.
    pub(super) fn bridge(&self) -> Bridge {
        let guard = EgressGuard::new(config::Egress {
            allow: self.allow.clone(),
        });
        Bridge::new(
            self.database.clone(),
            Arc::clone(&self.keyring),
            Arc::new(guard),
            self.config.clone(),
            Arc::clone(&self.metrics),
        )
        .unwrap()
    }

    /// Starts a bridge with a queue of its own.
    pub(super) fn start(&self) -> Running {
        let (queue, incoming) = mpsc::unbounded_channel();
        let settled = Arc::new(Settled::default());
        let source = Queue {
            incoming,
            settled: Arc::clone(&settled),
        };
        let sink = Exchange {
            queue: queue.clone(),
            published: Arc::default(),
        };
        let published = Arc::clone(&sink.published);
        let shutdown = Shutdown::new();
        let task = tokio::spawn(self.bridge().run(source, sink, shutdown.clone()));
        Running {
            queue,
            settled,
            published,
            shutdown,
            task: Some(task),
        }
    }

    /// Records reports without a broker: `(event id, tenant, type)`.
    pub(super) async fn record(&self, reports: &[(&str, &str, &str)]) -> u64 {
        let batch: Vec<_> = reports
            .iter()
            .map(|(id, tenant, kind)| report(id, tenant, kind))
            .collect();
        self.bridge().record(&batch).await.unwrap()
    }

    /// Runs `postroom endpoint …`; gives what it printed, and its remarks.
    pub(super) async fn endpoint(&self, arguments: &[&str], input: &str) -> Result<(String, String), String> {
        #[derive(Parser)]
        struct Line {
            #[command(subcommand)]
            command: EndpointCommand,
        }
        let line =
            Line::try_parse_from(std::iter::once(&"endpoint").chain(arguments)).map_err(|e| e.to_string())?;
        let (mut input, mut output, mut remarks) = (Cursor::new(input), Vec::new(), Vec::new());
        let streams = Streams {
            input: &mut input,
            output: &mut output,
            remarks: &mut remarks,
        };
        endpoint::run(line.command, &self.database, Some(&self.keyring), streams)
            .await
            .map_err(|error| error.to_string())?;
        Ok((
            String::from_utf8(output).unwrap(),
            String::from_utf8(remarks).unwrap(),
        ))
    }

    /// Sets an endpoint, which must work; gives its new secret.
    pub(super) async fn set(
        &self,
        tenant: &str,
        name: &str,
        hook: &WebhookReceiver,
        more: &[&str],
    ) -> String {
        let url = hook.url(&format!("/{tenant}/{name}"));
        let mut arguments = vec!["set", tenant, name, "--url", &url, "--generate-secret"];
        arguments.extend(more);
        self.endpoint(&arguments, "").await.unwrap().0.trim().to_owned()
    }

    pub(super) async fn show(&self, tenant: &str, name: &str) -> serde_json::Value {
        let (output, _) = self
            .endpoint(&["show", tenant, name, "--json"], "")
            .await
            .unwrap();
        serde_json::from_str(&output).unwrap()
    }

    pub(super) async fn sql(&self, text: &str) -> u64 {
        let client = self.database.client().await.unwrap();
        client.execute_typed(&self.database.sql(text), &[]).await.unwrap()
    }

    /// Records so many reports of sent mails of this tenant.
    pub(super) async fn backlog(&self, tenant: &str, count: usize) {
        let batch: Vec<_> = (0..count)
            .map(|n| report(&format!("evt_{n}"), tenant, "mail.sent"))
            .collect();
        self.bridge().record(&batch).await.unwrap();
    }

    /// The one number that a query gives.
    pub(super) async fn count(&self, text: &str) -> i64 {
        let client = self.database.client().await.unwrap();
        client
            .query_typed_one(&self.database.sql(text), &[])
            .await
            .unwrap()
            .get(0)
    }

    pub(super) async fn deliveries(&self, state: &str) -> i64 {
        self.count(&format!(
            "SELECT count(*) FROM {{s}}.webhook_delivery WHERE state = '{state}'"
        ))
        .await
    }

    /// Waits until the number of deliveries in a state is this.
    pub(super) async fn until_deliveries(&self, state: &str, number: i64) {
        until(async || self.deliveries(state).await == number).await;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let settings = self.settings.clone();
        // The test's own runtime may be gone or busy.
        let cleaner = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let database = Database::connect(&settings).unwrap();
                let client = database.client().await.unwrap();
                let sql = database.sql("SET lock_timeout = '10s'; DROP SCHEMA {s} CASCADE");
                client.batch_execute(&sql).await.unwrap();
            });
        });
        let dropped = cleaner.join().is_ok();
        assert!(
            dropped || std::thread::panicking(),
            "the schema of the test could not be dropped"
        );
    }
}

pub(super) fn keyring(kid: &str, byte: u8) -> Arc<Keyring> {
    use base64::Engine as _;
    let key = base64::engine::general_purpose::STANDARD.encode([byte; 32]);
    Arc::new(Keyring::parse(&format!("{kid}:{key}").into()).unwrap())
}

pub(super) fn report(id: &str, tenant: &str, kind: &str) -> IncomingReport {
    let body = body(tenant, kind);
    IncomingReport::read(Some(id), &format!("report.{tenant}.{kind}"), &body).unwrap()
}

fn body(tenant: &str, kind: &str) -> Bytes {
    json!({"type": kind, "timestamp": "2026-01-01T00:00:00Z", "data": {"tenant": tenant, "recipients": []}})
        .to_string()
        .into()
}

/// Polls a condition until it holds.
pub(super) async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.expect("the condition did not come to hold in time");
}

/// The ids of events received, sorted.
pub(super) fn ids(received: &[Received]) -> Vec<&str> {
    let mut ids: Vec<&str> = received.iter().map(Received::event_id).collect();
    ids.sort_unstable();
    ids
}

/// The queue's view of what became of deliveries.
#[derive(Default)]
pub(super) struct Settled {
    pub(super) acked: Mutex<Vec<u64>>,
    pub(super) dead: Mutex<Vec<(u64, &'static str)>>,
}

/// A bridge at work. Dropped, it dies on the spot, as if killed.
pub(super) struct Running {
    queue: mpsc::UnboundedSender<Delivery<u64>>,
    pub(super) settled: Arc<Settled>,
    pub(super) published: Arc<Mutex<Vec<OwnReport>>>,
    shutdown: Shutdown,
    task: Option<JoinHandle<()>>,
}

impl Running {
    pub(super) fn publish(&self, handle: u64, id: Option<&str>, tenant: &str, kind: &str) {
        self.publish_raw(handle, id, &format!("report.{tenant}.{kind}"), body(tenant, kind));
    }

    pub(super) fn publish_raw(&self, handle: u64, id: Option<&str>, routing_key: &str, body: Bytes) {
        let (event_id, routing_key) = (id.map(str::to_owned), routing_key.to_owned());
        self.queue
            .send(Delivery {
                handle,
                event_id,
                routing_key,
                body,
            })
            .unwrap();
    }

    /// Shuts down in order.
    pub(super) async fn stop(mut self) {
        self.shutdown.soft.cancel();
        let task = self.task.take().unwrap();
        tokio::time::timeout(PATIENCE, task).await.unwrap().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

struct Queue {
    incoming: mpsc::UnboundedReceiver<Delivery<u64>>,
    settled: Arc<Settled>,
}

impl ReportSource for Queue {
    type Handle = u64;

    async fn next_batch(&mut self, max: usize) -> Option<Vec<Delivery<u64>>> {
        let mut batch = Vec::new();
        let count = self.incoming.recv_many(&mut batch, max).await;
        (count > 0).then_some(batch)
    }

    async fn ack(&mut self, batch: Vec<u64>) {
        self.settled.acked.lock().unwrap().extend(batch);
    }

    async fn dead_letter(&mut self, handle: u64, reason: &'static str, _detail: String) {
        self.settled.dead.lock().unwrap().push((handle, reason));
    }
}

/// What is published comes back through the queue.
struct Exchange {
    queue: mpsc::UnboundedSender<Delivery<u64>>,
    published: Arc<Mutex<Vec<OwnReport>>>,
}

impl ReportSink for Exchange {
    async fn publish(&self, report: OwnReport) -> Result<(), String> {
        self.published.lock().unwrap().push(report.clone());
        let OwnReport {
            event_id,
            routing_key,
            body,
        } = report;
        self.queue
            .send(Delivery {
                handle: u64::MAX,
                event_id: Some(event_id),
                routing_key,
                body: body.into(),
            })
            .map_err(|error| error.to_string())
    }
}
