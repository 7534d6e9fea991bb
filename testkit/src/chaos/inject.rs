//! Breaks and heals, and notes what happened when.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::Method;
use rustix::process::Signal;
use tokio::time::sleep;

use super::fault::{Fault, Kind, Pair, Trouble};
use super::installation::{Installation, Place};
use super::process::term;
use super::smtp_moods::Mood;
use crate::private::{POSTGRES, RABBITMQ};
use crate::proxy::{Proxy, Weather};
use crate::webhook::Reply;

/// How late a delayed byte is.
const DELAY: Duration = Duration::from_millis(300);
/// Between two resets of a network that resets everything.
const RESETS: Duration = Duration::from_millis(200);

/// A fault that happened.
#[derive(Debug, Clone)]
pub struct Happened {
    /// What.
    pub kind: Kind,
    /// To which worker, bridge or server, from 0.
    pub target: usize,
    /// The process it hit, by its name in EHLO, if it hit one.
    pub process: Option<String>,
    /// From when.
    pub start: Instant,
    /// Until when.
    pub end: Instant,
    /// What should not have happened, such as a worker that did not end in order.
    pub problem: Option<String>,
}

/// Injects all faults at their times, each for as long as it lasts, some at the same time; all are healed at the end.
///
/// # Errors
/// If a server cannot be started again.
pub async fn run(
    town: &Installation,
    faults: Vec<Fault>,
    begun: Instant,
    tell: &(dyn Fn(&str) + Sync),
) -> Result<Vec<Happened>, String> {
    let each = faults.into_iter().map(|fault| async move {
        sleep(fault.at.saturating_sub(begun.elapsed())).await;
        let happened = Box::pin(inject(town, fault)).await?;
        tell(&format!(
            "{:6.1} s  {} {} for {:.1} s",
            happened.start.duration_since(begun).as_secs_f64(),
            happened.kind.name(),
            happened
                .process
                .clone()
                .unwrap_or_else(|| format!("#{}", happened.target + 1)),
            happened.end.duration_since(happened.start).as_secs_f64(),
        ));
        Ok(happened)
    });
    let mut all: Vec<Happened> = join_all(each).await.into_iter().collect::<Result<_, String>>()?;
    all.sort_by_key(|happened| happened.start);
    Ok(all)
}

async fn inject(town: &Installation, fault: Fault) -> Result<Happened, String> {
    match fault.kind {
        Kind::WorkerKilled => killed(&town.workers[fault.target], fault).await,
        Kind::BridgeKilled => killed(&town.bridges[fault.target], fault).await,
        Kind::WorkerStopped => Ok(stopped(&town.workers[fault.target], fault).await),
        Kind::BridgeStopped => Ok(stopped(&town.bridges[fault.target], fault).await),
        Kind::WorkerRolled => rolled(&town.workers[fault.target], &town.http, fault).await,
        Kind::BridgeRolled => rolled(&town.bridges[fault.target], &town.http, fault).await,
        Kind::RabbitStopped | Kind::RabbitKilled | Kind::PostgresKilled => restarted(town, fault).await,
        Kind::RabbitDropped => Ok(closed(town, fault).await),
        Kind::PostgresDropped => Ok(terminated(town, fault).await),
        Kind::Net(pair, trouble) => Ok(network(town, fault, pair, trouble).await),
        Kind::Smtp(mood) => Ok(moody(town, fault, mood).await),
        Kind::StoreFails => {
            let note = Note::new(fault, None);
            town.store.0.fail(true);
            sleep(fault.lasts).await;
            town.store.0.fail(false);
            Ok(note.over())
        }
        Kind::WebhookFails | Kind::WebhookHangs => {
            let note = Note::new(fault, None);
            town.hooks.0.always(match fault.kind {
                Kind::WebhookFails => Reply::Status(500),
                _ => Reply::Hang,
            });
            sleep(fault.lasts).await;
            town.hooks.0.always(Reply::Status(204));
            Ok(note.over())
        }
    }
}

/// What is happening.
struct Note(Happened);

impl Note {
    fn new(fault: Fault, process: Option<String>) -> Self {
        let now = Instant::now();
        Self(Happened {
            kind: fault.kind,
            target: fault.target,
            process,
            start: now,
            end: now,
            problem: None,
        })
    }

    fn over(self) -> Happened {
        Happened {
            end: Instant::now(),
            ..self.0
        }
    }
}

async fn killed(place: &Place, fault: Fault) -> Result<Happened, String> {
    let mut slot = place.slot.lock().await;
    let note = Note::new(fault, Some(slot.name()));
    slot.kill().await;
    sleep(fault.lasts).await;
    slot.start_next()?;
    Ok(note.over())
}

