//! What operators see: metrics, one log line per attempt, health, wrong configuration, help.

use postroom::level::Level;
use postroom_testkit::smtp::{RcptRule, Script, SmtpServer};
use serde_json::{Value, json};

use crate::sends::account;
use crate::support::{Process, World};

fn job(id: &str, to: &str) -> Value {
    json!({"id": id, "tenant": "acme", "to": to, "subject": "s", "text": "t"})
}

async fn assert_metrics(worker: &Process) {
    for (series, value) in [
        (r#"postroom_jobs_total{outcome="sent"}"#, 2.0),
        (r#"postroom_jobs_total{outcome="failed"}"#, 1.0),
        (r#"postroom_jobs_total{outcome="parked"}"#, 1.0),
        (r#"postroom_jobs_total{outcome="rejected"}"#, 1.0),
        (r#"postroom_dead_lettered_total{reason="not_json"}"#, 1.0),
        (
            r#"postroom_deliveries_total{level="high",redelivered="false"}"#,
            4.0,
        ),
        (r#"postroom_recipients_total{class="",status="accepted"}"#, 2.0),
        (
            r#"postroom_recipients_total{class="recipient",status="refused"}"#,
            1.0,
        ),
        (r#"postroom_connected{dependency="amqp"}"#, 1.0),
        ("postroom_broker_sessions_total", 1.0),
        ("postroom_in_flight_jobs", 0.0),
        ("postroom_build_info", 1.0),
    ] {
        assert!(
            (worker.metric(series).await - value).abs() < 0.5,
            "{series} is {}",
            worker.metric(series).await
        );
    }
    for series in [
        r#"postroom_stage_duration_seconds_count{stage="decode"}"#,
        r#"postroom_stage_duration_seconds_count{stage="compose"}"#,
        r#"postroom_stage_duration_seconds_count{stage="send"}"#,
        r#"postroom_smtp_phase_duration_seconds_count{phase="connect"}"#,
        r#"postroom_smtp_connects_total{result="ok"}"#,
        r#"postroom_publishes_total{result="confirmed"}"#,
        "postroom_sql_batch_rows_count",
        "postroom_sql_batch_duration_seconds_count",
        "postroom_queue_age_seconds_count",
        "process_resident_memory_bytes",
    ] {
        assert!(worker.metric(series).await >= 1.0, "{series}");
    }
    let page = worker.get("/metrics").await.unwrap().1;
    for family in [
        "postroom_waiting_jobs",
        "postroom_held_jobs",
        "postroom_permits_in_use",
        "postroom_smtp_connections",
        "postroom_outbox_oldest_seconds",
        "postroom_leases_lost_total",
        "postroom_duplicate_sends_total",
        "postroom_upload_bytes_total",
        "postroom_attachment_bytes",
    ] {
        assert!(page.contains(&format!("# TYPE {family} ")), "{family}");
    }
    assert!(!page.contains("acme"), "tenants are no labels");
}

#[tokio::test]
async fn metrics_count_what_happened_and_each_attempt_is_one_line_without_addresses() {
    let mut world = World::ready().await;
    world.set("POSTROOM_LOG", "info");
    world.set("POSTROOM_LOG_FORMAT", "json");
    world.set("POSTROOM_RETRY_BASE", "200ms");
    let script = Script::new()
        .recipient(
            "gone",
            RcptRule::refuse("550 5.1.1 <gone@example.org>: no such user here"),
        )
        .recipient(
            "later",
            RcptRule::defer_first(1, "451 4.7.1 <later@example.org> greylisted"),
        );
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let mut worker = world.start_worker().await;
    for (id, to) in [
        ("sent", "Ann <ann@example.org>"),
        ("gone", "gone@example.org"),
        ("later", "later@example.org"),
    ] {
        world.publish(Level::High, "acme", &job(id, to)).await;
    }
    world
        .publish_bytes(Level::High, "acme", br#"{"to": "dave@example.org""#)
        .await;
    for id in ["sent", "gone", "later"] {
        reports.final_of(id).await;
    }
    reports
        .until(|all| all.iter().any(|r| r.kind() == "mail.rejected"))
        .await;
    crate::support::eventually(std::time::Duration::from_secs(20), || async {
        worker.metric("postroom_in_flight_jobs").await < 0.5
    })
    .await;
    assert_metrics(&worker).await;
    worker.term().await;

    let logs = worker.logs();
    for line in logs.lines() {
        assert!(serde_json::from_str::<Value>(line).is_ok(), "not JSON: {line}");
    }
    assert!(!logs.contains(r#""level":"ERROR""#), "nothing went wrong: {logs}");
    let mut attempts: Vec<(String, u64, String)> = logs
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["message"] == "attempt")
        .map(|line| {
            assert_eq!(line["level"], "INFO", "{line}");
            assert_eq!(line["span"]["tenant"], "acme", "{line}");
            assert_eq!(line["account"], "acme/main", "{line}");
            let job = line["span"]["job"].as_str().unwrap().to_owned();
            let failure = line["failure"].as_str().unwrap_or_default().to_owned();
            (job, line["attempt"].as_u64().unwrap(), failure)
        })
        .collect();
    attempts.sort();
    let names: Vec<_> = attempts
        .iter()
        .map(|(job, number, _)| (job.as_str(), *number))
        .collect();
    assert_eq!(names, [("gone", 1), ("later", 1), ("later", 2), ("sent", 1)]);
    assert!(
        attempts[0].2.contains("<***@example.org>: no such user here"),
        "{attempts:?}"
    );
    for name in ["ann", "gone", "later", "dave"] {
        assert!(!logs.contains(&format!("{name}@")), "{name}@ in {logs}");
    }
}

#[tokio::test]
async fn healthcheck_follows_readiness() {
    let mut world = World::ready().await;
    let worker = world.start_worker().await;
    let address = worker.url("").replace("http://", "");
    world.set("POSTROOM_HTTP_ADDR", address);
    let healthy = world.postroom(&["healthcheck"]).await.success();
    assert!(
        healthy.contains("[+] database ok") && healthy.contains("[+] amqp ok"),
        "{healthy}"
    );
    drop(worker);
    world.postroom(&["healthcheck"]).await.fails_with(1);

    world.set("POSTROOM_AMQP_URL", "amqp://127.0.0.1:1/none");
    let away = world.spawn(&["worker"]);
    away.wait_log("no session with RabbitMQ").await;
    let address = away.url("").replace("http://", "");
    world.set("POSTROOM_HTTP_ADDR", address);
    let unhealthy = world.postroom(&["healthcheck"]).await.fails_with(1);
    assert!(unhealthy.contains("[-] amqp"), "{unhealthy}");
}

#[tokio::test]
async fn all_that_is_wrong_in_the_configuration_is_said_at_once() {
    let mut world = World::new().await;
    let secret = "hunter2-canary";
    world.set("POSTROOM_AMQP_URL", format!("http://u:{secret}@h"));
    world.set("POSTROOM_DATABASE_URL", format!("mysql://u:{secret}@h/d"));
    world.set("POSTROOM_ENCRYPTION_KEYS", secret);
    world.set("POSTROOM_CONCURRENCY", "many");
    world.set("POSTROOM_EGRESS_ALLOW", "10.0.0.0/99");
    world.set("POSTROOM_LOG_FORMAT", "xml");
    for arguments in [&["worker"][..], &["worker", "--lease", "soon"]] {
        let said = world.postroom(arguments).await.fails_with(2);
        for name in [
            "POSTROOM_AMQP_URL",
            "POSTROOM_DATABASE_URL",
            "POSTROOM_ENCRYPTION_KEYS",
            "POSTROOM_CONCURRENCY",
            "POSTROOM_EGRESS_ALLOW",
            "POSTROOM_LOG_FORMAT",
        ] {
            assert!(said.contains(name), "{name} in {said}");
        }
        assert!(
            arguments.len() == 1 || said.contains("--lease") || said.contains("POSTROOM_LEASE"),
            "{said}"
        );
        assert!(!said.contains(secret), "{said}");
    }
    world.unset("POSTROOM_ENCRYPTION_KEYS");
    let said = world.postroom(&["worker"]).await.fails_with(2);
    assert!(said.contains("POSTROOM_ENCRYPTION_KEYS"), "{said}");
}

/// Every command that `--help` lists, and those below it.
#[tokio::test]
async fn every_command_has_a_help() {
    let world = World::new().await;
    let version = world.postroom(&["--version"]).await.success();
    assert_eq!(version.trim(), format!("postroom {}", env!("CARGO_PKG_VERSION")));
    let mut left: Vec<Vec<String>> = vec![Vec::new()];
    let mut seen = Vec::new();
    while let Some(path) = left.pop() {
        let mut arguments = path.clone();
        arguments.push("--help".to_owned());
        let help = world.postroom(&arguments).await.success();
        assert!(help.contains("Usage: postroom"), "{path:?}: {help}");
        let (_, listed) = help.split_once("Commands:\n").unwrap_or_default();
        for line in listed.lines().take_while(|line| !line.is_empty()) {
            // A description that goes on stands further right.
            let Some(name) = line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')) else {
                continue;
            };
            let name = name.split_whitespace().next().unwrap();
            if name != "help" {
                left.push([path.clone(), vec![name.to_owned()]].concat());
            }
        }
        seen.push(path.join(" "));
    }
    for command in [
        "migrate",
        "worker",
        "bridge",
        "healthcheck",
        "send",
        "topology apply",
        "topology check",
        "topology print",
        "key generate",
        "tenant set",
        "account set",
        "endpoint replay",
        "job list",
        "job cancel",
        "job release",
        "dead list",
        "dead show",
        "dead replay",
        "dead drop",
    ] {
        assert!(seen.iter().any(|path| path == command), "{command} in {seen:?}");
    }
}
