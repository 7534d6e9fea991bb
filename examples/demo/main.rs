//! A thousand mails through release binaries, each of them accounted for. `make demo` builds and runs it.
//!
//! In a vhost and a database of its own it sets up tenants and accounts with the command line, starts two workers and a
//! bridge, publishes what [`plan`] holds, and compares what was published with what the SMTP server took and what the
//! webhooks said. It ends with 0 only if everything adds up. With `KEEP=1` it leaves everything running until Ctrl-C.

mod account;
mod hook;
mod plan;
mod process;
mod run;
mod screen;
mod setup;
mod summary;
mod waiting;

use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use End::{Failed, Interrupted};
use account::Audit;
use plan::{Plan, TOTAL};
use screen::{Screen, line};
use setup::World;

/// For everything, from the first command to the table. A usual run takes a fifth of it.
const LIMIT: Duration = Duration::from_secs(90);

#[tokio::main]
async fn main() -> ExitCode {
    let screen = Screen::new();
    match Box::pin(demo(&screen)).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Failed(error)) => {
            screen.verdict(false, &format!("The demo could not be completed: {error}"));
            ExitCode::FAILURE
        }
        Err(Interrupted(name)) => {
            line(format_args!(
                "\n{name}: stopped, and everything that was set up is removed"
            ));
            ExitCode::from(130)
        }
    }
}

/// Why there is no result.
enum End {
    Failed(String),
    Interrupted(&'static str),
}

impl From<String> for End {
    fn from(error: String) -> Self {
        Failed(error)
    }
}

/// Whether everything added up.
async fn demo(screen: &Screen) -> Result<bool, End> {
    let keep = std::env::var_os("KEEP").is_some_and(|value| !value.is_empty());
    line(format_args!(
        "{TOTAL} mail jobs through RabbitMQ, two postroom workers and a bridge"
    ));
    let rehearsed = tokio::select! {
        rehearsed = timeout(LIMIT, Box::pin(rehearse(screen, keep))) => rehearsed,
        // What is dropped here kills its processes and drops its vhost and its database.
        name = told_to_end() => return Err(Interrupted(name)),
    };
    let exceeded = |_| format!("it took longer than {} s", LIMIT.as_secs());
    let (mut world, audit) = rehearsed.map_err(exceeded)??;
    let good = summary::print(screen, &audit);
    if keep {
        summary::invite(screen, &world)?;
        let name = told_to_end().await;
        line(format_args!("\n{name}: stopping"));
        for problem in world.stop().await {
            screen.check(false, &problem);
        }
    }
    summary::tidy(&world, good);
    world.scratch.remove().await?;
    Ok(good)
}

/// Sets up, publishes, waits, stops (unless everything is kept), adds up.
async fn rehearse(screen: &Screen, keep: bool) -> Result<(World, Audit), String> {
    let mut world = World::bring_up(screen).await?;
    let plan = Plan::new(&world.surroundings()?);
    screen.heading("Publishing, sending, reporting");
    let times = Box::pin(run::run(screen, &world, &plan)).await?;
    let mut audit = Audit::of(&world, &plan, &times).await?;
    if !keep {
        let problems = world.stop().await;
        audit.check(("workers and bridge ended well on SIGTERM".to_owned(), problems));
    }
    Ok((world, audit))
}

/// Ctrl-C, SIGTERM, or the end of the terminal.
async fn told_to_end() -> &'static str {
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
        signal(SignalKind::hangup()),
    ) else {
        // Without handlers a signal ends the process by itself.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => "Ctrl-C",
        _ = terminate.recv() => "SIGTERM",
        _ = hangup.recv() => "SIGHUP",
    }
}
