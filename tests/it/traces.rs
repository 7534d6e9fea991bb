//! Spans over OTLP: those of attempts, reports and webhooks, and that a collector is nobody mail waits for.

use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use postroom::level::Level;
use postroom_testkit::collector::{Collector, Reply, Span};
use postroom_testkit::smtp::{RcptRule, Script, SmtpServer};
use postroom_testkit::webhook::WebhookReceiver;
use serde_json::{Value, json};

use crate::sends::{account, account_with_password};
use crate::support::{World, mail};

const LIMIT: Duration = Duration::from_secs(30);
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";
const PROCESS: &str = "process mail.jobs.high";
const EXPORTED: &str = r#"postroom_trace_spans_total{result="exported"}"#;

fn traceparent(flags: &str) -> String {
    format!("00-{TRACE}-{SPAN}-{flags}")
}

/// A world whose processes send spans to a collector.
async fn traced() -> (World, Collector) {
    let mut world = World::ready().await;
    let collector = Collector::start().await.unwrap();
    world.set("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url());
    (world, collector)
}

async fn publish(world: &World, job: &Value, traceparent: &str) {
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_type("mail.job.v1".into())
        .with_headers(headers);
    let exchange = world.topology().jobs_exchange();
    let amqp = world.amqp().await;
    amqp.publish(&exchange, "high.acme", properties, job.to_string().as_bytes())
        .await;
}

/// The one span of that name.
#[track_caller]
fn one<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    assert_eq!(found.len(), 1, "{name}: {spans:#?}");
    found[0]
}

fn has(name: &str) -> impl Fn(&[Span]) -> bool {
    move |spans| spans.iter().any(|span| span.name == name)
}

#[tokio::test]
async fn the_span_of_an_attempt_is_below_its_producers_and_has_its_stages_below_it() {
    let (world, collector) = traced().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let worker = world.start_worker().await;
    publish(&world, &mail("acme", "order-1"), &traceparent("01")).await;
    let spans = collector.wait_for(LIMIT, has(PROCESS)).await.unwrap();
    assert!(spans.iter().all(|span| span.trace == TRACE), "{spans:#?}");
    let attempt = one(&spans, PROCESS);
    assert_eq!(
        (attempt.parent.as_str(), attempt.kind, &attempt.error),
        (SPAN, 5, &None)
    );
    for (name, value) in [
        ("messaging.system", "rabbitmq"),
        ("messaging.operation.type", "process"),
        ("messaging.destination.name", "mail.jobs.high"),
        ("postroom.tenant", "acme"),
        ("postroom.job", "order-1"),
        ("postroom.account", "main"),
        ("postroom.attempt", "1"),
        ("postroom.outcome", "sent"),
        ("postroom.recipients.accepted", "1"),
    ] {
        assert_eq!(attempt.attribute(name), value, "{name}");
    }
    for stage in ["resolve", "connection", "compose", "send", "settle"] {
        let stage = one(&spans, stage);
        assert_eq!(stage.parent, attempt.id, "{stage:?}");
        let (from, to) = stage.during;
        assert!(
            attempt.during.0 <= from && from <= to && to <= attempt.during.1,
            "{stage:?} {attempt:?}"
        );
    }
    let send = one(&spans, "send");
    assert_eq!(send.kind, 3);
    assert_eq!(send.attribute("server.address"), "127.0.0.1");
    assert_eq!(send.attribute("server.port"), server.port().to_string());
    assert_eq!(attempt.resource["service.name"], "postroom-worker");
    assert!(worker.count(EXPORTED).await > 0);
}

