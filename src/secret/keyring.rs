//! Named AES-256-GCM keys, one of them active, and the form in which values sealed with them are stored.

use std::collections::HashSet;
use std::fmt;

use aes_gcm::aead::{Aead, Generate, Nonce, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use base64::Engine;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

/// Standard alphabet; `=` at the end may be missing, as some secret stores strip it.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

const KEY_BYTES: usize = 32;
/// 96 bits, drawn at random for every seal (NIST SP 800-38D §8.2.2: good for 2^32 values per key).
const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
const VERSION: &str = "v1";
const MAX_KEYS: usize = 32;
/// Stands in place of a key that is gone for good.
const LOST: &str = "lost";
/// Longest sealed value that is looked at, in bytes.
const MAX_SEALED: usize = 64 << 10;

/// What a key id may be, for error messages.
pub const KID_RULE: &str = "1 to 64 characters of A-Z a-z 0-9 _ . -";

/// Why the text of a key ring was refused. Never holds any of that text but a valid key id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Nothing there.
    #[error("no key: expected `kid:base64` with 32 bytes of key (`postroom key generate` prints one)")]
    Empty,
    /// No colon.
    #[error(
        "entry {entry}: expected `kid:base64`; entries are separated by commas, the first key is the active one"
    )]
    Shape {
        /// Position, from 1.
        entry: usize,
    },
    /// The key id is not one.
    #[error("entry {entry}: the key id must be {KID_RULE}")]
    Kid {
        /// Position, from 1.
        entry: usize,
    },
    /// The key is not base64.
    #[error("entry {entry} (`{kid}`): the key must be standard base64")]
    Base64 {
        /// Position, from 1.
        entry: usize,
        /// Its key id.
        kid: String,
    },
    /// The key has the wrong length.
    #[error("entry {entry} (`{kid}`): the key must be 32 bytes, not {bytes}")]
    Length {
        /// Position, from 1.
        entry: usize,
        /// Its key id.
        kid: String,
        /// Bytes found.
        bytes: usize,
    },
    /// The key id was there before.
    #[error("entry {entry}: the key id `{kid}` is used twice; every key needs an id of its own")]
    Duplicate {
        /// Position, from 1.
        entry: usize,
        /// The repeated key id.
        kid: String,
    },
    /// The active key cannot be one that is gone.
    #[error(
        "entry 1 (`{kid}`): the first key seals and cannot be `{LOST}`; put a new one before it (`postroom key generate`)"
    )]
    ActiveLost {
        /// Its key id.
        kid: String,
    },
    /// More keys than rotation can need.
    #[error("more than {MAX_KEYS} keys; remove those that `postroom key rotate` has made unnecessary")]
    TooMany,
}

/// Why a sealed value could not be opened. The texts are constant but for the key id: nothing of the value is told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Sealed with a key that is not in the ring. Passes when the key is added: jobs wait for it.
    #[error("sealed with key `{kid}`, which is not among the configured keys")]
    UnknownKey {
        /// Id of the missing key.
        kid: String,
    },
    /// Wrong key under the right id, a value moved from another row, or damage.
    #[error("does not open: another key under the same id, or the value was changed")]
    Corrupt,
    /// Not a sealed value.
    #[error("not a sealed value")]
    Format,
}

/// Whether the text can be a key id.
#[must_use]
pub fn is_kid(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

struct Key {
    kid: String,
    // Boxed, so that a growing vector leaves no copies of key schedules behind; zeroized on drop.
    cipher: Box<Aes256Gcm>,
}

/// Named keys, the first active. Its keys are zeroized on drop and never shown.
pub struct Keyring {
    active: Key,
    others: Vec<Key>,
    /// Ids of keys that are gone for good.
    lost: Vec<String>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kids = self.iter().map(|key| &key.kid);
        f.debug_list().entries(kids).finish()
    }
}

