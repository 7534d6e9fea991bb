//! The real binary: commands that end, and processes that stay.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use tokio::process::{Child, Command};

use super::{eventually, eventually_some};

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    pub(crate) fn new(output: &std::process::Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Requires exit code 0 and gives the output.
    #[track_caller]
    pub(crate) fn success(self) -> String {
        assert_eq!(self.code, 0, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self.stdout
    }

    /// Requires this exit code and gives standard error.
    #[track_caller]
    pub(crate) fn fails_with(self, code: i32) -> String {
        assert_eq!(
            self.code, code,
            "stdout:\n{}\nstderr:\n{}",
            self.stdout, self.stderr
        );
        self.stderr
    }
}

/// A worker or bridge. Killed when dropped; when the test panicked, its log is printed.
pub(crate) struct Process {
    name: String,
    child: Child,
    http: SocketAddr,
    log: PathBuf,
}

impl Process {
    /// Spawns `command` with its output in a file and its HTTP port at a free address.
    pub(crate) fn spawn(name: &str, mut command: Command, log: PathBuf) -> Self {
        let http = free_address();
        let file = std::fs::File::create(&log).unwrap();
        let child = command
            .env("POSTROOM_HTTP_ADDR", http.to_string())
            .stdin(std::process::Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self {
            name: name.to_owned(),
            child,
            http,
            log,
        }
    }

    /// Waits until `/readyz` answers 200.
    ///
    /// # Panics
    /// If the process ends, or after 30 s.
    pub(crate) async fn wait_ready(&mut self) {
        let ready = Duration::from_secs(30);
        let start = std::time::Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("{} ended with {status} before it was ready", self.name);
            }
            if self.ready().await {
                return;
            }
            assert!(
                start.elapsed() < ready,
                "{} not ready within {ready:?}",
                self.name
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether `/readyz` answers 200 now.
    pub(crate) async fn ready(&self) -> bool {
        self.get("/readyz").await.is_some_and(|(status, _)| status == 200)
    }

    /// Waits until `/readyz` no longer answers 200.
    pub(crate) async fn wait_not_ready(&self) {
        eventually(Duration::from_secs(30), || async { !self.ready().await }).await;
    }

    /// GET on the HTTP port: status and body, `None` if it cannot be reached.
    pub(crate) async fn get(&self, path: &str) -> Option<(u16, String)> {
        let response = http_client().get(self.url(path)).send().await.ok()?;
        let status = response.status().as_u16();
        Some((status, response.text().await.ok()?))
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.http)
    }

    /// Sum of a metric's samples whose line begins with `series`, such as `postroom_jobs_total{outcome="sent"}`.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        let page = eventually_some(Duration::from_secs(10), || self.get("/metrics"))
            .await
            .1;
        page.lines()
            .filter(|line| line.starts_with(series))
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
            .sum()
    }

    /// [`Process::metric`] of counters.
    pub(crate) async fn count(&self, series: &str) -> u64 {
        self.metric(series).await.round() as u64
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// Everything it wrote so far.
    pub(crate) fn logs(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned()
    }

    /// Waits until its log contains `text`.
    pub(crate) async fn wait_log(&self, text: &str) {
        eventually(Duration::from_secs(30), || async { self.logs().contains(text) }).await;
    }

    /// SIGKILL, and waits for the end.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Any signal by name, such as `STOP` or `HUP`.
    pub(crate) fn signal(&self, name: &str) {
        let status = std::process::Command::new("kill")
            .arg(format!("-{name}"))
            .arg(self.pid().to_string())
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Panics
    /// After 90 s.
    pub(crate) async fn term(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.wait().await
    }

    /// Waits for the end.
    pub(crate) async fn wait(&mut self) -> ExitStatus {
        tokio::time::timeout(Duration::from_secs(90), self.child.wait())
            .await
            .unwrap_or_else(|_| panic!("{} does not end", self.name))
            .unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.logs();
            let lines: Vec<_> = logs.lines().collect();
            let tail = &lines[lines.len().saturating_sub(200)..];
            eprintln!(
                "--- log of {} ({} lines)\n{}",
                self.name,
                lines.len(),
                tail.join("\n")
            );
        }
    }
}

fn http_client() -> reqwest::Client {
    reqwest::Client::builder()
        .timeout(Duration::from_secs(5))
        .no_proxy()
        .build()
        .unwrap()
}

/// A port below the range from which the system takes ports for outgoing connections, so that nobody takes it between
/// now and the bind of the process.
pub(crate) fn free_address() -> SocketAddr {
    loop {
        let port = 10_000 + rand::random::<u16>() % 10_000;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            return listener.local_addr().unwrap();
        }
    }
}
