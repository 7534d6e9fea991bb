//! The commands of tenants and accounts together, as an operator uses them.

use std::io::Write as _;
use std::path::PathBuf;

use clap::Parser;

use super::*;
use crate::cli::{key, tenant};
use crate::directory::scratch::Scratch;

#[derive(Debug, Parser)]
enum Commands {
    #[command(subcommand)]
    Tenant(tenant::Command),
    #[command(subcommand)]
    Account(Command),
}

/// Runs a command line, the password on standard input; gives what it printed, or the exit code and the error.
async fn run_with(store: &Store, input: &str, line: &str) -> Result<String, (u8, String)> {
    let words = line
        .split(' ')
        .map(|word| word.replace('_', " ").replace("''", ""));
    let command = Commands::try_parse_from(std::iter::once("postroom".to_owned()).chain(words))
        .map_err(|error| (2, error.to_string()))?;
    let mut out = Vec::new();
    let result = match command {
        Commands::Tenant(command) => tenant::run(command, store, &mut out).await,
        Commands::Account(command) => run(command, store, &mut input.as_bytes(), &mut out).await,
    };
    let printed = String::from_utf8(out).unwrap();
    result
        .map(|()| printed)
        .map_err(|error| (error.exit_code(), error.to_string()))
}

async fn ok(store: &Store, line: &str) -> String {
    run_with(store, "hunter2\n", line)
        .await
        .unwrap_or_else(|error| panic!("{line}: {error:?}"))
}

async fn json(store: &Store, line: &str) -> Value {
    serde_json::from_str(&ok(store, line).await).unwrap()
}

#[tokio::test]
async fn an_operator_sets_up_a_tenant() {
    let scratch = Scratch::new().await;
    let store = scratch.store();
    let said = ok(
        &store,
        "tenant set acme --name Acme_Ltd --fallback platform --on-uncertain hold --per-day 500 \
                           --limit-unit recipients --large-file-bytes 1000 --large-file-action rewrite",
    )
    .await;
    assert_eq!(said, "tenant acme saved\n");
    assert_eq!(
        json(&store, "tenant show acme --json").await,
        json!({
            "tenant": "acme", "name": "Acme Ltd", "fallback": "platform", "on_uncertain": "hold",
            "limits": [{"limit": 500, "per": "1d", "unit": "recipients"}],
            "large_file_bytes": 1000, "large_file_action": "rewrite",
        })
    );
    ok(&store, "tenant set - --per-hour 9").await;
    let listed = ok(&store, "tenant list").await;
    assert!(
        listed.contains("acme") && listed.contains("500/1d recipients") && listed.contains("9/1h"),
        "{listed}"
    );
    assert_eq!(
        json(&store, "tenant list --json").await.as_array().unwrap().len(),
        2
    );
    assert_eq!(ok(&store, "tenant remove acme").await, "tenant acme removed\n");
    let (code, error) = run_with(&store, "", "tenant show acme").await.unwrap_err();
    assert_eq!((code, error.contains("tenant set acme")), (1, true));
    scratch.end().await;
}

#[tokio::test]
async fn an_operator_sets_up_an_account() {
    let scratch = Scratch::new().await;
    let store = scratch.store();
    ok(&store, "tenant set acme").await;
    let mut authority = tempfile();
    authority.1.write_all(ca::tests::AUTHORITY.as_bytes()).unwrap();
    let path = authority.0.display().to_string().replace('_', "\u{0}");
    assert!(
        !path.contains('\u{0}'),
        "the test splits words at blanks written as underscores"
    );
    let said = ok(&store, &format!(
        "account set acme main --host smtp.example.com --port 587 --tls starttls --username u --password-stdin \
         --per-minute 60 --limit 10000/1d:recipients --max-connections 3 --from Acme_<post@acme.example> \
         --max-attempts 5 --max-age 2d --ca-file {path}")).await;
    std::fs::remove_file(&authority.0).unwrap();
    assert_eq!(said, "account acme/main saved\n");
    let mut shown = json(&store, "account show acme main --json").await;
    assert!(shown["version"].take().as_i64().unwrap() > 0);
    let expected = json!({
        "tenant": "acme", "account": "main", "host": "smtp.example.com", "port": 587, "tls": "starttls",
        "username": "u", "has_password": true, "allow_plaintext_auth": false, "has_ca": true,
        "from": "Acme <post@acme.example>",
        "limits": [{"limit": 60, "per": "1m", "unit": "messages"}, {"limit": 10000, "per": "1d", "unit": "recipients"}],
        "max_connections": 3, "max_attempts": 5, "max_age": "2d", "default": true, "version": null,
    });
    assert_eq!(shown, expected);

    scratch.end().await;
}

