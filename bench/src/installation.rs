//! What all contestants work on: a virtual host with the product's own topology, its database, accounts, and the sink.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use postroom_testkit::scratch::{Scratch, Servers};
use postroom_testkit::tls::TestCa;
use tokio::process::Command;
use tokio_postgres::{Client, NoTls};

use crate::Failed;
use crate::contestant::Peers;
use crate::processes::Tree;
use crate::produce::Producer;
use crate::sink::Sink;

/// Where jobs wait, for all contestants.
pub(crate) const JOBS: &str = "mail.jobs.medium";
/// Where reports go.
pub(crate) const REPORTS: &str = "mail.reports";
/// Where they arrive.
pub(crate) const REPORTS_QUEUE: &str = "mail.reports.bridge";
/// Tenants of each kind, each with one account.
pub(crate) const TENANTS: usize = 1000;
/// A limit that never binds, and must be counted all the same.
const LIMIT: &str = "1000000/1h";
/// As accounts usually have them; none binds.
const LIMITS: [&str; 6] = [
    "--limit",
    "1000000/1m",
    "--limit",
    "1000000/1h",
    "--limit",
    "1000000/1d",
];

/// All of it.
#[derive(Debug)]
pub(crate) struct Installation {
    pub(crate) scratch: Scratch,
    pub(crate) sink: Sink,
    pub(crate) producer: Producer,
    pub(crate) database: Client,
    pub(crate) peers: Peers,
    pub(crate) broker_tree: Option<Tree>,
    pub(crate) database_tree: Option<Tree>,
    program: PathBuf,
    folder: PathBuf,
}

impl Installation {
    /// Brings it up, with the binary of the product and a folder for logs.
    pub(crate) async fn create(program: PathBuf, folder: PathBuf) -> Result<Self, Failed> {
        std::fs::create_dir_all(&folder)?;
        let servers = Servers::from_env()?;
        let scratch = Scratch::create(servers).await?;
        let ca = TestCa::new();
        let certificate = ca.server(&["127.0.0.1"]);
        let (certificate_file, key_file) = (folder.join("sink.pem"), folder.join("sink.key"));
        std::fs::write(folder.join("ca.pem"), ca.ca_pem())?;
        std::fs::write(&certificate_file, certificate.cert_pem())?;
        std::fs::write(&key_file, certificate.key_pem())?;
        let sink = Sink::start(&certificate_file, &key_file).await?;
        let (database, driver) = tokio_postgres::connect(&scratch.database_url(), NoTls).await?;
        tokio::spawn(driver);
        let installation = Self {
            broker_tree: port(&scratch.amqp_url()).and_then(Tree::listening_on),
            database_tree: port(&scratch.database_url()).and_then(Tree::listening_on),
            // The queues must be there before the producer looks at them.
            producer: Producer::connect(&scratch.amqp_url()).await?,
            peers: Peers::install(&folder).await,
            scratch,
            sink,
            database,
            program,
            folder,
        };
        installation.set_up().await?;
        Ok(installation)
    }

    async fn set_up(&self) -> Result<(), Failed> {
        self.command(&["migrate"], "").await?;
        self.command(&["topology", "apply"], "").await?;
        for (tenant, more) in [
            ("free-0", &[][..]),
            ("limited-0", &["--limit", LIMIT]),
            ("many-limits-0", &LIMITS),
            ("tls-0", &["--username", "bench", "--password-stdin"]),
        ] {
            let tls = tenant == "tls-0";
            let port = if tls { self.sink.tls_port } else { self.sink.port }.to_string();
            self.command(&["tenant", "set", tenant], "").await?;
            let mut account = vec![
                "account",
                "set",
                tenant,
                "main",
                "--host",
                "127.0.0.1",
                "--port",
                &port,
            ];
            account.extend([
                "--from",
                "shop@example.com",
                "--tls",
                if tls { "implicit" } else { "none" },
            ]);
            account.extend(more);
            self.command(&account, if tls { "bench" } else { "" }).await?;
        }
        let url = format!("http://127.0.0.1:{}/hook", self.sink.hooks_port);
        self.command(
            &["endpoint", "set", "free-0", "--url", &url, "--generate-secret"],
            "",
        )
        .await?;
        // A thousand commands would take a minute. A secret opens only for the endpoint it was sealed for.
        let rest = format!(
            "SET search_path = postroom;
             INSERT INTO tenant (id) SELECT k || '-' || n FROM generate_series(1, {last}) n, unnest('{{free,limited,many-limits}}'::text[]) k;
             INSERT INTO account (tenant, id, host, port, tls, from_address, limits, is_default)
                 SELECT k || '-' || n, a.id, host, port, tls, from_address, limits, is_default
                 FROM generate_series(1, {last}) n, unnest('{{free,limited,many-limits}}'::text[]) k JOIN account a ON a.tenant = k || '-0';
             INSERT INTO endpoint (tenant, name, url) SELECT 'free-' || n, 'default', url FROM generate_series(1, {last}) n, endpoint;
             INSERT INTO endpoint_lane (endpoint) SELECT id FROM endpoint ON CONFLICT DO NOTHING;
             SELECT set_limits_v1(tenant || '/' || id, limits) FROM account WHERE limits <> '[]';",
            last = TENANTS - 1
        );
        self.database.batch_execute(&rest).await?;
        Ok(())
    }

