//! What can go wrong with the database, and what that means for the caller.

use deadpool::managed::{PoolError, TimeoutType};
use tokio_postgres::error::SqlState;

/// Trouble with the database.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// The URL cannot be used. The text never contains the URL: it may hold a password.
    #[error("POSTROOM_DATABASE_URL: {0}")]
    Url(String),
    /// A certificate file cannot be used.
    #[error("certificate file {path}: {reason}")]
    CaFile {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The pool cannot be built.
    #[error("database pool: {0}")]
    Setup(String),
    /// No connection became free, or none could be opened, in time.
    #[error("database: no connection in time ({0})")]
    PoolTimeout(&'static str),
    /// The process is shutting down.
    #[error("database: the pool is closed")]
    Closed,
    /// The server cannot be reached or does not let us in.
    #[error("database: cannot connect: {}", describe(.0))]
    Connect(#[source] tokio_postgres::Error),
    /// A statement failed, or the connection broke under it.
    #[error("database: {}", describe(.0))]
    Statement(#[from] tokio_postgres::Error),
    /// The time given to a statement by this program is over.
    #[error("database: no answer in time")]
    Timeout,
    /// The schema is older than this program.
    #[error(
        "database schema {schema} is at version {found}, this program needs {expected}: run `postroom migrate` first"
    )]
    SchemaVersion {
        /// Name of the schema.
        schema: String,
        /// What this program was built for.
        expected: i32,
        /// What is there; 0 if nothing is.
        found: i32,
    },
    /// The history of migrations does not fit this program's.
    #[error("database schema {schema}: {reason}")]
    Migration {
        /// Name of the schema.
        schema: String,
        /// What does not fit.
        reason: String,
    },
    /// Postgres before 13.
    #[error("database: server version {found} is too old, Postgres 13 or newer is needed")]
    ServerTooOld {
        /// Major version found.
        found: i32,
    },
    /// The server answers and takes no writes.
    #[error(
        "database: the server takes no writes: a standby, or default_transaction_read_only is on; connecting anew until \
         one does"
    )]
    ReadOnly,
    /// `synchronous_commit` is off.
    #[error(
        "database: synchronous_commit is off, so a crash of the server would lose accepted mail: \
         set it to on for this role (ALTER ROLE … SET synchronous_commit = on)"
    )]
    NotDurable,
}

impl From<PoolError<tokio_postgres::Error>> for DbError {
    fn from(error: PoolError<tokio_postgres::Error>) -> Self {
        match error {
            PoolError::Timeout(TimeoutType::Wait) => Self::PoolTimeout("all are in use"),
            PoolError::Timeout(TimeoutType::Create) => Self::PoolTimeout("the server does not answer"),
            PoolError::Timeout(TimeoutType::Recycle) => Self::PoolTimeout("a used one does not answer"),
            PoolError::Backend(error) => Self::Connect(error),
            PoolError::Closed => Self::Closed,
            other @ (PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_)) => {
                Self::Setup(other.to_string())
            }
        }
    }
}

impl DbError {
    /// The SQLSTATE, if the server gave one.
    #[must_use]
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            Self::Connect(error) | Self::Statement(error) => error.code(),
            _ => None,
        }
    }

    /// Whether the same call may work later without anybody changing anything: connection trouble, conflicts
    /// (SQLSTATE class 40), lack of resources (53), intervention by an operator or a time limit (57), I/O (58),
    /// a lock not granted, a transaction that its client left open for too long, or a server that is read-only because a
    /// failover is under way.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            // Refusals to connect as well: passwords are rotated, databases restarted and failed over.
            Self::PoolTimeout(_) | Self::Timeout | Self::Connect(_) | Self::ReadOnly => true,
            Self::Statement(error) => match error.code() {
                Some(code) => {
                    matches!(state_class(code), "08" | "40" | "53" | "57" | "58")
                        || *code == SqlState::LOCK_NOT_AVAILABLE
                        || *code == SqlState::READ_ONLY_SQL_TRANSACTION
                        || *code == SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT
                }
                None => is_broken(error),
            },
            _ => false,
        }
    }

    /// Whether the server behind the connection takes no writes: another connection may lead to one that does.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        matches!(self, Self::ReadOnly) || self.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION)
    }

    /// Whether a row of the statement is to blame: its data (SQLSTATE classes 22 and 23), its size (54), or what the server
    /// did not expect of it (XX000). A batch is split until the culprit stands alone. Anything else, such as a missing
    /// right or function, would be the same for every row: it waits for whoever can mend it.
    #[must_use]
    pub fn is_row_fault(&self) -> bool {
        self.code().is_some_and(|code| {
            matches!(state_class(code), "22" | "23" | "54") || *code == SqlState::INTERNAL_ERROR
        })
    }

    /// A label for metrics and logs, from a fixed set.
    #[must_use]
    pub fn class(&self) -> &'static str {
        match self {
            Self::Url(_)
            | Self::CaFile { .. }
            | Self::Setup(_)
            | Self::ServerTooOld { .. }
            | Self::NotDurable => "configuration",
            Self::PoolTimeout(_) => "pool",
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Connect(_) => "connection",
            Self::ReadOnly => "server",
            Self::SchemaVersion { .. } | Self::Migration { .. } => "schema",
            Self::Statement(error) => error.code().map_or_else(
                || if is_broken(error) { "connection" } else { "other" },
                state_label,
            ),
        }
    }
}

/// First two characters of a SQLSTATE.
fn state_class(code: &SqlState) -> &str {
    code.code().get(..2).unwrap_or_default()
}

fn state_label(code: &SqlState) -> &'static str {
    if [
        SqlState::QUERY_CANCELED,
        SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
    ]
    .contains(code)
    {
        return "timeout";
    }
    if *code == SqlState::READ_ONLY_SQL_TRANSACTION {
        return "server";
    }
    match state_class(code) {
        "08" => "connection",
        "22" => "data",
        "23" => "constraint",
        "40" | "55" => "conflict",
        "53" | "54" => "resources",
        "57" | "58" => "server",
        "42" | "3F" => "schema",
        _ => "other",
    }
}

/// Whether an error without SQLSTATE comes from the connection, not from a value that does not fit its column.
fn is_broken(error: &tokio_postgres::Error) -> bool {
    error.is_closed()
        || std::iter::successors(std::error::Error::source(error), |error| error.source())
            .any(<dyn std::error::Error>::is::<std::io::Error>)
}

/// The server's message with its SQLSTATE, else the error and its causes. No detail and no hint: the detail quotes
/// the values of the row.
fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        return format!("{} (SQLSTATE {})", db.message(), db.code().code());
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
