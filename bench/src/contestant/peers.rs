//! The contestants in other languages: installed below target/bench with the versions their files pin, left out with a
//! note where that does not work.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use super::{Contestant, peers_folder};
use crate::Failed;

/// As many as the interpreter's lock makes worthwhile.
pub(super) const PYTHON_PROCESSES: usize = 4;

/// What could be installed.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    node_modules: Option<PathBuf>,
    python: Option<PathBuf>,
}

impl Peers {
    /// Installs what is missing.
    pub(crate) async fn install(folder: &Path) -> Self {
        Self {
            node_modules: noted("nodemailer + amqplib", node(folder).await),
            python: noted("pika + smtplib", python(folder).await),
        }
    }

    pub(crate) fn have(&self, contestant: Contestant) -> bool {
        match contestant {
            Contestant::Nodemailer => self.node_modules.is_some(),
            Contestant::Smtplib => self.python.is_some(),
            _ => true,
        }
    }

    pub(super) fn command(&self, contestant: Contestant) -> Result<Command, Failed> {
        if contestant == Contestant::Nodemailer {
            let folder = self.node_modules.as_ref().ok_or("nodemailer is not installed")?;
            let mut command = Command::new("node");
            command.arg(folder.join("nodemailer.mjs"));
            return Ok(command);
        }
        let mut command = Command::new(self.python.as_ref().ok_or("pika is not installed")?);
        command.arg(peers_folder().join("smtplib_pika.py"));
        Ok(command)
    }
}

fn noted<T>(what: &str, installed: Result<T, Failed>) -> Option<T> {
    installed
        .inspect_err(|error| eprintln!("{what} is left out: {error}"))
        .ok()
}

/// The folder with the script beside its `node_modules`.
async fn node(folder: &Path) -> Result<PathBuf, Failed> {
    let folder = folder.join("node");
    std::fs::create_dir_all(&folder)?;
    for file in ["package.json", "package-lock.json", "nodemailer.mjs"] {
        std::fs::copy(peers_folder().join(file), folder.join(file))?;
    }
    if !folder.join("node_modules/nodemailer").exists() {
        let arguments = ["ci", "--ignore-scripts", "--no-audit", "--no-fund"];
        run(Command::new("npm").args(arguments).current_dir(&folder)).await?;
    }
    Ok(folder)
}

async fn python(folder: &Path) -> Result<PathBuf, Failed> {
    let folder = folder.join("python");
    let python = folder.join("bin/python");
    if !folder.join("installed").exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&folder)).await?;
        let requirements = peers_folder().join("requirements.txt");
        let arguments = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--require-hashes",
            "--requirement",
        ];
        run(Command::new(&python).args(arguments).arg(requirements)).await?;
        std::fs::write(folder.join("installed"), "")?;
    }
    Ok(python)
}

async fn run(command: &mut Command) -> Result<(), Failed> {
    let done = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(std::time::Duration::from_mins(2), done).await??;
    if output.status.success() {
        return Ok(());
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(error.lines().next_back().unwrap_or("it failed").to_owned().into())
}
