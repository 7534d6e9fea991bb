//! A producer's and an onlooker's view of the broker.

use std::time::Duration;

use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
    QueuePurgeOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);

/// A connection with a confirming channel.
pub(crate) struct Amqp {
    pub(crate) connection: Connection,
    pub(crate) channel: Channel,
}

impl Amqp {
    pub(crate) async fn connect(url: &str) -> Self {
        let connecting = Box::pin(Connection::connect(url, ConnectionProperties::default()));
        let connection = timeout(LIMIT, connecting).await.unwrap().unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await
            .unwrap();
        Self { connection, channel }
    }

    /// Publishes and awaits the confirm; persistent.
    pub(crate) async fn publish(&self, exchange: &str, key: &str, properties: BasicProperties, body: &[u8]) {
        let properties = properties.with_delivery_mode(2);
        let options = BasicPublishOptions::default();
        let confirm = self
            .channel
            .basic_publish(exchange.into(), key.into(), options, body, properties)
            .await
            .unwrap();
        let confirmation = timeout(LIMIT, confirm).await.unwrap().unwrap();
        assert!(
            matches!(confirmation, Confirmation::Ack(None)),
            "{confirmation:?}"
        );
    }

    /// Messages ready in a queue, `None` if there is no such queue. On a channel of its own: a passive declare of what
    /// is not there closes it.
    pub(crate) async fn depth(&self, queue: &str) -> Option<u32> {
        let channel = self.connection.create_channel().await.unwrap();
        let options = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let declared = timeout(
            LIMIT,
            channel.queue_declare(queue.into(), options, FieldTable::default()),
        )
        .await
        .unwrap();
        let depth = declared.ok().map(|queue| queue.message_count());
        if channel.status().connected() {
            let _ = channel.close(200, "done".into()).await;
        }
        depth
    }

    /// Takes one message off a queue.
    pub(crate) async fn get(&self, queue: &str) -> Option<lapin::message::Delivery> {
        let options = BasicGetOptions::default();
        let message = timeout(LIMIT, self.channel.basic_get(queue.into(), options))
            .await
            .unwrap()
            .unwrap()?;
        assert!(message.acker.ack(BasicAckOptions::default()).await.unwrap());
        Some(message.delivery)
    }

    pub(crate) async fn purge(&self, queue: &str) -> u32 {
        self.channel
            .queue_purge(queue.into(), QueuePurgeOptions::default())
            .await
            .unwrap()
    }
}

/// Names of a delivery's headers without the one that a queue adds at every delivery.
pub(crate) fn producers_names(headers: &FieldTable) -> Vec<String> {
    let names = headers.inner().keys().map(ToString::to_string);
    names.filter(|name| name != "x-delivery-count").collect()
}
