//! TLS and AUTH towards the account's server, through a real worker.

use std::time::{Duration, Instant};

use postroom::level::Level;
use postroom_testkit::smtp::{Action, Phase, Script, SmtpServer, TlsSetup};
use postroom_testkit::tls::TestCa;
use serde_json::json;

use crate::support::{Received, Reports, World, eventually};

const LIMIT: Duration = Duration::from_mins(1);

async fn publish(world: &World, id: &str, account: &str) {
    let job = json!({
        "id": id, "tenant": "acme", "account": account, "from": "shop@example.com", "to": "ann@example.org",
        "subject": "s", "text": "t",
    });
    world.publish(Level::High, "acme", &job).await;
}

/// A tenant, a short retry schedule, and the authority's certificate in a file.
async fn prepared(ca: &TestCa) -> (World, String) {
    let mut world = World::ready().await;
    world.set("POSTROOM_RETRY_BASE", "200ms");
    world.set("POSTROOM_RETRY_CAP", "400ms");
    world.postroom(&["tenant", "set", "acme"]).await.success();
    let file = world.dir().join("ca.pem");
    std::fs::write(&file, ca.ca_pem()).unwrap();
    let file = file.to_str().unwrap().to_owned();
    (world, file)
}

/// Sets an account of `acme` at this server with user `u`.
async fn account(world: &World, name: &str, server: &SmtpServer, password: &str, more: &[&str]) {
    let port = server.port().to_string();
    let mut arguments = vec!["account", "set", "acme", name, "--port", &port, "--username", "u"];
    arguments.push("--password-stdin");
    arguments.extend(more);
    world
        .postroom_stdin(&arguments, password.as_bytes())
        .await
        .success();
}

async fn deferred(reports: &mut Reports, job: &str) -> Received {
    let of_job = |r: &Received| r.job() == job && r.kind() == "mail.deferred";
    let all = reports.until(|all| all.iter().any(of_job)).await;
    all.iter().find(|r| of_job(r)).unwrap().clone()
}

#[tokio::test]
async fn mail_goes_over_verified_tls_with_either_way_of_logging_in() {
    let ca = TestCa::new();
    let (world, ca_file) = prepared(&ca).await;
    let cert = || ca.server(&["localhost", "127.0.0.1"]);
    let start = |tls: TlsSetup, mechanism: &'static str| {
        SmtpServer::builder()
            .tls(tls)
            .auth("u", "sésame")
            .mechanisms(&[mechanism])
            .auth_in_plain(false)
            .start()
    };
    let starttls = start(TlsSetup::StartTls(cert()), "PLAIN").await;
    let implicit = start(TlsSetup::Implicit(cert()), "LOGIN").await;
    let common = ["--ca-file", ca_file.as_str()];
    for (name, server, tls, host) in [
        ("starttls", &starttls, "starttls", "localhost"),
        ("implicit", &implicit, "implicit", "127.0.0.1"),
    ] {
        let more = [&["--tls", tls, "--host", host][..], &common].concat();
        account(&world, name, server, "sésame", &more).await;
    }
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for name in ["starttls", "implicit"] {
        publish(&world, name, name).await;
        let report = reports.final_of(name).await;
        assert_eq!(report.kind(), "mail.sent", "{}", report.json);
    }
    for server in [&starttls, &implicit] {
        let mail = server.received().remove(0);
        assert!(mail.tls);
        assert_eq!(mail.user.as_deref(), Some("u"));
    }
}

