use postroom_testkit::smtp::{Action, Phase, RcptRule};

use super::*;
use crate::failure::{Class, Severity, Stage};

#[tokio::test]
async fn each_recipient_has_its_own_result_and_the_mail_goes_to_those_accepted() {
    let script = Script::new()
        .recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"))
        .recipient(
            "later",
            RcptRule::refuse("451 4.7.1 Greylisted, try again in 5 minutes"),
        );
    let smtp = scripted(script).await;
    let pools = pools();
    let envelope = to(&[
        "a@example.org",
        "nobody@example.org",
        "later@example.org",
        "b@example.org",
    ]);
    let transaction = open(lease(&pools, &account(&smtp)).await, &envelope)
        .await
        .unwrap();
    assert_eq!(codes(transaction.results()), [250, 550, 451, 250]);
    let outcome = transaction.finish(MAIL).await;
    let results = sent(&outcome);
    assert_eq!(codes(results), [250, 550, 451, 250]);
    assert!(
        results[0].1.reply().unwrap().text.contains("queued as"),
        "the final reply counts"
    );
    let unknown = results[1].1.failure().unwrap();
    assert_eq!(
        (unknown.reason, unknown.severity),
        ("recipient_unknown", Severity::Permanent)
    );
    let later = results[2].1.failure().unwrap();
    assert_eq!(
        (later.reason, later.retry_after),
        ("greylisted", Some(300 * SECOND))
    );
    let received = smtp.received();
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].to, ["a@example.org", "b@example.org"]);
    assert_eq!(received[0].from, "sender@acme.example");
    assert_eq!(received[0].data, MAIL);
}

#[tokio::test]
async fn envelope_and_data_go_out_in_one_write_where_pipelining_is_offered() {
    let smtp = traced().start().await;
    let pools = pools();
    let envelope = to(&["a@example.org", "b@example.org"]);
    open(lease(&pools, &account(&smtp)).await, &envelope)
        .await
        .unwrap()
        .finish(MAIL)
        .await;
    assert_eq!(smtp.trace(), [vec!["EHLO"], vec!["MAIL", "RCPT", "RCPT", "DATA"]]);
}

#[tokio::test]
async fn commands_go_step_by_step_without_pipelining() {
    let script = Script::new().recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"));
    let smtp = traced().pipelining(false).script(script).start().await;
    let pools = pools();
    let account = account(&smtp);
    let envelope = to(&["a@example.org", "nobody@example.org"]);
    let outcome = open(lease(&pools, &account).await, &envelope)
        .await
        .unwrap()
        .finish(MAIL)
        .await;
    assert_eq!(codes(sent(&outcome)), [250, 550]);
    let none = open(lease(&pools, &account).await, &to(&["nobody@example.org"]))
        .await
        .unwrap_err();
    assert_eq!(none.failure.reason, "recipient_unknown");
    let steps: Vec<String> = smtp.trace().into_iter().map(|batch| batch.join("+")).collect();
    assert_eq!(
        steps,
        ["EHLO", "MAIL", "RCPT", "RCPT", "DATA", "MAIL", "RCPT", "RSET"]
    );
}

#[tokio::test]
async fn when_nobody_is_accepted_the_connection_is_reset_and_used_again() {
    let script = Script::new()
        .recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"))
        .recipient("later", RcptRule::refuse("450 4.2.0 Busy"));
    let smtp = scripted(script).await;
    let pools = pools();
    let account = account(&smtp);
    let envelope = to(&["later@example.org", "nobody@example.org"]);
    let error = open(lease(&pools, &account).await, &envelope).await.unwrap_err();
    assert_eq!(codes(&error.results), [450, 550]);
    assert_eq!(error.failure.stage, Stage::RcptTo);
    assert!(error.mail_sent);
    send(&pools, &account).await;
    let counters = smtp.counters();
    assert_eq!((counters.connections, counters.command("RSET")), (1, 1));
    assert_eq!(smtp.received_count(), 1);
}

