//! `RabbitMQ`: what is declared there, sessions that are rebuilt after every error, consuming, publishing with confirms,
//! and dead letters.
//!
//! [`Supervisor`] keeps one [`Session`] after the other alive; each has two connections, because a broker that blocks
//! publishers must not hold back acknowledgements. [`Publisher`] outlives sessions, a [`Delivery`] belongs to one.

pub mod acker;
mod connect;
pub mod consumer;
pub mod dead_letter;
pub mod publisher;
pub mod session;
pub mod topology;

use std::path::PathBuf;
use std::time::Duration;

pub use acker::Receipt;
pub use connect::{close, connect, vhost};
pub use consumer::{Consumer, Delivery, Subscription};
pub use dead_letter::DeadLetter;
pub use lapin::BasicProperties as Properties;
pub use publisher::{PublishError, Publisher};
pub use session::{Session, Supervisor};
pub use topology::Topology;

/// Why the broker could not be used. `Display` never holds the URL.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The URL cannot be read.
    #[error("POSTROOM_AMQP_URL is not of the form amqp[s]://user:password@host:port/vhost")]
    Url,
    /// The file with certificate authorities cannot be read.
    #[error("POSTROOM_AMQP_CA_FILE: cannot read {path}: {source}")]
    CaFile {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Name resolution, TCP, TLS or login failed.
    #[error("cannot connect to RabbitMQ at {host}: {source}")]
    Connect {
        /// `host:port`.
        host: String,
        /// Why.
        source: lapin::Error,
    },
    /// No answer in time.
    #[error("RabbitMQ at {host} did not answer within {} s", limit.as_secs())]
    ConnectTimeout {
        /// `host:port`.
        host: String,
        /// The limit that passed.
        limit: Duration,
    },
    /// A request was not answered in time.
    #[error("RabbitMQ did not answer {what} in time")]
    Timeout {
        /// The request.
        what: &'static str,
    },
    /// The session ended: a connection, a channel or a consumer was lost.
    #[error("the session with RabbitMQ ended: {0}")]
    SessionEnded(String),
    /// Exchanges or queues are not as they should be.
    #[error(transparent)]
    Topology(#[from] topology::TopologyError),
    /// Anything else the broker or the client library reports.
    #[error("RabbitMQ: {0}")]
    Amqp(#[from] lapin::Error),
}
