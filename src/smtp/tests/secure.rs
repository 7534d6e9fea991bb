use postroom_testkit::smtp::{Action, Phase, TlsSetup};
use postroom_testkit::tls::{ServerCert, TestCa};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::failure::{Class, Fault};

fn secured(smtp: &SmtpServer, tls: TlsMode, ca: &TestCa) -> Server {
    Server {
        tls,
        ca_pem: Some(ca.ca_pem().into()),
        credentials: Some(credentials("user", "secret")),
        ..server_of(smtp)
    }
}

fn setup(tls: TlsMode, cert: ServerCert) -> TlsSetup {
    match tls {
        TlsMode::Implicit => TlsSetup::Implicit(cert),
        _ => TlsSetup::StartTls(cert),
    }
}

#[tokio::test]
async fn starttls_and_implicit_tls_carry_login_and_mail() {
    let ca = TestCa::new();
    for tls in [TlsMode::StartTls, TlsMode::Implicit] {
        let smtp = SmtpServer::builder()
            .tls(setup(tls, ca.server(&["localhost"])))
            .auth_in_plain(false)
            .auth("user", "secret")
            .start()
            .await;
        let pools = pools();
        let account = Arc::new(submission(secured(&smtp, tls, &ca)));
        send(&pools, &account).await;
        send(&pools, &account).await;
        let received = smtp.received();
        assert_eq!(received.len(), 2);
        assert!(
            received
                .iter()
                .all(|mail| mail.tls && mail.user.as_deref() == Some("user"))
        );
        assert_eq!(smtp.counters().connections, 1, "reused under TLS too");
    }
}

#[tokio::test]
async fn an_address_is_as_good_a_name_as_any_if_the_certificate_has_it() {
    let ca = TestCa::new();
    let smtp = SmtpServer::builder()
        .tls(TlsSetup::Implicit(ca.server(&["127.0.0.1"])))
        .start()
        .await;
    let server = Server {
        host: "127.0.0.1".to_owned(),
        credentials: None,
        ..secured(&smtp, TlsMode::Implicit, &ca)
    };
    send(&pools(), &Arc::new(submission(server))).await;
    assert!(smtp.received()[0].tls);
}

#[tokio::test]
async fn a_bad_certificate_is_refused_before_anything_is_said() {
    let ca = TestCa::new();
    for tls in [TlsMode::StartTls, TlsMode::Implicit] {
        for (what, cert) in [
            ("expired", ca.expired(&["localhost"])),
            ("wrong name", ca.server(&["other.example"])),
            ("unknown authority", TestCa::new().server(&["localhost"])),
        ] {
            let smtp = SmtpServer::builder()
                .tls(setup(tls, cert))
                .auth("user", "secret")
                .start()
                .await;
            let failure = refused(&pools(), secured(&smtp, tls, &ca)).await;
            assert_eq!(
                (failure.class, failure.reason),
                (Class::Tls, "certificate_invalid"),
                "{what}: {failure}"
            );
            assert_eq!((failure.fault, failure.is_transient()), (Fault::Provider, true));
            assert_eq!(smtp.counters().command("AUTH"), 0);
            smtp.wait_closed(5 * SECOND).await;
        }
    }
}

#[tokio::test]
async fn the_installations_ca_file_is_trusted() {
    let ca = TestCa::new();
    let file = std::env::temp_dir().join(format!("postroom-smtp-ca-{}.pem", std::process::id()));
    std::fs::write(&file, ca.ca_pem()).unwrap();
    let mut setup = Setup::default();
    setup.config.ca_file = Some(file.clone());
    let pools = setup.pools();
    std::fs::remove_file(&file).unwrap();
    let smtp = SmtpServer::builder()
        .tls(TlsSetup::StartTls(ca.server(&["localhost"])))
        .start()
        .await;
    let server = Server {
        ca_pem: None,
        credentials: None,
        ..secured(&smtp, TlsMode::StartTls, &ca)
    };
    send(&pools, &Arc::new(submission(server))).await;
    assert!(smtp.received()[0].tls);
}

