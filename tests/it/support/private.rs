//! A private `RabbitMQ` and Postgres pair that a test may stop, kill and start again.

use std::collections::HashMap;
use std::path::PathBuf;

use postroom_testkit::scratch::Servers;
use tokio::process::Command;

/// `rabbitmq` or `postgres`, as `dev/servers` names them.
pub(crate) const RABBITMQ: &str = "rabbitmq";
pub(crate) const POSTGRES: &str = "postgres";

/// The pair; stopped when dropped.
pub(crate) struct Private {
    dir: PathBuf,
    variables: HashMap<String, String>,
}

impl Private {
    pub(crate) async fn start() -> Self {
        let name = format!(
            "servers-{}-{:06x}",
            std::process::id(),
            rand::random::<u32>() >> 8
        );
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        let printed = dev_servers(&["private", dir.to_str().unwrap()]).await;
        // Lines of the form: export NAME='value'
        let variables = printed
            .lines()
            .filter_map(|line| line.strip_prefix("export ")?.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned()))
            .collect();
        Self { dir, variables }
    }

    pub(crate) fn servers(&self) -> Servers {
        let get = |name: &str| self.variables[name].as_str();
        Servers::new(
            get("POSTROOM_TEST_AMQP_URL"),
            Some(get("POSTROOM_TEST_AMQP_MANAGEMENT_URL")),
            get("POSTROOM_TEST_DATABASE_URL"),
        )
        .unwrap()
    }

    /// Orderly stop of one server.
    pub(crate) async fn halt(&self, server: &str) {
        self.act("halt", server).await;
    }

    /// SIGKILL (for Postgres its equivalent without orphans).
    pub(crate) async fn kill(&self, server: &str) {
        self.act("kill", server).await;
    }

    /// The broker's memory alarm: it blocks whoever publishes.
    pub(crate) async fn alarm(&self) {
        self.act("alarm", RABBITMQ).await;
    }

    /// The end of it.
    pub(crate) async fn calm(&self) {
        self.act("calm", RABBITMQ).await;
    }

    /// Starts it again with its ports and data.
    pub(crate) async fn start_again(&self, server: &str) {
        self.act("start", server).await;
    }

    /// Sets what `RabbitMQ` reads at its next start, in the form of `advanced.config`.
    pub(crate) fn configure_rabbitmq(&self, settings: &str) {
        std::fs::write(self.dir.join("rabbitmq/advanced.config"), settings).unwrap();
    }

    async fn act(&self, action: &str, server: &str) {
        dev_servers(&[action, self.dir.to_str().unwrap(), server]).await;
    }
}

impl Drop for Private {
    fn drop(&mut self) {
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
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("dev/servers")
}

async fn dev_servers(arguments: &[&str]) -> String {
    // Standard error to a file: the servers inherit it, and reading a pipe would wait until they end.
    let output = Command::new(script())
        .args(arguments)
        .stderr(std::process::Stdio::inherit())
        .output()
        .await
        .unwrap();
    assert!(output.status.success(), "dev/servers {arguments:?} failed");
    String::from_utf8(output.stdout).unwrap()
}
