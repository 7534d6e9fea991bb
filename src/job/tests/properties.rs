use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::schema::schema_takes;
use super::{read, read_value, with};
use crate::config::JobLimits;
use crate::job::MailJob;
use crate::job::decode::{Incoming, decode, inflate, may_hold_secret, seal_override};

fn address() -> impl Strategy<Value = (Option<String>, String)> {
    (
        option::of("[A-Za-zäß,. ]{0,8}[A-Za-zß]"),
        "[a-z0-9]{1,10}(\\.[a-z0-9]{1,5})?@[a-z][a-z0-9]{0,8}\\.example",
    )
}

/// The same address in every notation that can express it.
fn notations((name, address): &(Option<String>, String)) -> Vec<Value> {
    match name {
        Some(name) => vec![
            json!({"address": address, "name": name}),
            json!(format!("{name} <{address}>")),
            json!(format!("\"{name}\" <{address}>")),
        ],
        None => vec![
            json!(address),
            json!({"address": address, "name": null}),
            json!(format!("<{address}>")),
        ],
    }
}

prop_compose! {
    fn job()(
        id in "[!-~]{1,128}",
        tenant in "[A-Za-z0-9][A-Za-z0-9_-]{0,63}",
        to in vec(address(), 1..5),
        cc in vec(address(), 0..3),
        subject in option::of("[^\\p{C}]{0,80}"),
        text in "[^\\x00]{0,200}",
        html in option::of("[^\\x00]{1,200}"),
        headers in proptest::collection::btree_map("X-[a-z]{1,8}", "[^\\p{C}]{0,40}", 0..4),
        content in vec(any::<u8>(), 0..64),
        tags in vec("[^\\p{C}]{1,20}", 0..4),
        second in 946_684_800_i64..253_402_000_000,
    ) -> (Value, Vec<(Option<String>, String)>) {
        use base64::Engine as _;
        let content = base64::engine::general_purpose::STANDARD.encode(content);
        let time = jiff::Timestamp::from_second(second).unwrap().to_string();
        let list = |all: &[(Option<String>, String)]| all.iter().map(|one| notations(one).remove(0)).collect::<Vec<_>>();
        (json!({
            "id": id, "tenant": tenant, "to": list(&to), "cc": list(&cc), "subject": subject, "text": text,
            "html": html, "headers": headers, "tags": tags, "send_at": time,
            "attachments": [{"filename": "f.bin", "base64": content}],
        }), to)
    }
}

/// Order reversed at every level, nulls dropped.
fn reversed(value: &Value) -> Value {
    match value {
        Value::Object(members) => Value::Object(
            members
                .iter()
                .rev()
                .filter(|(_, value)| !value.is_null())
                .map(|(name, value)| (name.clone(), reversed(value)))
                .collect::<Map<_, _>>(),
        ),
        Value::Array(items) => Value::Array(items.iter().map(reversed).collect()),
        other => other.clone(),
    }
}

/// All that ends in the head of the mail.
fn head(job: &MailJob) -> Vec<&str> {
    let mut head: Vec<&str> = Vec::new();
    for mailbox in job
        .from
        .iter()
        .chain(&job.to)
        .chain(&job.cc)
        .chain(&job.bcc)
        .chain(&job.reply_to)
    {
        head.extend(mailbox.name.as_deref());
        head.push(mailbox.address.as_ref());
    }
    head.extend(job.subject.as_deref());
    head.extend(job.return_path.as_ref().map(AsRef::<str>::as_ref));
    head.extend(
        job.headers
            .iter()
            .flat_map(|(name, value)| [name.as_str(), value.as_str()]),
    );
    head.extend(job.list_unsubscribe.iter().filter_map(|list| list.url.as_deref()));
    for file in &job.attachments {
        head.push(&file.filename);
        head.extend(file.content_type.as_deref());
        head.extend(file.content_id.as_deref());
    }
    head
}

