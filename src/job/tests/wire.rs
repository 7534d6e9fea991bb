use std::io::Write;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde_json::json;

use super::{minimal, with};
use crate::config::JobLimits;
use crate::job::decode::{Incoming, RejectReason, decode, inflate};

fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

fn zlib(body: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

fn reason(incoming: &Incoming<'_>) -> RejectReason {
    decode(incoming, &JobLimits::default()).unwrap_err().reason
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn producers_as_they_are_get_understood() {
    let plain = minimal().to_string().into_bytes();
    let (gz, z) = (gzip(&plain), zlib(&plain));
    let base = Incoming::default();
    let json = Some("application/json");
    for (name, incoming) in [
        ("pika", Incoming { body: &plain, ..base }),
        (
            "pika with a type",
            Incoming {
                body: &plain,
                message_type: Some("mail.job.v1"),
                ..base
            },
        ),
        (
            "kombu",
            Incoming {
                body: &plain,
                content_type: json,
                content_encoding: Some("utf-8"),
                ..base
            },
        ),
        (
            "kombu, compressed",
            Incoming {
                body: &z,
                content_type: json,
                content_encoding: Some("utf-8"),
                compression: Some("application/x-gzip"),
                ..base
            },
        ),
        (
            "gzip named as kombu does",
            Incoming {
                body: &gz,
                compression: Some("application/x-gzip"),
                ..base
            },
        ),
        (
            "gzip",
            Incoming {
                body: &gz,
                content_encoding: Some("gzip"),
                ..base
            },
        ),
        (
            "Spring",
            Incoming {
                body: &gz,
                content_encoding: Some("gzip:UTF-8"),
                ..base
            },
        ),
        (
            "Spring, newer",
            Incoming {
                body: &gz,
                content_encoding: Some("gzip, UTF-8"),
                ..base
            },
        ),
        (
            "binary",
            Incoming {
                body: &plain,
                content_encoding: Some("binary"),
                ..base
            },
        ),
        (
            "charset",
            Incoming {
                body: &plain,
                content_type: Some("application/json; charset=UTF-8"),
                ..base
            },
        ),
        (
            "suffix",
            Incoming {
                body: &plain,
                content_type: Some("application/vnd.acme.mail+json"),
                ..base
            },
        ),
        (
            "empty properties",
            Incoming {
                body: &plain,
                content_type: Some(""),
                content_encoding: Some(""),
                message_type: Some(""),
                ..base
            },
        ),
        (
            "contract",
            Incoming {
                body: &plain,
                contract: Some("1.0"),
                ..base
            },
        ),
        (
            "routing key",
            Incoming {
                body: &plain,
                key_tenant: Some("acme"),
                ..base
            },
        ),
    ] {
        let job = decode(&incoming, &JobLimits::default());
        assert!(job.is_ok(), "{name}: {job:?}");
        assert_eq!(
            &*inflate(&incoming, &JobLimits::default()).unwrap(),
            &plain[..],
            "{name}"
        );
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn what_is_not_v1_json_is_refused_by_its_properties() {
    let plain = minimal().to_string().into_bytes();
    let gz = gzip(&plain);
    let z = zlib(&plain);
    let base = Incoming {
        body: &plain,
        ..Incoming::default()
    };
    for (incoming, expected) in [
        (
            Incoming {
                message_type: Some("mail.job.v2"),
                ..base
            },
            RejectReason::WrongType,
        ),
        (
            Incoming {
                content_type: Some("text/plain"),
                ..base
            },
            RejectReason::WrongContentType,
        ),
        (
            Incoming {
                content_type: Some("application/json; charset=latin1"),
                ..base
            },
            RejectReason::WrongContentType,
        ),
        (
            Incoming {
                content_type: Some("application/x-python-serialize"),
                ..base
            },
            RejectReason::WrongContentType,
        ),
        (
            Incoming {
                content_encoding: Some("br"),
                ..base
            },
            RejectReason::BadEncoding,
        ),
        (
            Incoming {
                compression: Some("application/x-bz2"),
                ..base
            },
            RejectReason::BadEncoding,
        ),
        (
            Incoming {
                content_encoding: Some("gzip"),
                ..base
            },
            RejectReason::BadEncoding,
        ),
        (
            Incoming {
                compression: Some("application/x-gzip"),
                ..base
            },
            RejectReason::BadEncoding,
        ),
        (
            Incoming {
                body: &gz[..gz.len() - 1],
                content_encoding: Some("gzip"),
                ..base
            },
            RejectReason::BadEncoding,
        ),
        (
            Incoming {
                body: &z[..z.len() - 2],
                compression: Some("zlib"),
                ..base
            },
            RejectReason::BadEncoding,
        ),
        (
            Incoming {
                body: &[&z[..], b"x"].concat(),
                compression: Some("zlib"),
                ..base
            },
            RejectReason::BadEncoding,
        ),
        (
            Incoming {
                body: &[&gz[..], b"x"].concat(),
                content_encoding: Some("gzip"),
                ..base
            },
            RejectReason::BadEncoding,
        ),
        (
            Incoming {
                body: &gz,
                content_encoding: Some("gzip"),
                compression: Some("gzip"),
                ..base
            },
            RejectReason::BadEncoding,
        ),
        (Incoming { body: &gz, ..base }, RejectReason::NotUtf8),
        (
            Incoming {
                body: b"{\"id\":\"\xff\"}",
                ..base
            },
            RejectReason::NotUtf8,
        ),
        (
            Incoming {
                contract: Some("1.1"),
                ..base
            },
            RejectReason::ContractTooNew,
        ),
        (
            Incoming {
                contract: Some("2.0"),
                content_encoding: Some("zstd"),
                ..base
            },
            RejectReason::ContractTooNew,
        ),
        (
            Incoming {
                contract: Some("0.9"),
                ..base
            },
            RejectReason::Invalid,
        ),
        (
            Incoming {
                contract: Some("1.+1"),
                ..base
            },
            RejectReason::Invalid,
        ),
        (
            Incoming {
                contract: Some("one"),
                ..base
            },
            RejectReason::Invalid,
        ),
        (
            Incoming {
                key_tenant: Some("other"),
                ..base
            },
            RejectReason::TenantMismatch,
        ),
        (
            Incoming {
                key_tenant: Some("ACME"),
                ..base
            },
            RejectReason::TenantMismatch,
        ),
    ] {
        assert_eq!(reason(&incoming), expected, "{incoming:?}");
    }
}

#[test]
fn a_bomb_is_stopped_while_inflating() {
    let limits = JobLimits {
        max_inflated: 1 << 20,
        ..JobLimits::default()
    };
    let bomb = vec![b' '; 64 << 20];
    for (body, content_encoding, compression) in [
        (gzip(&bomb), Some("gzip"), None),
        (zlib(&bomb), None, Some("application/x-gzip")),
    ] {
        let incoming = Incoming {
            body: &body,
            content_encoding,
            compression,
            ..Incoming::default()
        };
        let rejection = inflate(&incoming, &limits).unwrap_err();
        assert_eq!(rejection.reason, RejectReason::TooLarge);
        assert!(rejection.to_string().contains("1048576"), "{rejection}");
    }
}

#[test]
fn sizes_are_refused_just_above_the_limit() {
    let body = minimal().to_string().into_bytes();
    let incoming = Incoming {
        body: &body,
        ..Incoming::default()
    };
    let exactly = JobLimits {
        max_bytes: body.len(),
        max_inflated: body.len(),
        ..JobLimits::default()
    };
    assert!(decode(&incoming, &exactly).is_ok());
    for limits in [
        JobLimits {
            max_bytes: body.len() - 1,
            ..exactly
        },
        JobLimits {
            max_inflated: body.len() - 1,
            ..exactly
        },
    ] {
        assert_eq!(
            decode(&incoming, &limits).unwrap_err().reason,
            RejectReason::TooLarge
        );
    }
}

#[test]
fn nesting_is_counted_from_the_document_itself() {
    let limits = JobLimits {
        max_depth: 4,
        ..JobLimits::default()
    };
    for (metadata, allowed) in [
        (json!({"a": {"b": 1}}), true),
        (json!({"a": {"b": {}}}), true),
        (json!({"a": {"b": {"c": []}}}), false),
    ] {
        let body = with(json!({"metadata": metadata})).to_string();
        let incoming = Incoming {
            body: body.as_bytes(),
            ..Incoming::default()
        };
        assert_eq!(decode(&incoming, &limits).is_ok(), allowed, "{body}");
    }
}

#[test]
fn tenant_and_id_are_read_even_when_the_rest_cannot_be() {
    let base = Incoming::default();
    let who = |incoming: &Incoming<'_>| {
        let rejection = decode(incoming, &JobLimits::default()).unwrap_err();
        (
            rejection.tenant.map(|tenant| tenant.to_string()),
            rejection.id.map(|id| id.to_string()),
        )
    };
    let known = |tenant: &str, id: &str| (Some(tenant.to_owned()), Some(id.to_owned()));
    let gz = gzip(br#"{"id":"7","tenant":"acme"}"#);
    for body in [
        &br#"{"id":"7","tenant":"acme"}"#[..],
        br#"{"tenant":"acme","id":"7","x"#,
        b"{\"tenant\":\"acme\",\"id\":\"7\",\"text\":\"\xff\"}",
        br#"{"tenant":"acme","id":"7","text":"\ud800"}"#,
        b"\xef\xbb\xbf{\"tenant\":\"acme\",\"id\":\"7\"}",
    ] {
        assert_eq!(
            who(&Incoming { body, ..base }),
            known("acme", "7"),
            "{}",
            String::from_utf8_lossy(body)
        );
    }
    let newer = Incoming {
        body: &gz,
        content_encoding: Some("gzip"),
        contract: Some("1.9"),
        ..base
    };
    assert_eq!(who(&newer), known("acme", "7"));
    let other = Incoming {
        body: br#"{"id":"7","tenant":"acme"}"#,
        message_type: Some("x"),
        ..base
    };
    assert_eq!(who(&other), known("acme", "7"));
    // Ambiguous or malformed ones are not taken.
    assert_eq!(
        who(&Incoming {
            body: br#"{"id":"7","tenant":"a","tenant":"b"}"#,
            ..base
        })
        .0,
        None
    );
    assert_eq!(
        who(&Incoming {
            body: br#"{"id":"7 8","tenant":"-"}"#,
            ..base
        }),
        (None, None)
    );
}

#[test]
fn the_tenant_of_the_routing_key_is_told() {
    let base = Incoming {
        key_tenant: Some("acme"),
        ..Incoming::default()
    };
    let told = |body: &[u8]| {
        decode(&Incoming { body, ..base }, &JobLimits::default())
            .unwrap_err()
            .tenant
            .unwrap()
    };
    assert_eq!(told(b"junk").as_str(), "acme");
    // Who may publish under `acme` only must not cause reports to anybody else.
    assert_eq!(told(br#"{"id":"7","tenant":"victim"}"#).as_str(), "acme");
    let body = minimal().to_string();
    let odd = Incoming {
        body: body.as_bytes(),
        key_tenant: Some("a.b"),
        ..base
    };
    let rejection = decode(&odd, &JobLimits::default()).unwrap_err();
    assert_eq!(
        (rejection.reason, rejection.tenant),
        (RejectReason::TenantMismatch, None)
    );
}
