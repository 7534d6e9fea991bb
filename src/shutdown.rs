//! How a process ends: first softly (begin nothing new, finish what has begun), then, after the grace period or a
//! second signal, hard (drop everything; the broker redelivers, leases run out).

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long look-ups of names, which block a thread each, may keep a process whose work is done.
const STRAY: Duration = Duration::from_secs(1);

/// Does a process's work to its end. Nobody waits for what blocks a thread then: without an answer of DNS that is for ever.
///
/// # Errors
/// If the runtime cannot be started.
pub fn block_on<T>(work: impl Future<Output = T>) -> std::io::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(work);
    runtime.shutdown_timeout(STRAY);
    Ok(done)
}

/// The two tokens, the tasks to wait for, and the wish to read secret files again. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shutdown {
    /// Cancelled first: begin nothing new. Also when a task of [`spawn`](Self::spawn) has died.
    pub soft: CancellationToken,
    /// Cancelled last: drop what is left.
    pub hard: CancellationToken,
    /// Tasks that [`drained`](Self::drained) waits for; [`spawn`](Self::spawn) adds to it.
    pub tasks: TaskTracker,
    crashed: Arc<AtomicBool>,
    reloads: watch::Sender<u64>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// Nothing is cancelled yet, and no signal is listened to.
    #[must_use]
    pub fn new() -> Self {
        let hard = CancellationToken::new();
        Self {
            soft: hard.child_token(),
            hard,
            tasks: TaskTracker::new(),
            crashed: Arc::default(),
            reloads: watch::Sender::new(0),
        }
    }

    /// Turns signals into tokens from now on. The grace period begins with the soft token, whoever cancelled it.
    ///
    /// # Errors
    /// If the handlers cannot be installed.
    pub fn listen(&self, grace_period: Duration) -> std::io::Result<()> {
        let signals = Signals {
            // Kubernetes and docker ask for a graceful end with it.
            terminate: signal(SignalKind::terminate())?,
            // Ctrl-C.
            interrupt: signal(SignalKind::interrupt())?,
        };
        // Secret files have changed.
        let hangup = signal(SignalKind::hangup())?;
        tokio::spawn(self.clone().run(signals, hangup, grace_period));
        Ok(())
    }

    /// A receiver that changes with every SIGHUP.
    #[must_use]
    pub fn reloads(&self) -> watch::Receiver<u64> {
        self.reloads.subscribe()
    }

    /// Runs a task for the life of the process. If it panics or returns before the soft token, the process is broken:
    /// the soft token is cancelled, so that the orchestrator starts another one.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let watch = Watch {
            name,
            shutdown: self.clone(),
        };
        self.tasks.spawn(async move {
            let _watch = watch;
            task.await;
        });
    }

    /// Waits until all tasks have ended; after the hard token no longer than `patience`. Call it once the soft
    /// token is cancelled. Says whether all ended by themselves.
    pub async fn drained(&self, patience: Duration) -> bool {
        self.tasks.close();
        tokio::select! {
            () = self.tasks.wait() => return !self.hard.is_cancelled(),
            () = self.hard.cancelled() => {}
        }
        if tokio::time::timeout(patience, self.tasks.wait()).await.is_err() {
            tracing::warn!(
                tasks = self.tasks.len(),
                "tasks did not end in time and are dropped"
            );
        }
        false
    }

    /// Whether a task died.
    #[must_use]
    pub fn crashed(&self) -> bool {
        self.crashed.load(Ordering::Acquire)
    }

    async fn run(self, mut signals: Signals, mut hangup: Signal, grace_period: Duration) {
        loop {
            tokio::select! {
                name = signals.end() => {
                    tracing::info!(signal = name, "shutting down: finishing what has begun");
                    self.soft.cancel();
                }
                () = self.soft.cancelled() => break,
                _ = hangup.recv() => {
                    tracing::info!("SIGHUP: reading secret files again");
                    self.reloads.send_modify(|count| *count += 1);
                }
            }
        }
        tokio::select! {
            name = signals.end() => tracing::warn!(signal = name, "second signal: not waiting any longer"),
            () = tokio::time::sleep(grace_period) => {
                tracing::warn!(?grace_period, "grace period is over: not waiting any longer");
            }
        }
        self.hard.cancel();
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    async fn end(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Notices the end of a task, however it comes.
struct Watch {
    name: &'static str,
    shutdown: Shutdown,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.shutdown.soft.is_cancelled() && !std::thread::panicking() {
            return;
        }
        tracing::error!(task = self.name, "task died: shutting down");
        self.shutdown.crashed.store(true, Ordering::Release);
        self.shutdown.soft.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_look_up_without_an_answer_does_not_keep_a_process_that_is_done() {
        let (answer, answered) = std::sync::mpsc::channel::<()>();
        let (ended, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let done = block_on(async {
                tokio::task::spawn_blocking(move || answered.recv());
                7
            });
            ended.send(done.unwrap())
        });
        assert_eq!(end.recv_timeout(LONG).unwrap(), 7);
        drop(answer);
    }

    #[tokio::test]
    async fn hard_implies_soft_and_not_the_other_way_round() {
        let shutdown = Shutdown::new();
        shutdown.soft.cancel();
        assert!(!shutdown.hard.is_cancelled());
        let shutdown = Shutdown::new();
        shutdown.hard.cancel();
        assert!(shutdown.soft.is_cancelled());
    }

    #[tokio::test]
    async fn a_task_that_panics_or_returns_early_ends_the_process() {
        for panics in [true, false] {
            let shutdown = Shutdown::new();
            shutdown.spawn("faulty", async move { assert!(!panics, "on purpose") });
            tokio::time::timeout(LONG, shutdown.soft.cancelled())
                .await
                .unwrap();
            assert!(shutdown.crashed());
            assert!(shutdown.drained(LONG).await);
        }
    }

    #[tokio::test]
    async fn a_task_that_ends_because_it_was_told_to_is_no_crash() {
        let shutdown = Shutdown::new();
        let soft = shutdown.soft.clone();
        shutdown.spawn("good", async move { soft.cancelled().await });
        shutdown.soft.cancel();
        assert!(shutdown.drained(LONG).await);
        assert!(!shutdown.crashed());
    }

    #[tokio::test]
    async fn the_grace_period_runs_from_the_soft_token() {
        let shutdown = Shutdown::new();
        shutdown.listen(Duration::from_millis(10)).unwrap();
        shutdown.spawn("stuck", std::future::pending());
        shutdown.soft.cancel();
        assert!(!shutdown.drained(Duration::from_millis(10)).await);
        assert!(shutdown.hard.is_cancelled());
    }

    #[tokio::test]
    async fn a_hangup_asks_to_read_files_again_and_ends_nothing() {
        let shutdown = Shutdown::new();
        let mut reloads = shutdown.reloads();
        shutdown.listen(LONG).unwrap();
        let me = std::process::id().to_string();
        assert!(
            std::process::Command::new("kill")
                .args(["-HUP", &me])
                .status()
                .unwrap()
                .success()
        );
        tokio::time::timeout(LONG, reloads.changed())
            .await
            .unwrap()
            .unwrap();
        assert!(!shutdown.soft.is_cancelled());
    }
}