#[tokio::test]
async fn a_server_that_wants_data_for_nobody_gets_a_lone_dot() {
    let script = Script::new()
        .recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"))
        .first(1, Phase::Data, Action::reply("354 go ahead"));
    let smtp = scripted(script).await;
    let pools = pools();
    let account = account(&smtp);
    let error = open(lease(&pools, &account).await, &to(&["nobody@example.org"]))
        .await
        .unwrap_err();
    assert_eq!(codes(&error.results), [550]);
    assert_eq!(smtp.received_count(), 0);
    send(&pools, &account).await;
    assert_eq!(smtp.received()[0].data, MAIL, "the conversation is still in step");
    assert_eq!(smtp.counters().connections, 1);
}

#[tokio::test]
async fn a_refused_sender_fails_for_all_recipients_and_keeps_the_connection() {
    let refusal = "553 5.7.1 Sender address rejected: not owned by user";
    let smtp = scripted(Script::new().first(1, Phase::Mail, Action::reply(refusal))).await;
    let pools = pools();
    let account = account(&smtp);
    let envelope = to(&["a@example.org", "b@example.org"]);
    let error = open(lease(&pools, &account).await, &envelope).await.unwrap_err();
    assert_eq!(
        (error.failure.reason, error.failure.stage),
        ("sender_refused", Stage::MailFrom)
    );
    assert_eq!(codes(&error.results), [553, 553]);
    send(&pools, &account).await;
    assert_eq!(smtp.counters().connections, 1);
}

#[tokio::test]
async fn a_refusal_of_data_counts_for_the_recipients_that_were_accepted() {
    let script = Script::new()
        .recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"))
        .first(1, Phase::Data, Action::reply("451 4.3.0 Try later"));
    let smtp = scripted(script).await;
    let pools = pools();
    let account = account(&smtp);
    let envelope = to(&["a@example.org", "nobody@example.org"]);
    let error = open(lease(&pools, &account).await, &envelope).await.unwrap_err();
    assert_eq!(codes(&error.results), [451, 550]);
    assert_eq!(
        (error.failure.reason, error.failure.stage),
        ("server_error", Stage::Data)
    );
    send(&pools, &account).await;
    assert_eq!(smtp.counters().connections, 1);
}

#[tokio::test]
async fn a_421_to_one_recipient_is_its_own_and_tells_nothing_of_those_who_were_not_refused() {
    let script = Script::new()
        .recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"))
        .once_after(2, Phase::Rcpt, Action::shutting_down());
    let smtp = scripted(script).await;
    let pools = pools();
    let account = account(&smtp);
    let envelope = to(&[
        "a@example.org",
        "nobody@example.org",
        "b@example.org",
        "c@example.org",
    ]);
    let error = open(lease(&pools, &account).await, &envelope).await.unwrap_err();
    assert_eq!(codes(&error.results), [0, 550, 421, 0]);
    for untold in [0, 3] {
        assert_eq!(error.results[untold].1, RcptResult::Untold);
    }
    assert!(error.failure.is_transient() && error.mail_sent);
    send(&pools, &account).await;
    assert_eq!(smtp.counters().connections, 2, "421 ends a connection");
}

#[tokio::test]
async fn a_mail_larger_than_size_fails_for_good_before_mail() {
    let smtp = SmtpServer::builder().size(1000).start().await;
    let pools = pools();
    let account = account(&smtp);
    let envelope = to(&["a@example.org"]);
    let lease_ = lease(&pools, &account).await;
    assert_eq!(lease_.extensions().unwrap().size_limit(), Some(1000));
    let error = open_mail(lease_, &envelope, of(1001, false, false), MAIL)
        .await
        .unwrap_err();
    assert_eq!(
        (error.failure.reason, error.failure.class),
        ("message_too_large", Class::Content)
    );
    assert!(!error.failure.is_transient() && !error.mail_sent);
    assert_eq!(error.results.len(), 1);
    assert_eq!(smtp.counters().command("MAIL"), 0);
    let fits = lease(&pools, &account)
        .await
        .open(&envelope, of(1000, false, false), MAIL)
        .await
        .unwrap();
    fits.finish(MAIL).await;
    assert_eq!(smtp.received()[0].params, "SIZE=1000");
    assert_eq!(smtp.counters().connections, 1);
}

