//! Processes that die, stand still or lose an answer exactly at a named place (`src/fail_point.rs`): one test for each
//! row of the tables in docs/guarantees.md.

mod answers;
mod boundaries;
mod bridge;
mod ending;
mod flights;
mod holding;
mod letters;
mod outages;
mod room;
mod stalls;

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::{Builder, Script, SmtpServer};
use serde_json::Value;

use crate::sends::account;
use crate::support::{Process, Received, Reports, World, header, mail};

/// A world with a tenant `acme` whose account is at `server`, and all reports. Leases are short; workers are the test's.
struct Scene {
    world: World,
    server: SmtpServer,
    reports: Reports,
}

/// Short enough to wait for, long enough for heartbeats on a busy machine.
const LEASE: Duration = Duration::from_secs(3);
/// No lease of this length runs out within a test: whatever waited for one would never end.
const LONG_LEASE: (&str, &str) = ("POSTROOM_LEASE", "10m");
const SIGKILL: i32 = 9;

impl Scene {
    async fn new(script: Script) -> Self {
        Self::at(SmtpServer::builder().script(script)).await
    }

    async fn at(server: Builder) -> Self {
        let mut world = World::ready().await;
        world.set("POSTROOM_LEASE", format!("{}s", LEASE.as_secs()));
        world.set("POSTROOM_RETRY_BASE", "200ms");
        let server = server.start().await;
        account(&world, "acme", &server, &[]).await;
        let reports = world.reports().await;
        Self {
            world,
            server,
            reports,
        }
    }

    /// A worker with this plan of fail points and these further variables, which is ready.
    async fn worker_with(&self, plan: &str, more: &[(&str, &str)]) -> Process {
        let mut worker = self.spawn("worker", plan, more);
        worker.wait_ready().await;
        worker
    }

    async fn worker(&self, plan: &str) -> Process {
        self.worker_with(plan, &[]).await
    }

    fn spawn(&self, command: &str, plan: &str, more: &[(&str, &str)]) -> Process {
        let name = format!("{command}-{:06x}", rand::random::<u32>() >> 8);
        let mut process = self.world.command(&[command]);
        process
            .env("POSTROOM_FAIL_POINTS", plan)
            .envs(more.iter().copied());
        let log = self.world.dir().join(format!("{name}.log"));
        Process::spawn(&name, process, log)
    }

    async fn publish(&self, job: &Value) {
        self.world.publish(Level::High, "acme", job).await;
    }

    /// A worker that dies of its plan while it handles this job, which is made when the worker is ready: it may name a time
    /// shortly after. It takes nothing over from those who died before it.
    async fn dies(&self, plan: &str, job: impl FnOnce() -> Value) {
        let mut doomed = self.worker_with(plan, &[LONG_LEASE]).await;
        self.publish(&job()).await;
        was_killed(&mut doomed).await;
        self.leaves_soon().await;
    }

    /// What the worker that began last has leased is free after a short lease, though it lived with a long one.
    async fn leaves_soon(&self) {
        let shorter = format!(
            "UPDATE worker SET lease = interval '{} seconds' WHERE epoch = (SELECT max(epoch) FROM worker)",
            LEASE.as_secs()
        );
        let shortened = self.world.sql().await.execute(&shorter, &[]).await.unwrap();
        assert_eq!(shortened, 1);
    }

    /// Kills workers that wait for Postgres, and requires that they reported nothing and that all these messages come back:
    /// none was acknowledged.
    async fn nothing_was_acknowledged(&mut self, workers: &mut [Process], messages: u32) {
        // What must not go out has the time to.
        assert!(self.reports.none_for(Duration::from_millis(500)).await);
        for worker in workers {
            worker.kill().await;
        }
        self.world.wait_depth("mail.jobs.high", messages).await;
    }

    /// The only mails of this job that the server took.
    fn mails(&self, job: &str) -> usize {
        let mails = self.server.received();
        mails.iter().filter(|mail| header(mail, "Subject") == job).count()
    }

    /// Reports still owed are due now instead of in half a minute.
    async fn outbox_is_due(&self) {
        let due = "UPDATE outbox SET due_at = clock_timestamp()";
        self.world.sql().await.execute(due, &[]).await.unwrap();
    }

    /// Requires that all is over, and so that nothing more can come.
    async fn over(&mut self) {
        self.world.assert_settled().await;
        while !self.reports.none_for(Duration::from_millis(300)).await {}
    }

    /// The one final report of a job, under one id however often it came. To be called when all is [`over`](Self::over).
    fn the_final(&self, job: &str) -> Received {
        let finals: Vec<_> = self
            .reports
            .of(job)
            .into_iter()
            .filter(|r| r.is_final())
            .collect();
        let ids: BTreeSet<_> = finals.iter().map(|report| &report.id).collect();
        assert_eq!(ids.len(), 1, "{job}: {ids:?}");
        finals[0].clone()
    }

    /// Requires that a job was sent so often, has one final report `mail.sent`, and that so many leases of it ended
    /// without an outcome.
    fn was_sent(&self, job: &str, mails: usize, uncertain: u64) {
        let report = self.the_final(job);
        assert_eq!(report.kind(), "mail.sent", "{job}: {}", report.json);
        let told = report.json["data"]["uncertain_attempts"].as_u64().unwrap_or(0);
        assert_eq!(
            (self.mails(job), told),
            (mails, uncertain),
            "{job}: mails, uncertain attempts"
        );
    }
}

/// Waits for the death of a process, which must be the one planned.
async fn was_killed(doomed: &mut Process) {
    let status = doomed.wait().await;
    assert_eq!(status.signal(), Some(SIGKILL), "{status}\n{}", doomed.logs());
    assert!(doomed.logs().contains("fail point"), "{}", doomed.logs());
}

fn job(id: &str) -> Value {
    mail("acme", id)
}

/// A job that is not to be sent again when its outcome is unknown.
fn held(id: &str) -> Value {
    let mut job = job(id);
    job["on_uncertain"] = "hold".into();
    job
}

#[tokio::test]
async fn a_plan_with_a_point_that_does_not_exist_ends_the_process() {
    let world = World::new().await;
    let mut command = world.command(&["worker"]);
    command.env("POSTROOM_FAIL_POINTS", "after_the_settlement=kill");
    let output = command.output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("there is no such point"), "{told}");
}
