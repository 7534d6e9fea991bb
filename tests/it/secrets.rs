//! `smtp_override`, and that no password is ever found where it does not belong.

use std::time::Duration;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use postroom::level::Level;
use postroom_testkit::smtp::{Action, Phase, RcptRule, Script, SmtpServer};
use postroom_testkit::webhook::WebhookReceiver;
use serde_json::{Value, json};

use crate::sends::account_with_password;
use crate::support::{Received, Reports, World};

const LIMIT: Duration = Duration::from_mins(1);

fn job(id: &str, tenant: &str, smtp_override: &Value) -> Value {
    json!({
        "id": id, "tenant": tenant, "from": "shop@example.com", "to": "ann@example.org", "subject": "s",
        "text": "t", "smtp_override": smtp_override,
    })
}

fn server_of(server: &SmtpServer, password: &str) -> Value {
    json!({
        "host": "127.0.0.1", "port": server.port(), "tls": "none", "username": "u", "password": password,
        "allow_plaintext_auth": true,
    })
}

/// Compact JWE as JOSE libraries make it (RFC 7516 §5.1) with the world's key for overrides.
fn jwe(world: &World, payload: &Value) -> String {
    let (kid, key) = world.variable("POSTROOM_OVERRIDE_KEYS").split_once(':').unwrap();
    let header = json!({"alg": "dir", "enc": "A256GCM", "kid": kid}).to_string();
    let header = URL_SAFE_NO_PAD.encode(header);
    let iv: [u8; 12] = rand::random();
    let payload = payload.to_string();
    let message = Payload {
        msg: payload.as_bytes(),
        aad: header.as_bytes(),
    };
    let cipher = Aes256Gcm::new_from_slice(&STANDARD.decode(key).unwrap()).unwrap();
    let sealed = cipher.encrypt(&iv.into(), message).unwrap();
    let (text, tag) = sealed.split_at(sealed.len() - 16);
    let parts = [&iv[..], text, tag].map(|part| URL_SAFE_NO_PAD.encode(part));
    format!("{header}..{}", parts.join("."))
}

fn sealed(world: &World, server: &SmtpServer, tenant: &str, lives: SignedDuration) -> Value {
    let mut payload = server_of(server, "once");
    payload["tenant"] = json!(tenant);
    payload["exp"] = json!((Timestamp::now() + lives).as_second());
    json!(jwe(world, &payload))
}

async fn tenant_world() -> World {
    let mut world = World::ready().await;
    world.set("POSTROOM_RETRY_BASE", "200ms");
    world.postroom(&["tenant", "set", "acme"]).await.success();
    world
}

async fn sent_by_override(world: &World, reports: &mut Reports, job: &Value) -> Received {
    world.publish(Level::High, "acme", job).await;
    let report = reports.final_of(job["id"].as_str().unwrap()).await;
    assert_eq!(report.kind(), "mail.sent", "{}", report.json);
    assert_eq!(report.json["data"]["sender"]["via"], "override");
    report
}

#[tokio::test]
async fn an_override_in_clear_or_sealed_sends_one_job_and_its_connection_is_not_kept() {
    let world = tenant_world().await;
    let server = SmtpServer::builder().auth("u", "once").start().await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    sent_by_override(
        &world,
        &mut reports,
        &job("plain", "acme", &server_of(&server, "once")),
    )
    .await;
    let token = sealed(&world, &server, "acme", SignedDuration::from_hours(1));
    sent_by_override(&world, &mut reports, &job("sealed", "acme", &token)).await;
    server.wait_closed(LIMIT).await;
    let counters = server.counters();
    assert_eq!((counters.connections, counters.auth_ok), (2, 2));

    for (id, token, reason) in [
        (
            "expired",
            sealed(&world, &server, "acme", SignedDuration::from_secs(-5)),
            "override_expired",
        ),
        (
            "foreign",
            sealed(&world, &server, "other", SignedDuration::from_hours(1)),
            "override_other_tenant",
        ),
        ("broken", json!("eyJh..aaaa.bbbb.cccc"), "override_invalid"),
    ] {
        world.publish(Level::High, "acme", &job(id, "acme", &token)).await;
        let report = reports.final_of(id).await;
        assert_eq!((report.kind(), report.reason()), ("mail.failed", reason));
    }
    assert_eq!(server.received_count(), 2);
}