#[tokio::test]
async fn a_stripped_or_refused_starttls_never_falls_back_to_plain() {
    let ca = TestCa::new();
    let cert = || TlsSetup::StartTls(ca.server(&["localhost"]));
    let stripped = SmtpServer::builder()
        .tls(cert())
        .offer_starttls(false)
        .auth("user", "secret");
    let script = Script::new().on(Phase::StartTls, Action::reply("454 4.7.0 TLS not available"));
    let refusing = SmtpServer::builder()
        .tls(cert())
        .auth("user", "secret")
        .script(script);
    for (builder, reason) in [(stripped, "starttls_not_offered"), (refusing, "starttls_refused")] {
        let smtp = builder.start().await;
        let failure = refused(&pools(), secured(&smtp, TlsMode::StartTls, &ca)).await;
        assert_eq!(
            (failure.class, failure.reason, failure.is_transient()),
            (Class::Tls, reason, true)
        );
        let counters = smtp.counters();
        assert_eq!((counters.command("AUTH"), counters.command("MAIL")), (0, 0));
    }
}

#[tokio::test]
async fn a_server_that_has_no_room_at_starttls_says_nothing_about_tls() {
    let ca = TestCa::new();
    for (reply, class, reason) in [
        ("421 4.7.0 Too many connections", Class::Rate, "connection_limit"),
        (
            "454 4.7.0 Too many concurrent connections, no TLS now",
            Class::Rate,
            "connection_limit",
        ),
        (
            "421 4.3.2 Service shutting down",
            Class::Infrastructure,
            "service_unavailable",
        ),
    ] {
        let script = Script::new().on(Phase::StartTls, Action::reply(reply));
        let tls = TlsSetup::StartTls(ca.server(&["localhost"]));
        let smtp = SmtpServer::builder().tls(tls).script(script).start().await;
        let failure = refused(&pools(), secured(&smtp, TlsMode::StartTls, &ca)).await;
        assert_eq!((failure.class, failure.reason), (class, reason), "{reply}");
    }
}

/// Answers EHLO, and STARTTLS with `reply`, then speaks TLS as a man in the middle could not prevent.
async fn injecting(ca: &TestCa, reply: &'static str) -> (u16, tokio::task::JoinHandle<bool>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = ca.server(&["localhost"]).server_config();
    let serving = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut buf = [0; 512];
        for reply in ["220 x\r\n", "250-x\r\n250 STARTTLS\r\n", reply] {
            socket.write_all(reply.as_bytes()).await.unwrap();
            if reply.contains("TLS") || reply.starts_with("220 x") {
                let _ = socket.read(&mut buf).await.unwrap();
            }
        }
        let Ok(mut tls) = tokio_rustls::TlsAcceptor::from(config).accept(socket).await else {
            return false;
        };
        // Whatever the client says over TLS shows that it went on.
        matches!(tls.read(&mut buf).await, Ok(n) if n > 0)
    });
    (port, serving)
}

#[tokio::test]
async fn replies_injected_behind_starttls_are_never_taken_for_protected_ones() {
    let ca = TestCa::new();
    for reply in [
        "220 go\r\n250-fake\r\n250 AUTH PLAIN\r\n",
        "220 go\r\n250 fake\r\n",
        "220 go\r\n2",
        "220-a\r\n220 go\r\n250 x\r\n",
    ] {
        let (port, serving) = injecting(&ca, reply).await;
        let server = Server {
            host: "localhost".to_owned(),
            port,
            tls: TlsMode::StartTls,
            credentials: Some(credentials("user", "secret")),
            allow_plaintext_auth: true,
            ca_pem: Some(ca.ca_pem().into()),
            trusted: false,
        };
        let failure = refused(&pools(), server).await;
        assert_eq!(
            (failure.class, failure.reason),
            (Class::Tls, "starttls_injection"),
            "{reply:?}: {failure}"
        );
        assert!(!serving.await.unwrap(), "nothing was said after the injection");
    }
}

#[tokio::test]
async fn a_server_that_speaks_no_tls_is_a_tls_failure() {
    let ca = TestCa::new();
    let smtp = SmtpServer::builder().start().await;
    let failure = refused(&pools(), secured(&smtp, TlsMode::Implicit, &ca)).await;
    assert_eq!((failure.class, failure.reason), (Class::Tls, "tls_failed"));
    assert!(failure.message.contains("TLS mode"), "{failure}");
}

#[tokio::test]
async fn a_handshake_has_a_time_limit() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = Server {
        host: "localhost".to_owned(),
        port,
        tls: TlsMode::Implicit,
        credentials: None,
        allow_plaintext_auth: false,
        ca_pem: None,
        trusted: false,
    };
    let pools = Setup::default().limit(Duration::from_millis(150)).pools();
    let failure = refused(&pools, server).await;
    assert_eq!((failure.class, failure.reason), (Class::Tls, "tls_failed"));
}
