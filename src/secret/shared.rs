//! Key rings as a process holds them: replaced while it runs, so that keys are rotated without a restart.

use std::sync::{Arc, PoisonError, RwLock};

use super::stored::{StoredError, verify_keys};
use super::{KeyError, Keyring};
use crate::config;
use crate::db::Database;

/// A key ring that may be replaced. Clones see the same one.
#[derive(Debug, Clone)]
pub struct SharedKeyring(Arc<RwLock<Arc<Keyring>>>);

impl SharedKeyring {
    /// The ring as it is now. Ask again for every piece of work.
    #[must_use]
    pub fn current(&self) -> Arc<Keyring> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the ring, for all clones.
    pub fn replace(&self, ring: Keyring) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring);
    }
}

impl From<Arc<Keyring>> for SharedKeyring {
    fn from(ring: Arc<Keyring>) -> Self {
        Self(Arc::new(RwLock::new(ring)))
    }
}

impl From<Keyring> for SharedKeyring {
    fn from(ring: Keyring) -> Self {
        Arc::new(ring).into()
    }
}

/// The rings of a process.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Keys at rest.
    pub encryption: SharedKeyring,
    /// Keys producers seal overrides with, if there are any.
    pub overrides: Option<SharedKeyring>,
}

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The keys cannot be read.
    #[error("POSTROOM_ENCRYPTION_KEYS: {0}")]
    Encryption(KeyError),
    /// The keys for overrides cannot be read.
    #[error("POSTROOM_OVERRIDE_KEYS: {0}")]
    Overrides(KeyError),
    /// They do not fit what is stored, or that cannot be found out.
    #[error(transparent)]
    Stored(#[from] StoredError),
}

impl KeysError {
    /// Whether the database could not be asked: it may work later.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Stored(StoredError::Database(_)))
    }
}

impl Keys {
    /// Reads the rings, and checks that they open what is stored.
    ///
    /// # Errors
    /// If a ring cannot be read, lacks a key in use or holds another key under its id.
    pub async fn open(config: &config::Keys, database: &Database) -> Result<Self, KeysError> {
        let (encryption, overrides) = parse(config)?;
        verify_keys(database, &encryption).await?;
        Ok(Self {
            encryption: encryption.into(),
            overrides: overrides.map(Into::into),
        })
    }

    /// Replaces the rings, both or none.
    ///
    /// # Errors
    /// As [`Keys::open`]; the old rings stay in use. A stored secret that the old ring does not open either is no
    /// reason to refuse the new one.
    pub async fn replace(&self, config: &config::Keys, database: &Database) -> Result<(), KeysError> {
        let (encryption, overrides) = parse(config)?;
        match verify_keys(database, &encryption).await {
            Err(StoredError::UnknownKeys(kids)) if !self.knows_any(&kids) => {
                tracing::warn!(
                    keys = kids.join(", "),
                    "stored secrets were sealed with keys that are still missing"
                );
            }
            verified => verified?,
        }
        tracing::info!(
            active = encryption.active(),
            "POSTROOM_ENCRYPTION_KEYS: keys replaced"
        );
        self.encryption.replace(encryption);
        if let (Some(shared), Some(ring)) = (&self.overrides, overrides) {
            shared.replace(ring);
        }
        Ok(())
    }

    fn knows_any(&self, kids: &[String]) -> bool {
        let ring = self.encryption.current();
        kids.iter().any(|kid| ring.knows(kid))
    }
}

fn parse(config: &config::Keys) -> Result<(Keyring, Option<Keyring>), KeysError> {
    let encryption = Keyring::parse(&config.encryption).map_err(KeysError::Encryption)?;
    let overrides = config.overrides.as_ref().map(Keyring::parse).transpose();
    Ok((encryption, overrides.map_err(KeysError::Overrides)?))
}
