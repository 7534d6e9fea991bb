//! A vhost and a database of one's own, and the binary that lives there.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use base64::Engine as _;
use lapin::BasicProperties;
use lapin::types::FieldTable;
use postroom::broker::{self, Topology};
use postroom::config;
use postroom::level::Level;
use postroom_testkit::scratch::{Scratch, Servers};
use secrecy::SecretString;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::sync::OnceCell;

use super::{Amqp, Finished, Process, Reports, eventually};

const COMMAND_LIMIT: Duration = Duration::from_mins(1);

/// Everything of it is deleted when dropped.
pub(crate) struct World {
    scratch: Scratch,
    variables: BTreeMap<String, String>,
    dir: PathBuf,
    processes: AtomicU32,
    amqp: OnceCell<Amqp>,
}

impl World {
    /// An empty vhost and an empty database on the shared servers.
    pub(crate) async fn new() -> Self {
        Self::on(Servers::from_env().unwrap()).await
    }

    /// The same on servers of one's own, see [`super::Private`].
    pub(crate) async fn on(servers: Servers) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let scratch = Scratch::create(servers).await.unwrap();
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(scratch.name());
        std::fs::create_dir_all(&dir).unwrap();
        let variables = [
            ("POSTROOM_AMQP_URL", scratch.amqp_url()),
            ("POSTROOM_DATABASE_URL", scratch.database_url()),
            ("POSTROOM_ENCRYPTION_KEYS", new_key("test")),
            ("POSTROOM_OVERRIDE_KEYS", new_key("override")),
            // The servers of the tests are on loopback.
            ("POSTROOM_EGRESS_ALLOW", "127.0.0.0/8,::1/128".to_owned()),
            ("POSTROOM_LOG", "info,postroom=debug".to_owned()),
            ("POSTROOM_LOG_FORMAT", "human".to_owned()),
        ];
        Self {
            scratch,
            variables: variables.map(|(name, value)| (name.to_owned(), value)).into(),
            dir,
            processes: AtomicU32::new(0),
            amqp: OnceCell::new(),
        }
    }

    /// A new world, migrated and with its topology declared.
    pub(crate) async fn ready() -> Self {
        let world = Self::new().await;
        world.prepare().await;
        world
    }

    /// Migrates the database with the binary and declares the topology.
    pub(crate) async fn prepare(&self) {
        self.postroom(&["migrate"]).await.success();
        self.apply_topology().await;
    }

    /// Declares the topology, as a worker does at start.
    pub(crate) async fn apply_topology(&self) {
        let connection = broker::connect(&self.broker_config(), "test").await.unwrap();
        self.topology().apply(&connection).await.unwrap();
        broker::close(&connection).await;
    }

    /// Sets a variable for every command and process from now on.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<String>) {
        self.variables.insert(name.to_owned(), value.into());
    }

    pub(crate) fn unset(&mut self, name: &str) {
        self.variables.remove(name);
    }

    pub(crate) fn variable(&self, name: &str) -> &str {
        &self.variables[name]
    }

    pub(crate) fn amqp_url(&self) -> &str {
        self.variable("POSTROOM_AMQP_URL")
    }

    pub(crate) fn database_url(&self) -> &str {
        self.variable("POSTROOM_DATABASE_URL")
    }

    /// Schema of the installation.
    pub(crate) fn schema(&self) -> &str {
        self.variables
            .get("POSTROOM_DATABASE_SCHEMA")
            .map_or("postroom", String::as_str)
    }

    /// First part of exchange and queue names.
    pub(crate) fn prefix(&self) -> &str {
        self.variables
            .get("POSTROOM_PREFIX")
            .map_or("mail", String::as_str)
    }

    /// A folder for files of the test, deleted at the end.
    pub(crate) fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    pub(crate) fn topology(&self) -> Topology {
        Topology::new(self.prefix(), &[])
    }

    pub(crate) fn broker_config(&self) -> config::Broker {
        config::Broker {
            url: SecretString::from(self.amqp_url()),
            ca_file: None,
            prefix: self.prefix().to_owned(),
            topology: config::TopologyMode::Apply,
            extra_queues: Vec::new(),
        }
    }

    pub(crate) fn database_config(&self) -> config::Database {
        config::Database {
            url: SecretString::from(self.database_url()),
            schema: self.schema().to_owned(),
            ca_file: None,
            pool_size: 4,
        }
    }

    /// The binary with this world's variables and no others of postroom.
    pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_postroom"));
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["POSTROOM_", "AWS_", "OTEL_"]
                .iter()
                .any(|own| text.starts_with(own))
            {
                command.env_remove(&name);
            }
        }
        command.args(arguments).envs(&self.variables).kill_on_drop(true);
        command
    }

    /// Runs a command to its end.
    pub(crate) async fn postroom<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Finished {
        self.postroom_stdin(arguments, b"").await
    }

    /// Runs a command to its end with this on standard input.
    pub(crate) async fn postroom_stdin<S: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: &[S],
        input: &[u8],
    ) -> Finished {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // A command that does not read its input closes the pipe.
        let _ = stdin.write_all(input).await;
        drop(stdin);
        let output = tokio::time::timeout(COMMAND_LIMIT, child.wait_with_output())
            .await
            .expect("the command does not end")
            .unwrap();
        Finished::new(&output)
    }

    /// Starts a worker and waits until it is ready.
    pub(crate) async fn start_worker(&self) -> Process {
        let mut process = self.spawn(&["worker"]);
        process.wait_ready().await;
        process
    }

    /// Starts a bridge and waits until it is ready.
    pub(crate) async fn start_bridge(&self) -> Process {
        let mut process = self.spawn(&["bridge"]);
        process.wait_ready().await;
        process
    }

    /// Starts any long-running command without waiting.
    pub(crate) fn spawn(&self, arguments: &[&str]) -> Process {
        let number = self.processes.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", arguments[0]);
        let log = self.dir.join(format!("{name}.log"));
        Process::spawn(&name, self.command(arguments), log)
    }

    /// A shared connection to the broker.
    pub(crate) async fn amqp(&self) -> &Amqp {
        self.amqp.get_or_init(|| Amqp::connect(self.amqp_url())).await
    }

    /// Publishes a job as a producer does, and awaits the confirm.
    pub(crate) async fn publish(&self, level: Level, tenant: &str, job: &Value) {
        self.publish_bytes(level, tenant, job.to_string().as_bytes())
            .await;
    }

    /// Publishes anything as if it were a job.
    pub(crate) async fn publish_bytes(&self, level: Level, tenant: &str, body: &[u8]) {
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_type("mail.job.v1".into())
            .with_timestamp(jiff::Timestamp::now().as_second() as u64)
            .with_headers(FieldTable::default());
        let key = format!("{level}.{tenant}");
        let exchange = self.topology().jobs_exchange();
        self.amqp().await.publish(&exchange, &key, properties, body).await;
    }

    /// Publishes a job compressed.
    pub(crate) async fn publish_gzip(&self, level: Level, tenant: &str, job: &Value) {
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_content_encoding("gzip".into());
        let body = postroom::job::decode::gzip(job.to_string().as_bytes()).unwrap();
        let (exchange, key) = (self.topology().jobs_exchange(), format!("{level}.{tenant}"));
        self.amqp()
            .await
            .publish(&exchange, &key, properties, &body)
            .await;
    }

    /// Publishes many jobs, a few hundred confirms at a time.
    pub(crate) async fn publish_all(&self, level: Level, jobs: &[(String, Value)]) {
        for chunk in jobs.chunks(256) {
            let publishes = chunk.iter().map(|(tenant, job)| self.publish(level, tenant, job));
            futures_util::future::join_all(publishes).await;
        }
    }

    /// Messages ready in a queue; 0 if there is no such queue.
    pub(crate) async fn depth(&self, queue: &str) -> u32 {
        self.amqp().await.depth(queue).await.unwrap_or(0)
    }

    /// Waits until a queue holds this many ready messages.
    pub(crate) async fn wait_depth(&self, queue: &str, count: u32) {
        eventually(Duration::from_secs(30), || async {
            self.depth(queue).await == count
        })
        .await;
    }

    /// Collects all reports from now on.
    pub(crate) async fn reports(&self) -> Reports {
        Reports::collect(self.amqp_url(), &self.topology().reports_exchange()).await
    }

    /// A connection to the database whose search path is the installation's schema.
    pub(crate) async fn sql(&self) -> tokio_postgres::Client {
        let (client, connection) = tokio_postgres::connect(self.database_url(), tokio_postgres::NoTls)
            .await
            .unwrap();
        tokio::spawn(connection);
        client
            .batch_execute(&format!("SET search_path TO {}", self.schema()))
            .await
            .unwrap();
        client
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The logs stay when the test failed.
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// A key ring with one fresh key.
pub(crate) fn new_key(kid: &str) -> String {
    let key: [u8; 32] = rand::random();
    format!("{kid}:{}", base64::engine::general_purpose::STANDARD.encode(key))
}
