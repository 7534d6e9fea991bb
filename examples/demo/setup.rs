//! Everything the demo talks to, brought up as a user would: a vhost and a database of its own, servers in this process,
//! tenants and accounts through the command line, two workers and a bridge.

mod tenants;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use jiff::Timestamp;
use postroom_testkit::files::{Answer, FileServer};
use postroom_testkit::s3::S3Server;
use postroom_testkit::scratch::{Scratch, Servers};
use postroom_testkit::smtp::TlsSetup;
use postroom_testkit::smtp::{Script, SmtpServer};
use postroom_testkit::tls::TestCa;
use postroom_testkit::webhook::WebhookReceiver;

use crate::plan::{Delivered, File, LARGE_FILE_BYTES, OWN_LOGIN, SealingKey, Surroundings};
use crate::process::{Postroom, Process};
use crate::screen::Screen;
use tenants::{LOGINS, hook_path};

const BUCKET: &str = "demo";
const WORKERS: usize = 2;

/// The whole installation. All of it is gone when this is dropped.
pub(crate) struct World {
    // First: processes are killed before what they talk to goes away.
    pub(crate) workers: Vec<Process>,
    pub(crate) bridge: Vec<Process>,
    pub(crate) postroom: Postroom,
    pub(crate) http: reqwest::Client,
    pub(crate) smtp: SmtpServer,
    /// The server that jobs bring along.
    pub(crate) own: SmtpServer,
    pub(crate) s3: S3Server,
    files: FileServer,
    pub(crate) hooks: WebhookReceiver,
    /// Signing secrets by tenant.
    secrets: HashMap<&'static str, String>,
    /// Passwords of the SMTP users.
    passwords: HashMap<&'static str, String>,
    own_password: String,
    override_key: String,
    /// Logs and the file of variables.
    pub(crate) folder: PathBuf,
    pub(crate) scratch: Scratch,
}

impl World {
    /// Brings everything up, printing the commands.
    pub(crate) async fn bring_up(screen: &Screen) -> Result<Self, String> {
        // reqwest is built without a provider of its own.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut world = Box::pin(Self::servers()).await?;
        screen.heading("Setting up");
        world.keys(screen).await?;
        world.command(screen, &["migrate"], "").await?;
        world.tenants(screen).await?;
        world.endpoints(screen).await?;
        world.processes(screen).await?;
        Ok(world)
    }

    async fn servers() -> Result<Self, String> {
        let io = |error: std::io::Error| error.to_string();
        let mut postroom = Postroom::find()?;
        let scratch = Scratch::create(Servers::from_env()?).await?;
        let folder = folder(&postroom.program, scratch.name())?;

        let ca = TestCa::new();
        let cert = ca.server(&["127.0.0.1", "localhost"]);
        let own_password = password();
        let mut smtp = SmtpServer::builder()
            .tls(TlsSetup::StartTls(cert.clone()))
            .auth_in_plain(false)
            .script(moods());
        let passwords: HashMap<_, _> = LOGINS.iter().map(|login| (login.2, password())).collect();
        for (login, password) in &passwords {
            smtp = smtp.auth(login, password);
        }
        let own = SmtpServer::builder()
            .tls(TlsSetup::Implicit(cert))
            .auth(OWN_LOGIN, &own_password);
        let (smtp, own) = tokio::join!(smtp.start(), own.start());
        let s3 = S3Server::start(BUCKET).await.map_err(io)?;

        let ca_file = folder.join("ca.pem");
        std::fs::write(&ca_file, ca.ca_pem()).map_err(io)?;
        for (name, value) in [
            ("POSTROOM_AMQP_URL", scratch.amqp_url()),
            ("POSTROOM_DATABASE_URL", scratch.database_url()),
            ("POSTROOM_SMTP_CA_FILE", ca_file.display().to_string()),
            ("POSTROOM_STORAGE_URL", format!("s3://{BUCKET}/mail")),
            // All servers of the demo are on this machine.
            ("POSTROOM_EGRESS_ALLOW", "127.0.0.0/8".to_owned()),
            // Deferred mail comes back soon enough to watch it.
            ("POSTROOM_RETRY_BASE", "1s".to_owned()),
            ("POSTROOM_LOG_FORMAT", "human".to_owned()),
        ] {
            postroom.set(name, value);
        }
        for (name, value) in s3.env() {
            postroom.set(&name, value);
        }
        Ok(Self {
            workers: Vec::new(),
            bridge: Vec::new(),
            postroom,
            http: client()?,
            smtp,
            own,
            s3,
            files: FileServer::start().await.map_err(io)?,
            hooks: WebhookReceiver::start().await.map_err(io)?,
            secrets: HashMap::new(),
            passwords,
            own_password,
            override_key: String::new(),
            folder,
            scratch,
        })
    }

