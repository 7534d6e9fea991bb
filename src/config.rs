//! Configuration, one struct per concern. [`load()`] reads flags, environment and secret files, checks everything and
//! reports every error at once; it opens nothing. A command asks for the sections that it needs by their types:
//! `let (broker, database): (Broker, Database) = load(&sources)?`.

mod amqp;
mod authorities;
mod dsn;
mod load;
mod parse;
mod sections;
pub mod settings;
mod traces;
mod unknown;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use secrecy::SecretString;

use crate::level::Level;

pub use amqp::amqp_uri;
pub use authorities::check_authorities;
pub use dsn::{Dsn, SslMode};
pub use load::{ConfigError, FromSettings, Reader, Sources, load};

/// `RabbitMQ`.
#[derive(Debug, Clone)]
pub struct Broker {
    /// `amqp://` or `amqps://` URL (`POSTROOM_AMQP_URL`).
    pub url: SecretString,
    /// Extra certificate authorities (`POSTROOM_AMQP_CA_FILE`).
    pub ca_file: Option<PathBuf>,
    /// First part of every exchange and queue name (`POSTROOM_PREFIX`, default `mail`).
    pub prefix: String,
    /// What to do about exchanges and queues at start (`POSTROOM_TOPOLOGY`).
    pub topology: TopologyMode,
    /// Dedicated queues to consume besides the shared four (`POSTROOM_QUEUES`, `level:queue,…`).
    pub extra_queues: Vec<(Level, String)>,
}

/// The broker's section for commands that never connect (`topology print`): without a URL it is empty.
#[derive(Debug, Clone)]
pub struct BrokerNames(pub Broker);

/// `POSTROOM_TOPOLOGY`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TopologyMode {
    /// Declare what is missing.
    #[default]
    Apply,
    /// Refuse to start if something is missing or different.
    Check,
    /// Trust the operator.
    Off,
}

/// Postgres.
#[derive(Debug, Clone)]
pub struct Database {
    /// `postgres://` URL (`POSTROOM_DATABASE_URL`).
    pub url: SecretString,
    /// Schema that holds everything (`POSTROOM_DATABASE_SCHEMA`, default `postroom`).
    pub schema: String,
    /// Extra certificate authorities (`POSTROOM_DATABASE_CA_FILE`).
    pub ca_file: Option<PathBuf>,
    /// Connections per process (`POSTROOM_DATABASE_POOL_SIZE`, default 8).
    pub pool_size: usize,
}

/// The two key rings, still as text; [`crate::secret`] reads them.
#[derive(Debug, Clone)]
pub struct Keys {
    /// `POSTROOM_ENCRYPTION_KEYS`: stored credentials, `kid:base64,…`, the first is active.
    pub encryption: SecretString,
    /// `POSTROOM_OVERRIDE_KEYS`: sealed `smtp_override`s.
    pub overrides: Option<SecretString>,
}

/// The SMTP client.
#[derive(Debug, Clone)]
pub struct Smtp {
    /// Extra certificate authorities for all servers (`POSTROOM_SMTP_CA_FILE`).
    pub ca_file: Option<PathBuf>,
    /// Name given in EHLO (`POSTROOM_EHLO_NAME`, default the host's name).
    pub ehlo_name: String,
    /// Open connections per account in this process (`POSTROOM_POOL_SIZE`, default 16).
    pub pool_size: usize,
    /// Mails per connection (`POSTROOM_CONNECTION_MAX_MESSAGES`, default 1000).
    pub max_messages: u32,
    /// Age at which a connection is closed between mails (`POSTROOM_CONNECTION_MAX_AGE`, default 10 minutes).
    pub max_age: Duration,
    /// Idle time after which a connection is closed (`POSTROOM_CONNECTION_MAX_IDLE`, default 30 s).
    pub max_idle: Duration,
    /// Whether BDAT (RFC 3030) is used where it is offered (`POSTROOM_SMTP_CHUNKING`, default auto).
    pub chunking: bool,
    /// Time limits per phase.
    pub timeouts: SmtpTimeouts,
}

/// Time limits of the SMTP phases (RFC 5321 §4.5.3.2 gives the upper bounds).
#[derive(Debug, Clone, Copy)]
pub struct SmtpTimeouts {
    /// TCP connect (`POSTROOM_SMTP_CONNECT_TIMEOUT`, default 30 s).
    pub connect: Duration,
    /// Greeting, EHLO, STARTTLS and the TLS handshake, each (`POSTROOM_SMTP_GREETING_TIMEOUT`, default 60 s).
    pub greeting: Duration,
    /// AUTH, MAIL, RCPT, RSET, DATA up to 354, each (`POSTROOM_SMTP_COMMAND_TIMEOUT`, default 2 minutes).
    pub command: Duration,
    /// Writing the mail, per 64 KiB block (`POSTROOM_SMTP_WRITE_TIMEOUT`, default 3 minutes).
    pub write: Duration,
    /// Everything of a transaction up to the last byte of the mail, together, from the wait for a connection on
    /// (`POSTROOM_SMTP_ATTEMPT_TIMEOUT`, default 5 minutes).
    pub attempt: Duration,
    /// The reply after the final dot (`POSTROOM_SMTP_FINAL_TIMEOUT`, default 10 minutes).
    pub final_reply: Duration,
}

