//! Brings the schema up to date. Everything happens in one transaction: it is all or nothing, two runs at once are
//! safe, and a `PgBouncer` in transaction mode cannot spread it over several sessions (which is why refinery only
//! embeds and numbers the files here; its own runner uses several transactions and a session's `search_path`).

use std::sync::Arc;
use std::time::Duration;

use refinery::Migration;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};

use super::connect::Connector;
use super::pool::Clock;
use super::{DbError, quote};
use crate::config;

mod embedded {
    refinery::embed_migrations!("schema/migrations");
}

/// A migration takes as long as it takes, within reason: it may have to rewrite a large table, or wait for another.
const LIMIT: Duration = Duration::from_hours(1);

/// How long a migration waits for locks that others hold: whoever wants the same table meanwhile stands behind it, and that is
/// all mail.
struct Queueing {
    /// For one lock.
    lock: Duration,
    /// Before it is tried again from the beginning.
    pause: Duration,
    /// How often.
    tries: u32,
}

const QUEUEING: Queueing = Queueing {
    lock: Duration::from_secs(5),
    pause: Duration::from_secs(10),
    tries: 30,
};

/// What a run of [`migrate`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migrated {
    /// Version before; 0 if there was nothing.
    pub from: i32,
    /// Version after.
    pub to: i32,
    /// Names of the migrations applied, in order.
    pub applied: Vec<String>,
}

/// Version of the newest embedded migration: what this program needs.
#[must_use]
pub fn newest_version() -> i32 {
    migrations().last().map_or(0, Migration::version)
}

/// Creates the schema if need be and applies what is missing, in order.
///
/// # Errors
/// If the server cannot be reached, a statement fails, or the history does not fit: then nothing was changed.
pub async fn migrate(config: &config::Database) -> Result<Migrated, DbError> {
    let mut client = connect(config).await?;
    super::within(LIMIT, run(&mut client, &config.schema, &QUEUEING)).await?
}

/// Lets a role work with the schema as it is now, without the right to change it. Run it after every migration.
///
/// # Errors
/// If the server cannot be reached, or there is no such role, or the caller may not grant.
pub async fn grant(config: &config::Database, role: &str) -> Result<(), DbError> {
    let mut client = connect(config).await?;
    super::within(LIMIT, run_grant(&mut client, &config.schema, role)).await?
}

async fn run_grant(client: &mut Client, schema: &str, role: &str) -> Result<(), DbError> {
    // Grants on one object at once fail (`tuple concurrently updated`).
    let transaction = alone(client, schema).await?;
    let (schema, role) = (quote(schema), quote(role));
    let statements = format!(
        "GRANT USAGE ON SCHEMA {schema} TO {role};
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role};
         GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA {schema} TO {role};
         GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {role};
         REVOKE INSERT, UPDATE, DELETE ON {schema}.refinery_schema_history FROM {role};"
    );
    transaction.batch_execute(&statements).await?;
    Ok(transaction.commit().await?)
}

/// A connection of its own, outside any pool.
async fn connect(config: &config::Database) -> Result<Client, DbError> {
    // Never late: nobody checks it out.
    let clock = Arc::new(Clock::new(super::PATIENCE));
    let (client, _detached) = super::within(super::CREATE, Connector::new(config)?.open(&clock))
        .await?
        .map_err(DbError::Connect)?;
    Ok(client)
}

/// Version the schema is at; `None` if there is none.
pub(super) async fn version(client: &Client, quoted: &str) -> Result<Option<i32>, DbError> {
    let history = format!("{quoted}.refinery_schema_history");
    let row = client
        .query_one("SELECT to_regclass($1) IS NOT NULL", &[&history])
        .await?;
    if !row.try_get::<_, bool>(0)? {
        return Ok(None);
    }
    let row = client
        .query_one(&format!("SELECT max(version) FROM {history}"), &[])
        .await?;
    Ok(row.try_get(0)?)
}

/// A transaction beside which nobody else migrates this schema or grants on it. It may have to wait for one who does.
async fn alone<'a>(client: &'a mut Client, schema: &str) -> Result<Transaction<'a>, DbError> {
    let transaction = client.transaction().await?;
    transaction
        .batch_execute("SET LOCAL statement_timeout = 0")
        .await?;
    transaction
        .execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('postroom migrate ' || $1, 0))",
            &[&schema],
        )
        .await?;
    Ok(transaction)
}

/// Tries until nobody else holds what the migrations have to change.
async fn run(client: &mut Client, schema: &str, queueing: &Queueing) -> Result<Migrated, DbError> {
    for _ in 1..queueing.tries {
        match run_once(client, schema, queueing.lock).await {
            Err(error) if is_locked(&error) => {
                tracing::warn!(
                    schema,
                    "others hold a lock that the migration needs; trying again"
                );
                tokio::time::sleep(queueing.pause).await;
            }
            other => return other,
        }
    }
    run_once(client, schema, queueing.lock).await.map_err(|error| {
        if is_locked(&error) {
            DbError::Migration {
                schema: schema.into(),
                reason: "others hold a lock that the migration needs, and nothing was changed: look in pg_stat_activity for \
                         old transactions, such as a backup's, and run it again when they are over"
                    .into(),
            }
        } else {
            error
        }
    })
}

fn is_locked(error: &DbError) -> bool {
    error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)
}