/// Text in which an attack is likely.
fn nasty() -> impl Strategy<Value = String> {
    vec(
        prop_oneof![
            Just("\r\n".to_owned()),
            Just("\n".to_owned()),
            Just("\r".to_owned()),
            Just("\0".to_owned()),
            Just("Bcc: x@y.example".to_owned()),
            Just("<a@b.example>".to_owned()),
            Just("\"".to_owned()),
            Just("a@b.example".to_owned()),
            Just("https://x.example/".to_owned()),
            Just("a/b".to_owned()),
            Just("\u{2028}\u{85}\u{b}".to_owned()),
            "[ -~]{0,6}",
            ".{0,4}",
        ],
        0..5,
    )
    .prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_valid_job_arrives_as_it_was_sent((value, to) in job()) {
        let job = read_value(&value).unwrap();
        prop_assert!(schema_takes(&value), "{value}");
        prop_assert_eq!(job.id.as_str(), &value["id"]);
        prop_assert_eq!(job.tenant.as_str(), &value["tenant"]);
        prop_assert_eq!(json!(job.subject), value["subject"].clone());
        prop_assert_eq!(json!(job.text), value["text"].clone());
        prop_assert_eq!(json!(job.html), value["html"].clone());
        prop_assert_eq!(json!(job.tags), value["tags"].clone());
        prop_assert_eq!(job.to.len(), to.len());
        for (mailbox, (name, address)) in job.to.iter().zip(&to) {
            prop_assert_eq!(mailbox.address.to_string(), address.as_str());
            prop_assert_eq!(mailbox.name.as_deref(), name.as_deref().map(str::trim));
        }
    }

    #[test]
    fn doubles_in_metadata_come_back_whichever_way_they_are_written(
        double in any::<f64>().prop_filter("JSON has no others", |double| double.is_finite())
    ) {
        // As Rust and Python write it, and as JavaScript does: without an exponent as long as that is short.
        for text in [format!("{double:?}"), format!("{double}")] {
            let body = format!(r#"{{"id":"1","tenant":"acme","to":"a@b.example","text":"","metadata":{{"n":{text}}}}}"#);
            let metadata = read(body).unwrap().metadata.unwrap();
            let told = metadata["n"].to_string();
            let back: f64 = told.parse().unwrap();
            prop_assert_eq!(back.to_bits(), double.to_bits(), "{} came back as {}", text, told);
        }
    }

    #[test]
    fn the_digest_depends_on_the_content_alone((value, to) in job()) {
        let digest = read_value(&value).unwrap().digest;
        prop_assert_eq!(digest, read_value(&reversed(&value)).unwrap().digest);
        prop_assert_eq!(digest, read(serde_json::to_vec_pretty(&value).unwrap()).unwrap().digest);
        for index in 0..3 {
            let mut other = value.clone();
            other["to"] = to.iter().map(|one| notations(one)[index].clone()).collect();
            prop_assert_eq!(digest, read_value(&other).unwrap().digest, "{}", other["to"]);
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused_without_panic(
        body in vec(any::<u8>(), 0..400),
        content_encoding in option::of(prop_oneof![Just("gzip"), Just("utf-8"), Just("x")]),
        compression in option::of(Just("application/x-gzip")),
    ) {
        let incoming = Incoming { body: &body, content_encoding, compression, ..Incoming::default() };
        let _ = inflate(&incoming, &JobLimits::default());
        prop_assert!(decode(&incoming, &JobLimits::default()).is_err());
        let _ = (may_hold_secret(&body), seal_override(&body, |_| String::new()));
    }

    #[test]
    fn a_damaged_job_never_panics((value, _) in job(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut body = value.to_string().into_bytes();
        let at = at.index(body.len());
        body[at] = byte;
        let _ = read(&body);
        body.truncate(at);
        prop_assert!(read(&body).is_err());
    }

    #[test]
    fn no_line_break_reaches_the_head_of_the_mail(
        parts in vec(nasty(), 12),
        field in 0_usize..12,
    ) {
        let text = parts[field].as_str();
        let changes = [
            json!({"subject": text}), json!({"from": text}), json!({"to": [text]}),
            json!({"to": {"address": text, "name": parts[0]}}), json!({"headers": {text: "x"}}),
            json!({"headers": {"X-A": text}}), json!({"return_path": text}), json!({"reply_to": format!("{text} <a@b.example>")}),
            json!({"list_unsubscribe": {"url": format!("https://x.example/{text}")}}),
            json!({"attachments": [{"filename": text, "base64": ""}]}),
            json!({"attachments": [{"filename": "f", "base64": "", "content_type": format!("a/b;c={text}")}]}),
            json!({"attachments": [{"filename": "f", "base64": "", "content_id": text}]}),
        ];
        for change in changes {
            let value = with(change);
            if let Ok(job) = read_value(&value) {
                prop_assert!(schema_takes(&value), "the decoder takes what the schema refuses: {value}");
                for text in head(&job) {
                    prop_assert!(!text.contains(['\r', '\n', '\0']), "{text:?}");
                }
                for mailbox in job.to.iter().chain(&job.from) {
                    let address = mailbox.address.to_string();
                    prop_assert!(!address.contains(['<', '>', ' ']), "{address:?}");
                }
            }
        }
    }
}