#[tokio::test]
async fn smtputf8_and_8bitmime_are_announced_where_needed_and_required() {
    let full = SmtpServer::builder().start().await;
    let bare = SmtpServer::builder()
        .smtputf8(false)
        .eight_bit_mime(false)
        .start()
        .await;
    let pools = pools();
    let umlaut = to(&["jürgen@example.org"]);
    let transaction = lease(&pools, &account(&full))
        .await
        .open(&umlaut, of(9, false, true), MAIL)
        .await
        .unwrap();
    transaction.finish(MAIL).await;
    assert_eq!(full.received()[0].params, "BODY=8BITMIME SMTPUTF8");
    assert_eq!(full.received()[0].to, ["jürgen@example.org"]);

    let bare = Arc::new(Submission {
        key: AccountKey::from_stored("acme/bare"),
        ..submission(server_of(&bare))
    });
    let plain = to(&["a@example.org"]);
    for (envelope, utf8, eightbit, reason) in [
        (&umlaut, false, false, "smtputf8_not_supported"),
        (&plain, true, false, "smtputf8_not_supported"),
        (&plain, false, true, "8bitmime_not_supported"),
    ] {
        let lease = lease(&pools, &bare).await;
        let error = open_mail(lease, envelope, of(9, utf8, eightbit), MAIL)
            .await
            .unwrap_err();
        assert_eq!(error.failure.reason, reason);
        assert!(!error.failure.is_transient());
    }
}

#[tokio::test]
async fn the_null_sender_and_a_domain_outside_ascii_are_written_properly() {
    let smtp = SmtpServer::builder().smtputf8(false).start().await;
    let pools = pools();
    let envelope = Envelope {
        from: None,
        to: vec!["a@müller.example".parse().unwrap()],
    };
    open(lease(&pools, &account(&smtp)).await, &envelope)
        .await
        .unwrap()
        .finish(MAIL)
        .await;
    let received = &smtp.received()[0];
    assert_eq!(
        (received.from.as_str(), received.to[0].as_str()),
        ("", "a@xn--mller-kva.example")
    );
}

#[tokio::test]
async fn more_recipients_than_fit_in_one_write_all_get_their_results() {
    let script = Script::new().recipient("r150", RcptRule::refuse("550 5.1.1 No such user"));
    let smtp = scripted(script).await;
    let pools = pools();
    let many: Vec<String> = (0..250).map(|n| format!("r{n}@example.org")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let outcome = open(lease(&pools, &account(&smtp)).await, &to(&many))
        .await
        .unwrap()
        .finish(MAIL)
        .await;
    let refused: Vec<usize> = codes(sent(&outcome))
        .iter()
        .enumerate()
        .filter(|(_, c)| **c == 550)
        .map(|(n, _)| n)
        .collect();
    assert_eq!(refused, [150]);
    assert_eq!(smtp.received()[0].to.len(), 249);
}

#[tokio::test]
async fn odd_but_legal_replies_are_understood() {
    let script = Script::new()
        .on(Phase::Mail, Action::reply("250"))
        .recipient(
            "odd",
            RcptRule::refuse("571-5.7.1 Delivery not\r\n571 5.7.1 authorized"),
        )
        .on(Phase::FinalDot, Action::reply("250-first\r\n250 2.0.0 second"));
    let smtp = scripted(script).await;
    let pools = pools();
    let envelope = to(&["odd@example.org", "a@example.org"]);
    let outcome = open(lease(&pools, &account(&smtp)).await, &envelope)
        .await
        .unwrap()
        .finish(MAIL)
        .await;
    let results = sent(&outcome);
    assert_eq!(codes(results), [571, 250]);
    assert_eq!(&*results[0].1.reply().unwrap().text, "Delivery not authorized");
    assert_eq!(&*results[1].1.reply().unwrap().text, "first 2.0.0 second");
}
