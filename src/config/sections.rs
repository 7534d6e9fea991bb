//! How each section is read. All fields are read before the first error ends it, so that every error is noted.

mod worker;

use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};

use super::load::{FromSettings, Reader};
use super::{
    Broker, BrokerNames, Database, Dsn, Egress, Fetch, JobLimits, Keys, Process, Smtp, SmtpTimeouts, SslMode,
    Storage, Telemetry, TopologyMode, Webhook, authorities, parse,
};

use crate::secret::Keyring;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);

impl Reader<'_> {
    fn duration(&mut self, name: &'static str, from: Duration, to: Duration) -> Option<Duration> {
        self.get(name, |text| parse::duration(text, from..=to))
    }

    fn count(&mut self, name: &'static str, max: u64) -> Option<usize> {
        self.get(name, |text| parse::number(text, 1..=max))
            .map(|number| number as usize)
    }

    fn size(&mut self, name: &'static str, from: u64, to: u64) -> Option<u64> {
        self.get(name, |text| parse::size(text, from..=to))
    }
}

impl FromSettings for BrokerNames {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let url = r.optional_secret("POSTROOM_AMQP_URL", parse::amqp_url);
        let names = broker_names(r, url.as_ref());
        Some(Self(Broker {
            url: url.unwrap_or_default(),
            ..names?
        }))
    }
}

impl FromSettings for Broker {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let url = r.secret("POSTROOM_AMQP_URL", parse::amqp_url);
        let names = broker_names(r, url.as_ref());
        Some(Self { url: url?, ..names? })
    }
}

/// All but the URL.
fn broker_names(r: &mut Reader<'_>, url: Option<&SecretString>) -> Option<Broker> {
    let ca_file = r.authorities("POSTROOM_AMQP_CA_FILE", authorities::check_file_for_amqp);
    if ca_file.is_some() && url.is_some_and(|url| parse::is_plain_amqp(url.expose_secret())) {
        r.note(
            "POSTROOM_AMQP_CA_FILE",
            "is given, but POSTROOM_AMQP_URL is amqp://, which sends the password in clear",
            "give an amqps:// URL, or no authorities",
        );
    }
    let prefix = r.get("POSTROOM_PREFIX", parse::prefix);
    let topology = r.get("POSTROOM_TOPOLOGY", |text| {
        let modes = [
            ("apply", TopologyMode::Apply),
            ("check", TopologyMode::Check),
            ("off", TopologyMode::Off),
        ];
        parse::one_of(text, &modes)
    });
    let extra_queues = r.optional("POSTROOM_QUEUES", parse::queues);
    let named = extra_queues.iter().flatten().map(|(_, queue)| queue);
    if let Some(prefix) = &prefix
        && let Some(own) = named.into_iter().find(|queue| parse::is_own_queue(prefix, queue))
    {
        r.note(
            "POSTROOM_QUEUES",
            &format!("`{own}` is a queue of Postroom's own"),
            "give names of dedicated queues, such as high:mail.jobs.acme",
        );
    }
    Some(Broker {
        url: String::new().into(),
        ca_file,
        prefix: prefix?,
        topology: topology?,
        extra_queues: extra_queues.unwrap_or_default(),
    })
}

impl FromSettings for Database {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let url = r.secret("POSTROOM_DATABASE_URL", parse::database_url);
        let schema = r.get("POSTROOM_DATABASE_SCHEMA", parse::schema);
        let ca_file = r.authorities("POSTROOM_DATABASE_CA_FILE", authorities::check_file);
        let root_cert = url
            .as_ref()
            .and_then(|url| Dsn::parse(url.expose_secret()).ok())
            .filter(|dsn| dsn.mode != Some(SslMode::Disable))
            .and_then(|dsn| dsn.root_cert);
        if let Some(Err(why)) = root_cert.map(|path| authorities::check_file(&path)) {
            r.note(
                "POSTROOM_DATABASE_URL",
                &format!("names a file in sslrootcert that cannot be used ({why})"),
                "give certificate authorities in PEM form, or sslrootcert=system",
            );
        }
        let pool_size = r.count("POSTROOM_DATABASE_POOL_SIZE", 1000);
        Some(Self {
            url: url?,
            schema: schema?,
            ca_file,
            pool_size: pool_size?,
        })
    }
}

