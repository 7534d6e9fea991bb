use std::collections::BTreeMap;

use proptest::prelude::*;
use secrecy::ExposeSecret;

use super::settings::{SETTINGS, Section, find};
use super::*;

fn sources(env: &[(&str, &str)]) -> Sources {
    let env = env
        .iter()
        .map(|(name, value)| ((*name).into(), (*value).into()))
        .collect();
    Sources {
        env,
        flags: BTreeMap::new(),
        hostname: "box.example".into(),
        terminal: false,
    }
}

fn errors<T: FromSettings>(env: &[(&str, &str)]) -> Vec<String> {
    match load::<T>(&sources(env)) {
        Ok(_) => Vec::new(),
        Err(errors) => errors.iter().map(ToString::to_string).collect(),
    }
}

const DATABASE: (&str, &str) = ("POSTROOM_DATABASE_URL", "postgres://u:hunter2@h/d");
const AMQP: (&str, &str) = ("POSTROOM_AMQP_URL", "amqp://u:hunter2@h:5672/%2f");

#[test]
fn defaults_of_the_table_are_those_of_the_types() {
    let nothing = sources(&[]);
    assert_eq!(
        format!("{:?}", load::<Fetch>(&nothing).unwrap()),
        format!("{:?}", Fetch::default())
    );
    assert_eq!(
        format!("{:?}", load::<JobLimits>(&nothing).unwrap()),
        format!("{:?}", JobLimits::default())
    );
    let smtp = load::<Smtp>(&nothing).unwrap();
    assert_eq!(
        format!("{:?}", smtp.timeouts),
        format!("{:?}", SmtpTimeouts::default())
    );
    assert_eq!(
        (smtp.ehlo_name.as_str(), smtp.pool_size, smtp.max_messages),
        ("box.example", 16, 1000)
    );
    let worker = load::<Worker>(&nothing).unwrap();
    assert_eq!(
        (worker.concurrency, worker.lease, worker.grace_period),
        (128, secs(45), secs(60))
    );
    assert_eq!(
        (worker.retention, worker.deferred_report_after),
        (secs(30 * 86_400), secs(60))
    );
    assert_eq!(worker.unknown_tenant, UnknownTenant::default());
    let webhook = load::<Webhook>(&nothing).unwrap();
    assert_eq!(
        (webhook.timeout, webhook.disable_after),
        (secs(15), secs(5 * 86_400))
    );
    assert!(load::<Option<Storage>>(&nothing).unwrap().is_none());
    let telemetry = load::<Telemetry>(&nothing).unwrap();
    assert_eq!((telemetry.log.as_str(), telemetry.json), ("info", true));
    assert_eq!(telemetry.http_addr, Some("0.0.0.0:9090".parse().unwrap()));
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

#[test]
fn a_flag_beats_the_environment_and_an_empty_variable_is_none() {
    let mut sources = sources(&[("POSTROOM_PREFIX", "env"), ("POSTROOM_TOPOLOGY", ""), AMQP]);
    assert_eq!(load::<Broker>(&sources).unwrap().prefix, "env");
    sources.flags.insert("POSTROOM_PREFIX".into(), "flag".into());
    let broker = load::<Broker>(&sources).unwrap();
    assert_eq!(
        (broker.prefix.as_str(), broker.topology),
        ("flag", TopologyMode::Apply)
    );
    assert_eq!(broker.url.expose_secret(), AMQP.1);
}

#[test]
fn every_error_is_told_at_once_and_only_once() {
    type All = (Broker, Database, Keys, Smtp, Worker, Webhook);
    let found = errors::<All>(&[
        ("POSTROOM_AMQP_URL", "http://u:hunter2@h"),
        ("POSTROOM_PREFIX", "a b"),
        ("POSTROOM_LEASE", "45"),
        ("POSTROOM_RETENTION", "1h"),
        ("POSTROOM_POOL_SIZE", "0"),
    ]);
    let names: Vec<_> = found.iter().map(|text| text.split(':').next().unwrap()).collect();
    let expected = [
        "POSTROOM_AMQP_URL",
        "POSTROOM_PREFIX",
        "POSTROOM_DATABASE_URL",
        "POSTROOM_ENCRYPTION_KEYS",
        "POSTROOM_POOL_SIZE",
        "POSTROOM_LEASE",
        "POSTROOM_RETENTION",
    ];
    assert_eq!(names, expected);
    assert!(!found.join("\n").contains("hunter2"));
    assert!(
        found[5].contains("`45` cannot be used") && found[5].contains("from 1s to 10m"),
        "{}",
        found[5]
    );
    assert!(
        found[2].contains("is not set") && found[2].contains("POSTROOM_DATABASE_URL_FILE"),
        "{}",
        found[2]
    );
}

#[test]
fn names_can_be_read_without_a_broker() {
    let BrokerNames(broker) = load(&sources(&[("POSTROOM_QUEUES", "high:mail.jobs.acme,low:x:y")])).unwrap();
    assert_eq!(
        broker.extra_queues,
        [(Level::High, "mail.jobs.acme".into()), (Level::Low, "x:y".into())]
    );
}

#[test]
fn a_secret_comes_from_its_file_but_not_from_both() {
    let path = std::env::temp_dir().join(format!("postroom-secret-{}", std::process::id()));
    std::fs::write(&path, "postgres://u:hunter2@h/d\n").unwrap();
    let file = ("POSTROOM_DATABASE_URL_FILE", path.to_str().unwrap());
    let database = load::<Database>(&sources(&[file])).unwrap();
    assert_eq!(database.url.expose_secret(), "postgres://u:hunter2@h/d");
    assert_eq!(errors::<Database>(&[file, DATABASE]).len(), 1);
    std::fs::write(&path, " \n").unwrap();
    assert!(errors::<Database>(&[file])[0].contains("is empty"));
    std::fs::remove_file(&path).unwrap();
    assert!(errors::<Database>(&[file])[0].starts_with("POSTROOM_DATABASE_URL_FILE: cannot open"));
}

#[test]
fn secrets_are_not_shown_by_debug() {
    let sources = sources(&[DATABASE, AMQP]);
    let loaded: (Broker, Database) = load(&sources).unwrap();
    assert!(!format!("{loaded:?} {sources:?}").contains("hunter2"));
}

#[test]
fn what_does_not_fit_is_refused() {
    type All = (
        Broker,
        Database,
        Smtp,
        JobLimits,
        Fetch,
        Option<Storage>,
        Egress,
        Webhook,
        Telemetry,
    );
    let wrong = [
        ("POSTROOM_DATABASE_SCHEMA", "Mail"),
        ("POSTROOM_DATABASE_SCHEMA", "pg_mail"),
        ("POSTROOM_DATABASE_SCHEMA", "1x"),
        ("POSTROOM_DATABASE_SCHEMA", "a\"b"),
        ("POSTROOM_DATABASE_CA_FILE", "/no/such/file"),
        ("POSTROOM_PREFIX", "mail."),
        ("POSTROOM_PREFIX", "amq.mail"),
        ("POSTROOM_TOPOLOGY", "maybe"),
        ("POSTROOM_QUEUES", "mail.jobs.acme"),
        ("POSTROOM_QUEUES", "urgent:q"),
        ("POSTROOM_QUEUES", "high:q,low:q"),
        ("POSTROOM_JOB_MAX_BYTES", "16MiB"),
        ("POSTROOM_JOB_MAX_INFLATED_BYTES", "1MiB"),
        ("POSTROOM_STORAGE_URL", "ftp://x/y"),
        ("POSTROOM_STORAGE_URL", "s3://key:secret@bucket"),
        ("POSTROOM_STORAGE_URL", "file:///srv/files"),
        ("POSTROOM_STORAGE_PUBLIC_URL", "files.example.com"),
        ("POSTROOM_LINK_LIFETIME", "8d"),
        ("POSTROOM_EGRESS_ALLOW", "10.0.0.0/33"),
        ("POSTROOM_EGRESS_ALLOW", "localhost"),
        ("POSTROOM_HTTP_ADDR", "localhost"),
        ("POSTROOM_LOG", "loud"),
        ("POSTROOM_LOG_FORMAT", "xml"),
        ("POSTROOM_EHLO_NAME", "under_score"),
        ("POSTROOM_WEBHOOK_RETRY_SCALE", "0"),
        ("POSTROOM_ATTACHMENT_MEMORY", "2MiB"),
    ];
    for setting in wrong {
        let found = errors::<All>(&[DATABASE, AMQP, setting]);
        assert_eq!(found.len(), 1, "{setting:?}: {found:?}");
        assert!(
            found[0].contains("give ") || found[0].contains("no such file"),
            "{}",
            found[0]
        );
    }
    for setting in [
        ("POSTROOM_QUEUES", " high:a , low:b "),
        ("POSTROOM_EGRESS_ALLOW", "127.0.0.1, 10.0.0.0/8,fd00::/8"),
        ("POSTROOM_HTTP_ADDR", ":8080"),
        ("POSTROOM_HTTP_ADDR", "off"),
        ("POSTROOM_LOG", "info,postroom::smtp=debug"),
        ("POSTROOM_EHLO_NAME", "[192.0.2.1]"),
        ("POSTROOM_STORAGE_URL", "s3://bucket/prefix"),
    ] {
        assert_eq!(
            errors::<All>(&[DATABASE, AMQP, setting]),
            Vec::<String>::new(),
            "{setting:?}"
        );
    }
}

#[test]
fn a_ca_file_with_a_plain_amqp_url_is_refused() {
    let ca = ("POSTROOM_AMQP_CA_FILE", "src/directory/ca/authority.pem");
    for url in [AMQP.1, "AMQP://u:hunter2@h"] {
        let found = errors::<Broker>(&[("POSTROOM_AMQP_URL", url), ca]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].starts_with(ca.0) && found[0].contains("amqps://"),
            "{found:?}"
        );
        assert!(!found[0].contains("hunter2"), "{found:?}");
    }
    assert_eq!(errors::<BrokerNames>(&[AMQP, ca]), errors::<Broker>(&[AMQP, ca]));
    let secure = ("POSTROOM_AMQP_URL", "amqps://u:hunter2@h");
    assert!(load::<Broker>(&sources(&[secure, ca])).is_ok());
    assert!(load::<BrokerNames>(&sources(&[ca])).is_ok());
}