#[tokio::test]
async fn an_operator_changes_and_removes_accounts() {
    let scratch = Scratch::new().await;
    let store = scratch.store();
    ok(&store, "tenant set acme").await;
    ok(&store, "account set acme main --host smtp.example.com --port 587 --tls starttls --username u --password-stdin \
                --per-minute 60 --limit 10000/1d:recipients --max-connections 3 --max-age 2d").await;
    ok(
        &store,
        "account set acme main --per-minute 0 --max-connections 0 --max-age 0 --allow-plaintext-auth",
    )
    .await;
    let shown = json(&store, "account show acme main --json").await;
    assert_eq!(shown["limits"].as_array().unwrap().len(), 1);
    assert_eq!(
        (&shown["max_connections"], &shown["max_age"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(
        (&shown["allow_plaintext_auth"], &shown["has_password"]),
        (&json!(true), &json!(true))
    );

    let said = ok(
        &store,
        "account set acme main --allow-plaintext-auth=false --tls none",
    )
    .await;
    assert!(said.contains("note: without TLS"), "{said}");
    ok(
        &store,
        "account set acme main --ca-file '' --from '' --username ''",
    )
    .await;
    let shown = json(&store, "account show acme main --json").await;
    assert_eq!(
        (&shown["has_ca"], &shown["has_password"]),
        (&json!(false), &json!(false))
    );
    assert_eq!((&shown["from"], &shown["username"]), (&Value::Null, &Value::Null));
    ok(
        &store,
        "account set acme two --host h --port 25 --tls none --default",
    )
    .await;
    let listed = json(&store, "account list acme --json").await;
    let defaults: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|account| account["default"].clone())
        .collect();
    assert_eq!(defaults, [json!(false), json!(true)]);
    let table = ok(&store, "account list acme").await;
    assert!(
        table.starts_with("TENANT") && table.contains("smtp.example.com:587"),
        "{table}"
    );
    assert!(!format!("{table}{}", ok(&store, "account show acme main").await).contains("hunter2"));
    ok(&store, "account set - relay --host relay --port 25 --tls none").await;
    ok(&store, "account remove acme two").await;
    scratch.end().await;
}

#[tokio::test]
async fn an_account_that_is_created_again_knows_nothing_of_the_trouble_of_its_predecessor() {
    let scratch = Scratch::new().await;
    let store = scratch.store();
    ok(&store, "tenant set acme").await;
    scratch
        .execute("INSERT INTO {s}.account_health (account, state, faults, reason) VALUES ('acme/main', 1, 5, 'connect')")
        .await;
    ok(&store, "account set acme main --host h --port 25 --tls none").await;
    let all = json(&store, "account list --json").await;
    assert_eq!(all[0]["health"]["state"], Value::Null, "{all}");
    scratch.end().await;
}

#[tokio::test]
async fn an_operator_finds_the_unhealthy_accounts_of_all_tenants() {
    let scratch = Scratch::new().await;
    let store = scratch.store();
    for tenant in ["acme", "umbrella"] {
        ok(&store, &format!("tenant set {tenant}")).await;
        for account in ["good", "ill"] {
            ok(
                &store,
                &format!("account set {tenant} {account} --host h --port 25 --tls none"),
            )
            .await;
        }
    }
    scratch
        .execute(
            "INSERT INTO {s}.account_health (account, state, faults, reason) \
             VALUES ('acme/ill', 1, 5, 'connect'), ('umbrella/ill', 2, 5, 'connect'), ('umbrella/good', 0, 1, 'connect')",
        )
        .await;
    let all = json(&store, "account list --json").await;
    let states: Vec<_> = all
        .as_array()
        .unwrap()
        .iter()
        .map(|account| (account["tenant"].clone(), account["health"]["state"].clone()))
        .collect();
    let expected = [
        ("acme", Value::Null),
        ("acme", json!("open")),
        ("umbrella", Value::Null),
        ("umbrella", json!("half_open")),
    ];
    assert_eq!(states, expected.map(|(tenant, state)| (json!(tenant), state)));
    let table = ok(&store, "account list --unhealthy").await;
    assert!(
        !table.contains("good") && table.contains("being probed"),
        "{table}"
    );
    assert_eq!(table.lines().count(), 3, "{table}");
    let table = ok(&store, "account list acme --unhealthy").await;
    assert_eq!(table.lines().count(), 2, "{table}");
    scratch.end().await;
}

/// A new file whose name has no underscore.
fn tempfile() -> (PathBuf, std::fs::File) {
    let path = std::env::temp_dir().join(format!("{}.pem", uuid::Uuid::new_v4().simple()));
    let file = std::fs::File::create_new(&path).unwrap();
    (path, file)
}

#[tokio::test]
async fn wrong_use_is_told_apart_from_failure() {
    let scratch = Scratch::new().await;
    let store = scratch.store();
    ok(&store, "tenant set acme").await;
    for (line, code, part) in [
        (
            "account set nope main --host h --port 25 --tls none",
            1,
            "postroom tenant set nope",
        ),
        ("account set acme main --host h", 2, "--port, --tls"),
        ("account set acme main --host h --port 0 --tls none", 2, "--port"),
        (
            "account set acme main --host h --port 25 --tls ssl",
            2,
            "use one of: none, starttls, implicit",
        ),
        (
            "account set acme main --host h --port 25 --tls none --from nobody",
            2,
            "expected an address",
        ),
        (
            "account set acme main --host h --port 25 --tls none --ca-file /dev/null",
            2,
            "no certificate",
        ),
        (
            "account set acme main --host h --port 25 --tls none --username u",
            2,
            "--password-stdin",
        ),
        (
            "account set acme main --host h --port 25 --tls none --limit 5",
            2,
            "60/1m",
        ),
        (
            "account set acme main --host h --port 25 --tls none --max-age soon",
            2,
            "such as 90s",
        ),
        (
            "account set acme a/b --host h --port 25 --tls none",
            2,
            "1 to 64 characters",
        ),
        ("account set acme main --password=x", 2, "--password"),
        ("account show acme main", 1, "does not exist"),
        ("account remove acme main", 1, "does not exist"),
        ("tenant remove -", 2, "platform"),
        ("tenant remove nope", 1, "does not exist"),
        (
            "tenant set acme --fallback always",
            2,
            "use one of: never, platform",
        ),
    ] {
        let (found, error) = run_with(&store, "", line).await.unwrap_err();
        assert_eq!(found, code, "{line}: {error}");
        assert!(error.contains(part), "{line}: {error}");
    }
    scratch.end().await;
}

#[tokio::test]
async fn what_would_be_taken_for_something_else_is_refused() {
    let scratch = Scratch::new().await;
    let store = scratch.store();
    ok(&store, "tenant set acme").await;
    for (words, part) in [
        ("--host x:25", "its port apart"),
        ("--host [::1]:25", "its port apart"),
        ("--host h --max-age 12", "such as 90s"),
        ("--host h --limit 5/60", "such as 90s"),
    ] {
        let line = format!("account set acme main --port 25 --tls none {words}");
        let (code, error) = run_with(&store, "", &line).await.unwrap_err();
        assert_eq!(code, 2, "{words}: {error}");
        assert!(error.contains(part), "{words}: {error}");
    }
    for host in ["::1", "[::1]", "192.0.2.1", "smtp.example.com"] {
        let line = format!("account set acme main --host {host} --port 25 --tls none");
        ok(&store, &line).await;
    }
    scratch.end().await;
}

#[tokio::test]
async fn a_tenant_whose_jobs_wait_is_removed_only_if_that_is_said() {
    let scratch = Scratch::new().await;
    let store = scratch.store();
    ok(&store, "tenant set acme").await;
    ok(&store, "tenant set acme-2").await;
    let waiting = "INSERT INTO {s}.job (tenant, id, state, level, account, digest, born, seq, created_at, updated_at, due_at, \
                                        reason, body)
                   VALUES ('acme', '1', 2, 1, 'acme/main', '', 0, 0, now(), now(), now(), 1, 'x');
                   INSERT INTO {s}.lane (account, level, tenant, next_at) VALUES ('acme/main', 1, 'acme', now())";
    scratch.execute(waiting).await;
    let (code, error) = run_with(&store, "", "tenant remove acme").await.unwrap_err();
    assert_eq!(code, 2, "{error}");
    assert!(
        error.contains("--fail-waiting") && error.contains("job list --tenant acme"),
        "{error}"
    );
    ok(&store, "tenant show acme").await;
    ok(&store, "tenant remove acme-2").await;
    ok(&store, "tenant remove acme --fail-waiting").await;
    run_with(&store, "", "tenant show acme").await.unwrap_err();
    scratch.end().await;
}

#[test]
fn the_password_is_the_input_without_its_line_break() {
    use secrecy::ExposeSecret;
    let read = |text: &str| read_password(&mut text.as_bytes());
    for (text, password) in [
        ("p\n", "p"),
        ("p\r\n", "p"),
        ("p", "p"),
        (" p q \n", " p q "),
        ("a\nb\n\n", "a\nb\n"),
    ] {
        assert_eq!(read(text).unwrap().expose_secret(), password);
    }
    for text in ["", "\n", &"x".repeat(5_000)] {
        assert!(matches!(read(text), Err(CliError::Usage(_))));
    }
}

#[test]
fn a_generated_key_is_one_line_that_is_a_key_ring() {
    #[derive(Debug, Parser)]
    enum Keys {
        #[command(subcommand)]
        Key(key::Command),
    }
    let generate = |words: &[&str]| {
        let words = ["postroom", "key", "generate"].iter().chain(words);
        let Keys::Key(key::Command::Generate(args)) = Keys::try_parse_from(words).unwrap() else {
            panic!("generate");
        };
        let mut out = Vec::new();
        key::generate(&args, &mut out).map(|()| String::from_utf8(out).unwrap())
    };
    let line = generate(&["--id", "mine"]).unwrap();
    assert!(line.starts_with("mine:") && line.ends_with('\n') && line.lines().count() == 1);
    crate::secret::Keyring::parse(&line.into()).unwrap();
    crate::secret::Keyring::parse(&generate(&[]).unwrap().into()).unwrap();
    assert_eq!(generate(&["--id", "a:b"]).unwrap_err().exit_code(), 2);
}
