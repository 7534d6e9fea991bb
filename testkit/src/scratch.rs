//! A `RabbitMQ` virtual host and a Postgres database of one's own on the servers named by the environment, deleted at the
//! end. `dev/servers` names the servers.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use reqwest::{Client, Method, StatusCode, Url};
use tokio_postgres::NoTls;

/// Time limit of one request to a server.
const LIMIT: Duration = Duration::from_secs(30);
/// How often a connection is asked to close.
const CLOSINGS: usize = 5;

/// Servers on which vhosts and databases may be created.
#[derive(Debug, Clone)]
pub struct Servers {
    amqp: Url,
    management: Url,
    database: Url,
}

impl Servers {
    /// The servers named by `POSTROOM_TEST_AMQP_URL`, `POSTROOM_TEST_AMQP_MANAGEMENT_URL` and
    /// `POSTROOM_TEST_DATABASE_URL`.
    ///
    /// # Errors
    /// If one is not set, saying how to get it.
    pub fn from_env() -> Result<Self, String> {
        let get = |name: &str| {
            std::env::var(name).map_err(|_| {
                format!("{name} is not set: run `make test`, or first eval \"$(dev/servers up)\"")
            })
        };
        Self::new(
            &get("POSTROOM_TEST_AMQP_URL")?,
            std::env::var("POSTROOM_TEST_AMQP_MANAGEMENT_URL").ok().as_deref(),
            &get("POSTROOM_TEST_DATABASE_URL")?,
        )
    }

    /// Servers given by URLs; the management API is by default at the broker's host, port 15672.
    ///
    /// # Errors
    /// If one is not a URL.
    pub fn new(amqp: &str, management: Option<&str>, database: &str) -> Result<Self, String> {
        let parse = |what: &str, text: &str| Url::parse(text).map_err(|error| format!("{what}: {error}"));
        let amqp = parse("the AMQP URL", amqp)?;
        let management = match management {
            Some(text) => parse("the management URL", text)?,
            None => default_management(&amqp)?,
        };
        Ok(Self {
            management,
            database: parse("the database URL", database)?,
            amqp,
        })
    }

    /// Where the management API and its web pages are, without credentials.
    #[must_use]
    pub fn management_url(&self) -> Url {
        let mut url = self.management.clone();
        // Both fail only for URLs without a host.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        url
    }

    /// One request to the management API; `path` begins behind `/api/`.
    ///
    /// # Errors
    /// If it is not answered with success; 404 is success for DELETE.
    pub async fn management(&self, method: Method, path: &str, body: Option<&str>) -> Result<String, String> {
        let user = percent_decoded(self.management.username());
        let password = percent_decoded(self.management.password().unwrap_or_default());
        let url = self.management_url();
        let url = format!("{}/api/{path}", url.as_str().trim_end_matches('/'));
        let mut request = http_client()?
            .request(method.clone(), &url)
            .basic_auth(user, Some(password));
        if let Some(body) = body {
            request = request
                .header("content-type", "application/json")
                .body(body.to_owned());
        }
        let response = request
            .send()
            .await
            .map_err(|error| format!("management API: {error}"))?;
        let status = response.status();
        let text = response.text().await.unwrap_or_default();
        if status.is_success() || (method == Method::DELETE && status == StatusCode::NOT_FOUND) {
            Ok(text)
        } else {
            Err(format!("management API: {status} for {method} {path}: {text}"))
        }
    }

    /// Runs statements on the database server, in the database that its URL names.
    ///
    /// # Errors
    /// If it refuses or cannot be reached.
    pub async fn sql(&self, statement: &str) -> Result<(), String> {
        let connecting = tokio_postgres::connect(self.database.as_str(), NoTls);
        let (client, connection) = tokio::time::timeout(LIMIT, connecting)
            .await
            .map_err(|_| "Postgres does not answer".to_owned())?
            .map_err(|error| format!("Postgres: {error}"))?;
        let driver = tokio::spawn(connection);
        let result = tokio::time::timeout(LIMIT, client.batch_execute(statement)).await;
        driver.abort();
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("{statement}: {error:?}")),
            Err(_) => Err(format!("{statement}: no answer in time")),
        }
    }
}

/// A vhost and a database, both empty and named alike. [`Scratch::remove`] or dropping it deletes them.
#[derive(Debug)]
pub struct Scratch {
    servers: Servers,
    name: String,
    keep: bool,
}