#[test]
fn files_with_authorities_are_read_as_whoever_uses_them_reads_them() {
    let certificate = std::fs::read_to_string("src/directory/ca/authority.pem").unwrap();
    let odd = "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n";
    let file = |name: &str, text: String| {
        let path = std::env::temp_dir().join(format!("postroom-{name}-{}.pem", std::process::id()));
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (some, none) = (
        file("some", format!("{odd}{certificate}")),
        file("none", odd.to_owned()),
    );
    // The client of RabbitMQ passes over what it cannot read; those of Postgres and SMTP refuse the file.
    let secure = ("POSTROOM_AMQP_URL", "amqps://u:p@h");
    assert!(errors::<Broker>(&[secure, ("POSTROOM_AMQP_CA_FILE", &some)]).is_empty());
    assert_eq!(
        errors::<Broker>(&[secure, ("POSTROOM_AMQP_CA_FILE", &none)]).len(),
        1
    );
    let of_database = [DATABASE, ("POSTROOM_DATABASE_CA_FILE", some.as_str())];
    assert_eq!(errors::<Database>(&of_database).len(), 1);
    let unused = "postgres://u:p@h/d?sslmode=disable&sslrootcert=/no/such/file";
    assert!(errors::<Database>(&[("POSTROOM_DATABASE_URL", unused)]).is_empty());
}

#[test]
fn queues_of_its_own_are_no_dedicated_ones() {
    for own in [
        "high:mail.jobs.low",
        "high:q,low:mail.jobs.dead",
        "low:mail.unroutable",
        "low:mail.reports.bridge",
        "low:mail.reports.dead",
    ] {
        let found = errors::<BrokerNames>(&[("POSTROOM_QUEUES", own)]);
        assert_eq!(found.len(), 1, "{own}: {found:?}");
        assert!(found[0].contains("of Postroom's own: give "), "{found:?}");
    }
    let others = "low:mail.jobs.low.acme,low:post.jobs.low,low:mail.jobs.acme";
    let found = errors::<BrokerNames>(&[("POSTROOM_QUEUES", others)]);
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    let stored = format!("k1:ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=,k2:{key}");
    let keys = [
        ("POSTROOM_ENCRYPTION_KEYS", stored.as_str()),
        ("POSTROOM_OVERRIDE_KEYS", &format!("other:{key}")),
    ];
    for (env, named) in [
        (&[("POSTROOM_RETRY_BASE", "5h")][..], "POSTROOM_RETRY_CAP"),
        (&[("POSTROOM_RETRY_CAP", "10s")], "POSTROOM_RETRY_CAP"),
        (
            &[("POSTROOM_BREAKER_COOLDOWN", "16m")],
            "POSTROOM_BREAKER_COOLDOWN_CAP",
        ),
        (&keys, "POSTROOM_OVERRIDE_KEYS"),
    ] {
        let others = [keys[0], DATABASE];
        let env: Vec<_> = env.iter().chain(&others).copied().collect();
        let found = errors::<(Keys, Worker)>(&env);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].starts_with(named) && found[0].contains("give "),
            "{found:?}"
        );
        assert!(!found[0].contains(key), "{found:?}");
    }
    let equal = [
        keys[0],
        ("POSTROOM_RETRY_BASE", "4h"),
        ("POSTROOM_BREAKER_COOLDOWN_CAP", "60s"),
    ];
    assert_eq!(errors::<(Keys, Worker)>(&equal), Vec::<String>::new());
}

