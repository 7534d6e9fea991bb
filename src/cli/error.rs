//! Why a command did not do what it was asked, and the exit code that says so.

use std::error::Error;
use std::fmt;

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
        let Self::Failed(error) = self else { return false };
        let first: &(dyn Error + 'static) = error.as_ref();
        std::iter::successors(Some(first), |error| (*error).source())
            .filter_map(|error| error.downcast_ref::<std::io::Error>())
            .any(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
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
                Ok(())
            }
        }
    }
}
