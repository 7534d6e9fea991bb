//! What is sealed: by producers, by us, and the keys themselves.

use secrecy::{ExposeSecret as _, SecretString};

use super::{Input, is_one_line};
use crate::job::decode::{SealedBy, parse_override};
use crate::secret::{Keyring, jwe};

/// Of the test's only key: 32 bytes of `k`. The corpus holds values sealed with it.
const RING: &str = "fuzz:a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=";
/// What those values hold.
const PLAIN: &str = "Kanarienvogel";
const AAD: &str = "account:acme/main:password";

/// Sealed values, JWE and key rings: only what was sealed opens, only in its place, and no error tells more than a key id.
/// Fields: token, keys, opened override.
pub fn secrets(data: &[u8]) {
    let mut input = Input::new(data);
    let (token, keys, payload) = (input.text(), input.text(), input.bytes());
    let ring = Keyring::parse(&SecretString::from(RING)).expect("a key ring");
    match jwe::open(&ring, &token) {
        Ok(opened) => assert_eq!(&opened[..], PLAIN.as_bytes()),
        Err(error) => check_text(&error.to_string()),
    }
    match ring.open(&token, AAD) {
        Ok(opened) => {
            assert_eq!(opened.expose_secret(), PLAIN);
            assert!(ring.open(&token, "account:acme/other:password").is_err());
            assert!(ring.reseal(&token, AAD).is_ok());
        }
        Err(error) => check_text(&error.to_string()),
    }
    if let Err(error) = Keyring::parse(&SecretString::from(keys.into_owned())) {
        check_text(&error.to_string());
    }
    let tenant = "acme".parse().expect("a tenant");
    for by in [SealedBy::Jwe, SealedBy::Us] {
        if let Err(error) = parse_override(payload, &tenant, jiff::Timestamp::UNIX_EPOCH, by) {
            assert!(is_one_line(&error.to_string()));
        }
    }
}

fn check_text(text: &str) {
    assert!(text.len() <= 300 && is_one_line(text), "{text:?}");
}