#[tokio::test]
async fn reports_and_webhooks_are_below_the_attempt_that_they_tell_of() {
    let (world, collector) = traced().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let receiver = WebhookReceiver::start().await.unwrap();
    let url = receiver.url("/hooks/token-in-path");
    let set = [
        "endpoint",
        "set",
        "acme",
        "default",
        "--url",
        &url,
        "--generate-secret",
    ];
    world.postroom(&set).await.success();
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let bridge = world.start_bridge().await;
    publish(&world, &mail("acme", "order-1"), &traceparent("01")).await;
    let report = reports.final_of("order-1").await;
    let all = |spans: &[Span]| {
        ["POST", PROCESS, "send mail.reports"]
            .iter()
            .all(|name| has(name)(spans))
    };
    let spans = collector.wait_for(LIMIT, all).await.unwrap();
    let attempt = one(&spans, PROCESS);
    assert_eq!(report.json["data"]["traceparent"], attempt.traceparent());
    let published = one(&spans, "send mail.reports");
    assert_eq!(
        (published.parent.as_str(), published.kind),
        (attempt.id.as_str(), 4)
    );
    let posted = one(&spans, "POST");
    assert_eq!((posted.parent.as_str(), posted.kind), (attempt.id.as_str(), 3));
    assert_eq!(posted.resource["service.name"], "postroom-bridge");
    assert_eq!(posted.attribute("http.response.status_code"), "204");
    assert_eq!(posted.attribute("server.address"), "127.0.0.1");
    assert!(!format!("{spans:?}").contains("token-in-path"));
    let hook = receiver.received().remove(0);
    assert_eq!(hook.header("traceparent"), posted.traceparent());
    assert_eq!(hook.json()["data"]["traceparent"], attempt.traceparent());
    assert!(bridge.count(EXPORTED).await > 0);
}

#[tokio::test]
async fn attempts_that_fail_are_marked_as_errors_and_are_siblings() {
    let (mut world, collector) = traced().await;
    world.set("POSTROOM_RETRY_BASE", "100ms");
    let script = Script::new().recipient("order-1", RcptRule::defer_first(1, "451 4.3.0 greylisted"));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    publish(&world, &mail("acme", "order-1"), &traceparent("01")).await;
    assert_eq!(reports.final_of("order-1").await.kind(), "mail.sent");
    let attempts = |spans: &[Span]| {
        spans
            .iter()
            .filter(|span| span.name == PROCESS)
            .cloned()
            .collect::<Vec<_>>()
    };
    let spans = collector
        .wait_for(LIMIT, |spans| attempts(spans).len() == 2)
        .await
        .unwrap();
    let attempts = attempts(&spans);
    assert!(attempts.iter().all(|attempt| attempt.parent == SPAN));
    let (first, second) = (&attempts[0], &attempts[1]);
    assert!(first.error.is_some(), "{first:?}");
    assert_eq!(first.error.as_deref(), Some(first.attribute("error.type")));
    assert_eq!(first.attribute("postroom.outcome"), "deferred");
    assert_eq!(first.attribute("postroom.source"), "queue");
    let child = |of: &Span| {
        spans
            .iter()
            .find(|span| span.name == "send" && span.parent == of.id)
            .unwrap()
            .error
            .clone()
    };
    assert_eq!(child(first), first.error);
    assert_eq!((child(second), &second.error), (None, &None));
    assert_eq!(
        (
            second.attribute("postroom.attempt"),
            second.attribute("postroom.source")
        ),
        ("2", "waiting_room")
    );
}

#[tokio::test]
async fn a_job_that_is_not_sampled_gives_no_spans_and_its_own_traceparent_comes_back() {
    let (world, collector) = traced().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let mut worker = world.start_worker().await;
    publish(&world, &mail("acme", "silent"), &traceparent("00")).await;
    let report = reports.final_of("silent").await;
    assert_eq!(report.json["data"]["traceparent"], traceparent("00"));
    // One that came without a trace has one of its own, made later.
    world.publish(Level::High, "acme", &mail("acme", "loud")).await;
    let report = reports.final_of("loud").await;
    assert!(worker.term().await.success());
    let spans = collector.spans();
    assert!(spans.iter().all(|span| span.trace != TRACE), "{spans:#?}");
    let attempt = one(&spans, PROCESS);
    assert_eq!(
        (attempt.attribute("postroom.job"), attempt.parent.as_str()),
        ("loud", "")
    );
    assert_eq!(report.json["data"]["traceparent"], attempt.traceparent());
}

