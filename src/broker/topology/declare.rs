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
            self.apply_queue(queue, connection, &mut applied, &mut wrong)
                .await?;
        }
        if wrong.is_empty() {
            let always = self.bindings.iter().filter(|binding| !binding.once);
            bind(connection, always, &mut wrong).await?;
        }
        if wrong.is_empty() {
            Ok(applied)
        } else {
            Err(wrong.into())
        }
    }

    /// Declares a queue. One that is bound only once is made last, when all else is right, and bound at once: whatever came
    /// between would leave it unbound for ever, since next time it is there.
    async fn apply_queue(
        &self,
        queue: &Queue,
        connection: &Connection,
        applied: &mut Applied,
        wrong: &mut TopologyError,
    ) -> Result<(), BrokerError> {
        let was_missing = matches!(queue.look(connection).await?, Found::Missing);
        let of_it = |binding: &&Binding| binding.once && binding.destination == queue.name;
        let once = self.bindings.iter().filter(of_it);
        let is_bound_once = was_missing && once.clone().next().is_some();
        if is_bound_once && !wrong.is_empty() {
            wrong.missing.push(queue_name(&queue.name));
            return Ok(());
        }
        let found = queue.declare(connection).await?;
        let found = if was_missing { found } else { seen(found) };
        note(found, queue_name(&queue.name), was_missing, applied, wrong);
        if is_bound_once && wrong.is_empty() {
            bind(connection, once, wrong).await?;
        }
        Ok(())
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
}

/// Makes bindings, up to the first that cannot be made: that closes the channel.
async fn bind(
    connection: &Connection,
    bindings: impl Iterator<Item = &Binding>,
    wrong: &mut TopologyError,
) -> Result<(), BrokerError> {
    let channel = open(connection).await?;
    for binding in bindings {
        let found = binding.make(&channel).await?;
        if let Found::Missing | Found::Different(_) | Found::Refused(_) = &found {
            let (source, destination, key) = (&binding.source, &binding.destination, &binding.key);
            let name = format!("binding {source} -> {destination} with key `{key}`");
            note(found, name, false, &mut Applied::default(), wrong);
            return Ok(());
        }
    }
    discard(&channel).await;
    Ok(())
}

impl Binding {
    async fn make(&self, channel: &Channel) -> Result<Found, BrokerError> {
        let (destination, source) = (self.destination.as_str().into(), self.source.as_str().into());
        let (key, arguments) = (self.key.as_str().into(), FieldTable::default());
        let bound = async {
            if self.to_exchange {
                let options = ExchangeBindOptions::default();
                channel
                    .exchange_bind(destination, source, key, options, arguments)
                    .await
            } else {
                let options = QueueBindOptions::default();
                channel
                    .queue_bind(destination, source, key, options, arguments)
                    .await
            }
        };
        classify(timeout(LIMIT, bound).await, "a binding")
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
