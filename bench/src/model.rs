//! How many workers, connections and databases a number of mails a day takes: costs per mail, measured by `run`, and
//! queueing left to headroom. `docs/scaling.md` explains it.

use std::path::PathBuf;

use comfy_table::{Table, presets};
use serde_json::Value;

use crate::Failed;

/// Costs and circumstances.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Takes the costs from load a of this file, and compares the model with its loads a and k
    #[arg(long, value_name = "results.json")]
    from: Option<PathBuf>,
    /// CPU of the worker per mail, µs
    #[arg(long, default_value_t = 100.0)]
    own: f64,
    /// CPU of the broker per mail, µs: publish, consume and ack of the job, publish of the report
    #[arg(long, default_value_t = 70.0)]
    broker: f64,
    /// CPU of the database per mail, µs
    #[arg(long, default_value_t = 60.0)]
    database: f64,
    /// CPU of the SMTP server per mail, µs, if it is on the same machine
    #[arg(long, default_value_t = 15.0)]
    sink: f64,
    /// Round trip to the SMTP servers and their work, ms
    #[arg(long, default_value_t = 50.0)]
    rtt: f64,
    /// Round trips per mail: 4, 2 with PIPELINING, 1 with CHUNKING too
    #[arg(long, default_value_t = 2.0)]
    round_trips: f64,
    /// The busiest hour, as a multiple of the day's average
    #[arg(long, default_value_t = 3.0)]
    peak: f64,
    /// Share of a core that is planned with
    #[arg(long, default_value_t = 0.5)]
    utilisation: f64,
    /// Bytes on disk per finished job, with indexes
    #[arg(long, default_value_t = 1000.0)]
    row: f64,
    /// Days that finished jobs are remembered
    #[arg(long, default_value_t = 30.0)]
    retention: f64,
    /// Cores of one database and of one broker node that can be used in full
    #[arg(long, default_value_t = 16.0)]
    server_cores: f64,
}

/// CPU per mail, µs.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Costs {
    own: f64,
    broker: f64,
    database: f64,
    sink: f64,
}

/// What a rate of mails takes.
#[derive(Debug, PartialEq)]
struct Needs {
    /// Mails per second in the busiest hour.
    rate: f64,
    worker_cores: f64,
    connections: f64,
    broker_cores: f64,
    database_cores: f64,
    /// Of the ledger, GiB.
    disk: f64,
}

impl Costs {
    fn cores(cost: f64, rate: f64, utilisation: f64) -> f64 {
        rate * cost / 1e6 / utilisation
    }

    /// Mails per second of so many workers on a machine that they share with broker, database and sink: each worker
    /// has one core at most, and all together have all.
    fn rate_on_one_machine(self, workers: f64, cores: f64) -> f64 {
        let all = cores * 1e6 / (self.own + self.broker + self.database + self.sink);
        all.min(workers * cores * 1e6 / self.own)
    }
}

fn needs(options: &Options, costs: Costs, mails_a_day: f64) -> Needs {
    let rate = mails_a_day / 86_400.0 * options.peak;
    let cores = |cost| Costs::cores(cost, rate, options.utilisation);
    Needs {
        rate,
        worker_cores: cores(costs.own),
        connections: rate * options.round_trips * options.rtt / 1000.0 / options.utilisation,
        broker_cores: cores(costs.broker),
        database_cores: cores(costs.database),
        disk: mails_a_day * options.retention * options.row / f64::from(1 << 30),
    }
}

/// Prints the plan, and the comparison if there is a file.
pub(crate) fn run(options: &Options) -> Result<(), Failed> {
    let results: Option<Value> = match &options.from {
        Some(path) => Some(serde_json::from_slice(&std::fs::read(path)?)?),
        None => None,
    };
    let costs = results.as_ref().and_then(measured).unwrap_or(Costs {
        own: options.own,
        broker: options.broker,
        database: options.database,
        sink: options.sink,
    });
    println!(
        "per mail: worker {:.0} µs, broker {:.0} µs, database {:.0} µs; {} round trips of {} ms; peak {}× the average; \
         cores planned at {:.0} %\n",
        costs.own,
        costs.broker,
        costs.database,
        options.round_trips,
        options.rtt,
        options.peak,
        options.utilisation * 100.0
    );
    println!("{}", plan(options, costs));
    if let Some(results) = &results {
        println!("\n{}", comparison(results, costs));
    }
    Ok(())
}

