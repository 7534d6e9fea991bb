//! Secrets are changed in the files that hold them, and a signal makes running processes use them.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::SmtpServer;
use postroom_testkit::webhook::WebhookReceiver;
use serde_json::json;

use crate::support::{World, eventually, new_key};

const LIMIT: Duration = Duration::from_secs(30);

/// An account that logs in; its password is sealed with the active key of the world.
async fn account(world: &World, name: &str, server: &SmtpServer) {
    let port = server.port().to_string();
    let arguments = [
        "account",
        "set",
        "acme",
        name,
        "--host",
        "127.0.0.1",
        "--port",
        &port,
        "--tls",
        "none",
        "--username",
        "acme",
        "--password-stdin",
        "--allow-plaintext-auth",
        "--from",
        "shop@example.com",
    ];
    world.postroom_stdin(&arguments, b"open sesame\n").await.success();
}

async fn publish(world: &World, id: &str, account: &str) {
    let job = json!({"id": id, "tenant": "acme", "account": account, "to": "ann@example.org", "subject": "s", "text": "t"});
    world.publish(Level::High, "acme", &job).await;
}

#[tokio::test]
async fn what_a_new_key_sealed_waits_until_sighup_brings_the_key() {
    let mut world = World::new().await;
    let (old, new) = (new_key("k1"), new_key("k2"));
    let (file, operators) = (world.dir().join("keys"), world.dir().join("operators-keys"));
    std::fs::write(&file, format!("{old}\n")).unwrap();
    std::fs::write(&operators, format!("{new},{old}\n")).unwrap();
    world.unset("POSTROOM_ENCRYPTION_KEYS");
    world.set("POSTROOM_ENCRYPTION_KEYS_FILE", file.to_str().unwrap());
    world.set("POSTROOM_RETRY_BASE", "100ms");
    world.set("POSTROOM_WEBHOOK_RETRY_SCALE", "0.005");
    world.prepare().await;
    world.postroom(&["tenant", "set", "acme"]).await.success();
    let server = SmtpServer::builder().auth("acme", "open sesame").start().await;
    account(&world, "old", &server).await;
    let (worker, bridge) = tokio::join!(world.start_worker(), world.start_bridge());
    let mut reports = world.reports().await;

    // The operator seals with a key that the processes do not have yet.
    world.set("POSTROOM_ENCRYPTION_KEYS_FILE", operators.to_str().unwrap());
    account(&world, "new", &server).await;
    let receiver = WebhookReceiver::start().await.unwrap();
    let url = receiver.url("/hook");
    let arguments = ["endpoint", "set", "acme", "--url", &url, "--generate-secret"];
    let printed = world.postroom(&arguments).await.success();
    let secret = printed
        .split_whitespace()
        .find(|word| word.starts_with("whsec_"))
        .unwrap();

    publish(&world, "waits", "new").await;
    reports
        .until(|all| all.iter().any(|report| report.job() == "waits"))
        .await;
    let deferred = reports.all().last().unwrap();
    assert_eq!(
        (deferred.kind(), deferred.reason()),
        ("mail.deferred", "key_unknown")
    );
    let shown = world
        .postroom(&["job", "show", "acme", "waits", "--json"])
        .await
        .success();
    assert!(shown.contains("\"key\""), "{shown}");

    // What is no ring, or a ring that no longer opens what the old one does, is refused: the old one stays.
    for wrong in ["k1:rubbish", &new, &new_key("k1")] {
        std::fs::write(&file, wrong).unwrap();
        let told = |logs: String| logs.matches("the keys in use stay").count();
        for process in [&worker, &bridge] {
            let before = told(process.logs());
            process.signal("HUP");
            eventually(LIMIT, || async { told(process.logs()) > before }).await;
            assert!(process.ready().await);
        }
    }
    publish(&world, "meanwhile", "old").await;
    assert_eq!(reports.final_of("meanwhile").await.kind(), "mail.sent");
    assert!(receiver.received().is_empty(), "nothing goes out unsigned");

    std::fs::write(&file, format!("{new},{old}\n")).unwrap();
    worker.signal("HUP");
    bridge.signal("HUP");
    let sent = reports.final_of("waits").await;
    assert_eq!(sent.kind(), "mail.sent", "{}", worker.logs());
    assert_eq!(sent.json["data"]["attempt"], 1, "waiting for a key is no attempt");
    let hooks = receiver.wait_for(2, LIMIT).await.unwrap();
    for hook in &hooks {
        hook.verify(secret).unwrap();
    }
    for logs in [worker.logs(), bridge.logs()] {
        assert!(!logs.contains(&new[3..]) && !logs.contains("open sesame"));
    }
}

#[tokio::test]
async fn urls_in_files_are_read_again_at_sighup() {
    let mut world = World::ready().await;
    let files = ["AMQP", "DATABASE"].map(|name| {
        let file = world.dir().join(name);
        let right = world.variable(&format!("POSTROOM_{name}_URL")).to_owned();
        let mut wrong = url::Url::parse(&right).unwrap();
        wrong.set_port(Some(1)).unwrap();
        std::fs::write(&file, wrong.as_str()).unwrap();
        world.unset(&format!("POSTROOM_{name}_URL"));
        world.set(&format!("POSTROOM_{name}_URL_FILE"), file.to_str().unwrap());
        (file, right)
    });
    let mut processes = [world.spawn(&["worker"]), world.spawn(&["bridge"])];
    for process in &processes {
        eventually(LIMIT, || async { process.get("/livez").await.is_some() }).await;
        assert!(!process.ready().await);
    }
    std::fs::write(&files[1].0, &files[1].1).unwrap();
    for process in &processes {
        process.signal("HUP");
        process.wait_log("ready component=\"database\"").await;
        process.wait_log("no session with RabbitMQ").await;
    }
    // Neither is changed to what is no URL.
    std::fs::write(&files[0].0, "rubbish").unwrap();
    for process in &processes {
        process.signal("HUP");
        process.wait_log("POSTROOM_AMQP_URL: the URL in use stays").await;
    }
    std::fs::write(&files[0].0, &files[0].1).unwrap();
    for process in &mut processes {
        process.signal("HUP");
        process.wait_ready().await;
    }
}
