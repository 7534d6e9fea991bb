//! `smtp_override`: opened for one send and dropped. ([`crate::job::decode::seal_override`] seals a plain one before the
//! job is written anywhere.)

use jiff::Timestamp;
use secrecy::ExposeSecret;

use crate::failure::{Class, Failure, Fault, KEY_UNKNOWN, Stage};
use crate::id::{JobId, TenantId};
use crate::job::decode::{self, SealedBy};
use crate::job::{MailJob, OverrideServer, SmtpOverride};
use crate::secret::jwe::JweError;
use crate::secret::{Keyring, SecretError, jwe};

/// What our own sealed values begin with; a JWE begins with a base64url JSON object, so never with this.
const OURS: &str = "v1:";

/// Additional data of an override that postroom itself sealed: it opens for this job only.
#[must_use]
pub fn aad(tenant: &TenantId, job: &JobId) -> String {
    format!("override:{tenant}/{job}")
}

/// The server of the job's override, if it has one. `overrides` are the keys producers seal with.
///
/// # Errors
/// Transient `key_unknown` while a key is missing; permanent `override_invalid`, `override_expired` or
/// `override_other_tenant` for anything else that is wrong.
pub fn open_override(
    job: &MailJob,
    encryption: &Keyring,
    overrides: Option<&Keyring>,
) -> Result<Option<OverrideServer>, Failure> {
    let token = match &job.smtp_override {
        None => return Ok(None),
        Some(SmtpOverride::Plain(server)) => return Ok(Some(server.clone())),
        Some(SmtpOverride::Sealed(token)) => token.expose_secret(),
    };
    let (plain, sealed_by) = if token.starts_with(OURS) {
        let plain = encryption.open_bytes(token, &aad(&job.tenant, &job.id));
        (plain.map_err(|error| of_secret(&error))?, SealedBy::Us)
    } else {
        let keys = overrides.ok_or_else(|| {
            waiting("it is sealed, but no keys are configured to open it: set POSTROOM_OVERRIDE_KEYS")
        })?;
        (
            jwe::open(keys, token).map_err(|error| of_jwe(&error))?,
            SealedBy::Jwe,
        )
    };
    decode::parse_override(&plain, &job.tenant, Timestamp::now(), sealed_by)
        .map(Some)
        .map_err(|error| refused(error.reason(), error.to_string()))
}

fn of_secret(error: &SecretError) -> Failure {
    match error {
        SecretError::UnknownKey { .. } => waiting(&error.to_string()),
        SecretError::Corrupt | SecretError::Format => invalid(&error.to_string()),
    }
}

fn of_jwe(error: &JweError) -> Failure {
    match error {
        JweError::UnknownKey { .. } => waiting(&error.to_string()),
        JweError::Corrupt | JweError::TooLong | JweError::Shape | JweError::Header(_) => {
            invalid(&error.to_string())
        }
    }
}

fn waiting(message: &str) -> Failure {
    let message = format!("smtp_override: {message}");
    Failure::transient(Class::Local, Fault::Us, Stage::Resolve, KEY_UNKNOWN, message)
}

fn invalid(message: &str) -> Failure {
    refused("override_invalid", format!("smtp_override: {message}"))
}

fn refused(reason: &'static str, message: String) -> Failure {
    Failure::permanent(Class::Content, Fault::Sender, Stage::Resolve, reason, message)
}

#[cfg(test)]
mod tests;
