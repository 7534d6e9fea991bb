use serde_json::{Value, json};

use super::{read, read_value, with};
use crate::job::decode::RejectReason;
use crate::job::headers::{RESERVED, RESERVED_PREFIXES};

/// A change to the smallest valid job, the pointer of its only error, and a part of the message.
/// The schema refuses these too.
#[expect(clippy::too_many_lines, reason = "a table")]
pub(super) fn invalid() -> Vec<(Value, &'static str, &'static str)> {
    let server = |changes: Value| {
        let mut server = json!({"host": "smtp.example.org", "username": "u", "password": "canary"});
        for (name, value) in changes.as_object().unwrap() {
            server[name] = value.clone();
        }
        json!({"smtp_override": server})
    };
    let file = |changes: Value| {
        let mut file = json!({"filename": "f.txt", "base64": "aGk="});
        for (name, value) in changes.as_object().unwrap() {
            file[name] = value.clone();
        }
        json!({"attachments": [file]})
    };
    let mut table = vec![
        (json!({"id": null}), "/id", "is required: 1 to 128 printable"),
        (json!({"id": 1}), "/id", "must be a string, not a number"),
        (json!({"id": ""}), "/id", "1 to 128 printable"),
        (json!({"id": "a b"}), "/id", "1 to 128 printable"),
        (json!({"id": "x".repeat(129)}), "/id", "1 to 128 printable"),
        (json!({"tenant": null}), "/tenant", "is required"),
        (
            json!({"tenant": "-"}),
            "/tenant",
            "beginning with a letter or digit",
        ),
        (
            json!({"tenant": "a.b"}),
            "/tenant",
            "beginning with a letter or digit",
        ),
        (json!({"account": "a b"}), "/account", "1 to 64 characters"),
        (
            json!({"account": true}),
            "/account",
            "must be a string, not a boolean",
        ),
        (
            json!({"from": ["a@b.example"]}),
            "/from",
            "one address, not a list",
        ),
        (json!({"from": 7}), "/from", "must be an address"),
        (json!({"to": "ann"}), "/to", "must be an address"),
        (
            json!({"to": ["a@b.example", "ann"]}),
            "/to/1",
            "must be an address",
        ),
        (json!({"to": [null]}), "/to/0", "must be an address"),
        (json!({"to": [["a@b.example"]]}), "/to/0", "not a list"),
        (json!({"to": {"name": "Ann"}}), "/to/address", "is required"),
        (
            json!({"to": {"address": "ann"}}),
            "/to/address",
            "must be an address",
        ),
        (
            json!({"to": {"address": "a@b.example", "nane": "x"}}),
            "/to/nane",
            "did you mean `name`?",
        ),
        (
            json!({"to": {"address": "a@b.example", "name": "a\r\nBcc: x"}}),
            "/to/name",
            "line breaks",
        ),
        (
            json!({"to": {"address": "a@b.example", "name": "x".repeat(257)}}),
            "/to/name",
            "at most 256",
        ),
        (json!({"to": "a\n <a@b.example>"}), "/to", "line breaks"),
        (json!({"to": []}), "", "needs a recipient"),
        (json!({"to": null}), "", "needs a recipient"),
        (
            json!({"to": vec!["a@b.example"; 101]}),
            "/to",
            "holds 101 addresses; at most 100",
        ),
        (
            json!({"reply_to": vec!["a@b.example"; 11]}),
            "/reply_to",
            "at most 10",
        ),
        (json!({"text": null}), "", "needs a body"),
        (json!({"text": 1}), "/text", "must be a string, not a number"),
        (json!({"text": "a\u{0}"}), "/text", "must not contain NUL"),
        (json!({"html": ""}), "/html", "must not be empty"),
        (
            json!({"subject": "a\r\nBcc: x@y.example"}),
            "/subject",
            "line breaks",
        ),
        (json!({"subject": "x".repeat(999)}), "/subject", "at most 998"),
        (json!({"headers": ["X-A: 1"]}), "/headers", "must be an object"),
        (json!({"headers": {"X-A": 1}}), "/headers/X-A", "must be a string"),
        (
            json!({"headers": {"X-A": "1\nX-B: 2"}}),
            "/headers/X-A",
            "line breaks",
        ),
        (
            json!({"headers": {"X A": "1"}}),
            "/headers/X A",
            "printable ASCII",
        ),
        (
            json!({"headers": {"X-A:": "1"}}),
            "/headers/X-A:",
            "printable ASCII",
        ),
        (json!({"headers": {"": "1"}}), "/headers/", "1 to 76"),
        (
            json!({"headers": {"X-\r\nBcc": "1"}}),
            "/headers/X-\u{fffd}\u{fffd}Bcc",
            "printable ASCII",
        ),
        (
            json!({"headers": {"X-A": "x".repeat(4097)}}),
            "/headers/X-A",
            "at most 4096",
        ),
        (json!({"locale": "german, please"}), "/locale", "language tag"),
        (
            json!({"list_unsubscribe": {}}),
            "/list_unsubscribe",
            "needs `url`",
        ),
        (
            json!({"list_unsubscribe": "https://x.example"}),
            "/list_unsubscribe",
            "must be an object",
        ),
        (
            json!({"list_unsubscribe": {"url": "http://x.example"}}),
            "/list_unsubscribe/url",
            "https URL",
        ),
        (
            json!({"list_unsubscribe": {"url": "https://u:p@x.example"}}),
            "/list_unsubscribe/url",
            "https URL",
        ),
        (
            json!({"list_unsubscribe": {"uri": "https://x.example", "mailto": "a@b.example"}}),
            "/list_unsubscribe/uri",
            "did you mean `url`?",
        ),
        (json!({"attachments": {}}), "/attachments", "must be a list"),
        (
            json!({"attachments": ["x"]}),
            "/attachments/0",
            "must be an object",
        ),
        (
            file(json!({"filename": null})),
            "/attachments/0/filename",
            "is required",
        ),
        (
            file(json!({"filename": "../x"})),
            "/attachments/0/filename",
            "without path",
        ),
        (
            file(json!({"filename": "a\\b"})),
            "/attachments/0/filename",
            "without path",
        ),
        (
            file(json!({"filename": "a\r\nb"})),
            "/attachments/0/filename",
            "control characters",
        ),
        (
            file(json!({"filename": ""})),
            "/attachments/0/filename",
            "1 to 255",
        ),
        (
            file(json!({"content_type": "pdf"})),
            "/attachments/0/content_type",
            "media type",
        ),
        (
            file(json!({"content_type": "a/b\r\nX: y"})),
            "/attachments/0/content_type",
            "media type",
        ),
        (
            file(json!({"content_type": "a/b; c"})),
            "/attachments/0/content_type",
            "media type",
        ),
        (
            file(json!({"content_type": "Multipart/mixed"})),
            "/attachments/0/content_type",
            "multipart",
        ),
        (
            file(json!({"inline": "yes"})),
            "/attachments/0/inline",
            "true or false",
        ),
        (
            file(json!({"content_id": "<a@b>"})),
            "/attachments/0/content_id",
            "without angle brackets",
        ),
        (
            file(json!({"inline": true, "content_id": "a"})),
            "/attachments/0/inline",
            "needs an `html` body",
        ),
        (
            file(json!({"sha256": "ab"})),
            "/attachments/0/sha256",
            "64 hexadecimal digits",
        ),
        (
            file(json!({"base64": "aGk*"})),
            "/attachments/0/base64",
            "standard alphabet",
        ),
        (
            file(json!({"base64": "a-_="})),
            "/attachments/0/base64",
            "URL-safe",
        ),
        (
            file(json!({"base64": "data:text/plain;base64,aGk="})),
            "/attachments/0/base64",
            "leave out",
        ),
        (
            file(json!({"base64": null})),
            "/attachments/0",
            "one of `base64` and `url`",
        ),
        (
            file(json!({"url": "https://x.example/f"})),
            "/attachments/0",
            "give one",
        ),
        (
            file(json!({"base64": null, "url": "ftp://x.example/f"})),
            "/attachments/0/url",
            "http or https",
        ),
        (
            file(json!({"base64": null, "url": "https://u:canary@x.example/f"})),
            "/attachments/0/url",
            "http or https",
        ),
        (
            file(json!({"base64": null, "url": "https://x.example/f\ng"})),
            "/attachments/0/url",
            "http or https",
        ),
        (
            file(json!({"base64": null, "url": "/f"})),
            "/attachments/0/url",
            "http or https",
        ),
        (
            file(json!({"file": "x"})),
            "/attachments/0/file",
            "unknown field `file`",
        ),
        (
            file(json!({"file_name": "x"})),
            "/attachments/0/file_name",
            "did you mean `filename`?",
        ),
        (json!({"send_at": "tomorrow"}), "/send_at", "RFC 3339"),
        (json!({"send_at": 1_763_717_400}), "/send_at", "must be a string"),
        (
            json!({"expires_at": "1999-12-31T23:59:59Z"}),
            "/expires_at",
            "years 2000 to 9999",
        ),
        (
            json!({"expires_at": "2026-11-21T09:30:00"}),
            "/expires_at",
            "with offset",
        ),
        (json!({"batch": ""}), "/batch", "1 to 128"),
        (json!({"batch": "a\tb"}), "/batch", "control characters"),
        (json!({"tags": "x"}), "/tags", "list of strings"),
        (json!({"tags": vec!["x"; 17]}), "/tags", "at most 16"),
        (json!({"tags": ["x", "y".repeat(65)]}), "/tags/1", "1 to 64"),
        (json!({"metadata": [1]}), "/metadata", "must be an object"),
        (
            json!({"fallback": "always"}),
            "/fallback",
            "`never` or `platform`, not `always`",
        ),
        (json!({"on_uncertain": true}), "/on_uncertain", "must be a string"),
        (
            json!({"smtp_override": "canary"}),
            "/smtp_override",
            "compact JWE",
        ),
        (json!({"smtp_override": "v1:k:"}), "/smtp_override", "compact JWE"),
        (
            json!({"smtp_override": ["canary"]}),
            "/smtp_override",
            "must be an object or a sealed string",
        ),
        (
            server(json!({"host": null})),
            "/smtp_override/host",
            "is required",
        ),
        (
            server(json!({"host": "canary.example:25"})),
            "/smtp_override/host",
            "without port",
        ),
        (
            server(json!({"host": "canary\r\n"})),
            "/smtp_override/host",
            "without port",
        ),
        (server(json!({"port": 0})), "/smtp_override/port", "1 to 65535"),
        (
            server(json!({"port": "587"})),
            "/smtp_override/port",
            "1 to 65535",
        ),
        (
            server(json!({"tls": "canary"})),
            "/smtp_override/tls",
            "`starttls`",
        ),
        (
            server(json!({"username": null})),
            "/smtp_override",
            "together, or neither",
        ),
        (
            server(json!({"password": "canary\n"})),
            "/smtp_override/password",
            "without NUL and line breaks",
        ),
        (
            server(json!({"tls": "none"})),
            "/smtp_override/allow_plaintext_auth",
            "must be true",
        ),
        (
            server(json!({"passwrod": "canary"})),
            "/smtp_override/passwrod",
            "did you mean `password`?",
        ),
        (
            json!({"subjcet": "x"}),
            "/subjcet",
            "unknown field `subjcet`; did you mean `subject`?",
        ),
        (
            json!({"attachment": []}),
            "/attachment",
            "did you mean `attachments`?",
        ),
        (json!({"raw": "x"}), "/raw", "unknown field `raw`"),
        (json!({"a/b": "x"}), "/a~1b", "unknown field"),
    ];
    table.push((
        json!({"headers": (0..65).map(|n| (format!("X-{n}"), json!("x"))).collect::<serde_json::Map<_, _>>()}),
        "/headers",
        "at most 64",
    ));
    table.push((
        json!({"attachments": vec![json!({"filename": "f", "base64": ""}); 51]}),
        "/attachments",
        "at most 50",
    ));
    for (name, _) in RESERVED {
        for spelling in [(*name).to_owned(), name.to_lowercase(), name.to_uppercase()] {
            let pointer = format!("/headers/{spelling}").leak();
            table.push((
                json!({"headers": {spelling: "x"}}),
                pointer,
                "is not allowed in `headers`",
            ));
        }
    }
    for prefix in RESERVED_PREFIXES {
        let name = format!("{}anything", prefix.to_lowercase());
        let pointer = format!("/headers/{name}").leak();
        table.push((
            json!({"headers": {name: "x"}}),
            pointer,
            "headers are set when the mail is sent",
        ));
    }
    table
}

