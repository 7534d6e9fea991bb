use proptest::prelude::*;

use super::*;

/// Bytes 0 to 31.
const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
const OTHER: &str = "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=";
const AAD: &str = "account:acme/main:password";
/// `hunter2` sealed with [`KEY`] for [`AAD`] by Python's `cryptography`, nonce 100 to 111.
const VECTOR: &str = "v1:k1:ZGVmZ2hpamtsbW5vIG6wEhybZBqhWMUWssus744EkNDsvQM=";

fn ring(text: &str) -> Keyring {
    Keyring::parse(&text.into()).unwrap()
}

fn refused(text: &str) -> KeyError {
    Keyring::parse(&text.into()).unwrap_err()
}

#[test]
fn a_value_sealed_by_another_implementation_opens() {
    let opened = ring(&format!("k1:{KEY}")).open(VECTOR, AAD).unwrap();
    assert_eq!(opened.expose_secret(), "hunter2");
}

#[test]
fn a_value_opens_only_where_it_belongs() {
    let ring = ring(&format!("k1:{KEY}"));
    assert_eq!(
        ring.open(VECTOR, "account:evil/main:password").unwrap_err(),
        SecretError::Corrupt
    );
}

#[test]
fn the_wrong_key_under_the_right_id_is_noticed() {
    assert_eq!(
        ring(&format!("k1:{OTHER}")).open(VECTOR, AAD).unwrap_err(),
        SecretError::Corrupt
    );
}

#[test]
fn an_unknown_key_is_named() {
    let error = ring(&format!("k2:{OTHER}")).open(VECTOR, AAD).unwrap_err();
    assert_eq!(error, SecretError::UnknownKey { kid: "k1".to_owned() });
}

#[test]
fn a_lost_key_is_known_by_its_name_only() {
    let ring = ring(&format!("k2:{OTHER}, k1:lost"));
    assert!(ring.has_lost("k1") && !ring.knows("k1"));
    assert!(ring.knows("k2") && !ring.has_lost("k2"));
    let error = ring.open(VECTOR, AAD).unwrap_err();
    assert_eq!(error, SecretError::UnknownKey { kid: "k1".to_owned() });
}

#[test]
fn a_lost_key_cannot_seal_nor_be_there_as_well() {
    let kid = "k1".to_owned();
    assert_eq!(
        refused(&format!("k1:lost,k2:{OTHER}")),
        KeyError::ActiveLost { kid: kid.clone() }
    );
    let duplicate = KeyError::Duplicate { entry: 3, kid };
    assert_eq!(refused(&format!("k2:{OTHER},k1:{KEY},k1:lost")), duplicate);
}

#[test]
fn every_changed_character_is_noticed() {
    let ring = ring(&format!("k1:{KEY}"));
    for position in 6..VECTOR.len() - 1 {
        let mut changed = VECTOR.as_bytes().to_vec();
        changed[position] = if changed[position] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).unwrap();
        assert!(ring.open(&changed, AAD).is_err(), "position {position}");
    }
}

#[test]
fn what_is_no_sealed_value_is_called_so() {
    let ring = ring(&format!("k1:{KEY}"));
    for text in [
        "",
        "v1",
        "v1:k1",
        "v2:k1:AAAA",
        "v1::AAAA",
        "v1:k1:",
        "v1:k1:AAAA",
        "v1:k1:!!",
        "plain password",
    ] {
        assert_eq!(ring.open(text, AAD).unwrap_err(), SecretError::Format, "{text}");
    }
    assert_eq!(
        ring.open(&format!("v1:k1:{}", "A".repeat(70_000)), AAD)
            .unwrap_err(),
        SecretError::Format
    );
}

