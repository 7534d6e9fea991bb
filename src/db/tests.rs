//! Against a real server: `POSTROOM_TEST_DATABASE_URL`. Every test has a schema of its own.

mod front;

use secrecy::{ExposeSecret, SecretString};

use super::*;

/// A schema that is dropped at the end.
struct Scratch {
    config: config::Database,
}

impl Scratch {
    fn new() -> Self {
        let url = std::env::var("POSTROOM_TEST_DATABASE_URL")
            .expect("POSTROOM_TEST_DATABASE_URL must name a Postgres server for tests: run `make test`");
        let schema = format!("t_db_{}", uuid::Uuid::new_v4().simple());
        Self {
            config: config(&url, &schema),
        }
    }

    fn database(&self) -> Database {
        Database::connect(&self.config).unwrap()
    }

    fn with_url(&self, change: impl FnOnce(&str) -> String) -> config::Database {
        config(&change(self.config.url.expose_secret()), &self.config.schema)
    }

    async fn drop_schema(self) {
        let database = self.database();
        let drop = database.sql("DROP SCHEMA IF EXISTS {s} CASCADE");
        database
            .client()
            .await
            .unwrap()
            .batch_execute(&drop)
            .await
            .unwrap();
    }
}

fn config(url: &str, schema: &str) -> config::Database {
    config::Database {
        url: SecretString::from(url),
        schema: schema.into(),
        ca_file: None,
        pool_size: 2,
    }
}

/// For tests of parts: a schema that nobody has, and nobody drops.
pub(super) fn scratch_config() -> config::Database {
    Scratch::new().config
}

fn with_option(url: &str, option: &str) -> String {
    let separator = if url.contains('?') { '&' } else { '?' };
    format!("{url}{separator}{option}")
}