async fn run_once(client: &mut Client, schema: &str, lock: Duration) -> Result<Migrated, DbError> {
    let transaction = alone(client, schema).await?;
    // Not for another migration, which is waited for.
    transaction
        .batch_execute(&format!("SET LOCAL lock_timeout = {}", lock.as_millis()))
        .await?;
    create_schema(&transaction, schema).await?;
    set_search_path(&transaction, schema).await?;
    let done = history(&transaction).await?;
    let missing = missing(schema, &done, migrations())?;
    let from = done.iter().map(|done| done.version).max().unwrap_or(0);
    let mut migrated = Migrated {
        from,
        to: from,
        applied: Vec::new(),
    };
    for migration in missing {
        apply(&transaction, schema, &migration).await?;
        migrated.to = migration.version();
        migrated.applied.push(migration.to_string());
    }
    transaction.commit().await?;
    Ok(migrated)
}

/// `CREATE SCHEMA IF NOT EXISTS` wants the right to create schemas even if it exists; so look first.
async fn create_schema(transaction: &Transaction<'_>, schema: &str) -> Result<(), DbError> {
    let found = transaction
        .query_opt("SELECT FROM pg_namespace WHERE nspname = $1", &[&schema])
        .await?;
    if found.is_none() {
        transaction
            .batch_execute(&format!("CREATE SCHEMA {}", quote(schema)))
            .await?;
    }
    Ok(())
}

/// Functions keep it. Without the second name a caller's temporary tables would come before ours, also where a function has
/// more rights than its caller.
async fn set_search_path(transaction: &Transaction<'_>, schema: &str) -> Result<(), DbError> {
    let path = format!("SET LOCAL search_path TO {}, pg_temp", quote(schema));
    Ok(transaction.batch_execute(&path).await?)
}

/// A migration the schema has had, with the checksum of its text then.
struct Done {
    version: i32,
    name: String,
    checksum: String,
}

/// The history in refinery's own form.
async fn history(transaction: &Transaction<'_>) -> Result<Vec<Done>, DbError> {
    transaction
        .batch_execute(
            "CREATE TABLE IF NOT EXISTS refinery_schema_history (
                 version int4 PRIMARY KEY, name varchar(255), applied_on varchar(255), checksum varchar(255))",
        )
        .await?;
    let rows = transaction
        .query(
            "SELECT version, name, checksum FROM refinery_schema_history ORDER BY version",
            &[],
        )
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Done {
                version: row.try_get(0)?,
                name: row.try_get(1)?,
                checksum: row.try_get(2)?,
            })
        })
        .collect()
}

/// What is still to be applied. A migration that was changed after it had been applied is an error; one that this
/// program does not know is not: a newer program has been here.
fn missing(schema: &str, done: &[Done], all: Vec<Migration>) -> Result<Vec<Migration>, DbError> {
    let mut missing = Vec::new();
    for migration in all {
        match done.iter().find(|done| done.version == migration.version()) {
            None => missing.push(migration),
            Some(done) if done.checksum == migration.checksum().to_string() => {}
            Some(done) => {
                return Err(DbError::Migration {
                    schema: schema.into(),
                    reason: format!(
                        "migration V{}__{} was applied in another form than {migration} of this program; \
                         restore the original file, or begin with an empty schema",
                        done.version, done.name
                    ),
                });
            }
        }
    }
    Ok(missing)
}

async fn apply(transaction: &Transaction<'_>, schema: &str, migration: &Migration) -> Result<(), DbError> {
    tracing::info!(schema, %migration, "applying migration");
    transaction
        .batch_execute(migration.sql().unwrap_or_default())
        .await
        .map_err(DbError::from)
        .map_err(|error| {
            if is_locked(&error) {
                return error;
            }
            DbError::Migration {
                schema: schema.into(),
                reason: format!("{migration} failed, nothing was changed: {error}"),
            }
        })?;
    // A migration may have changed it; the next one relies on it.
    set_search_path(transaction, schema).await?;
    transaction
        .execute(
            "INSERT INTO refinery_schema_history (version, name, applied_on, checksum)
             VALUES ($1, $2, to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), $3)",
            &[&migration.version(), &migration.name(), &migration.checksum().to_string()],
        )
        .await?;
    Ok(())
}

/// The embedded migrations by version.
fn migrations() -> Vec<Migration> {
    let mut all = embedded::migrations::runner().get_migrations().clone();
    all.sort_by_key(Migration::version);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_migration_stands_in_nobodys_way_for_long_and_is_tried_again() {
        let config = crate::db::tests::scratch_config();
        migrate(&config).await.unwrap();
        let (mut holder, mut client) = (connect(&config).await.unwrap(), connect(&config).await.unwrap());
        let history = format!("{}.refinery_schema_history", quote(&config.schema));
        let held = holder.transaction().await.unwrap();
        held.batch_execute(&format!("LOCK {history}")).await.unwrap();
        let queueing = Queueing {
            lock: Duration::from_millis(50),
            pause: Duration::from_millis(50),
            tries: 3,
        };
        let error = run(&mut client, &config.schema, &queueing).await.unwrap_err();
        assert!(error.to_string().contains("pg_stat_activity"), "{error}");
        let queueing = Queueing {
            tries: 1000,
            ..queueing
        };
        let release = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            held.rollback().await.unwrap();
        };
        let (migrated, ()) = tokio::join!(run(&mut client, &config.schema, &queueing), release);
        assert_eq!(migrated.unwrap().applied, Vec::<String>::new());
        let drop = format!("DROP SCHEMA {} CASCADE", quote(&config.schema));
        client.batch_execute(&drop).await.unwrap();
    }
}
