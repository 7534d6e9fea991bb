//! The binary as scripts and containers use it: exit codes, output, logs.

use std::process::{Command, Output, Stdio};

const CANARY: &str = "hunter2-canary";

/// The binary with no settings but those given.
fn postroom(args: &[&str], env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_postroom"));
    command
        .args(args)
        .env_clear()
        .envs(env.iter().copied())
        .stdin(Stdio::null());
    command
}

fn run(args: &[&str], env: &[(&str, &str)]) -> Output {
    postroom(args, env).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn database_url() -> String {
    std::env::var("POSTROOM_TEST_DATABASE_URL")
        .expect("POSTROOM_TEST_DATABASE_URL must name a Postgres server for tests: run `make test`")
}

#[test]
fn exit_codes_tell_failure_from_wrong_use() {
    let away = (
        "POSTROOM_DATABASE_URL",
        "postgres://u:hunter2-canary@127.0.0.1:1/d",
    );
    for (args, env, code) in [
        (&["--version"][..], &[][..], 0),
        (&["--help"], &[], 0),
        (&["migrate", "--help"], &[], 0),
        (&[], &[], 2),
        (&["migrat"], &[], 2),
        (&["migrate", "--no-such-flag"], &[], 2),
        (&["migrate"], &[], 2),
        (&["migrate"], &[away], 1),
        (&["healthcheck"], &[("POSTROOM_HTTP_ADDR", "127.0.0.1:1")], 1),
    ] {
        let output = run(args, env);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
        assert!(!text(&output.stderr).contains(CANARY), "{output:?}");
        // What is asked for goes to standard output, everything else to standard error.
        assert_eq!(output.stdout.is_empty(), code != 0, "{args:?}: {output:?}");
    }
}

#[test]
fn a_misspelt_variable_is_told_and_harmless() {
    let env = [("POSTROOM_HTTP_ADRR", "x"), ("POSTROOM_HTTP_ADDR", "127.0.0.1:1")];
    let stderr = text(&run(&["healthcheck"], &env).stderr);
    assert!(stderr.contains("did you mean POSTROOM_HTTP_ADDR?"), "{stderr}");
}

#[test]
fn the_password_is_in_no_log_even_at_trace() {
    let schema = format!("t_it_{}", std::process::id());
    // Whether the server asks for passwords or trusts whoever comes from here.
    administer(&format!(
        "CREATE ROLE {schema} LOGIN PASSWORD '{CANARY}';
         DO $$BEGIN EXECUTE format('GRANT CREATE ON DATABASE %I TO {schema}', current_database()); END$$"
    ));
    let mut url = url::Url::parse(&database_url()).unwrap();
    url.set_username(&schema).unwrap();
    url.set_password(Some(CANARY)).unwrap();
    let everything = "trace,tokio_postgres=trace,postgres=trace,rustls=trace,deadpool=trace,postroom=trace";
    let env = [
        ("POSTROOM_DATABASE_URL", url.as_str()),
        ("POSTROOM_DATABASE_SCHEMA", &schema),
        ("POSTROOM_LOG", everything),
        ("RUST_LOG", "trace"),
        ("RUST_BACKTRACE", "full"),
    ];
    let output = run(&["migrate"], &env);
    assert!(output.status.success(), "{output:?}");
    let stderr = text(&output.stderr);
    assert!(stderr.contains("applying migration"), "{stderr}");
    assert!(
        !stderr.contains(CANARY) && !text(&output.stdout).contains(CANARY),
        "{stderr}"
    );
    for line in stderr.lines() {
        assert!(
            serde_json::from_str::<serde_json::Value>(line).is_ok(),
            "outside a terminal logs are JSON: {line}"
        );
    }
    administer(&format!("DROP OWNED BY {schema} CASCADE; DROP ROLE {schema}"));
}

#[test]
fn a_service_that_cannot_start_says_why_in_the_last_line_of_its_log() {
    let schema = format!("t_it_none_{}", std::process::id());
    let url = database_url();
    let env = [
        ("POSTROOM_DATABASE_URL", url.as_str()),
        ("POSTROOM_DATABASE_SCHEMA", &schema),
        ("POSTROOM_AMQP_URL", "amqp://guest:guest@127.0.0.1:1"),
        ("POSTROOM_HTTP_ADDR", "off"),
    ];
    let key = crate::support::new_key("k");
    let env: Vec<_> = env
        .into_iter()
        .chain([("POSTROOM_ENCRYPTION_KEYS", key.as_str())])
        .collect();
    for service in ["worker", "bridge"] {
        let output = run(&[service], &env);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let stderr = text(&output.stderr);
        assert!(!stderr.contains("task died"), "{stderr}");
        let last: serde_json::Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
        assert_eq!(last["level"], "ERROR", "{last}");
        let error = last["error"].as_str().unwrap();
        assert!(error.contains("postroom migrate"), "{last}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let schema = format!("t_it_pipe_{}", std::process::id());
    let url = database_url();
    let env = [
        ("POSTROOM_DATABASE_URL", url.as_str()),
        ("POSTROOM_DATABASE_SCHEMA", &schema),
    ];
    let mut child = postroom(&["migrate"], &env)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!text(&output.stderr).contains("panicked"), "{output:?}");
    administer(&format!("DROP SCHEMA {schema} CASCADE"));
}

fn administer(statements: &str) {
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let (client, connection) = tokio_postgres::connect(&database_url(), tokio_postgres::NoTls)
            .await
            .unwrap();
        tokio::spawn(connection);
        client.batch_execute(statements).await.unwrap();
    });
}
