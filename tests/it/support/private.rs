//! A private `RabbitMQ` and Postgres pair that a test may stop, kill and start again.

use std::path::Path;

use postroom_testkit::private;
pub(crate) use postroom_testkit::private::{POSTGRES, RABBITMQ};
use postroom_testkit::scratch::Servers;

/// The pair; stopped when dropped.
pub(crate) struct Private(private::Private);

impl Private {
    pub(crate) async fn start() -> Self {
        let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
        Self(private::Private::start(parent).await.unwrap())
    }

    pub(crate) fn servers(&self) -> Servers {
        self.0.servers().unwrap()
    }

    /// Orderly stop of one server.
    pub(crate) async fn halt(&self, server: &str) {
        self.0.halt(server).await.unwrap();
    }

    /// SIGKILL (for Postgres its equivalent without orphans).
    pub(crate) async fn kill(&self, server: &str) {
        self.0.kill(server).await.unwrap();
    }

    /// The broker's memory alarm: it blocks whoever publishes.
    pub(crate) async fn alarm(&self) {
        self.0.alarm().await.unwrap();
    }

    /// The end of it.
    pub(crate) async fn calm(&self) {
        self.0.calm().await.unwrap();
    }

    /// Starts it again with its ports and data.
    pub(crate) async fn start_again(&self, server: &str) {
        self.0.start_again(server).await.unwrap();
    }

    /// Sets what `RabbitMQ` reads at its next start, in the form of `advanced.config`.
    pub(crate) fn configure_rabbitmq(&self, settings: &str) {
        self.0.configure_rabbitmq(settings).unwrap();
    }
}
