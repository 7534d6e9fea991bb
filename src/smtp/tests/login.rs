use postroom_testkit::smtp::{Action, Phase};

use super::*;
use crate::failure::{Class, Fault, Severity, Stage};

fn with_password(smtp: &SmtpServer, password: &str) -> Server {
    Server {
        credentials: Some(credentials("user", password)),
        allow_plaintext_auth: true,
        ..server_of(smtp)
    }
}

#[tokio::test]
async fn plain_and_login_are_chosen_from_what_the_server_offers() {
    for (offered, steps) in [(&["LOGIN", "PLAIN"][..], 1), (&["CRAM-MD5", "LOGIN"], 1)] {
        let smtp = SmtpServer::builder()
            .auth("user", "pä ss")
            .mechanisms(offered)
            .start()
            .await;
        let pools = pools();
        send(&pools, &Arc::new(submission(with_password(&smtp, "pä ss")))).await;
        assert_eq!(smtp.received()[0].user.as_deref(), Some("user"), "{offered:?}");
        assert_eq!(smtp.counters().command("AUTH"), steps);
    }
}

#[tokio::test]
async fn a_wrong_password_is_the_senders_fault_and_the_mail_waits() {
    for mechanism in ["PLAIN", "LOGIN"] {
        let smtp = SmtpServer::builder()
            .auth("user", "right")
            .mechanisms(&[mechanism])
            .start()
            .await;
        let failure = refused(&pools(), with_password(&smtp, "wrong-canary")).await;
        let found = (
            failure.class,
            failure.fault,
            failure.severity,
            failure.stage,
            failure.reason,
        );
        assert_eq!(
            found,
            (
                Class::Auth,
                Fault::Sender,
                Severity::Transient,
                Stage::Auth,
                "auth_refused"
            )
        );
        assert!(!format!("{failure:?}").contains("canary"));
        assert_eq!(smtp.counters().auth_failed, 1);
    }
}

#[tokio::test]
async fn a_login_that_cannot_be_checked_now_is_tried_later() {
    let script = Script::new().on(
        Phase::Auth,
        Action::reply("454 4.7.0 Temporary authentication failure"),
    );
    let smtp = SmtpServer::builder()
        .auth("user", "right")
        .script(script)
        .start()
        .await;
    let failure = refused(&pools(), with_password(&smtp, "right")).await;
    assert_eq!(
        (failure.reason, failure.fault),
        ("auth_temporary", Fault::Provider)
    );
    assert!(failure.is_transient());
}

#[tokio::test]
async fn a_password_never_goes_over_a_plain_connection_unasked() {
    let smtp = SmtpServer::builder().auth("user", "right").start().await;
    let server = Server {
        allow_plaintext_auth: false,
        ..with_password(&smtp, "right")
    };
    let failure = refused(&pools(), server).await;
    assert_eq!(
        (failure.class, failure.fault, failure.reason),
        (Class::Auth, Fault::Sender, "plaintext_auth_refused")
    );
    assert_eq!(smtp.counters().connections, 0);
}

#[tokio::test]
async fn a_server_without_a_known_way_to_log_in_is_named() {
    let none = SmtpServer::builder().start().await;
    assert_eq!(
        refused(&pools(), with_password(&none, "x")).await.reason,
        "auth_not_offered"
    );
    let odd = SmtpServer::builder()
        .auth("user", "x")
        .mechanisms(&["XOAUTH2"])
        .start()
        .await;
    let failure = refused(&pools(), with_password(&odd, "x")).await;
    assert_eq!(failure.reason, "auth_mechanism_unsupported");
}

#[tokio::test]
async fn a_server_that_wants_a_login_says_so_at_mail() {
    let smtp = SmtpServer::builder().auth("user", "x").start().await;
    let pools = pools();
    let error = open(lease(&pools, &account(&smtp)).await, &to(&["a@example.org"]))
        .await
        .unwrap_err();
    assert_eq!(error.failure.reason, "auth_required");
}