#[test]
fn a_worker_sends_at_least_as_many_mails_at_once_as_the_levels_can_share() {
    let concurrency =
        |text| load::<Worker>(&sources(&[("POSTROOM_CONCURRENCY", text)])).map(|w| w.concurrency);
    assert_eq!(concurrency("8").unwrap(), 8);
    let error = concurrency("7").unwrap_err().remove(0).to_string();
    assert!(error.contains("from 8 to"), "{error}");
}

#[test]
fn a_local_folder_needs_a_public_url() {
    let env = [
        ("POSTROOM_STORAGE_URL", "file:///srv/f"),
        ("POSTROOM_STORAGE_PUBLIC_URL", "https://f.example/x/"),
    ];
    let storage = load::<Option<Storage>>(&sources(&env)).unwrap().unwrap();
    assert_eq!(storage.public_url.as_deref(), Some("https://f.example/x"));
    assert_eq!(storage.url, "file:///srv/f");
}

const COLLECTOR: (&str, &str) = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "https://collector.example:4318/base/",
);

fn read_traces(env: &[(&str, &str)]) -> Traces {
    load::<Option<Traces>>(&sources(env)).unwrap().unwrap()
}

#[test]
fn without_an_endpoint_there_are_no_traces_and_the_rest_is_not_looked_at() {
    let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
    for env in [
        &[grpc][..],
        &[grpc, COLLECTOR, ("OTEL_SDK_DISABLED", "TRUE")],
        &[grpc, ("OTEL_EXPORTER_OTLP_ENDPOINT", "")],
    ] {
        assert!(
            load::<Option<Traces>>(&sources(env)).unwrap().is_none(),
            "{env:?}"
        );
    }
}

