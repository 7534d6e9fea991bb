//! Signs webhooks by Standard Webhooks 1.0: `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::Sha256;
use zeroize::Zeroizing;

/// What a signing secret begins with.
const PREFIX: &str = "whsec_";
/// Bytes of a generated secret; the specification asks for 24 to 64.
const GENERATED: usize = 32;

/// Why a signing secret is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a signing secret is `whsec_` followed by the base64 of 24 to 64 bytes; --generate-secret makes one")]
pub struct InvalidSecret;

/// A key that signs, ready for use.
pub struct SigningKey(Hmac<Sha256>);

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SigningKey")
    }
}

impl SigningKey {
    /// Reads a secret, with or without its `whsec_`.
    ///
    /// # Errors
    /// If it is not base64 of 24 to 64 bytes.
    pub fn parse(secret: &SecretString) -> Result<Self, InvalidSecret> {
        let text = secret.expose_secret().trim();
        let text = text.strip_prefix(PREFIX).unwrap_or(text);
        let key = Zeroizing::new(STANDARD.decode(text).map_err(|_| InvalidSecret)?);
        if !(24..=64).contains(&key.len()) {
            return Err(InvalidSecret);
        }
        Hmac::new_from_slice(&key).map(Self).map_err(|_| InvalidSecret)
    }

    /// One signature of one attempt; `timestamp` is that of the attempt, in Unix seconds.
    fn sign(&self, id: &str, timestamp: i64, body: &[u8]) -> String {
        let mut mac = self.0.clone();
        mac.update(id.as_bytes());
        mac.update(format!(".{timestamp}.").as_bytes());
        mac.update(body);
        STANDARD.encode(mac.finalize().into_bytes())
    }
}

/// A new signing secret of 256 random bits.
#[must_use]
pub fn generate() -> SecretString {
    let bytes = Zeroizing::new(rand::random::<[u8; GENERATED]>());
    format!("{PREFIX}{}", STANDARD.encode(*bytes)).into()
}

/// The value of `webhook-signature`: one signature for each key, the newest first, separated by spaces.
#[must_use]
pub fn header(keys: &[SigningKey], id: &str, timestamp: i64, body: &[u8]) -> String {
    let mut value = String::with_capacity(48 * keys.len());
    for key in keys {
        let separator = if value.is_empty() { "" } else { " " };
        // Writing to a string cannot fail.
        let _ = write!(value, "{separator}v1,{}", key.sign(id, timestamp, body));
    }
    value
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";

    fn key(secret: &str) -> SigningKey {
        SigningKey::parse(&secret.into()).unwrap()
    }

    #[test]
    fn the_published_vector_is_reproduced() {
        let body = br#"{"email":"test@example.com","username":"test_user"}"#;
        assert_eq!(
            header(
                &[key(SECRET)],
                "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
                1_649_367_553,
                body
            ),
            "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw="
        );
    }

    #[test]
    fn during_rotation_there_are_two_signatures_with_the_new_one_first() {
        let new = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let both = header(&[key(new), key(SECRET)], "evt_1", 7, b"{}");
        let (first, second) = both.split_once(' ').unwrap();
        assert_eq!(first, header(&[key(new)], "evt_1", 7, b"{}"));
        assert_eq!(second, header(&[key(SECRET)], "evt_1", 7, b"{}"));
    }

    #[test]
    fn secrets_are_base64_of_24_to_64_bytes() {
        for length in [0, 1, 23, 65, 200] {
            let secret = format!("whsec_{}", STANDARD.encode(vec![7; length]));
            assert_eq!(
                SigningKey::parse(&secret.into()).err(),
                Some(InvalidSecret),
                "{length}"
            );
        }
        for length in [24, 32, 64] {
            let secret = format!("whsec_{}", STANDARD.encode(vec![7; length]));
            assert!(SigningKey::parse(&secret.into()).is_ok(), "{length}");
        }
        assert!(SigningKey::parse(&"whsec_not base64!".into()).is_err());
        assert!(SigningKey::parse(&generate()).is_ok());
        assert_ne!(generate().expose_secret(), generate().expose_secret());
    }

    proptest! {
        #[test]
        fn every_signature_is_the_one_of_the_reference_library(
            secret in proptest::collection::vec(any::<u8>(), 24..=64),
            id in "[a-zA-Z0-9_]{1,40}",
            timestamp in 0_i64..4_000_000_000,
            body in ".{0,200}",
        ) {
            let theirs = standardwebhooks::Webhook::from_bytes(secret.clone()).unwrap();
            let ours = key(&STANDARD.encode(&secret));
            prop_assert_eq!(
                header(&[ours], &id, timestamp, body.as_bytes()),
                theirs.sign(&id, timestamp, body.as_bytes()).unwrap()
            );
        }
    }
}
