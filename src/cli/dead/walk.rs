//! A queue of dead messages, taken one by one without acknowledging; what stays is given back at the end.

use std::io::Write;

use comfy_table::{Table, presets};
use lapin::message::BasicGetMessage;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions};
use lapin::{Channel, Connection};
use tokio::time::timeout;

use super::letter::Letter;
use super::{DeadError, DeadQueue, Filter, LIMIT, Unseal};
use crate::broker::{BrokerError, PublishError, Publisher, Topology};
use crate::level::Level;

/// What is done with the messages that the filter names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    List,
    Show,
    /// With the level of jobs whose key names none.
    Replay(Option<Level>),
    Drop,
}

/// Why a message stays where it is although it was to be replayed. Those behind it have their turn.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stays {
    #[error("cannot be opened: {0}; if its key is gone for good, `postroom dead drop` removes it")]
    Sealed(String),
    #[error("its key names no level: say which it is to have with --level")]
    NoLevel,
    #[error("neither its key nor its body names a tenant")]
    NoTenant,
    #[error(transparent)]
    Publish(#[from] PublishError),
}

pub(super) struct Walk<'a> {
    pub action: Action,
    pub filter: &'a Filter,
    pub unseal: Unseal<'a>,
    pub publisher: Publisher,
    pub topology: Topology,
}

/// What came of it so far.
#[derive(Debug, Default)]
struct Tally {
    done: usize,
    left: usize,
    rows: Vec<[String; 7]>,
}

impl Walk<'_> {
    pub(super) async fn run(
        &self,
        connection: &Connection,
        out: &mut (dyn Write + Send),
    ) -> Result<(), DeadError> {
        let channel = connection.create_channel().await?;
        let mut tally = Tally::default();
        let walked = self.walk(&channel, &mut tally, out).await;
        // Everything taken and not acknowledged goes back to its place.
        let options = BasicNackOptions {
            multiple: true,
            requeue: true,
        };
        if channel.status().connected() {
            let _ = timeout(LIMIT, channel.basic_nack(0, options)).await;
            let _ = timeout(LIMIT, channel.close(200, "done".into())).await;
        }
        self.conclude(walked, tally, out)
    }

    /// At most as many messages as there were at the first: a replayed one may be dead again at once.
    async fn walk(
        &self,
        channel: &Channel,
        tally: &mut Tally,
        out: &mut (dyn Write + Send),
    ) -> Result<(), DeadError> {
        let mut behind = None;
        while behind != Some(0) && self.filter.limit.is_none_or(|limit| tally.done < limit) {
            let Some(message) = self.next(channel).await? else {
                break;
            };
            behind = Some(behind.map_or(message.message_count, |behind| behind - 1));
            let tag = message.delivery.delivery_tag;
            let letter = Letter::new(message.delivery);
            if !self.filter.matches(&letter) {
                continue;
            }
            match self.action {
                Action::List if self.filter.json => writeln!(out, "{}", letter.summary())?,
                Action::List => tally.rows.push(letter.row()),
                Action::Show if self.filter.json => writeln!(out, "{}", letter.full())?,
                Action::Show => writeln!(out, "{:#}", letter.full())?,
                Action::Replay(level) => {
                    if let Err(why) = self.replay(&letter, level).await {
                        tally.leave(&letter, why, out)?;
                        continue;
                    }
                    answered(channel.basic_ack(tag, BasicAckOptions::default()), "basic.ack").await?;
                }
                Action::Drop => {
                    answered(channel.basic_ack(tag, BasicAckOptions::default()), "basic.ack").await?;
                }
            }
            tally.done += 1;
        }
        Ok(())
    }

    /// Not by `queue.declare`, which would tell the depth before: from RabbitMQ 4.3 on, even a passive one wants the right to
    /// configure.
    async fn next(&self, channel: &Channel) -> Result<Option<BasicGetMessage>, DeadError> {
        let queue = self.filter.queue.name(&self.topology);
        let getting = channel.basic_get(queue.into(), BasicGetOptions::default());
        answered(getting, "basic.get").await
    }

    async fn replay(&self, letter: &Letter, level: Option<Level>) -> Result<(), Stays> {
        let (exchange, key) = letter.destination(self.filter.queue, &self.topology, level)?;
        let opened;
        let body = if letter.is_sealed() {
            let sealed = String::from_utf8_lossy(letter.body());
            opened = (self.unseal)(&sealed).map_err(Stays::Sealed)?;
            &opened
        } else {
            letter.body()
        };
        self.publisher
            .publish(&exchange, &key, letter.replay_properties(), body)
            .await?;
        Ok(())
    }

    /// What was done is said even if it did not come to its end.
    fn conclude(
        &self,
        walked: Result<(), DeadError>,
        tally: Tally,
        out: &mut (dyn Write + Send),
    ) -> Result<(), DeadError> {
        let worked = walked.is_ok() || tally.done > 0;
        match self.action {
            Action::List if !self.filter.json && walked.is_ok() => {
                let mut table = Table::new();
                table
                    .load_style(presets::NOTHING)
                    .set_header(["ID", "TENANT", "KEY", "REASON", "SINCE", "BYTES", "DETAIL"]);
                table.add_rows(tally.rows);
                writeln!(out, "{table}")?;
            }
            Action::Replay(_) if worked => writeln!(out, "{} replayed", tally.done)?,
            Action::Drop if worked => writeln!(out, "{} dropped", tally.done)?,
            _ => {}
        }
        walked?;
        if tally.left > 0 {
            return Err(DeadError::Left { left: tally.left });
        }
        Ok(())
    }
}

impl Tally {
    fn leave(&mut self, letter: &Letter, why: Stays, out: &mut (dyn Write + Send)) -> Result<(), DeadError> {
        match why {
            // The next one would fare no better, or only after as long a wait.
            Stays::Publish(error) if error.is_of_the_broker() || matches!(error, PublishError::Timeout) => {
                Err(error.into())
            }
            why => {
                self.left += 1;
                writeln!(out, "{} (key {}): {why}", letter.id(), letter.key())?;
                Ok(())
            }
        }
    }
}

impl DeadQueue {
    fn name(self, topology: &Topology) -> String {
        match self {
            Self::Jobs => topology.dead_jobs_queue(),
            Self::Reports => topology.dead_reports_queue(),
            Self::Unroutable => topology.unroutable_queue(),
        }
    }
}

impl Filter {
    fn matches(&self, letter: &Letter) -> bool {
        let is = |wanted: &Option<String>, value: &str| wanted.as_deref().is_none_or(|w| w == value);
        is(&self.reason, letter.reason())
            && is(&self.tenant, letter.tenant())
            && self.id.as_deref().is_none_or(|id| letter.has_id(id))
    }
}

async fn answered<T>(
    request: impl Future<Output = lapin::Result<T>>,
    what: &'static str,
) -> Result<T, DeadError> {
    match timeout(LIMIT, request).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(BrokerError::Timeout { what }.into()),
    }
}
