//! A worker or bridge of the campaign: started, stopped, killed, started again.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

/// Until a process is ready, while everything around it is well.
const READY: Duration = Duration::from_secs(30);
/// Between SIGTERM and SIGKILL; more than the grace period.
const END: Duration = Duration::from_secs(40);

/// What it takes to start one.
#[derive(Debug)]
pub struct Recipe {
    /// `worker` or `bridge`.
    pub role: &'static str,
    /// From 1.
    pub number: usize,
    /// The binary.
    pub program: PathBuf,
    /// All its variables of postroom.
    pub variables: Vec<(String, String)>,
    /// Where its log goes.
    pub folder: PathBuf,
}

/// A place for a process, and the process in it.
#[derive(Debug)]
pub struct Slot {
    recipe: Recipe,
    generation: usize,
    child: Child,
    http: SocketAddr,
}

impl Slot {
    /// Starts the first one.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(recipe: Recipe) -> Result<Self, String> {
        let http = free_address()?;
        let child = spawn(&recipe, 1, http)?;
        Ok(Self {
            recipe,
            generation: 1,
            child,
            http,
        })
    }

    /// Such as `worker-2.3`, the third one at this place; workers give it in EHLO.
    #[must_use]
    pub fn name(&self) -> String {
        name(&self.recipe, self.generation)
    }

    /// Starts the next one; the one before must have ended, or must be about to.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_next(&mut self) -> Result<Child, String> {
        self.generation += 1;
        self.http = free_address()?;
        let next = spawn(&self.recipe, self.generation, self.http)?;
        Ok(std::mem::replace(&mut self.child, next))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        signal_to(&self.child, signal);
    }

    /// SIGKILL, and waits for the end.
    pub async fn kill(&mut self) {
        let _ = self.child.kill().await;
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until `/readyz` says yes.
    ///
    /// # Errors
    /// If it ends, or after half a minute.
    pub async fn ready(&mut self, http: &reqwest::Client) -> Result<(), String> {
        self.says_yes(http, "readyz").await
    }

    /// Waits until `/livez` says yes: before that a signal has the effect that it has on any process.
    ///
    /// # Errors
    /// If it ends, or after half a minute.
    pub async fn begun(&mut self, http: &reqwest::Client) -> Result<(), String> {
        self.says_yes(http, "livez").await
    }

    async fn says_yes(&mut self, http: &reqwest::Client, path: &str) -> Result<(), String> {
        let begun = Instant::now();
        while begun.elapsed() < READY {
            if let Some(status) = self.ended() {
                return Err(format!("{} ended with {status}", self.name()));
            }
            let url = format!("http://{}/{path}", self.http);
            if http
                .get(url)
                .send()
                .await
                .is_ok_and(|answer| answer.status().is_success())
            {
                return Ok(());
            }
            sleep(Duration::from_millis(30)).await;
        }
        Err(format!("{} says no at /{path} after {READY:?}", self.name()))
    }

    /// SIGTERM, and waits for an orderly end.
    ///
    /// # Errors
    /// If there is none.
    pub async fn term(&mut self) -> Result<(), String> {
        let name = self.name();
        term(&mut self.child, &name).await
    }
}

/// SIGTERM, and waits for an orderly end of the process called `name`.
///
/// # Errors
/// If there is none.
pub async fn term(child: &mut Child, name: &str) -> Result<(), String> {
    signal_to(child, Signal::TERM);
    match timeout(END, child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("{name} ended with {status} after SIGTERM")),
        Ok(Err(error)) => Err(format!("{name}: {error}")),
        Err(_) => {
            let _ = child.kill().await;
            Err(format!("{name} did not end within {END:?} after SIGTERM"))
        }
    }
}

fn signal_to(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        let _ = kill_process(pid, signal);
    }
}

fn name(recipe: &Recipe, generation: usize) -> String {
    format!("{}-{}.{generation}", recipe.role, recipe.number)
}

fn spawn(recipe: &Recipe, generation: usize, http: SocketAddr) -> Result<Child, String> {
    let name = name(recipe, generation);
    let failed = |error: std::io::Error| format!("{name} cannot be started: {error}");
    let log = std::fs::File::create(recipe.folder.join(format!("{name}.log"))).map_err(failed)?;
    let mut command = command(&recipe.program, &recipe.variables);
    command
        .arg(recipe.role)
        .env("POSTROOM_HTTP_ADDR", http.to_string())
        .env("POSTROOM_EHLO_NAME", &name)
        // Ctrl-C is for the campaign.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(failed)?)
        .stderr(log)
        .spawn()
        .map_err(failed)
}

/// The binary with these variables and none of the caller's installation; killed when dropped.
#[must_use]
pub fn command(program: &PathBuf, variables: &[(String, String)]) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("POSTROOM_") || text.starts_with("AWS_") {
            command.env_remove(&name);
        }
    }
    command
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .kill_on_drop(true);
    command
}

/// A port below the range from which the system takes ports for outgoing connections, so that nobody takes it between
/// now and the bind of the process.
fn free_address() -> Result<SocketAddr, String> {
    for _ in 0..100 {
        let port = 10_000 + rand::random::<u16>() % 10_000;
        let bound = TcpListener::bind(("127.0.0.1", port)).and_then(|listener| listener.local_addr());
        if let Ok(address) = bound {
            return Ok(address);
        }
    }
    Err("no port is free".to_owned())
}