#[tokio::test]
async fn a_server_that_quotes_the_login_does_not_get_the_password_into_the_failure() {
    let echo = "535 5.7.8 cannot accept AHVzZXIAY2FuYXJ5 canary";
    let script = Script::new().on(Phase::Auth, Action::reply(echo));
    let smtp = SmtpServer::builder()
        .auth("user", "canary")
        .script(script)
        .start()
        .await;
    let failure = refused(&pools(), with_password(&smtp, "canary")).await;
    let text = format!("{failure} {failure:?}");
    assert!(
        !text.contains("canary") && !text.contains("AHVzZXIAY2FuYXJ5"),
        "{text}"
    );
}

#[tokio::test]
async fn a_greeting_or_ehlo_that_refuses_is_classified() {
    for (phase, reply, reason) in [
        (
            Phase::Greeting,
            "554 5.7.1 Client host blocked using rbl.example",
            "client_blocked",
        ),
        (
            Phase::Greeting,
            "421 4.7.0 Too many connections",
            "connection_limit",
        ),
        (Phase::Ehlo, "451 4.3.0 later", "server_error"),
        (Phase::Ehlo, "550 go away", "client_blocked"),
    ] {
        let smtp = scripted(Script::new().on(phase, Action::reply(reply))).await;
        let failure = refused(&pools(), server_of(&smtp)).await;
        assert_eq!(
            (failure.reason, failure.is_transient(), failure.stage),
            (reason, true, Stage::Connect),
            "{reply}"
        );
        smtp.wait_closed(5 * SECOND).await;
    }
}

#[tokio::test]
async fn every_phase_of_connecting_has_a_time_limit() {
    for phase in [Phase::Greeting, Phase::Ehlo, Phase::Auth] {
        let script = Script::new().on(phase, Action::Silence);
        let smtp = SmtpServer::builder()
            .auth("user", "x")
            .script(script)
            .start()
            .await;
        let pools = Setup::default().limit(Duration::from_millis(150)).pools();
        let failure = refused(&pools, with_password(&smtp, "x")).await;
        assert_eq!(
            (failure.reason, failure.class),
            ("timeout", Class::Infrastructure),
            "{phase:?}"
        );
        smtp.wait_closed(5 * SECOND).await;
    }
}

#[tokio::test]
async fn every_command_of_the_envelope_has_a_time_limit() {
    for phase in [Phase::Mail, Phase::Rcpt, Phase::Data] {
        let smtp = scripted(Script::new().on(phase, Action::Silence)).await;
        let pools = Setup::default().replies_within(SECOND / 2, 2 * SECOND).pools();
        let error = open(lease(&pools, &account(&smtp)).await, &to(&["a@example.org"]))
            .await
            .unwrap_err();
        assert_eq!(error.failure.reason, "timeout", "{phase:?}");
        smtp.wait_closed(5 * SECOND).await;
    }
}

#[tokio::test]
async fn hosts_that_cannot_or_may_not_be_reached_are_told_apart() {
    let smtp = scripted(Script::new()).await;
    let at = |host: &str| Server {
        host: host.to_owned(),
        ..server_of(&smtp)
    };
    let pools = pools();
    let denied = refused(&pools, at("internal.example")).await;
    assert_eq!(
        (denied.class, denied.fault, denied.reason),
        (Class::Local, Fault::Sender, "host_not_allowed")
    );
    assert!(denied.message.contains("POSTROOM_EGRESS_ALLOW") && !denied.is_transient());
    let missing = refused(&pools, at("missing.example")).await;
    assert_eq!(
        (missing.class, missing.reason),
        (Class::Infrastructure, "host_lookup_failed")
    );
    assert!(missing.is_transient());
    let server = at("127.0.0.1");
    drop(smtp);
    until("the port is closed", || {
        std::net::TcpStream::connect(("127.0.0.1", server.port)).is_err()
    })
    .await;
    let closed = refused(&pools, server).await;
    assert_eq!((closed.reason, closed.fault), ("connect_failed", Fault::Provider));
}
