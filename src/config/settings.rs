//! Every setting there is, once: `--help`, the documentation, the defaults and the warning about misspelt names all
//! come from this table.

use Section::{
    Broker, Database, Egress, Fetch, Http, Job, Keys, Process, Smtp, Storage, Telemetry, Traces, Webhook,
    Worker,
};

/// What a setting belongs to. A command declares the sections that it reads, and has their flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// Logs.
    Telemetry,
    /// The HTTP port.
    Http,
    /// Spans.
    Traces,
    /// `RabbitMQ`.
    Broker,
    /// Postgres.
    Database,
    /// Key rings.
    Keys,
    /// The SMTP client.
    Smtp,
    /// Object storage.
    Storage,
    /// Fetching attachments.
    Fetch,
    /// Bounds on jobs.
    Job,
    /// The worker.
    Worker,
    /// The bridge.
    Webhook,
    /// What tenants' hosts may resolve to.
    Egress,
    /// How a process ends.
    Process,
}

impl Section {
    /// All sections, in the order of the documentation.
    pub const ALL: [Self; 14] = [
        Broker, Database, Keys, Worker, Smtp, Job, Fetch, Storage, Egress, Webhook, Process, Http, Traces,
        Telemetry,
    ];

    /// Heading in `--help` and in the documentation.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Telemetry => "Logs",
            Self::Http => "Health and metrics",
            Self::Traces => "Traces",
            Self::Broker => "RabbitMQ",
            Self::Database => "Postgres",
            Self::Keys => "Keys",
            Self::Smtp => "SMTP",
            Self::Storage => "Object storage",
            Self::Fetch => "Attachments",
            Self::Job => "Bounds on jobs",
            Self::Worker => "Worker",
            Self::Webhook => "Bridge",
            Self::Egress => "Egress",
            Self::Process => "Shutdown",
        }
    }
}

/// One setting.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Environment variable: `POSTROOM_…`, or one that a specification names.
    pub name: &'static str,
    /// Form of the value, as `--help` shows it.
    pub form: &'static str,
    /// Value if nothing is given, in the form a user would write it.
    pub default: Option<&'static str>,
    /// What it means, in one sentence.
    pub help: &'static str,
    /// Who reads it.
    pub sections: &'static [Section],
    /// Whether it may hold a secret: then it is no flag, and `NAME_FILE` names a file with it.
    pub secret: bool,
}

impl Setting {
    /// Name of the flag without its dashes: `POSTROOM_HTTP_ADDR` is `http-addr`. That of a secret names its file.
    #[must_use]
    pub fn flag(&self) -> String {
        let name = self
            .name
            .trim_start_matches("POSTROOM_")
            .to_lowercase()
            .replace('_', "-");
        if self.secret { format!("{name}-file") } else { name }
    }

    /// The variable that the flag stands for: itself, or `NAME_FILE`.
    #[must_use]
    pub fn flag_variable(&self) -> String {
        if self.secret {
            self.file_variable()
        } else {
            self.name.into()
        }
    }

    /// `NAME_FILE`.
    #[must_use]
    pub fn file_variable(&self) -> String {
        format!("{}_FILE", self.name)
    }
}

/// The setting of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name == name)
}

const fn plain(
    name: &'static str,
    form: &'static str,
    default: Option<&'static str>,
    sections: &'static [Section],
    help: &'static str,
) -> Setting {
    Setting {
        name,
        form,
        default,
        help,
        sections,
        secret: false,
    }
}

const fn secret(
    name: &'static str,
    form: &'static str,
    sections: &'static [Section],
    help: &'static str,
) -> Setting {
    Setting {
        name,
        form,
        default: None,
        help,
        sections,
        secret: true,
    }
}

