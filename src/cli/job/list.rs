//! `postroom job list`.

use std::io::Write;

use clap::Args;
use serde_json::Value;
use tokio_postgres::types::Type;

use super::{SELECT, STATES, object};
use crate::cli::{CliError, table};
use crate::db::Database;
use crate::id::TenantId;

/// Waiting jobs that are looked at for a list: a full waiting room takes long to read.
const MOST_WAITING: usize = 10_000;

/// Which jobs.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only jobs of this tenant; without it, only jobs that are sending, waiting, uncertain or done
    #[arg(long)]
    pub tenant: Option<TenantId>,
    /// Only jobs in this state; without it those that are sending, waiting or uncertain, and with --tenant those that are over
    /// (done, cancelled, dead)
    #[arg(long, value_parser = STATES)]
    pub state: Option<String>,
    /// At most this many
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..))]
    pub limit: i64,
    /// One JSON object per line
    #[arg(long)]
    pub json: bool,
}

impl ListArgs {
    /// The statement. States are numbers in the text: the server must know them to use the index of a state.
    fn sql(&self) -> Result<String, CliError> {
        let state = self.state.as_ref();
        let state = state.and_then(|state| STATES.iter().position(|name| name == state));
        // Nothing finds the others among millions that are over.
        if self.tenant.is_none() && !matches!(state, None | Some(1..=4)) {
            return Err(CliError::Usage(
                "say whose jobs: --tenant; without it, only those that are sending, waiting, uncertain or done can be \
                 listed"
                    .to_owned(),
            ));
        }
        let (chosen, order) = match state {
            Some(2) => (waiting(), "created_at"),
            Some(state @ (3 | 5 | 6)) => (newest(&format!("state = {state}"), "finished_at"), "finished_at"),
            Some(state) => (newest(&format!("state = {state}"), "created_at"), "created_at"),
            None => (self.of_all_states(), "created_at"),
        };
        Ok(format!(
            "SELECT j.* FROM ({chosen}) AS c \
             CROSS JOIN LATERAL ({SELECT} WHERE job.tenant = c.tenant AND job.id = c.id OFFSET 0) AS j \
             ORDER BY j.{order} DESC, j.tenant, j.id LIMIT $2"
        ))
    }

    /// Each kind by the index that it has.
    fn of_all_states(&self) -> String {
        let mut kinds = vec![
            newest("state = 1", "created_at"),
            waiting(),
            newest("state = 4", "created_at"),
        ];
        if self.tenant.is_some() {
            kinds.push(newest("state IN (3, 5, 6)", "finished_at"));
        }
        kinds.join(" UNION ALL ")
    }
}

/// The newest jobs of which the condition holds.
fn newest(condition: &str, order: &str) -> String {
    format!(
        "(SELECT tenant, id FROM {{s}}.job WHERE ($1 IS NULL OR tenant = $1) AND {condition} \
          ORDER BY {order} DESC, tenant, id LIMIT $2)"
    )
}

/// The newest of the waiting jobs that are looked at.
fn waiting() -> String {
    format!(
        "(SELECT tenant, id FROM {{s}}.waiting_jobs_v1($1, {MOST_WAITING}) ORDER BY created_at DESC, tenant, id LIMIT $2)"
    )
}

pub(super) async fn run(
    database: &Database,
    args: &ListArgs,
    out: &mut (dyn Write + Send),
) -> Result<(), CliError> {
    let sql = database.sql(&args.sql()?);
    let tenant = args.tenant.as_ref().map(TenantId::as_str);
    let rows = database
        .client()
        .await?
        .query_typed(&sql, &[(&tenant, Type::TEXT), (&args.limit, Type::INT8)])
        .await?;
    let mut lines = Vec::with_capacity(rows.len());
    for row in &rows {
        let job = object(row)?;
        if args.json {
            writeln!(out, "{}", table::safe_json(&job.to_string()))?;
        } else {
            lines.push(line(&job));
        }
    }
    if !args.json {
        let header = [
            "TENANT",
            "JOB",
            "LEVEL",
            "STATE",
            "ACCOUNT",
            "ATTEMPTS",
            "NEXT ATTEMPT",
            "LAST ERROR",
        ];
        table::columns(out, &header, lines)?;
    }
    Ok(())
}

