//! Consuming one queue.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use lapin::Channel;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::time::timeout;

use super::acker::{Acker, Receipt};
use super::session::Shared;
use super::{BrokerError, Properties};
use crate::level::Level;
use crate::memory::Held;

const CANCEL_LIMIT: Duration = Duration::from_secs(10);
/// Bodies above this size lose the spare room that their vector has.
const FITTED: usize = 64 << 10;

/// What to consume.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// The queue.
    pub queue: Arc<str>,
    /// The level of its jobs; none for reports.
    pub level: Option<Level>,
    /// Unacknowledged deliveries at once. lapin buffers them without a bound of its own.
    pub prefetch: u16,
}

/// A message taken from a queue, to be acknowledged through its receipt.
pub struct Delivery {
    /// The level of the queue it came from; none for reports.
    pub level: Option<Level>,
    /// That queue.
    pub queue: Arc<str>,
    /// The session it belongs to.
    pub generation: u64,
    /// It was delivered before, maybe to this process.
    pub redelivered: bool,
    /// The exchange it was published to; empty for the default exchange.
    pub exchange: String,
    /// The key it was published with.
    pub routing_key: String,
    /// Its properties and headers.
    pub properties: Properties,
    /// Its body.
    pub body: Bytes,
    /// The right to acknowledge it.
    pub receipt: Receipt,
    /// Its share of the memory, free with it.
    pub held: Option<Held>,
}

impl Delivery {
    /// Of a session that is over, from the queue of the level `high`.
    #[cfg(test)]
    pub(crate) fn for_tests(body: &'static str) -> Self {
        Self {
            level: Some(Level::High),
            queue: "mail.jobs.high".into(),
            generation: 0,
            redelivered: false,
            exchange: "mail.jobs".to_owned(),
            routing_key: "high.acme".to_owned(),
            properties: Properties::default(),
            body: Bytes::from_static(body.as_bytes()),
            receipt: Receipt::none(),
            held: None,
        }
    }

    /// AMQP `message_id`.
    #[must_use]
    pub fn message_id(&self) -> Option<&str> {
        self.properties.message_id().as_ref().map(ShortString::as_str)
    }

    /// AMQP `correlation_id`.
    #[must_use]
    pub fn correlation_id(&self) -> Option<&str> {
        self.properties.correlation_id().as_ref().map(ShortString::as_str)
    }

    /// AMQP `content_type`.
    #[must_use]
    pub fn content_type(&self) -> Option<&str> {
        self.properties.content_type().as_ref().map(ShortString::as_str)
    }

    /// AMQP `content_encoding`.
    #[must_use]
    pub fn content_encoding(&self) -> Option<&str> {
        self.properties
            .content_encoding()
            .as_ref()
            .map(ShortString::as_str)
    }

    /// AMQP `type`, such as `mail.job.v1`.
    #[must_use]
    pub fn kind(&self) -> Option<&str> {
        self.properties.kind().as_ref().map(ShortString::as_str)
    }

    /// AMQP `timestamp`, in seconds since 1970.
    #[must_use]
    pub fn timestamp(&self) -> Option<u64> {
        *self.properties.timestamp()
    }

    /// A header that holds text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        header_text(self.properties.headers().as_ref()?, name)
    }

    /// Whether it has this header, whatever it holds.
    #[must_use]
    pub fn has_header(&self, name: &str) -> bool {
        let headers = self.properties.headers().as_ref();
        headers.is_some_and(|headers| headers.inner().contains_key(name))
    }

    /// Whether the producer named the queue itself instead of an exchange and key.
    #[must_use]
    pub fn came_through_default_exchange(&self) -> bool {
        self.exchange.is_empty()
    }
}

/// The body and the headers may hold secrets.
impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("queue", &self.queue)
            .field("routing_key", &self.routing_key)
            .field("generation", &self.generation)
            .field("redelivered", &self.redelivered)
            .field("bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// A header that holds text, if it is UTF-8.
#[must_use]
pub fn header_text<'a>(headers: &'a FieldTable, name: &str) -> Option<&'a str> {
    match headers.inner().get(name)? {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str()),
        _ => None,
    }
}

/// Begins to consume a queue.
pub(super) async fn open(
    channel: &Channel,
    queue: &str,
    prefetch: u16,
) -> Result<lapin::Consumer, BrokerError> {
    let queue = ShortString::try_new(queue)
        .map_err(|_| BrokerError::SessionEnded("a queue's name has more than 255 bytes".to_owned()))?;
    channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    Ok(channel
        .basic_consume(queue, "".into(), options, FieldTable::default())
        .await?)
}

