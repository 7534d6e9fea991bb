//! What is no job does not stop a worker: it goes to the dead letters with the reason, and its tenant is told.

use std::collections::HashMap;
use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use postroom::level::Level;
use postroom_testkit::smtp::SmtpServer;
use serde_json::{Value, json};

use crate::sends::account;
use crate::support::{Process, World, eventually};

const DEAD: &str = "mail.jobs.dead";

fn good(id: &str, tenant: &str) -> Value {
    json!({"id": id, "tenant": tenant, "to": "ann@example.org", "subject": "s", "text": "t"})
}

/// A valid job with these members changed; `null` removes one.
fn job_with(id: &str, changes: &Value) -> Vec<u8> {
    let mut job = good(id, "acme");
    let members = job.as_object_mut().unwrap();
    for (name, value) in changes.as_object().unwrap() {
        if value.is_null() {
            members.remove(name);
        } else {
            members.insert(name.clone(), value.clone());
        }
    }
    job.to_string().into_bytes()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn text_header(name: &str, value: &str) -> FieldTable {
    let mut headers = FieldTable::default();
    headers.insert(name.into(), AMQPValue::LongString(value.into()));
    headers
}

/// A malformed message and what must be said about it. Its AMQP message id is `id`.
struct Bad {
    id: &'static str,
    key: &'static str,
    body: Vec<u8>,
    properties: BasicProperties,
    reason: &'static str,
    detail: &'static [&'static str],
    /// To whom it is reported.
    told: Option<&'static str>,
}

fn bad(id: &'static str, body: Vec<u8>, reason: &'static str, detail: &'static [&'static str]) -> Bad {
    Bad {
        id,
        key: "high.acme",
        body,
        properties: BasicProperties::default().with_message_id(id.into()),
        reason,
        detail,
        told: Some("acme"),
    }
}

fn body_cases() -> Vec<Bad> {
    let mut invalid_utf8 = job_with("utf8", &json!({}));
    let place = invalid_utf8.len() - 3;
    invalid_utf8[place] = 0xff;
    let duplicated = br#"{"id":"twice","tenant":"acme","to":"a@example.org","subject":"s","text":"t","to":"b@example.org"}"#;
    let nested = format!(
        r#"{{"id":"deep","tenant":"acme","to":"a@example.org","text":"t","metadata":{}1{}}}"#,
        r#"{"a":"#.repeat(40),
        "}".repeat(40)
    );
    vec![
        bad(
            "json",
            b"{\"id\": \"json\",".to_vec(),
            "not_json",
            &["is not JSON"],
        ),
        bad("empty", Vec::new(), "not_json", &["is not JSON"]),
        bad("list", b"[1]".to_vec(), "invalid", &["one message per job"]),
        bad("utf8", invalid_utf8, "not_utf8", &["is not UTF-8"]),
        bad("deep", nested.into_bytes(), "too_deep", &["/metadata/a/a"]),
        bad(
            "unknown-field",
            job_with("unknown-field", &json!({"subjekt": "x"})),
            "invalid",
            &["/subjekt", "subject"],
        ),
        bad("twice", duplicated.to_vec(), "duplicate_key", &["/to"]),
        bad(
            "no-id",
            job_with("no-id", &json!({"id": null})),
            "invalid",
            &["/id"],
        ),
        bad(
            "several",
            job_with("several", &json!({"to": "nobody", "text": 7, "send_at": "soon"})),
            "invalid",
            &["/to", "/text", "/send_at"],
        ),
        bad(
            "mismatch",
            job_with("mismatch", &json!({"tenant": "other"})),
            "tenant_mismatch",
            &["/tenant"],
        ),
        bad(
            "large",
            job_with("large", &json!({"text": "x".repeat(70_000)})),
            "too_large",
            &["65536"],
        ),
        bad(
            "account",
            job_with("account", &json!({"account": "nowhere"})),
            "unknown_account",
            &["/account", "nowhere"],
        ),
    ]
}