/// All settings.
pub const SETTINGS: &[Setting] = &[
    secret(
        "POSTROOM_AMQP_URL",
        "amqps://user:password@host/vhost",
        &[Broker],
        "The broker, by amqp:// or amqps://.",
    ),
    plain(
        "POSTROOM_AMQP_CA_FILE",
        "FILE",
        None,
        &[Broker],
        "Certificate authorities for the broker besides the system's, in PEM form; wants an amqps:// URL.",
    ),
    plain(
        "POSTROOM_PREFIX",
        "NAME",
        Some("mail"),
        &[Broker],
        "First part of the name of every exchange and queue.",
    ),
    plain(
        "POSTROOM_TOPOLOGY",
        "apply|check|off",
        Some("apply"),
        &[Broker],
        "At start: declare missing exchanges and queues, only check them, or trust the operator.",
    ),
    plain(
        "POSTROOM_QUEUES",
        "LEVEL:QUEUE,…",
        None,
        &[Broker],
        "Dedicated queues to consume besides the four shared ones, such as high:mail.jobs.acme.",
    ),
    secret(
        "POSTROOM_DATABASE_URL",
        "postgres://user:password@host/database",
        &[Database],
        "The database; sslmode=disable, prefer, require (which verifies, like verify-full), verify-ca and verify-full, and sslrootcert, are understood.",
    ),
    plain(
        "POSTROOM_DATABASE_SCHEMA",
        "NAME",
        Some("postroom"),
        &[Database],
        "Schema that holds everything.",
    ),
    plain(
        "POSTROOM_DATABASE_CA_FILE",
        "FILE",
        None,
        &[Database],
        "Certificate authorities for the database besides the system's, in PEM form; makes TLS compulsory unless sslmode says otherwise.",
    ),
    plain(
        "POSTROOM_DATABASE_POOL_SIZE",
        "NUMBER",
        Some("8"),
        &[Database],
        "Connections to the database per process; a worker has one more, for its heartbeats.",
    ),
    secret(
        "POSTROOM_ENCRYPTION_KEYS",
        "KID:BASE64,…",
        &[Keys],
        "Keys of stored credentials, 32 bytes each; the first is active. `postroom key generate` makes one. `KID:lost` names one that is gone for good.",
    ),
    secret(
        "POSTROOM_OVERRIDE_KEYS",
        "KID:BASE64,…",
        &[Keys],
        "Keys of sealed smtp_overrides, same form; other keys than the above.",
    ),
    plain(
        "POSTROOM_CONCURRENCY",
        "NUMBER",
        Some("128"),
        &[Worker],
        "Sends in flight per worker, at least 8: each level has some of its own.",
    ),
    plain(
        "POSTROOM_MEMORY_BUDGET",
        "SIZE",
        Some("384MiB"),
        &[Worker],
        "Bytes of jobs and attachments in hand per worker, in every form they take.",
    ),
    plain(
        "POSTROOM_OUTBOX_LIMIT",
        "NUMBER",
        Some("50000"),
        &[Worker],
        "Reports of the installation not yet published above which nothing new is sent.",
    ),
    plain(
        "POSTROOM_LEASE",
        "DURATION",
        Some("45s"),
        &[Worker],
        "Time without a heartbeat after which other workers take over a worker's jobs.",
    ),
    plain(
        "POSTROOM_RETENTION",
        "DURATION",
        Some("30d"),
        &[Worker, Webhook],
        "How long final outcomes and delivered events are remembered, and with them the ids of jobs.",
    ),
    plain(
        "POSTROOM_UNKNOWN_TENANT",
        "reject|platform",
        Some("reject"),
        &[Worker],
        "Jobs of unknown tenants: dead-letter them, or send them from the platform's account.",
    ),
    plain(
        "POSTROOM_DEFERRED_REPORT_AFTER",
        "DURATION",
        Some("60s"),
        &[Worker],
        "A new job that waits for its date, a limit or its account gives mail.deferred if it is for at least this long; a first retry, and a wait for a key, always do.",
    ),
    plain(
        "POSTROOM_RETRY_BASE",
        "DURATION",
        Some("15s"),
        &[Worker],
        "Wait after the first failed attempt; each further one waits three times as long.",
    ),
    plain(
        "POSTROOM_RETRY_CAP",
        "DURATION",
        Some("4h"),
        &[Worker],
        "Longest wait between attempts.",
    ),
    plain(
        "POSTROOM_BREAKER_FAULTS",
        "NUMBER",
        Some("5"),
        &[Worker],
        "Faults of an account or its server in a row after which its mail waits for a probe.",
    ),
    plain(
        "POSTROOM_BREAKER_COOLDOWN",
        "DURATION",
        Some("60s"),
        &[Worker],
        "Time until the first probe; twice as long after each that fails.",
    ),
    plain(
        "POSTROOM_BREAKER_COOLDOWN_CAP",
        "DURATION",
        Some("15m"),
        &[Worker],
        "Longest time between probes.",
    ),
    plain(
        "POSTROOM_SMTP_CA_FILE",
        "FILE",
        None,
        &[Smtp],
        "Certificate authorities for all SMTP servers besides the system's, in PEM form.",
    ),
    plain(
        "POSTROOM_EHLO_NAME",
        "HOSTNAME",
        None,
        &[Smtp],
        "Name given in EHLO; by default the host's name.",
    ),
    plain(
        "POSTROOM_POOL_SIZE",
        "NUMBER",
        Some("16"),
        &[Smtp],
        "Open SMTP connections per account and process.",
    ),
    plain(
        "POSTROOM_CONNECTION_MAX_MESSAGES",
        "NUMBER",
        Some("1000"),
        &[Smtp],
        "Mails per SMTP connection.",
    ),
    plain(
        "POSTROOM_CONNECTION_MAX_AGE",
        "DURATION",
        Some("10m"),
        &[Smtp],
        "Age at which an SMTP connection is closed between two mails.",
    ),
    plain(
        "POSTROOM_CONNECTION_MAX_IDLE",
        "DURATION",
        Some("30s"),
        &[Smtp],
        "Idle time after which an SMTP connection is closed.",
    ),
    plain(
        "POSTROOM_SMTP_CHUNKING",
        "auto|off",
        Some("auto"),
        &[Smtp],
        "Use BDAT where servers offer CHUNKING, small mails in one round trip; off is for servers that do it wrong.",
    ),
    plain(
        "POSTROOM_SMTP_CONNECT_TIMEOUT",
        "DURATION",
        Some("30s"),
        &[Smtp],
        "Time limit of the TCP connection.",
    ),
    plain(
        "POSTROOM_SMTP_GREETING_TIMEOUT",
        "DURATION",
        Some("60s"),
        &[Smtp],
        "Time limit of greeting, EHLO, STARTTLS and the TLS handshake, each.",
    ),
    plain(
        "POSTROOM_SMTP_COMMAND_TIMEOUT",
        "DURATION",
        Some("2m"),
        &[Smtp],
        "Time limit of AUTH, MAIL, RCPT, RSET and DATA, each.",
    ),
    plain(
        "POSTROOM_SMTP_WRITE_TIMEOUT",
        "DURATION",
        Some("3m"),
        &[Smtp],
        "Time limit of writing the mail, per block of 64 KiB.",
    ),
    plain(
        "POSTROOM_SMTP_ATTEMPT_TIMEOUT",
        "DURATION",
        Some("5m"),
        &[Smtp],
        "Time limit for all of a transaction up to the last byte of the mail, at most 5m.",
    ),
    plain(
        "POSTROOM_SMTP_FINAL_TIMEOUT",
        "DURATION",
        Some("10m"),
        &[Smtp],
        "Time limit of the reply after the end of the mail, and of all replies to a mail sent in one flight; a shorter \
         one causes duplicates.",
    ),
    plain(
        "POSTROOM_JOB_MAX_BYTES",
        "SIZE",
        Some("8MiB"),
        &[Job],
        "Largest job as it comes, at most 15MiB.",
    ),
    plain(
        "POSTROOM_JOB_MAX_INFLATED_BYTES",
        "SIZE",
        Some("32MiB"),
        &[Job],
        "Largest job after decompression.",
    ),
    plain(
        "POSTROOM_JOB_MAX_RECIPIENTS",
        "NUMBER",
        Some("100"),
        &[Job],
        "Recipients per job.",
    ),
    plain(
        "POSTROOM_JOB_MAX_ATTACHMENTS",
        "NUMBER",
        Some("50"),
        &[Job],
        "Attachments per job.",
    ),
    plain(
        "POSTROOM_JOB_MAX_DEPTH",
        "NUMBER",
        Some("16"),
        &[Job],
        "Nesting of a job's JSON.",
    ),
    plain(
        "POSTROOM_ATTACHMENT_MAX_BYTES",
        "SIZE",
        Some("50MiB"),
        &[Fetch],
        "Largest attachment.",
    ),
    plain(
        "POSTROOM_ATTACHMENT_TIMEOUT",
        "DURATION",
        Some("60s"),
        &[Fetch],
        "Time limit for fetching one attachment.",
    ),
    plain(
        "POSTROOM_ATTACHMENT_CONCURRENCY",
        "NUMBER",
        Some("8"),
        &[Fetch],
        "Fetches at once per worker; at most half of them for one tenant.",
    ),
    plain(
        "POSTROOM_ATTACHMENT_MEMORY",
        "SIZE",
        Some("128MiB"),
        &[Fetch],
        "Attachment bytes in memory at once per worker.",
    ),
    plain(
        "POSTROOM_STORAGE_URL",
        "URL",
        None,
        &[Storage],
        "Where large attachments go: s3://bucket/prefix (with the usual AWS_* variables), gs://…, az://… or file:///folder.",
    ),
    plain(
        "POSTROOM_STORAGE_PUBLIC_URL",
        "URL",
        None,
        &[Storage],
        "Public address of the bucket or folder, for links that are not presigned; required with file://.",
    ),
    plain(
        "POSTROOM_LINK_LIFETIME",
        "DURATION",
        Some("7d"),
        &[Storage],
        "How long presigned links work, at most 7d.",
    ),
    plain(
        "POSTROOM_EGRESS_ALLOW",
        "NETWORK,…",
        None,
        &[Egress],
        "Networks in CIDR form that hosts named by tenants (SMTP, attachments, webhooks) may be in besides public ones.",
    ),
    plain(
        "POSTROOM_WEBHOOK_TIMEOUT",
        "DURATION",
        Some("15s"),
        &[Webhook],
        "Time limit of one POST.",
    ),
    plain(
        "POSTROOM_WEBHOOK_CONCURRENCY",
        "NUMBER",
        Some("256"),
        &[Webhook],
        "POSTs in flight per bridge.",
    ),
    plain(
        "POSTROOM_WEBHOOK_PER_ENDPOINT",
        "NUMBER",
        Some("4"),
        &[Webhook],
        "POSTs in flight per endpoint, over all bridges.",
    ),
    plain(
        "POSTROOM_WEBHOOK_DISABLE_AFTER",
        "DURATION",
        Some("5d"),
        &[Webhook],
        "An endpoint that has failed this long without a success is disabled.",
    ),
    plain(
        "POSTROOM_WEBHOOK_RETRY_SCALE",
        "FACTOR",
        Some("1"),
        &[Webhook],
        "Factor on the schedule of retries; for tests.",
    ),
    plain(
        "POSTROOM_GRACE_PERIOD",
        "DURATION",
        Some("60s"),
        &[Process, Worker],
        "How long SIGTERM waits for work in flight; keep the orchestrator's own limit longer.",
    ),
    plain(
        "POSTROOM_LOG",
        "FILTER",
        Some("info"),
        &[Telemetry],
        "What is logged, such as info or info,postroom::smtp=debug.",
    ),
    plain(
        "POSTROOM_LOG_FORMAT",
        "json|human",
        None,
        &[Telemetry],
        "Form of the log on standard error; by default human on a terminal, else json.",
    ),
    plain(
        "POSTROOM_HTTP_ADDR",
        "ADDRESS:PORT|off",
        Some("0.0.0.0:9090"),
        &[Http],
        "Where /livez, /readyz, /healthz and /metrics are served.",
    ),
    plain(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "URL",
        None,
        &[Traces],
        "Collector that spans are sent to, such as http://localhost:4318; /v1/traces is added. Without an endpoint there are no spans.",
    ),
    plain(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "URL",
        None,
        &[Traces],
        "The same as a whole URL, to which nothing is added; wins over OTEL_EXPORTER_OTLP_ENDPOINT.",
    ),
    secret(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "NAME=VALUE,…",
        &[Traces],
        "HTTP headers for the collector, values percent-encoded.",
    ),
    plain(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "http/protobuf",
        Some("http/protobuf"),
        &[Traces],
        "The protocol; there is only this one, most collectors have it on port 4318.",
    ),
    plain(
        "OTEL_EXPORTER_OTLP_TIMEOUT",
        "MILLISECONDS",
        Some("10000"),
        &[Traces],
        "Time limit of one request to the collector.",
    ),
    plain(
        "OTEL_SERVICE_NAME",
        "NAME",
        None,
        &[Traces],
        "Resource attribute service.name; by default postroom-worker or postroom-bridge.",
    ),
    plain(
        "OTEL_RESOURCE_ATTRIBUTES",
        "NAME=VALUE,…",
        None,
        &[Traces],
        "More resource attributes, values percent-encoded.",
    ),
    plain(
        "OTEL_TRACES_SAMPLER",
        "always_on|always_off|traceidratio|parentbased_always_on|parentbased_always_off|parentbased_traceidratio",
        Some("parentbased_always_on"),
        &[Traces],
        "Which jobs get spans; parentbased: as the traceparent of the job says, if it has one.",
    ),
    plain(
        "OTEL_TRACES_SAMPLER_ARG",
        "RATIO",
        Some("1"),
        &[Traces],
        "Share of the traces for the samplers of that name, from 0 to 1.",
    ),
    plain(
        "OTEL_SDK_DISABLED",
        "true|false",
        Some("false"),
        &[Traces],
        "No spans, whatever else is set.",
    ),
];