impl Scratch {
    /// Creates both.
    ///
    /// # Errors
    /// If a server refuses or cannot be reached.
    pub async fn create(servers: Servers) -> Result<Self, String> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "postroom_run_{}_{}_{:06x}",
            std::process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed),
            rand::random::<u32>() & 0x00ff_ffff,
        );
        let scratch = Self {
            servers,
            name,
            keep: false,
        };
        let database = format!("CREATE DATABASE {}", scratch.name);
        tokio::try_join!(scratch.create_vhost(), scratch.servers.sql(&database))?;
        Ok(scratch)
    }

    async fn create_vhost(&self) -> Result<(), String> {
        let user = percent_decoded(self.servers.amqp.username());
        let user = if user.is_empty() { "guest".to_owned() } else { user };
        self.servers
            .management(Method::PUT, &format!("vhosts/{}", self.name), Some("{}"))
            .await?;
        let all = r#"{"configure": ".*", "write": ".*", "read": ".*"}"#;
        let path = format!("permissions/{}/{}", self.name, percent_encoded(&user));
        self.servers
            .management(Method::PUT, &path, Some(all))
            .await
            .map(drop)
    }

    /// The servers it is on.
    #[must_use]
    pub fn servers(&self) -> &Servers {
        &self.servers
    }

    /// Name of the vhost and of the database.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// AMQP URL of the vhost.
    #[must_use]
    pub fn amqp_url(&self) -> String {
        with_path(&self.servers.amqp, &self.name)
    }

    /// URL of the database.
    #[must_use]
    pub fn database_url(&self) -> String {
        with_path(&self.servers.database, &self.name)
    }

    /// Names of the AMQP connections to the vhost. The broker lists them with some seconds' delay.
    ///
    /// # Errors
    /// If the management API refuses.
    pub async fn connections(&self) -> Result<Vec<String>, String> {
        let path = format!("vhosts/{}/connections", self.name);
        let listed = self.servers.management(Method::GET, &path, None).await?;
        let listed: Vec<serde_json::Value> =
            serde_json::from_str(&listed).map_err(|error| format!("management API: {error}"))?;
        let names = listed.iter().filter_map(|connection| connection["name"].as_str());
        Ok(names.map(str::to_owned).collect())
    }

    /// Closes these connections from the broker's side.
    ///
    /// # Errors
    /// If the management API refuses.
    pub async fn close_connections(&self, names: &[String]) -> Result<(), String> {
        for name in names {
            let path = format!("connections/{}", percent_encoded(name));
            let mut tries = 1;
            // A broker with much to do gives up waiting for the connection's process (500), which then ends all the same.
            while let Err(error) = self.servers.management(Method::DELETE, &path, None).await {
                if tries == CLOSINGS {
                    return Err(error);
                }
                tries += 1;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
        Ok(())
    }

    /// Leaves both behind when dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Deletes both, disconnecting whoever still uses them.
    ///
    /// # Errors
    /// If a server refuses.
    pub async fn remove(mut self) -> Result<(), String> {
        self.keep = true;
        self.delete().await
    }

    async fn delete(&self) -> Result<(), String> {
        let vhost = format!("vhosts/{}", self.name);
        let database = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        let (vhost, database) = tokio::join!(
            self.servers.management(Method::DELETE, &vhost, None),
            self.servers.sql(&database)
        );
        vhost.map(drop).and(database)
    }
}

impl Drop for Scratch {
    /// On a thread of its own: this may run inside a runtime, and must also run when a test panics.
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        std::thread::scope(|scope| {
            let deleting = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.map_err(|error| error.to_string()).and_then(|runtime| {
                    let limited = async { tokio::time::timeout(LIMIT, self.delete()).await };
                    runtime
                        .block_on(limited)
                        .unwrap_or_else(|_| Err("no answer in time".to_owned()))
                })
            });
            if let Ok(Err(error)) = deleting.join() {
                eprintln!("{} is left behind: {error}", self.name);
            }
        });
    }
}

/// Per call: a client must not outlive the runtime it was first used in.
fn http_client() -> Result<Client, String> {
    static PROVIDER: OnceLock<()> = OnceLock::new();
    PROVIDER.get_or_init(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    Client::builder()
        .timeout(LIMIT)
        .no_proxy()
        .build()
        .map_err(|error| format!("HTTP client: {error}"))
}

fn default_management(amqp: &Url) -> Result<Url, String> {
    let scheme = if amqp.scheme() == "amqps" { "https" } else { "http" };
    let host = amqp.host_str().ok_or("the AMQP URL has no host")?;
    let mut url = Url::parse(&format!("{scheme}://{host}:15672"))
        .map_err(|error| format!("management URL: {error}"))?;
    let user = if amqp.username().is_empty() {
        "guest"
    } else {
        amqp.username()
    };
    let _ = url.set_username(user);
    let _ = url.set_password(Some(amqp.password().unwrap_or("guest")));
    Ok(url)
}

fn with_path(url: &Url, path: &str) -> String {
    let mut url = url.clone();
    url.set_path(&format!("/{path}"));
    url.into()
}

fn percent_encoded(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.') {
            out.push(byte.into());
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let hex = |digits: &[u8]| {
            std::str::from_utf8(digits)
                .ok()
                .and_then(|digits| u8::from_str_radix(digits, 16).ok())
        };
        if let (b'%', Some(byte)) = (first, tail.get(..2).and_then(hex)) {
            bytes.push(byte);
            rest = &tail[2..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_management_url_follows_from_the_amqp_url() {
        let url = |amqp: &str| {
            default_management(&Url::parse(amqp).unwrap())
                .unwrap()
                .to_string()
        };
        assert_eq!(url("amqp://u:p%40x@mq:5672/vh"), "http://u:p%40x@mq:15672/");
        assert_eq!(url("amqp://127.0.0.1"), "http://guest:guest@127.0.0.1:15672/");
    }

    #[test]
    fn credentials_are_decoded_for_basic_auth() {
        assert_eq!(percent_decoded("p%40x%"), "p@x%");
        assert_eq!(percent_encoded("127.0.0.1:1 -> b"), "127.0.0.1%3A1%20-%3E%20b");
    }
}