fn property_cases() -> Vec<Bad> {
    let encoded = |mut case: Bad, encoding: &str| {
        case.properties = case.properties.with_content_encoding(encoding.into());
        case
    };
    let no_gzip = bad("gzip", job_with("gzip", &json!({})), "bad_encoding", &["gzip"]);
    let mut cut = gzip(&job_with("cut", &json!({})));
    cut.truncate(cut.len() / 2);
    let cut = bad("cut", cut, "bad_encoding", &["gzip"]);
    let bomb = gzip(&job_with("bomb", &json!({"text": "x".repeat(2 << 20)})));
    let bomb = bad("bomb", bomb, "too_large", &["1048576", "decompressed"]);
    let encoding = bad("br", job_with("br", &json!({})), "bad_encoding", &["br"]);
    let mut kind = bad(
        "type",
        job_with("type", &json!({})),
        "wrong_type",
        &["mail.job.v1"],
    );
    kind.properties = kind.properties.with_type("mail.job.v2".into());
    let mut content = bad(
        "content",
        job_with("content", &json!({})),
        "wrong_content_type",
        &["application/json"],
    );
    content.properties = content.properties.with_content_type("text/html".into());
    let mut contract = bad(
        "contract",
        job_with("contract", &json!({})),
        "invalid",
        &["x-contract"],
    );
    contract.properties = contract.properties.with_headers(text_header("x-contract", "one"));
    // The tenant of the key is who is told, even where it does not exist: somebody may listen there.
    let tenant = Bad {
        key: "high.nobody",
        told: Some("nobody"),
        ..bad(
            "tenant",
            good("tenant", "nobody").to_string().into_bytes(),
            "unknown_tenant",
            &["/tenant", "nobody"],
        )
    };
    let nameless = Bad {
        key: "high.Ü",
        told: None,
        ..bad("nameless", b"{}".to_vec(), "invalid", &["/id", "/tenant"])
    };
    vec![
        encoded(no_gzip, "gzip"),
        encoded(cut, "gzip"),
        encoded(bomb, "gzip"),
        encoded(encoding, "br"),
        kind,
        content,
        contract,
        tenant,
        nameless,
    ]
}

/// `dead list --json`, by AMQP message id.
async fn dead_letters(world: &World) -> HashMap<String, Value> {
    let listed = world.postroom(&["dead", "list", "--json"]).await.success();
    let letters = listed
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    letters
        .map(|letter| {
            let id = letter["message_id"].as_str().unwrap_or_default().to_owned();
            (id, letter)
        })
        .collect()
}

async fn assert_healthy(worker: &Process) {
    assert_eq!(worker.get("/livez").await.unwrap().0, 200);
    assert!(worker.ready().await);
}

