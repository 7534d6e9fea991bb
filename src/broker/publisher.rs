//! Publishing with confirms.
//!
//! Many callers share one channel, each awaits its own confirm: that is as fast as batching by hand.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lapin::message::BasicReturnMessage;
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{Channel, Confirmation, Connection};
use tokio::time::timeout;

use super::session::{Shared, publishing_channel};
use super::{BrokerError, Properties};
use crate::telemetry::metrics::Metrics;

/// From the call to the confirm.
const CONFIRM_LIMIT: Duration = Duration::from_secs(10);
/// AMQP `delivery_mode` of messages that survive a restart of the broker.
const PERSISTENT: u8 = 2;
/// Returned messages remembered until their own confirm is seen.
const RETURNED_KEPT: usize = 1024;

/// Why a message is not known to be stored by the broker. It may be: repeat it under the same `message_id`.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// There is no session at the moment.
    #[error("not connected to RabbitMQ")]
    NotConnected,
    /// The broker is short of memory or disk and takes nothing.
    #[error("RabbitMQ blocks publishing: its memory or disk alarm is on")]
    Blocked,
    /// The broker refused it, such as for a full queue.
    #[error("RabbitMQ refused the message: a queue is full or unavailable")]
    Nacked,
    /// No queue wanted it and the exchange has no alternate.
    #[error("no queue for exchange `{exchange}` and key `{key}`; run `postroom topology apply`")]
    Returned {
        /// Where it was published.
        exchange: String,
        /// Under which key.
        key: String,
    },
    /// No confirm in time.
    #[error("RabbitMQ did not confirm the message within {} s", CONFIRM_LIMIT.as_secs())]
    Timeout,
    /// Exchange or key are longer than 255 bytes.
    #[error("exchange and key may have 255 bytes each")]
    TooLong,
    /// The channel was lost, such as because the exchange does not exist.
    #[error("RabbitMQ: {0}")]
    Lost(#[from] lapin::Error),
}

impl PublishError {
    /// Whether the session with the broker is what failed: with the next one it may work.
    #[must_use]
    pub fn is_of_the_session(&self) -> bool {
        matches!(self, Self::NotConnected | Self::Lost(_))
    }

    /// Whether the broker takes nothing at all at the moment, rather than not this message.
    #[must_use]
    pub fn is_of_the_broker(&self) -> bool {
        self.is_of_the_session() || matches!(self, Self::Blocked)
    }

    /// The metric's label.
    fn label(&self) -> &'static str {
        match self {
            Self::Nacked => "nacked",
            Self::Returned { .. } => "returned",
            Self::Timeout => "timeout",
            Self::NotConnected | Self::Blocked | Self::TooLong | Self::Lost(_) => "error",
        }
    }
}

/// Publishes persistently and awaits each confirm. Cheap to clone; outlives sessions.
#[derive(Debug, Clone)]
pub struct Publisher {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    lane: Mutex<Lane>,
    /// lapin may hand a returned message to another message's confirm. Those wait here for their own.
    returned: Mutex<VecDeque<Address>>,
    metrics: Arc<Metrics>,
}

/// The channel of the present session.
#[derive(Debug, Default)]
struct Lane {
    channel: Option<(Channel, Option<Arc<Shared>>)>,
    blocked: bool,
}

/// What a returned message can be recognised by.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Address {
    exchange: ShortString,
    key: ShortString,
    message_id: Option<ShortString>,
}

