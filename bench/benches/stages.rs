//! What the stages cost without sockets: decode a job, compose the mail, encode a report, sign a webhook.
//! `cargo bench --package postroom-bench`.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot begin is over")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use jiff::Timestamp;
use postroom::attachment::Prepared;
use postroom::bridge::signature::{self, SigningKey};
use postroom::compose::{Composition, compose};
use postroom::config::JobLimits;
use postroom::job::decode::{Incoming, decode};
use postroom::report::{RecipientResult, RecipientStatus, Report, ReportData};

fn body() -> Vec<u8> {
    let text = "Lorem ipsum dolor sit amet, consetetur sadipscing elitr, sed diam.\\r\\n".repeat(20);
    format!(
        r#"{{"id":"order-4711","tenant":"acme","to":"ann@example.org","subject":"Your order","text":"{text}"}}"#
    )
    .into_bytes()
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

fn stages(criterion: &mut Criterion) {
    let (body, limits) = (body(), JobLimits::default());
    criterion.bench_function("decode a job of 1.5 KB", |bencher| {
        bencher.iter(|| decode(black_box(&incoming(&body)), &limits).unwrap());
    });
    let job = decode(&incoming(&body), &limits).unwrap();
    let from = job.to[0].clone();
    let recipients = [from.address.clone()];
    let prepared = Prepared::default();
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
    criterion.bench_function("compose its mail", |bencher| {
        bencher.iter(|| compose(black_box(&composition)).unwrap());
    });
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