#[test]
fn every_invalid_field_is_named_with_what_is_allowed() {
    for (change, pointer, part) in invalid() {
        let job = with(change);
        let rejection = read_value(&job).expect_err(pointer);
        let [error] = &rejection.errors[..] else {
            panic!("{job}: {:#?}", rejection.errors)
        };
        assert_eq!(error.pointer, pointer, "{job}: {error:?}");
        assert!(error.message.contains(part), "{job}: {error:?}");
        assert_eq!(rejection.reason, RejectReason::Invalid);
        assert!(
            !format!("{rejection:?} {rejection}").contains("canary"),
            "{rejection}"
        );
    }
}

/// What a schema cannot say.
#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn rules_beyond_the_schema_are_checked_too() {
    for (body, pointer, part) in [
        (
            with(json!({"to": vec!["a@b.example"; 60], "cc": vec!["a@b.example"; 60]})),
            "",
            "has 120 recipients",
        ),
        (
            with(json!({"return_path": "Ann <a@b.example>"})),
            "/return_path",
            "without a display name",
        ),
        (
            with(json!({"headers": {"X-A": "1", "x-a": "2"}})),
            "/headers/x-a",
            "is the same header as `X-A`",
        ),
        (
            with(
                json!({"headers": {"list-unsubscribe": "x"}, "list_unsubscribe": {"mailto": "a@b.example"}}),
            ),
            "/headers/list-unsubscribe",
            "give one of the two",
        ),
        (
            with(json!({"send_at": "2027-01-01T00:00:00Z", "expires_at": "2027-01-01T00:00:00Z"})),
            "/expires_at",
            "later than `send_at`",
        ),
        (
            with(json!({"send_at": "2027-02-30T00:00:00Z"})),
            "/send_at",
            "RFC 3339",
        ),
        (
            with(json!({"list_unsubscribe": {"url": format!("https://x.example/{}", ",".repeat(295))}})),
            "/list_unsubscribe/url",
            "at most 900",
        ),
        (
            with(json!({"metadata": {"a": "x".repeat(4096)}})),
            "/metadata",
            "has 4104 bytes as JSON; at most 4096",
        ),
        (
            with(json!({"attachments": [{"filename": "f", "base64": "aGk=", "sha256": "00".repeat(32)}]})),
            "/attachments/0/sha256",
            "is not the digest",
        ),
        (
            with(json!({"html": "x", "attachments": [
                {"filename": "f", "base64": "", "content_id": "a"},
                {"filename": "g", "base64": "", "content_id": "a"}]})),
            "/attachments/1/content_id",
            "already used",
        ),
        (
            with(json!({"attachments": [{"filename": "f", "base64": "", "inline": true}], "html": "x"})),
            "/attachments/0/content_id",
            "is required",
        ),
        (
            with(json!({"to": "a@b.example, c@d.example"})),
            "/to",
            "JSON list",
        ),
        (
            with(json!({"attachments": [{"filename": "f", "base64": "aGk"}]})),
            "/attachments/0/base64",
            "padding",
        ),
        (
            with(json!({"attachments": [{"filename": "..", "base64": ""}]})),
            "/attachments/0/filename",
            "not `.`",
        ),
    ] {
        let rejection = read_value(&body).expect_err(pointer);
        assert_eq!(rejection.errors.len(), 1, "{body}: {rejection:?}");
        assert_eq!(rejection.errors[0].pointer, pointer, "{rejection:?}");
        assert!(rejection.errors[0].message.contains(part), "{rejection:?}");
    }
}