impl Keyring {
    /// Reads `kid:base64,kid2:base64,kid3:lost`; the first key is the active one, and a `lost` one is known to be gone.
    ///
    /// # Errors
    /// Says which entry is wrong and what is allowed, never what stands there.
    pub fn parse(text: &SecretString) -> Result<Self, KeyError> {
        let text = text.expose_secret().trim();
        if text.is_empty() {
            return Err(KeyError::Empty);
        }
        let (mut keys, mut lost) = (Vec::new(), Vec::new());
        let mut kids = HashSet::new();
        for (index, part) in text.split(',').enumerate() {
            if index == MAX_KEYS {
                return Err(KeyError::TooMany);
            }
            let (kid, key) = parse_entry(index + 1, part.trim())?;
            if !kids.insert(kid.clone()) {
                return Err(KeyError::Duplicate {
                    entry: index + 1,
                    kid,
                });
            }
            match key {
                Some(key) => keys.push(key),
                None if index == 0 => return Err(KeyError::ActiveLost { kid }),
                None => lost.push(kid),
            }
        }
        let others = keys.split_off(1);
        let active = keys.pop().ok_or(KeyError::Empty)?;
        Ok(Self { active, others, lost })
    }

    /// A fresh random key as one `kid:base64` entry.
    ///
    /// # Errors
    /// If the key id is not one ([`KID_RULE`]).
    pub fn generate_entry(kid: &str) -> Result<SecretString, KeyError> {
        if !is_kid(kid) {
            return Err(KeyError::Kid { entry: 1 });
        }
        let key = Zeroizing::new(<[u8; KEY_BYTES]>::generate());
        let text = Zeroizing::new(STANDARD.encode(key.as_slice()));
        Ok(format!("{kid}:{}", *text).into())
    }

    /// Id of the key that seals.
    #[must_use]
    pub fn active(&self) -> &str {
        &self.active.kid
    }

    /// Whether a key of this id is there.
    #[must_use]
    pub fn knows(&self, kid: &str) -> bool {
        self.cipher(kid).is_some()
    }

    /// Whether the key of this id is said to be gone for good.
    #[must_use]
    pub fn has_lost(&self, kid: &str) -> bool {
        self.lost.iter().any(|lost| lost == kid)
    }

    /// Whether a key of the one is a key of the other, under whatever id.
    #[must_use]
    pub fn shares_a_key_with(&self, other: &Self) -> bool {
        // What a key makes of nothing tells it from others. It is shown to nobody.
        let mark = |key: &Key| key.cipher.encrypt(&Nonce::<Aes256Gcm>::default(), &b""[..]).ok();
        let marks: Vec<_> = self.iter().filter_map(mark).collect();
        other.iter().filter_map(mark).any(|found| marks.contains(&found))
    }

    fn iter(&self) -> impl Iterator<Item = &Key> {
        std::iter::once(&self.active).chain(&self.others)
    }

    pub(super) fn cipher(&self, kid: &str) -> Option<&Aes256Gcm> {
        self.iter().find(|key| key.kid == kid).map(|key| &*key.cipher)
    }

    /// Seals with the active key under a fresh random nonce: `v1:kid:base64(nonce ‖ ciphertext ‖ tag)`. `aad` says where
    /// the value belongs, so that it opens nowhere else.
    ///
    /// # Panics
    /// Beyond 64 GiB of plaintext.
    #[must_use]
    pub fn seal(&self, plaintext: &[u8], aad: &str) -> String {
        let nonce = Nonce::<Aes256Gcm>::generate();
        let payload = Payload {
            msg: plaintext,
            aad: aad.as_bytes(),
        };
        #[expect(clippy::expect_used, reason = "AES-GCM refuses only plaintexts beyond 64 GiB")]
        let sealed = self
            .active
            .cipher
            .encrypt(&nonce, payload)
            .expect("a secret is shorter than 64 GiB");
        let bytes = [nonce.as_slice(), &sealed].concat();
        format!("{VERSION}:{}:{}", self.active.kid, STANDARD.encode(bytes))
    }

