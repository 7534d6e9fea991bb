use postroom_testkit::smtp::{Action, Phase};

use super::*;

/// Runs a future until the server saw a command, then drops it.
async fn cancelled(smtp: &SmtpServer, verb: &str, future: impl Future) {
    tokio::select! {
        _ = future => panic!("it was to be cancelled"),
        () = until(verb, || smtp.counters().command(verb) > 0) => {}
    }
}

#[tokio::test]
async fn a_cancelled_checkout_leaves_no_connection_and_no_place_taken() {
    let smtp = scripted(Script::new().on(Phase::Ehlo, Action::Silence)).await;
    let pools = pools();
    let account = account(&smtp);
    cancelled(&smtp, "EHLO", pools.checkout(&account)).await;
    smtp.wait_closed(5 * SECOND).await;
    assert_eq!(pools.checked_out(&account.key), 0);
}

#[tokio::test]
async fn a_cancelled_open_or_finish_does_not_give_back_a_connection_out_of_step() {
    for phase in [Phase::Rcpt, Phase::FinalDot] {
        let smtp = scripted(Script::new().first(1, phase, Action::Silence)).await;
        let pools = pools();
        let account = account(&smtp);
        cancelled(&smtp, "RCPT", async {
            let transaction = open(lease(&pools, &account).await, &to(&["a@example.org"]))
                .await
                .unwrap();
            transaction.finish(MAIL).await;
            std::future::pending::<()>().await;
        })
        .await;
        smtp.wait_closed(5 * SECOND).await;
        assert_eq!(pools.capacity(&account.key), Capacity { idle: 0, openable: 4 });
        assert_eq!(smtp.received_count(), 0);
        smtp.set_script(Script::new());
        send(&pools, &account).await;
        assert_eq!(smtp.received_count(), 1);
    }
}
