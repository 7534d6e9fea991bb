//! Declaring and checking the table on a broker. Every declaration gets a channel of its own: a refused one closes it.

use std::fmt;
use std::time::Duration;

use lapin::options::{ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ErrorKind, ExchangeKind};
use tokio::time::timeout;

use super::{Binding, Exchange, Queue, Topology, arguments_table};
use crate::broker::BrokerError;

/// For one declaration or binding.
const LIMIT: Duration = Duration::from_secs(15);

/// What [`Topology::apply`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// `exchange NAME` or `queue NAME`, as created.
    pub created: Vec<String>,
    /// How many were there already, as they should be.
    pub present: usize,
}

impl Applied {
    fn has_created_queue(&self, name: &str) -> bool {
        self.created.iter().any(|created| *created == queue_name(name))
    }
}

/// How a queue is called in [`Applied`] and [`TopologyError`].
fn queue_name(name: &str) -> String {
    format!("queue {name}")
}

/// Exchanges or queues are not as they should be. The text lists them all, with what to do.
#[derive(Debug, Default, PartialEq, Eq, thiserror::Error)]
pub struct TopologyError {
    /// Not on the broker.
    pub missing: Vec<String>,
    /// On the broker with other arguments: name and what the broker said.
    pub different: Vec<(String, String)>,
    /// The broker does not let this user see or declare them: name and what the broker said.
    pub refused: Vec<(String, String)>,
}

impl TopologyError {
    fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.different.is_empty() && self.refused.is_empty()
    }
}

impl fmt::Display for TopologyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the broker's topology is not as it should be")?;
        if !self.missing.is_empty() {
            write!(
                f,
                "; missing: {} (run `postroom topology apply`, or import what `postroom topology print` shows)",
                self.missing.join(", ")
            )?;
        }
        for (name, said) in &self.different {
            write!(
                f,
                "; different: {name} ({said}): arguments cannot be changed, so empty and delete it, then run \
                 `postroom topology apply`"
            )?;
        }
        for (name, said) in &self.refused {
            write!(
                f,
                "; not permitted: {name} ({said}): grant configure, write and read on the prefix, or declare it by \
                 other means and set POSTROOM_TOPOLOGY=off"
            )?;
        }
        Ok(())
    }
}

/// What one declaration found.
enum Found {
    AsItShouldBe,
    Missing,
    Different(String),
    Refused(String),
}

impl Topology {
    /// Declares what is missing and binds everything; touches nothing that is there. Deletes nothing. After
    /// [`Topology::leaving_reports`] the bridge's queue is bound only if it was missing.
    ///
    /// # Errors
    /// [`BrokerError::Topology`] naming everything that differs or is not permitted; other variants if the broker fails.
    pub async fn apply(&self, connection: &Connection) -> Result<Applied, BrokerError> {
        let mut applied = Applied::default();
        let mut wrong = TopologyError::default();
        for exchange in &self.exchanges {
            let name = format!("exchange {}", exchange.name);
            let was_missing = matches!(exchange.look(connection).await?, Found::Missing);
            let found = exchange.declare(connection).await?;
            let found = if was_missing { found } else { seen(found) };
            note(found, name, was_missing, &mut applied, &mut wrong);
        }
        for queue in &self.queues {
            let name = queue_name(&queue.name);
            let was_missing = matches!(queue.look(connection).await?, Found::Missing);
            let found = queue.declare(connection).await?;
            let found = if was_missing { found } else { seen(found) };
            note(found, name, was_missing, &mut applied, &mut wrong);
        }
        if !wrong.is_empty() {
            return Err(wrong.into());
        }
        self.bind_all(connection, &applied).await?;
        Ok(applied)
    }

    /// Looks whether every exchange and queue is there with its arguments; changes nothing. Bindings cannot be seen
    /// over AMQP.
    ///
    /// # Errors
    /// As [`Topology::apply`], with what is missing.
    pub async fn check(&self, connection: &Connection) -> Result<(), BrokerError> {
        let mut applied = Applied::default();
        let mut wrong = TopologyError::default();
        for exchange in &self.exchanges {
            let name = format!("exchange {}", exchange.name);
            let found = match exchange.look(connection).await? {
                // Looking does not compare arguments; declaring what exists does, and changes nothing.
                Found::AsItShouldBe => seen(exchange.declare(connection).await?),
                other => other,
            };
            note(found, name, false, &mut applied, &mut wrong);
        }
        for queue in &self.queues {
            let name = queue_name(&queue.name);
            let found = match queue.look(connection).await? {
                Found::AsItShouldBe => seen(queue.declare(connection).await?),
                other => other,
            };
            note(found, name, false, &mut applied, &mut wrong);
        }
        if wrong.is_empty() {
            Ok(())
        } else {
            Err(wrong.into())
        }
    }

