//! Dead letters: messages that cannot be processed, kept with the reason for an operator.

use jiff::Timestamp;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::{Delivery, Properties, PublishError, Publisher, Topology};

/// Why it is dead: a fixed word.
pub const REASON: &str = "x-dead-reason";
/// The same in a sentence.
pub const DETAIL: &str = "x-dead-detail";
/// The queue it was taken from.
pub const SOURCE: &str = "x-dead-source";
/// When, RFC 3339.
pub const AT: &str = "x-dead-ts";
/// Present if the body is sealed as a whole, because it holds a secret.
pub const SEALED: &str = "x-dead-sealed";
/// How often it has been replayed.
pub const REPLAY: &str = "x-replay";

/// Longest detail, in bytes.
const MAX_DETAIL: usize = 1024;

/// Why and how a delivery becomes a dead letter.
#[derive(Debug, Clone, Default)]
pub struct DeadLetter<'a> {
    /// A fixed, documented word; the metric's label.
    pub reason: &'static str,
    /// What is wrong, in a sentence; control characters are replaced, at most 1 KiB is kept.
    pub detail: &'a str,
    /// The job's tenant where it could be read, for messages whose routing key does not say.
    pub tenant: Option<&'a str>,
    /// A body to keep instead of the original.
    pub body: Option<&'a [u8]>,
    /// That body is sealed.
    pub sealed: bool,
    /// That body is plain JSON that was compressed.
    pub gzip: bool,
}

impl Publisher {
    /// Publishes a delivery to the dead-letter exchange and awaits the confirm. The caller acknowledges it afterwards.
    ///
    /// # Errors
    /// If it is not known to be stored: do not acknowledge it then.
    pub async fn dead_letter(
        &self,
        topology: &Topology,
        delivery: &Delivery,
        letter: &DeadLetter<'_>,
    ) -> Result<(), PublishError> {
        let key = key(delivery, letter.tenant);
        let headers = headers(delivery, letter);
        let mut properties = republishable(&delivery.properties, headers);
        if letter.gzip {
            properties = properties.with_content_encoding("gzip".into());
        }
        let body = letter.body.unwrap_or(&delivery.body);
        self.publish(&topology.dead_exchange(), &key, properties, body)
            .await?;
        self.metrics()
            .dead_lettered
            .with_label_values(&[letter.reason])
            .inc();
        Ok(())
    }

    /// Publishes a delivery again as it came, to where it came from, and awaits the confirm: it goes to the end of its
    /// queue, and its deliveries are counted anew. The caller acknowledges it afterwards.
    ///
    /// # Errors
    /// If it is not known to be stored: do not acknowledge it then.
    pub async fn send_on(&self, delivery: &Delivery) -> Result<(), PublishError> {
        let headers = own_headers(delivery.properties.headers().as_ref());
        let properties = republishable(&delivery.properties, headers);
        self.publish(
            &delivery.exchange,
            &delivery.routing_key,
            properties,
            &delivery.body,
        )
        .await
    }
}

/// The original key if the dead-letter exchange knows it; a message that came another way gets one from its queue.
fn key(delivery: &Delivery, tenant: Option<&str>) -> String {
    let first = delivery.level.map_or("report", |level| level.as_str());
    let original = delivery.routing_key.as_str();
    let known = original
        .strip_prefix(first)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    if known && !delivery.came_through_default_exchange() {
        return original.to_owned();
    }
    match tenant.or_else(|| delivery.header("x-tenant")) {
        Some(tenant) if first.len() + tenant.len() < 255 => format!("{first}.{tenant}"),
        _ => first.to_owned(),
    }
}

fn headers(delivery: &Delivery, letter: &DeadLetter<'_>) -> FieldTable {
    let mut headers = own_headers(delivery.properties.headers().as_ref());
    let mut add = |name: &str, value: &str| {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    };
    add(REASON, letter.reason);
    add(DETAIL, &cleaned(letter.detail));
    add(SOURCE, &delivery.queue);
    add(AT, &Timestamp::now().to_string());
    if letter.sealed {
        add(SEALED, "true");
    }
    headers
}

