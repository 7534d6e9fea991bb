//! Conversations that break off without a reply, as failures.

use std::io;
use std::time::Duration;

use crate::failure::{Class, Failure, Fault, Stage};

use super::tls::TlsSetupError;
use super::wire::UpgradeError;

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// Its time limit passed.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// It is no SMTP.
    #[error("the server's answer is not SMTP")]
    Malformed,
}

impl Trouble {
    /// As a failure of a stage: the provider's, and passing.
    pub(super) fn failure(&self, stage: Stage) -> Failure {
        let reason = match self {
            Self::TimedOut(_) => "timeout",
            Self::Closed | Self::Io(_) => "connection_lost",
            Self::Malformed => "malformed_reply",
        };
        Failure::transient(
            Class::Infrastructure,
            Fault::Provider,
            stage,
            reason,
            self.to_string(),
        )
    }
}

/// No TCP connection.
pub(super) fn unreachable(error: &io::Error) -> Failure {
    let reason = if error.kind() == io::ErrorKind::TimedOut {
        "connect_timeout"
    } else {
        "connect_failed"
    };
    let message = format!("Cannot connect to the server: {error}");
    Failure::transient(
        Class::Infrastructure,
        Fault::Provider,
        Stage::Connect,
        reason,
        message,
    )
}

/// No TLS. Always transient: a certificate is renewed, and who strips STARTTLS must not be able to lose mail.
pub(super) fn no_tls(reason: &'static str, message: impl Into<String>) -> Failure {
    Failure::transient(Class::Tls, Fault::Provider, Stage::Connect, reason, message)
}

/// A handshake that failed.
pub(super) fn handshake(error: &UpgradeError) -> Failure {
    let UpgradeError::Handshake(io) = error else {
        return no_tls("starttls_injection", error.to_string());
    };
    let rustls = io
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match rustls {
        Some(error @ rustls::Error::InvalidCertificate(_)) => no_tls(
            "certificate_invalid",
            format!("The server's certificate is not accepted: {error}"),
        ),
        _ => no_tls(
            "tls_failed",
            format!("The TLS handshake failed: {io}; is the account's TLS mode right?"),
        ),
    }
}

/// TLS that cannot even be tried.
pub(super) fn tls_setup(error: &TlsSetupError) -> Failure {
    let fault = match error {
        TlsSetupError::AccountCa(_) | TlsSetupError::Host { .. } => Fault::Sender,
        TlsSetupError::CaFile { .. } | TlsSetupError::Rustls(_) => Fault::Us,
    };
    Failure::permanent(
        Class::Local,
        fault,
        Stage::Connect,
        "tls_setup",
        error.to_string(),
    )
}
