//! One dead message as an operator sees it.

use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use serde_json::{Map, Value, json};

use super::DeadQueue;
use super::walk::Stays;
use crate::broker::consumer::header_text;
use crate::broker::dead_letter::{AT, DETAIL, REASON, REPLAY, SEALED, SOURCE, own_headers, republishable};
use crate::broker::{Properties, Topology};
use crate::job::decode::without_secrets;
use crate::level::Level;

/// Longest detail in a table, in characters.
const DETAIL_WIDTH: usize = 60;

/// A dead message and what could be read of it.
pub(super) struct Letter {
    delivery: Delivery,
    id: Option<String>,
    tenant: Option<String>,
}

impl Letter {
    pub(super) fn new(delivery: Delivery) -> Self {
        // Invalid jobs are often valid JSON: name them as their producer does.
        let body = serde_json::from_slice::<Value>(&delivery.data).ok();
        let field = |pointers: [&str; 2]| {
            let body = body.as_ref()?;
            let found = pointers
                .iter()
                .find_map(|pointer| body.pointer(pointer)?.as_str())?;
            Some(found.to_owned())
        };
        Self {
            id: field(["/id", "/data/job"]),
            tenant: field(["/tenant", "/data/tenant"]),
            delivery,
        }
    }

    fn headers(&self) -> Option<&FieldTable> {
        self.delivery.properties.headers().as_ref()
    }

    fn header(&self, name: &str) -> Option<&str> {
        header_text(self.headers()?, name)
    }

    fn message_id(&self) -> Option<&str> {
        let id = self.delivery.properties.message_id().as_ref();
        id.map(ShortString::as_str)
    }

    pub(super) fn key(&self) -> &str {
        self.delivery.routing_key.as_str()
    }

    pub(super) fn body(&self) -> &[u8] {
        &self.delivery.data
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.headers().is_some_and(|headers| headers.contains_key(SEALED))
    }

    /// The job's id, else the AMQP message id.
    pub(super) fn id(&self) -> &str {
        self.id.as_deref().or_else(|| self.message_id()).unwrap_or("")
    }

    pub(super) fn has_id(&self, id: &str) -> bool {
        self.id.as_deref() == Some(id) || self.message_id() == Some(id)
    }

    /// The tenant of the key (`low.acme`, `report.acme.mail.sent`), else that of the body.
    pub(super) fn tenant(&self) -> &str {
        let mut words = self.key().split('.');
        let first = words.next().unwrap_or_default();
        let addressed = first == "report" || first.parse::<Level>().is_ok();
        let of_key = words.next().filter(|_| addressed);
        of_key.or(self.tenant.as_deref()).unwrap_or_default()
    }

    /// Our own reason, else the broker's, such as `delivery_limit`.
    pub(super) fn reason(&self) -> &str {
        self.header(REASON)
            .or_else(|| self.header("x-first-death-reason"))
            .unwrap_or("unroutable")
    }

    fn source(&self) -> &str {
        self.header(SOURCE)
            .or_else(|| self.header("x-first-death-queue"))
            .unwrap_or_default()
    }

    fn replays(&self) -> i64 {
        match self.headers().and_then(|headers| headers.inner().get(REPLAY)) {
            Some(AMQPValue::LongLongInt(count)) => *count,
            Some(AMQPValue::LongInt(count)) => i64::from(*count),
            _ => 0,
        }
    }

    /// Columns of the table.
    pub(super) fn row(&self) -> [String; 7] {
        let detail = self.header(DETAIL).unwrap_or_default();
        [
            self.id().to_owned(),
            self.tenant().to_owned(),
            self.key().to_owned(),
            self.reason().to_owned(),
            self.header(AT).unwrap_or_default().to_owned(),
            self.body().len().to_string(),
            detail.chars().take(DETAIL_WIDTH).collect(),
        ]
    }

    /// What `list --json` prints.
    pub(super) fn summary(&self) -> Value {
        json!({
            "id": self.id(),
            "message_id": self.message_id(),
            "tenant": self.tenant(),
            "key": self.key(),
            "reason": self.reason(),
            "detail": self.header(DETAIL),
            "queue": self.source(),
            "since": self.header(AT),
            "bytes": self.body().len(),
            "sealed": self.is_sealed(),
            "replays": self.replays(),
        })
    }

