use serde_json::json;

use super::{minimal, read, read_value, with};
use crate::job::{Fallback, OnUncertain, SmtpOverride, Source, TlsMode};

#[test]
fn the_smallest_job_is_id_tenant_one_recipient_and_a_body() {
    let job = read_value(&minimal()).unwrap();
    assert_eq!((job.id.as_str(), job.tenant.as_str()), ("1", "acme"));
    assert_eq!(
        job.recipients().map(ToString::to_string).collect::<Vec<_>>(),
        ["ann@example.org"]
    );
    assert_eq!(
        (job.subject, job.text.as_deref(), job.html),
        (None, Some("hi"), None)
    );
}

#[test]
fn every_field_arrives() {
    let job = read_value(&json!({
        "id": "x/1", "tenant": "acme", "account": "main",
        "from": "Ann <a@example.org>", "to": ["b@example.org", {"address": "c@example.org", "name": "C"}],
        "cc": "d@example.org", "bcc": [], "reply_to": ["e@example.org"], "return_path": "<f@example.org>",
        "subject": "Grüße", "text": "t\r\n", "html": "<p>h</p>",
        "headers": {"X-A": "1", "X-B": null, "References": "<a@b>\t<c@d>"},
        "locale": "pt_BR",
        "list_unsubscribe": {"url": "https://example.org/u?t=ü", "mailto": "u@example.org"},
        "attachments": [
            {"filename": "a.txt", "content_type": "text/plain; charset=utf-8", "base64": "aGVs\r\nbG8=\n"},
            {"filename": "b.png", "inline": true, "content_id": "b@x", "url": "https://example.org/b.png?s=1",
             "sha256": "AB".repeat(32)},
        ],
        "send_at": "2027-01-01T08:00:00+01:00", "expires_at": "2027-01-01T07:00:01Z",
        "batch": "b 1", "tags": ["t1", "t2"], "metadata": {"a": [1, 2.5, null]},
        "smtp_override": {"host": "Smtp.Example.ORG", "username": "u", "password": "p"},
        "fallback": "platform", "on_uncertain": "hold",
    }))
    .unwrap();
    assert_eq!(job.account.unwrap().as_str(), "main");
    assert_eq!(job.from.unwrap().to_string(), "Ann <a@example.org>");
    assert_eq!(job.to[1].name.as_deref(), Some("C"));
    assert_eq!(job.return_path.unwrap().to_string(), "f@example.org");
    assert_eq!(job.headers.len(), 2, "a null header is absent");
    assert_eq!(job.locale.as_deref(), Some("pt-BR"));
    let list = job.list_unsubscribe.unwrap();
    assert_eq!(list.url.as_deref(), Some("https://example.org/u?t=%C3%BC"));
    assert!(matches!(&job.attachments[0].source, Source::Bytes(bytes) if bytes == "hello"));
    assert!(matches!(&job.attachments[1].source, Source::Url(url) if url.host_str() == Some("example.org")));
    assert_eq!(job.attachments[1].sha256, Some([0xab; 32]));
    assert_eq!(
        job.send_at.unwrap().as_second() + 1,
        job.expires_at.unwrap().as_second()
    );
    assert_eq!(job.metadata, Some(json!({"a": [1, 2.5, null]})));
    assert_eq!(
        (job.fallback, job.on_uncertain),
        (Some(Fallback::Platform), Some(OnUncertain::Hold))
    );
    let Some(SmtpOverride::Plain(server)) = job.smtp_override else {
        panic!("not plain")
    };
    assert_eq!(
        (server.host.as_str(), server.port, server.tls),
        ("smtp.example.org", 587, TlsMode::StartTls)
    );
}

#[test]
fn null_is_absent_in_every_optional_field() {
    let mut job = minimal();
    for name in crate::job::fields::JOB_FIELDS {
        if job.get(*name).is_none() {
            job[*name] = json!(null);
        }
    }
    assert_eq!(
        read_value(&job).unwrap().digest,
        read_value(&minimal()).unwrap().digest
    );
}

#[test]
fn empty_files_and_empty_text_are_allowed() {
    let job = with(json!({"text": "", "attachments": [{"filename": "empty", "base64": ""}]}));
    assert!(read_value(&job).is_ok());
}

#[test]
fn the_digest_does_not_depend_on_notation() {
    let one = read(
        r#"{"id":"1","tenant":"acme","to":"Ann <ann@example.org>","text":"hi","metadata":{"a":1,"b":{"c":2,"d":3}},
            "headers":{"X-A":"1","X-B":"2"},"send_at":"2027-01-01T08:00:00+01:00",
            "attachments":[{"filename":"f","base64":"aGVsbG8="}]}"#,
    )
    .unwrap();
    let two = read(
        r#"{ "attachments": [ {"base64": "aGVs bG8=", "filename": "\u0066", "inline": false, "url": null,
                "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"} ],
             "send_at": "2027-01-01T07:00:00Z", "headers": {"X-B": "2", "X-A": "1"},
             "metadata": {"b": {"d": 3, "c": 2}, "a": 1}, "text": "hi", "cc": null, "bcc": [],
             "to": [{"name": "Ann", "address": "ann@example.org"}], "tenant": "acme", "id": "1",
             "smtp_override": {"host": "h.example"} }"#,
    )
    .unwrap();
    assert_eq!(one.digest, two.digest);
}

#[test]
fn the_digest_changes_with_every_field() {
    let base = read_value(&minimal()).unwrap().digest;
    let changes = [
        json!({"id": "2"}),
        json!({"tenant": "acme2"}),
        json!({"account": "a"}),
        json!({"from": "ann@example.org"}),
        json!({"to": ["ann@example.org", "bob@example.org"]}),
        json!({"to": "A <ann@example.org>"}),
        json!({"cc": "bob@example.org"}),
        json!({"bcc": "bob@example.org"}),
        json!({"reply_to": "bob@example.org"}),
        json!({"return_path": "bob@example.org"}),
        json!({"subject": "hi"}),
        json!({"text": "ho"}),
        json!({"html": "hi"}),
        json!({"headers": {"X-A": "hi"}}),
        json!({"locale": "de"}),
        json!({"list_unsubscribe": {"mailto": "bob@example.org"}}),
        json!({"attachments": [{"filename": "hi", "base64": "aGVsbG8="}]}),
        json!({"attachments": [{"filename": "hi", "base64": "aGVsbG9v"}]}),
        json!({"attachments": [{"filename": "hi", "url": "https://example.org/"}]}),
        json!({"send_at": "2027-01-01T07:00:00Z"}),
        json!({"expires_at": "2027-01-01T07:00:00Z"}),
        json!({"batch": "hi"}),
        json!({"tags": ["hi"]}),
        json!({"metadata": {}}),
        json!({"fallback": "never"}),
        json!({"on_uncertain": "resend"}),
    ];
    let mut digests = vec![base];
    for change in changes {
        let digest = read_value(&with(change.clone())).unwrap().digest;
        assert!(!digests.contains(&digest), "{change}");
        digests.push(digest);
    }
}

#[test]
fn the_digest_of_a_job_never_changes_between_versions() {
    // Stored with every job: a release that computes another one takes repeats for conflicts.
    let digest = read_value(&minimal()).unwrap().digest;
    let mut expected = [0; 32];
    for (index, byte) in expected.iter_mut().enumerate() {
        const HEX: &str = "ab587707ec3ed9b6a273fddcbd4ede18ac316171261838617530efad8c4a0079";
        *byte = u8::from_str_radix(&HEX[2 * index..2 * index + 2], 16).unwrap();
    }
    assert_eq!(digest, expected);
}
