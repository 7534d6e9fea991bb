//! Opens what producers seal: JWE in compact serialization (RFC 7516 §7.1) with a shared key used directly
//! (`alg: dir`, RFC 7518 §4.5) and `enc: A256GCM` (RFC 7518 §5.3). Nothing else is accepted.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde::de::IgnoredAny;
use zeroize::Zeroizing;

use super::keyring::{Keyring, SecretError, decrypt, is_kid};

/// Longest token that is looked at, in bytes.
pub const MAX_TOKEN: usize = 16 << 10;
const IV_BYTES: usize = 12;
const TAG_BYTES: usize = 16;

/// Why a token was not opened. The texts are constant but for the key id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JweError {
    /// Sealed with a key that is not in the ring. Passes when the key is added.
    #[error("sealed with key `{kid}`, which is not among the configured override keys")]
    UnknownKey {
        /// Id of the missing key.
        kid: String,
    },
    /// The wrong key under the right id, or the token was changed.
    #[error("does not open: another key under the same id, or the token was changed")]
    Corrupt,
    /// Longer than [`MAX_TOKEN`].
    #[error("longer than 16 KiB")]
    TooLong,
    /// Not five base64url parts, or parts of the wrong length.
    #[error("not a compact JWE: five base64url parts, the second empty, a 96-bit IV and a 128-bit tag")]
    Shape,
    /// The protected header cannot be used.
    #[error("header refused: {0}")]
    Header(&'static str),
}

/// The protected header. RFC 7516 §4 wants unknown parameters ignored, and repeated ones refused.
#[derive(Deserialize)]
struct Header<'a> {
    #[serde(borrow)]
    alg: std::borrow::Cow<'a, str>,
    enc: std::borrow::Cow<'a, str>,
    kid: std::borrow::Cow<'a, str>,
    #[serde(default, deserialize_with = "present")]
    zip: bool,
    #[serde(default, deserialize_with = "present")]
    crit: bool,
}

/// Whatever the value, `null` included.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| true)
}

/// Opens a token with the key its header names and returns the payload.
///
/// # Errors
/// Says what is wrong with the token; only [`JweError::UnknownKey`] can pass by itself.
pub fn open(keys: &Keyring, token: &str) -> Result<Zeroizing<Vec<u8>>, JweError> {
    if token.len() > MAX_TOKEN {
        return Err(JweError::TooLong);
    }
    let mut parts = token.split('.');
    let (Some(header), Some(""), Some(iv), Some(sealed), Some(tag), None) = (
        parts.next(),
        parts.next(),
        parts.next(),
        parts.next(),
        parts.next(),
        parts.next(),
    ) else {
        return Err(JweError::Shape);
    };
    let kid = read_header(&decode(header)?)?;
    let (iv, mut sealed, tag) = (decode(iv)?, decode(sealed)?, decode(tag)?);
    if iv.len() != IV_BYTES || tag.len() != TAG_BYTES {
        return Err(JweError::Shape);
    }
    sealed.extend_from_slice(&tag);
    let cipher = keys.cipher(&kid).ok_or(JweError::UnknownKey { kid })?;
    // RFC 7516 §5.1 step 14: the additional data is the header as it was encoded.
    decrypt(cipher, &iv, &sealed, header.as_bytes()).map_err(|error| match error {
        SecretError::Format => JweError::Shape,
        SecretError::UnknownKey { .. } | SecretError::Corrupt => JweError::Corrupt,
    })
}

fn decode(part: &str) -> Result<Vec<u8>, JweError> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| JweError::Shape)
}

fn read_header(json: &[u8]) -> Result<String, JweError> {
    const EXPECTED: JweError =
        JweError::Header("expected a JSON object with the strings `alg`, `enc` and `kid`, none repeated");
    // serde would read an array as well.
    if json.first() != Some(&b'{') {
        return Err(EXPECTED);
    }
    let header: Header<'_> = serde_json::from_slice(json).map_err(|_| EXPECTED)?;
    if header.alg != "dir" {
        return Err(JweError::Header("`alg` must be `dir`"));
    }
    if header.enc != "A256GCM" {
        return Err(JweError::Header("`enc` must be `A256GCM`"));
    }
    if header.zip {
        return Err(JweError::Header("`zip` is not supported"));
    }
    if header.crit {
        return Err(JweError::Header("`crit` is not supported"));
    }
    if !is_kid(&header.kid) {
        return Err(JweError::Header(
            "`kid` must be 1 to 64 characters of A-Z a-z 0-9 _ . -",
        ));
    }
    Ok(header.kid.into_owned())
}

#[cfg(test)]
mod tests;