async fn stopped(place: &Place, fault: Fault) -> Happened {
    let slot = place.slot.lock().await;
    let note = Note::new(fault, Some(slot.name()));
    slot.signal(Signal::STOP);
    sleep(fault.lasts).await;
    slot.signal(Signal::CONT);
    note.over()
}

/// The new one first, then the old one ends: as an orchestrator does it.
async fn rolled(place: &Place, http: &reqwest::Client, fault: Fault) -> Result<Happened, String> {
    let mut slot = place.slot.lock().await;
    // Another fault may have started it a moment ago.
    slot.begun(http).await?;
    let name = slot.name();
    let mut note = Note::new(fault, Some(name.clone()));
    let mut old = slot.start_next()?;
    drop(slot);
    note.0.problem = term(&mut old, &name).await.err();
    Ok(note.over())
}

async fn restarted(town: &Installation, fault: Fault) -> Result<Happened, String> {
    let _alone = town.restarting.lock().await;
    let note = Note::new(fault, None);
    let server = match fault.kind {
        Kind::RabbitStopped => {
            town.private.halt(RABBITMQ).await?;
            RABBITMQ
        }
        Kind::RabbitKilled => {
            town.private.kill(RABBITMQ).await?;
            RABBITMQ
        }
        _ => {
            town.private.kill(POSTGRES).await?;
            POSTGRES
        }
    };
    sleep(fault.lasts).await;
    town.private.start_again(server).await?;
    Ok(note.over())
}

/// Closes every connection of the vhost that the broker lists. It may be away: then there is nothing to close.
async fn closed(town: &Installation, fault: Fault) -> Happened {
    let note = Note::new(fault, None);
    let servers = town.scratch.servers();
    if let Ok(listed) = servers.management(Method::GET, "connections", None).await {
        let listed: Vec<serde_json::Value> = serde_json::from_str(&listed).unwrap_or_default();
        let names: Vec<String> = listed
            .iter()
            .filter_map(|connection| connection["name"].as_str().map(str::to_owned))
            .collect();
        let _ = town.scratch.close_connections(&names).await;
    }
    note.over()
}

async fn terminated(town: &Installation, fault: Fault) -> Happened {
    let note = Note::new(fault, None);
    if let Ok(sql) = town.sql().await {
        let all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                   WHERE datname = current_database() AND pid <> pg_backend_pid()";
        let _ = sql.batch_execute(all).await;
    }
    note.over()
}

async fn moody(town: &Installation, fault: Fault, mood: Mood) -> Happened {
    let server = &town.mail[fault.target];
    let _alone = server.mood.lock().await;
    let note = Note::new(fault, None);
    let seed = fault.at.as_nanos() as u64;
    server
        .server
        .set_script(server.recipients.script(Some(mood), seed));
    sleep(fault.lasts).await;
    server.server.set_script(server.recipients.script(None, seed));
    note.over()
}

async fn network(town: &Installation, fault: Fault, pair: Pair, trouble: Trouble) -> Happened {
    let (worker, bridge) = (town.workers.get(fault.target), town.bridges.get(fault.target));
    let place = match pair {
        Pair::WorkerRabbit | Pair::WorkerPostgres => worker,
        Pair::BridgeRabbit | Pair::BridgePostgres => bridge,
        _ => None,
    };
    let proxy = match (pair, place) {
        (Pair::WorkerRabbit | Pair::BridgeRabbit, Some(place)) => &place.rabbit,
        (Pair::WorkerPostgres | Pair::BridgePostgres, Some(place)) => &place.postgres,
        (Pair::WorkersStore, _) => &town.store.1,
        (Pair::BridgesWebhook, _) => &town.hooks.1,
        _ => &town.mail[fault.target].proxy,
    };
    let note = Note::new(fault, None);
    spoil(proxy, trouble, fault.lasts).await;
    note.over()
}

async fn spoil(proxy: &Proxy, trouble: Trouble, lasts: Duration) {
    let until = Instant::now() + lasts;
    match trouble {
        Trouble::Stall => proxy.set(Weather::Stall),
        Trouble::Delay => proxy.set(Weather::Delay(DELAY)),
        Trouble::Cut => proxy.set(Weather::Cut),
        Trouble::Reset => {
            while Instant::now() < until {
                proxy.reset();
                sleep(RESETS).await;
            }
        }
    }
    sleep(until.saturating_duration_since(Instant::now())).await;
    proxy.heal();
}
