//! The HTTP port: `/livez` (is the process alive, whatever its dependencies do), `/readyz` (can it work), `/healthz`
//! (the old name of `/livez`) and `/metrics`.

mod listener;
mod readiness;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::telemetry::metrics::{CONTENT_TYPE, Metrics};

use listener::Bounded;
pub use readiness::{Handle, Readiness};

/// How long requests in flight may take when the server ends.
const DRAIN: Duration = Duration::from_secs(2);

/// A peer silent for this long is gone: longer than scrapers usually pause, who like to keep their connection.
const IDLE: Duration = Duration::from_secs(75);

/// The port cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on POSTROOM_HTTP_ADDR {addr}: {source}")]
pub struct HealthError {
    /// What was asked for.
    addr: SocketAddr,
    /// Why not.
    source: std::io::Error,
}

/// The port, open, not yet answering.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    addr: SocketAddr,
    router: Router,
}

impl Server {
    /// Opens the port and logs its address: with port 0 nobody knows it otherwise.
    ///
    /// # Errors
    /// If the address is taken or not ours.
    pub async fn bind(
        addr: SocketAddr,
        readiness: Readiness,
        metrics: Arc<Metrics>,
    ) -> Result<Self, HealthError> {
        let refuse = |source| HealthError { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(refuse)?;
        let bound = listener.local_addr().map_err(refuse)?;
        tracing::info!(addr = %bound, "health and metrics are served");
        Ok(Self {
            listener,
            addr: bound,
            router: router(readiness, metrics),
        })
    }

    /// The address really bound.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Answers until the token is cancelled. Give it the one that ends last: an orchestrator looks at `/readyz` while
    /// the process drains.
    pub async fn run(self, until: CancellationToken) {
        let served = axum::serve(Bounded::new(self.listener, IDLE), self.router)
            .with_graceful_shutdown(until.clone().cancelled_owned());
        let cut = async {
            until.cancelled().await;
            tokio::time::sleep(DRAIN).await;
        };
        tokio::select! {
            result = async { served.await } => if let Err(error) = result {
                tracing::error!(%error, "health and metrics are no longer served");
            },
            () = cut => {}
        }
    }
}

#[derive(Clone)]
struct Shared {
    readiness: Readiness,
    metrics: Arc<Metrics>,
}

fn router(readiness: Readiness, metrics: Arc<Metrics>) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/healthz", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(render))
        .fallback(async || {
            (
                StatusCode::NOT_FOUND,
                "try /livez, /readyz, /healthz or /metrics\n",
            )
        })
        .with_state(Shared { readiness, metrics })
}

async fn livez() -> &'static str {
    "ok\n"
}

async fn readyz(State(shared): State<Shared>, RawQuery(query): RawQuery) -> Response {
    let ready = shared.readiness.is_ready();
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let verbose = query.is_some_and(|query| {
        query
            .split('&')
            .any(|part| part.split('=').next() == Some("verbose"))
    });
    // Whoever is told no wants to know why.
    let body = if verbose || !ready {
        shared.readiness.to_string()
    } else {
        "ok\n".into()
    };
    (status, body).into_response()
}

async fn render(State(shared): State<Shared>) -> Response {
    match shared.metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_has_only_begun_is_not_ready() {
        let readiness = Readiness::default();
        assert!(!readiness.is_ready());
        assert_eq!(readiness.to_string(), "not ready\n");
        let database = readiness.component("database");
        assert!(!readiness.is_ready());
        database.ready();
        assert!(readiness.is_ready());
    }

    struct Fixture {
        base: String,
        readiness: Readiness,
        token: CancellationToken,
        server: tokio::task::JoinHandle<()>,
    }

    async fn start() -> Fixture {
        let readiness = Readiness::default();
        let metrics = Arc::new(Metrics::new().unwrap());
        let addr = "127.0.0.1:0".parse().unwrap();
        let server = Server::bind(addr, readiness.clone(), metrics).await.unwrap();
        let token = CancellationToken::new();
        let base = format!("http://{}", server.addr());
        Fixture {
            base,
            readiness,
            token: token.clone(),
            server: tokio::spawn(server.run(token)),
        }
    }

    impl Fixture {
        async fn get(&self, path: &str) -> (u16, Option<String>, String) {
            // Other tests of this process may have installed it.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let client = reqwest::Client::builder()
                .no_proxy()
                .timeout(Duration::from_secs(10))
                .build()
                .unwrap();
            let response = client.get(format!("{}{path}", self.base)).send().await.unwrap();
            let kind = response
                .headers()
                .get("content-type")
                .map(|value| value.to_str().unwrap().to_owned());
            (response.status().as_u16(), kind, response.text().await.unwrap())
        }
    }

    #[tokio::test]
    async fn liveness_does_not_depend_on_anything() {
        let fixture = start().await;
        let _amqp = fixture.readiness.component("amqp");
        for path in ["/livez", "/healthz"] {
            assert_eq!(fixture.get(path).await.0, 200, "{path}");
        }
        assert_eq!(fixture.get("/").await.0, 404);
    }

    #[tokio::test]
    async fn readiness_is_that_of_all_components() {
        let fixture = start().await;
        let amqp = fixture.readiness.component("amqp");
        let database = fixture.readiness.component("database");
        amqp.ready();
        let (status, _, body) = fixture.get("/readyz").await;
        assert_eq!(
            (status, body.as_str()),
            (503, "[+] amqp ok\n[-] database: starting\nnot ready\n")
        );
        database.ready();
        assert_eq!(fixture.get("/readyz").await.2, "ok\n");
        assert_eq!(
            fixture.get("/readyz?verbose").await.2,
            "[+] amqp ok\n[+] database ok\nready\n"
        );
        amqp.not_ready("connection refused");
        let (status, _, body) = fixture.get("/readyz?verbose=1").await;
        assert_eq!(
            (status, body.contains("[-] amqp: connection refused\n")),
            (503, true)
        );
    }

    #[tokio::test]
    async fn metrics_have_the_content_type_prometheus_insists_on() {
        let (status, kind, body) = start().await.get("/metrics").await;
        assert_eq!(
            (status, kind.as_deref()),
            (200, Some("text/plain; version=0.0.4; charset=utf-8"))
        );
        assert!(body.contains("# TYPE postroom_"), "{body}");
    }

    #[tokio::test]
    async fn an_idle_connection_does_not_hold_up_the_end() {
        let fixture = start().await;
        let address = fixture.base.trim_start_matches("http://");
        let _idle = tokio::net::TcpStream::connect(address).await.unwrap();
        fixture.token.cancel();
        tokio::time::timeout(Duration::from_secs(10), fixture.server)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let fixture = start().await;
        let addr = fixture.base.trim_start_matches("http://").parse().unwrap();
        let metrics = Arc::new(Metrics::new().unwrap());
        let error = Server::bind(addr, Readiness::default(), metrics)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("POSTROOM_HTTP_ADDR"), "{error}");
    }
}