#[test]
fn all_errors_come_at_once() {
    let rejection = read(
        r#"{"id":"a b","tenant":"acme","to":["x",{"address":"a@b.example","mail":1}],"subject":5,
            "subject":"twice","deep":[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]],"headers":{"To":"x"},"foo":1}"#,
    )
    .unwrap_err();
    let mut pointers: Vec<_> = rejection.errors.iter().map(|e| e.pointer.as_str()).collect();
    pointers.sort_unstable();
    assert_eq!(
        pointers,
        [
            "",
            "/deep",
            "/deep/0/0/0/0/0/0/0/0/0/0/0/0/0/0/0",
            "/foo",
            "/headers/To",
            "/id",
            "/subject",
            "/subject",
            "/to/0",
            "/to/1/mail",
        ]
    );
    assert_eq!(rejection.reason, RejectReason::TooDeep);
    assert_eq!(rejection.tenant.unwrap().as_str(), "acme");
    assert!(rejection.id.is_none());
}

#[test]
fn an_integer_that_metadata_cannot_hold_is_refused() {
    let of = |number: &str| {
        let job =
            r#"{"id":"1","tenant":"acme","to":"a@b.example","text":"","metadata":{"a":{"b":[0,NUMBER]}}}"#;
        read(job.replace("NUMBER", number))
    };
    for number in [
        "18446744073709551616",
        "-9223372036854775809",
        "123456789012345678901234567890",
        "100000000000000000001",
    ] {
        let rejection = of(number).unwrap_err();
        assert_eq!(rejection.errors[0].pointer, "/metadata/a/b/1", "{number}");
        assert!(rejection.errors[0].message.contains("64 bits"), "{number}");
        assert_eq!(
            (rejection.reason, rejection.errors.len()),
            (RejectReason::Invalid, 1)
        );
    }
    for number in [
        "18446744073709551615",
        "-9223372036854775808",
        "0.1",
        "1e19",
        "1e20",
        "100000000000000000000",
        "-18446744073709552000",
        "1.7976931348623157e308",
        "-2.5e-9",
        "31.245270191439438",
    ] {
        let metadata = of(number).unwrap().metadata.unwrap();
        let value: serde_json::Value = serde_json::from_str(number).unwrap();
        assert_eq!(metadata["a"]["b"][1], value, "{number}");
    }
}

