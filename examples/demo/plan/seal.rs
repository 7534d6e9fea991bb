//! Seals an `smtp_override` as producers do: compact JWE (RFC 7516 §7.1) with `alg: dir` and `enc: A256GCM`. Every JOSE
//! library makes these; by hand it takes one function.

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// One entry of `POSTROOM_OVERRIDE_KEYS`.
pub(crate) struct SealingKey {
    kid: String,
    cipher: Aes256Gcm,
}

impl SealingKey {
    /// From `kid:base64`, as `postroom key generate` prints it.
    pub(crate) fn parse(entry: &str) -> Result<Self, String> {
        let (kid, key) = entry.split_once(':').ok_or("a key has the form kid:base64")?;
        let key = STANDARD
            .decode(key)
            .map_err(|error| format!("key {kid}: {error}"))?;
        Ok(Self {
            kid: kid.to_owned(),
            cipher: Aes256Gcm::new_from_slice(&key).map_err(|error| format!("key {kid}: {error}"))?,
        })
    }

    /// The token that holds this payload.
    #[expect(clippy::expect_used, reason = "AES-GCM encrypts every message of this size")]
    pub(crate) fn seal(&self, payload: &Value) -> String {
        let header = json!({"alg": "dir", "enc": "A256GCM", "kid": self.kid});
        let header = URL_SAFE_NO_PAD.encode(header.to_string());
        let iv: [u8; 12] = rand::random();
        let payload = payload.to_string();
        let payload = Payload {
            msg: payload.as_bytes(),
            aad: header.as_bytes(),
        };
        let sealed = self
            .cipher
            .encrypt(&iv.into(), payload)
            .expect("a few bytes can be encrypted");
        let (sealed, tag) = sealed.split_at(sealed.len() - 16);
        let parts = [&iv[..], sealed, tag].map(|part| URL_SAFE_NO_PAD.encode(part));
        format!("{header}..{}", parts.join("."))
    }
}