#[tokio::test]
async fn a_parked_override_is_sealed_in_the_database_and_works_afterwards() {
    let world = tenant_world().await;
    let script = Script::new().recipient("ann", RcptRule::defer_first(1, "451 4.7.1 Greylisted"));
    let server = SmtpServer::builder()
        .auth("u", "once-canary")
        .script(script)
        .start()
        .await;
    let mut reports = world.reports().await;
    let mut worker = world.start_worker().await;
    let mut later = job("later", "acme", &server_of(&server, "once-canary"));
    later["send_at"] = json!((Timestamp::now() + SignedDuration::from_secs(4)).to_string());
    world.publish(Level::High, "acme", &later).await;
    let sql = world.sql().await;
    let stored = || async {
        let rows = sql
            .query("SELECT body FROM job WHERE body IS NOT NULL", &[])
            .await
            .unwrap();
        rows.first()
            .map(|row| String::from_utf8_lossy(&row.get::<_, Vec<u8>>(0)).into_owned())
    };
    let body = crate::support::eventually_some(LIMIT, &stored).await;
    assert!(body.contains(r#""smtp_override":"v1:"#), "{body}");
    assert!(!body.contains("canary") && !body.contains("127.0.0.1"), "{body}");
    // Another process opens it.
    assert!(worker.term().await.success());
    let _worker = world.start_worker().await;
    let report = reports.final_of("later").await;
    assert_eq!(report.kind(), "mail.sent", "{}", report.json);
    assert_eq!(report.json["data"]["sender"]["via"], "override");
    assert_eq!(report.json["data"]["attempt"], 2, "deferred once by the server");
    assert_eq!(server.received_count(), 1);
    assert!(stored().await.is_none(), "the body is deleted at the end");
}

/// Every form in which a password might turn up.
fn forms(password: &str) -> Vec<String> {
    let mut forms = vec![password.to_owned(), STANDARD.encode(password)];
    forms.push(STANDARD.encode(format!("\0u\0{password}")));
    // As Postgres and Debug show bytes.
    forms.push(format!("{:02x?}", password.as_bytes()).replace([',', ' ', '[', ']'], ""));
    forms.push(format!("{:?}", password.as_bytes()).replace(['[', ']'], ""));
    // Inside a longer text in base64: whatever its offset there, its middle looks like one of these.
    for offset in 0..3 {
        let shifted = STANDARD.encode(format!("{}{password}", "x".repeat(offset)));
        forms.push(shifted[4..shifted.len() - 4].to_owned());
    }
    forms
}

struct Haystack(Vec<(String, Vec<u8>)>);

impl Haystack {
    fn add(&mut self, name: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        self.0.push((name.into(), bytes.into()));
    }

    /// Shows that a search would have found something.
    fn assert_holds(&self, name: &str, text: &str) {
        let holds = |(own, bytes): &(String, Vec<u8>)| {
            own.contains(name) && bytes.windows(text.len()).any(|window| window == text.as_bytes())
        };
        assert!(self.0.iter().any(holds), "no {text} in any {name}");
    }

    fn assert_without(&self, passwords: &[&str]) {
        for needle in passwords.iter().flat_map(|password| forms(password)) {
            for (name, bytes) in &self.0 {
                let found = bytes
                    .windows(needle.len())
                    .any(|window| window == needle.as_bytes());
                assert!(
                    !found,
                    "{needle} is in {name}: {}",
                    String::from_utf8_lossy(bytes)
                );
            }
        }
    }
}

/// Every row of every table, as text.
async fn dump(world: &World, hay: &mut Haystack) {
    let sql = world.sql().await;
    let tables = "SELECT quote_ident(table_schema) || '.' || quote_ident(table_name) FROM information_schema.tables \
                  WHERE table_type = 'BASE TABLE' AND table_schema NOT IN ('pg_catalog', 'information_schema')";
    let mut count = 0;
    for table in sql.query(tables, &[]).await.unwrap() {
        let table: String = table.get(0);
        // bytea as escaped text, so that what is in it is readable.
        let rows = format!("SET bytea_output = 'escape'; SELECT t::text FROM {table} t");
        for message in sql.simple_query(&rows).await.unwrap() {
            if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
                hay.add(table.clone(), row.get(0).unwrap_or_default());
                count += 1;
            }
        }
    }
    assert!(count > 5, "the dump has found the rows");
}

/// Everything in the queues that keep things.
async fn drain(world: &World, hay: &mut Haystack) -> usize {
    let mut found = 0;
    for queue in [
        "mail.jobs.dead",
        "mail.reports.bridge",
        "mail.reports.dead",
        "mail.unroutable",
    ] {
        while let Some(message) = world.amqp().await.get(queue).await {
            for (name, value) in message.properties.headers().iter().flat_map(FieldTable::inner) {
                let bytes = match value {
                    AMQPValue::LongString(text) => text.as_bytes().to_vec(),
                    other => format!("{other:?}").into_bytes(),
                };
                hay.add(format!("header {name} in {queue}"), bytes);
            }
            hay.add(queue, message.data);
            found += usize::from(queue == "mail.jobs.dead");
        }
    }
    found
}

const ACCOUNT: &str = "account-Kanarienvogel-1";
const OVERRIDE: &str = "override-Kanarienvogel-2";
const WRONG: &str = "wrong-Kanarienvogel-3";
const BEARER: &str = "bearer-Kanarienvogel-4";

/// Takes [`ACCOUNT`] and [`OVERRIDE`].
async fn open_server() -> SmtpServer {
    let script = Script::new()
        .recipient("deferred", RcptRule::defer_first(1, "451 4.7.1 Greylisted"))
        .recipient("refused", RcptRule::refuse("550 5.1.1 No such user"));
    let server = SmtpServer::builder().auth("u", ACCOUNT).auth("u", OVERRIDE);
    server.script(script).start().await
}

/// Refuses [`WRONG`] and quotes what it was sent, as some servers do.
async fn closed_server() -> SmtpServer {
    let sent = STANDARD.encode(format!("\0u\0{WRONG}"));
    let quoted = format!("500 5.5.1 Unknown command AUTH PLAIN {sent}");
    let script = Script::new().on(Phase::Auth, Action::Reply(quoted));
    SmtpServer::builder().auth("u", "p").script(script).start().await
}

fn plain(id: &str, field: &str, value: Value) -> Value {
    let mut job = job(id, "acme", &Value::Null);
    job["account"] = json!("main");
    job[field] = value;
    job
}

fn overridden(id: &str, server: &SmtpServer, field: &str, value: Value) -> Value {
    let mut job = job(id, "acme", &server_of(server, OVERRIDE));
    job[field] = value;
    job
}

/// Jobs that are sent, deferred, refused, parked, and refused at the login.
fn jobs(server: &SmtpServer, closed: &SmtpServer) -> [Value; 8] {
    let soon = json!((Timestamp::now() + SignedDuration::from_secs(2)).to_string());
    [
        plain("sent", "subject", json!("s")),
        plain("deferred", "to", json!("deferred@example.org")),
        plain("refused", "to", json!("refused@example.org")),
        plain("closed", "account", json!("closed")),
        overridden("override-sent", server, "subject", json!("s")),
        overridden("override-later", server, "send_at", soon),
        overridden("override-refused", server, "to", json!("refused@example.org")),
        job("override-closed", "acme", &server_of(closed, WRONG)),
    ]
}

/// Publishes what ends in the dead letters: invalid, of a stranger, misspelt, cut off, said to be compressed, of another
/// type. Returns how many.
async fn publish_bad(world: &World, server: &SmtpServer) -> u32 {
    let invalid = overridden("override-invalid", server, "subjekt", json!("s")).to_string();
    let stranger = job("stranger", "nobody", &server_of(server, OVERRIDE)).to_string();
    let misspelt = invalid.replace("smtp_override", "smtp_overide");
    let cut = &invalid[..invalid.len() - 3];
    let none = BasicProperties::default;
    let bad = [
        ("high.acme", none(), invalid.as_str()),
        ("high.nobody", none(), &stranger),
        ("high.acme", none(), &misspelt),
        ("high.acme", none(), cut),
        ("high.acme", none().with_content_encoding("br".into()), &invalid),
        ("high.acme", none().with_type("x".into()), &invalid),
    ];
    let count = bad.len() as u32;
    let amqp = world.amqp().await;
    for (key, properties, body) in bad {
        amqp.publish("mail.jobs", key, properties, body.as_bytes()).await;
    }
    world.wait_depth("mail.jobs.dead", count).await;
    count
}

/// What commands print.
async fn ask(world: &World, hay: &mut Haystack) {
    for line in [
        "dead show --all",
        "account show acme main --json",
        "account list acme",
        "endpoint show acme --json",
        "job list --json",
        "job show acme sent --json",
    ] {
        let arguments: Vec<_> = line.split_whitespace().collect();
        hay.add(line, world.postroom(&arguments).await.success());
    }
}

/// So that a search that finds nothing is known to have looked.
fn assert_complete(hay: &Haystack) {
    for (name, text) in [
        ("log of the worker", "AUTH PLAIN ***"),
        ("log of the bridge", "ready"),
        ("report", "greylisted"),
        ("webhook", "mail.sent"),
        (".job", "smtp_override"),
        (".account", "v1:test:"),
        ("mail.jobs.dead", "v1:test:"),
        ("header x-dead-detail in mail.jobs.dead", "subjekt"),
        ("dead show", "x-dead-sealed"),
        ("metrics", "postroom_jobs_total"),
    ] {
        hay.assert_holds(name, text);
    }
}

#[tokio::test]
async fn no_password_is_in_logs_database_queues_reports_or_metrics() {
    let mut world = tenant_world().await;
    let everything =
        "trace,lapin=trace,tokio_postgres=trace,rustls=trace,lettre=trace,reqwest=trace,hyper=trace";
    world.set("POSTROOM_LOG", everything);
    let (server, closed) = (open_server().await, closed_server().await);
    account_with_password(&world, "main", &server, ACCOUNT, "").await;
    account_with_password(&world, "closed", &closed, WRONG, "--max-attempts 2").await;
    let receiver = WebhookReceiver::start().await.unwrap();
    let url = receiver.url("/hook");
    let endpoint = [
        "endpoint",
        "set",
        "acme",
        "--url",
        &url,
        "--bearer-stdin",
        "--generate-secret",
    ];
    world.postroom_stdin(&endpoint, BEARER.as_bytes()).await.success();
    let mut reports = world.reports().await;
    let (mut worker, mut bridge) = (world.start_worker().await, world.start_bridge().await);

    let jobs = jobs(&server, &closed);
    for job in &jobs {
        world.publish(Level::High, "acme", job).await;
    }
    let bad = publish_bad(&world, &server).await;
    // While `override-closed` waits for its next try, everything is where it may be found.
    let closed_told = reports.until(|all| all.iter().any(|r| r.job() == "override-closed"));
    closed_told.await;
    let mut hay = Haystack(Vec::new());
    dump(&world, &mut hay).await;
    for job in &jobs[..7] {
        reports.final_of(job["id"].as_str().unwrap()).await;
    }
    for request in receiver.wait_for(7, LIMIT).await.unwrap() {
        assert_eq!(request.header("authorization"), format!("Bearer {BEARER}"));
        hay.add("webhook", request.body.to_vec());
    }
    dump(&world, &mut hay).await;
    ask(&world, &mut hay).await;
    assert_eq!(drain(&world, &mut hay).await, bad as usize);
    for report in reports.all() {
        hay.add("report", report.json.to_string());
    }
    for (name, process) in [("worker", &mut worker), ("bridge", &mut bridge)] {
        hay.add("metrics", process.get("/metrics").await.unwrap().1);
        process.term().await;
        hay.add(format!("log of the {name}"), process.logs());
    }
    assert!(server.counters().auth_ok >= 2, "the passwords were used");
    assert_complete(&hay);
    hay.assert_without(&[ACCOUNT, OVERRIDE, WRONG, BEARER]);
}
