//! Why a command did not do what it was asked, and the exit code that says so.

use std::error::Error;
use std::fmt;

use tokio_postgres::error::SqlState;

use super::{FAILED, WRONG_USE};
use crate::config::ConfigError;

/// A command's failure. Any error becomes [`CliError::Failed`] by `?`.
#[derive(Debug)]
pub enum CliError {
    /// Settings are missing or wrong: exit code 2.
    Config(Vec<ConfigError>),
    /// Arguments that do not fit together, found after parsing: exit code 2.
    Usage(String),
    /// Tried and failed: exit code 1.
    Failed(Box<dyn Error + Send + Sync>),
}

impl CliError {
    /// The process's exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Usage(_) => WRONG_USE,
            Self::Failed(_) => FAILED,
        }
    }

    /// Whether the reader of the output has gone.
    #[must_use]
    pub fn is_broken_pipe(&self) -> bool {
        let mut causes = self.causes();
        causes.any(|error| {
            let error = error.downcast_ref::<std::io::Error>();
            error.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
        })
    }

    /// Whether the database has no schema, or not all of this program's.
    fn lacks_schema(&self) -> bool {
        const LACKS: [SqlState; 4] = [
            SqlState::INVALID_SCHEMA_NAME,
            SqlState::UNDEFINED_TABLE,
            SqlState::UNDEFINED_COLUMN,
            SqlState::UNDEFINED_FUNCTION,
        ];
        let codes = self
            .causes()
            .filter_map(|error| error.downcast_ref::<tokio_postgres::Error>()?.code());
        codes.into_iter().any(|code| LACKS.contains(code))
    }

    /// Whether no connection was made because the server takes no writes: so the driver says it, without a code.
    fn wants_writes(&self) -> bool {
        self.causes().any(|error| {
            let error = error.downcast_ref::<std::io::Error>();
            error.is_some_and(|error| error.to_string() == "database does not allow writes")
        })
    }

    /// What to do, where the errors themselves do not say it.
    fn hint(&self) -> Option<&'static str> {
        if self.lacks_schema() {
            return Some("`postroom migrate` makes the schema, or brings it up to date");
        }
        self.wants_writes()
            .then_some("name the primary, or ask a standby with target_session_attrs=any in the URL")
    }

    /// The error of a failure, then what caused it.
    fn causes(&self) -> impl Iterator<Item = &(dyn Error + 'static)> {
        let first: Option<&(dyn Error + 'static)> = match self {
            Self::Failed(error) => Some(error.as_ref()),
            _ => None,
        };
        std::iter::successors(first, |error| (*error).source())
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for CliError {
    fn from(error: E) -> Self {
        Self::Failed(Box::new(error))
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(errors) => {
                f.write_str(if errors.len() == 1 {
                    "a setting is wrong"
                } else {
                    "settings are wrong"
                })?;
                for error in errors {
                    write!(f, "\n  {error}")?;
                }
                Ok(())
            }
            Self::Usage(text) => f.write_str(text),
            Self::Failed(error) => {
                write!(f, "{error}")?;
                let mut shown = error.to_string();
                let mut source = error.source();
                while let Some(cause) = source {
                    let text = cause.to_string();
                    // Many errors show their cause themselves.
                    if !shown.contains(&text) {
                        write!(f, ": {text}")?;
                        shown.push_str(&text);
                    }
                    source = cause.source();
                }
                match self.hint() {
                    Some(hint) => write!(f, "; {hint}"),
                    None => Ok(()),
                }
            }
        }
    }
}
