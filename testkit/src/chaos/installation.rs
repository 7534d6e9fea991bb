//! Everything a campaign needs, each with a proxy in between: servers, SMTP servers, object store, webhook receiver, workers
//! and bridges.

mod set_up;

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use jiff::Timestamp;
use reqwest::Url;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_postgres::NoTls;

use super::Settings;
use super::plan::{SERVERS, TENANTS};
use super::process::{Slot, command};
use super::smtp_moods::Recipients;
use crate::private::Private;
use crate::proxy::Proxy;
use crate::s3::S3Server;
use crate::scratch::Scratch;
use crate::smtp::{SmtpServer, TlsSetup};
use crate::tls::TestCa;
use crate::webhook::WebhookReceiver;

const COMMAND_LIMIT: Duration = Duration::from_mins(1);
const BUCKET: &str = "chaos";
const PASSWORD: &str = "not-a-secret";

/// A process and its networks.
#[derive(Debug)]
pub struct Place {
    /// The process.
    pub slot: Mutex<Slot>,
    /// Between it and `RabbitMQ`.
    pub rabbit: Proxy,
    /// Between it and Postgres.
    pub postgres: Proxy,
}

/// An SMTP server of the campaign.
#[derive(Debug)]
pub struct MailServer {
    /// The server.
    pub server: SmtpServer,
    /// Between the workers and it.
    pub proxy: Proxy,
    /// Whom it knows.
    pub recipients: Recipients,
    /// Held while its mood is changed.
    pub mood: Mutex<()>,
}

/// The whole installation.
#[derive(Debug)]
pub struct Installation {
    // First: processes are killed before what they talk to goes away.
    /// Workers.
    pub workers: Vec<Place>,
    /// Bridges.
    pub bridges: Vec<Place>,
    /// SMTP servers.
    pub mail: Vec<MailServer>,
    /// Object store, and the network to it.
    pub store: (S3Server, Proxy),
    /// Webhook receiver, and the network to it.
    pub hooks: (WebhookReceiver, Proxy),
    /// The vhost and the database.
    pub scratch: Scratch,
    /// The servers; stopped last.
    pub private: Private,
    /// Held while a server is restarted.
    pub restarting: Mutex<()>,
    /// The beginning, for dates in jobs.
    pub start: Timestamp,
    /// For `/readyz`.
    pub http: reqwest::Client,
    program: PathBuf,
    variables: Vec<(String, String)>,
    /// Logs.
    pub folder: PathBuf,
}

impl Installation {
    /// Starts everything and waits until it is ready.
    ///
    /// # Errors
    /// With what could not be started.
    pub async fn start(settings: &Settings) -> Result<Self, String> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let io = |error: std::io::Error| error.to_string();
        let private = Private::start(&settings.folder).await?;
        let mut scratch = Scratch::create(private.servers()?).await?;
        // It goes with its servers.
        scratch.keep();
        let ca = TestCa::new();
        let ca_file = settings.folder.join("ca.pem");
        std::fs::write(&ca_file, ca.ca_pem()).map_err(io)?;
        let mut mail = Vec::new();
        for number in 0..SERVERS {
            mail.push(mail_server(number, &ca, settings.seed).await);
        }
        let store = S3Server::start(BUCKET).await.map_err(io)?;
        let store_proxy = Proxy::start(host_of(&store.endpoint())?).await;
        let hooks = WebhookReceiver::start().await.map_err(io)?;
        let hooks_proxy = Proxy::start(hooks.address().to_string()).await;
        let mut town = Self {
            workers: Vec::new(),
            bridges: Vec::new(),
            mail,
            hooks: (hooks, hooks_proxy),
            variables: set_up::variables(settings, &scratch, &store, &store_proxy),
            store: (store, store_proxy),
            scratch,
            private,
            restarting: Mutex::default(),
            start: Timestamp::now(),
            http: client()?,
            program: settings.program.clone(),
            folder: settings.folder.clone(),
        };
        town.variables
            .push(("POSTROOM_SMTP_CA_FILE".to_owned(), ca_file.display().to_string()));
        town.set_up(settings).await?;
        Ok(town)
    }

    /// Runs a command, past the proxies, and gives its output.
    ///
    /// # Errors
    /// If it fails or does not end.
    pub async fn postroom(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        use tokio::io::AsyncWriteExt as _;
        let failed = |why: &dyn std::fmt::Display| format!("postroom {}: {why}", arguments.join(" "));
        let mut child = command(&self.program, &self.variables)
            .env("POSTROOM_AMQP_URL", self.scratch.amqp_url())
            .env("POSTROOM_DATABASE_URL", self.scratch.database_url())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(&error))?;
        if let Some(mut stdin) = child.stdin.take() {
            // A command that does not read its input closes the pipe.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        let output = timeout(COMMAND_LIMIT, child.wait_with_output())
            .await
            .map_err(|_| failed(&"does not end"))?
            .map_err(|error| failed(&error))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(failed(&String::from_utf8_lossy(&output.stderr).trim()))
        }
    }

    /// A connection to the database, past the proxies, whose search path is the installation's schema.
    ///
    /// # Errors
    /// If there is none.
    pub async fn sql(&self) -> Result<tokio_postgres::Client, String> {
        let url = self.scratch.database_url();
        let connecting = tokio_postgres::connect(&url, NoTls);
        let (client, connection) = timeout(Duration::from_secs(5), connecting)
            .await
            .map_err(|_| "Postgres does not answer".to_owned())?
            .map_err(|error| format!("Postgres: {error}"))?;
        tokio::spawn(connection);
        client
            .batch_execute("SET search_path TO postroom")
            .await
            .map_err(|error| format!("Postgres: {error}"))?;
        Ok(client)
    }

    /// Ends all processes with SIGTERM; what did not end well.
    pub async fn end(&self) -> Vec<String> {
        let places = self.workers.iter().chain(&self.bridges);
        let ends = places.map(|place| async { place.slot.lock().await.term().await.err() });
        futures_util::future::join_all(ends)
            .await
            .into_iter()
            .flatten()
            .collect()
    }
}

async fn mail_server(number: usize, ca: &TestCa, seed: u64) -> MailServer {
    let recipients = Recipients::default();
    let mut builder = SmtpServer::builder()
        .tls(TlsSetup::StartTls(ca.server(&["127.0.0.1"])))
        .auth_in_plain(false)
        .script(recipients.script(None, seed));
    let logins = TENANTS
        .iter()
        .filter(|tenant| tenant.server == number)
        .map(|tenant| tenant.name);
    for login in logins.chain(std::iter::once("platform")) {
        builder = builder.auth(login, PASSWORD);
    }
    let server = builder.start().await;
    MailServer {
        proxy: Proxy::start(server.addr().to_string()).await,
        server,
        recipients,
        mood: Mutex::default(),
    }
}

fn client() -> Result<reqwest::Client, String> {
    reqwest::Client::builder()
        .timeout(Duration::from_secs(5))
        .no_proxy()
        .build()
        .map_err(|error| format!("HTTP client: {error}"))
}

fn parse(url: &str) -> Result<Url, String> {
    Url::parse(url).map_err(|error| format!("a URL of ours: {error}"))
}

/// `host:port` of a URL that names both.
fn host_of(url: &str) -> Result<String, String> {
    let url = parse(url)?;
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => Ok(format!("{host}:{port}")),
        _ => Err("a URL of ours without host or port".to_owned()),
    }
}
