use std::collections::BTreeMap;

use super::*;
use crate::config::settings::SETTINGS;

fn parse(args: &[&str]) -> Result<Invocation, clap::Error> {
    Invocation::try_parse(["postroom"].iter().chain(args).map(OsString::from))
}

fn sources(env: &[(&str, &str)]) -> Sources {
    let env = env
        .iter()
        .map(|(name, value)| ((*name).into(), (*value).into()))
        .collect();
    Sources {
        env,
        flags: BTreeMap::new(),
        hostname: "box".into(),
        terminal: false,
    }
}

async fn run(args: &[&str], env: &[(&str, &str)]) -> (Result<(), CliError>, String) {
    let mut invocation = parse(args).unwrap();
    invocation.sources = Sources {
        flags: invocation.sources.flags,
        ..sources(env)
    };
    let mut out = Vec::new();
    let result = invocation.dispatch(&mut out).await;
    (result, String::from_utf8(out).unwrap())
}

#[test]
fn the_command_line_is_sound() {
    settings::command().debug_assert();
}

#[test]
fn the_examples_in_help_are_valid() {
    for command in settings::command().get_subcommands() {
        let text = settings::examples(command.get_name()).replace("\\\n", " ");
        for line in text.lines().skip(1) {
            let line = line.split(['#', '<']).next().unwrap_or_default();
            let words = line.split_whitespace().skip_while(|word| *word != "postroom");
            let words: Vec<&str> = words.skip(1).map(|word| word.trim_matches('\'')).collect();
            // A quoted value is two words here, and stands for any value.
            let words: Vec<&str> = words.into_iter().filter(|word| *word != "Inc.").collect();
            if let Err(error) = parse(&words) {
                panic!("{line}: {error}");
            }
        }
    }
}

#[test]
fn help_and_documentation_name_every_variable() {
    let help = settings::command().render_long_help().to_string();
    let documentation = include_str!("../../docs/configuration.md");
    for setting in SETTINGS {
        assert!(help.contains(setting.name), "--help lacks {}", setting.name);
        assert!(
            documentation.contains(setting.name),
            "docs/configuration.md lacks {}",
            setting.name
        );
        assert!(
            documentation.contains(&format!("`--{}`", setting.flag())),
            "docs lack --{}",
            setting.flag()
        );
        if setting.secret {
            assert!(
                help.contains(&setting.file_variable()) && documentation.contains(&setting.file_variable())
            );
        }
    }
}

#[test]
fn documentation_is_what_the_table_says() {
    let documentation = include_str!("../../docs/configuration.md");
    for setting in SETTINGS {
        let default = setting
            .default
            .map_or_else(|| "–".into(), |default| format!("`{default}`"));
        let (form, help) = (setting.form.replace('|', "\\|"), setting.help.replace('|', "\\|"));
        let row = format!(
            "| `{}` | `--{}` | `{form}` | {default} | {help} |",
            setting.name,
            setting.flag()
        );
        assert!(
            documentation.contains(&row),
            "docs/configuration.md should have this row:\n{row}"
        );
    }
}

#[test]
fn every_command_shows_its_settings() {
    for command in settings::command().get_subcommands_mut() {
        let name = command.get_name().to_owned();
        let help = command.render_long_help().to_string();
        for setting in SETTINGS {
            let wanted = setting
                .sections
                .iter()
                .any(|section| settings::sections(&name).contains(section));
            assert!(
                !wanted || help.contains(&format!("--{} ", setting.flag())),
                "{name} --help lacks {}",
                setting.name
            );
        }
        assert!(help.contains("Examples:"), "{name} --help has no example");
    }
}

#[test]
fn flags_stand_for_variables_at_any_place() {
    for args in [["--log", "debug", "migrate"], ["migrate", "--log", "debug"]] {
        assert_eq!(
            parse(&args).unwrap().sources.flags,
            BTreeMap::from([("POSTROOM_LOG".into(), "debug".into())])
        );
    }
    let flags = parse(&["migrate", "--database-url-file", "/run/url"])
        .unwrap()
        .sources
        .flags;
    assert_eq!(
        flags,
        BTreeMap::from([("POSTROOM_DATABASE_URL_FILE".into(), "/run/url".into())])
    );
}

