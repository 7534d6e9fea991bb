//! The rounds: each entry of a load once per round, one after the other, so that a busy moment of the machine hits all.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::Failed;
use crate::contestant::Running;
use crate::figures::{Idle, Measured, Results, Row};
use crate::installation::Installation;
use crate::load::{self, Entry, Load, Way};
use crate::processes::Tree;
use crate::sink::now_us;
use crate::table;

/// Between two looks at the sink.
const LOOK: Duration = Duration::from_millis(10);
/// Without any progress for so long, a run has failed.
const STUCK: Duration = Duration::from_mins(1);
/// Between two single jobs.
const PAUSE: Duration = Duration::from_millis(40);

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// All loads, however long it takes
    #[arg(long)]
    full: bool,
    /// Only loads with these letters, such as abd
    #[arg(long, value_name = "LETTERS")]
    only: Option<String>,
    /// Only entries with this in their name, such as CHUNKING; may be repeated
    #[arg(long, value_name = "PART")]
    named: Vec<String>,
    /// Runs of each entry, of which the median counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Divides the number of jobs, for trials
    #[arg(long, default_value_t = 1)]
    divide: usize,
    /// The product's binary
    #[arg(long, default_value = "target/release/postroom")]
    postroom: PathBuf,
    /// Where logs and results go
    #[arg(long, default_value = "target/bench")]
    folder: PathBuf,
}

/// Runs what was asked for.
pub(crate) async fn run(options: Options) -> Result<(), Failed> {
    let on = Box::pin(Installation::create(options.postroom, options.folder.clone())).await;
    let mut on = on?;
    let loads: Vec<Load> = load::all(options.full || options.only.is_some())
        .into_iter()
        .filter(|load| {
            options
                .only
                .as_ref()
                .is_none_or(|letters| letters.contains(load.letter))
        })
        .collect();
    let mut results = Results::begin(options.rounds);
    for load in loads {
        let entries: Vec<Entry> = load
            .entries
            .iter()
            .filter(|entry| on.peers.have(entry.contestant))
            .filter(|entry| {
                let name = Row::new(entry).name();
                options.named.is_empty() || options.named.iter().any(|part| name.contains(part))
            })
            .cloned()
            .collect();
        let mut rows: Vec<Row> = entries.iter().map(Row::new).collect();
        for round in 0..options.rounds {
            for (entry, row) in entries.iter().zip(&mut rows) {
                let mut entry = entry.clone();
                entry.jobs.count /= options.divide;
                let name = format!("{}{round}{:06x}", load.letter, now_us() & 0x00ff_ffff);
                match Box::pin(measure(&mut on, &entry, &name)).await {
                    Ok(measured) => {
                        eprintln!("{} {}: {}", load.letter, row.name(), measured.line());
                        row.runs.push(measured);
                    }
                    Err(error) => {
                        eprintln!("{} {}: {error}", load.letter, row.name());
                        row.trouble = Some(error.to_string());
                    }
                }
            }
        }
        println!("{}", table::draw(load.letter, load.title, &rows));
        results.add(load.letter, load.title, &rows);
        std::fs::write(options.folder.join("results.json"), results.json()?)?;
    }
    println!("{}", options.folder.join("results.json").display());
    on.scratch.remove().await?;
    Ok(())
}

async fn measure(on: &mut Installation, entry: &Entry, name: &str) -> Result<Measured, Failed> {
    on.producer.purge().await?;
    on.sink.begin(entry.mode).await?;
    on.slow_commits(entry.slow_commits).await?;
    on.trouble(entry.trouble).await?;
    let tls = entry.jobs.tenants == "tls";
    let start = |on: &Installation| entry.contestant.start(on, entry.connections, tls);
    match entry.way {
        Way::Backlog | Way::Parked => on.producer.publish(name, &entry.jobs).await?,
        Way::Webhooks => on.producer.publish_reports(name, &entry.jobs).await?,
        Way::OneByOne => {}
    }
    let mut running = start(on)?;
    let measured = match entry.way {
        Way::Backlog => drain(on, entry, &mut running).await,
        Way::Parked => Box::pin(parked(on, entry, &mut running)).await,
        Way::OneByOne => one_by_one(on, entry, name, &mut running).await,
        Way::Webhooks => Box::pin(between_first_and_last(on, entry, &mut running, 0)).await,
    };
    running.stop().await;
    measured
}

/// CPU seconds so far of whoever takes part.
struct Used {
    own: f64,
    broker: f64,
    database: f64,
    sink: f64,
}

