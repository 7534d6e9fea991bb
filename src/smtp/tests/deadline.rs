//! One deadline over everything up to the last byte of the mail.

use std::time::Instant;

use postroom_testkit::smtp::Phase;

use super::*;

fn within(attempt: Duration) -> Arc<Pools> {
    let mut setup = Setup::default();
    setup.config.timeouts.attempt = attempt;
    setup.pools()
}

#[tokio::test]
async fn a_hundred_slow_answers_do_not_exceed_the_limit_of_the_whole_transaction() {
    let script = Script::new().delay(Phase::Rcpt, Duration::from_millis(100));
    let smtp = SmtpServer::builder()
        .pipelining(false)
        .script(script)
        .start()
        .await;
    let pools = within(Duration::from_millis(300));
    let addresses: Vec<String> = (0..100).map(|n| format!("r{n}@example.org")).collect();
    let envelope = to(&addresses.iter().map(String::as_str).collect::<Vec<_>>());
    let begun = Instant::now();
    let error = open(lease(&pools, &account(&smtp)).await, &envelope)
        .await
        .unwrap_err();
    assert!(
        begun.elapsed() < 5 * SECOND,
        "each answer was in time, all of them were not"
    );
    assert_eq!((error.failure.reason, error.mail_sent), ("timeout", true));
    assert!(error.failure.is_transient());
    assert_eq!(smtp.received_count(), 0);
}

#[tokio::test]
async fn the_reply_to_the_whole_mail_has_its_own_limit() {
    let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(900));
    let smtp = scripted(script).await;
    let pools = within(Duration::from_millis(600));
    let account = account(&smtp);
    assert_eq!(codes(sent(&send(&pools, &account).await)), [250]);
    // And its connection begins anew.
    assert_eq!(codes(sent(&send(&pools, &account).await)), [250]);
    assert_eq!(smtp.counters().connections, 1);
}

#[tokio::test]
async fn the_reply_to_the_whole_mail_may_take_longer_than_one_to_a_command() {
    let smtp = scripted(Script::new().delay(Phase::FinalDot, 2 * SECOND)).await;
    let pools = Setup::default().replies_within(SECOND, 20 * SECOND).pools();
    let outcome = send(&pools, &account(&smtp)).await;
    assert_eq!(codes(sent(&outcome)), [250]);
    assert_eq!(smtp.counters().command("DATA"), 1);
}

#[tokio::test]
async fn connecting_counts_too() {
    let script = Script::new().delay(Phase::Greeting, Duration::from_secs(1));
    let smtp = scripted(script).await;
    let pools = within(Duration::from_millis(200));
    let failure = refused(&pools, server_of(&smtp)).await;
    assert_eq!(
        (failure.reason, failure.stage),
        ("timeout", crate::failure::Stage::Connect)
    );
}
