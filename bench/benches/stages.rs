//! What the stages cost without sockets: decode a job, compose the mail, encode a report, sign a webhook.
//! `cargo bench --package postroom-bench`.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot begin is over")]

use std::hint::black_box;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use criterion::{Criterion, criterion_group, criterion_main};
use jiff::Timestamp;
use postroom::attachment::{Part, Prepared};
use postroom::bridge::signature::{self, SigningKey};
use postroom::compose::{Composition, compose};
use postroom::config::JobLimits;
use postroom::job::Source;
use postroom::job::decode::{Incoming, decode};
use postroom::report::{RecipientResult, RecipientStatus, Report, ReportData};

fn body() -> Vec<u8> {
    let text = "Lorem ipsum dolor sit amet, consetetur sadipscing elitr, sed diam.\\r\\n".repeat(20);
    format!(
        r#"{{"id":"order-4711","tenant":"acme","to":"ann@example.org","subject":"Your order","text":"{text}"}}"#
    )
    .into_bytes()
}

/// A mail as shops send it: HTML of 30 KB with line feeds and umlauts, and a PDF of 100 KB.
fn invoice() -> Vec<u8> {
    let html = "<td style=\"padding: 4px 12px\">Stück: zwölf Gläser. Grüße an alle</td>\n".repeat(440);
    let pdf: Vec<u8> = (0..100_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let file = serde_json::json!({"filename": "invoice.pdf", "base64": STANDARD.encode(pdf)});
    let job = serde_json::json!({
        "id": "order-4711", "tenant": "acme", "to": "ann@example.org", "subject": "Rechnung", "html": html,
        "attachments": [file],
    });
    job.to_string().into_bytes()
}

fn incoming(body: &[u8]) -> Incoming<'_> {
    Incoming {
        body,
        content_type: Some("application/json"),
        content_encoding: None,
        message_type: None,
        compression: None,
        contract: None,
        key_tenant: Some("acme"),
    }
}

fn report() -> Report {
    Report {
        id: "evt_0123456789abcdef".to_owned(),
        kind: "mail.sent",
        timestamp: Timestamp::UNIX_EPOCH,
        data: ReportData {
            job: Some("order-4711".parse().unwrap()),
            tenant: "acme".parse().unwrap(),
            account: Some("main".into()),
            sender: None,
            attempt: 1,
            message_id: Some("<0123456789abcdef0123456789abcdef@example.com>".into()),
            recipients: vec![RecipientResult {
                address: "ann@example.org".into(),
                status: RecipientStatus::Accepted,
                code: Some(250),
                enhanced_code: Some("2.0.0".into()),
                text: Some("taken".into()),
            }],
            partial: false,
            reason: None,
            detail: None,
            class: None,
            fault: None,
            stage: None,
            errors: vec![],
            is_final: true,
            sequence: 1_700_000_000_000,
            correlation_id: Some("order-4711".into()),
            traceparent: None,
            next_attempt_at: None,
            uncertain_attempts: 0,
            timings: None,
            batch: None,
            tags: vec![],
            metadata: None,
            links: vec![],
        },
    }
}

fn mail(criterion: &mut Criterion, what: &str, body: &[u8]) {
    let limits = JobLimits::default();
    criterion.bench_function(&format!("decode {what}"), |bencher| {
        bencher.iter(|| decode(black_box(&incoming(body)), &limits).unwrap());
    });
    let job = decode(&incoming(body), &limits).unwrap();
    let from = job.to[0].clone();
    let recipients = [job.to[0].address.clone()];
    let parts = job.attachments.iter().map(|attachment| match &attachment.source {
        Source::Bytes(bytes) => Part::new(attachment, bytes.clone()),
        Source::Url(_) => unreachable!("none is elsewhere"),
    });
    let prepared = Prepared {
        parts: parts.collect(),
        ..Prepared::default()
    };
    let composition = Composition {
        job: &job,
        from: &from,
        reply_to: None,
        envelope_from: Some(&from.address),
        recipients: &recipients,
        message_id: "<0123456789abcdef@example.com>",
        date: Timestamp::UNIX_EPOCH,
        prepared: &prepared,
    };
    criterion.bench_function(&format!("compose {what}"), |bencher| {
        bencher.iter(|| compose(black_box(&composition)).unwrap());
    });
}

fn stages(criterion: &mut Criterion) {
    mail(criterion, "a small mail", &body());
    mail(criterion, "an invoice", &invoice());
    let report = report();
    criterion.bench_function("encode its report", |bencher| {
        bencher.iter(|| serde_json::to_vec(black_box(&report)).unwrap());
    });
    let keys = [SigningKey::parse(&signature::generate()).unwrap()];
    let encoded = serde_json::to_vec(&report).unwrap();
    criterion.bench_function("sign a webhook", |bencher| {
        bencher.iter(|| signature::header(&keys, &report.id, 1_700_000_000, black_box(&encoded)));
    });
}

criterion_group!(benches, stages);
criterion_main!(benches);