#[test]
fn statements_name_the_schema() {
    let database = Database::connect(&config("postgres://h/d", "mine")).unwrap();
    assert_eq!(
        database.sql("SELECT {s}.f() FROM {s}.t"),
        r#"SELECT "mine".f() FROM "mine".t"#
    );
    assert_eq!(quote(r#"a"b"#), r#""a""b""#);
}

#[test]
fn neither_debug_nor_errors_show_the_password() {
    let config = config("postgres://u:hunter2@h/d?port=x", "s");
    let error = Database::connect(&config).unwrap_err();
    assert!(!format!("{error} {error:?} {config:?}").contains("hunter2"));
    let fine = Database::connect(&self::config("postgres://u:hunter2@h/d", "s")).unwrap();
    assert!(!format!("{fine:?}").contains("hunter2"));
}

#[tokio::test]
async fn a_server_that_is_away_is_worth_a_retry() {
    let database = Database::connect(&config("postgres://127.0.0.1:1/d", "s")).unwrap();
    let error = database.client().await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert_eq!(error.class(), "connection");
}

#[tokio::test]
async fn a_schema_is_created_once_and_a_second_run_does_nothing() {
    let scratch = Scratch::new();
    let database = scratch.database();
    let error = database.check().await.unwrap_err();
    assert!(error.to_string().contains("run `postroom migrate`"), "{error}");

    let first = migrate(&scratch.config).await.unwrap();
    assert_eq!((first.from, first.to), (0, newest_version()));
    assert!(!first.applied.is_empty());
    database.check().await.unwrap();

    let second = migrate(&scratch.config).await.unwrap();
    assert_eq!(second.applied, Vec::<String>::new());
    assert_eq!(second.from, newest_version());
    scratch.drop_schema().await;
}

#[tokio::test]
async fn runs_at_the_same_time_do_not_collide() {
    let scratch = Scratch::new();
    let (a, b, c) = tokio::join!(
        migrate(&scratch.config),
        migrate(&scratch.config),
        migrate(&scratch.config)
    );
    let mut applied = [a, b, c].map(|run| run.unwrap().applied.len());
    applied.sort_unstable();
    assert_eq!(applied[..2], [0, 0]);
    assert!(applied[2] > 0);
    scratch.drop_schema().await;
}

#[tokio::test]
async fn a_changed_migration_is_refused_and_a_newer_schema_is_not() {
    let scratch = Scratch::new();
    migrate(&scratch.config).await.unwrap();
    let database = scratch.database();
    let client = database.client().await.unwrap();
    let newer = database.sql("INSERT INTO {s}.refinery_schema_history VALUES (9999, 'later', 'now', '1')");
    client.batch_execute(&newer).await.unwrap();
    database.check().await.unwrap();
    assert_eq!(
        migrate(&scratch.config).await.unwrap().applied,
        Vec::<String>::new()
    );

    let other = database.sql("UPDATE {s}.refinery_schema_history SET checksum = '1' WHERE version = 1");
    client.batch_execute(&other).await.unwrap();
    let error = migrate(&scratch.config).await.unwrap_err();
    assert!(matches!(error, DbError::Migration { .. }), "{error}");
    drop(client);
    scratch.drop_schema().await;
}

#[tokio::test]
async fn an_older_schema_asks_for_a_migration() {
    let scratch = Scratch::new();
    migrate(&scratch.config).await.unwrap();
    let database = scratch.database();
    let back = database.sql("UPDATE {s}.refinery_schema_history SET version = version - 1000");
    database
        .client()
        .await
        .unwrap()
        .batch_execute(&back)
        .await
        .unwrap();
    let error = database.check_schema_version().await.unwrap_err();
    assert!(matches!(error, DbError::SchemaVersion { .. }), "{error}");
    scratch.drop_schema().await;
}

#[tokio::test]
async fn a_server_that_forgets_commits_is_refused() {
    let scratch = Scratch::new();
    migrate(&scratch.config).await.unwrap();
    let config = scratch.with_url(|url| with_option(url, "options=-c%20synchronous_commit%3Doff"));
    let error = Database::connect(&config).unwrap().check().await.unwrap_err();
    assert!(matches!(error, DbError::NotDurable), "{error}");
    scratch.drop_schema().await;
}

const READ_ONLY: &str = "options=-c%20default_transaction_read_only%3Don";

#[tokio::test]
async fn no_connection_is_opened_to_a_server_that_takes_no_writes_unless_the_url_says_so() {
    let scratch = Scratch::new();
    let config = scratch.with_url(|url| with_option(url, READ_ONLY));
    let error = Database::connect(&config).unwrap().client().await.unwrap_err();
    assert!(error.to_string().contains("does not allow writes"), "{error}");
    assert!(error.is_retryable());

    let any = scratch.with_url(|url| with_option(&with_option(url, READ_ONLY), "target_session_attrs=any"));
    let database = Database::connect(&any).unwrap();
    database.client().await.unwrap();
    let error = database.check().await.unwrap_err();
    assert!(matches!(error, DbError::ReadOnly), "{error}");
    assert!(error.is_retryable());
}

/// What a connection looks like behind which the primary has become a standby.
async fn demote(database: &Database) {
    let client = database.client().await.unwrap();
    client
        .batch_execute("SET default_transaction_read_only = on")
        .await
        .unwrap();
}

#[tokio::test]
async fn connections_behind_which_the_server_takes_no_writes_any_more_are_replaced() {
    let scratch = Scratch::new();
    migrate(&scratch.config).await.unwrap();
    let database = scratch.database();
    demote(&database).await;
    let error = database.check().await.unwrap_err();
    assert!(matches!(error, DbError::ReadOnly), "{error}");
    database.check().await.unwrap();

    // Found by a write as well, and then for the reserved connection too.
    let reserved = database.reserved().unwrap();
    demote(&reserved).await;
    demote(&database).await;
    let client = database.client().await.unwrap();
    let write = database.sql("UPDATE {s}.tenant SET name = name");
    let error = DbError::from(client.batch_execute(&write).await.unwrap_err());
    database.learn_from(&error);
    drop(client);
    for database in [&database, &reserved] {
        let client = database.client().await.unwrap();
        client.batch_execute(&write).await.unwrap();
    }
    scratch.drop_schema().await;
}

#[tokio::test]
async fn every_connection_has_a_time_limit_and_a_name() {
    let scratch = Scratch::new();
    let client = scratch.database().client().await.unwrap();
    for (name, value) in [
        ("statement_timeout", "30s"),
        ("idle_in_transaction_session_timeout", "30s"),
        ("application_name", "postroom"),
    ] {
        let row = client.query_one(&format!("SHOW {name}"), &[]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), value, "{name}");
    }
}

#[tokio::test]
async fn a_transaction_that_its_client_left_open_holds_nobody_up_for_long() {
    let scratch = Scratch::new();
    let option = "options=-c%20idle_in_transaction_session_timeout%3D200ms";
    let config = scratch.with_url(|url| with_option(url, option));
    let (left, other) = (Database::connect(&config).unwrap(), scratch.database());
    let left = left.client().await.unwrap();
    let lock = format!(
        "SELECT pg_advisory_xact_lock(hashtext('{}'))",
        scratch.config.schema
    );
    left.batch_execute(&format!("BEGIN; {lock}")).await.unwrap();
    other.client().await.unwrap().batch_execute(&lock).await.unwrap();
    let error = DbError::from(left.batch_execute("SELECT 1").await.unwrap_err());
    assert!(error.is_retryable(), "{error}");
}

/// A statement; whether it may work later, whether a row is to blame, and how that is called.
const SQLSTATES: &[(&str, bool, bool, &str)] = &[
    ("SELECT 1/0", false, true, "data"),
    ("SELECT 'x'::int4", false, true, "data"),
    (
        "DO $$ BEGIN RAISE unique_violation; END $$",
        false,
        true,
        "constraint",
    ),
    (
        "DO $$ BEGIN RAISE serialization_failure; END $$",
        true,
        false,
        "conflict",
    ),
    (
        "DO $$ BEGIN RAISE deadlock_detected; END $$",
        true,
        false,
        "conflict",
    ),
    (
        "DO $$ BEGIN RAISE lock_not_available; END $$",
        true,
        false,
        "conflict",
    ),
    ("DO $$ BEGIN RAISE disk_full; END $$", true, false, "resources"),
    (
        "DO $$ BEGIN RAISE program_limit_exceeded; END $$",
        false,
        true,
        "resources",
    ),
    ("DO $$ BEGIN RAISE internal_error; END $$", false, true, "other"),
    (
        "DO $$ BEGIN RAISE insufficient_privilege; END $$",
        false,
        false,
        "schema",
    ),
    (
        "DO $$ BEGIN RAISE read_only_sql_transaction; END $$",
        true,
        false,
        "server",
    ),
    (
        "DO $$ BEGIN RAISE idle_in_transaction_session_timeout; END $$",
        true,
        false,
        "timeout",
    ),
    (
        "SET statement_timeout = 1; SELECT pg_sleep(5)",
        true,
        false,
        "timeout",
    ),
    (
        "SET statement_timeout = 0; SELECT * FROM no_such_table",
        false,
        false,
        "schema",
    ),
    (
        "SELECT pg_terminate_backend(pg_backend_pid())",
        true,
        false,
        "server",
    ),
];

#[tokio::test]
async fn sqlstates_say_who_is_to_blame() {
    let scratch = Scratch::new();
    let client = scratch.database().client().await.unwrap();
    for &(sql, retryable, row_fault, class) in SQLSTATES {
        let error = DbError::from(client.batch_execute(sql).await.unwrap_err());
        let found = (error.is_retryable(), error.is_row_fault(), error.class());
        assert_eq!(found, (retryable, row_fault, class), "{sql}: {error}");
    }
    // The connection is gone now.
    let error = DbError::from(client.batch_execute("SELECT 1").await.unwrap_err());
    assert!(error.is_retryable(), "{error}");
    assert_eq!(error.class(), "connection");
}

#[tokio::test]
async fn a_full_pool_times_out_instead_of_waiting_for_ever() {
    let scratch = Scratch::new();
    let database = Database::connect_with(&scratch.config, Duration::from_millis(20), PATIENCE).unwrap();
    let held = (database.client().await.unwrap(), database.client().await.unwrap());
    let error = database.client().await.unwrap_err();
    assert!(matches!(error, DbError::PoolTimeout(_)), "{error}");
    assert!(error.is_retryable());
    drop(held);
}

#[tokio::test]
async fn a_role_without_rights_on_the_schema_works_once_it_is_granted() {
    let scratch = Scratch::new();
    migrate(&scratch.config).await.unwrap();
    let admin = scratch.database().client().await.unwrap();
    let role = format!("r{}", scratch.config.schema);
    admin
        .batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'p'"))
        .await
        .unwrap();
    let as_role = scratch.with_url(|url| {
        let rest = url.split_once('@').map_or(url, |(_, rest)| rest);
        format!("postgres://{role}:p@{rest}")
    });
    let database = Database::connect(&as_role).unwrap();
    assert_eq!(database.check().await.unwrap_err().class(), "schema");

    grant(&scratch.config, &role).await.unwrap();
    database.check().await.unwrap();
    let client = database.client().await.unwrap();
    client
        .batch_execute(&database.sql("UPDATE {s}.tenant SET name = 'x'"))
        .await
        .unwrap();
    for refused in ["CREATE TABLE {s}.t ()", "DELETE FROM {s}.refinery_schema_history"] {
        let error = client.batch_execute(&database.sql(refused)).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42501", "{refused}");
    }
    drop(client);
    let end = scratch
        .database()
        .sql(&format!("DROP SCHEMA {{s}} CASCADE; DROP ROLE {role}"));
    admin.batch_execute(&end).await.unwrap();
}

/// Init containers of several pods do.
#[tokio::test]
async fn two_migrations_that_grant_at_once_both_succeed() {
    let scratch = Scratch::new();
    let admin = scratch.database().client().await.unwrap();
    let role = format!("r{}", scratch.config.schema);
    admin.batch_execute(&format!("CREATE ROLE {role}")).await.unwrap();
    let both = || async {
        migrate(&scratch.config).await.unwrap();
        for _ in 0..20 {
            grant(&scratch.config, &role).await.unwrap();
        }
    };
    tokio::join!(both(), both());
    let end = scratch
        .database()
        .sql(&format!("DROP SCHEMA {{s}} CASCADE; DROP ROLE {role}"));
    admin.batch_execute(&end).await.unwrap();
}

#[tokio::test]
async fn a_database_that_is_away_is_waited_for_and_an_old_schema_is_not() {
    let readiness = crate::health::Readiness::default();
    let soft = tokio_util::sync::CancellationToken::new();
    let away = Database::connect(&config("postgres://127.0.0.1:1/d", "s")).unwrap();
    let handle = readiness.component("database");
    let waiting = tokio::spawn({
        let (soft, handle) = (soft.clone(), handle.clone());
        async move { away.wait_until_usable(&handle, &soft).await }
    });
    while readiness.to_string().contains("starting") {
        tokio::task::yield_now().await;
    }
    assert!(
        readiness
            .to_string()
            .contains("[-] database: database: cannot connect"),
        "{readiness}"
    );
    soft.cancel();
    assert!(!waiting.await.unwrap().unwrap());

    let scratch = Scratch::new();
    let soft = tokio_util::sync::CancellationToken::new();
    let error = scratch
        .database()
        .wait_until_usable(&handle, &soft)
        .await
        .unwrap_err();
    assert!(matches!(error, DbError::SchemaVersion { .. }), "{error}");
    migrate(&scratch.config).await.unwrap();
    assert!(
        scratch
            .database()
            .wait_until_usable(&handle, &soft)
            .await
            .unwrap()
    );
    assert!(readiness.is_ready());
    scratch.drop_schema().await;
}

#[tokio::test]
async fn a_connection_that_is_never_answered_again_is_given_up_and_replaced() {
    let scratch = Scratch::new();
    let server: tokio_postgres::Config = scratch.config.url.expose_secret().parse().unwrap();
    let tokio_postgres::config::Host::Tcp(host) = &server.get_hosts()[0] else {
        panic!("tests need a server reached by TCP");
    };
    let upstream = format!("{host}:{}", server.get_ports().first().copied().unwrap_or(5432));
    let proxy = postroom_testkit::proxy::Proxy::start(upstream.clone()).await;
    let config = scratch.with_url(|url| url.replace(&upstream, &proxy.address().to_string()));
    let database = Database::connect_with(&config, WAIT, Duration::from_millis(300)).unwrap();
    let held = database.client().await.unwrap();
    let given_up = database.client().await.unwrap();
    held.batch_execute("SELECT 1").await.unwrap();
    proxy.set(postroom_testkit::proxy::Weather::Cut);
    proxy.heal();

    // Both think that they are connected.
    let limit = Duration::from_secs(20);
    let late = tokio::time::timeout(limit, held.batch_execute("SELECT 1"));
    let error = late.await.expect("it ends").unwrap_err();
    assert!(error.is_closed(), "{error}");
    drop(held);
    given_up.give_up();
    // The pool has only two places: both are free for new connections.
    let new = [database.client().await.unwrap(), database.client().await.unwrap()];
    for client in new {
        client.batch_execute("SELECT 1").await.unwrap();
    }
}

#[tokio::test]
async fn a_database_that_is_watched_shows_in_the_metrics() {
    let scratch = Scratch::new();
    migrate(&scratch.config).await.unwrap();
    let database = scratch.database();
    let readiness = crate::health::Readiness::default();
    let metrics = std::sync::Arc::new(crate::telemetry::metrics::Metrics::new().unwrap());
    let soft = tokio_util::sync::CancellationToken::new();
    let held = database.client().await.unwrap();
    let watching = database.clone().watch(
        readiness.component("database"),
        std::sync::Arc::clone(&metrics),
        soft.clone(),
    );
    let watching = tokio::spawn(watching);
    let connections = |state: &str| metrics.database_connections.with_label_values(&[state]).get();
    while (connections("busy"), connections("idle")) != (1, 1) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(metrics.connected.with_label_values(&["database"]).get(), 1);
    soft.cancel();
    watching.await.unwrap();
    drop(held);
    scratch.drop_schema().await;
}