#[tokio::test]
async fn without_good_tls_nothing_is_sent_and_the_mail_waits() {
    let ca = TestCa::new();
    let (world, ca_file) = prepared(&ca).await;
    let misnamed = ca.server(&["mail.example"]);
    let expired = ca.expired(&["localhost"]);
    let good = || ca.server(&["localhost"]);
    let start = |tls: TlsSetup| SmtpServer::builder().tls(tls).auth("u", "p");
    let servers = [
        (
            "misnamed",
            start(TlsSetup::StartTls(misnamed)),
            "certificate_invalid",
        ),
        (
            "expired",
            start(TlsSetup::Implicit(expired)),
            "certificate_invalid",
        ),
        (
            "stripped",
            start(TlsSetup::StartTls(good())).offer_starttls(false),
            "",
        ),
        (
            "untrusted",
            start(TlsSetup::StartTls(good())),
            "certificate_invalid",
        ),
    ];
    let mut running = Vec::new();
    for (name, builder, reason) in servers {
        let server = builder.start().await;
        let tls = if name == "expired" { "implicit" } else { "starttls" };
        let ca_file = if name == "untrusted" { "" } else { ca_file.as_str() };
        let more = ["--tls", tls, "--host", "localhost", "--ca-file", ca_file];
        account(&world, name, &server, "p", &more).await;
        running.push((name, server, reason));
    }
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for (name, _, _) in &running {
        publish(&world, name, name).await;
    }
    for (name, server, reason) in &running {
        let report = deferred(&mut reports, name).await;
        let data = &report.json["data"];
        assert_eq!(data["class"], "tls", "{name}: {data}");
        assert_eq!(data["stage"], "connect", "{name}: {data}");
        assert!(reason.is_empty() || data["reason"] == *reason, "{name}: {data}");
        // It is tried again, and nothing was ever said to a server that is not to be trusted.
        eventually(LIMIT, || async { server.counters().connections >= 2 }).await;
        let counters = server.counters();
        assert_eq!(server.received_count(), 0, "{name}");
        assert_eq!(counters.command("AUTH") + counters.command("MAIL"), 0, "{name}");
    }
    // Cured, the waiting mail goes.
    let cured = [
        "account",
        "set",
        "acme",
        "untrusted",
        "--ca-file",
        ca_file.as_str(),
    ];
    world.postroom(&cured).await.success();
    assert_eq!(reports.final_of("untrusted").await.kind(), "mail.sent");
}

#[tokio::test]
async fn a_password_is_not_sent_in_the_clear_unless_allowed() {
    let ca = TestCa::new();
    let (world, _) = prepared(&ca).await;
    let server = SmtpServer::builder().auth("u", "p").start().await;
    account(
        &world,
        "main",
        &server,
        "p",
        &["--tls", "none", "--host", "127.0.0.1"],
    )
    .await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    publish(&world, "1", "main").await;
    let refused = reports.until(|all| !all.is_empty()).await[0].clone();
    assert_eq!(refused.reason(), "plaintext_auth_refused", "{}", refused.json);
    assert_eq!(server.counters().connections, 0);
    world
        .postroom(&["account", "set", "acme", "main", "--allow-plaintext-auth"])
        .await
        .success();
    let begun = Instant::now();
    // The worker knows within seconds; each job until then is told the same.
    for number in 0.. {
        let id = format!("again-{number}");
        publish(&world, &id, "main").await;
        let report = reports.until(|all| all.iter().any(|r| r.job() == id)).await;
        let report = report.iter().find(|r| r.job() == id).unwrap();
        if report.kind() == "mail.sent" {
            break;
        }
        assert_eq!(report.reason(), "plaintext_auth_refused", "{}", report.json);
        assert!(begun.elapsed() < LIMIT);
    }
    assert_eq!(server.received_count(), 1);
}

#[tokio::test]
async fn a_changed_password_is_used_within_seconds_and_waiting_mail_goes() {
    let ca = TestCa::new();
    let (world, _) = prepared(&ca).await;
    let server = SmtpServer::builder().auth("u", "new").start().await;
    let plain = ["--tls", "none", "--host", "127.0.0.1", "--allow-plaintext-auth"];
    account(&world, "main", &server, "old", &plain).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    publish(&world, "1", "main").await;
    let report = deferred(&mut reports, "1").await;
    assert_eq!(report.json["data"]["class"], "auth", "{}", report.json);
    assert_eq!(server.received_count(), 0);
    account(&world, "main", &server, "new", &[]).await;
    assert_eq!(reports.final_of("1").await.kind(), "mail.sent");
    assert!(server.counters().auth_failed >= 1);
}

#[tokio::test]
async fn mail_waits_while_a_server_has_lost_its_logins() {
    let ca = TestCa::new();
    let (world, _) = prepared(&ca).await;
    let script = Script::new().first(
        1,
        Phase::Ehlo,
        Action::reply("250-test.example\r\n250 PIPELINING"),
    );
    let server = SmtpServer::builder().auth("u", "p").script(script).start().await;
    let plain = ["--tls", "none", "--host", "127.0.0.1", "--allow-plaintext-auth"];
    account(&world, "main", &server, "p", &plain).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    publish(&world, "1", "main").await;
    let report = deferred(&mut reports, "1").await;
    assert_eq!(report.reason(), "auth_not_offered", "{}", report.json);
    assert_eq!(reports.final_of("1").await.kind(), "mail.sent");
}