impl Used {
    fn now(on: &Installation, running: &Running) -> Self {
        let of = |tree: Option<Tree>| tree.map_or(0.0, Tree::cpu);
        Self {
            own: running.trees().into_iter().map(Tree::cpu).sum(),
            broker: of(on.broker_tree),
            database: of(on.database_tree),
            sink: Tree(on.sink.pid()).cpu(),
        }
    }
}

/// From the first mail to the last report.
async fn drain(on: &mut Installation, entry: &Entry, running: &mut Running) -> Result<Measured, Failed> {
    between_first_and_last(on, entry, running, entry.jobs.count as u64).await
}

/// From the first mail or webhook to the last, and until there are so many reports.
async fn between_first_and_last(
    on: &mut Installation,
    entry: &Entry,
    running: &mut Running,
    reports: u64,
) -> Result<Measured, Failed> {
    let count = entry.jobs.count as u64;
    let begun = progress(on, running, 1).await?;
    let before = Used::now(on, running);
    let taken = Box::pin(progress(on, running, count)).await?;
    let patience = Instant::now();
    while on.producer.reports().await? < reports {
        if patience.elapsed() > STUCK {
            return Err("reports are missing".into());
        }
        sleep(LOOK).await;
    }
    let used = Used::now(on, running);
    let mails = (count - begun.mails).max(1) as f64;
    let per_mail = |from: f64, to: f64| (to - from) * 1e6 / mails;
    // Behind a delay connections keep step: the first mails of all of them come at once.
    let together = if entry.mode.delay_ms > 0 {
        entry.connections as f64
    } else {
        1.0
    };
    Ok(Measured {
        rate: (count as f64 - together) * 1e6 / (taken.last_us - taken.first_us).max(1) as f64,
        own_us: per_mail(before.own, used.own),
        broker_us: per_mail(before.broker, used.broker),
        database_us: per_mail(before.database, used.database),
        sink_us: per_mail(before.sink, used.sink),
        peak_mib: running.trees().into_iter().map(Tree::peak_mib).sum(),
        connections: taken.connections,
        ..Measured::default()
    })
}

/// Waits until the sink has so many mails.
async fn progress(
    on: &mut Installation,
    running: &mut Running,
    wanted: u64,
) -> Result<crate::sink::Taken, Failed> {
    let (mut last, mut moved) = (0, Instant::now());
    loop {
        let taken = on.sink.taken().await?;
        if taken.mails >= wanted {
            return Ok(taken);
        }
        if taken.mails + taken.deferred > last {
            (last, moved) = (taken.mails + taken.deferred, Instant::now());
        }
        running.alive()?;
        if moved.elapsed() > STUCK {
            return Err(format!("stuck at {} of {wanted} mails", taken.mails).into());
        }
        sleep(LOOK).await;
    }
}

async fn parked(on: &mut Installation, entry: &Entry, running: &mut Running) -> Result<Measured, Failed> {
    let count = entry.jobs.count as u64;
    // The worker has only been started: nothing is parked yet.
    let before = on.reports_owed().await?;
    let (mut first, mut last, mut moved) = (None, 0, Instant::now());
    let rate = loop {
        let parked = on.reports_owed().await? - before;
        if parked > last {
            (last, moved) = (parked, Instant::now());
            let (begun, earlier) = *first.get_or_insert((moved, parked));
            if parked >= count {
                break (parked - earlier) as f64 / begun.elapsed().as_secs_f64();
            }
        }
        if moved.elapsed() > STUCK {
            return Err(format!("stuck at {parked} of {count} parked").into());
        }
        running.alive()?;
        sleep(LOOK).await;
    };
    while on.waiting().await? < count {
        if moved.elapsed() > STUCK {
            return Err("not everything is parked".into());
        }
        sleep(LOOK).await;
    }
    on.make_due().await?;
    let mut measured = drain(on, entry, running).await?;
    measured.parking = Some(rate);
    Ok(measured)
}

async fn one_by_one(
    on: &mut Installation,
    entry: &Entry,
    run: &str,
    running: &mut Running,
) -> Result<Measured, Failed> {
    let mut waits = Vec::new();
    let before = Used::now(on, running);
    for n in 0..entry.jobs.count {
        let begun = now_us();
        on.producer.single(run, &entry.jobs, n).await?;
        let taken = progress(on, running, n as u64 + 1).await?;
        // The first ones open connections.
        if n >= 10 {
            waits.push(taken.last_us.saturating_sub(begun) as f64 / 1000.0);
        }
        sleep(PAUSE).await;
    }
    let used = Used::now(on, running);
    Ok(Measured {
        own_us: (used.own - before.own) * 1e6 / entry.jobs.count as f64,
        peak_mib: running.trees().into_iter().map(Tree::peak_mib).sum(),
        idle: Idle::of(waits),
        ..Measured::default()
    })
}