    /// Opens what [`Keyring::seal`] made, with the same `aad`.
    ///
    /// # Errors
    /// [`SecretError::UnknownKey`] may pass when the configuration changes; the others do not.
    pub fn open(&self, sealed: &str, aad: &str) -> Result<SecretString, SecretError> {
        let plain = self.open_bytes(sealed, aad)?;
        let text = str::from_utf8(&plain).map_err(|_| SecretError::Corrupt)?;
        Ok(SecretString::from(text))
    }

    /// As [`Keyring::open`], for values that need not be text.
    ///
    /// # Errors
    /// As [`Keyring::open`].
    pub fn open_bytes(&self, sealed: &str, aad: &str) -> Result<Zeroizing<Vec<u8>>, SecretError> {
        let (kid, body) = split(sealed)?;
        let cipher = self
            .cipher(kid)
            .ok_or_else(|| SecretError::UnknownKey { kid: kid.to_owned() })?;
        let bytes = BASE64.decode(body).map_err(|_| SecretError::Format)?;
        if bytes.len() < NONCE_BYTES + TAG_BYTES {
            return Err(SecretError::Format);
        }
        decrypt(
            cipher,
            &bytes[..NONCE_BYTES],
            &bytes[NONCE_BYTES..],
            aad.as_bytes(),
        )
    }

    /// Id of the key a stored value was sealed with.
    ///
    /// # Errors
    /// [`SecretError::Format`] if it is not a sealed value.
    pub fn kid_of(sealed: &str) -> Result<&str, SecretError> {
        split(sealed).map(|(kid, _)| kid)
    }

    /// Whether the value was sealed with a key that is not the active one.
    ///
    /// # Errors
    /// [`SecretError::Format`] if it is not a sealed value.
    pub fn needs_rotation(&self, sealed: &str) -> Result<bool, SecretError> {
        Self::kid_of(sealed).map(|kid| kid != self.active())
    }

    /// The same secret sealed with the active key.
    ///
    /// # Errors
    /// If the value does not open.
    pub fn reseal(&self, sealed: &str, aad: &str) -> Result<String, SecretError> {
        let plain = self.open_bytes(sealed, aad)?;
        Ok(self.seal(&plain, aad))
    }
}

/// Decrypts with a nonce of the right length.
pub(super) fn decrypt(
    cipher: &Aes256Gcm,
    nonce: &[u8],
    sealed: &[u8],
    aad: &[u8],
) -> Result<Zeroizing<Vec<u8>>, SecretError> {
    let nonce = Nonce::<Aes256Gcm>::try_from(nonce).map_err(|_| SecretError::Format)?;
    cipher
        .decrypt(&nonce, Payload { msg: sealed, aad })
        .map(Zeroizing::new)
        .map_err(|_| SecretError::Corrupt)
}

/// The key id, and the key unless it is gone.
fn parse_entry(entry: usize, text: &str) -> Result<(String, Option<Key>), KeyError> {
    let (kid, encoded) = text.split_once(':').ok_or(KeyError::Shape { entry })?;
    if !is_kid(kid) {
        return Err(KeyError::Kid { entry });
    }
    if encoded.trim() == LOST {
        return Ok((kid.to_owned(), None));
    }
    let bytes = BASE64
        .decode(encoded.trim())
        .map(Zeroizing::new)
        .map_err(|_| KeyError::Base64 {
            entry,
            kid: kid.to_owned(),
        })?;
    let cipher = Aes256Gcm::new_from_slice(&bytes).map_err(|_| KeyError::Length {
        entry,
        kid: kid.to_owned(),
        bytes: bytes.len(),
    })?;
    let key = Key {
        kid: kid.to_owned(),
        cipher: Box::new(cipher),
    };
    Ok((kid.to_owned(), Some(key)))
}

fn split(sealed: &str) -> Result<(&str, &str), SecretError> {
    if sealed.len() > MAX_SEALED {
        return Err(SecretError::Format);
    }
    let mut parts = sealed.splitn(3, ':');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(VERSION), Some(kid), Some(body)) if is_kid(kid) => Ok((kid, body)),
        _ => Err(SecretError::Format),
    }
}

#[cfg(test)]
mod tests;
