//! What the pool hands out, and what becomes of a connection that does not answer any more.
//!
//! A network can break so that both ends think the connection open: a proxy or pooler that stands still, a firewall that
//! forgot the connection but still acknowledges its bytes. The server's own time limit does not help then, nor does TCP's.
//! So whoever holds a connection for longer than any statement may take has it broken under him: his statement fails as
//! if the server had gone, and is repeated on a new one.
//!
//! And a server can become another behind an open connection: after a failover one that takes no writes any more. Whoever
//! finds that begins a new age ([`Age`]): connections of an older one are not handed out again.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use deadpool::managed::{self, Metrics, Object, RecycleError, RecycleResult};
use deadpool_postgres::ClientWrapper;
use tokio::time::Instant;
use tokio_postgres::Error;
use tokio_util::sync::CancellationToken;

use super::connect::Connector;

/// Opens connections for the pool.
pub(super) struct Manager {
    pub(super) connector: Connector,
    /// How long a caller may hold a connection.
    pub(super) patience: Duration,
    pub(super) age: Age,
}

/// Rises when connections that are open are not worth keeping; shared by all pools of a database.
#[derive(Clone, Default)]
pub(super) struct Age(Arc<AtomicU64>);

impl Age {
    /// Whatever was opened before is not handed out again.
    pub(super) fn renew(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A pooled connection and its clock.
pub(super) struct Connection {
    client: ClientWrapper,
    clock: Arc<Clock>,
    age: u64,
}

impl managed::Manager for Manager {
    type Type = Connection;
    type Error = Error;

    async fn create(&self) -> Result<Connection, Error> {
        let (clock, age) = (Arc::new(Clock::new(self.patience)), self.age.now());
        // Boxed: it is large, and callers carry it along whether they open a connection or not.
        let (client, driver) = Box::pin(self.connector.open(&clock)).await?;
        Ok(Connection {
            client: ClientWrapper::new(client, driver),
            clock,
            age,
        })
    }

    /// No round trip: a connection that has ended is known, and one that does not answer is found by its next user.
    async fn recycle(&self, connection: &mut Connection, _: &Metrics) -> RecycleResult<Error> {
        if connection.client.is_closed() || connection.clock.given_up.is_cancelled() {
            return Err(RecycleError::message("the connection is closed"));
        }
        if connection.age < self.age.now() {
            return Err(RecycleError::message(
                "the connection led to a server that takes no writes",
            ));
        }
        Ok(())
    }
}

/// Since when a connection is in use.
pub(super) struct Clock {
    patience: Duration,
    base: Instant,
    /// Milliseconds after `base`, plus one; 0 while nobody uses it.
    since: AtomicU64,
    given_up: CancellationToken,
}

impl Clock {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            patience,
            base: Instant::now(),
            since: AtomicU64::new(0),
            given_up: CancellationToken::new(),
        }
    }

    fn start(&self) {
        let now = self.base.elapsed().as_millis() as u64;
        self.since.store(now + 1, Ordering::Relaxed);
    }

    fn stop(&self) {
        self.since.store(0, Ordering::Relaxed);
    }

    fn is_late(&self) -> bool {
        let since = self.since.load(Ordering::Relaxed);
        let now = self.base.elapsed().as_millis() as u64;
        since > 0 && now.saturating_sub(since - 1) > self.patience.as_millis() as u64
    }

    /// Ends when the connection is to be broken.
    pub(super) async fn late(&self) {
        let mut looks = tokio::time::interval(self.patience / 8);
        loop {
            tokio::select! {
                () = self.given_up.cancelled() => return,
                _ = looks.tick() => if self.is_late() { return },
            }
        }
    }
}

/// A connection in somebody's hands; goes back to the pool when dropped.
pub struct Checkout(Object<Manager>);

impl Checkout {
    pub(super) fn new(object: Object<Manager>) -> Self {
        object.clock.start();
        Self(object)
    }

    /// Breaks the connection: it did not answer in time, and nobody shall wait for it again.
    pub fn give_up(self) {
        self.0.clock.given_up.cancel();
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        self.0.clock.stop();
    }
}

impl std::fmt::Debug for Checkout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Checkout")
    }
}

impl Deref for Checkout {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.0.client
    }
}

impl DerefMut for Checkout {
    fn deref_mut(&mut self) -> &mut ClientWrapper {
        &mut self.0.client
    }
}
