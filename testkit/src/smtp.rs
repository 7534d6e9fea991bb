//! A scripted SMTP server in this process: it keeps an exact record of what it took, and misbehaves as told.
//!
//! ```no_run
//! # async fn example() {
//! use postroom_testkit::smtp::{Action, Phase, RcptRule, Script, SmtpServer};
//!
//! let server = SmtpServer::builder()
//!     .auth("user", "secret")
//!     .script(
//!         Script::new()
//!             .recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"))
//!             .first(1, Phase::FinalDot, Action::TakeThenClose),
//!     )
//!     .start()
//!     .await;
//! let mails = server.wait_for(1, std::time::Duration::from_secs(5)).await;
//! # }
//! ```
#![expect(
    clippy::expect_used,
    reason = "a test server that cannot start is a broken test"
)]

mod builder;
mod plan;
mod record;
mod script;
mod session;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub use builder::{Builder, TlsSetup};
pub use plan::Plan;
pub use record::{Counters, Received, Refused};
pub use script::{Action, Phase, RcptRule, Script};

use record::Record;

/// What the sessions of one server share.
#[derive(Debug)]
pub(crate) struct Shared {
    setup: Builder,
    script: RwLock<Arc<Script>>,
    record: Record,
    sessions: AtomicU64,
}

impl Shared {
    fn script(&self) -> Arc<Script> {
        Arc::clone(&self.script.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A running server; stops when dropped.
#[derive(Debug)]
pub struct SmtpServer {
    addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl SmtpServer {
    /// How the server shall be; by default without TLS and AUTH, with PIPELINING, 8BITMIME, SMTPUTF8 and
    /// ENHANCEDSTATUSCODES, on a free port of 127.0.0.1.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(crate) async fn start(setup: Builder) -> Self {
        let listener = TcpListener::bind(setup.bind).await.expect("a port is free");
        let addr = listener.local_addr().expect("a bound socket has an address");
        let script = RwLock::new(Arc::clone(&setup.script));
        let shared = Arc::new(Shared {
            script,
            setup,
            record: Record::default(),
            sessions: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self {
            addr,
            shared,
            accepting,
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.addr.port()
    }

    /// Replaces the script for everything that follows, on open connections too.
    pub fn set_script(&self, script: Script) {
        *self.shared.script.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(script);
    }

    /// All mails taken so far, in order of their final dots.
    #[must_use]
    pub fn received(&self) -> Vec<Received> {
        self.shared.record.received()
    }

    /// The mails taken from number `first` on, in order; with [`Self::received_count`] a cheap way to follow them.
    #[must_use]
    pub fn received_from(&self, first: usize) -> Vec<Received> {
        self.shared.record.received_from(first)
    }

    /// Every reply of 4xx and 5xx to MAIL, RCPT, DATA and the final dot so far.
    #[must_use]
    pub fn refused(&self) -> Vec<Refused> {
        self.shared.record.refused()
    }

    /// How many mails were taken so far.
    #[must_use]
    pub fn received_count(&self) -> usize {
        self.shared.record.received_count()
    }

    /// Waits until at least `n` mails were taken and returns all.
    ///
    /// # Panics
    /// If that takes longer than `limit`.
    pub async fn wait_for(&self, n: usize, limit: Duration) -> Vec<Received> {
        let reached = self
            .shared
            .record
            .wait_until(|record| record.received_count() >= n);
        assert!(
            tokio::time::timeout(limit, reached).await.is_ok(),
            "{} of {n} mails after {limit:?}",
            self.received_count()
        );
        self.received()
    }

    /// Waits until no connection is open.
    ///
    /// # Panics
    /// If that takes longer than `limit`.
    pub async fn wait_closed(&self, limit: Duration) {
        let closed = self
            .shared
            .record
            .wait_until(|record| record.counters().open == 0);
        assert!(
            tokio::time::timeout(limit, closed).await.is_ok(),
            "{} connections open after {limit:?}",
            self.counters().open
        );
    }

    /// Connections and commands counted so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.record.counters()
    }

    /// The verbs of the commands, one inner list per read from the network: what came in one write stands together.
    /// Empty unless [`Builder::trace`] was asked for.
    #[must_use]
    pub fn trace(&self) -> Vec<Vec<String>> {
        self.shared.record.trace()
    }
}

impl Drop for SmtpServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut sessions = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let id = shared.sessions.fetch_add(1, Ordering::Relaxed);
                sessions.spawn(session::serve(stream, id, Arc::clone(&shared)));
            }
            Some(_) = sessions.join_next() => {}
        }
    }
}