#[tokio::test]
async fn whatever_is_no_job_is_dead_lettered_with_the_reason_and_the_worker_goes_on() {
    let mut world = World::ready().await;
    world.set("POSTROOM_JOB_MAX_BYTES", "64KiB");
    world.set("POSTROOM_JOB_MAX_INFLATED_BYTES", "1MiB");
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;

    let mut cases = body_cases();
    cases.extend(property_cases());
    let amqp = world.amqp().await;
    for case in &cases {
        amqp.publish("mail.jobs", case.key, case.properties.clone(), &case.body)
            .await;
    }
    world.publish(Level::High, "acme", &good("good", "acme")).await;

    assert_eq!(reports.final_of("good").await.kind(), "mail.sent");
    world.wait_depth(DEAD, cases.len() as u32).await;
    let told = cases.iter().filter(|case| case.told.is_some()).count();
    let all = reports
        .until(|all| all.iter().filter(|r| r.kind() == "mail.rejected").count() >= told)
        .await
        .to_vec();
    let letters = dead_letters(&world).await;
    for case in &cases {
        let letter = &letters[case.id];
        assert_eq!(letter["reason"], case.reason, "{}: {letter}", case.id);
        let detail = letter["detail"].as_str().unwrap();
        for part in case.detail {
            assert!(detail.contains(part), "{}: {part} in {detail}", case.id);
        }
        assert_eq!(letter["queue"], "mail.jobs.high", "{letter}");
        let Some(tenant) = case.told else { continue };
        let reported = all.iter().any(|report| {
            report.kind() == "mail.rejected"
                && report.tenant() == tenant
                && report.reason() == case.reason
                && report.json["data"]["errors"].to_string().len() > 2
        });
        assert!(reported, "{}: {letter}", case.id);
    }
    // Each was told once, and nobody else's tenant was.
    assert_eq!(all.iter().filter(|r| r.kind() == "mail.rejected").count(), told);
    assert!(all.iter().all(|r| r.tenant() != "other"));
    let rejected = worker.metric(r#"postroom_jobs_total{outcome="rejected"}"#).await;
    assert_eq!(rejected.round() as usize, cases.len());
    assert_eq!(server.received_count(), 1);
    assert_healthy(&worker).await;
}

#[tokio::test]
async fn a_dead_letter_is_listed_shown_replayed_when_cured_and_dropped() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    for id in ["early", "never"] {
        world.publish(Level::Low, "late", &good(id, "late")).await;
    }
    world.wait_depth(DEAD, 2).await;

    let listed = world
        .postroom(&["dead", "list", "--json", "--id", "early"])
        .await
        .success();
    let letter: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(letter["reason"], "unknown_tenant", "{letter}");
    assert_eq!(letter["tenant"], "late");
    assert_eq!(letter["key"], "low.late");
    let shown = world.postroom(&["dead", "show", "--id", "early"]).await.success();
    assert!(
        shown.contains("ann@example.org") && shown.contains("x-dead-ts"),
        "{shown}"
    );
    // Looking takes nothing away; the broker puts back what was looked at when the connection has closed.
    world.wait_depth(DEAD, 2).await;

    account(&world, "late", &server, &[]).await;
    let replayed = world
        .postroom(&["dead", "replay", "--id", "early"])
        .await
        .success();
    assert!(replayed.contains("1 replayed"), "{replayed}");
    reports
        .until(|all| all.iter().any(|r| r.job() == "early" && r.kind() == "mail.sent"))
        .await;
    let dropped = world
        .postroom(&["dead", "drop", "--reason", "unknown_tenant"])
        .await
        .success();
    assert!(dropped.contains("1 dropped"), "{dropped}");
    world.wait_depth(DEAD, 0).await;
    assert_eq!(server.received_count(), 1);
    let unspecific = world.postroom(&["dead", "drop"]).await.fails_with(2);
    assert!(unspecific.contains("--all"), "{unspecific}");
    assert_healthy(&worker).await;
}

#[tokio::test]
async fn a_job_of_a_newer_contract_is_kept_for_a_newer_worker() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let mut worker = world.start_worker().await;
    let mut newer = good("newer", "acme");
    newer["hologram"] = json!("a field of tomorrow");
    let properties = BasicProperties::default()
        .with_correlation_id("c-1".into())
        .with_headers(text_header("x-contract", "1.9"));
    world
        .amqp()
        .await
        .publish("mail.jobs", "high.acme", properties, newer.to_string().as_bytes())
        .await;
    worker.wait_log("left to newer workers").await;
    world.publish(Level::High, "acme", &good("now", "acme")).await;
    assert_eq!(reports.final_of("now").await.kind(), "mail.sent");
    // It comes around, without being counted as delivered too often.
    eventually(std::time::Duration::from_mins(1), || async {
        worker.metric(r#"postroom_jobs_total{outcome="too_new"}"#).await >= 2.0
    })
    .await;
    assert!(worker.term().await.success());
    world.wait_depth("mail.jobs.high", 1).await;
    let kept = world.amqp().await.get("mail.jobs.high").await.unwrap();
    assert_eq!(kept.data, newer.to_string().as_bytes());
    assert_eq!(kept.routing_key.as_str(), "high.acme");
    assert_eq!(kept.properties.correlation_id().as_ref().unwrap().as_str(), "c-1");
    let headers = kept.properties.headers().as_ref().unwrap().inner();
    assert_eq!(headers["x-contract"], AMQPValue::LongString("1.9".into()));
    let deliveries = headers
        .get("x-delivery-count")
        .and_then(AMQPValue::as_long_long_int);
    assert!(deliveries.unwrap_or(0) <= 1, "{headers:?}");
    assert_eq!(world.depth(DEAD).await, 0);
    assert_eq!(reports.all().len(), 1);
    assert_eq!(server.received_count(), 1);
}