#[test]
fn the_first_key_seals_and_all_open() {
    let old = ring(&format!("k1:{KEY}"));
    let both = ring(&format!("k2:{OTHER}, k1:{KEY}\n"));
    let sealed = old.seal(b"x", AAD);
    assert_eq!(both.active(), "k2");
    assert!(both.needs_rotation(&sealed).unwrap());
    let resealed = both.reseal(&sealed, AAD).unwrap();
    assert!(resealed.starts_with("v1:k2:"));
    assert!(!both.needs_rotation(&resealed).unwrap());
    assert_eq!(
        ring(&format!("k2:{OTHER}"))
            .open(&resealed, AAD)
            .unwrap()
            .expose_secret(),
        "x"
    );
}

#[test]
fn sealing_twice_gives_different_values() {
    let ring = ring(&format!("k1:{KEY}"));
    assert_ne!(ring.seal(b"x", AAD), ring.seal(b"x", AAD));
}

#[test]
fn a_key_text_is_refused_with_the_entry_and_the_rule() {
    let short = STANDARD.encode([7_u8; 16]);
    let cases = [
        (String::new(), KeyError::Empty),
        (" \n".to_owned(), KeyError::Empty),
        (KEY.to_owned(), KeyError::Shape { entry: 1 }),
        (format!("k1:{KEY},"), KeyError::Shape { entry: 2 }),
        (format!("k 1:{KEY}"), KeyError::Kid { entry: 1 }),
        (format!(":{KEY}"), KeyError::Kid { entry: 1 }),
        (
            format!("k1:{KEY},k2:%%"),
            KeyError::Base64 {
                entry: 2,
                kid: "k2".to_owned(),
            },
        ),
        (
            format!("k1:{short}"),
            KeyError::Length {
                entry: 1,
                kid: "k1".to_owned(),
                bytes: 16,
            },
        ),
        (
            format!("k1:{KEY},k1:{OTHER}"),
            KeyError::Duplicate {
                entry: 2,
                kid: "k1".to_owned(),
            },
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(refused(&text), expected);
    }
}

#[test]
fn too_many_keys_are_refused() {
    let text: Vec<_> = (0..=MAX_KEYS).map(|n| format!("k{n}:{KEY}")).collect();
    assert_eq!(refused(&text.join(",")), KeyError::TooMany);
}

#[test]
fn errors_and_debug_never_show_a_key() {
    let canary = "c2VjcmV0LWNhbmFyeQ==";
    for text in [
        canary.to_owned(),
        format!("k:{canary}"),
        format!("k1:{KEY},{canary}"),
        format!("a b:{canary}"),
    ] {
        let error = refused(&text);
        assert!(!format!("{error} {error:?}").contains("c2VjcmV0"), "{error}");
    }
    let shown = format!("{:?}", ring(&format!("k1:{KEY}")));
    assert_eq!(shown, r#"["k1"]"#);
}

#[test]
fn a_generated_entry_is_a_key_ring() {
    let first = Keyring::generate_entry("k1").unwrap();
    let second = Keyring::generate_entry("k1").unwrap();
    assert_ne!(first.expose_secret(), second.expose_secret());
    assert_eq!(Keyring::parse(&first).unwrap().active(), "k1");
    assert_eq!(
        Keyring::generate_entry("a:b").unwrap_err(),
        KeyError::Kid { entry: 1 }
    );
}

#[test]
fn padding_may_be_missing() {
    assert!(Keyring::parse(&format!("k1:{}", KEY.trim_end_matches('=')).into()).is_ok());
}

proptest! {
    #[test]
    fn what_was_sealed_opens(plain in ".{0,200}", aad in ".{0,100}") {
        let ring = ring(&format!("k1:{KEY}"));
        let sealed = ring.seal(plain.as_bytes(), &aad);
        prop_assert_eq!(ring.open(&sealed, &aad).unwrap().expose_secret().to_owned(), plain);
    }

    #[test]
    fn foreign_text_never_panics(text in "\\PC{0,80}") {
        let _ = Keyring::parse(&text.as_str().into());
        let _ = ring(&format!("k1:{KEY}")).open(&text, AAD);
    }
}
