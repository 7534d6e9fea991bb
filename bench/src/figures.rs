//! What came out of the runs: medians, ratios within rounds, JSON.

use jiff::Timestamp;
use serde::Serialize;

use crate::Failed;
use crate::load::Entry;

/// One run. CPU in µs per mail.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Measured {
    /// Mails per second.
    pub(crate) rate: f64,
    pub(crate) own_us: f64,
    pub(crate) broker_us: f64,
    pub(crate) database_us: f64,
    pub(crate) sink_us: f64,
    /// Peak resident memory of the contestant's processes.
    pub(crate) peak_mib: f64,
    pub(crate) connections: u64,
    /// Jobs parked per second.
    pub(crate) parking: Option<f64>,
    pub(crate) idle: Option<Idle>,
}

/// From publishing to the sink, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Idle {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Idle {
    pub(crate) fn of(mut waits: Vec<f64>) -> Option<Self> {
        waits.sort_by(f64::total_cmp);
        let at = |share: f64| {
            waits
                .get(((waits.len() as f64 - 1.0) * share).round() as usize)
                .copied()
        };
        Some(Self {
            p50: at(0.5)?,
            p99: at(0.99)?,
        })
    }
}

impl Measured {
    pub(crate) fn line(&self) -> String {
        match self.idle {
            Some(idle) => format!("p50 {:.1} ms, p99 {:.1} ms", idle.p50, idle.p99),
            None => format!(
                "{:.0} mails/s, {:.0} µs own, {:.0} broker, {:.0} database, {:.0} sink, {:.0} MiB, {} connections{}",
                self.rate,
                self.own_us,
                self.broker_us,
                self.database_us,
                self.sink_us,
                self.peak_mib,
                self.connections,
                self.parking
                    .map(|rate| format!(", {rate:.0} parked/s"))
                    .unwrap_or_default()
            ),
        }
    }
}

/// All runs of an entry.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) contestant: String,
    pub(crate) what: &'static str,
    pub(crate) jobs: usize,
    pub(crate) trouble: Option<String>,
    pub(crate) runs: Vec<Measured>,
}

impl Row {
    pub(crate) fn new(entry: &Entry) -> Self {
        Self {
            contestant: entry.contestant.name(),
            what: entry.what,
            jobs: entry.jobs.count,
            trouble: None,
            runs: Vec::new(),
        }
    }

    pub(crate) fn name(&self) -> String {
        if self.what.is_empty() {
            self.contestant.clone()
        } else {
            format!("{}, {}", self.contestant, self.what)
        }
    }

    /// Median of a figure.
    pub(crate) fn median(&self, figure: impl Fn(&Measured) -> f64) -> Option<f64> {
        median(self.runs.iter().map(figure).collect())
    }

    /// Median of the ratios to another row's figure of the same round.
    pub(crate) fn ratio(&self, base: &Self, figure: impl Fn(&Measured) -> f64) -> Option<f64> {
        let pairs = self.runs.iter().zip(&base.runs);
        let ratios = pairs
            .map(|(run, base)| figure(run) / figure(base))
            .filter(|ratio| ratio.is_finite());
        median(ratios.collect())
    }
}

pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        Some(f64::midpoint(
            *values.get(middle.checked_sub(1)?)?,
            *values.get(middle)?,
        ))
    } else {
        values.get(middle).copied()
    }
}

/// Of all loads, for the file.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    begun: Timestamp,
    machine: String,
    cores: usize,
    version: &'static str,
    rounds: usize,
    loads: Vec<Outcome>,
}

#[derive(Debug, Serialize)]
struct Outcome {
    letter: char,
    title: &'static str,
    rows: Vec<Summary>,
}

#[derive(Debug, Serialize)]
struct Summary {
    name: String,
    /// To the first row.
    rate_ratio: Option<f64>,
    own_cpu_ratio: Option<f64>,
    rate: Option<f64>,
    own_us: Option<f64>,
    broker_us: Option<f64>,
    database_us: Option<f64>,
    sink_us: Option<f64>,
    peak_mib: Option<f64>,
    parking: Option<f64>,
    idle_p50_ms: Option<f64>,
    idle_p99_ms: Option<f64>,
    #[serde(flatten)]
    row: Row,
}

impl Results {
    pub(crate) fn begin(rounds: usize) -> Self {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            begun: Timestamp::now(),
            machine: model.map(|(_, model)| model.to_owned()).unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            version: env!("CARGO_PKG_VERSION"),
            rounds,
            loads: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, letter: char, title: &'static str, rows: &[Row]) {
        let summary = |row: &Row| Summary {
            name: row.name(),
            rate_ratio: rows.first().and_then(|base| row.ratio(base, |run| run.rate)),
            own_cpu_ratio: rows.first().and_then(|base| row.ratio(base, |run| run.own_us)),
            rate: row.median(|run| run.rate),
            own_us: row.median(|run| run.own_us),
            broker_us: row.median(|run| run.broker_us),
            database_us: row.median(|run| run.database_us),
            sink_us: row.median(|run| run.sink_us),
            peak_mib: row.median(|run| run.peak_mib),
            parking: median(row.runs.iter().filter_map(|run| run.parking).collect()),
            idle_p50_ms: median(row.runs.iter().filter_map(|run| Some(run.idle?.p50)).collect()),
            idle_p99_ms: median(row.runs.iter().filter_map(|run| Some(run.idle?.p99)).collect()),
            row: row.clone(),
        };
        self.loads.push(Outcome {
            letter,
            title,
            rows: rows.iter().map(summary).collect(),
        });
    }

    pub(crate) fn json(&self) -> Result<Vec<u8>, Failed> {
        Ok(serde_json::to_vec_pretty(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one_or_between_two() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn a_ratio_is_taken_within_each_round() {
        let row = |rates: &[f64]| Row {
            contestant: String::new(),
            what: "",
            jobs: 0,
            trouble: None,
            runs: rates
                .iter()
                .map(|&rate| Measured {
                    rate,
                    ..Measured::default()
                })
                .collect(),
        };
        let ratio = row(&[2.0, 20.0, 6.0]).ratio(&row(&[1.0, 10.0, 2.0]), |run| run.rate);
        assert_eq!(ratio, Some(2.0));
    }
}
