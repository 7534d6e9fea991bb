use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use proptest::prelude::*;

use super::*;

const KEYS: &str = "o1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
/// Made by Python's `joserfc` with that key.
const JOSERFC: &str = "eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIiwia2lkIjoibzEifQ..5NDpDur42airnm3j.tg4Adbq2i5xYZ7AO73JTIvkig7sGAtizeia5QLyRiqSHBANwTeK8K8Y7mHaibqJWZXJgDCLZcej-IfgGWmgbq6bZGbD29oO-YsjV62M0cTu_-bnlijg6TQ4GcWofNHs9fXpnna8HN8PJkG-kZ2pJInbe_HSjAo6k9OXAJrwJtgfYTE-0Cfg.VpFBYTaqZgAtyBG9VOflAg";
const PAYLOAD: &str = r#"{"tenant":"acme","exp":4102444800,"host":"smtp.acme.example","port":587,"tls":"starttls","username":"u","password":"canary-pässword"}"#;

fn keys() -> Keyring {
    Keyring::parse(&KEYS.into()).unwrap()
}

/// A token built by hand from RFC 7516 §5.1.
fn token(header: &str, payload: &[u8]) -> String {
    let header = URL_SAFE_NO_PAD.encode(header);
    let key: Vec<u8> = (0..32).collect();
    let iv = [9_u8; 12];
    let sealed = Aes256Gcm::new_from_slice(&key)
        .unwrap()
        .encrypt(
            &iv.into(),
            Payload {
                msg: payload,
                aad: header.as_bytes(),
            },
        )
        .unwrap();
    let (sealed, tag) = sealed.split_at(sealed.len() - 16);
    let parts = [&iv[..], sealed, tag].map(|part| URL_SAFE_NO_PAD.encode(part));
    format!("{header}..{}", parts.join("."))
}

#[test]
fn a_token_of_another_library_opens() {
    let opened = open(&keys(), JOSERFC).unwrap();
    assert_eq!(str::from_utf8(&opened).unwrap(), PAYLOAD);
}

#[test]
fn a_token_built_by_hand_opens_whatever_harmless_parameters_it_has() {
    for header in [
        r#"{"alg":"dir","enc":"A256GCM","kid":"o1"}"#,
        r#"{"kid":"o1","typ":"JWE","cty":"json","enc":"A256GCM","alg":"dir","iat":1}"#,
        r#"{"alg":"d\u0069r","enc":"A256GCM","kid":"o1"}"#,
    ] {
        assert_eq!(
            open(&keys(), &token(header, b"{}")).unwrap().as_slice(),
            b"{}",
            "{header}"
        );
    }
}

#[test]
fn a_header_that_asks_for_anything_else_is_refused() {
    for header in [
        r#"{"alg":"A256KW","enc":"A256GCM","kid":"o1"}"#,
        r#"{"alg":"none","enc":"A256GCM","kid":"o1"}"#,
        r#"{"alg":"dir","enc":"A128GCM","kid":"o1"}"#,
        r#"{"alg":"dir","enc":"A256CBC-HS512","kid":"o1"}"#,
        r#"{"alg":"dir","enc":"A256GCM"}"#,
        r#"{"alg":"dir","enc":"A256GCM","kid":7}"#,
        r#"{"alg":"dir","enc":"A256GCM","kid":""}"#,
        r#"{"alg":"dir","enc":"A256GCM","kid":"o1","zip":"DEF"}"#,
        r#"{"alg":"dir","enc":"A256GCM","kid":"o1","crit":["exp"],"exp":1}"#,
        r#"{"alg":"dir","enc":"A256GCM","kid":"o1","kid":"o2"}"#,
        r#"{"alg":"dir","enc":"A256GCM","kid":"o1","crit":null}"#,
        r#"["dir","A256GCM","o1"]"#,
        "dir",
        "",
    ] {
        let result = open(&keys(), &token(header, b"{}"));
        assert!(matches!(result, Err(JweError::Header(_))), "{header}: {result:?}");
    }
}

#[test]
fn an_unknown_key_is_named() {
    let token = token(r#"{"alg":"dir","enc":"A256GCM","kid":"o2"}"#, b"{}");
    assert_eq!(
        open(&keys(), &token).unwrap_err(),
        JweError::UnknownKey { kid: "o2".to_owned() }
    );
}

#[test]
fn every_changed_character_is_noticed() {
    for position in 0..JOSERFC.len() {
        let mut changed = JOSERFC.as_bytes().to_vec();
        changed[position] = if changed[position] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).unwrap();
        assert!(open(&keys(), &changed).is_err(), "position {position}");
    }
}

#[test]
fn the_shape_is_strict() {
    let parts: Vec<_> = JOSERFC.split('.').collect();
    let [header, _, iv, sealed, tag] = parts[..] else {
        panic!("five parts")
    };
    for token in [
        String::new(),
        "....".to_owned(),
        format!("{header}.AAAA.{iv}.{sealed}.{tag}"),
        format!("{header}..{iv}.{sealed}"),
        format!("{header}..{iv}.{sealed}.{tag}."),
        format!("{header}..{iv}AAAA.{sealed}.{tag}"),
        format!("{header}..{iv}.{sealed}.{}", &tag[..20]),
        format!("{header}..{iv}.{sealed}.{tag}=="),
        format!(" {JOSERFC}"),
    ] {
        assert!(
            matches!(open(&keys(), &token), Err(JweError::Shape | JweError::Header(_))),
            "{token}"
        );
    }
}

#[test]
fn a_long_token_is_refused_unread() {
    assert_eq!(
        open(&keys(), &"A".repeat(MAX_TOKEN + 1)).unwrap_err(),
        JweError::TooLong
    );
}

proptest! {
    #[test]
    fn foreign_text_never_panics(text in "\\PC{0,80}", parts in "[A-Za-z0-9_.-]{0,120}") {
        prop_assert!(open(&keys(), &text).is_err());
        prop_assert!(open(&keys(), &parts).is_err());
    }
}
