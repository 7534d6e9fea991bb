//! The programs of docs/webhooks.md, as they stand there, against a real bridge: they take what is signed, refuse what was
//! tampered with, know what they have seen, are not confused by the order, and live through a change of the secret.

use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use postroom::level::Level;
use postroom_testkit::smtp::SmtpServer;
use postroom_testkit::webhook::{Received, WebhookReceiver};
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::time::timeout;

use crate::sends::account;
use crate::support::{Clients, Program, World};

const PAGE: &str = "docs/webhooks.md";
const LIMIT: Duration = Duration::from_secs(30);
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn new_secret() -> String {
    let key: [u8; 32] = rand::random();
    format!("whsec_{}", base64::engine::general_purpose::STANDARD.encode(key))
}

/// A program of the page, running.
struct Receiver {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    port: u16,
}

impl Receiver {
    async fn start(clients: &Clients, world: &World, program: &Program, secret: &str, port: u16) -> Self {
        let mut command = clients.command(program);
        command
            .env("WEBHOOK_SECRET", secret)
            .env("DATABASE", world.dir().join("receiver.db"))
            .env("PORT", port.to_string());
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = timeout(LIMIT, lines.next_line()).await.unwrap().unwrap();
        let first = first.expect("the receiver ended");
        let port = first.strip_prefix("listening on ").unwrap().parse().unwrap();
        Self { child, lines, port }
    }

    /// What it says next.
    async fn line(&mut self) -> String {
        let line = timeout(LIMIT, self.lines.next_line()).await;
        line.expect("it says nothing").unwrap().expect("it ended")
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/mail-events", self.port)
    }

    /// Sends it a copy of a webhook, and gives the status of its answer.
    async fn post(&self, hook: &Received, body: &[u8]) -> u16 {
        let client = reqwest::Client::builder().timeout(LIMIT).build().unwrap();
        let mut request = client.post(self.url()).body(body.to_vec());
        for name in ["webhook-id", "webhook-timestamp", "webhook-signature"] {
            request = request.header(name, hook.header(name));
        }
        let answer = request.send().await.unwrap();
        answer.status().as_u16()
    }

    async fn end(mut self) {
        self.child.kill().await.unwrap();
    }
}

async fn set_endpoint(world: &World, name: &str, url: &str, secret: &str) {
    let arguments = [
        "endpoint",
        "set",
        "acme",
        name,
        "--url",
        url,
        "--secret-stdin",
        "--events",
        "*",
    ];
    let set = world.postroom_stdin(&arguments, secret.as_bytes()).await;
    set.success();
}

/// Publishes a report about a job as a worker does.
async fn report(world: &World, event: &str, kind: &str, job: &str, sequence: u32) {
    let body = json!({"type": kind, "timestamp": "2026-01-01T00:00:00Z", "data": {"job": job, "tenant": "acme",
        "account": null, "recipients": [], "attempt": 1, "final": false, "sequence": sequence}});
    let properties = BasicProperties::default().with_message_id(event.into());
    let exchange = world.topology().reports_exchange();
    let key = format!("report.acme.{kind}");
    let amqp = world.amqp().await;
    amqp.publish(&exchange, &key, properties, body.to_string().as_bytes())
        .await;
}

async fn wait_for(copies: &WebhookReceiver, event: &str) -> Received {
    let mut count = 0;
    loop {
        let hooks = copies.wait_for(count + 1, LIMIT).await.unwrap();
        count = hooks.len();
        if let Some(hook) = hooks.into_iter().find(|hook| hook.event_id() == event) {
            return hook;
        }
    }
}