    /// A command of the product with this installation's variables and none of the caller's.
    pub(crate) fn postroom(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("POSTROOM_") {
                command.env_remove(name);
            }
        }
        let key = "bench:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        command
            .args(arguments)
            .env("POSTROOM_AMQP_URL", self.scratch.amqp_url())
            .env("POSTROOM_DATABASE_URL", self.scratch.database_url())
            .env("POSTROOM_ENCRYPTION_KEYS", key)
            .env("POSTROOM_SMTP_CA_FILE", self.ca_file())
            .env("POSTROOM_EGRESS_ALLOW", "127.0.0.0/8")
            .env("POSTROOM_RETRY_BASE", "1s")
            .env("POSTROOM_LOG", "warn")
            .env("POSTROOM_HTTP_ADDR", "127.0.0.1:0")
            .kill_on_drop(true);
        command
    }

    async fn command(&self, arguments: &[&str], input: &str) -> Result<(), Failed> {
        use tokio::io::AsyncWriteExt as _;
        let mut command = self.postroom(arguments);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        let output = child.wait_with_output().await?;
        if output.status.success() {
            return Ok(());
        }
        let error = String::from_utf8_lossy(&output.stderr);
        Err(format!("postroom {}: {}", arguments.join(" "), error.trim()).into())
    }

    /// The authority of the sink's certificate.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// A log for a contestant.
    pub(crate) fn log(&self, name: &str) -> Result<std::fs::File, Failed> {
        let name: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let path = self.folder.join(Path::new(&name).with_extension("log"));
        Ok(std::fs::OpenOptions::new().create(true).append(true).open(path)?)
    }

    /// Commits take 2 ms longer, as a disk slower than this one would make them; or no longer.
    pub(crate) async fn slow_commits(&self, slow: bool) -> Result<(), Failed> {
        let delay = if slow { 2000 } else { 0 };
        let siblings = if slow { 0 } else { 5 };
        let name = self.scratch.name();
        self.database
            .batch_execute(&format!(
                "ALTER DATABASE {name} SET commit_delay = {delay}; ALTER DATABASE {name} SET commit_siblings = {siblings}"
            ))
            .await?;
        Ok(())
    }

    /// Accounts that no job is for, and whose circuit breakers are open.
    pub(crate) async fn trouble(&self, accounts: u32) -> Result<(), Failed> {
        self.database
            .batch_execute(&format!(
                "DELETE FROM postroom.account_health WHERE account LIKE 'ill-%';
                 INSERT INTO postroom.account_health (account, state, faults, until)
                 SELECT 'ill-' || n || '/main', 1, 5, now() + interval '1 day' FROM generate_series(1, {accounts}) n"
            ))
            .await?;
        Ok(())
    }

    /// How many reports have ever been owed: each job that is parked owes one. Cheap to ask for, unlike what waits.
    pub(crate) async fn reports_owed(&self) -> Result<u64, Failed> {
        let owed = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM postroom.outbox_n_seq";
        Ok(self.database.query_one(owed, &[]).await?.get::<_, i64>(0) as u64)
    }

    /// Jobs in the waiting room.
    pub(crate) async fn waiting(&self) -> Result<u64, Failed> {
        let row = self
            .database
            .query_one("SELECT count(*) FROM postroom.job WHERE state = 2", &[])
            .await?;
        Ok(row.get::<_, i64>(0) as u64)
    }

    /// What waits for its time is due now.
    pub(crate) async fn make_due(&self) -> Result<(), Failed> {
        self.database
            .batch_execute(
                "BEGIN;
                 UPDATE postroom.job SET due_at = clock_timestamp() WHERE state = 2;
                 UPDATE postroom.lane SET next_at = clock_timestamp(), oldest_at = '-infinity';
                 COMMIT",
            )
            .await?;
        Ok(())
    }
}

fn port(url: &str) -> Option<u16> {
    let host = url.rsplit_once('@').map_or(url, |(_, rest)| rest);
    let host = host.split('/').next()?;
    host.rsplit_once(':')?.1.parse().ok()
}
