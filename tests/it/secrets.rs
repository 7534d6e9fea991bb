//! `smtp_override`, and that no password is ever found where it does not belong.

use std::time::Duration;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use postroom::job::decode::{Incoming, decode};
use postroom::level::Level;
use postroom_testkit::s3::{S3Server, SECRET_KEY};
use postroom_testkit::smtp::{Action, Phase, RcptRule, Script, SmtpServer};
use postroom_testkit::webhook::WebhookReceiver;
use reqwest::Method;
use serde_json::{Value, json};

use crate::sends::account_with_password;
use crate::support::{Finished, Process, Received, Reports, World};

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

/// Everything in any queue that outlives its connection. Answers how many dead letters there were.
async fn drain(world: &World, hay: &mut Haystack) -> usize {
    let mut found = 0;
    let path = format!(
        "queues/{}?disable_stats=true&enable_queue_totals=true",
        world.scratch().name()
    );
    let listed = world
        .scratch()
        .servers()
        .management(Method::GET, &path, None)
        .await
        .unwrap();
    let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
    let kept = listed.iter().filter(|queue| queue["exclusive"] != true);
    let names: Vec<&str> = kept.map(|queue| queue["name"].as_str().unwrap()).collect();
    assert!(names.len() >= 8 && names.contains(&"mail.jobs.dead"), "{names:?}");
    for queue in names {
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

const AMQP: &str = "amqp-Kanarienvogel-5";
const DATABASE: &str = "database-Kanarienvogel-6";
const BASIC: &str = "basic-Kanarienvogel-7";

/// A world whose passwords in URLs are canaries, and whose large files go to an object store.
async fn canary_world(s3: &S3Server) -> World {
    let mut world = World::new().await;
    let everything = "trace,lapin=trace,tokio_postgres=trace,rustls=trace,lettre=trace,reqwest=trace,hyper=trace,object_store=trace";
    world.set("POSTROOM_LOG", everything);
    world.set("POSTROOM_RETRY_BASE", "200ms");
    for (name, value) in s3.env() {
        world.set(&name, value);
    }
    world.set("POSTROOM_STORAGE_URL", "s3://mail/files");
    let name = world.scratch().name().to_owned();
    let servers = world.scratch().servers().clone();
    let user = json!({"password": AMQP, "tags": ""}).to_string();
    let rights = r#"{"configure": ".*", "write": ".*", "read": ".*"}"#;
    for (path, body) in [
        (format!("users/{name}"), user.as_str()),
        (format!("permissions/{name}/{name}"), rights),
    ] {
        servers.management(Method::PUT, &path, Some(body)).await.unwrap();
    }
    let mut amqp = url::Url::parse(world.amqp_url()).unwrap();
    amqp.set_username(&name).unwrap();
    amqp.set_password(Some(AMQP)).unwrap();
    world.set("POSTROOM_AMQP_URL", amqp);
    let role =
        format!("CREATE ROLE {name} LOGIN PASSWORD '{DATABASE}'; ALTER DATABASE {name} OWNER TO {name}");
    servers.sql(&role).await.unwrap();
    let mut database = url::Url::parse(world.database_url()).unwrap();
    database.set_username(&name).unwrap();
    database.set_password(Some(DATABASE)).unwrap();
    world.set("POSTROOM_DATABASE_URL", database);
    world.prepare().await;
    let policy = "tenant set acme --large-file-bytes 1000 --large-file-action rewrite";
    let policy: Vec<_> = policy.split(' ').collect();
    world.postroom(&policy).await.success();
    world
}

/// The keys themselves, without their ids.
fn keys_of(world: &World) -> Vec<String> {
    let of = |name| world.variable(name).split_once(':').unwrap().1.to_owned();
    ["POSTROOM_ENCRYPTION_KEYS", "POSTROOM_OVERRIDE_KEYS"]
        .map(of)
        .to_vec()
}

/// What others on the machine see of a process, and that it leaves nothing when it crashes.
fn look_at(process: &Process, hay: &mut Haystack) {
    let of = |file: &str| std::fs::read(format!("/proc/{}/{file}", process.pid())).unwrap_or_default();
    hay.add("command line", of("cmdline"));
    let limits = String::from_utf8_lossy(&of("limits")).into_owned();
    let core = limits.lines().find(|line| line.starts_with("Max core file size"));
    // Other systems have no such file.
    if let Some(core) = core {
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    }
}

/// Values of the library as `{:?}` shows them.
fn debug_of(world: &World, hay: &mut Haystack, jobs: &[Value]) {
    hay.add(
        "Debug of settings",
        format!("{:?} {:?}", world.broker_config(), world.database_config()),
    );
    let keys = postroom::config::Keys {
        encryption: world.variable("POSTROOM_ENCRYPTION_KEYS").into(),
        overrides: Some(world.variable("POSTROOM_OVERRIDE_KEYS").into()),
    };
    hay.add(
        "Debug of keys",
        format!(
            "{keys:?} {:?}",
            postroom::secret::Keyring::parse(&keys.encryption)
        ),
    );
    for job in jobs {
        let body = job.to_string();
        let incoming = Incoming {
            body: body.as_bytes(),
            ..Incoming::default()
        };
        let decoded = decode(&incoming, &postroom::config::JobLimits::default()).unwrap();
        hay.add("Debug of a job", format!("{incoming:?} {decoded:?}"));
    }
}

/// What commands print.
async fn ask(world: &World, hay: &mut Haystack) {
    for line in [
        "dead show --all",
        "account show acme main --json",
        "account list acme",
        "endpoint show acme --json",
        "endpoint show acme basic --json",
        "endpoint list acme",
        "job list --tenant acme --json",
        "job show acme sent --json",
        "tenant show acme --json",
        "topology print",
        "topology check",
        "migrate",
        "key rotate",
        "help",
        "worker --help",
        "bridge --help",
        "account set --help",
        "endpoint set --help",
    ] {
        let arguments: Vec<_> = line.split_whitespace().collect();
        let finished = world.postroom(&arguments).await;
        hay.add(format!("standard error of {line}"), finished.stderr.clone());
        hay.add(line, finished.success());
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

/// Two endpoints with all kinds of credentials; answers with the signing secret.
async fn endpoints(world: &World, receiver: &WebhookReceiver) -> String {
    let url = receiver.url("/hook");
    let set = [
        "endpoint",
        "set",
        "acme",
        "--url",
        &url,
        "--bearer-stdin",
        "--generate-secret",
    ];
    let signing = world.postroom_stdin(&set, BEARER.as_bytes()).await.success();
    let signing = signing
        .split_whitespace()
        .find_map(|word| word.strip_prefix("whsec_"))
        .unwrap()
        .to_owned();
    let basic = receiver.url("/basic");
    let set = [
        "endpoint",
        "set",
        "acme",
        "basic",
        "--url",
        &basic,
        "--basic-user",
        "b",
        "--password-stdin",
    ];
    world.postroom_stdin(&set, BASIC.as_bytes()).await.success();
    signing
}

/// What came to them, with the credentials it should have.
async fn hooks(receiver: &WebhookReceiver, hay: &mut Haystack) {
    for request in receiver.wait_for(16, LIMIT).await.unwrap() {
        let authorization = match request.path.as_str() {
            "/hook" => format!("Bearer {BEARER}"),
            _ => format!("Basic {}", STANDARD.encode(format!("b:{BASIC}"))),
        };
        assert_eq!(request.header("authorization"), authorization);
        hay.add("webhook", request.body.to_vec());
    }
}

#[tokio::test]
async fn no_password_is_in_logs_database_queues_reports_or_metrics() {
    let s3 = S3Server::start("mail").await.unwrap();
    let world = canary_world(&s3).await;
    let (server, closed) = (open_server().await, closed_server().await);
    account_with_password(&world, "main", &server, ACCOUNT, "").await;
    account_with_password(&world, "closed", &closed, WRONG, "--max-attempts 2").await;
    let receiver = WebhookReceiver::start().await.unwrap();
    let signing = endpoints(&world, &receiver).await;
    let mut reports = world.reports().await;
    let (mut worker, mut bridge) = (world.start_worker().await, world.start_bridge().await);

    let mut jobs = jobs(&server, &closed).to_vec();
    let file = json!([{"filename": "large.txt", "base64": STANDARD.encode("x".repeat(2000))}]);
    jobs.insert(0, plain("linked", "attachments", file));
    for job in &jobs {
        world.publish(Level::High, "acme", job).await;
    }
    let bad = publish_bad(&world, &server).await;
    // While `override-closed` waits for its next try, everything is where it may be found.
    let closed_told = reports.until(|all| all.iter().any(|r| r.job() == "override-closed"));
    closed_told.await;
    let mut hay = Haystack(Vec::new());
    dump(&world, &mut hay).await;
    for job in &jobs[..8] {
        reports.final_of(job["id"].as_str().unwrap()).await;
    }
    hooks(&receiver, &mut hay).await;
    dump(&world, &mut hay).await;
    debug_of(&world, &mut hay, &jobs);
    ask(&world, &mut hay).await;
    assert_eq!(drain(&world, &mut hay).await, bad as usize);
    for report in reports.all() {
        hay.add("report", report.json.to_string());
    }
    for (name, process) in [("worker", &mut worker), ("bridge", &mut bridge)] {
        look_at(process, &mut hay);
        hay.add("metrics", process.get("/metrics").await.unwrap().1);
        process.term().await;
        hay.add(format!("log of the {name}"), process.logs());
    }
    assert!(world.amqp_url().contains(AMQP) && world.database_url().contains(DATABASE));
    assert!(server.counters().auth_ok >= 2, "the passwords were used");
    assert!(!s3.objects().is_empty(), "the key of the object store was used");
    assert_complete(&hay);
    let keys = keys_of(&world);
    let mut secrets = vec![
        ACCOUNT, OVERRIDE, WRONG, BEARER, BASIC, AMQP, DATABASE, SECRET_KEY, &signing,
    ];
    secrets.extend(keys.iter().map(String::as_str));
    hay.assert_without(&secrets);
    let (servers, name) = (
        world.scratch().servers().clone(),
        world.scratch().name().to_owned(),
    );
    drop((worker, bridge, reports, world));
    servers
        .management(Method::DELETE, &format!("users/{name}"), None)
        .await
        .unwrap();
    servers.sql(&format!("DROP ROLE {name}")).await.unwrap();
}

#[tokio::test]
async fn no_password_is_shown_of_dead_letters_that_no_worker_made() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    let plain = job("plain", "acme", &server_of(&server, OVERRIDE)).to_string();
    let cut = &plain[..plain.len() - 1];
    let amqp = world.amqp().await;
    // A misspelt level; and what RabbitMQ gave up lies as it was published too.
    for (exchange, key) in [("mail.jobs", "hihg.acme"), ("", "mail.jobs.dead")] {
        for body in [&plain, cut] {
            amqp.publish(exchange, key, BasicProperties::default(), body.as_bytes())
                .await;
        }
    }
    world.wait_depth("mail.unroutable", 2).await;
    world.wait_depth("mail.jobs.dead", 2).await;
    let mut hay = Haystack(Vec::new());
    for queue in ["unroutable", "jobs"] {
        let shown = world.postroom(&["dead", "show", "--all", "--queue", queue]).await;
        hay.add(queue, shown.success());
        hay.assert_holds(queue, "ann@example.org");
        hay.assert_holds(queue, &format!("(hidden: {} bytes", cut.len()));
    }
    hay.assert_without(&[OVERRIDE]);
    // Replayed, they are what they were.
    let replayed = world.postroom(&["dead", "replay", "--id", "plain"]).await;
    assert!(replayed.success().contains("1 replayed"));
}

/// URLs of the database that cannot work, and the command that is to tell so.
fn broken_databases(world: &World) -> Vec<(String, &'static str)> {
    let database = url::Url::parse(world.database_url()).unwrap();
    let (host, port) = (database.host_str().unwrap(), database.port().unwrap_or(5432));
    let name = world.scratch().name();
    vec![
        (format!("postgres://u:{CANARY}@127.0.0.1:1/x"), "migrate"),
        (
            format!("postgres://nobody:{CANARY}@{host}:{port}/{name}"),
            "migrate",
        ),
        (
            format!("postgres://postgres:{CANARY}@{host}:{port}/nowhere"),
            "tenant list",
        ),
        (format!("postgres://u:{CANARY}@h:port/x"), "migrate"),
        (format!("postgres://u:{CANARY}@[::1/x"), "migrate"),
        (format!("postgres//u:{CANARY}@h/x"), "job list --state done"),
        (format!("host=127.0.0.1 password={CANARY}"), "worker"),
        (format!("postgres://u:{CANARY}@h/x?sslmode=maybe"), "bridge"),
    ]
}

/// Settings that cannot work: name, value, command.
fn broken_settings(world: &World) -> Vec<(&'static str, String, &'static str)> {
    let key = STANDARD.encode(CANARY);
    let mut refused = url::Url::parse(world.amqp_url()).unwrap();
    refused.set_password(Some(CANARY)).unwrap();
    let url = |scheme: &str, rest: &str| format!("{scheme}u:{CANARY}@{rest}");
    let mut broken: Vec<_> = broken_databases(world)
        .into_iter()
        .map(|(url, command)| ("POSTROOM_DATABASE_URL", url, command))
        .collect();
    broken.extend([
        (
            "POSTROOM_AMQP_URL",
            url("amqp://", "127.0.0.1:1/x"),
            "topology apply",
        ),
        ("POSTROOM_AMQP_URL", refused.to_string(), "topology check"),
        ("POSTROOM_AMQP_URL", url("amqp://", "h:port/x"), "dead list"),
        ("POSTROOM_AMQP_URL", url("amqp:/", "h"), "worker"),
        ("POSTROOM_ENCRYPTION_KEYS", format!("k:{key}"), "key rotate"),
        ("POSTROOM_ENCRYPTION_KEYS", CANARY.to_owned(), "worker"),
        ("POSTROOM_OVERRIDE_KEYS", format!("{key}:k"), "worker"),
        ("POSTROOM_STORAGE_URL", format!("s3//{CANARY}"), "worker"),
        ("POSTROOM_STORAGE_URL", url("ftp://", "bucket"), "worker"),
        ("POSTROOM_STORAGE_PUBLIC_URL", format!("{CANARY}?x"), "worker"),
        ("POSTROOM_EGRESS_ALLOW", "not-a-network".to_owned(), "worker"),
        ("POSTROOM_DATABASE_URI", url("postgres://", "h/x"), "migrate"),
    ]);
    broken
}

const CANARY: &str = "setting-Kanarienvogel-8";

#[tokio::test]
async fn no_error_text_shows_a_password_of_the_settings() {
    let mut world = World::ready().await;
    world.set("POSTROOM_LOG", "trace,lapin=trace,tokio_postgres=trace");
    let whole: Vec<(String, String)> = [
        "POSTROOM_DATABASE_URL",
        "POSTROOM_AMQP_URL",
        "POSTROOM_ENCRYPTION_KEYS",
        "POSTROOM_OVERRIDE_KEYS",
        "POSTROOM_EGRESS_ALLOW",
    ]
    .map(|name| (name.to_owned(), world.variable(name).to_owned()))
    .into();
    for (name, value, command) in broken_settings(&world) {
        world.set(name, value.clone());
        let arguments: Vec<_> = command.split(' ').collect();
        let process = world
            .command(&arguments)
            .stdin(std::process::Stdio::null())
            .output();
        // A worker whose server is away waits for it.
        let limited = tokio::time::timeout(Duration::from_secs(20), process).await;
        let finished = Finished::new(
            &limited
                .unwrap_or_else(|_| panic!("{command} goes on with {name}"))
                .unwrap(),
        );
        let mut hay = Haystack(Vec::new());
        hay.add(
            format!("{command} with a wrong {name}"),
            format!("{}{}", finished.stdout, finished.stderr),
        );
        assert!(
            finished.code != 0 || name == "POSTROOM_DATABASE_URI",
            "{command} with {value}: {finished:?}"
        );
        assert!(!finished.stderr.is_empty(), "{command} with {name}");
        assert!(
            !finished.stderr.contains("Usage:"),
            "{command} is wrong use: {finished:?}"
        );
        hay.assert_without(&[CANARY]);
        world.unset(name);
        for (name, value) in &whole {
            world.set(name, value.clone());
        }
    }
}
