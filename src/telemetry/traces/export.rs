//! Sends spans to the collector: OTLP 1 over HTTP with protobuf. One request at a time, in the background; what a
//! collector that is away or slow leaves no room for is dropped and counted.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message as _;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::Attributes;
use crate::config;
use crate::telemetry::metrics::Metrics;

/// Pieces of work whose spans wait at most.
const WAITING: usize = 2048;
/// Spans from which on a request is made without waiting for more.
const BATCH: usize = 1024;
/// How long the first span of a request waits for company.
const COMPANY: Duration = Duration::from_secs(1);
/// Waits before a request is made again that may succeed then (OTLP, "Retryable response codes").
const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];
/// Longest `Retry-After` that is heeded.
const LONGEST: Duration = Duration::from_secs(10);
/// How much of an answer is read, in bytes.
const MAX_ANSWER: usize = 64 << 10;

/// The exporter cannot be set up.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up the export of spans (are the system's CA certificates installed?)")]
pub struct SetupError(#[source] reqwest::Error);

/// Where spans are handed over.
#[derive(Debug, Clone)]
pub(super) struct Queue {
    sender: mpsc::Sender<Vec<Span>>,
    metrics: Arc<Metrics>,
}

impl Queue {
    /// Hands spans over, or drops them if there is no room.
    pub(super) fn push(&self, spans: Vec<Span>) {
        if let Err(error) = self.sender.try_send(spans) {
            let spans = error.into_inner().len() as u64;
            self.metrics
                .trace_spans
                .with_label_values(&["dropped"])
                .inc_by(spans);
        }
    }
}

/// The exporter at work.
#[derive(Debug)]
pub struct Exporter {
    queue: Queue,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Exporter {
    /// Starts it. The name of the process is that of the service, unless the configuration has one.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn start(config: &config::Traces, process: &str, metrics: Arc<Metrics>) -> Result<Self, SetupError> {
        let (sender, waiting) = mpsc::channel(WAITING);
        let stop = CancellationToken::new();
        let work = Work {
            client: client(config).map_err(SetupError)?,
            url: config.endpoint.clone(),
            resource: resource(config, process),
            waiting,
            stop: stop.clone(),
            metrics: Arc::clone(&metrics),
            works: true,
        };
        for result in ["exported", "rejected", "failed", "dropped"] {
            metrics.trace_spans.with_label_values(&[result]).inc_by(0);
        }
        let url = Url::parse(config.endpoint.expose_secret()).ok();
        tracing::info!(
            host = url.as_ref().and_then(Url::host_str),
            "spans are sent to a collector"
        );
        Ok(Self {
            queue: Queue { sender, metrics },
            stop,
            task: tokio::spawn(work.run()),
        })
    }

    pub(super) fn queue(&self) -> Queue {
        self.queue.clone()
    }

    /// Sends what waits, and ends; within `limit`, whatever the collector does.
    pub async fn finish(mut self, limit: Duration) {
        self.stop.cancel();
        if tokio::time::timeout(limit, &mut self.task).await.is_err() {
            self.task.abort();
            tracing::warn!("the collector of spans is too slow: the last ones are given up");
        }
    }
}

/// The client for the collector, which the operator has named: no egress guard. No redirects, no proxy.
fn client(config: &config::Traces) -> Result<reqwest::Client, reqwest::Error> {
    // An error says that it has been done before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut headers = HeaderMap::new();
    for (name, value) in &config.headers {
        let name = name.parse::<HeaderName>();
        // Both were checked when they were read.
        if let (Ok(name), Ok(mut value)) = (name, HeaderValue::from_str(value.expose_secret())) {
            value.set_sensitive(true);
            headers.append(name, value);
        }
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
    reqwest::Client::builder()
        .default_headers(headers)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .connect_timeout(config.timeout)
        .timeout(config.timeout)
        .user_agent(concat!("postroom/", env!("CARGO_PKG_VERSION")))
        .build()
}

/// Who makes the spans (OpenTelemetry semantic conventions, "Service").
fn resource(config: &config::Traces, process: &str) -> Resource {
    let mut known: Vec<(String, String)> = vec![
        ("service.name".into(), format!("postroom-{process}")),
        ("service.version".into(), env!("CARGO_PKG_VERSION").into()),
        (
            "service.instance.id".into(),
            format!("{:032x}", rand::random::<u128>()),
        ),
    ];
    let own_name = config
        .service_name
        .iter()
        .map(|name| ("service.name".to_owned(), name.clone()));
    // The latter wins.
    for (name, value) in config.attributes.iter().cloned().chain(own_name) {
        known.retain(|(other, _)| *other != name);
        known.push((name, value));
    }
    let attributes = known
        .into_iter()
        .fold(Attributes::default(), |all, (name, value)| all.text(&name, value));
    Resource {
        attributes: attributes.into_proto(),
        ..Resource::default()
    }
}

/// What a request came to.
enum Answer {
    /// Taken, but for so many spans.
    Taken { rejected: u64 },
    /// It may be taken later; the collector may have said when.
    Again { why: String, after: Option<Duration> },
    /// It will never be.
    Refused { why: String },
}

/// What the background task has.
struct Work {
    client: reqwest::Client,
    /// May hold a token in its path.
    url: SecretString,
    resource: Resource,
    waiting: mpsc::Receiver<Vec<Span>>,
    stop: CancellationToken,
    metrics: Arc<Metrics>,
    /// The latest request was taken: trouble is told once.
    works: bool,
}

impl Work {
    async fn run(mut self) {
        while let Some(spans) = self.collect().await {
            self.export(spans).await;
        }
    }

    /// The spans of one request; `None` when it is told to end and nothing is left.
    async fn collect(&mut self) -> Option<Vec<Span>> {
        let mut spans = tokio::select! {
            biased;
            spans = self.waiting.recv() => spans?,
            () = self.stop.cancelled() => {
                self.waiting.close();
                self.waiting.recv().await?
            }
        };
        let company = tokio::time::sleep(COMPANY);
        tokio::pin!(company);
        while spans.len() < BATCH {
            tokio::select! {
                biased;
                more = self.waiting.recv() => match more {
                    Some(more) => spans.extend(more),
                    None => break,
                },
                () = self.stop.cancelled() => break,
                () = &mut company => break,
            }
        }
        Some(spans)
    }

    /// Sends spans, or gives them up.
    async fn export(&mut self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        let body = Bytes::from(self.request(spans).encode_to_vec());
        let mut waits = AGAIN.into_iter();
        let why = loop {
            let (why, after) = match self.post(body.clone()).await {
                Answer::Taken { rejected } => return self.taken(count, rejected.min(count)),
                Answer::Refused { why } => break why,
                Answer::Again { why, after } => (why, after),
            };
            let Some(wait) = waits.next() else {
                break why;
            };
            // At the end there is no time to wait.
            tokio::select! {
                () = tokio::time::sleep(after.unwrap_or(wait).min(LONGEST)) => {}
                () = self.stop.cancelled() => {}
            }
        };
        self.count("failed", count);
        if std::mem::replace(&mut self.works, false) {
            tracing::warn!(
                error = why,
                "spans cannot be sent to the collector and are lost; mail is not affected"
            );
        }
    }

    fn taken(&mut self, count: u64, rejected: u64) {
        self.count("exported", count - rejected);
        self.count("rejected", rejected);
        if !std::mem::replace(&mut self.works, true) {
            tracing::info!("the collector takes spans again");
        }
    }

    fn count(&self, result: &str, spans: u64) {
        self.metrics
            .trace_spans
            .with_label_values(&[result])
            .inc_by(spans);
    }

    fn request(&self, spans: Vec<Span>) -> ExportTraceServiceRequest {
        let scope = InstrumentationScope {
            name: "postroom".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..InstrumentationScope::default()
        };
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![ScopeSpans {
                    scope: Some(scope),
                    spans,
                    ..ScopeSpans::default()
                }],
                ..ResourceSpans::default()
            }],
        }
    }

    async fn post(&self, body: Bytes) -> Answer {
        let sent = self.client.post(self.url.expose_secret()).body(body).send().await;
        let response = match sent {
            Ok(response) => response,
            Err(error) => {
                let (why, after) = (describe(error), None);
                return Answer::Again { why, after };
            }
        };
        let status = response.status();
        // What the collector says is not repeated: it may repeat what it was sent.
        let why = format!("HTTP {}", status.as_u16());
        if status.is_success() {
            let rejected = rejected(response).await;
            return Answer::Taken { rejected };
        }
        if !matches!(status.as_u16(), 429 | 502 | 503 | 504) {
            return Answer::Refused { why };
        }
        let after = response.headers().get(RETRY_AFTER);
        let after = after.and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let after = after.map(Duration::from_secs);
        Answer::Again { why, after }
    }
}

/// How many spans of a request the collector did not take. An answer that is none of this protocol's took all.
async fn rejected(mut response: reqwest::Response) -> u64 {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_ANSWER {
            return 0;
        }
    }
    let answer = ExportTraceServiceResponse::decode(body.as_slice()).unwrap_or_default();
    let rejected = answer.partial_success.map_or(0, |partial| partial.rejected_spans);
    u64::try_from(rejected).unwrap_or(0)
}

/// What happened, without the URL, whose path may hold a token.
fn describe(error: reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".to_owned();
    }
    let error = error.without_url();
    let mut root: &dyn std::error::Error = &error;
    while let Some(source) = root.source() {
        root = source;
    }
    format!("cannot reach the collector: {root}")
}
