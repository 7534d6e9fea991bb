//! The release binary: commands that end, and processes that stay.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

/// For one command of the operator's.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);
/// Until a process is ready.
const READY_LIMIT: Duration = Duration::from_secs(20);
/// Between SIGTERM and SIGKILL.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// Where the binary is, and the variables it gets.
pub(crate) struct Postroom {
    pub(crate) program: PathBuf,
    pub(crate) variables: BTreeMap<String, String>,
}

impl Postroom {
    /// The binary next to this example's: `target/release/postroom` for `target/release/examples/demo`.
    pub(crate) fn find() -> Result<Self, String> {
        let here = std::env::current_exe().map_err(|error| format!("where am I? {error}"))?;
        let program = here
            .parent()
            .and_then(Path::parent)
            .map(|dir| dir.join("postroom"))
            .filter(|program| program.is_file())
            .ok_or("the postroom binary is not built: run `make demo`")?;
        Ok(Self {
            program,
            variables: BTreeMap::new(),
        })
    }

    pub(crate) fn set(&mut self, name: &str, value: impl Into<String>) {
        self.variables.insert(name.to_owned(), value.into());
    }

    /// With our variables and none of the caller's installation.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("POSTROOM_") || text.starts_with("AWS_") {
                command.env_remove(&name);
            }
        }
        command.args(arguments).envs(&self.variables).kill_on_drop(true);
        command
    }

    /// Runs a command to its end and gives its output.
    pub(crate) async fn run(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let what = || format!("postroom {}", arguments.join(" "));
        let failed = |error: std::io::Error| format!("{}: {error}", what());
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A command that does not read its input closes the pipe.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        let output = timeout(COMMAND_LIMIT, child.wait_with_output())
            .await
            .map_err(|_| format!("{} does not end", what()))?
            .map_err(failed)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let error = String::from_utf8_lossy(&output.stderr);
        Err(format!(
            "{} ended with {}: {}",
            what(),
            output.status,
            error.trim()
        ))
    }

    /// Starts a worker or a bridge with its log in a file.
    pub(crate) fn start(&self, command: &str, name: &str, folder: &Path) -> Result<Process, String> {
        let log = folder.join(format!("{name}.log"));
        let failed = |error: std::io::Error| format!("{name} cannot be started: {error}");
        let file = std::fs::File::create(&log).map_err(failed)?;
        let http = free_address()?;
        let child = self
            .command(&[command])
            .env("POSTROOM_HTTP_ADDR", http.to_string())
            // Ctrl-C is for the demo, which then stops its processes in order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file.try_clone().map_err(failed)?)
            .stderr(file)
            .spawn()
            .map_err(failed)?;
        Ok(Process {
            name: name.to_owned(),
            child,
            http,
            log,
        })
    }
}

/// A worker or bridge; killed when dropped.
pub(crate) struct Process {
    pub(crate) name: String,
    child: Child,
    http: SocketAddr,
    pub(crate) log: PathBuf,
}

impl Process {
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.http)
    }

    /// Waits until `/readyz` says yes.
    pub(crate) async fn ready(&mut self, http: &reqwest::Client) -> Result<(), String> {
        let start = Instant::now();
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!(
                    "{} ended with {status}: {}",
                    self.name,
                    self.last_words()
                ));
            }
            let answer = http.get(self.url("/readyz")).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(());
            }
            if start.elapsed() > READY_LIMIT {
                let last = self.last_words();
                return Err(format!(
                    "{} is not ready after {READY_LIMIT:?}: {last}",
                    self.name
                ));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Its metrics page; empty while it cannot be had.
    pub(crate) async fn metrics(&self, http: &reqwest::Client) -> Metrics {
        let page = match http.get(self.url("/metrics")).send().await {
            Ok(answer) => answer.text().await.unwrap_or_default(),
            Err(_) => String::new(),
        };
        Metrics(page)
    }

    /// CPU time used so far, in seconds (proc(5): `utime` and `stime`). The metric has whole seconds only.
    pub(crate) fn cpu(&self) -> Option<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()?)).ok()?;
        // The name before it may hold anything but ends with the last bracket.
        let fields = stat.rsplit_once(')')?.1.split_whitespace();
        let ticks = fields
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok());
        Some(ticks.sum::<u64>() as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    /// SIGTERM, and SIGKILL if that is not enough. An error if it did not end well.
    pub(crate) async fn stop(&mut self) -> Result<(), String> {
        let pid = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let Some(pid) = pid else {
            return Err(format!(
                "{} ended before it was stopped: {}",
                self.name,
                self.last_words()
            ));
        };
        let _ = kill_process(pid, Signal::TERM);
        match timeout(STOP_LIMIT, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(format!("{} ended with {status}", self.name)),
            Ok(Err(error)) => Err(format!("{}: {error}", self.name)),
            Err(_) => {
                let _ = self.child.start_kill();
                Err(format!(
                    "{} did not end within {STOP_LIMIT:?} after SIGTERM",
                    self.name
                ))
            }
        }
    }

    /// The end of its log.
    fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().next_back().unwrap_or("its log is empty").to_owned()
    }
}

/// The metrics of several processes.
pub(crate) async fn metrics(processes: &[Process], http: &reqwest::Client) -> Vec<Metrics> {
    join_all(processes.iter().map(|process| process.metrics(http))).await
}

/// A metrics page.
pub(crate) struct Metrics(String);

impl Metrics {
    /// Sum of the samples whose line begins so.
    pub(crate) fn sum(&self, series: &str) -> f64 {
        let lines = self.0.lines().filter(|line| line.starts_with(series));
        lines
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
            .sum()
    }
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
