//! Everything that can be seen from outside, gathered once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::chaos::inject::Happened;
use crate::chaos::installation::Installation;
use crate::chaos::plan::Plan;
use crate::chaos::produce::Published;
use crate::smtp::{Received, Refused};
use crate::webhook::{Received as Request, Reply};

/// A mail at one of the SMTP servers.
#[derive(Debug)]
pub struct Mail {
    /// Which server, from 0.
    pub server: usize,
    /// The mail.
    pub received: Received,
}

/// A webhook.
#[derive(Debug)]
pub struct Hook {
    /// The event.
    pub event: String,
    /// The report.
    pub report: Value,
    /// When it came.
    pub at: SystemTime,
    /// Whether it was answered well.
    pub taken: bool,
}

impl Hook {
    fn new(request: &Request) -> Self {
        Self {
            event: request.event_id().to_owned(),
            report: request.json(),
            at: request.at,
            taken: matches!(request.reply, Reply::Status(200..300)),
        }
    }

    /// `mail.sent` and so on.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.report["type"].as_str().unwrap_or_default()
    }

    /// Whether nothing more follows.
    #[must_use]
    pub fn is_final(&self) -> bool {
        self.report["data"]["final"] == true
    }
}

/// All sides.
#[derive(Debug)]
pub struct Evidence {
    /// What was to be published.
    pub plan: Plan,
    /// What became of publishing it.
    pub published: Vec<Published>,
    /// The faults.
    pub happened: Vec<Happened>,
    /// Mails by job.
    pub mails: HashMap<String, Vec<Mail>>,
    /// Webhooks by job.
    pub hooks: HashMap<String, Vec<Hook>>,
    /// Webhooks about accounts.
    pub accounts: Vec<Hook>,
    /// How many webhooks came, and how many of them repeated an event.
    pub webhooks: usize,
    /// Repeats among them.
    pub repeated: usize,
    /// Refusals of the SMTP servers.
    pub refused: Vec<Refused>,
    /// Rows of the ledger by job.
    pub ledger: HashMap<String, String>,
    /// Dead letters.
    pub dead: Vec<Value>,
    /// Messages left in the queues after all processes have ended.
    pub queues: BTreeMap<String, u32>,
    /// When the last time was that the webhook receiver heard something, by instants comparable to those of faults.
    pub hook_times: Vec<Instant>,
    /// Logs.
    pub folder: PathBuf,
}

impl Evidence {
    /// Looks at everything.
    ///
    /// # Errors
    /// If something cannot be looked at.
    pub async fn gather(
        town: &Installation,
        plan: Plan,
        published: Vec<Published>,
        happened: Vec<Happened>,
    ) -> Result<Self, String> {
        let mut mails: HashMap<String, Vec<Mail>> = HashMap::new();
        let mut refused = Vec::new();
        for (server, place) in town.mail.iter().enumerate() {
            for received in place.server.received() {
                let id = received.header("X-Postroom-ID");
                mails.entry(id).or_default().push(Mail { server, received });
            }
            refused.extend(place.server.refused());
        }
        let requests = town.hooks.0.received();
        let mut hooks: HashMap<String, Vec<Hook>> = HashMap::new();
        let mut accounts = Vec::new();
        let mut events = HashSet::new();
        for request in &requests {
            let hook = Hook::new(request);
            events.insert(hook.event.clone());
            if hook.kind().starts_with("account.") {
                accounts.push(hook);
                continue;
            }
            let job = hook.report["data"]["job"].as_str().unwrap_or_default().to_owned();
            hooks.entry(job).or_default().push(hook);
        }
        let (now, today) = (Instant::now(), SystemTime::now());
        let instant = |at: SystemTime| now.checked_sub(today.duration_since(at).unwrap_or_default());
        let dead = town.postroom(&["dead", "list", "--json"], "").await?;
        Ok(Self {
            webhooks: requests.len(),
            repeated: requests.len() - events.len(),
            hook_times: requests
                .iter()
                .filter_map(|request| instant(request.at))
                .collect(),
            plan,
            published,
            happened,
            mails,
            hooks,
            accounts,
            refused,
            ledger: ledger(town).await?,
            dead: dead
                .lines()
                .map(|line| serde_json::from_str(line).map_err(|error| format!("dead letters: {error}")))
                .collect::<Result<_, _>>()?,
            queues: queues(town).await?,
            folder: town.folder.clone(),
        })
    }
}

async fn ledger(town: &Installation) -> Result<HashMap<String, String>, String> {
    let failed = |error: tokio_postgres::Error| format!("Postgres: {error}");
    let sql = town.sql().await?;
    let query = "SELECT id, (to_jsonb(job) - 'body' - 'digest' - 'properties')::text FROM job";
    let rows = sql.query(query, &[]).await.map_err(failed)?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Messages in the queues of jobs and reports, once the broker's figures have settled.
async fn queues(town: &Installation) -> Result<BTreeMap<String, u32>, String> {
    use lapin::options::QueueDeclareOptions;
    use lapin::types::FieldTable;
    use lapin::{Connection, ConnectionProperties};
    let failed = |error: lapin::Error| format!("RabbitMQ: {error}");
    let url = town.scratch.amqp_url();
    let connecting = Box::pin(Connection::connect(&url, ConnectionProperties::default()));
    let connection = tokio::time::timeout(Duration::from_secs(20), connecting)
        .await
        .map_err(|_| "RabbitMQ does not answer")?
        .map_err(failed)?;
    let channel = connection.create_channel().await.map_err(failed)?;
    let mut queues = BTreeMap::new();
    for queue in [
        "jobs.immediate",
        "jobs.high",
        "jobs.medium",
        "jobs.low",
        "reports.bridge",
        "reports.dead",
        "unroutable",
    ] {
        let name = format!("mail.{queue}");
        let options = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let declared = channel
            .queue_declare(name.as_str().into(), options, FieldTable::default())
            .await
            .map_err(failed)?;
        queues.insert(name, declared.message_count());
    }
    let _ = connection.close(200, "done".into()).await;
    Ok(queues)
}
