use postroom_testkit::smtp::{Action, Phase, RcptRule};

use super::*;
use crate::failure::{Class, Fault, Stage};

async fn ending(script: Script) -> (SmtpServer, Arc<Pools>, Outcome) {
    let smtp = scripted(script).await;
    let pools = pools();
    let outcome = send(&pools, &account(&smtp)).await;
    (smtp, pools, outcome)
}

fn uncertain(outcome: Outcome) -> (Vec<crate::address::Address>, Results, Failure) {
    match outcome {
        Outcome::Uncertain {
            unknown,
            refused,
            failure,
        } => (unknown, refused, failure),
        Outcome::Done(results) => panic!("{results:?}"),
    }
}

#[tokio::test]
async fn leading_dots_arrive_as_they_were() {
    let smtp = scripted(Script::new()).await;
    let pools = pools();
    let mail = b"Subject: x\r\n\r\n.\r\n..\r\n.a\r\nb.\r\n";
    let transaction = open(lease(&pools, &account(&smtp)).await, &to(&["a@example.org"]))
        .await
        .unwrap();
    transaction.finish(mail).await;
    assert_eq!(smtp.received()[0].data, mail);
}

#[tokio::test]
async fn a_large_mail_arrives_whole() {
    let smtp = scripted(Script::new()).await;
    let pools = pools();
    let mail = "0123456.89abcdef\r\n.\r\n".repeat(200_000).into_bytes();
    let transaction = open(lease(&pools, &account(&smtp)).await, &to(&["a@example.org"]))
        .await
        .unwrap();
    transaction.finish(&mail).await;
    assert!(smtp.received()[0].data == mail);
}

#[tokio::test]
async fn a_final_refusal_counts_for_the_accepted_and_keeps_the_connection() {
    let script = Script::new()
        .recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"))
        .first(
            1,
            Phase::FinalDot,
            Action::reply("554 5.7.1 Message identified as spam"),
        );
    let smtp = scripted(script).await;
    let pools = pools();
    let account = account(&smtp);
    let envelope = to(&["a@example.org", "nobody@example.org"]);
    let outcome = open(lease(&pools, &account).await, &envelope)
        .await
        .unwrap()
        .finish(MAIL)
        .await;
    let results = sent(&outcome);
    assert_eq!(codes(results), [554, 550]);
    assert_eq!(results[0].1.failure().unwrap().reason, "spam");
    assert_eq!(results[1].1.failure().unwrap().reason, "recipient_unknown");
    send(&pools, &account).await;
    assert_eq!(smtp.counters().connections, 1);
}

#[tokio::test]
async fn a_421_to_the_final_dot_is_a_certain_refusal_and_ends_the_connection() {
    let (smtp, pools, outcome) =
        ending(Script::new().first(1, Phase::FinalDot, Action::shutting_down())).await;
    assert_eq!(codes(sent(&outcome)), [421]);
    send(&pools, &account(&smtp)).await;
    assert_eq!(smtp.counters().connections, 2);
}

#[tokio::test]
async fn a_connection_lost_after_the_final_dot_is_uncertain_whether_taken_or_not() {
    for (action, taken) in [(Action::TakeThenClose, 1), (Action::Close, 0)] {
        let (smtp, _pools, outcome) = ending(Script::new().on(Phase::FinalDot, action)).await;
        let (unknown, refused, failure) = uncertain(outcome);
        assert_eq!(unknown, to(&["a@example.org"]).to);
        assert!(refused.is_empty());
        assert_eq!((failure.reason, failure.stage), ("connection_lost", Stage::Data));
        assert_eq!(smtp.received_count(), taken);
    }
}