impl FromSettings for Keys {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let encryption = r.secret("POSTROOM_ENCRYPTION_KEYS", key_ring);
        let overrides = r.optional_secret("POSTROOM_OVERRIDE_KEYS", key_ring);
        if let (Some(stored), Some(sent)) = (&encryption, &overrides)
            && let (Ok(stored), Ok(sent)) = (Keyring::parse(stored), Keyring::parse(sent))
            && stored.shares_a_key_with(&sent)
        {
            r.note(
                "POSTROOM_OVERRIDE_KEYS",
                "has a key of POSTROOM_ENCRYPTION_KEYS",
                "give keys of its own: producers have these, and what is stored is not for them to open",
            );
        }
        Some(Self {
            encryption: encryption?,
            overrides,
        })
    }
}

/// Said with all else that is wrong; the ring itself is made where it is used.
fn key_ring(text: &str) -> Result<(), String> {
    let parsed = Keyring::parse(&text.into());
    parsed.map(drop).map_err(|error| error.to_string())
}

impl FromSettings for Smtp {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let ca_file = r.authorities("POSTROOM_SMTP_CA_FILE", authorities::check_file);
        let ehlo_name = r.optional("POSTROOM_EHLO_NAME", parse::ehlo_name);
        let pool_size = r.count("POSTROOM_POOL_SIZE", 1000);
        let max_messages = r.count("POSTROOM_CONNECTION_MAX_MESSAGES", 1_000_000);
        let max_age = r.duration("POSTROOM_CONNECTION_MAX_AGE", SECOND, DAY);
        let max_idle = r.duration("POSTROOM_CONNECTION_MAX_IDLE", SECOND, HOUR);
        let chunking = r.get("POSTROOM_SMTP_CHUNKING", |text| {
            parse::one_of(text, &[("auto", true), ("off", false)])
        });
        let timeouts = SmtpTimeouts::read(r);
        let hostname = parse::ehlo_name(&r.sources().hostname).unwrap_or_else(|_| "localhost".into());
        Some(Self {
            ca_file,
            ehlo_name: ehlo_name.unwrap_or(hostname),
            pool_size: pool_size?,
            max_messages: max_messages? as u32,
            max_age: max_age?,
            max_idle: max_idle?,
            chunking: chunking?,
            timeouts: timeouts?,
        })
    }
}

impl FromSettings for SmtpTimeouts {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let shortest = Duration::from_millis(100);
        let connect = r.duration("POSTROOM_SMTP_CONNECT_TIMEOUT", shortest, 5 * MINUTE);
        let greeting = r.duration("POSTROOM_SMTP_GREETING_TIMEOUT", shortest, 5 * MINUTE);
        let command = r.duration("POSTROOM_SMTP_COMMAND_TIMEOUT", shortest, 5 * MINUTE);
        let write = r.duration("POSTROOM_SMTP_WRITE_TIMEOUT", shortest, 5 * MINUTE);
        let attempt = r.duration("POSTROOM_SMTP_ATTEMPT_TIMEOUT", shortest, 5 * MINUTE);
        // Together with what comes before it must stay below the broker's 30 minutes for an unacknowledged job.
        let final_reply = r.duration("POSTROOM_SMTP_FINAL_TIMEOUT", shortest, 10 * MINUTE);
        Some(Self {
            connect: connect?,
            greeting: greeting?,
            command: command?,
            write: write?,
            attempt: attempt?,
            final_reply: final_reply?,
        })
    }
}

impl FromSettings for JobLimits {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let max_bytes = r.size("POSTROOM_JOB_MAX_BYTES", 1 << 10, 15 << 20);
        let max_inflated = r.size("POSTROOM_JOB_MAX_INFLATED_BYTES", 1 << 10, 256 << 20);
        let max_recipients = r.count("POSTROOM_JOB_MAX_RECIPIENTS", 10_000);
        let max_attachments = r.count("POSTROOM_JOB_MAX_ATTACHMENTS", 1000);
        let max_depth = r.count("POSTROOM_JOB_MAX_DEPTH", 100);
        if let (Some(bytes), Some(inflated)) = (max_bytes, max_inflated)
            && inflated < bytes
        {
            r.note(
                "POSTROOM_JOB_MAX_INFLATED_BYTES",
                "is below POSTROOM_JOB_MAX_BYTES",
                "give at least as much: plain jobs count too",
            );
        }
        Some(Self {
            max_bytes: max_bytes? as usize,
            max_inflated: max_inflated? as usize,
            max_recipients: max_recipients?,
            max_attachments: max_attachments?,
            max_depth: max_depth?,
        })
    }
}

