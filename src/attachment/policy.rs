//! What is done with large files.

use std::fmt;

/// What a tenant wants done with large attachments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LargeFiles {
    /// Size in bytes above which an attachment is large; none is never.
    pub threshold: Option<u64>,
    /// What is done with it.
    pub action: LargeFileAction,
}

/// What is done with an attachment above the threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LargeFileAction {
    /// It is attached anyway, with a warning in the log.
    #[default]
    Warn,
    /// The mail fails.
    Reject,
    /// It goes to the object store, and a link to it into the mail.
    Rewrite,
}

impl LargeFileAction {
    /// The name in flags and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Warn => "warn",
            Self::Reject => "reject",
            Self::Rewrite => "rewrite",
        }
    }
}

impl fmt::Display for LargeFileAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for LargeFileAction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "warn" => Ok(Self::Warn),
            "reject" => Ok(Self::Reject),
            "rewrite" => Ok(Self::Rewrite),
            other => Err(format!(
                "`{other}` is not an action for large files; use one of: warn, reject, rewrite"
            )),
        }
    }
}