impl Default for SmtpTimeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(30),
            greeting: Duration::from_mins(1),
            command: Duration::from_mins(2),
            write: Duration::from_mins(3),
            attempt: Duration::from_mins(5),
            final_reply: Duration::from_mins(10),
        }
    }
}

/// Where large attachments go.
#[derive(Debug, Clone)]
pub struct Storage {
    /// `s3://bucket/prefix`, `gs://…`, `az://…` or `file:///folder` (`POSTROOM_STORAGE_URL`).
    pub url: String,
    /// Public address of the bucket or folder, for links; required with `file://` (`POSTROOM_STORAGE_PUBLIC_URL`).
    pub public_url: Option<String>,
    /// How long presigned links work, at most 7 days (`POSTROOM_LINK_LIFETIME`, default 7 days).
    pub link_lifetime: Duration,
}

/// Fetching attachments.
#[derive(Debug, Clone)]
pub struct Fetch {
    /// Largest single attachment, in bytes (`POSTROOM_ATTACHMENT_MAX_BYTES`, default 50 MiB).
    pub max_bytes: u64,
    /// Time limit for one attachment (`POSTROOM_ATTACHMENT_TIMEOUT`, default 60 s).
    pub timeout: Duration,
    /// Fetches at once in this process (`POSTROOM_ATTACHMENT_CONCURRENCY`, default 8).
    pub concurrency: usize,
    /// Attachment bytes in memory at once in this process (`POSTROOM_ATTACHMENT_MEMORY`, default 128 MiB).
    pub memory: u64,
}

impl Fetch {
    /// Bytes that the cache of attachments may use, besides `memory`.
    #[must_use]
    pub fn cache(&self) -> u64 {
        self.memory / 4
    }
}

impl Default for Fetch {
    fn default() -> Self {
        Self {
            max_bytes: 50 << 20,
            timeout: Duration::from_mins(1),
            concurrency: 8,
            memory: 128 << 20,
        }
    }
}

/// Bounds on a job's body, all counted before anything else is done with it.
#[derive(Debug, Clone, Copy)]
pub struct JobLimits {
    /// Body as it came, in bytes (`POSTROOM_JOB_MAX_BYTES`, default 8 MiB, at most 15 MiB).
    pub max_bytes: usize,
    /// Body after decompression (`POSTROOM_JOB_MAX_INFLATED_BYTES`, default 32 MiB).
    pub max_inflated: usize,
    /// Recipients (`POSTROOM_JOB_MAX_RECIPIENTS`, default 100).
    pub max_recipients: usize,
    /// Attachments (`POSTROOM_JOB_MAX_ATTACHMENTS`, default 50).
    pub max_attachments: usize,
    /// Nesting of the JSON (`POSTROOM_JOB_MAX_DEPTH`, default 16).
    pub max_depth: usize,
}

impl JobLimits {
    /// For what is stored: more than any setting allows. It was checked when it came, and may have come compressed, or under
    /// other settings.
    pub const STORED: Self = Self {
        max_bytes: 512 << 20,
        max_inflated: 512 << 20,
        max_recipients: 10_000,
        max_attachments: 1000,
        max_depth: 100,
    };
}

impl Default for JobLimits {
    fn default() -> Self {
        Self {
            max_bytes: 8 << 20,
            max_inflated: 32 << 20,
            max_recipients: 100,
            max_attachments: 50,
            max_depth: 16,
        }
    }
}

/// Fewest sends in flight of a worker: each level has some of its own, and there are some for all.
pub const LEAST_CONCURRENCY: usize = 8;

