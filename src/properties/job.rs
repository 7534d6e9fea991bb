//! Messages from producers.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::{Input, is_one_line, mail};
use crate::address::{masked, masked_in};
use crate::config::JobLimits;
use crate::job::bounds::MAX_ERRORS;
use crate::job::decode::{
    Incoming, Rejection, decode, inflate, may_hold_secret, seal_override, without_secrets,
};
use crate::job::{MailJob, SmtpOverride};

/// Small, so that a fuzzer finds them.
fn limits() -> JobLimits {
    JobLimits {
        max_bytes: 64 << 10,
        max_inflated: 64 << 10,
        max_recipients: 4,
        max_attachments: 3,
        ..JobLimits::default()
    }
}

/// A body: refused with bounded errors, or a job that can be composed, sealed and read again.
pub fn job(data: &[u8]) {
    let incoming = Incoming {
        body: data,
        ..Incoming::default()
    };
    match decode(&incoming, &limits()) {
        Err(rejection) => check_rejection(&rejection),
        Ok(job) => check_job(&job, data),
    }
    // A body that is no job is stored too, as a dead letter.
    if let Ok(sealed) = seal_override(data, |_| SEALED.to_owned()) {
        let again = seal_override(&sealed, |_| {
            panic!("an override that was sealed is found in clear")
        });
        assert_eq!(again.as_deref(), Ok(&*sealed));
    }
    let _ = (may_hold_secret(data), without_secrets(data));
}

const SEALED: &str = "v1:k:QUJD";

fn check_rejection(rejection: &Rejection) {
    assert!((1..=MAX_ERRORS + 1).contains(&rejection.errors.len()));
    let shown = rejection.to_string();
    assert!(
        shown.chars().count() <= 4000,
        "{} characters",
        shown.chars().count()
    );
    assert!(is_one_line(&shown), "{shown:?}");
    for error in &rejection.errors {
        assert!(
            is_one_line(&error.pointer) && is_one_line(&error.message),
            "{error:?}"
        );
        assert!(error.message.chars().count() <= 600, "{error:?}");
    }
    assert!(
        rejection
            .tenant
            .as_ref()
            .is_none_or(|tenant| !tenant.is_platform())
    );
}

fn check_job(job: &MailJob, data: &[u8]) {
    let limits = limits();
    assert!(!job.tenant.is_platform());
    assert!(job.attachments.len() <= limits.max_attachments);
    let recipients: Vec<_> = job.recipients().collect();
    assert!((1..=limits.max_recipients).contains(&recipients.len()));
    let named: HashSet<&str> = job
        .to
        .iter()
        .chain(&job.cc)
        .chain(&job.bcc)
        .map(|mailbox| mailbox.address.as_ref())
        .collect();
    assert!(
        recipients
            .iter()
            .all(|address| named.contains(AsRef::<str>::as_ref(*address)))
    );
    for (name, value) in &job.headers {
        assert!(is_one_line(name) && is_one_line(value), "{name:?}: {value:?}");
    }
    check_sealed(job, data);
    mail::check_decoded(job);
}

/// What may be stored is the same job, without its password.
fn check_sealed(job: &MailJob, data: &[u8]) {
    let sealed = seal_override(data, |_| SEALED.to_owned()).expect("a job can be sealed");
    if !matches!(job.smtp_override, Some(SmtpOverride::Plain(_))) {
        assert_eq!(&*sealed, data);
        return;
    }
    let incoming = Incoming {
        body: &sealed,
        ..Incoming::default()
    };
    let stored = decode(&incoming, &limits()).expect("a sealed job can be read");
    assert_eq!(stored.digest, job.digest);
    assert!(matches!(stored.smtp_override, Some(SmtpOverride::Sealed(_))));
}

/// Compressed bodies: never more than the bound comes out. The first byte chooses what the producer says of it.
pub fn compressed(data: &[u8]) {
    let Some((choice, body)) = data.split_first() else {
        return;
    };
    let says = [None, Some("gzip"), Some("gzip:utf-8"), Some("utf-8"), Some("br")];
    let incoming = Incoming {
        body,
        content_encoding: says[usize::from(choice & 0x0f) % says.len()],
        compression: (choice & 0x10 != 0).then_some("application/x-gzip"),
        ..Incoming::default()
    };
    let limits = limits();
    if let Ok(plain) = inflate(&incoming, &limits) {
        assert!(plain.len() <= limits.max_inflated);
    }
    if let Err(rejection) = decode(&incoming, &limits) {
        check_rejection(&rejection);
    }
}

/// Addresses and header values in every place of a job: name, address, header name, header value.
pub fn address(data: &[u8]) {
    let mut input = Input::new(data);
    let (first, second, third) = (input.text(), input.text(), input.text());
    let changes = [
        json!({"to": first}),
        json!({"to": {"address": first, "name": second}}),
        json!({"cc": [first, second]}),
        json!({"bcc": format!("{second} <{first}>")}),
        json!({"from": first, "reply_to": [second]}),
        json!({"return_path": first}),
        json!({"headers": {(&*second): third}}),
        json!({"list_unsubscribe": {"mailto": first, "url": second}}),
        json!({"attachments": [{"filename": first, "base64": "", "content_type": second, "content_id": third}]}),
    ];
    for change in changes {
        let mut value =
            json!({"id": "1", "tenant": "acme", "from": "a@b.example", "subject": "s", "text": "t"});
        let single = change.get("to").is_some() || change.get("bcc").is_some();
        merge(&mut value, change);
        let body = value.to_string();
        job(body.as_bytes());
        if !single {
            value["to"] = json!("ann@example.org");
            job(value.to_string().as_bytes());
            continue;
        }
        let incoming = Incoming {
            body: body.as_bytes(),
            ..Incoming::default()
        };
        if let Ok(job) = decode(&incoming, &limits()) {
            assert_eq!(job.recipients().count(), 1, "one notation names one recipient");
            for address in job.recipients() {
                check_masked(address.as_ref());
            }
        }
    }
}

fn merge(value: &mut Value, change: Value) {
    if let (Value::Object(members), Value::Object(changes)) = (value, change) {
        members.extend(changes);
    }
}

/// What logs show of an address, alone or quoted by a server, is its domain.
fn check_masked(address: &str) {
    let Some((local, domain)) = address.rsplit_once('@') else {
        panic!("an address without @");
    };
    assert_eq!(masked(address), format!("***@{domain}"));
    for (before, after) in [("<", ">: unknown"), ("550 ", " refused")] {
        let quoted = format!("{before}{address}{after}");
        let shown = masked_in(&quoted);
        let rest = shown
            .strip_prefix(before)
            .and_then(|rest| rest.split_once("***@"));
        let (left, _) = rest.unwrap_or_else(|| panic!("{shown}"));
        // A quote or label at its beginning may be taken for one around it.
        assert!(
            left.len() <= 10 && left.len() < local.len().max(3),
            "{local:?} is shown: {shown}"
        );
    }
}
