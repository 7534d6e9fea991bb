//! Measures one worker on this machine: jobs through the real broker and database into an SMTP sink.
//!
//! ```text
//! dev/run-with-servers cargo run --release --example load -- [JOBS] [ACCOUNTS] [LIMIT]
//! ```
//!
//! Build the release binary first (`cargo build --release`). `LIMIT` is a rate limit that never binds, such as
//! `1000000/1h`, to see what limits cost. `LOAD_LATENCY_MS=20` puts the sink so far away; `LOAD_EXTENSIONS` is `none`,
//! `pipelining` (the default) or `chunking` (both). Prints mails per second, the worker's own CPU per mail, and its peak memory.
#![expect(clippy::print_stdout, reason = "it is a tool for people")]

use std::process::Stdio;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use postroom_testkit::scratch::{Scratch, Servers};
use postroom_testkit::smtp::SmtpServer;
use tokio::process::Command;

type Failed = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| {
        arguments
            .next()
            .and_then(|n| n.parse::<usize>().ok())
            .unwrap_or(default)
    };
    let (jobs, accounts) = (number(20_000), number(1));
    let limit = std::env::args().nth(3);
    let scratch = Scratch::create(Servers::from_env()?).await?;
    let server = sink().start().await;
    let run = Run { scratch: &scratch };
    run.postroom(&["migrate"]).await?;
    run.postroom(&["topology", "apply"]).await?;
    for n in 0..accounts {
        let (tenant, port) = (format!("t{n}"), server.port().to_string());
        run.postroom(&["tenant", "set", &tenant]).await?;
        let mut account = vec![
            "account",
            "set",
            &tenant,
            "main",
            "--host",
            "127.0.0.1",
            "--port",
            &port,
        ];
        account.extend(["--tls", "none", "--from", "shop@example.com"]);
        if let Some(limit) = &limit {
            account.extend(["--limit", limit]);
        }
        run.postroom(&account).await?;
    }
    let published = Instant::now();
    publish(&scratch.amqp_url(), jobs, accounts).await?;
    println!(
        "published {:.0} jobs/s",
        jobs as f64 / published.elapsed().as_secs_f64()
    );
    let mut worker = run.command(&["worker"]).stderr(Stdio::null()).spawn()?;
    let pid = worker.id().unwrap_or_default();
    while server.received_count() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (begun, cpu, first) = (Instant::now(), cpu_seconds(pid), server.received_count());
    let deadline = begun + Duration::from_mins(5);
    while server.received_count() < jobs && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (took, sent) = (begun.elapsed().as_secs_f64(), server.received_count() - first);
    let busy = cpu_seconds(pid) - cpu;
    println!("{sent} mails in {took:.2} s: {:.0} mails/s", sent as f64 / took);
    println!(
        "worker: {:.0} µs CPU per mail, {:.0} MiB peak",
        busy * 1e6 / sent as f64,
        peak_mib(pid)
    );
    println!("{} connections", server.counters().connections);
    worker.kill().await?;
    Ok(())
}

/// The sink, as the environment says.
fn sink() -> postroom_testkit::smtp::Builder {
    let extensions = std::env::var("LOAD_EXTENSIONS").unwrap_or_default();
    let latency = std::env::var("LOAD_LATENCY_MS").ok().and_then(|n| n.parse().ok());
    let builder = SmtpServer::builder()
        .keep_data(false)
        .pipelining(extensions != "none")
        .chunking(extensions == "chunking");
    match latency {
        Some(millis) => builder.latency(Duration::from_millis(millis)),
        None => builder,
    }
}

struct Run<'a> {
    scratch: &'a Scratch,
}

impl Run<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let binary =
            std::env::var("POSTROOM_BINARY").unwrap_or_else(|_| "target/release/postroom".to_owned());
        let mut command = Command::new(binary);
        command
            .args(arguments)
            .env("POSTROOM_AMQP_URL", self.scratch.amqp_url())
            .env("POSTROOM_DATABASE_URL", self.scratch.database_url())
            .env(
                "POSTROOM_ENCRYPTION_KEYS",
                "load:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
            )
            .env("POSTROOM_EGRESS_ALLOW", "127.0.0.0/8")
            .env("POSTROOM_LOG", "warn")
            .env("POSTROOM_HTTP_ADDR", "127.0.0.1:0")
            .kill_on_drop(true);
        for name in ["POSTROOM_CONCURRENCY", "POSTROOM_POOL_SIZE"] {
            if let Ok(value) = std::env::var(name) {
                command.env(name, value);
            }
        }
        command
    }

    async fn postroom(&self, arguments: &[&str]) -> Result<(), Failed> {
        let output = self.command(arguments).output().await?;
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
        }
    }
}

async fn publish(url: &str, jobs: usize, accounts: usize) -> Result<(), Failed> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let text = "Lorem ipsum dolor sit amet. ".repeat(50);
    stream::iter(0..jobs)
        .map(|n| {
            let (channel, text) = (channel.clone(), &text);
            async move {
                let tenant = format!("t{}", n % accounts);
                let body = format!(
                    r#"{{"id":"{n}","tenant":"{tenant}","to":"a{n}@example.org","subject":"Order {n}","text":"{text}"}}"#
                );
                let properties = BasicProperties::default().with_delivery_mode(2);
                let options = BasicPublishOptions::default();
                let key = format!("medium.{tenant}");
                let confirm = channel.basic_publish("mail.jobs".into(), key.into(), options, body.as_bytes(), properties);
                confirm.await?.await
            }
        })
        .buffer_unordered(512)
        .for_each(|_| async {})
        .await;
    Ok(())
}

/// User and system time of a process so far (`proc(5)`), in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks = |n: usize| fields.get(n).and_then(|t| t.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn peak_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap_or_default();
    line.split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse::<f64>().ok())
        .unwrap_or(0.0)
        / 1024.0
}