impl FromSettings for Fetch {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let max_bytes = r.size("POSTROOM_ATTACHMENT_MAX_BYTES", 1, 2 << 30);
        let timeout = r.duration("POSTROOM_ATTACHMENT_TIMEOUT", SECOND, 5 * MINUTE);
        let concurrency = r.count("POSTROOM_ATTACHMENT_CONCURRENCY", 1000);
        let memory = r.size("POSTROOM_ATTACHMENT_MEMORY", 1 << 20, 64 << 30);
        if let (Some(one), Some(all)) = (max_bytes, memory)
            && all < one
        {
            r.note(
                "POSTROOM_ATTACHMENT_MEMORY",
                "is below POSTROOM_ATTACHMENT_MAX_BYTES",
                "give at least as much: the largest attachment must fit",
            );
        }
        Some(Self {
            max_bytes: max_bytes?,
            timeout: timeout?,
            concurrency: concurrency?,
            memory: memory?,
        })
    }
}

impl FromSettings for Option<Storage> {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let url = r.optional("POSTROOM_STORAGE_URL", parse::storage_url);
        let public_url = r.optional("POSTROOM_STORAGE_PUBLIC_URL", parse::public_url);
        let link_lifetime = r.duration("POSTROOM_LINK_LIFETIME", MINUTE, 7 * DAY);
        if url.as_ref().is_some_and(|url| url.scheme() == "file") && public_url.is_none() {
            r.note(
                "POSTROOM_STORAGE_PUBLIC_URL",
                "is not set, and file:// cannot make links of its own",
                "give the URL under which the folder is served",
            );
        }
        let link_lifetime = link_lifetime?;
        Some(url.map(|url| Storage {
            url: url.into(),
            public_url,
            link_lifetime,
        }))
    }
}

impl FromSettings for Egress {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let allow = r.optional("POSTROOM_EGRESS_ALLOW", parse::networks);
        Some(Self {
            allow: allow.unwrap_or_default(),
        })
    }
}

impl FromSettings for Webhook {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let timeout = r.duration("POSTROOM_WEBHOOK_TIMEOUT", Duration::from_millis(100), 5 * MINUTE);
        let concurrency = r.count("POSTROOM_WEBHOOK_CONCURRENCY", 10_000);
        let per_endpoint = r.count("POSTROOM_WEBHOOK_PER_ENDPOINT", 1000);
        let disable_after = r.duration("POSTROOM_WEBHOOK_DISABLE_AFTER", MINUTE, 365 * DAY);
        let retention = retention(r);
        let retry_scale = r.get("POSTROOM_WEBHOOK_RETRY_SCALE", parse::factor);
        Some(Self {
            timeout: timeout?,
            concurrency: concurrency?,
            per_endpoint: per_endpoint?,
            disable_after: disable_after?,
            retention: retention?,
            retry_scale: retry_scale?,
        })
    }
}

fn retention(r: &mut Reader<'_>) -> Option<Duration> {
    r.duration("POSTROOM_RETENTION", DAY, 3650 * DAY)
}

impl FromSettings for Process {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let grace_period = r.duration("POSTROOM_GRACE_PERIOD", Duration::ZERO, HOUR)?;
        Some(Self { grace_period })
    }
}

impl FromSettings for Telemetry {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let log = r.get("POSTROOM_LOG", parse::log_filter);
        let json = r.optional("POSTROOM_LOG_FORMAT", |text| {
            parse::one_of(text, &[("json", true), ("human", false)])
        });
        let http_addr = r.get("POSTROOM_HTTP_ADDR", parse::http_addr);
        let terminal = r.sources().terminal;
        Some(Self {
            log: log?,
            json: json.unwrap_or(!terminal),
            http_addr: http_addr?,
        })
    }
}

macro_rules! tuples {
    ($(($($name:ident)+))+) => {$(
        impl<$($name: FromSettings),+> FromSettings for ($($name,)+) {
            #[expect(non_snake_case, reason = "type parameters double as names of the values")]
            fn read(reader: &mut Reader<'_>) -> Option<Self> {
                $(let $name = $name::read(reader);)+
                Some(($($name?,)+))
            }
        }
    )+};
}

tuples! {
    (A B) (A B C) (A B C D) (A B C D E) (A B C D E F) (A B C D E F G) (A B C D E F G H) (A B C D E F G H I)
    (A B C D E F G H I J) (A B C D E F G H I J K) (A B C D E F G H I J K L)
}