#[test]
fn a_disabled_sdk_accepts_any_endpoint() {
    let disabled = ("OTEL_SDK_DISABLED", "true");
    for name in [
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    ] {
        let grpc = (name, "collector:4317");
        assert!(
            load::<Option<Traces>>(&sources(&[grpc, disabled]))
                .unwrap()
                .is_none()
        );
        assert_eq!(errors::<Option<Traces>>(&[grpc]).len(), 1, "{name}");
    }
}

#[test]
fn the_endpoint_of_all_signals_is_not_looked_at_beside_that_of_traces() {
    let grpc = ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317");
    let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4318/x");
    assert_eq!(read_traces(&[grpc, own]).endpoint.expose_secret(), own.1);
}

#[test]
fn the_endpoint_of_all_signals_gets_a_path_and_that_of_traces_wins_as_it_is() {
    let endpoint = |env: &[(&str, &str)]| read_traces(env).endpoint.expose_secret().to_owned();
    assert_eq!(
        endpoint(&[COLLECTOR]),
        "https://collector.example:4318/base/v1/traces"
    );
    let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4318/x");
    assert_eq!(endpoint(&[COLLECTOR, own]), own.1);
}

#[test]
fn headers_and_attributes_are_percent_encoded_pairs() {
    let read = read_traces(&[
        COLLECTOR,
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "authorization=Bearer%20hunter2==, x-team = mail ,",
        ),
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            "deployment.environment.name=pr%C3%BCf",
        ),
        ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "2500"),
    ]);
    let headers: Vec<_> = read
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.expose_secret()))
        .collect();
    assert_eq!(
        headers,
        [("authorization", "Bearer hunter2=="), ("x-team", "mail")]
    );
    assert_eq!(
        read.attributes,
        [("deployment.environment.name".to_owned(), "prüf".to_owned())]
    );
    assert_eq!(
        read.sampler,
        Sampler {
            parent_based: true,
            ratio: 0.25
        }
    );
    assert_eq!(read.timeout, Duration::from_millis(2500));
    assert!(!format!("{read:?}").contains("hunter2"));
}

#[test]
fn what_the_collector_cannot_be_asked_for_is_refused_without_repeating_secrets() {
    for setting in [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector:4318"),
        (
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "https://user:hunter2@collector",
        ),
        ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a b=hunter2"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=hunter2%0a"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5"),
        ("OTEL_SDK_DISABLED", "yes"),
    ] {
        let found = errors::<Option<Traces>>(&[COLLECTOR, setting]);
        assert_eq!(found.len(), 1, "{setting:?}: {found:?}");
        assert!(
            found[0].starts_with(setting.0) && found[0].contains("give "),
            "{}",
            found[0]
        );
        assert!(!found[0].contains("hunter2"), "{}", found[0]);
    }
}

