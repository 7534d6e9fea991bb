//! Reads settings: flag, then variable, then default. Collects every error instead of stopping at the first.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{IsTerminal, Read as _};
use std::path::{Path, PathBuf};

use secrecy::SecretString;

use super::settings::{self, Setting};

/// A secret longer than this is no secret but the wrong file.
const MAX_SECRET_FILE: u64 = 64 << 10;

/// Where settings come from. A plain value, so that loading is a function of it (and of the `NAME_FILE`s it names).
#[derive(Clone, Default)]
pub struct Sources {
    /// The environment.
    pub env: BTreeMap<String, String>,
    /// Flags given, by the name of the variable they stand for.
    pub flags: BTreeMap<String, String>,
    /// Name of the host, the default of `POSTROOM_EHLO_NAME`.
    pub hostname: String,
    /// Whether the log goes to a terminal, which decides its default form.
    pub terminal: bool,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The environment holds secrets, ours and others'.
        f.debug_struct("Sources")
            .field("flags", &self.flags)
            .finish_non_exhaustive()
    }
}

impl Sources {
    /// The process's own environment, with the flags given.
    #[must_use]
    pub fn of_process(flags: BTreeMap<String, String>) -> Self {
        let env: BTreeMap<_, _> = std::env::vars_os()
            .map(|(name, value)| {
                (
                    name.to_string_lossy().into_owned(),
                    value.to_string_lossy().into_owned(),
                )
            })
            .collect();
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname")
            .ok()
            .or_else(|| env.get("HOSTNAME").cloned())
            .unwrap_or_default();
        Self {
            env,
            flags,
            hostname: hostname.trim().into(),
            terminal: std::io::stderr().is_terminal(),
        }
    }

    /// Flag, else variable, else default. An empty value is none.
    fn raw(&self, setting: &Setting) -> Option<&str> {
        let given = self
            .flags
            .get(setting.name)
            .or_else(|| self.env.get(setting.name));
        given
            .map(String::as_str)
            .filter(|value| !value.is_empty())
            .or(setting.default)
    }

    /// Path in `NAME_FILE` or its flag.
    fn file(&self, setting: &Setting) -> Option<&str> {
        let name = setting.file_variable();
        let given = self.flags.get(&name).or_else(|| self.env.get(&name));
        given.map(String::as_str).filter(|value| !value.is_empty())
    }
}

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {problem}: {allowed}")]
pub struct ConfigError {
    /// The variable.
    pub name: String,
    /// What is wrong; shows the value unless it may be a secret.
    pub problem: String,
    /// What is allowed.
    pub allowed: String,
}

/// Something that is read from settings: a section, or several as a tuple.
pub trait FromSettings: Sized {
    /// Reads it; `None` if the reader has noted an error.
    fn read(reader: &mut Reader<'_>) -> Option<Self>;
}

/// Reads what a command needs.
///
/// # Errors
/// Every setting that is missing or wrong.
pub fn load<T: FromSettings>(sources: &Sources) -> Result<T, Vec<ConfigError>> {
    let mut reader = Reader {
        sources,
        errors: Vec::new(),
    };
    match T::read(&mut reader) {
        Some(value) if reader.errors.is_empty() => Ok(value),
        _ => Err(reader.errors),
    }
}

/// Gives values to sections and notes what is wrong with them.
#[derive(Debug)]
pub struct Reader<'a> {
    sources: &'a Sources,
    errors: Vec<ConfigError>,
}