    /// What `show` prints: the summary with headers and body. A sealed body is not opened here, and what RabbitMQ moved by
    /// itself is as it was published: either may hold a secret.
    pub(super) fn full(&self) -> Value {
        let mut shown = self.summary();
        let headers: Map<_, _> = self
            .headers()
            .iter()
            .flat_map(|headers| headers.inner())
            .map(|(name, value)| (name.to_string(), header_json(value)))
            .collect();
        let properties = &self.delivery.properties;
        let text = |value: &Option<ShortString>| value.as_ref().map(ToString::to_string);
        shown["exchange"] = Value::from(self.delivery.exchange.as_str());
        shown["type"] = json!(text(properties.kind()));
        shown["content_type"] = json!(text(properties.content_type()));
        shown["content_encoding"] = json!(text(properties.content_encoding()));
        shown["headers"] = Value::Object(headers);
        shown["body"] = without_secrets(self.body());
        shown
    }

    /// Exchange and key to replay to. Jobs go through the front door again; reports only to the queue they died in, since
    /// others have had theirs.
    pub(super) fn destination(
        &self,
        queue: DeadQueue,
        topology: &Topology,
        level: Option<Level>,
    ) -> Result<(String, String), Stays> {
        let source = || (String::new(), self.source().to_owned());
        let key = self.key().to_owned();
        Ok(match queue {
            DeadQueue::Unroutable => return self.way_on(topology, level),
            DeadQueue::Reports if self.source().is_empty() => (String::new(), topology.reports_queue()),
            DeadQueue::Reports => source(),
            // A key that names no tenant belongs to a message that was published to its queue directly.
            DeadQueue::Jobs if !self.key_is_a_jobs() && !self.source().is_empty() => source(),
            DeadQueue::Jobs => (topology.jobs_exchange(), key),
        })
    }

    /// Of what no queue wanted. Under a key without a level it would only be back at once.
    fn way_on(&self, topology: &Topology, level: Option<Level>) -> Result<(String, String), Stays> {
        let exchange = self.delivery.exchange.as_str();
        let is_no_job = exchange == topology.reports_exchange() || exchange == topology.dead_exchange();
        if is_no_job || self.key_is_a_jobs() {
            return Ok((exchange.to_owned(), self.key().to_owned()));
        }
        let level = level.ok_or(Stays::NoLevel)?;
        let of_key = self.key().split_once('.').map(|(_, tenant)| tenant);
        let tenant = of_key.or(self.tenant.as_deref()).unwrap_or_default();
        if tenant.is_empty() {
            return Err(Stays::NoTenant);
        }
        Ok((topology.jobs_exchange(), format!("{level}.{tenant}")))
    }

    fn key_is_a_jobs(&self) -> bool {
        self.key()
            .split_once('.')
            .is_some_and(|(level, tenant)| level.parse::<Level>().is_ok() && !tenant.is_empty())
    }

    /// The original properties, with the number of replays.
    pub(super) fn replay_properties(&self) -> Properties {
        let mut headers = own_headers(self.headers());
        headers.insert(REPLAY.into(), AMQPValue::LongLongInt(self.replays() + 1));
        republishable(&self.delivery.properties, headers)
    }
}

fn header_json(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(value) => json!(value),
        AMQPValue::LongInt(value) => json!(value),
        AMQPValue::LongLongInt(value) => json!(value),
        AMQPValue::Timestamp(value) => json!(value),
        AMQPValue::ShortString(value) => json!(value.as_str()),
        AMQPValue::LongString(value) => json!(value.to_string()),
        AMQPValue::FieldArray(values) => values.as_slice().iter().map(header_json).collect(),
        AMQPValue::FieldTable(table) => {
            let entries = table.inner().iter();
            Value::Object(
                entries
                    .map(|(name, value)| (name.to_string(), header_json(value)))
                    .collect(),
            )
        }
        other => json!(format!("{other:?}")),
    }
}
