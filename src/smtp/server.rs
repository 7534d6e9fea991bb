//! Whom to talk to, and for whom.

use std::sync::Arc;

use secrecy::SecretString;

use crate::id::AccountKey;
use crate::job::TlsMode;

/// An SMTP server and how to log in to it.
#[derive(Debug, Clone)]
pub struct Server {
    /// Host name or address; the certificate must be for it.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// How the connection is protected.
    pub tls: TlsMode,
    /// How to log in; `None` for servers that ask for nothing.
    pub credentials: Option<Credentials>,
    /// Whether the password may be sent over an unencrypted connection.
    pub allow_plaintext_auth: bool,
    /// Certificate authorities to trust besides the system's, in PEM.
    pub ca_pem: Option<Arc<str>>,
    /// The platform's own server: exempt from the egress guard.
    pub trusted: bool,
}

/// User name and password.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// User name.
    pub username: String,
    /// Password.
    pub password: SecretString,
}

/// An account as the pools know it.
#[derive(Debug, Clone)]
pub struct Submission {
    /// The key of the pool.
    pub key: AccountKey,
    /// Version of the account's server and login; connections of an older one are not used any more. The other settings
    /// change without it.
    pub version: i64,
    /// Its server.
    pub server: Server,
    /// Connections all workers together may have open; asks [`super::ConnectionCaps`] when set.
    pub max_connections: Option<u32>,
}

/// The addresses a host name leads to, as far as we may connect to them. The egress guard implements it.
pub trait Resolver: Send + Sync {
    /// Resolves a host name or literal address.
    ///
    /// # Errors
    /// When nothing is found or nothing found is allowed; `trusted` hosts are always allowed.
    fn resolve<'a>(
        &'a self,
        host: &'a str,
        port: u16,
        trusted: bool,
    ) -> futures_util::future::BoxFuture<'a, Result<Vec<std::net::SocketAddr>, Refusal>>;
}

/// Why a host has no address to connect to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is not allowed to connect there; the text names the setting.
    #[error("{0}")]
    Denied(String),
    /// The name could not be resolved.
    #[error("{0}")]
    Lookup(String),
}
