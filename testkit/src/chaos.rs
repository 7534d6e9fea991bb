//! The fault campaign: jobs flow through real processes while at random, from a seed, everything is broken that can break;
//! at the end every job is accounted for at both ends.
//!
//! [`plan`] draws the jobs and [`fault`] the faults, both from the seed. [`installation`] starts servers, proxies, workers
//! and bridges; [`produce`] publishes, [`inject`] breaks and heals, [`quiet`] waits for the end, [`audit`] compares what was
//! published, what the SMTP servers took and what the webhooks said, and [`table`] prints it.

pub mod audit;
pub mod fault;
pub mod inject;
pub mod installation;
pub mod plan;
pub mod process;
pub mod produce;
pub mod quiet;
pub mod smtp_moods;
pub mod story;
pub mod table;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use audit::Audit;
use installation::Installation;
use plan::Plan;

/// How large a campaign is.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Of every die in it.
    pub seed: u64,
    /// Jobs published.
    pub jobs: usize,
    /// Faults injected.
    pub faults: usize,
    /// Jobs and faults are spread over this time.
    pub span: Duration,
    /// A worker that is silent for so long loses its jobs (`POSTROOM_LEASE`).
    pub lease: Duration,
    /// Worker processes.
    pub workers: usize,
    /// Bridge processes.
    pub bridges: usize,
    /// Window of the rate limit that one account has.
    pub window: Duration,
    /// Whether `RabbitMQ` and Postgres are restarted, too: it takes some time.
    pub restarts: bool,
    /// After the last fault is healed, everything must be over within this time.
    pub patience: Duration,
    /// The `postroom` binary.
    pub program: PathBuf,
    /// Folder for logs and data, which exists.
    pub folder: PathBuf,
}

impl Settings {
    /// The whole campaign.
    #[must_use]
    pub fn full(seed: u64, program: PathBuf, folder: PathBuf) -> Self {
        Self {
            seed,
            jobs: 20_000,
            faults: 60,
            span: Duration::from_mins(4),
            lease: Duration::from_secs(5),
            workers: 3,
            bridges: 2,
            window: Duration::from_secs(30),
            restarts: true,
            patience: Duration::from_mins(4),
            program,
            folder,
        }
    }

    /// One that fits into a test.
    #[must_use]
    pub fn short(seed: u64, program: PathBuf, folder: PathBuf) -> Self {
        Self {
            jobs: 400,
            faults: 10,
            span: Duration::from_secs(16),
            lease: Duration::from_secs(3),
            window: Duration::from_secs(10),
            restarts: false,
            patience: Duration::from_mins(2),
            ..Self::full(seed, program, folder)
        }
    }
}

/// Runs a campaign. `tell` is told how it goes, one line at a time.
///
/// # Errors
/// If it could not be carried out; what it found wrong is in the [`Audit`].
pub async fn run(settings: &Settings, tell: &(dyn Fn(&str) + Sync)) -> Result<Audit, String> {
    let plan = Plan::draw(settings);
    let faults = fault::draw(settings);
    tell(&format!(
        "seed {}: {} jobs, {} faults over {} s; servers and processes start",
        settings.seed,
        plan.jobs.len(),
        faults.len(),
        settings.span.as_secs()
    ));
    let town = Installation::start(settings).await?;
    let begun = Instant::now();
    let (produced, happened, _) = tokio::join!(
        produce::run(&town, &plan, begun),
        inject::run(&town, faults, begun, tell),
        produce::cancel(&town, &plan, begun),
    );
    let (produced, happened) = (produced?, happened?);
    tell("all published, all healed: waiting until everything is over");
    let healed = Instant::now();
    let unfinished = quiet::wait(&town, &plan, settings.patience, tell).await;
    let settled = healed.elapsed();
    let ends = town.end().await;
    let evidence = audit::Evidence::gather(&town, plan, produced, happened).await?;
    let mut audit = Audit::of(settings, &evidence);
    audit.quiet_after = settled;
    audit.violations.extend(unfinished);
    audit.violations.extend(ends);
    Ok(audit)
}
