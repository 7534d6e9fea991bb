//! The exchanges, queues and bindings, as one table; declared, checked and printed from it.
//!
//! ```text
//! mail.jobs ──#──▶ mail.jobs.route ──<level>.<tenant>──▶ dedicated queues
//!                        └─ nothing matched ─▶ mail.jobs.default ──<level>.#──▶ mail.jobs.<level>
//!                                                    └─ nothing matched ─▶ mail.unroutable
//! mail.reports ──report.#──▶ mail.reports.bridge
//! mail.dlx ──<level>.#──▶ mail.jobs.dead,  ──report.#──▶ mail.reports.dead
//! ```

mod declare;

use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

pub use declare::{Applied, TopologyError};

use crate::level::Level;

/// Deliveries without an acknowledgement after which the broker dead-letters a job. Up to 4.2 every requeue counts, also
/// those of rolling restarts.
const WORK_DELIVERY_LIMIT: i64 = 50;
/// For queues that people look into: practically none. `-1` would lose messages on 3.10, absence would on 4.x.
const PARKED_DELIVERY_LIMIT: i64 = 1_000_000;

/// An argument of an exchange or queue.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Argument {
    Text(String),
    Number(i64),
}

type Arguments = Vec<(&'static str, Argument)>;

/// A durable exchange.
#[derive(Debug, Clone)]
struct Exchange {
    name: String,
    kind: &'static str,
    arguments: Arguments,
}

/// A durable quorum queue.
#[derive(Debug, Clone)]
struct Queue {
    name: String,
    arguments: Arguments,
}

/// A binding to a queue, or to an exchange.
#[derive(Debug, Clone)]
struct Binding {
    source: String,
    destination: String,
    to_exchange: bool,
    key: String,
    /// Made only with its queue. Bindings cannot be seen over AMQP: one that somebody deleted would be made again.
    once: bool,
}

/// Everything postroom needs on the broker, by name.
#[derive(Debug, Clone)]
pub struct Topology {
    prefix: String,
    job_queues: Vec<(Level, String)>,
    exchanges: Vec<Exchange>,
    queues: Vec<Queue>,
    bindings: Vec<Binding>,
}

impl Topology {
    /// The topology under a prefix (`mail`), with dedicated queues besides the shared four. A dedicated queue named
    /// `<prefix>.jobs.<level>.<tenant>` is bound to that tenant's jobs; one of another name is declared, and whoever named
    /// it binds it to `<prefix>.jobs.route`.
    #[must_use]
    pub fn new(prefix: &str, extra_queues: &[(Level, String)]) -> Self {
        let mut job_queues: Vec<_> = Level::ALL
            .into_iter()
            .map(|level| (level, format!("{prefix}.jobs.{level}")))
            .collect();
        job_queues.extend_from_slice(extra_queues);
        let mut topology = Self {
            prefix: prefix.to_owned(),
            job_queues,
            exchanges: exchanges(prefix),
            queues: Vec::new(),
            bindings: Vec::new(),
        };
        topology.add_queues();
        topology.add_bindings(extra_queues);
        topology
    }

    /// The same for a process that needs no reports itself. It binds the bridge's queue only when it declares it: before the
    /// first bridge starts no report is lost, and who runs none can delete the binding for good.
    #[must_use]
    pub fn leaving_reports(mut self) -> Self {
        let queue = self.reports_queue();
        // Made last: see `apply`.
        self.queues.sort_by_key(|other| other.name == queue);
        for binding in &mut self.bindings {
            binding.once = binding.destination == queue;
        }
        self
    }

    /// The job queues to consume, each with the level its jobs have.
    #[must_use]
    pub fn job_queues(&self) -> &[(Level, String)] {
        &self.job_queues
    }

    /// Producers publish here, key `<level>.<tenant>`.
    #[must_use]
    pub fn jobs_exchange(&self) -> String {
        format!("{}.jobs", self.prefix)
    }

    /// Outcomes are published here, key `report.<tenant>.<type>`.
    #[must_use]
    pub fn reports_exchange(&self) -> String {
        format!("{}.reports", self.prefix)
    }

    /// The bridge's queue of reports.
    #[must_use]
    pub fn reports_queue(&self) -> String {
        format!("{}.reports.bridge", self.prefix)
    }

    /// Dead letters are published here, with their original key.
    #[must_use]
    pub fn dead_exchange(&self) -> String {
        format!("{}.dlx", self.prefix)
    }

    /// Dead jobs wait here for an operator.
    #[must_use]
    pub fn dead_jobs_queue(&self) -> String {
        format!("{}.jobs.dead", self.prefix)
    }

    /// Dead reports wait here for an operator.
    #[must_use]
    pub fn dead_reports_queue(&self) -> String {
        format!("{}.reports.dead", self.prefix)
    }

    /// What no binding wanted waits here for an operator.
    #[must_use]
    pub fn unroutable_queue(&self) -> String {
        format!("{}.unroutable", self.prefix)
    }

    /// Definitions that `rabbitmqctl import_definitions` and the management UI take.
    #[must_use]
    pub fn definitions(&self, vhost: &str) -> Value {
        let exchanges: Vec<_> = self
            .exchanges
            .iter()
            .map(|e| {
                json!({"name": e.name, "vhost": vhost, "type": e.kind, "durable": true, "auto_delete": false,
                    "internal": false, "arguments": arguments_json(&e.arguments)})
            })
            .collect();
        let queues: Vec<_> = self
            .queues
            .iter()
            .map(|q| {
                json!({"name": q.name, "vhost": vhost, "durable": true, "auto_delete": false,
                    "arguments": arguments_json(&q.arguments)})
            })
            .collect();
        let bindings: Vec<_> = self
            .bindings
            .iter()
            .map(|b| {
                json!({"source": b.source, "vhost": vhost, "destination": b.destination,
                    "destination_type": if b.to_exchange { "exchange" } else { "queue" },
                    "routing_key": b.key, "arguments": {}})
            })
            .collect();
        json!({"exchanges": exchanges, "queues": queues, "bindings": bindings})
    }

    fn add_queues(&mut self) {
        let work = work_arguments(&self.dead_exchange());
        let parked = parked_arguments();
        for (_, name) in &self.job_queues {
            self.queues.push(Queue {
                name: name.clone(),
                arguments: work.clone(),
            });
        }
        self.queues.push(Queue {
            name: self.reports_queue(),
            arguments: work,
        });
        for name in [
            self.dead_jobs_queue(),
            self.dead_reports_queue(),
            self.unroutable_queue(),
        ] {
            self.queues.push(Queue {
                name,
                arguments: parked.clone(),
            });
        }
    }

    fn add_bindings(&mut self, extra_queues: &[(Level, String)]) {
        let route = format!("{}.jobs.route", self.prefix);
        let default = format!("{}.jobs.default", self.prefix);
        self.bindings.push(Binding {
            source: self.jobs_exchange(),
            destination: route.clone(),
            to_exchange: true,
            key: "#".to_owned(),
            once: false,
        });
        for (level, queue) in extra_queues {
            if let Some(tenant) = queue.strip_prefix(&format!("{}.jobs.{level}.", self.prefix)) {
                self.bind(&route, queue, &format!("{level}.{tenant}"));
            }
        }
        for level in Level::ALL {
            self.bind(
                &default,
                &format!("{}.jobs.{level}", self.prefix),
                &format!("{level}.#"),
            );
        }
        let reports = self.reports_exchange();
        self.bind(&reports, &self.reports_queue(), "report.#");
        self.bind_dead_letters();
        let unroutable = self.unroutable_queue();
        self.bind(&unroutable, &unroutable, "");
    }

    /// A message published through the default exchange is dead-lettered under its queue's name.
    fn bind_dead_letters(&mut self) {
        let dlx = self.dead_exchange();
        let jobs = self.dead_jobs_queue();
        for level in Level::ALL {
            self.bind(&dlx, &jobs, &format!("{level}.#"));
        }
        self.bind(&dlx, &jobs, &format!("{}.jobs.#", self.prefix));
        let reports = self.dead_reports_queue();
        self.bind(&dlx, &reports, "report.#");
        self.bind(&dlx, &reports, &format!("{}.reports.#", self.prefix));
    }

    fn bind(&mut self, source: &str, queue: &str, key: &str) {
        self.bindings.push(Binding {
            source: source.to_owned(),
            destination: queue.to_owned(),
            to_exchange: false,
            key: key.to_owned(),
            once: false,
        });
    }
}

fn exchanges(prefix: &str) -> Vec<Exchange> {
    let exchange = |name: &str, kind, alternate: Option<&str>| Exchange {
        name: format!("{prefix}.{name}"),
        kind,
        arguments: alternate
            .map(|to| ("alternate-exchange", Argument::Text(format!("{prefix}.{to}"))))
            .into_iter()
            .collect(),
    };
    vec![
        exchange("unroutable", "fanout", None),
        exchange("jobs.default", "topic", Some("unroutable")),
        exchange("jobs.route", "topic", Some("jobs.default")),
        // Without arguments: producers may declare it themselves, as many client libraries do.
        exchange("jobs", "topic", None),
        exchange("reports", "topic", Some("unroutable")),
        exchange("dlx", "topic", Some("unroutable")),
    ]
}

fn work_arguments(dead_exchange: &str) -> Arguments {
    vec![
        ("x-queue-type", Argument::Text("quorum".to_owned())),
        // Both are needed for dead-lettering at least once: otherwise dead letters are dropped when in doubt.
        ("x-overflow", Argument::Text("reject-publish".to_owned())),
        (
            "x-dead-letter-strategy",
            Argument::Text("at-least-once".to_owned()),
        ),
        ("x-dead-letter-exchange", Argument::Text(dead_exchange.to_owned())),
        ("x-delivery-limit", Argument::Number(WORK_DELIVERY_LIMIT)),
        ("x-queue-leader-locator", Argument::Text("balanced".to_owned())),
    ]
}

fn parked_arguments() -> Arguments {
    vec![
        ("x-queue-type", Argument::Text("quorum".to_owned())),
        ("x-overflow", Argument::Text("reject-publish".to_owned())),
        ("x-delivery-limit", Argument::Number(PARKED_DELIVERY_LIMIT)),
    ]
}

fn arguments_json(arguments: &Arguments) -> Value {
    arguments
        .iter()
        .map(|(name, value)| {
            let value = match value {
                Argument::Text(text) => Value::from(text.as_str()),
                Argument::Number(number) => Value::from(*number),
            };
            ((*name).to_owned(), value)
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn arguments_table(arguments: &Arguments) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        let value = match value {
            Argument::Text(text) => AMQPValue::LongString(text.as_str().into()),
            Argument::Number(number) => AMQPValue::LongLongInt(*number),
        };
        table.insert((*name).into(), value);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn definitions() -> Value {
        Topology::new(
            "mail",
            &[
                (Level::Low, "mail.jobs.low.acme".to_owned()),
                (Level::High, "elsewhere".to_owned()),
            ],
        )
        .definitions("/")
    }

    fn named<'a>(definitions: &'a Value, what: &str, name: &str) -> &'a Value {
        definitions[what]
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["name"] == name)
            .unwrap_or_else(|| panic!("no {name} among {what}"))
    }

    #[test]
    fn producers_may_declare_the_jobs_exchange_themselves() {
        assert_eq!(
            named(&definitions(), "exchanges", "mail.jobs")["arguments"],
            json!({})
        );
    }

    #[test]
    fn queues_of_its_own_are_refused_as_dedicated_ones() {
        let own = Topology::new("mail", &[]).definitions("/");
        for queue in own["queues"].as_array().unwrap() {
            let named = format!("low:{}", queue["name"].as_str().unwrap());
            let sources = config::Sources {
                env: [("POSTROOM_QUEUES".to_owned(), named)].into(),
                ..config::Sources::default()
            };
            assert!(config::load::<config::BrokerNames>(&sources).is_err(), "{queue}");
        }
    }

    #[test]
    fn every_queue_is_a_quorum_queue_with_a_positive_delivery_limit() {
        for queue in definitions()["queues"].as_array().unwrap() {
            assert_eq!(queue["arguments"]["x-queue-type"], "quorum", "{queue}");
            assert!(
                queue["arguments"]["x-delivery-limit"].as_i64().unwrap() > 0,
                "{queue}"
            );
        }
    }

    #[test]
    fn work_queues_dead_letter_at_least_once() {
        for name in ["mail.jobs.low", "mail.jobs.low.acme", "mail.reports.bridge"] {
            let definitions = definitions();
            let arguments = &named(&definitions, "queues", name)["arguments"];
            assert_eq!(arguments["x-dead-letter-strategy"], "at-least-once");
            assert_eq!(arguments["x-overflow"], "reject-publish");
            assert_eq!(arguments["x-dead-letter-exchange"], "mail.dlx");
        }
    }

    #[test]
    fn a_dedicated_queue_is_bound_by_its_name() {
        let definitions = definitions();
        let bound: Vec<_> = definitions["bindings"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|binding| binding["source"] == "mail.jobs.route")
            .collect();
        assert_eq!(bound.len(), 1);
        assert_eq!(bound[0]["destination"], "mail.jobs.low.acme");
        assert_eq!(bound[0]["routing_key"], "low.acme");
    }
}