impl Reader<'_> {
    /// A value that has a default or must be given.
    pub(super) fn get<T>(
        &mut self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let setting = definition(name);
        if let Some(text) = self.sources.raw(setting) {
            return self.parsed(setting, text.trim(), parse);
        }
        self.missing(setting);
        None
    }

    /// A value that may be absent. Also `None` if it is wrong; then an error is noted, which fails the load.
    pub(super) fn optional<T>(
        &mut self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let setting = definition(name);
        let text = self.sources.raw(setting)?;
        self.parsed(setting, text.trim(), parse)
    }

    /// Whether there is a value, right or wrong.
    pub(super) fn is_given(&self, name: &'static str) -> bool {
        self.sources.raw(definition(name)).is_some()
    }

    /// A file with certificate authorities, which may be absent from the settings, but must hold some if it is named.
    pub(super) fn authorities(
        &mut self,
        name: &'static str,
        check: fn(&Path) -> Result<(), String>,
    ) -> Option<PathBuf> {
        self.optional(name, |text| {
            let path = PathBuf::from(text);
            check(&path).map(|()| path)
        })
    }

    /// A secret that must be given.
    pub(super) fn secret(
        &mut self,
        name: &'static str,
        check: fn(&str) -> Result<(), String>,
    ) -> Option<SecretString> {
        let before = self.errors.len();
        let value = self.optional_secret(name, check);
        if value.is_none() && self.errors.len() == before {
            self.missing(definition(name));
        }
        value
    }

    /// A secret that may be absent, from its variable or from the file that `NAME_FILE` names.
    pub(super) fn optional_secret(
        &mut self,
        name: &'static str,
        check: fn(&str) -> Result<(), String>,
    ) -> Option<SecretString> {
        let setting = definition(name);
        let text = match (self.sources.raw(setting), self.sources.file(setting)) {
            (Some(_), Some(_)) => {
                let other = setting.file_variable();
                self.note(name, "is given twice", &format!("give either it or {other}"));
                return None;
            }
            (Some(text), None) => text.trim().to_owned(),
            (None, Some(path)) => match read_secret(path) {
                Ok(text) => text,
                Err(problem) => {
                    self.note(
                        &setting.file_variable(),
                        &problem,
                        "give a readable file that holds nothing else",
                    );
                    return None;
                }
            },
            (None, None) => return None,
        };
        if let Err(allowed) = check(&text) {
            self.note(name, "has a wrong form", &allowed);
            return None;
        }
        Some(SecretString::from(text))
    }

    /// Notes an error that concerns several settings together.
    pub(super) fn note(&mut self, name: &str, problem: &str, allowed: &str) {
        let error = ConfigError {
            name: name.into(),
            problem: problem.into(),
            allowed: allowed.into(),
        };
        // Two sections may read the same setting.
        if !self.errors.contains(&error) {
            self.errors.push(error);
        }
    }

    /// What the process knows besides settings.
    pub(super) fn sources(&self) -> &Sources {
        self.sources
    }

    fn parsed<T>(
        &mut self,
        setting: &Setting,
        text: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        // A URL may have been given with credentials, though none belong there.
        let problem = if setting.name.ends_with("_URL") || setting.name.ends_with("_ENDPOINT") {
            "has a wrong form".to_owned()
        } else {
            format!("`{text}` cannot be used")
        };
        parse(text)
            .map_err(|allowed| self.note(setting.name, &problem, &allowed))
            .ok()
    }

    fn missing(&mut self, setting: &Setting) {
        let file = if setting.secret {
            format!(", or a file with it as {}", setting.file_variable())
        } else {
            String::new()
        };
        self.note(
            setting.name,
            "is not set",
            &format!("give {}{file}", setting.form),
        );
    }
}

fn read_secret(path: &str) -> Result<String, String> {
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| format!("cannot open {path}: {error}"))?;
    file.take(MAX_SECRET_FILE + 1)
        .read_to_string(&mut text)
        .map_err(|error| format!("cannot read {path}: {error}"))?;
    if text.len() as u64 > MAX_SECRET_FILE {
        return Err(format!("{path} is too large for a secret"));
    }
    let text = text.trim();
    if text.is_empty() {
        Err(format!("{path} is empty"))
    } else {
        Ok(text.into())
    }
}

#[expect(
    clippy::expect_used,
    reason = "a typo in a section, found by the first test that reads it"
)]
fn definition(name: &'static str) -> &'static Setting {
    settings::find(name).expect("every setting that is read is in the table")
}
