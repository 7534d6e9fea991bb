//! A job published to RabbitMQ becomes a mail at the account's server and a final report.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::SmtpServer;
use serde_json::json;

use crate::support::World;

/// A tenant with one account at this server.
pub(crate) async fn account(world: &World, tenant: &str, server: &SmtpServer, more: &[&str]) {
    world.postroom(&["tenant", "set", tenant]).await.success();
    let port = server.port().to_string();
    let mut arguments = vec![
        "account",
        "set",
        tenant,
        "main",
        "--host",
        "127.0.0.1",
        "--port",
        &port,
        "--tls",
        "none",
    ];
    arguments.extend(["--from", "Shop <shop@example.com>"]);
    arguments.extend(more);
    world.postroom(&arguments).await.success();
}

/// An account with user `u` and this password at a server without TLS; `more` is further arguments in one line.
pub(crate) async fn account_with_password(
    world: &World,
    name: &str,
    server: &SmtpServer,
    password: &str,
    more: &str,
) {
    let port = server.port();
    let line = format!(
        "account set acme {name} --host 127.0.0.1 --port {port} --tls none --username u --password-stdin \
         --allow-plaintext-auth {more}"
    );
    let arguments: Vec<_> = line.split_whitespace().collect();
    let set = world.postroom_stdin(&arguments, password.as_bytes()).await;
    set.success();
}

#[tokio::test]
async fn a_published_job_is_sent_and_reported() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    let job = json!({
        "id": "order-1", "tenant": "acme", "to": "ann@example.org", "bcc": ["bob@example.org"],
        "subject": "Grüße", "text": "Hallo", "metadata": {"order": 1},
    });
    world.publish(Level::High, "acme", &job).await;
    let report = reports.final_of("order-1").await;
    assert_eq!(report.kind(), "mail.sent", "{}", worker.logs());
    let data = &report.json["data"];
    assert_eq!(data["account"], "main");
    assert_eq!(data["attempt"], 1);
    assert_eq!(data["metadata"], json!({"order": 1}));
    assert_eq!(data["recipients"][0]["status"], "accepted");
    assert_eq!(data["recipients"][1]["address"], "bob@example.org");
    let mails = server.received();
    assert_eq!(mails.len(), 1);
    let text = String::from_utf8_lossy(&mails[0].data);
    assert!(
        text.contains("To: ann@example.org") && !text.contains("bob@example.org"),
        "{text}"
    );
    world.wait_depth("mail.jobs.high", 0).await;
    assert!(reports.none_for(Duration::from_millis(300)).await);
}
