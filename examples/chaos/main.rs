//! The fault campaign: jobs flow through release binaries while workers, bridges, servers and networks are broken at
//! random, and in the end every job is accounted for at both ends. `make chaos` builds and runs it.
//!
//! `SEED`, `JOBS`, `FAULTS` and `SPAN` (seconds) change the campaign. It ends with 0 only if nothing is lost, nothing was
//! sent twice without a reason and nothing is left behind. Logs and `result.json` are in `target/chaos/`.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use postroom_testkit::chaos::{self, Settings, table};
use tokio::signal::unix::{SignalKind, signal};

/// A line of standard output. A closed pipe is no reason to stop.
fn line(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[tokio::main]
async fn main() -> ExitCode {
    let campaign = Box::pin(campaign());
    tokio::select! {
        result = campaign => match result {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                line(&format!("The campaign could not be completed: {error}"));
                ExitCode::FAILURE
            }
        },
        // What is dropped kills its processes and stops its servers.
        () = told_to_end() => ExitCode::from(130),
    }
}

async fn campaign() -> Result<bool, String> {
    let settings = settings()?;
    let audit = chaos::run(&settings, &line).await?;
    line(&table::print(&audit));
    let file = settings.folder.join("result.json");
    let json = serde_json::to_string_pretty(&table::json(&audit)).map_err(|error| error.to_string())?;
    std::fs::write(&file, json + "\n").map_err(|error| format!("{}: {error}", file.display()))?;
    line(&format!("result: {}", file.display()));
    Ok(audit.is_good())
}

fn settings() -> Result<Settings, String> {
    let seed = number("SEED")?.unwrap_or_else(|| rand::random::<u32>().into());
    let program = program()?;
    let folder = folder(&program, seed)?;
    let mut settings = Settings::full(seed, program, folder);
    if let Some(jobs) = number("JOBS")? {
        settings.jobs = jobs as usize;
    }
    if let Some(faults) = number("FAULTS")? {
        settings.faults = faults as usize;
    }
    if let Some(seconds) = number("SPAN")? {
        settings.span = Duration::from_secs(seconds);
    }
    Ok(settings)
}

fn number(name: &str) -> Result<Option<u64>, String> {
    match std::env::var(name).ok().filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => text
            .parse()
            .map(Some)
            .map_err(|_| format!("{name} is a number, not `{text}`")),
    }
}

/// The binary next to this example's: `target/release/postroom` for `target/release/examples/chaos`.
fn program() -> Result<PathBuf, String> {
    let here = std::env::current_exe().map_err(|error| format!("where am I? {error}"))?;
    here.parent()
        .and_then(Path::parent)
        .map(|dir| dir.join("postroom"))
        .filter(|program| program.is_file())
        .ok_or_else(|| "the postroom binary is not built: run `make chaos`".to_owned())
}

/// `target/chaos/<seed>`, empty.
fn folder(program: &Path, seed: u64) -> Result<PathBuf, String> {
    let target = program.parent().and_then(Path::parent).unwrap_or(Path::new("."));
    let folder = target.join("chaos").join(seed.to_string());
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(failed)?;
    }
    std::fs::create_dir_all(&folder).map_err(failed)?;
    Ok(folder)
}

/// Ctrl-C or SIGTERM.
async fn told_to_end() {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