/// The deliveries of one queue on a channel of their own.
pub struct Consumer {
    subscription: Subscription,
    channel: Channel,
    stream: lapin::Consumer,
    acker: Acker,
    shared: Arc<Shared>,
    stopped: bool,
}

impl Consumer {
    pub(super) fn new(
        subscription: Subscription,
        channel: Channel,
        stream: lapin::Consumer,
        acker: Acker,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            subscription,
            channel,
            stream,
            acker,
            shared,
            stopped: false,
        }
    }

    /// What it consumes.
    #[must_use]
    pub fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    /// The next delivery; `None` when the session has ended, or after [`Consumer::stop`] when nothing is left.
    /// Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Option<Delivery> {
        let item = tokio::select! {
            biased;
            () = self.shared.ended.cancelled() => return None,
            item = self.stream.next() => item,
        };
        match item {
            Some(Ok(delivery)) => Some(self.take(delivery)),
            Some(Err(error)) => {
                self.shared
                    .fail(format!("consuming {}: {error}", self.subscription.queue));
                None
            }
            None => {
                if !self.stopped {
                    // Its queue was deleted, or an acknowledgement took too long.
                    self.shared.fail(format!(
                        "the broker cancelled consuming {}",
                        self.subscription.queue
                    ));
                }
                None
            }
        }
    }

    /// Asks for another number of unacknowledged deliveries from now on. A broker changes it for new consumers only, so
    /// this one ends and another takes its place on the same channel; what was delivered meanwhile goes to `each`, and
    /// all that is unacknowledged stays so.
    ///
    /// # Errors
    /// If the broker does not answer; the session has ended then.
    pub async fn resize(&mut self, prefetch: u16, mut each: impl FnMut(Delivery)) -> Result<(), BrokerError> {
        self.stop().await?;
        while let Some(delivery) = self.next().await {
            each(delivery);
        }
        self.start(prefetch).await
    }

    /// Consumes again after [`Consumer::stop`], on the same channel: what is unacknowledged stays so.
    ///
    /// # Errors
    /// If the broker does not answer; the session has ended then.
    pub async fn start(&mut self, prefetch: u16) -> Result<(), BrokerError> {
        let opening = open(&self.channel, &self.subscription.queue, prefetch);
        let stream = match timeout(CANCEL_LIMIT, opening).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                self.shared
                    .fail(format!("consuming {}: {error}", self.subscription.queue));
                return Err(error);
            }
            Err(_) => {
                self.shared
                    .fail(format!("consuming {}: no answer", self.subscription.queue));
                return Err(BrokerError::Timeout {
                    what: "basic.consume",
                });
            }
        };
        self.stream = stream;
        self.stopped = false;
        self.subscription.prefetch = prefetch;
        self.acker.resize(prefetch);
        Ok(())
    }

    /// Asks the broker for no more. What was delivered already still comes out of [`Consumer::next`].
    ///
    /// # Errors
    /// If the broker does not answer; the session has ended then.
    pub async fn stop(&mut self) -> Result<(), BrokerError> {
        self.stopped = true;
        let cancelling = self
            .channel
            .basic_cancel(self.stream.tag(), BasicCancelOptions::default());
        match timeout(CANCEL_LIMIT, cancelling).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                self.shared
                    .fail(format!("cancelling {}: {error}", self.subscription.queue));
                Err(error.into())
            }
            Err(_) => {
                self.shared
                    .fail(format!("cancelling {}: no answer", self.subscription.queue));
                Err(BrokerError::Timeout { what: "basic.cancel" })
            }
        }
    }

    fn take(&self, delivery: lapin::message::Delivery) -> Delivery {
        if let Some(level) = self.subscription.level {
            let redelivered = if delivery.redelivered { "true" } else { "false" };
            self.shared
                .metrics
                .deliveries
                .with_label_values(&[level.as_str(), redelivered])
                .inc();
        }
        Delivery {
            level: self.subscription.level,
            queue: Arc::clone(&self.subscription.queue),
            generation: self.shared.generation,
            redelivered: delivery.redelivered,
            exchange: delivery.exchange.into(),
            routing_key: delivery.routing_key.into(),
            properties: delivery.properties,
            body: fitted(delivery.data).into(),
            receipt: self.acker.receipt(delivery.delivery_tag),
            held: None,
        }
    }
}

/// The body without the room that its vector reserved while it grew, up to as much again.
fn fitted(mut data: Vec<u8>) -> Vec<u8> {
    if data.len() > FITTED {
        data.shrink_to_fit();
    }
    data
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("subscription", &self.subscription)
            .field("stopped", &self.stopped)
            .finish_non_exhaustive()
    }
}