/// One line of the table.
fn line(job: &Value) -> Vec<String> {
    let text = |name: &str| match &job[name] {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let state = match (text("outcome"), text("reason")) {
        (outcome, _) if !outcome.is_empty() => outcome,
        (_, reason) if !reason.is_empty() => format!("{} ({reason})", text("state")),
        _ => text("state"),
    };
    vec![
        text("tenant"),
        text("job"),
        text("level"),
        state,
        text("account"),
        text("attempts"),
        text("next_attempt_at"),
        text("last_error"),
    ]
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::db::reading::{analyze, never_analyzed, rows_read};
    use crate::directory::scratch::Scratch;

    /// Rows and index entries that a list of a few may read.
    const MOST: i64 = 300;

    async fn list(database: &Database, words: &str) -> Result<Vec<String>, CliError> {
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: ListArgs,
        }
        let words = format!("list --json {words}");
        let line = Line::try_parse_from(words.split_whitespace()).unwrap();
        let mut out = Vec::new();
        run(database, &line.args, &mut out).await?;
        let job = |line: &str| serde_json::from_str::<Value>(line).unwrap()["job"].clone();
        let jobs = str::from_utf8(&out).unwrap().lines().map(job);
        Ok(jobs.map(|id| id.as_str().unwrap().to_owned()).collect())
    }

    #[tokio::test]
    async fn a_list_reads_little_of_a_full_waiting_room_and_of_a_large_tenant() {
        let scratch = Scratch::connected(1).await;
        never_analyzed(&scratch.db).await;
        jobs(&scratch, 5000).await;
        let room = "INSERT INTO {s}.job (tenant, id, state, level, account, digest, born, seq, created_at, updated_at, due_at, reason, body)
                    SELECT 'acme', 'w' || i, 2, 1, 'acme/' || i % 3, '', 0, 0, now() - i * interval '1 s', now(), now(), 1, 'x'
                    FROM generate_series(1, 30000) i";
        scratch.execute(room).await;
        let few = "INSERT INTO {s}.job (tenant, id, state, level, account, digest, born, seq, created_at, updated_at, due_at, reason, body)
                   SELECT 'small', 'w' || i, 2, 1, 'zoo/main', '', 0, 0, now(), now(), now(), 1, 'x' FROM generate_series(1, 20) i;
                   INSERT INTO {s}.lane (account, level, tenant, next_at)
                   SELECT DISTINCT account, level, tenant, now() FROM {s}.job WHERE state = 2";
        scratch.execute(few).await;
        analyze(&scratch.db).await;
        for words in [
            "",
            "--tenant acme",
            "--state waiting",
            "--state waiting --tenant acme",
        ] {
            let before = rows_read(&scratch.db).await;
            let found = list(&scratch.db, &format!("{words} --limit 20")).await.unwrap();
            let read = rows_read(&scratch.db).await - before;
            assert_eq!(found.len(), 20, "{words}");
            // Entries of the index, and the rows that they lead to.
            let most = 2 * MOST_WAITING as i64 + MOST;
            assert!(read <= most, "{words}: {read} rows");
        }
        let before = rows_read(&scratch.db).await;
        let found = list(&scratch.db, "--state waiting --tenant small").await.unwrap();
        let read = rows_read(&scratch.db).await - before;
        assert_eq!(found.len(), 20);
        assert!(read <= MOST, "{read} rows");
        scratch.end().await;
    }

    /// Many jobs that are over, and some in every state: of each the first is the newest, and those in the last state are newer.
    async fn jobs(scratch: &Scratch, over: u32) {
        let columns = "tenant, id, state, level, account, digest, born, seq, created_at, updated_at, finished_at, \
                       due_at, reason, body, epoch";
        let values = |tenant: &str, state: u8| {
            format!(
                "SELECT '{tenant}', 's{state}-' || i, {state}, 1, 'acme/main', '', 0, 0, now() - i * interval '1 s', now(),
                        CASE WHEN {state} IN (3, 5, 6) THEN now() - i * interval '1 s' END, now(), 1, 'x', i
                 FROM generate_series(1,"
            )
        };
        for (tenant, state, number) in [
            ("acme", 3, over),
            ("acme", 1, 3),
            ("acme", 2, 3),
            ("acme", 4, 3),
            ("small", 0, 2),
            ("small", 3, 3),
            ("small", 5, 2),
            ("small", 6, 2),
        ] {
            let values = values(tenant, state);
            scratch
                .execute(&format!("INSERT INTO {{s}}.job ({columns}) {values} {number}) i"))
                .await;
        }
    }

    #[tokio::test]
    async fn a_list_does_not_read_all_that_is_over() {
        // One connection: it counts what it reads.
        let scratch = Scratch::connected(1).await;
        never_analyzed(&scratch.db).await;
        jobs(&scratch, 5000).await;
        analyze(&scratch.db).await;
        for (words, first, number) in [
            ("", "s4-1", 9),
            ("--state uncertain", "s4-1", 3),
            ("--state sending", "s1-1", 3),
            ("--state waiting", "s2-1", 3),
            ("--state waiting --tenant small", "", 0),
            ("--state done --limit 5", "s3-1", 5),
            ("--state done --limit 5 --tenant acme", "s3-1", 5),
            ("--state done --tenant small", "s3-1", 3),
            ("--state cancelled --tenant small", "s5-1", 2),
            ("--state dead --tenant small", "s6-1", 2),
            ("--state open --tenant small", "s0-1", 2),
            ("--tenant small --limit 3", "s6-1", 3),
        ] {
            let before = rows_read(&scratch.db).await;
            let found = list(&scratch.db, words).await.unwrap();
            let read = rows_read(&scratch.db).await - before;
            assert_eq!(found.len(), number, "{words}: {found:?}");
            assert_eq!(found.first().map_or("", String::as_str), first, "{words}");
            assert!(read <= MOST, "{words}: {read} rows");
        }
        scratch.end().await;
    }

    #[tokio::test]
    async fn what_nothing_finds_among_all_jobs_is_listed_by_tenant_only() {
        let scratch = Scratch::new().await;
        for words in ["--state open", "--state cancelled", "--state dead"] {
            let error = list(&scratch.db, words).await.unwrap_err();
            assert_eq!(error.exit_code(), 2, "{words}");
            assert!(error.to_string().contains("--tenant"), "{error}");
        }
        scratch.end().await;
    }
}