async fn receiver(name: &str) {
    let clients = Clients::ready().await;
    let world = World::ready().await;
    world.postroom(&["tenant", "set", "acme"]).await.success();
    let (old, new) = (new_secret(), new_secret());
    let program = clients.program(&world, PAGE, name);
    let mut receiver = Receiver::start(&clients, &world, &program, &old, 0).await;
    // The same webhooks for the test to look at, under the same secret.
    let copies = WebhookReceiver::start().await.unwrap();
    set_endpoint(&world, "default", &receiver.url(), &old).await;
    set_endpoint(&world, "copies", &copies.url("/"), &old).await;
    let _bridge = world.start_bridge().await;

    report(&world, "evt_1", "mail.deferred", "a", 2).await;
    assert_eq!(receiver.line().await, "a is now mail.deferred");
    let hook = wait_for(&copies, "evt_1").await;
    hook.verify(&old).unwrap();

    // Tampered with, and then once more as it was: refused, and known.
    let forged = String::from_utf8(hook.body.to_vec()).unwrap();
    let forged = forged.replace("mail.deferred", "mail.sent");
    assert_eq!(receiver.post(&hook, forged.as_bytes()).await, 401);
    assert_eq!(receiver.post(&hook, &hook.body).await, 204);
    // Overtaken by what is above; then something newer. Neither the repeat nor the old news are told.
    report(&world, "evt_0", "mail.uncertain", "a", 1).await;
    wait_for(&copies, "evt_0").await;
    report(&world, "evt_2", "mail.sent", "a", 3).await;
    assert_eq!(receiver.line().await, "a is now mail.sent");

    // The secret is changed: first the receiver still has the old one, then only the new one.
    set_endpoint(&world, "default", &receiver.url(), &new).await;
    report(&world, "evt_3", "mail.sent", "b", 1).await;
    assert_eq!(receiver.line().await, "b is now mail.sent");
    let port = receiver.port;
    receiver.end().await;
    let mut receiver = Receiver::start(&clients, &world, &program, &new, port).await;
    assert_eq!(
        receiver.post(&hook, &hook.body).await,
        401,
        "signed by the old secret"
    );
    report(&world, "evt_4", "mail.sent", "c", 1).await;
    assert_eq!(receiver.line().await, "c is now mail.sent");
}

#[tokio::test]
async fn the_receiver_of_the_documentation_in_python_works() {
    receiver("receiver.py").await;
}

#[tokio::test]
async fn the_receiver_of_the_documentation_in_node_works() {
    receiver("receiver.mjs").await;
}

#[tokio::test]
async fn a_trace_context_travels_from_the_job_to_the_webhook_which_the_documentation_verifies() {
    let clients = Clients::ready().await;
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let (secret, hooks) = (new_secret(), WebhookReceiver::start().await.unwrap());
    set_endpoint(&world, "default", &hooks.url("/"), &secret).await;
    let (_worker, _bridge) = tokio::join!(world.start_worker(), world.start_bridge());
    let mut reports = world.reports().await;
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString(TRACE.into()));
    let properties = BasicProperties::default().with_headers(headers);
    let exchange = world.topology().jobs_exchange();
    // One that is sent at once, one out of the waiting room, one that is rejected.
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(3);
    for (n, job) in [
        json!({"id": "0", "tenant": "acme", "to": "ann@example.org", "text": "t"}),
        json!({"id": "1", "tenant": "acme", "to": "ann@example.org", "text": "t", "send_at": soon.to_string()}),
        json!({"id": "2", "tenant": "acme", "to": "ann@example.org", "subjcet": "t"}),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("{}.acme", Level::High);
        let body = job.to_string();
        let amqp = world.amqp().await;
        amqp.publish(&exchange, &key, properties.clone(), body.as_bytes())
            .await;
        let report = reports.final_of(&n.to_string()).await;
        assert_eq!(report.json["data"]["traceparent"], TRACE, "{}", report.json);
        assert_eq!(report.header("traceparent"), Some(TRACE));
        let hook = wait_for(&hooks, &report.id).await;
        assert_eq!(hook.header("traceparent"), TRACE);
    }

    let hook = &hooks.received()[0];
    let program = clients.program(&world, PAGE, "verify.py");
    let code = "import json, os\nfrom verify import verify\nheaders = json.loads(os.environ['HEADERS'])\n\
                body = os.environ['BODY'].encode()\nprint(verify(os.environ['SECRET'], headers, body), \
                verify(os.environ['SECRET'], headers, body + b' '))";
    let names = ["webhook-id", "webhook-timestamp", "webhook-signature"];
    let headers: serde_json::Map<_, _> = names
        .iter()
        .map(|name| ((*name).to_owned(), hook.header(name).into()))
        .collect();
    let (headers, body) = (
        serde_json::Value::from(headers).to_string(),
        String::from_utf8_lossy(&hook.body),
    );
    let variables = [
        ("HEADERS", headers.as_str()),
        ("BODY", &body),
        ("SECRET", &secret),
    ];
    let printed = clients.evaluate(&program, code, &variables).await.unwrap();
    assert_eq!(printed.trim(), "True False");
}