#[tokio::test]
async fn a_server_that_never_answers_the_final_dot_leaves_it_uncertain() {
    for (action, taken) in [(Action::TakeThenSilence, 1), (Action::Silence, 0)] {
        let script = Script::new()
            .recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"))
            .on(Phase::FinalDot, action.clone());
        let smtp = scripted(script).await;
        let pools = Setup::against(&action).pools();
        let envelope = to(&["a@example.org", "nobody@example.org"]);
        let transaction = open(lease(&pools, &account(&smtp)).await, &envelope)
            .await
            .unwrap();
        let (unknown, refused, failure) = uncertain(transaction.finish(MAIL).await);
        assert_eq!((unknown.len(), codes(&refused)), (1, vec![550]));
        assert_eq!(
            (failure.reason, failure.class, failure.fault),
            ("timeout", Class::Infrastructure, Fault::Provider)
        );
        assert_eq!(smtp.received_count(), taken);
        smtp.wait_closed(5 * SECOND).await;
    }
}

#[tokio::test]
async fn an_answer_that_is_no_verdict_leaves_it_uncertain() {
    for nonsense in ["HTTP/1.1 400 Bad Request", "354 go on"] {
        let (smtp, _pools, outcome) =
            ending(Script::new().on(Phase::FinalDot, Action::reply(nonsense))).await;
        assert_eq!(uncertain(outcome).2.reason, "malformed_reply", "{nonsense}");
        smtp.wait_closed(5 * SECOND).await;
    }
}

/// A server that takes the envelope, reads `take` bytes of the mail and then does what it is told.
async fn rude(take: usize, last_words: &'static [u8]) -> (u16, tokio::task::JoinHandle<()>) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut buf = vec![0; 4096];
        for reply in ["220 x\r\n", "250 x\r\n", "250 ok\r\n", "250 ok\r\n", "354 go\r\n"] {
            socket.write_all(reply.as_bytes()).await.unwrap();
            if !reply.starts_with("354") {
                assert!(socket.read(&mut buf).await.unwrap() > 0);
            }
        }
        let mut taken = 0;
        while taken < take {
            taken += socket.read(&mut buf).await.unwrap();
        }
        socket.write_all(last_words).await.unwrap();
        if last_words.is_empty() {
            socket.set_zero_linger().unwrap();
        } else {
            // Keeps reading for a moment, so that its words are not lost in a reset.
            socket.shutdown().await.unwrap();
            while socket.read(&mut buf).await.is_ok_and(|n| n > 0) {}
        }
    });
    (port, serving)
}

async fn send_large(port: u16) -> Outcome {
    let pools = pools();
    let server = Server {
        host: "127.0.0.1".to_owned(),
        port,
        tls: TlsMode::None,
        credentials: None,
        allow_plaintext_auth: false,
        ca_pem: None,
        trusted: false,
    };
    let lease = pools.connect_once(&server).await.unwrap();
    let transaction = open(lease, &to(&["a@example.org"])).await.unwrap();
    transaction
        .finish(&b"0123456789abcdef\r\n".repeat(1_000_000))
        .await
}

#[tokio::test]
async fn a_connection_lost_in_the_middle_of_the_mail_is_no_uncertain_outcome() {
    let (port, serving) = rude(100_000, b"").await;
    let outcome = send_large(port).await;
    let failure = sent(&outcome)[0].1.failure().unwrap();
    assert_eq!(failure.reason, "connection_lost");
    assert!(failure.is_transient() && failure.reply.is_none());
    serving.await.unwrap();
}

#[tokio::test]
async fn a_refusal_in_the_middle_of_the_mail_is_heard() {
    let (port, serving) = rude(100_000, b"552 5.3.4 Message too big\r\n").await;
    let outcome = send_large(port).await;
    let failure = sent(&outcome)[0].1.failure().unwrap();
    assert_eq!(failure.reason, "message_too_large");
    serving.await.unwrap();
}

#[tokio::test]
async fn a_transaction_abandoned_or_dropped_sends_no_mail() {
    for abandon in [true, false] {
        let smtp = scripted(Script::new()).await;
        let pools = pools();
        let account = account(&smtp);
        let transaction = open(lease(&pools, &account).await, &to(&["a@example.org"]))
            .await
            .unwrap();
        if abandon {
            transaction.abandon();
        } else {
            drop(transaction);
        }
        smtp.wait_closed(5 * SECOND).await;
        assert_eq!(smtp.received_count(), 0);
        assert_eq!(pools.checked_out(&account.key), 0);
        send(&pools, &account).await;
        assert_eq!(smtp.received_count(), 1);
    }
}
