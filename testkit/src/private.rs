//! A private `RabbitMQ` and Postgres pair that may be stopped, killed and started again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use crate::scratch::Servers;

/// `rabbitmq`, as `dev/servers` names it.
pub const RABBITMQ: &str = "rabbitmq";
/// `postgres`, as `dev/servers` names it.
pub const POSTGRES: &str = "postgres";

/// The pair; stopped when dropped, and its data deleted.
#[derive(Debug)]
pub struct Private {
    dir: PathBuf,
    variables: HashMap<String, String>,
}

impl Private {
    /// Starts a pair with its data in a new folder below `parent`.
    ///
    /// # Errors
    /// If `dev/servers` cannot.
    pub async fn start(parent: &Path) -> Result<Self, String> {
        let name = format!(
            "servers-{}-{:06x}",
            std::process::id(),
            rand::random::<u32>() >> 8
        );
        let dir = parent.join(name);
        let printed = dev_servers(&["private", &dir.display().to_string()]).await?;
        // Lines of the form: export NAME='value'
        let variables = printed
            .lines()
            .filter_map(|line| line.strip_prefix("export ")?.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned()))
            .collect();
        Ok(Self { dir, variables })
    }

    /// Where they are.
    ///
    /// # Errors
    /// If `dev/servers` did not say.
    pub fn servers(&self) -> Result<Servers, String> {
        let get = |name: &str| {
            let value = self.variables.get(name).map(String::as_str);
            value.ok_or_else(|| format!("dev/servers did not print {name}"))
        };
        Servers::new(
            get("POSTROOM_TEST_AMQP_URL")?,
            Some(get("POSTROOM_TEST_AMQP_MANAGEMENT_URL")?),
            get("POSTROOM_TEST_DATABASE_URL")?,
        )
    }

    /// Orderly stop of one server.
    ///
    /// # Errors
    /// If `dev/servers` cannot.
    pub async fn halt(&self, server: &str) -> Result<(), String> {
        self.act("halt", server).await
    }

    /// SIGKILL (for Postgres its equivalent without orphans).
    ///
    /// # Errors
    /// If `dev/servers` cannot.
    pub async fn kill(&self, server: &str) -> Result<(), String> {
        self.act("kill", server).await
    }

    /// The broker's memory alarm: it blocks whoever publishes.
    ///
    /// # Errors
    /// If `dev/servers` cannot.
    pub async fn alarm(&self) -> Result<(), String> {
        self.act("alarm", RABBITMQ).await
    }

    /// The end of it.
    ///
    /// # Errors
    /// If `dev/servers` cannot.
    pub async fn calm(&self) -> Result<(), String> {
        self.act("calm", RABBITMQ).await
    }

    /// Sets what `RabbitMQ` reads at its next start, in the form of `advanced.config`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn configure_rabbitmq(&self, settings: &str) -> std::io::Result<()> {
        std::fs::write(self.dir.join("rabbitmq/advanced.config"), settings)
    }

    /// Starts it again with its ports and data.
    ///
    /// # Errors
    /// If `dev/servers` cannot.
    pub async fn start_again(&self, server: &str) -> Result<(), String> {
        self.act("start", server).await
    }

    async fn act(&self, action: &str, server: &str) -> Result<(), String> {
        dev_servers(&[action, &self.dir.display().to_string(), server])
            .await
            .map(drop)
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // Stopping is not worth waiting for a runtime that may be ending.
        let stopped = std::process::Command::new(script())
            .arg("stop")
            .arg(&self.dir)
            .status();
        if !stopped.is_ok_and(|status| status.success()) {
            eprintln!("{} is left running", self.dir.display());
        }
    }
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../dev/servers")
}

async fn dev_servers(arguments: &[&str]) -> Result<String, String> {
    let failed = |why: &dyn std::fmt::Display| format!("dev/servers {}: {why}", arguments.join(" "));
    // Standard error goes where ours goes: the servers inherit it, and reading a pipe would wait until they end.
    let output = Command::new(script())
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .await
        .map_err(|error| failed(&error))?;
    if !output.status.success() {
        return Err(failed(&output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