#[tokio::test]
async fn a_job_older_than_the_ledgers_memory_waits_for_a_human() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    let day = 24 * 60 * 60;
    let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap();
    for (id, age) in [("young", 20 * day), ("old", 40 * day)] {
        let properties = BasicProperties::default().with_timestamp(now - age);
        let body = good(id, "acme").to_string();
        let amqp = world.amqp().await;
        amqp.publish("mail.jobs", "high.acme", properties, body.as_bytes())
            .await;
    }
    assert_eq!(reports.final_of("young").await.kind(), "mail.sent");
    let told = reports.final_of("old").await;
    assert_eq!(
        (told.kind(), told.reason()),
        ("mail.rejected", "older_than_ledger")
    );
    world.wait_depth(DEAD, 1).await;
    world.postroom(&["dead", "replay", "--id", "old"]).await.success();
    reports
        .until(|all| all.iter().any(|r| r.job() == "old" && r.kind() == "mail.sent"))
        .await;
    assert_eq!(server.received_count(), 2);
    let late = worker.count("postroom_queue_age_seconds_count").await;
    assert_eq!(late, 1, "what was replayed is not late");
}

#[tokio::test]
async fn a_dead_job_with_a_plain_override_is_sent_through_it_when_replayed() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut job = good("early", "late");
    job["from"] = json!("shop@example.com");
    job["smtp_override"] = json!({"host": "127.0.0.1", "port": server.port(), "tls": "none"});
    world.publish(Level::High, "late", &job).await;
    world.wait_depth(DEAD, 1).await;
    world.postroom(&["tenant", "set", "late"]).await.success();
    world
        .postroom(&["dead", "replay", "--reason", "unknown_tenant"])
        .await
        .success();
    reports
        .until(|all| {
            all.iter()
                .any(|r| r.job() == "early" && r.kind() != "mail.rejected")
        })
        .await;
    assert_eq!(reports.all().last().unwrap().kind(), "mail.sent");
    assert_eq!(server.received_count(), 1);
}

#[tokio::test]
async fn what_a_file_of_a_command_may_hold_is_bounded() {
    let mut world = World::ready().await;
    world.postroom(&["tenant", "set", "acme"]).await.success();
    let long = vec![b'x'; 1 << 20];
    let account = "account set acme main --host h.example --port 25 --tls none";
    for (line, input, says) in [
        (
            "send --level high /dev/zero".to_owned(),
            &b""[..],
            "more than 15 MiB",
        ),
        (
            format!("{account} --username u --password-stdin"),
            &long,
            "longer than 4096 bytes",
        ),
        (format!("{account} --ca-file /dev/zero"), b"", "/dev/zero"),
        (
            "endpoint set acme --url https://h.example/ --bearer-stdin".to_owned(),
            &long,
            "too long",
        ),
        (
            "endpoint set acme --url https://h.example/ --secret-stdin".to_owned(),
            &long,
            "too long",
        ),
    ] {
        let words: Vec<_> = line.split(' ').collect();
        let finished = world.postroom_stdin(&words, input).await;
        assert!(
            finished.code != 0 && finished.stderr.contains(says),
            "{line}: {finished:?}"
        );
        assert!(finished.stderr.len() < 2000, "{line}");
    }
    world.unset("POSTROOM_ENCRYPTION_KEYS");
    world.set("POSTROOM_ENCRYPTION_KEYS_FILE", "/dev/zero");
    let said = world.postroom(&["key", "rotate"]).await.fails_with(2);
    assert!(said.contains("too large for a secret"), "{said}");
}