    async fn bind_all(&self, connection: &Connection, applied: &Applied) -> Result<(), BrokerError> {
        let channel = open(connection).await?;
        let wanted = |binding: &&Binding| !binding.once || applied.has_created_queue(&binding.destination);
        for binding in self.bindings.iter().filter(wanted) {
            let (source, destination) = (binding.source.as_str(), binding.destination.as_str());
            let key = binding.key.as_str();
            let bound = async {
                if binding.to_exchange {
                    let options = ExchangeBindOptions::default();
                    channel
                        .exchange_bind(
                            destination.into(),
                            source.into(),
                            key.into(),
                            options,
                            FieldTable::default(),
                        )
                        .await
                } else {
                    let options = QueueBindOptions::default();
                    channel
                        .queue_bind(
                            destination.into(),
                            source.into(),
                            key.into(),
                            options,
                            FieldTable::default(),
                        )
                        .await
                }
            };
            let found = classify(timeout(LIMIT, bound).await, "a binding")?;
            if let Found::Missing | Found::Different(_) | Found::Refused(_) = &found {
                let mut wrong = TopologyError::default();
                let name = format!("binding {source} -> {destination} with key `{key}`");
                note(found, name, false, &mut Applied::default(), &mut wrong);
                return Err(wrong.into());
            }
        }
        discard(&channel).await;
        Ok(())
    }
}

impl Exchange {
    async fn look(&self, connection: &Connection) -> Result<Found, BrokerError> {
        self.request(connection, true).await
    }

    async fn declare(&self, connection: &Connection) -> Result<Found, BrokerError> {
        self.request(connection, false).await
    }

    async fn request(&self, connection: &Connection, passive: bool) -> Result<Found, BrokerError> {
        let kind = match self.kind {
            "fanout" => ExchangeKind::Fanout,
            _ => ExchangeKind::Topic,
        };
        let options = ExchangeDeclareOptions {
            passive,
            durable: true,
            ..ExchangeDeclareOptions::default()
        };
        let channel = open(connection).await?;
        let arguments = arguments_table(&self.arguments);
        let answer = timeout(
            LIMIT,
            channel.exchange_declare(self.name.as_str().into(), kind, options, arguments),
        )
        .await;
        discard(&channel).await;
        classify(answer, "an exchange declaration")
    }
}

impl Queue {
    async fn look(&self, connection: &Connection) -> Result<Found, BrokerError> {
        self.request(connection, true).await
    }

    async fn declare(&self, connection: &Connection) -> Result<Found, BrokerError> {
        self.request(connection, false).await
    }

    async fn request(&self, connection: &Connection, passive: bool) -> Result<Found, BrokerError> {
        let options = QueueDeclareOptions {
            passive,
            durable: true,
            ..QueueDeclareOptions::default()
        };
        let channel = open(connection).await?;
        let arguments = arguments_table(&self.arguments);
        let answer = timeout(
            LIMIT,
            channel.queue_declare(self.name.as_str().into(), options, arguments),
        )
        .await;
        discard(&channel).await;
        classify(answer.map(|declared| declared.map(|_| ())), "a queue declaration")
    }
}

async fn open(connection: &Connection) -> Result<Channel, BrokerError> {
    timeout(LIMIT, connection.create_channel())
        .await
        .map_err(|_| BrokerError::Timeout {
            what: "opening a channel",
        })?
        .map_err(BrokerError::Amqp)
}

async fn discard(channel: &Channel) {
    if channel.status().connected() {
        let _ = timeout(LIMIT, channel.close(200, "done".into())).await;
    }
}

/// A user without the right to declare can still have found it.
fn seen(declared: Found) -> Found {
    match declared {
        Found::Refused(_) => Found::AsItShouldBe,
        other => other,
    }
}

fn classify(
    answer: Result<lapin::Result<()>, tokio::time::error::Elapsed>,
    what: &'static str,
) -> Result<Found, BrokerError> {
    let error = match answer {
        Err(_) => return Err(BrokerError::Timeout { what }),
        Ok(Ok(())) => return Ok(Found::AsItShouldBe),
        Ok(Err(error)) => error,
    };
    if let ErrorKind::ProtocolError(said) = error.kind()
        && let AMQPErrorKind::Soft(kind) = said.kind()
    {
        let text = said.get_message().to_string();
        match kind {
            AMQPSoftError::NOTFOUND => return Ok(Found::Missing),
            AMQPSoftError::PRECONDITIONFAILED => return Ok(Found::Different(text)),
            AMQPSoftError::ACCESSREFUSED => return Ok(Found::Refused(text)),
            _ => {}
        }
    }
    Err(error.into())
}

fn note(found: Found, name: String, was_missing: bool, applied: &mut Applied, wrong: &mut TopologyError) {
    match found {
        Found::AsItShouldBe if was_missing => applied.created.push(name),
        Found::AsItShouldBe => applied.present += 1,
        Found::Missing => wrong.missing.push(name),
        Found::Different(said) => wrong.different.push((name, said)),
        Found::Refused(said) => wrong.refused.push((name, said)),
    }
}