fn plan(options: &Options, costs: Costs) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "mails a day",
        "busiest hour, mails/s",
        "worker cores",
        "SMTP connections",
        "broker cores (clusters)",
        "database cores (databases)",
        "ledger GiB",
    ]);
    for millions in [1.0, 100.0, 1000.0] {
        let needs = needs(options, costs, millions * 1e6);
        let servers = |cores: f64| format!("{cores:.1} ({:.0})", (cores / options.server_cores).ceil());
        table.add_row([
            format!("{millions} million"),
            format!("{:.0}", needs.rate),
            format!("{:.1}", needs.worker_cores),
            format!("{:.0}", needs.connections.ceil()),
            servers(needs.broker_cores),
            servers(needs.database_cores),
            format!("{:.0}", needs.disk),
        ]);
    }
    table
}

fn rows(results: &Value, letter: &str) -> Vec<Value> {
    let loads = results["loads"].as_array().into_iter().flatten();
    let of = loads.filter(|load| load["letter"] == letter);
    of.flat_map(|load| load["rows"].as_array().cloned().unwrap_or_default())
        .collect()
}

fn measured(results: &Value) -> Option<Costs> {
    let row = rows(results, "a")
        .into_iter()
        .find(|row| row["contestant"] == "postroom")?;
    Some(Costs {
        own: row["own_us"].as_f64()?,
        broker: row["broker_us"].as_f64()?,
        database: row["database_us"].as_f64()?,
        sink: row["sink_us"].as_f64()?,
    })
}

fn comparison(results: &Value, costs: Costs) -> Table {
    let cores = results["cores"].as_f64().unwrap_or(1.0);
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["run", "the model's bound, mails/s", "measured", "of the bound"]);
    for row in rows(results, "k") {
        let name = row["name"].as_str().unwrap_or_default();
        let workers = name
            .rsplit_once('×')
            .and_then(|(_, n)| n.parse().ok())
            .unwrap_or(1.0);
        let (bound, rate) = (
            costs.rate_on_one_machine(workers, cores),
            row["rate"].as_f64().unwrap_or(0.0),
        );
        table.add_row([
            name.to_owned(),
            format!("{bound:.0}"),
            format!("{rate:.0}"),
            format!("{:.0} %", rate / bound * 100.0),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const COSTS: Costs = Costs {
        own: 100.0,
        broker: 50.0,
        database: 30.0,
        sink: 20.0,
    };

    #[test]
    fn a_machine_is_shared_by_all_who_work_for_a_mail() {
        assert!((COSTS.rate_on_one_machine(1.0, 2.0) - 10_000.0).abs() < 1e-6);
    }

    #[test]
    fn needs_grow_with_the_mails() {
        let options = Options {
            from: None,
            own: 0.0,
            broker: 0.0,
            database: 0.0,
            sink: 0.0,
            rtt: 50.0,
            round_trips: 2.0,
            peak: 1.0,
            utilisation: 1.0,
            row: 1024.0,
            retention: 1.0,
            server_cores: 16.0,
        };
        // A thousand a second: 100 µs each are a tenth of a core, 100 ms each a hundred connections.
        let needs = needs(&options, COSTS, 86_400_000.0);
        assert!((needs.worker_cores - 0.1).abs() < 1e-9, "{needs:?}");
        assert!((needs.connections - 100.0).abs() < 1e-9, "{needs:?}");
        assert!((needs.disk - 82.4).abs() < 0.1, "{needs:?}");
    }
}
