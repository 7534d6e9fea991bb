//! What all pools and leases share: how to connect, how long to keep, how to close.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use prometheus::{Histogram, IntCounter, IntGauge};
use tokio::runtime::Handle;
use tokio::time::timeout_at;

use crate::config;
use crate::failure::{Failure, Stage};
use crate::smtp::caps::{CapLease, Caps, ConnectionCaps};
use crate::smtp::connection::Connection;
use crate::smtp::dial::Dialer;
use crate::smtp::server::{Resolver, Server};
use crate::smtp::tls::{Tls, TlsSetupError};
use crate::smtp::trouble::Trouble;
use crate::telemetry::metrics::Metrics;

use super::Tuning;
use super::account::Place;

/// Longest wait for the answer to a probe.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

pub(super) struct Core {
    pub(super) config: config::Smtp,
    pub(super) tuning: Tuning,
    pub(super) dialer: Dialer,
    pub(super) caps: Arc<Caps>,
    pub(super) denied: IntCounter,
    pub(super) envelope_time: Histogram,
    pub(super) data_time: Histogram,
    idle: IntGauge,
    busy: IntGauge,
    closed: AtomicBool,
}

/// An open connection. The order of its fields is that of their end: the place under the shared cap is given back when
/// the socket is closed.
pub(super) struct Entry {
    /// Boxed: it is large, and goes from hand to hand.
    pub(super) connection: Box<Connection>,
    pub(super) version: i64,
    idle_since: Instant,
    cap: Option<CapLease>,
    counted: Counted,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("connection", &self.connection)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// Keeps the gauge of idle and busy connections.
struct Counted {
    idle: IntGauge,
    busy: IntGauge,
    is_idle: bool,
}

impl Counted {
    fn gauge(&self) -> &IntGauge {
        if self.is_idle { &self.idle } else { &self.busy }
    }

    fn set_idle(&mut self, is_idle: bool) {
        self.gauge().dec();
        self.is_idle = is_idle;
        self.gauge().inc();
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.gauge().dec();
    }
}

impl Core {
    pub(super) fn new(
        config: config::Smtp,
        resolver: Arc<dyn Resolver>,
        caps: Arc<dyn ConnectionCaps>,
        metrics: Arc<Metrics>,
        tuning: Tuning,
    ) -> Result<Arc<Self>, TlsSetupError> {
        let tls = Tls::new(config.ca_file.as_deref())?;
        let connections = |state: &str| metrics.smtp_connections.with_label_values(&[state]);
        let phase = |name: &str| metrics.smtp_phase.with_label_values(&[name]);
        Ok(Arc::new(Self {
            tuning,
            caps: Arc::new(Caps::new(caps, Handle::current())),
            denied: metrics.smtp_connects.with_label_values(&["denied"]),
            envelope_time: phase("envelope"),
            data_time: phase("data"),
            idle: connections("idle"),
            busy: connections("busy"),
            closed: AtomicBool::new(false),
            dialer: Dialer::new(config.clone(), resolver, tls, metrics),
            config,
        }))
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(super) fn shut(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Connects, secures and logs in, by then.
    pub(super) async fn connect(&self, server: &Server, deadline: Instant) -> Result<Connection, Failure> {
        match timeout_at(deadline.into(), self.dialer.connect(server)).await {
            Ok(connected) => connected,
            Err(_) => Err(Trouble::TimedOut(self.config.timeouts.attempt).failure(Stage::Connect)),
        }
    }

    /// Wraps a fresh connection.
    pub(super) fn entry(&self, connection: Connection, version: i64, cap: Option<CapLease>) -> Entry {
        self.busy.inc();
        Entry {
            connection: Box::new(connection),
            version,
            idle_since: Instant::now(),
            cap,
            counted: Counted {
                idle: self.idle.clone(),
                busy: self.busy.clone(),
                is_idle: false,
            },
        }
    }

    /// Whether a connection may carry another mail.
    pub(super) fn may_stay(&self, entry: &Entry) -> bool {
        let connection = &entry.connection;
        !self.is_closed()
            && connection.is_orderly()
            && connection.messages < self.config.max_messages.max(1)
            && connection.opened.elapsed() < self.config.max_age
    }

    /// Whether an idle connection may go on idling.
    pub(super) fn may_idle(&self, entry: &Entry, now: Instant) -> bool {
        // Others wait for the places of a shared cap.
        let most = match entry.cap {
            Some(_) => self.config.max_idle.min(self.tuning.shared_idle),
            None => self.config.max_idle,
        };
        let idle = now.saturating_duration_since(entry.idle_since);
        idle < most && self.may_stay(entry) && entry.connection.is_quiet()
    }

    /// Whether an idle connection can be used. Asks the server only if it idled long.
    pub(super) async fn is_alive(&self, entry: &mut Entry) -> bool {
        if !self.may_stay(entry) || !entry.connection.is_quiet() {
            return false;
        }
        if entry.idle_since.elapsed() >= self.tuning.probe_after {
            let limit = PROBE_LIMIT.min(self.config.timeouts.command);
            entry.connection.reset(limit).await;
        }
        entry.connection.is_orderly()
    }

    /// Closes a connection with QUIT in the background; its places are free when it is closed.
    pub(super) fn retire(&self, mut entry: Entry, place: Option<Place>) {
        if !entry.connection.is_orderly() {
            drop(entry);
            return;
        }
        let goodbye = async move {
            entry.connection.quit().await;
            drop(entry);
            drop(place);
        };
        self.caps.tasks.spawn_on(goodbye, &self.caps.runtime);
    }
}

impl Entry {
    /// Counts as idle from now on.
    pub(super) fn rest(&mut self) {
        self.idle_since = Instant::now();
        self.counted.set_idle(true);
    }

    /// Whether it counts against a cap shared with other workers.
    pub(super) fn is_capped(&self) -> bool {
        self.cap.is_some()
    }

    /// How long nothing was heard on a connection that idled before it was taken.
    pub(super) fn silence(&self) -> Duration {
        self.idle_since.elapsed()
    }

    /// Counts as busy.
    pub(super) fn use_now(&mut self) {
        self.counted.set_idle(false);
    }

    /// Closes the connection and keeps its place under the shared cap.
    pub(super) fn into_cap(self) -> Option<CapLease> {
        self.cap
    }
}
