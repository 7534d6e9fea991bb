use jiff::Timestamp;
use secrecy::ExposeSecret;
use serde_json::{Value, json};

use super::{read, read_value, with};
use crate::id::TenantId;
use crate::job::decode::{
    OverrideError, SealError, SealedBy, may_hold_other_secret, may_hold_secret, parse_override,
    seal_override, without_secrets,
};
use crate::job::{OverrideServer, SmtpOverride};

const JWE: &str = "eyJhbGciOiJkaXIifQ..aXY.Y2lwaGVy.dGFn";

fn seal(plain: &[u8]) -> String {
    let value: Value = serde_json::from_slice(plain).unwrap();
    assert!(value.is_object(), "{value}");
    format!("v1:k:{}", "QUJD")
}

#[test]
fn sealing_replaces_the_object_and_nothing_else() {
    let body =
        br#"{ "id":"1", "smtp_override" : {"password":"canary", "x":{"}":"{"}} , "text":"smtp_override" }"#;
    let sealed = seal_override(body, seal).unwrap();
    assert_eq!(
        std::str::from_utf8(&sealed).unwrap(),
        r#"{ "id":"1", "smtp_override" : "v1:k:QUJD" , "text":"smtp_override" }"#
    );
}

#[test]
fn sealing_finds_an_override_however_its_name_is_written() {
    let body = br#"{"\u0073mtp_override":{"password":"canary"},"smtp_override":{"password":"canary"}}"#;
    let sealed = seal_override(body, seal).unwrap();
    assert!(!String::from_utf8_lossy(&sealed).contains("canary"));
}

#[test]
fn a_body_without_a_plain_override_stays_as_it_is() {
    for body in [
        with(json!({})),
        with(json!({"smtp_override": null})),
        with(json!({"smtp_override": JWE})),
        with(json!({"metadata": {"smtp_override": {}}})),
    ] {
        let body = body.to_string();
        let sealed = seal_override(body.as_bytes(), |_| unreachable!()).unwrap();
        assert!(matches!(sealed, std::borrow::Cow::Borrowed(_)), "{body}");
    }
}

#[test]
fn a_body_that_is_no_object_cannot_be_sealed_in_part() {
    for body in [&b"[]"[..], b"{", b"\xff", br#"{"a":1}x"#] {
        assert_eq!(seal_override(body, seal), Err(SealError));
    }
}

#[test]
fn a_sealed_body_decodes_with_the_same_digest() {
    let body = with(json!({"smtp_override": {"host": "h.example", "username": "u", "password": "canary"}}))
        .to_string();
    let sealed = seal_override(body.as_bytes(), seal).unwrap();
    let (before, after) = (read(&body).unwrap(), read(&sealed).unwrap());
    assert_eq!(before.digest, after.digest);
    assert!(
        matches!(after.smtp_override, Some(SmtpOverride::Sealed(text)) if text.expose_secret() == "v1:k:QUJD")
    );
}

#[test]
fn a_password_is_not_in_the_debug_output() {
    let job = read_value(&with(
        json!({"smtp_override": {"host": "h.example", "username": "u", "password": "canary"}}),
    ));
    assert!(!format!("{job:?}").contains("canary"));
    let job = read_value(&with(json!({"smtp_override": JWE})));
    assert!(!format!("{:?}", job.unwrap()).contains("Y2lwaGVy"));
}

#[test]
fn bodies_that_may_hold_a_secret_are_noticed() {
    let utf16: Vec<u8> = "{\"password\":1}"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    for body in [
        &br#"{"smtp_overide":{"x":"canary"}"#[..],
        br#"{"x":{"PassWord":"#,
        br#"{"smtpOverride":"#,
        br#"{"pass\u0077ord":"#,
        b"\x1f\x8b\x08broken",
        b"\x78\x9cbroken",
        &utf16,
    ] {
        assert!(may_hold_secret(body), "{}", String::from_utf8_lossy(body));
    }
    for body in [
        &br#"{"id":"1","text":"Gr\u00fc\u00dfe \u003cb\u003e","subject":"past, sent, pass"}"#[..],
        b"",
        b"\\",
        b"s",
        b"\xff\xfe",
    ] {
        assert!(!may_hold_secret(body), "{}", String::from_utf8_lossy(body));
    }
}

