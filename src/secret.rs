//! Secrets: sealed at rest with AES-256-GCM under named keys, opened only where they are used.
//!
//! [`keyring`] seals and opens stored values, [`shared`] lets a running process change its keys, [`jwe`] opens what producers sealed, [`stored`] knows every column that
//! holds a sealed value: for the check at start and for rotation.

pub mod dumps;
pub mod jwe;
pub mod keyring;
pub mod shared;
pub mod stored;

pub use keyring::{KeyError, Keyring, SecretError};
pub use shared::{Keys, KeysError, SharedKeyring};