#[test]
fn misspelt_variables_are_told_with_the_nearest_name() {
    let unknown = sources(&[
        ("POSTROOM_CONCURENCY", "5"),
        ("POSTROOM_SOMETHING_ELSE", "5"),
        ("POSTROOM_TEST_AMQP_URL", "x"),
        ("POSTROOM_DATABASE_URL_FILE", "x"),
        ("POSTROOM_SERVICE_HOST", "10.0.0.1"),
        ("POSTROOM_PORT_9090_TCP_ADDR", "10.0.0.1"),
        ("POSTROOM_LOG", "info"),
        ("PATH", "/bin"),
    ])
    .unknown();
    assert_eq!(unknown.len(), 2, "{unknown:?}");
    assert!(
        unknown[0].contains("did you mean POSTROOM_CONCURRENCY?"),
        "{unknown:?}"
    );
    assert!(unknown[1].contains("`postroom --help`"), "{unknown:?}");
}

#[cfg(not(feature = "fail-points"))]
#[test]
fn a_build_without_fail_points_says_that_it_has_none() {
    let unknown = sources(&[("POSTROOM_FAIL_POINTS", "settled=kill")]).unknown();
    assert_eq!(unknown.len(), 1, "{unknown:?}");
}

#[test]
fn every_setting_is_named_once_and_has_a_section() {
    for (at, setting) in SETTINGS.iter().enumerate() {
        assert!(
            setting.name.starts_with("POSTROOM_") || setting.name.starts_with("OTEL_"),
            "{}",
            setting.name
        );
        assert!(
            !setting.sections.is_empty() && !setting.help.is_empty(),
            "{}",
            setting.name
        );
        assert!(setting.help.ends_with('.'), "{}", setting.name);
        assert!(
            SETTINGS[..at].iter().all(|other| other.name != setting.name),
            "{} twice",
            setting.name
        );
    }
    assert!(find("POSTROOM_LOG").is_some());
    assert!(
        Section::ALL
            .iter()
            .all(|section| SETTINGS.iter().any(|s| s.sections.contains(section)))
    );
}

#[test]
fn durations_add_up() {
    for (text, millis) in [
        ("45s", 45_000),
        ("1h30m", 5_400_000),
        ("500ms", 500),
        ("30d", 2_592_000_000),
        ("0s", 0),
    ] {
        assert_eq!(
            parse::duration(text, Duration::ZERO..=secs(1 << 32)).unwrap(),
            Duration::from_millis(millis)
        );
    }
    for text in [
        "",
        "s",
        "5",
        "5x",
        "-5s",
        "5 s",
        "1.5h",
        "99999999999999999999d",
        "18446744073709551615d",
    ] {
        assert!(
            parse::duration(text, Duration::ZERO..=Duration::MAX).is_err(),
            "{text}"
        );
    }
}

#[test]
fn sizes_have_units() {
    for (text, bytes) in [
        ("8MiB", 8 << 20),
        ("8388608", 8 << 20),
        ("10 MB", 10_000_000),
        ("1KiB", 1024),
        ("7B", 7),
    ] {
        assert_eq!(parse::size(text, 0..=u64::MAX).unwrap(), bytes);
    }
    for text in ["", "MiB", "8mib", "8.5MiB", "-1", "18446744073709551615GiB"] {
        assert!(parse::size(text, 0..=u64::MAX).is_err(), "{text}");
    }
}

proptest! {
    #[test]
    fn a_shown_duration_reads_back(millis in 0_u64..10_000_000_000) {
        let duration = Duration::from_millis(millis);
        let text = parse::show_duration(duration);
        prop_assert_eq!(parse::duration(&text, Duration::ZERO..=Duration::MAX).unwrap(), duration);
    }

    #[test]
    fn no_text_makes_a_parser_panic(text in "\\PC*") {
        let _ = parse::duration(&text, Duration::ZERO..=Duration::MAX);
        let _ = parse::size(&text, 0..=u64::MAX);
        let _ = (parse::queues(&text).is_ok(), parse::networks(&text).is_ok(), parse::http_addr(&text).is_ok());
        let _ = (super::traces::collector_url(&text).is_ok(), traces::pairs(&text).is_ok(), traces::headers(&text).is_ok());
        let _ = (parse::storage_url(&text).is_ok(), parse::ehlo_name(&text).is_ok(), parse::prefix(&text).is_ok());
    }
}