#[test]
fn a_body_is_shown_without_its_secrets() {
    let shown = |body: &[u8]| without_secrets(body).to_string();
    for (body, expected) in [
        (
            r#"{"id":"1","smtp_override":{"host":"h","pass":"canary"}}"#,
            r#"{"id":"1","smtp_override":"(hidden)"}"#,
        ),
        (r#"{"smtp_override":"canary"}"#, r#"{"smtp_override":"(hidden)"}"#),
        (r#"{"smtp_overide":["canary"]}"#, r#"{"smtp_overide":"(hidden)"}"#),
        (
            r#"{"data":[{"x":{"PassWord":"canary","n":1}}]}"#,
            r#"{"data":[{"x":{"PassWord":"(hidden)","n":1}}]}"#,
        ),
        (r#"{"pass\u0077ord":"canary"}"#, r#"{"password":"(hidden)"}"#),
        (
            r#"{"api_token":7,"client-secret":{"a":1}}"#,
            r#"{"api_token":"(hidden)","client-secret":"(hidden)"}"#,
        ),
        (
            r#"{"smtp_override":null,"text":"your password"}"#,
            r#"{"smtp_override":null,"text":"your password"}"#,
        ),
        ("no job", r#""no job""#),
        ("7", r#""7""#),
    ] {
        assert_eq!(shown(body.as_bytes()), expected);
    }
    let sealed = format!(r#"{{"smtp_override":"{JWE}"}}"#);
    assert_eq!(shown(sealed.as_bytes()), sealed);

    let deep = format!("{}{{\"password\":1}}", r#"{"a":"#.repeat(200));
    let utf16: Vec<u8> = r#"{"password":1}"#.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for body in [
        &br#"{"smtp_override":{"password":"canary""#[..],
        br#""{\"password\":\"canary\"}""#,
        b"\x1f\x8b\x08\x00",
        b"\x28\xb5\x2f\xfd",
        deep.as_bytes(),
        &utf16,
    ] {
        let expected = format!("(hidden: {} bytes that may hold a secret)", body.len());
        assert_eq!(without_secrets(body), Value::from(expected));
    }
}

fn open(payload: &Value, sealed_by: SealedBy) -> Result<OverrideServer, OverrideError> {
    let tenant: TenantId = "acme".parse().unwrap();
    let now: Timestamp = "2026-11-21T09:30:00Z".parse().unwrap();
    parse_override(payload.to_string().as_bytes(), &tenant, now, sealed_by)
}

fn payload(changes: &Value) -> Value {
    let mut payload = json!({
        "tenant": "acme", "expires_at": "2026-11-21T09:30:01Z",
        "host": "smtp.own.example", "port": 2525, "tls": "none", "allow_plaintext_auth": true,
        "username": "u", "password": "canary",
    });
    for (name, value) in changes.as_object().unwrap() {
        payload[name] = value.clone();
    }
    payload
}

#[test]
fn a_producers_payload_names_tenant_and_expiry() {
    let server = open(&payload(&json!({})), SealedBy::Jwe).unwrap();
    assert_eq!((server.host.as_str(), server.port), ("smtp.own.example", 2525));
    assert_eq!(server.credentials.unwrap().1.expose_secret(), "canary");
    // 1_795_253_401 is 2026-11-21T09:30:01Z.
    for (changes, expected) in [
        (json!({"tenant": "other"}), Err("override_other_tenant")),
        (json!({"tenant": null}), Err("override_invalid")),
        (
            json!({"expires_at": "2026-11-21T09:30:00Z"}),
            Err("override_expired"),
        ),
        (json!({"expires_at": null}), Err("override_invalid")),
        (json!({"expires_at": "soon"}), Err("override_invalid")),
        (json!({"expires_at": null, "exp": 1_795_253_401}), Ok(())),
        (json!({"expires_at": null, "exp": 1_795_253_401.5}), Ok(())),
        (
            json!({"expires_at": null, "exp": 1_795_253_400}),
            Err("override_expired"),
        ),
        (
            json!({"expires_at": null, "exp": "1795253401"}),
            Err("override_invalid"),
        ),
        (json!({"exp": 1}), Err("override_expired")),
        (json!({"passwrod": "canary"}), Err("override_invalid")),
        (json!({"host": "canary host"}), Err("override_invalid")),
    ] {
        let result = open(&payload(&changes), SealedBy::Jwe);
        assert!(!format!("{result:?}").contains("canary"), "{result:?}");
        assert_eq!(result.map(|_| ()).map_err(|e| e.reason()), expected, "{changes}");
    }
}

#[test]
fn what_we_sealed_ourselves_has_only_the_fields_of_the_job() {
    let plain = json!({"host": "smtp.own.example"});
    assert_eq!(open(&plain, SealedBy::Us).unwrap().port, 587);
    assert!(open(&payload(&json!({})), SealedBy::Us).is_err());
}

#[test]
fn a_payload_that_is_no_object_is_refused() {
    let tenant: TenantId = "acme".parse().unwrap();
    for bytes in [
        &b"canary"[..],
        b"\xff",
        b"[\"canary\"]",
        br#"{"host":"canary","host":"canary"}"#,
        b"\"canary\"",
    ] {
        let error = parse_override(bytes, &tenant, Timestamp::UNIX_EPOCH, SealedBy::Us).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("canary"), "{error}");
    }
}

#[test]
fn beside_a_sealed_override_a_secret_is_still_found() {
    let clean = br#"{"id":"1","tenant":"acme","smtp_override":"v1:k:QUJD","subjekt":"x"}"#;
    assert!(!may_hold_other_secret(clean));
    for other in [
        r#""passphrase":"x""#,
        r#""credentials":{"u":"x"}"#,
        r#""Password":"x""#,
        r#""token":"x""#,
        r#""smtp_overide":{}"#,
        r#""smtpOverride":{}"#,
        r#""p\u0061ssword":"x""#,
    ] {
        let body = format!(r#"{{"smtp_override":"v1:k:QUJD",{other}}}"#);
        assert!(may_hold_other_secret(body.as_bytes()), "{other}");
    }
}