/// The producer's headers: without what the broker adds at each hop, what makes it copy messages (`CC`, `BCC`), and what
/// an earlier dead-lettering added.
#[must_use]
pub fn own_headers(headers: Option<&FieldTable>) -> FieldTable {
    const FOREIGN: [&str; 7] = [
        "x-death",
        "x-first-death-",
        "x-last-death-",
        "x-delivery-count",
        "x-acquired-count",
        "x-dead-",
        "x-opt-",
    ];
    let mut own = FieldTable::default();
    for (name, value) in headers.iter().flat_map(|headers| headers.inner()) {
        let text = name.as_str();
        let foreign = FOREIGN.iter().any(|prefix| text.starts_with(prefix));
        if !foreign && !text.eq_ignore_ascii_case("cc") && !text.eq_ignore_ascii_case("bcc") {
            own.insert(name.clone(), value.clone());
        }
    }
    own
}

/// Properties under which a message can be published again: no `expiration`, which would drop it, and no `user_id`, which
/// the broker compares with ours.
#[must_use]
pub fn republishable(original: &Properties, headers: FieldTable) -> Properties {
    type Setter = fn(Properties, ShortString) -> Properties;
    let texts: [(&Option<ShortString>, Setter); 7] = [
        (original.content_type(), Properties::with_content_type),
        (original.content_encoding(), Properties::with_content_encoding),
        (original.correlation_id(), Properties::with_correlation_id),
        (original.reply_to(), Properties::with_reply_to),
        (original.message_id(), Properties::with_message_id),
        (original.kind(), Properties::with_type),
        (original.app_id(), Properties::with_app_id),
    ];
    let mut properties = Properties::default().with_headers(headers);
    for (value, set) in texts {
        if let Some(value) = value {
            properties = set(properties, value.clone());
        }
    }
    match original.timestamp() {
        Some(at) => properties.with_timestamp(*at),
        None => properties,
    }
}

/// One line of at most [`MAX_DETAIL`] bytes.
fn cleaned(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(MAX_DETAIL));
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if line.len() + c.len_utf8() > MAX_DETAIL {
            break;
        }
        line.push(c);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::level::Level;

    fn delivery(level: Option<Level>, exchange: &str, key: &str) -> Delivery {
        Delivery {
            level,
            exchange: exchange.to_owned(),
            routing_key: key.to_owned(),
            ..Delivery::for_tests("")
        }
    }

    #[test]
    fn the_key_is_one_the_dead_letter_exchange_knows() {
        let low = Some(Level::Low);
        let cases = [
            (delivery(low, "mail.jobs", "low.acme"), None, "low.acme"),
            (delivery(low, "mail.jobs", "low"), Some("acme"), "low"),
            (delivery(low, "", "mail.jobs.low"), Some("acme"), "low.acme"),
            (delivery(low, "", "mail.jobs.low"), None, "low"),
            (delivery(low, "own", "lowest.x"), Some("acme"), "low.acme"),
            (
                delivery(None, "mail.reports", "report.acme.mail.sent"),
                None,
                "report.acme.mail.sent",
            ),
            (delivery(None, "", "mail.reports.bridge"), None, "report"),
        ];
        for (delivery, tenant, expected) in cases {
            assert_eq!(key(&delivery, tenant), expected, "{}", delivery.routing_key);
        }
    }

    #[test]
    fn the_brokers_headers_are_dropped_and_the_producers_kept() {
        let mut headers = FieldTable::default();
        for name in [
            "x-death",
            "x-first-death-queue",
            "x-delivery-count",
            "x-dead-reason",
            "CC",
            "traceparent",
            "x-tenant",
        ] {
            headers.insert(name.into(), AMQPValue::LongString("v".into()));
        }
        let own = own_headers(Some(&headers));
        let names: Vec<_> = own.inner().keys().map(ToString::to_string).collect();
        assert_eq!(names, ["traceparent", "x-tenant"]);
    }

    #[test]
    fn what_would_drop_or_refuse_the_copy_is_not_copied() {
        let original = Properties::default()
            .with_message_id("1".into())
            .with_timestamp(7)
            .with_expiration("1".into())
            .with_user_id("producer".into());
        let copy = republishable(&original, FieldTable::default());
        assert_eq!(copy.message_id(), original.message_id());
        assert_eq!(copy.timestamp(), &Some(7));
        assert_eq!((copy.expiration(), copy.user_id()), (&None, &None));
    }

    #[test]
    fn details_are_one_bounded_line() {
        assert_eq!(cleaned("a\r\nb"), "a  b");
        assert_eq!(cleaned(&"é".repeat(1000)).len(), MAX_DETAIL);
    }
}