/// The worker's own bounds.
#[derive(Debug, Clone)]
pub struct Worker {
    /// Bytes of jobs in hand: what `POSTROOM_MEMORY_BUDGET` (default 384 MiB) leaves beside attachments and their cache.
    pub job_memory: u64,
    /// Reports not yet published above which nothing new is begun (`POSTROOM_OUTBOX_LIMIT`, default 50000).
    pub outbox_limit: usize,
    /// Sends in flight (`POSTROOM_CONCURRENCY`, default 128, at least [`LEAST_CONCURRENCY`]).
    pub concurrency: usize,
    /// Time without a heartbeat after which another worker may take over (`POSTROOM_LEASE`, default 45 s).
    pub lease: Duration,
    /// How long SIGTERM waits for mail in flight (`POSTROOM_GRACE_PERIOD`, default 60 s).
    pub grace_period: Duration,
    /// How long final outcomes are remembered (`POSTROOM_RETENTION`, default 30 days).
    pub retention: Duration,
    /// What to do with jobs of unknown tenants (`POSTROOM_UNKNOWN_TENANT`, default reject).
    pub unknown_tenant: UnknownTenant,
    /// A `mail.deferred` report of a wait for a date, a limit or an account is made only when it is at least this long
    /// (`POSTROOM_DEFERRED_REPORT_AFTER`, default 60 s); of a first retry, and of a wait for a key, always.
    pub deferred_report_after: Duration,
    /// The schedule of accounts that set none (`POSTROOM_RETRY_BASE`, default 15 s; `POSTROOM_RETRY_CAP`, default
    /// 4 hours).
    pub retry: crate::retry::RetryPolicy,
    /// When circuit breakers of accounts open (`POSTROOM_BREAKER_FAULTS`, default 5; `POSTROOM_BREAKER_COOLDOWN`, default
    /// 60 s; `POSTROOM_BREAKER_COOLDOWN_CAP`, default 15 min).
    pub breaker: crate::retry::Breaker,
}

/// `POSTROOM_UNKNOWN_TENANT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownTenant {
    /// Dead-letter the job.
    #[default]
    Reject,
    /// Send through the platform's default account.
    Platform,
}

/// The bridge.
#[derive(Debug, Clone)]
pub struct Webhook {
    /// Time limit of one POST (`POSTROOM_WEBHOOK_TIMEOUT`, default 15 s).
    pub timeout: Duration,
    /// POSTs in flight (`POSTROOM_WEBHOOK_CONCURRENCY`, default 256).
    pub concurrency: usize,
    /// POSTs in flight per endpoint (`POSTROOM_WEBHOOK_PER_ENDPOINT`, default 4).
    pub per_endpoint: usize,
    /// An endpoint that failed this long without a success is disabled
    /// (`POSTROOM_WEBHOOK_DISABLE_AFTER`, default 5 days).
    pub disable_after: Duration,
    /// How long delivered events are remembered; at least the worker's retention
    /// (`POSTROOM_RETENTION`, default 30 days).
    pub retention: Duration,
    /// Factor on the retry schedule; only tests change it (`POSTROOM_WEBHOOK_RETRY_SCALE`, default 1).
    pub retry_scale: f64,
}

/// Networks that tenants' hosts may be in besides public ones (`POSTROOM_EGRESS_ALLOW`).
#[derive(Debug, Clone, Default)]
pub struct Egress {
    /// Allowed beyond public addresses.
    pub allow: Vec<IpNet>,
}

/// How a process ends.
#[derive(Debug, Clone, Copy)]
pub struct Process {
    /// How long SIGTERM waits for work in flight (`POSTROOM_GRACE_PERIOD`, default 60 s).
    pub grace_period: Duration,
}

/// Spans, and where they go; none without an endpoint. Variables of the OpenTelemetry specification.
#[derive(Debug, Clone)]
pub struct Traces {
    /// Where spans are posted (`OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, or `OTEL_EXPORTER_OTLP_ENDPOINT` and `/v1/traces`).
    pub endpoint: SecretString,
    /// Headers of these requests (`OTEL_EXPORTER_OTLP_HEADERS`); values often are tokens.
    pub headers: Vec<(String, SecretString)>,
    /// Time limit of one request (`OTEL_EXPORTER_OTLP_TIMEOUT`, default 10 s).
    pub timeout: Duration,
    /// `service.name` (`OTEL_SERVICE_NAME`).
    pub service_name: Option<String>,
    /// More attributes of the resource (`OTEL_RESOURCE_ATTRIBUTES`).
    pub attributes: Vec<(String, String)>,
    /// Which jobs get spans (`OTEL_TRACES_SAMPLER`).
    pub sampler: Sampler,
}

/// Which jobs get spans.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// The flag of a parent decides, if there is a parent.
    pub parent_based: bool,
    /// Share of the traces otherwise, from 0 to 1.
    pub ratio: f64,
}

/// Logs and the HTTP port.
#[derive(Debug, Clone)]
pub struct Telemetry {
    /// Filter in `tracing` syntax (`POSTROOM_LOG`, default `info`).
    pub log: String,
    /// `json` or `human` (`POSTROOM_LOG_FORMAT`, default `human` on a terminal, else `json`).
    pub json: bool,
    /// Health and metrics (`POSTROOM_HTTP_ADDR`, default `0.0.0.0:9090`; `off` for none).
    pub http_addr: Option<SocketAddr>,
}
