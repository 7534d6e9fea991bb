//! Tenants, accounts, endpoint, workers and bridges, set up as an operator does.

use std::time::Duration;

use tokio::sync::Mutex;

use super::{BUCKET, Installation, PASSWORD, Place, host_of, parse};
use crate::chaos::Settings;
use crate::chaos::plan::{LARGE, TENANTS, Tenant, limit};
use crate::chaos::process::{Recipe, Slot};
use crate::chaos::smtp_moods::FINAL_TIMEOUT;
use crate::proxy::Proxy;
use crate::s3::S3Server;
use crate::scratch::Scratch;

impl Installation {
    pub(super) async fn set_up(&mut self, settings: &Settings) -> Result<(), String> {
        let key = self.postroom(&["key", "generate"], "").await?;
        self.variables
            .push(("POSTROOM_ENCRYPTION_KEYS".to_owned(), key.trim().to_owned()));
        self.postroom(&["migrate"], "").await?;
        self.postroom(&["topology", "apply"], "").await?;
        for tenant in &TENANTS {
            self.tenant(tenant, settings).await?;
        }
        self.account("-", "platform", 0, &[]).await?;
        let url = format!("http://{}/hook", self.hooks.1.address());
        // One for all: also for those that do not exist.
        self.postroom(&["endpoint", "set", "-", "--url", &url, "--all"], "")
            .await?;
        for number in 1..=settings.workers {
            let place = self.place("worker", number).await?;
            self.workers.push(place);
        }
        for number in 1..=settings.bridges {
            let place = self.place("bridge", number).await?;
            self.bridges.push(place);
        }
        for place in self.workers.iter().chain(&self.bridges) {
            place.slot.lock().await.ready(&self.http).await?;
        }
        Ok(())
    }

    async fn tenant(&self, tenant: &Tenant, settings: &Settings) -> Result<(), String> {
        let large = LARGE.to_string();
        let mut arguments = vec!["tenant", "set", tenant.name];
        if tenant.hold {
            arguments.extend(["--on-uncertain", "hold"]);
        }
        if tenant.fallback {
            arguments.extend(["--fallback", "platform"]);
        }
        if tenant.links {
            arguments.extend(["--large-file-bytes", &large, "--large-file-action", "rewrite"]);
        }
        self.postroom(&arguments, "").await?;
        let limit = format!("{}/{}s", limit(settings), settings.window.as_secs());
        let more = if tenant.limited {
            vec!["--limit", limit.as_str()]
        } else {
            Vec::new()
        };
        self.account(tenant.name, tenant.name, tenant.server, &more).await
    }

    async fn account(&self, tenant: &str, login: &str, server: usize, more: &[&str]) -> Result<(), String> {
        let port = self.mail[server].proxy.port().to_string();
        let from = format!("shop@{login}.example");
        let mut arguments = vec![
            "account",
            "set",
            tenant,
            "main",
            "--host",
            "127.0.0.1",
            "--port",
            &port,
        ];
        arguments.extend([
            "--tls",
            "starttls",
            "--from",
            &from,
            "--username",
            login,
            "--password-stdin",
        ]);
        // Faults are not to use up the retries: every job has one outcome that can be foretold.
        arguments.extend(["--max-attempts", "1000", "--max-age", "1d"]);
        arguments.extend(more);
        self.postroom(&arguments, PASSWORD).await.map(drop)
    }

    async fn place(&self, role: &'static str, number: usize) -> Result<Place, String> {
        let rabbit = Proxy::start(host_of(&self.scratch.amqp_url())?).await;
        let postgres = Proxy::start(host_of(&self.scratch.database_url())?).await;
        let mut variables = self.variables.clone();
        // Dead connections are noticed within seconds.
        let amqp = through(&self.scratch.amqp_url(), &rabbit)? + "?heartbeat=4";
        variables.push(("POSTROOM_AMQP_URL".to_owned(), amqp));
        let database = through(&self.scratch.database_url(), &postgres)?;
        variables.push(("POSTROOM_DATABASE_URL".to_owned(), database));
        let slot = Slot::start(Recipe {
            role,
            number,
            program: self.program.clone(),
            variables,
            folder: self.folder.clone(),
        })?;
        Ok(Place {
            slot: Mutex::new(slot),
            rabbit,
            postgres,
        })
    }
}

/// Settings of all processes, short enough for a campaign.
pub(super) fn variables(
    settings: &Settings,
    scratch: &Scratch,
    store: &S3Server,
    proxy: &Proxy,
) -> Vec<(String, String)> {
    let millis = |time: Duration| format!("{}ms", time.as_millis());
    let mut variables: Vec<(String, String)> = [
        ("POSTROOM_AMQP_URL", scratch.amqp_url()),
        ("POSTROOM_DATABASE_URL", scratch.database_url()),
        ("POSTROOM_EGRESS_ALLOW", "127.0.0.0/8".to_owned()),
        ("POSTROOM_STORAGE_URL", format!("s3://{BUCKET}/mail")),
        ("POSTROOM_LEASE", millis(settings.lease)),
        ("POSTROOM_CONCURRENCY", "32".to_owned()),
        ("POSTROOM_GRACE_PERIOD", "25s".to_owned()),
        ("POSTROOM_RETRY_BASE", "300ms".to_owned()),
        ("POSTROOM_RETRY_CAP", "3s".to_owned()),
        // A server that was away is tried again as soon as a retry would.
        ("POSTROOM_BREAKER_COOLDOWN", "500ms".to_owned()),
        ("POSTROOM_BREAKER_COOLDOWN_CAP", "3s".to_owned()),
        ("POSTROOM_SMTP_CONNECT_TIMEOUT", "2s".to_owned()),
        ("POSTROOM_SMTP_GREETING_TIMEOUT", "3s".to_owned()),
        ("POSTROOM_SMTP_COMMAND_TIMEOUT", "3s".to_owned()),
        ("POSTROOM_SMTP_WRITE_TIMEOUT", "3s".to_owned()),
        ("POSTROOM_SMTP_FINAL_TIMEOUT", millis(FINAL_TIMEOUT)),
        ("POSTROOM_SMTP_ATTEMPT_TIMEOUT", "5s".to_owned()),
        ("POSTROOM_ATTACHMENT_TIMEOUT", "5s".to_owned()),
        ("POSTROOM_WEBHOOK_TIMEOUT", "2s".to_owned()),
        ("POSTROOM_WEBHOOK_PER_ENDPOINT", "32".to_owned()),
        ("POSTROOM_WEBHOOK_RETRY_SCALE", "0.004".to_owned()),
        ("POSTROOM_LOG", "info,postroom=debug".to_owned()),
        ("POSTROOM_LOG_FORMAT", "human".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec();
    for (name, value) in store.env() {
        let value = match name.as_str() {
            "AWS_ENDPOINT_URL" => format!("http://{}", proxy.address()),
            _ => value,
        };
        variables.push((name, value));
    }
    variables
}

/// The same URL by way of a proxy.
fn through(url: &str, proxy: &Proxy) -> Result<String, String> {
    let mut url = parse(url)?;
    url.set_host(Some("127.0.0.1"))
        .map_err(|error| error.to_string())?;
    url.set_port(Some(proxy.port()))
        .map_err(|()| "a URL of ours without a port")?;
    Ok(url.to_string())
}
