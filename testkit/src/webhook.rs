//! A webhook receiver: keeps what it gets and answers as told.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{LOCATION, RETRY_AFTER};
use axum::http::{HeaderMap, Response, Uri};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// One request as it came.
#[derive(Debug, Clone)]
pub struct Received {
    /// Path and query.
    pub path: String,
    /// All headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// When it came.
    pub at: SystemTime,
    /// How it was answered, or would have been.
    pub reply: Reply,
}

impl Received {
    /// The value of a header; empty if it is missing or not text.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    /// `webhook-id`: the event id.
    #[must_use]
    pub fn event_id(&self) -> &str {
        self.header("webhook-id")
    }

    /// The body as JSON; null if it is none.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// Whether one of its signatures is good, by the reference library of Standard Webhooks.
    ///
    /// # Errors
    /// With what is wrong.
    pub fn verify(&self, secret: &str) -> Result<(), String> {
        standardwebhooks::Webhook::new(secret)
            .and_then(|webhook| webhook.verify(&self.body, &self.headers))
            .map_err(|error| error.to_string())
    }
}

/// How a request is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// With a status and an empty body.
    Status(u16),
    /// With a status and a body.
    Text(u16, String),
    /// With a status and `Retry-After`.
    RetryAfter(u16, String),
    /// With a 302 to somewhere else.
    Redirect(String),
    /// After a while.
    Slow(Duration, u16),
    /// Never.
    Hang,
}

/// The receiver; stops when dropped.
#[derive(Debug)]
pub struct WebhookReceiver {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    received: Mutex<Vec<Received>>,
    script: Mutex<Script>,
    count: watch::Sender<usize>,
    in_flight: Mutex<InFlight>,
}

#[derive(Debug)]
struct Script {
    next: VecDeque<Reply>,
    then: Reply,
}

#[derive(Debug, Default)]
struct InFlight {
    now: usize,
    most: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WebhookReceiver {
    /// Listens on a free port of the loopback interface and answers 204.
    ///
    /// # Errors
    /// If there is no port.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            received: Mutex::default(),
            script: Mutex::new(Script {
                next: VecDeque::new(),
                then: Reply::Status(204),
            }),
            count: watch::Sender::new(0),
            in_flight: Mutex::default(),
        });
        let app = Router::new().fallback(receive).with_state(Arc::clone(&shared));
        let server = tokio::spawn(async move {
            // It ends only when aborted.
            let _ = axum::serve(listener, app).await;
        });
        Ok(Self {
            address,
            shared,
            server,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// URL of a path, which begins with a slash.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Answers the next requests in this way, one by one.
    pub fn script(&self, replies: impl IntoIterator<Item = Reply>) {
        lock(&self.shared.script).next.extend(replies);
    }

    /// Answers all further requests in this way, after what is scripted.
    pub fn always(&self, reply: Reply) {
        lock(&self.shared.script).then = reply;
    }

    /// Everything so far, in order of arrival.
    #[must_use]
    pub fn received(&self) -> Vec<Received> {
        lock(&self.shared.received).clone()
    }

    /// How many requests have come so far.
    #[must_use]
    pub fn received_count(&self) -> usize {
        lock(&self.shared.received).len()
    }

    /// The requests from number `first` on, in order of arrival.
    #[must_use]
    pub fn received_from(&self, first: usize) -> Vec<Received> {
        lock(&self.shared.received)
            .get(first..)
            .unwrap_or_default()
            .to_vec()
    }

    /// The highest number of requests that were being answered at the same time.
    #[must_use]
    pub fn most_in_flight(&self) -> usize {
        lock(&self.shared.in_flight).most
    }

    /// Waits until at least `count` requests have come, and gives all there are.
    ///
    /// # Errors
    /// With the number that came, if they are too few in time.
    pub async fn wait_for(&self, count: usize, limit: Duration) -> Result<Vec<Received>, String> {
        let mut counted = self.shared.count.subscribe();
        let waited = tokio::time::timeout(limit, counted.wait_for(|n| *n >= count)).await;
        let received = self.received();
        match waited {
            Ok(Ok(_)) => Ok(received),
            _ => Err(format!(
                "{} of {count} webhooks came within {limit:?}",
                received.len()
            )),
        }
    }
}

impl Drop for WebhookReceiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Counts a request as being answered, also when its client goes away.
struct Busy(Arc<Shared>);

impl Busy {
    fn new(shared: &Arc<Shared>) -> Self {
        let mut in_flight = lock(&shared.in_flight);
        in_flight.now += 1;
        in_flight.most = in_flight.most.max(in_flight.now);
        Self(Arc::clone(shared))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        lock(&self.0.in_flight).now -= 1;
    }
}

async fn receive(
    State(shared): State<Arc<Shared>>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let _busy = Busy::new(&shared);
    let reply = {
        let mut script = lock(&shared.script);
        script.next.pop_front().unwrap_or_else(|| script.then.clone())
    };
    let path = uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    lock(&shared.received).push(Received {
        path,
        headers,
        body,
        at: SystemTime::now(),
        reply: reply.clone(),
    });
    shared.count.send_modify(|count| *count += 1);
    let answer = |status: u16| Response::builder().status(status);
    match reply {
        Reply::Status(status) => answer(status).body(Body::empty()),
        Reply::Text(status, text) => answer(status).body(Body::from(text)),
        Reply::RetryAfter(status, when) => answer(status).header(RETRY_AFTER, when).body(Body::empty()),
        Reply::Redirect(to) => answer(302).header(LOCATION, to).body(Body::empty()),
        Reply::Slow(wait, status) => {
            tokio::time::sleep(wait).await;
            answer(status).body(Body::empty())
        }
        Reply::Hang => std::future::pending().await,
    }
    .unwrap_or_default()
}
