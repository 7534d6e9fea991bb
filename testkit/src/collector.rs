//! A collector of spans: OTLP over HTTP with protobuf. Keeps what it gets and answers as told.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// One span as it came. Ids are in hexadecimal.
#[derive(Debug, Clone)]
pub struct Span {
    /// The trace.
    pub trace: String,
    /// The span.
    pub id: String,
    /// Its parent; empty for none.
    pub parent: String,
    /// Its name.
    pub name: String,
    /// Its kind, as numbered by the protocol: 1 internal, 3 client, 4 producer, 5 consumer.
    pub kind: i32,
    /// Beginning and end, in nanoseconds since 1970.
    pub during: (u64, u64),
    /// Its attributes, as text.
    pub attributes: BTreeMap<String, String>,
    /// What its status says if that is an error.
    pub error: Option<String>,
    /// Attributes of the resource it is from.
    pub resource: BTreeMap<String, String>,
}

impl Span {
    /// An attribute; empty if there is none of that name.
    #[must_use]
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }

    /// As the `traceparent` of what is below it.
    #[must_use]
    pub fn traceparent(&self) -> String {
        format!("00-{}-{}-01", self.trace, self.id)
    }
}

/// One request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    /// Path and query.
    pub path: String,
    /// All headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// How requests are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// All spans are taken.
    Take,
    /// All but so many are.
    Reject(i64),
    /// With this status.
    Status(u16),
    /// Never.
    Hang,
}

#[derive(Debug)]
struct Shared {
    requests: Mutex<Vec<Request>>,
    reply: Mutex<Reply>,
}

/// The collector; stops when dropped.
#[derive(Debug)]
pub struct Collector {
    url: String,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Collector {
    /// Listens on a free port of the loopback interface and takes what it gets.
    ///
    /// # Errors
    /// If there is no port.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let shared = Arc::new(Shared {
            requests: Mutex::default(),
            reply: Mutex::new(Reply::Take),
        });
        let app = Router::new().fallback(receive).with_state(Arc::clone(&shared));
        let server = tokio::spawn(async move {
            // It ends only when aborted.
            let _ = axum::serve(listener, app).await;
        });
        Ok(Self { url, shared, server })
    }

    /// What `OTEL_EXPORTER_OTLP_ENDPOINT` is set to.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Answers like this from now on.
    pub fn always(&self, reply: Reply) {
        *lock(&self.shared.reply) = reply;
    }

    /// All requests so far, in the order in which they came.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }

    /// All spans so far.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        self.requests()
            .iter()
            .flat_map(|request| spans(&request.body))
            .collect()
    }

    /// Waits until the spans so far fulfil a condition.
    ///
    /// # Errors
    /// After `limit`, with the names of the spans there are.
    pub async fn wait_for(
        &self,
        limit: Duration,
        enough: impl Fn(&[Span]) -> bool,
    ) -> Result<Vec<Span>, String> {
        let start = Instant::now();
        loop {
            let spans = self.spans();
            if enough(&spans) {
                return Ok(spans);
            }
            if start.elapsed() > limit {
                let names: Vec<_> = spans.iter().map(|span| &span.name).collect();
                return Err(format!("not within {limit:?}; there are {names:?}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn receive(
    State(shared): State<Arc<Shared>>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, Vec<u8>) {
    let path = uri.to_string();
    lock(&shared.requests).push(Request { path, headers, body });
    let reply = *lock(&shared.reply);
    let mut answer = ExportTraceServiceResponse::default();
    match reply {
        Reply::Take => {}
        Reply::Reject(count) => answer.partial_success.get_or_insert_default().rejected_spans = count,
        Reply::Status(status) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return (status, Vec::new());
        }
        Reply::Hang => std::future::pending().await,
    }
    (StatusCode::OK, answer.encode_to_vec())
}

/// The spans in a request's body; none if it is no request.
fn spans(body: &Bytes) -> Vec<Span> {
    let request = ExportTraceServiceRequest::decode(body.clone()).unwrap_or_default();
    let mut found = Vec::new();
    for of_resource in request.resource_spans {
        let resource = texts(&of_resource.resource.unwrap_or_default().attributes);
        for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            let error = span.status.filter(|status| status.code == 2);
            found.push(Span {
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                name: span.name,
                kind: span.kind,
                during: (span.start_time_unix_nano, span.end_time_unix_nano),
                attributes: texts(&span.attributes),
                error: error.map(|status| status.message),
                resource: resource.clone(),
            });
        }
    }
    found
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    attributes.iter().map(|it| (it.key.clone(), text(it))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}