impl Publisher {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            inner: Arc::new(Inner {
                lane: Mutex::default(),
                returned: Mutex::default(),
                metrics,
            }),
        }
    }

    /// A publisher on a connection of one's own, for commands that end.
    ///
    /// # Errors
    /// If the broker opens no channel.
    pub async fn on(connection: &Connection, metrics: Arc<Metrics>) -> Result<Self, BrokerError> {
        let publisher = Self::new(metrics);
        publisher.attach(publishing_channel(connection).await?, None);
        Ok(publisher)
    }

    pub(super) fn attach(&self, channel: Channel, session: Option<Arc<Shared>>) {
        *self.lane() = Lane {
            channel: Some((channel, session)),
            blocked: false,
        };
    }

    pub(super) fn detach(&self) {
        *self.lane() = Lane::default();
    }

    pub(super) fn set_blocked(&self, blocked: bool) {
        self.lane().blocked = blocked;
    }

    /// Whether the broker takes nothing for want of memory or disk.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.lane().blocked
    }

    fn lane(&self) -> std::sync::MutexGuard<'_, Lane> {
        self.inner.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// Publishes one message and returns when the broker has stored it.
    ///
    /// # Errors
    /// See [`PublishError`]. Without a session it fails at once: whoever owns the message repeats it later.
    pub async fn publish(
        &self,
        exchange: &str,
        key: &str,
        properties: Properties,
        body: &[u8],
    ) -> Result<(), PublishError> {
        let result = match timeout(CONFIRM_LIMIT, self.attempt(exchange, key, properties, body)).await {
            Ok(result) => result,
            Err(_) => Err(PublishError::Timeout),
        };
        let label = result.as_ref().map_or_else(PublishError::label, |()| "confirmed");
        self.inner.metrics.publishes.with_label_values(&[label]).inc();
        result
    }

    async fn attempt(
        &self,
        exchange: &str,
        key: &str,
        properties: Properties,
        body: &[u8],
    ) -> Result<(), PublishError> {
        let (channel, session) = self.channel()?;
        let address = Address {
            exchange: ShortString::try_new(exchange).map_err(|_| PublishError::TooLong)?,
            key: ShortString::try_new(key).map_err(|_| PublishError::TooLong)?,
            message_id: properties.message_id().clone(),
        };
        let options = BasicPublishOptions {
            mandatory: true,
            immediate: false,
        };
        let properties = properties.with_delivery_mode(PERSISTENT);
        let confirmation = async {
            channel
                .basic_publish(
                    address.exchange.clone(),
                    address.key.clone(),
                    options,
                    body,
                    properties,
                )
                .await?
                .await
        };
        match confirmation.await {
            Ok(confirmation) => self.judge(confirmation, &address),
            Err(error) => {
                if let Some(session) = session {
                    session.fail(format!("publishing: {error}"));
                }
                Err(error.into())
            }
        }
    }

    fn channel(&self) -> Result<(Channel, Option<Arc<Shared>>), PublishError> {
        let lane = self.lane();
        match &lane.channel {
            // A blocked connection writes nothing: what is queued now would be published much later.
            Some(_) if lane.blocked => Err(PublishError::Blocked),
            Some((channel, session)) => Ok((channel.clone(), session.clone())),
            None => Err(PublishError::NotConnected),
        }
    }

    fn judge(&self, confirmation: Confirmation, address: &Address) -> Result<(), PublishError> {
        let (stored, returned) = match confirmation {
            Confirmation::Ack(returned) => (true, returned),
            Confirmation::Nack(returned) => (false, returned),
            Confirmation::NotRequested => (false, None),
        };
        if let Some(returned) = returned {
            self.remember_returned(returned);
        }
        if self.was_returned(address) {
            return Err(PublishError::Returned {
                exchange: address.exchange.to_string(),
                key: address.key.to_string(),
            });
        }
        if stored { Ok(()) } else { Err(PublishError::Nacked) }
    }

    fn remember_returned(&self, message: BasicReturnMessage) {
        let delivery = message.delivery;
        tracing::error!(
            exchange = %delivery.exchange,
            key = %delivery.routing_key,
            "a message had no queue; run `postroom topology apply`"
        );
        let mut returned = self.returned();
        if returned.len() >= RETURNED_KEPT {
            returned.pop_front();
        }
        returned.push_back(Address {
            exchange: delivery.exchange,
            key: delivery.routing_key,
            message_id: delivery.properties.message_id().clone(),
        });
    }

    /// Each return accounts for one message.
    fn was_returned(&self, address: &Address) -> bool {
        let mut returned = self.returned();
        let found = returned.iter().position(|other| other == address);
        found.and_then(|index| returned.remove(index)).is_some()
    }

    fn returned(&self) -> std::sync::MutexGuard<'_, VecDeque<Address>> {
        self.inner.returned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
