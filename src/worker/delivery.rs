//! What travels with a job's body into the waiting room and back.

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::directory::overrides;
use crate::job::{MailJob, SmtpOverride, decode};
use crate::ledger::settle::Body;
use crate::secret::Keyring;

/// Properties of a delivery that a stored body needs; JSON in the ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Properties {
    /// AMQP `correlation_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// W3C trace context of the producer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// AMQP `timestamp`. Not of what an operator replayed: it has lain among the dead letters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published: Option<Timestamp>,
    /// Header `x-contract`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contract: Option<String>,
    /// Recipients of the whole job: what it costs before anybody has been tried.
    #[serde(default)]
    pub recipients: usize,
    /// For reports made without the job in hand.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// For reports made without the job in hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<serde_json::Value>,
    /// When somebody let it go by hand, for the first time; added by the ledger.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released_at: Option<Timestamp>,
}

impl Properties {
    /// The properties as stored.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Strings, numbers and JSON values: there is nothing in it that cannot be serialised.
        serde_json::to_string(self).unwrap_or_else(|_| "{}".to_owned())
    }
}

/// A job's body in the form in which it may be stored: plain overrides sealed.
///
/// # Errors
/// If the override cannot be sealed: the body must not be stored then.
pub fn stored(job: &MailJob, plain: &Bytes, properties: &Properties, keys: &Keyring) -> Result<Body, String> {
    let bytes = match &job.smtp_override {
        Some(SmtpOverride::Plain(_)) => {
            let aad = overrides::aad(&job.tenant, &job.id);
            decode::seal_override(plain, |secret| keys.seal(secret, &aad))
                .map(|sealed| Bytes::from(sealed.into_owned()))
                .map_err(|error| error.to_string())?
        }
        _ => plain.clone(),
    };
    Ok(Body {
        bytes,
        properties: properties.to_json(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_come_back_as_they_were_stored_and_unknown_ones_are_ignored() {
        let properties = Properties {
            correlation_id: Some("c".into()),
            published: Timestamp::from_second(1_700_000_000).ok(),
            recipients: 3,
            tags: vec!["a".into()],
            ..Properties::default()
        };
        assert_eq!(
            serde_json::from_str::<Properties>(&properties.to_json()).unwrap(),
            properties
        );
        assert!(serde_json::from_str::<Properties>(r#"{"later": 1}"#).is_ok());
    }
}