#[test]
fn forms_that_are_not_fields_have_their_own_reason() {
    for (body, reason, part) in [
        (
            r#"{"id":"1","id":"1","tenant":"acme","to":"a@b.example","text":""}"#,
            RejectReason::DuplicateKey,
            "/id occurs more than once",
        ),
        (
            r#"{"id":"1","tenant":"acme","to":"a@b.example","text":"","metadata":{"a":1,"\u0061":2}}"#,
            RejectReason::DuplicateKey,
            "/metadata/a",
        ),
        (
            r#"{"id":"1","tenant":"acme","text":"\ud800"}"#,
            RejectReason::NotJson,
            "surrogate",
        ),
        (
            r#"{"id":"1","tenant":"acme","text":"#,
            RejectReason::NotJson,
            "EOF",
        ),
        ("", RejectReason::NotJson, "is not JSON"),
        ("[]", RejectReason::Invalid, "one message per job"),
        (r#""{}""#, RejectReason::Invalid, "encoded twice"),
        ("\u{feff}{}", RejectReason::NotJson, "byte order mark"),
    ] {
        let rejection = read(body).unwrap_err();
        assert_eq!(rejection.reason, reason, "{body}");
        assert!(rejection.to_string().contains(part), "{rejection}");
    }
    let crowd = format!("{{\"metadata\":{{\"a\":[{}0]}}}}", "0,".repeat(100_000));
    assert_eq!(read(crowd).unwrap_err().reason, RejectReason::TooLarge);
}

#[test]
fn a_hostile_job_gets_a_bounded_answer() {
    let body = format!(
        "{{{}\"x\":0}}",
        format!("\"{}\":0,", "k".repeat(1000)).repeat(3000)
    );
    let rejection = read(body).unwrap_err();
    assert!(rejection.errors.len() <= crate::job::bounds::MAX_ERRORS + 1);
    assert!(
        rejection
            .errors
            .iter()
            .all(|e| e.pointer.len() < 200 && e.message.len() < 600)
    );
    assert!(rejection.to_string().len() < 3000);
}