    /// Runs a command, showing it.
    async fn command(&self, screen: &Screen, arguments: &[&str], input: &str) -> Result<String, String> {
        let quoted = |argument: &&str| {
            if argument.contains([' ', '<', '\'']) {
                format!("'{argument}'")
            } else {
                (*argument).to_owned()
            }
        };
        let mut shown: Vec<String> = arguments.iter().map(quoted).collect();
        if !input.is_empty() {
            shown.push("< password".to_owned());
        }
        screen.command(&format!("postroom {}", shown.join(" ")));
        self.postroom.run(arguments, input).await
    }

    async fn keys(&mut self, screen: &Screen) -> Result<(), String> {
        let key = self.command(screen, &["key", "generate"], "").await?;
        self.postroom.set("POSTROOM_ENCRYPTION_KEYS", key.trim());
        let key = self
            .command(screen, &["key", "generate", "--id", "overrides"], "")
            .await?;
        self.postroom.set("POSTROOM_OVERRIDE_KEYS", key.trim());
        key.trim().clone_into(&mut self.override_key);
        Ok(())
    }

    async fn processes(&mut self, screen: &Screen) -> Result<(), String> {
        for number in 1..=WORKERS {
            screen.command("postroom worker &");
            let name = format!("worker-{number}");
            self.workers
                .push(self.postroom.start("worker", &name, &self.folder)?);
        }
        screen.command("postroom bridge &");
        self.bridge
            .push(self.postroom.start("bridge", "bridge", &self.folder)?);
        for process in self.workers.iter_mut().chain(&mut self.bridge) {
            process.ready(&self.http).await?;
        }
        Ok(())
    }

    /// The endpoint that a tenant's reports go to: its path and its secret.
    pub(crate) fn endpoint(&self, tenant: &str) -> (String, &str) {
        let of = |tenant: &str| {
            self.secrets
                .get(tenant)
                .map(|secret| (hook_path(tenant), secret.as_str()))
        };
        of(tenant).or_else(|| of("-")).unwrap_or_default()
    }

    /// What the jobs refer to.
    pub(crate) fn surroundings(&self) -> Result<Surroundings, String> {
        let put = |path: &str, file: File, failures: u64| {
            let answer = Answer::file(file.bytes.clone()).failing(failures);
            (self.files.put(path, answer), file)
        };
        let small = |n: usize| File::noise("guide.pdf", 50 + n, 3000, Delivered::Attached);
        let film = File::noise("film.mp4", 99, 3 * LARGE_FILE_BYTES, Delivered::Linked);
        Ok(Surroundings {
            now: Timestamp::now(),
            own_port: self.own.port(),
            own_password: self.own_password.clone(),
            sealing: SealingKey::parse(&self.override_key)?,
            fetched: vec![
                put("/guide-1.pdf", small(1), 0),
                put("/guide-2.pdf", small(2), 0),
                put("/guide-3.pdf", small(3), 0),
            ],
            fetched_late: put("/moody.pdf", small(4), 1),
            fetched_large: put("/film.mp4", film, 0),
        })
    }

    /// Stops the processes in order; what did not end well.
    pub(crate) async fn stop(&mut self) -> Vec<String> {
        let processes = self.workers.iter_mut().chain(&mut self.bridge);
        let ends = futures_util::future::join_all(processes.map(Process::stop)).await;
        self.workers.clear();
        self.bridge.clear();
        ends.into_iter().filter_map(Result::err).collect()
    }
}

/// What the SMTP server does to recipients: nobody is unknown; whoever is to get it later is deferred once.
fn moods() -> Script {
    let deferred: Mutex<HashSet<String>> = Mutex::default();
    Script::new().recipients_with(move |address| {
        if address.starts_with("nobody-") {
            return Some("550 5.1.1 No such user here".to_owned());
        }
        let first = address.starts_with("later-")
            && deferred
                .lock()
                .is_ok_and(|mut deferred| deferred.insert(address.to_owned()));
        first.then(|| "451 4.7.1 Greylisted, please try again".to_owned())
    })
}

fn password() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn client() -> Result<reqwest::Client, String> {
    reqwest::Client::builder()
        .timeout(Duration::from_secs(5))
        .no_proxy()
        .build()
        .map_err(|error| format!("HTTP client: {error}"))
}

/// `target/demo/<name>` for `target/release/postroom`.
fn folder(program: &Path, name: &str) -> Result<PathBuf, String> {
    let target = program.parent().and_then(Path::parent).unwrap_or(Path::new("."));
    let folder = target.join("demo").join(name);
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(folder)
}