#[tokio::test]
async fn no_secret_and_no_address_is_in_what_is_exported_or_logged() {
    const HEADER: &str = "Kanarienvogel-header";
    const PASSWORD: &str = "Kanarienvogel-password";
    let (mut world, collector) = traced().await;
    let headers = world.dir().join("headers");
    std::fs::write(&headers, format!("authorization=Bearer%20{HEADER},x-team=mail")).unwrap();
    world.set("OTEL_EXPORTER_OTLP_HEADERS_FILE", headers.to_str().unwrap());
    world.set("POSTROOM_LOG", "trace");
    // The server's words name the recipient.
    let script = Script::new().recipient(
        "canary-recipient",
        RcptRule::refuse("550 5.1.1 canary-recipient unknown"),
    );
    let server = SmtpServer::builder()
        .auth("u", PASSWORD)
        .script(script)
        .start()
        .await;
    world.postroom(&["tenant", "set", "acme"]).await.success();
    account_with_password(
        &world,
        "main",
        &server,
        PASSWORD,
        "--from shop@canary-sender.example",
    )
    .await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    let job = json!({
        "id": "order-1", "tenant": "acme", "to": ["canary-recipient@example.org", "ann@canary-domain.example"],
        "subject": "canary-subject", "text": "canary-text", "metadata": {"canary-metadata": 1},
        "headers": {"X-Canary": "canary-value"},
    });
    publish(&world, &job, &traceparent("01")).await;
    reports.final_of("order-1").await;
    collector.wait_for(LIMIT, has(PROCESS)).await.unwrap();
    let requests = collector.requests();
    for request in &requests {
        assert_eq!(request.path, "/v1/traces");
        assert_eq!(request.headers["authorization"], format!("Bearer {HEADER}"));
        assert_eq!(request.headers["x-team"], "mail");
        assert_eq!(request.headers["content-type"], "application/x-protobuf");
        let text = String::from_utf8_lossy(&request.body).to_lowercase();
        assert!(
            !text.contains("canary") && !text.contains("kanarienvogel"),
            "{text}"
        );
    }
    // And of a collector that says it does not take them.
    collector.always(Reply::Status(401));
    publish(&world, &mail("acme", "order-2"), &traceparent("01")).await;
    worker.wait_log("spans cannot be sent").await;
    assert!(worker.logs().contains("HTTP 401"));
    assert!(!worker.logs().contains("Kanarienvogel"), "{}", worker.logs());
    assert!(
        worker
            .count(r#"postroom_trace_spans_total{result="failed"}"#)
            .await
            > 0
    );
}

#[tokio::test]
async fn a_hanging_collector_delays_neither_mail_nor_shutdown() {
    let (mut world, collector) = traced().await;
    world.set("OTEL_EXPORTER_OTLP_TIMEOUT", "60000");
    collector.always(Reply::Hang);
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let mut worker = world.start_worker().await;
    let began = Instant::now();
    for n in 0..50 {
        publish(&world, &mail("acme", &format!("order-{n}")), &traceparent("01")).await;
    }
    for n in 0..50 {
        assert_eq!(reports.final_of(&format!("order-{n}")).await.kind(), "mail.sent");
    }
    crate::support::eventually(LIMIT, || async { !collector.requests().is_empty() }).await;
    assert!(began.elapsed() < Duration::from_secs(45), "{:?}", began.elapsed());
    let told = Instant::now();
    assert!(worker.term().await.success());
    // Far below the time limit of the request that hangs.
    assert!(told.elapsed() < Duration::from_secs(20), "{:?}", told.elapsed());
}

#[tokio::test]
async fn spans_that_a_collector_rejects_are_counted_and_those_left_at_the_end_are_sent() {
    let (world, collector) = traced().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let mut worker = world.start_worker().await;
    collector.always(Reply::Reject(1));
    publish(&world, &mail("acme", "order-1"), &traceparent("01")).await;
    reports.final_of("order-1").await;
    crate::support::eventually(LIMIT, || async {
        worker
            .count(r#"postroom_trace_spans_total{result="rejected"}"#)
            .await
            > 0
    })
    .await;
    publish(&world, &mail("acme", "order-2"), &traceparent("01")).await;
    reports.final_of("order-2").await;
    assert!(worker.term().await.success());
    let spans = collector.spans();
    let last = spans
        .iter()
        .any(|span| span.name == PROCESS && span.attribute("postroom.job") == "order-2");
    assert!(last, "{spans:#?}");
}

#[tokio::test]
async fn another_protocol_is_refused_with_the_one_there_is() {
    let (mut world, _collector) = traced().await;
    world.set("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
    let stderr = world.postroom(&["worker"]).await.fails_with(2);
    assert!(
        stderr.contains("OTEL_EXPORTER_OTLP_PROTOCOL: `grpc` cannot be used: give one of http/protobuf"),
        "{stderr}"
    );
    // Without a collector it may be meant for others.
    world.set("OTEL_SDK_DISABLED", "true");
    let _worker = world.start_worker().await;
}
