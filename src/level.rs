//! The four priority levels of jobs. A job's level is that of the queue it was consumed from.

use std::fmt;
use std::str::FromStr;

/// A priority level, most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Somebody is waiting for this mail now: password resets, one-time codes.
    Immediate = 0,
    /// Ahead of ordinary mail.
    High = 1,
    /// Ordinary transactional mail.
    Medium = 2,
    /// Bulk.
    Low = 3,
}

impl Level {
    /// All levels, most urgent first.
    pub const ALL: [Self; 4] = [Self::Immediate, Self::High, Self::Medium, Self::Low];

    /// The name used in queue names, routing keys, flags and labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Immediate => "immediate",
            Self::High => "high",
            Self::Medium => "medium",
            Self::Low => "low",
        }
    }

    /// Position in [`Level::ALL`], for arrays indexed by level.
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }

    /// The level stored as a number, if it is one.
    #[must_use]
    pub fn from_index(index: i16) -> Option<Self> {
        usize::try_from(index)
            .ok()
            .and_then(|i| Self::ALL.get(i))
            .copied()
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|level| level.as_str() == text)
            .ok_or_else(|| format!("`{text}` is not a level; use immediate, high, medium or low"))
    }
}
