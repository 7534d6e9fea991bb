//! What is compared: the product, and programs that do the same without a ledger, limits, outbox and reports that cannot
//! get lost.

mod lettre_peer;
mod peers;
mod plain;

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::Failed;
use crate::installation::Installation;
use crate::processes::Tree;

pub(crate) use lettre_peer::{Options, plain, pool};
pub(crate) use peers::Peers;

/// Between SIGTERM and SIGKILL.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contestant {
    /// So many worker processes.
    Postroom(usize),
    /// A bridge that may have so many POSTs in flight per endpoint.
    Bridge(usize),
    /// lapin, lettre's bare connection on a socket without Nagle's delay, a confirmed report, ack. One thread.
    Plain,
    /// lapin, lettre's pool as released.
    Pool,
    /// nodemailer's pool and amqplib.
    Nodemailer,
    /// smtplib and pika, four processes.
    Smtplib,
}

impl Contestant {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Postroom(1) => "postroom".to_owned(),
            Self::Postroom(workers) => format!("postroom ×{workers}"),
            Self::Bridge(_) => "bridge".to_owned(),
            Self::Plain => "plain composition".to_owned(),
            Self::Pool => "lettre's pool as released".to_owned(),
            Self::Nodemailer => "nodemailer + amqplib".to_owned(),
            Self::Smtplib => "pika + smtplib ×4".to_owned(),
        }
    }

    /// Starts its processes against this installation, with at most so many SMTP connections each.
    pub(crate) fn start(self, on: &Installation, connections: usize, tls: bool) -> Result<Running, Failed> {
        let processes = match self {
            Self::Postroom(workers) => workers,
            Self::Smtplib => peers::PYTHON_PROCESSES,
            _ => 1,
        };
        let children: Result<Vec<Child>, Failed> = (0..processes)
            .map(|_| {
                let mut command = self.command(on, connections, tls)?;
                let log = on.log(&self.name())?;
                command
                    .stdin(Stdio::null())
                    .stdout(log.try_clone()?)
                    .stderr(log)
                    .kill_on_drop(true);
                Ok(command.spawn()?)
            })
            .collect();
        Ok(Running { children: children? })
    }

    fn command(self, on: &Installation, connections: usize, tls: bool) -> Result<Command, Failed> {
        let port = if tls { on.sink.tls_port } else { on.sink.port };
        Ok(match self {
            Self::Postroom(_) => {
                let mut command = on.postroom(&["worker"]);
                command.env("POSTROOM_POOL_SIZE", connections.to_string());
                command
            }
            Self::Bridge(per_endpoint) => {
                let mut command = on.postroom(&["bridge"]);
                command.env("POSTROOM_WEBHOOK_PER_ENDPOINT", per_endpoint.to_string());
                command
            }
            Self::Plain | Self::Pool => {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg(if self == Self::Plain { "plain" } else { "pool" });
                command.args(["--amqp", &on.scratch.amqp_url(), "--port", &port.to_string()]);
                command.args(["--connections", &connections.to_string()]);
                if tls {
                    command.arg("--ca").arg(on.ca_file());
                }
                command
            }
            Self::Nodemailer | Self::Smtplib => {
                let mut command = on.peers.command(self)?;
                command
                    .env("BENCH_AMQP", on.scratch.amqp_url())
                    .env("BENCH_PORT", port.to_string());
                let each = if self == Self::Smtplib {
                    connections / peers::PYTHON_PROCESSES
                } else {
                    connections
                };
                command.env("BENCH_CONNECTIONS", each.to_string());
                command
            }
        })
    }
}

/// Where its own files are.
pub(crate) fn peers_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers")
}

/// The processes of a contestant; killed when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    children: Vec<Child>,
}

impl Running {
    pub(crate) fn trees(&self) -> Vec<Tree> {
        self.children
            .iter()
            .filter_map(|child| child.id().map(Tree))
            .collect()
    }

    /// An error if one has ended by itself.
    pub(crate) fn alive(&mut self) -> Result<(), Failed> {
        for child in &mut self.children {
            if let Some(status) = child.try_wait()? {
                return Err(format!("a contestant ended with {status}; see its log in target/bench").into());
            }
        }
        Ok(())
    }

    pub(crate) async fn stop(mut self) {
        for child in &self.children {
            if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        for child in &mut self.children {
            if tokio::time::timeout(STOP_LIMIT, child.wait()).await.is_err() {
                let _ = child.kill().await;
            }
        }
    }
}
