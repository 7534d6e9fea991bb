use postroom_testkit::smtp::{Action, Phase};

use super::*;

/// Runs a future until a condition holds, then drops it.
async fn cancelled(what: &str, condition: impl Fn() -> bool, future: impl Future) {
    tokio::select! {
        _ = future => panic!("it was to be cancelled"),
        () = until(what, condition) => {}
    }
}

#[tokio::test]
async fn a_cancelled_checkout_leaves_no_connection_and_no_place_taken() {
    let smtp = scripted(Script::new().on(Phase::Ehlo, Action::Silence)).await;
    let pools = pools();
    let account = account(&smtp);
    let greeted = || smtp.counters().command("EHLO") > 0;
    cancelled("EHLO", greeted, pools.checkout(&account)).await;
    smtp.wait_closed(5 * SECOND).await;
    assert_eq!(pools.checked_out(&account.key), 0);
}

#[tokio::test]
async fn a_cancelled_open_or_finish_does_not_give_back_a_connection_out_of_step() {
    // The server takes what it has read to the end: that shows how far the client is.
    for (phase, action, taken) in [
        (Phase::Rcpt, Action::Silence, 0),
        (Phase::FinalDot, Action::TakeThenSilence, 1),
    ] {
        let smtp = scripted(Script::new().first(1, phase, action)).await;
        let pools = pools();
        let account = account(&smtp);
        let seen = || smtp.counters().command("RCPT") > 0 && smtp.received_count() == taken;
        cancelled("envelope or mail", seen, async {
            let transaction = open(lease(&pools, &account).await, &to(&["a@example.org"]))
                .await
                .unwrap();
            transaction.finish(MAIL).await;
            std::future::pending::<()>().await;
        })
        .await;
        smtp.wait_closed(5 * SECOND).await;
        assert_eq!(pools.capacity(&account.key), Capacity { idle: 0, openable: 4 });
        assert_eq!(smtp.received_count(), taken);
        smtp.set_script(Script::new());
        send(&pools, &account).await;
        assert_eq!(smtp.received_count(), taken + 1);
    }
}