#[test]
fn secrets_and_urls_with_passwords_are_no_flags() {
    for flag in [
        "--amqp-url",
        "--database-url",
        "--encryption-keys",
        "--override-keys",
    ] {
        assert!(parse(&["migrate", flag, "x"]).is_err(), "{flag}");
        assert!(parse(&["worker", flag, "x"]).is_err(), "{flag}");
    }
}

#[test]
fn version_and_help_are_no_errors_and_wrong_arguments_are() {
    for (args, stderr) in [
        (vec!["--version"], false),
        (vec!["--help"], false),
        (vec!["migrat"], true),
        (vec![], true),
    ] {
        assert_eq!(parse(&args).unwrap_err().use_stderr(), stderr, "{args:?}");
    }
    assert!(
        parse(&["--version"])
            .unwrap_err()
            .to_string()
            .contains(env!("CARGO_PKG_VERSION"))
    );
}

#[tokio::test]
async fn wrong_settings_are_wrong_use_and_all_are_named() {
    let env = [
        ("POSTROOM_DATABASE_SCHEMA", "A b"),
        ("POSTROOM_LOG_FORMAT", "xml"),
    ];
    let error = run(&["migrate"], &env).await.0.unwrap_err();
    assert_eq!(error.exit_code(), WRONG_USE);
    let text = error.to_string();
    for name in [
        "POSTROOM_DATABASE_URL",
        "POSTROOM_DATABASE_SCHEMA",
        "POSTROOM_LOG_FORMAT",
    ] {
        assert!(text.contains(name), "{text}");
    }
    let error = run(&["healthcheck"], &[("POSTROOM_HTTP_ADDR", "off")])
        .await
        .0
        .unwrap_err();
    assert_eq!(error.exit_code(), WRONG_USE);
}

