//! A queue of dead messages, taken one by one without acknowledging; what stays is given back at the end.

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Write};

use lapin::message::BasicGetMessage;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions};
use lapin::{Channel, Connection};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::letter::Letter;
use super::{DeadError, DeadQueue, Filter, LIMIT, Unseal};
use crate::broker::{BrokerError, PublishError, Publisher, Topology};
use crate::cli::table;
use crate::level::Level;

/// Output that is kept until the messages are given back, in bytes. Printing may take as long as somebody reads.
const MOST_KEPT: usize = 16 << 20;

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
    pub filter: Filter,
    pub unseal: Unseal<'a>,
    pub publisher: Publisher,
    pub topology: Topology,
}

/// What came of it so far.
#[derive(Debug, Default)]
struct Tally {
    done: usize,
    left: usize,
    rows: Vec<Vec<String>>,
    text: String,
}

impl Walk<'_> {
    pub(super) async fn run(
        self,
        connection: &Connection,
        out: &mut (dyn Write + Send),
    ) -> Result<(), DeadError> {
        let channel = connection.create_channel().await?;
        let mut tally = Tally::default();
        let walked = self.walk(&channel, &mut tally, out).await;
        give_back(&channel).await;
        if channel.status().connected() {
            let _ = timeout(LIMIT, channel.close(200, "done".into())).await;
        }
        self.conclude(walked, tally, out)
    }

    fn changes_by_id_alone(&self) -> bool {
        let changes = matches!(self.action, Action::Replay(_) | Action::Drop);
        changes && self.filter.id.is_some() && self.filter.tenant.is_none()
    }

    /// All letters of the only tenant that has some which the filter names: an id is unique within its tenant only. None is
    /// given back before it has been dealt with: a queue gives back slowly what was many.
    async fn of_one_tenant(&self, channel: &Channel) -> Result<VecDeque<(u64, Letter)>, DeadError> {
        let (mut behind, mut meant) = (None, VecDeque::new());
        while let Some(found) = self.next(channel, &mut behind).await? {
            meant.push_back(found);
        }
        let tenants: BTreeSet<&str> = meant.iter().map(|(_, letter)| letter.tenant()).collect();
        if tenants.len() > 1 {
            return Err(DeadError::Ambiguous {
                id: self.filter.id.clone().unwrap_or_default(),
                tenants: tenants.into_iter().map(str::to_owned).collect(),
            });
        }
        Ok(meant)
    }

    async fn walk(
        &self,
        channel: &Channel,
        tally: &mut Tally,
        out: &mut (dyn Write + Send),
    ) -> Result<(), DeadError> {
        let mut behind = None;
        let mut meant = if self.changes_by_id_alone() {
            behind = Some(0);
            self.of_one_tenant(channel).await?
        } else {
            VecDeque::new()
        };
        while self.filter.limit.is_none_or(|limit| tally.done < limit) {
            let next = match meant.pop_front() {
                Some(found) => Some(found),
                None => self.next(channel, &mut behind).await?,
            };
            let Some((tag, letter)) = next else { break };
            match self.action {
                Action::List if self.filter.json => tally.say_json(&letter.summary(), out)?,
                Action::List => tally.rows.push(letter.row().to_vec()),
                Action::Show if self.filter.json => tally.say_json(&letter.full(), out)?,
                Action::Show => tally.say(&table::safe_json(&format!("{:#}", letter.full())), out)?,
                Action::Replay(level) => {
                    if let Err(why) = self.replay(&letter, level).await {
                        self.leave(tally, &letter, why, out)?;
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

    /// The next letter that the filter names. Of all, at most as many are looked at as there were at the first: a replayed one
    /// may be dead again at once.
    async fn next(
        &self,
        channel: &Channel,
        behind: &mut Option<u32>,
    ) -> Result<Option<(u64, Letter)>, DeadError> {
        while *behind != Some(0) {
            let Some(message) = self.get(channel).await? else {
                break;
            };
            *behind = Some(behind.map_or(message.message_count, |behind| behind - 1));
            let tag = message.delivery.delivery_tag;
            let letter = Letter::new(message.delivery);
            if self.filter.matches(&letter) {
                return Ok(Some((tag, letter)));
            }
        }
        Ok(None)
    }

    /// Not by `queue.declare`, which would tell the depth before: from RabbitMQ 4.3 on, even a passive one wants the right to
    /// configure.
    async fn get(&self, channel: &Channel) -> Result<Option<BasicGetMessage>, DeadError> {
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

    /// Of one that could not be replayed.
    fn leave(
        &self,
        tally: &mut Tally,
        letter: &Letter,
        why: Stays,
        out: &mut (dyn Write + Send),
    ) -> Result<(), DeadError> {
        match why {
            // The next one would fare no better, or only after as long a wait.
            Stays::Publish(error) if error.is_of_the_broker() || matches!(error, PublishError::Timeout) => {
                return Err(error.into());
            }
            why if self.filter.json => {
                let (id, tenant, key) = (letter.id(), letter.tenant(), letter.key());
                let left = json!({"id": id, "tenant": tenant, "key": key, "left": why.to_string()});
                tally.say_json(&left, out)?;
            }
            why => {
                let line = format!("{} (key {}): {why}", letter.id(), letter.key());
                tally.say(&table::safe(&line), out)?;
            }
        }
        tally.left += 1;
        Ok(())
    }

    /// What was done is said even if it did not come to its end.
    fn conclude(
        &self,
        walked: Result<(), DeadError>,
        mut tally: Tally,
        out: &mut (dyn Write + Send),
    ) -> Result<(), DeadError> {
        if let (Ok(()), Some(id), 0) = (&walked, &self.filter.id, tally.done + tally.left) {
            return Err(DeadError::Unknown(id.clone()));
        }
        tally.write(out)?;
        let worked = walked.is_ok() || tally.done > 0;
        match self.action {
            Action::List if !self.filter.json && walked.is_ok() => {
                let header = ["ID", "TENANT", "KEY", "REASON", "SINCE", "BYTES", "DETAIL"];
                table::columns(out, &header, tally.rows)?;
            }
            Action::Replay(_) if worked => self.count(tally.done, "replayed", out)?,
            Action::Drop if worked => self.count(tally.done, "dropped", out)?,
            _ => {}
        }
        walked?;
        if tally.left > 0 {
            return Err(DeadError::Left { left: tally.left });
        }
        Ok(())
    }

    fn count(&self, done: usize, what: &str, out: &mut (dyn Write + Send)) -> io::Result<()> {
        if self.filter.json {
            writeln!(out, "{}", json!({ what: done }))
        } else {
            writeln!(out, "{done} {what}")
        }
    }
}

impl Tally {
    /// Printed at once only if it is more than can be kept.
    fn say(&mut self, text: &str, out: &mut (dyn Write + Send)) -> io::Result<()> {
        self.text.push_str(text);
        self.text.push('\n');
        if self.text.len() > MOST_KEPT {
            self.write(out)?;
        }
        Ok(())
    }

    fn say_json(&mut self, value: &Value, out: &mut (dyn Write + Send)) -> io::Result<()> {
        self.say(&table::safe_json(&value.to_string()), out)
    }

    fn write(&mut self, out: &mut (dyn Write + Send)) -> io::Result<()> {
        out.write_all(std::mem::take(&mut self.text).as_bytes())
    }
}

/// Everything taken and not acknowledged goes back to its place.
async fn give_back(channel: &Channel) {
    let options = BasicNackOptions {
        multiple: true,
        requeue: true,
    };
    if channel.status().connected() {
        // If it does not come to that, the end of the connection does it.
        let _ = timeout(LIMIT, channel.basic_nack(0, options)).await;
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