#[tokio::test]
async fn what_only_a_driver_can_read_is_checked_with_all_else() {
    let database = ("POSTROOM_DATABASE_URL", "postgres://u:hunter2@h/d");
    let amqp = ("POSTROOM_AMQP_URL", "amqps://u:hunter2@h");
    for (name, value) in [
        (database.0, "postgres://u:hunter2@h/d?sslmode=on"),
        (database.0, "postgres://u:hunter2@h/d?foo=1"),
        (database.0, "postgres://u:hunter2@h:99999/d"),
        (database.0, "postgres://u:hunter2@h/d?sslrootcert=Cargo.toml"),
        (database.0, "postgres://u:hunter2@h/d?sslrootcert=/no/such/file"),
        ("POSTROOM_DATABASE_CA_FILE", "Cargo.toml"),
        (amqp.0, "amqp://u:hunter2@h:99999"),
        (amqp.0, "amqp://u:hunter2@h/mail?heartbeat=often"),
        ("POSTROOM_AMQP_CA_FILE", "Cargo.toml"),
        ("POSTROOM_SMTP_CA_FILE", "Cargo.toml"),
    ] {
        let key = (
            "POSTROOM_ENCRYPTION_KEYS",
            "k:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
        );
        let given = [database, amqp, key, ("POSTROOM_LEASE", "soon"), (name, value)];
        let error = run(&["worker"], &given).await.0.unwrap_err();
        assert_eq!(error.exit_code(), WRONG_USE, "{value}: {error}");
        let text = error.to_string();
        assert!(
            text.contains(name) && text.contains("POSTROOM_LEASE"),
            "{value}: {text}"
        );
        assert_eq!(text.lines().count(), 3, "{value}: {text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[tokio::test]
async fn keys_are_asked_for_only_where_something_is_sealed() {
    let env = [("POSTROOM_DATABASE_URL", "postgres://u:hunter2@127.0.0.1:1/d")];
    for change in ["--enable", "--disable", "--events=default", "--no-auth"] {
        let error = run(&["endpoint", "set", "acme", change], &env)
            .await
            .0
            .unwrap_err();
        assert!(error.to_string().contains("cannot connect"), "{change}: {error}");
    }
    let sealing = ["endpoint", "set", "acme", "--generate-secret"];
    let error = run(&sealing, &env).await.0.unwrap_err();
    assert!(error.to_string().contains("POSTROOM_ENCRYPTION_KEYS"), "{error}");
    assert_eq!(error.exit_code(), WRONG_USE);
}

#[test]
fn what_a_replay_may_be_of_is_named_together() {
    let error = parse(&["endpoint", "replay", "acme"]).unwrap_err().to_string();
    for flag in ["--event", "--since", "--failed"] {
        assert!(error.contains(flag), "{error}");
    }
    assert!(parse(&["endpoint", "replay", "acme", "--failed", "--since", "2h"]).is_ok());
    assert!(parse(&["endpoint", "replay", "acme", "--event", "e", "--failed"]).is_err());
}

#[tokio::test]
async fn a_database_that_is_away_is_a_failure_and_its_password_is_not_shown() {
    let env = [("POSTROOM_DATABASE_URL", "postgres://u:hunter2@127.0.0.1:1/d")];
    let error = run(&["migrate"], &env).await.0.unwrap_err();
    assert_eq!(error.exit_code(), FAILED);
    assert!(
        error.to_string().contains("cannot connect") && !error.to_string().contains("hunter2"),
        "{error}"
    );
}

#[test]
fn a_reader_that_has_gone_is_no_failure() {
    #[derive(Debug, thiserror::Error)]
    #[error("listing")]
    struct Listing(#[source] std::io::Error);
    let gone = || std::io::Error::from(std::io::ErrorKind::BrokenPipe);
    assert!(CliError::from(gone()).is_broken_pipe());
    assert!(CliError::from(Listing(gone())).is_broken_pipe());
    assert!(!CliError::from(std::io::Error::other("x")).is_broken_pipe());
}

#[test]
fn a_server_that_takes_no_writes_leads_to_what_may_be_done() {
    let error = CliError::from(std::io::Error::new(
        std::io::ErrorKind::PermissionDenied,
        "database does not allow writes",
    ));
    assert!(error.to_string().contains("target_session_attrs=any"), "{error}");
}

#[tokio::test]
async fn migrate_says_what_it_did() {
    let url = std::env::var("POSTROOM_TEST_DATABASE_URL")
        .expect("POSTROOM_TEST_DATABASE_URL must name a Postgres server for tests: run `make test`");
    let schema = format!("t_cli_{}", uuid::Uuid::new_v4().simple());
    let env = [("POSTROOM_DATABASE_URL", url.as_str())];
    let (result, first) = run(&["migrate", "--database-schema", &schema], &env).await;
    result.unwrap();
    assert!(
        first.starts_with(&format!("schema {schema}: version 0 -> ")),
        "{first}"
    );
    let (result, second) = run(&["migrate", "--database-schema", &schema], &env).await;
    result.unwrap();
    assert!(second.contains("up to date"), "{second}");
    let grant = ["migrate", "--database-schema", &schema, "--grant", "no_such_role"];
    let error = run(&grant, &env).await.0.unwrap_err().to_string();
    assert!(
        error.contains("no_such_role") && !error.contains("makes the schema"),
        "{error}"
    );

    let config = config::load(&sources(&[env[0], ("POSTROOM_DATABASE_SCHEMA", &schema)])).unwrap();
    let database = crate::db::Database::connect(&config).unwrap();
    let drop = database.sql("DROP SCHEMA {s} CASCADE");
    database
        .client()
        .await
        .unwrap()
        .batch_execute(&drop)
        .await
        .unwrap();
}

#[tokio::test]
async fn commands_without_a_schema_say_what_makes_it() {
    let url = std::env::var("POSTROOM_TEST_DATABASE_URL")
        .expect("POSTROOM_TEST_DATABASE_URL must name a Postgres server for tests: run `make test`");
    let schema = format!("t_cli_{}", uuid::Uuid::new_v4().simple());
    let env = [
        ("POSTROOM_DATABASE_URL", url.as_str()),
        ("POSTROOM_DATABASE_SCHEMA", schema.as_str()),
    ];
    for args in [
        &["job", "list"][..],
        &["tenant", "list"],
        &["account", "list"],
        &["endpoint", "list"],
        &["job", "cancel", "acme", "1"],
    ] {
        let error = run(args, &env).await.0.unwrap_err();
        assert_eq!(error.exit_code(), FAILED);
        assert!(
            error.to_string().contains("`postroom migrate`"),
            "{args:?}: {error}"
        );
    }
}

#[tokio::test]
async fn healthcheck_passes_readiness_on() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let readiness = crate::health::Readiness::default();
    let metrics = std::sync::Arc::new(crate::telemetry::metrics::Metrics::new().unwrap());
    let addr = "127.0.0.1:0".parse().unwrap();
    let server = crate::health::Server::bind(addr, readiness.clone(), metrics)
        .await
        .unwrap();
    let addr = server.addr().to_string();
    tokio::spawn(server.run(tokio_util::sync::CancellationToken::new()));

    let amqp = readiness.component("amqp");
    let (result, _) = run(&["healthcheck", "--http-addr", &addr], &[]).await;
    let error = result.unwrap_err();
    assert_eq!(error.exit_code(), FAILED);
    assert!(error.to_string().contains("[-] amqp: starting"), "{error}");
    amqp.ready();
    let (result, out) = run(&["healthcheck"], &[("POSTROOM_HTTP_ADDR", &addr)]).await;
    result.unwrap();
    assert!(out.contains("[+] amqp ok"), "{out}");
}

#[tokio::test]
async fn a_service_is_not_ready_while_it_ends_and_tells_a_crash() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let env = [
        ("POSTROOM_HTTP_ADDR", "127.0.0.1:0"),
        ("POSTROOM_GRACE_PERIOD", "10s"),
    ];
    let (telemetry, process): (config::Telemetry, config::Process) = config::load(&sources(&env)).unwrap();
    let service = Service::start("worker", &telemetry, None, process, &Sources::default())
        .await
        .unwrap();
    let (readiness, hard) = (service.readiness.clone(), service.shutdown.hard.clone());
    readiness.component("work").ready();
    assert!(readiness.is_ready());
    let watched = readiness.clone();
    let soft = service.shutdown.soft.clone();
    service.shutdown.spawn("work", async move {
        soft.cancelled().await;
        while watched.is_ready() {
            tokio::task::yield_now().await;
        }
    });
    service.shutdown.spawn("faulty", async {});
    let error = service.finish().await.unwrap_err();
    assert!(matches!(error, ServiceError::Crashed));
    assert!(readiness.to_string().contains("shutting down") && !hard.is_cancelled());
}

#[tokio::test]
async fn definitions_are_printed_for_the_virtual_host_of_the_url_or_else_the_default_one() {
    for (env, vhost) in [
        (&[][..], "/"),
        (
            &[("POSTROOM_AMQP_URL", "amqp://user:password@host/mail")][..],
            "mail",
        ),
        (
            &[("POSTROOM_AMQP_URL", "amqp://user:password@host:5672/")][..],
            "/",
        ),
    ] {
        let (result, out) = run(&["topology", "print"], env).await;
        result.unwrap();
        let definitions: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(definitions["queues"][0]["vhost"], vhost);
        assert!(!out.contains("password"));
    }
    for command in ["print", "check"] {
        let (result, _) = run(&["topology", command], &[("POSTROOM_AMQP_URL", "host")]).await;
        let error = result.unwrap_err().to_string();
        assert_eq!(error.matches("POSTROOM_AMQP_URL").count(), 1, "{error}");
    }
}
