use postroom_testkit::smtp::{Action, Phase, TlsSetup};
use postroom_testkit::tls::TestCa;

use super::*;

fn sized(pool_size: usize) -> Setup {
    let mut setup = Setup::default();
    setup.config.pool_size = pool_size;
    setup
}

#[tokio::test]
async fn twenty_sends_at_once_through_a_pool_of_two_open_exactly_two_connections() {
    let smtp = scripted(Script::new().delay(Phase::FinalDot, Duration::from_millis(5))).await;
    let pools = sized(2).pools();
    let account = account(&smtp);
    let sends: Vec<_> = (0..20)
        .map(|_| {
            let (pools, account) = (Arc::clone(&pools), Arc::clone(&account));
            tokio::spawn(async move { send(&pools, &account).await })
        })
        .collect();
    for done in sends {
        assert_eq!(codes(sent(&done.await.unwrap())), [250]);
    }
    let counters = smtp.counters();
    assert_eq!(
        (counters.connections, counters.max_open, smtp.received_count()),
        (2, 2, 20)
    );
    assert_eq!(
        (counters.command("NOOP"), counters.command("RSET")),
        (0, 0),
        "no needless probes"
    );
}

#[tokio::test]
async fn a_full_pool_answers_busy_after_a_short_wait_and_its_capacity_tells() {
    let smtp = scripted(Script::new()).await;
    let mut setup = sized(2);
    setup.tuning.wait = Duration::from_millis(50);
    let pools = setup.pools();
    let account = account(&smtp);
    let key = &account.key;
    let capacity = |idle, openable| Capacity { idle, openable };
    assert_eq!(pools.capacity(key), capacity(0, 2), "unknown accounts are empty");
    assert_eq!(pools.capacity_within(key, Some(1)), capacity(0, 1));
    let first = lease(&pools, &account).await;
    assert_eq!((pools.capacity(key), pools.checked_out(key)), (capacity(0, 1), 1));
    let second = lease(&pools, &account).await;
    assert_eq!((pools.capacity(key).total(), pools.checked_out(key)), (0, 2));
    assert_eq!(pools.checkout(&account).await.unwrap_err(), CheckoutError::Busy);
    drop(first);
    assert_eq!(pools.capacity(key), capacity(1, 0));
    drop(second);
    assert_eq!(pools.capacity(key), capacity(2, 0));
    assert_eq!(smtp.counters().connections, 2);
}

#[tokio::test]
async fn who_waits_gets_the_connection_that_comes_back() {
    let smtp = scripted(Script::new()).await;
    let pools = sized(1).pools();
    let account = account(&smtp);
    let held = lease(&pools, &account).await;
    let waiting = tokio::spawn({
        let (pools, account) = (Arc::clone(&pools), Arc::clone(&account));
        async move { pools.checkout(&account).await.is_ok() }
    });
    tokio::task::yield_now().await;
    drop(held);
    assert!(waiting.await.unwrap());
    assert_eq!(smtp.counters().connections, 1);
}

#[tokio::test]
async fn a_place_that_comes_when_the_time_is_up_is_no_fault_of_the_server() {
    let smtp = scripted(Script::new()).await;
    let mut setup = sized(1);
    setup.config.timeouts.attempt = SECOND;
    let pools = setup.pools();
    let account = account(&smtp);
    let mut held = lease(&pools, &account).await;
    // Who comes next would have to connect.
    held.connection().unwrap().give_up();
    let later = async {
        tokio::time::sleep(2 * SECOND).await;
        drop(held);
    };
    let (checked_out, ()) = tokio::join!(pools.checkout(&account), later);
    assert_eq!(checked_out.unwrap_err(), CheckoutError::Busy);
}

#[tokio::test]
async fn the_latest_used_connection_is_used_first() {
    let smtp = scripted(Script::new()).await;
    let pools = sized(2).pools();
    let account = account(&smtp);
    let (first, second) = (lease(&pools, &account).await, lease(&pools, &account).await);
    drop(first);
    drop(second);
    send(&pools, &account).await;
    send(&pools, &account).await;
    let sessions: Vec<u64> = smtp.received().iter().map(|mail| mail.session).collect();
    assert_eq!(sessions, [1, 1]);
}

#[tokio::test]
async fn a_connection_closes_with_quit_after_its_last_mail_or_its_age() {
    let mut used_up = Setup::default();
    used_up.config.max_messages = 2;
    let mut old = Setup::default();
    old.config.max_age = Duration::ZERO;
    for (setup, connections) in [(used_up, 2), (old, 3)] {
        let smtp = scripted(Script::new()).await;
        let pools = setup.pools();
        let account = account(&smtp);
        for _ in 0..3 {
            send(&pools, &account).await;
        }
        assert_eq!(smtp.counters().connections, connections);
        until("QUIT", || smtp.counters().command("QUIT") >= connections - 1).await;
    }
}

#[tokio::test]
async fn an_idle_connection_is_closed_with_quit_and_its_pool_forgotten() {
    let smtp = scripted(Script::new()).await;
    let mut setup = Setup::default();
    setup.config.max_idle = Duration::from_millis(60);
    let pools = setup.pools();
    let account = account(&smtp);
    send(&pools, &account).await;
    assert_eq!(pools.capacity(&account.key).idle, 1);
    smtp.wait_closed(5 * SECOND).await;
    assert_eq!(smtp.counters().command("QUIT"), 1);
    until("the pool is forgotten", || {
        pools.capacity(&account.key).openable == 4
    })
    .await;
}

#[tokio::test]
async fn a_connection_is_probed_only_after_idling() {
    let smtp = scripted(Script::new()).await;
    let mut setup = Setup::default();
    setup.tuning.probe_after = Duration::ZERO;
    let pools = setup.pools();
    let account = account(&smtp);
    send(&pools, &account).await;
    send(&pools, &account).await;
    assert_eq!(smtp.counters().command("RSET"), 1);
    smtp.set_script(Script::new().on(Phase::Rset, Action::Close));
    send(&pools, &account).await;
    let counters = smtp.counters();
    assert_eq!(
        (counters.connections, smtp.received_count()),
        (2, 3),
        "a dead one is replaced"
    );
}

#[tokio::test]
async fn a_reused_connection_that_is_dead_is_replaced_at_once() {
    for action in [Action::Close, Action::shutting_down()] {
        let smtp = scripted(Script::new().once_after(1, Phase::Mail, action)).await;
        let pools = pools();
        let account = account(&smtp);
        send(&pools, &account).await;
        assert_eq!(codes(sent(&send(&pools, &account).await)), [250]);
        assert_eq!((smtp.counters().connections, smtp.received_count()), (2, 2));
    }
}

#[tokio::test]
async fn a_dead_connection_is_replaced_only_once_and_a_fresh_one_not_at_all() {
    let smtp = scripted(Script::new().after(1, Phase::Mail, Action::Close)).await;
    let pools = pools();
    let account = account(&smtp);
    send(&pools, &account).await;
    let envelope = to(&["a@example.org"]);
    for connections in [2, 3] {
        let error = open(lease(&pools, &account).await, &envelope).await.unwrap_err();
        assert_eq!(error.failure.reason, "connection_lost");
        assert!(error.failure.is_transient() && error.mail_sent);
        assert_eq!(smtp.counters().connections, connections);
    }
}

#[tokio::test]
async fn a_connection_closed_by_the_server_while_idle_is_not_used() {
    let smtp = scripted(Script::new()).await;
    let mut setup = Setup::default();
    setup.tuning.sweep = 60 * SECOND;
    let pools = setup.pools();
    let account = account(&smtp);
    let held = lease(&pools, &account).await;
    drop(held);
    let port = smtp.port();
    drop(smtp);
    until("the server is gone", || {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_err()
    })
    .await;
    // Nothing listens any more: only a connection believed to be alive could be handed out.
    assert!(matches!(
        pools.checkout(&account).await,
        Err(CheckoutError::Failed(_))
    ));
}

#[tokio::test]
async fn new_settings_close_idle_connections_of_old_ones_and_those_in_use_at_their_return() {
    let old = scripted(Script::new()).await;
    let new = scripted(Script::new()).await;
    let pools = pools();
    let before = account(&old);
    let after = Arc::new(Submission {
        version: 2,
        ..submission(server_of(&new))
    });
    let (idle, busy) = (lease(&pools, &before).await, lease(&pools, &before).await);
    drop(idle);
    send(&pools, &after).await;
    until("the idle one says QUIT", || old.counters().command("QUIT") == 1).await;
    open(busy, &to(&["a@example.org"]))
        .await
        .unwrap()
        .finish(MAIL)
        .await;
    old.wait_closed(5 * SECOND).await;
    assert_eq!(old.counters().command("QUIT"), 2);
    // Somebody who still has the old settings gets them, but nothing is kept.
    send(&pools, &before).await;
    old.wait_closed(5 * SECOND).await;
    assert_eq!((old.received_count(), new.received_count()), (2, 1));
    let left = Capacity { idle: 1, openable: 3 };
    until("all places are free", || pools.capacity(&before.key) == left).await;
}

#[tokio::test]
async fn a_lower_bound_takes_effect_while_connections_are_in_use() {
    let smtp = scripted(Script::new()).await;
    let mut setup = sized(3);
    setup.tuning.wait = Duration::from_millis(50);
    let pools = setup.pools();
    let wide = account(&smtp);
    let narrow = Arc::new(Submission {
        version: 2,
        max_connections: Some(1),
        ..submission(server_of(&smtp))
    });
    let held = [lease(&pools, &wide).await, lease(&pools, &wide).await];
    assert_eq!(pools.checkout(&narrow).await.unwrap_err(), CheckoutError::Busy);
    drop(held);
    smtp.wait_closed(5 * SECOND).await;
    until("the places are free", || pools.checked_out(&narrow.key) == 0).await;
    assert_eq!(pools.capacity(&narrow.key), Capacity { idle: 0, openable: 1 });
    let one = lease(&pools, &narrow).await;
    assert_eq!(pools.checkout(&narrow).await.unwrap_err(), CheckoutError::Busy);
    drop(one);
}

#[tokio::test]
async fn closing_says_quit_everywhere_and_hands_out_nothing_more() {
    let ca = TestCa::new();
    let smtp = SmtpServer::builder()
        .tls(TlsSetup::Implicit(ca.server(&["localhost"])))
        .start()
        .await;
    let pools = pools();
    let account = Arc::new(submission(Server {
        tls: TlsMode::Implicit,
        ca_pem: Some(ca.ca_pem().into()),
        ..server_of(&smtp)
    }));
    let leases = [
        lease(&pools, &account).await,
        lease(&pools, &account).await,
        lease(&pools, &account).await,
    ];
    let [first, second, third] = leases;
    drop((first, second));
    pools.close().await;
    assert_eq!(smtp.counters().command("QUIT"), 2);
    drop(third);
    smtp.wait_closed(5 * SECOND).await;
    assert_eq!(smtp.counters().command("QUIT"), 3);
    assert_eq!(pools.checkout(&account).await.unwrap_err(), CheckoutError::Busy);
}

#[tokio::test]
async fn closing_does_not_wait_for_a_server_that_does_not_answer_quit() {
    let smtp = scripted(Script::new().on(Phase::Quit, Action::Silence)).await;
    let pools = pools();
    send(&pools, &account(&smtp)).await;
    let begun = std::time::Instant::now();
    pools.close().await;
    assert!(begun.elapsed() < 5 * SECOND);
    smtp.wait_closed(SECOND).await;
}

#[tokio::test]
async fn a_connection_for_one_mail_is_closed_after_it() {
    let smtp = scripted(Script::new()).await;
    let pools = pools();
    let lease = pools.connect_once(&server_of(&smtp)).await.unwrap();
    open(lease, &to(&["a@example.org"]))
        .await
        .unwrap()
        .finish(MAIL)
        .await;
    smtp.wait_closed(5 * SECOND).await;
    assert_eq!((smtp.counters().command("QUIT"), smtp.received_count()), (1, 1));
}

#[tokio::test]
async fn connections_are_counted_by_state_and_result() {
    let smtp = scripted(Script::new()).await;
    let setup = Setup::default();
    let metrics = Arc::clone(&setup.metrics);
    let pools = setup.pools();
    let account = account(&smtp);
    let state = |name: &str| metrics.smtp_connections.with_label_values(&[name]).get();
    let (one, two) = (lease(&pools, &account).await, lease(&pools, &account).await);
    assert_eq!((state("busy"), state("idle")), (2, 0));
    drop(one);
    assert_eq!((state("busy"), state("idle")), (1, 1));
    open(two, &to(&["a@example.org"])).await.unwrap().abandon();
    pools.close().await;
    assert_eq!((state("busy"), state("idle")), (0, 0));
    assert_eq!(metrics.smtp_connects.with_label_values(&["ok"]).get(), 2);
    assert_eq!(
        metrics
            .smtp_phase
            .with_label_values(&["envelope"])
            .get_sample_count(),
        1
    );
}

#[tokio::test]
async fn a_connection_that_takes_no_more_mails_is_replaced_before_a_mail_is_deferred() {
    for (chunking, reply) in [
        (false, "452 4.3.2 Too many messages in this session"),
        (true, "452 4.3.2 Too many messages in this session"),
        (false, "503 5.5.1 Bad sequence of commands"),
    ] {
        let script = Script::new().mails_per_connection(2, reply);
        let smtp = SmtpServer::builder()
            .chunking(chunking)
            .script(script)
            .start()
            .await;
        let (pools, account) = (pools(), account(&smtp));
        for _ in 0..6 {
            assert_eq!(codes(sent(&send(&pools, &account).await)), [250], "{reply}");
        }
        assert_eq!((smtp.counters().connections, smtp.received_count()), (3, 6));
    }
}

#[tokio::test]
async fn a_refusal_of_mail_on_a_fresh_connection_stands_and_costs_no_other() {
    let script = Script::new().after(2, Phase::Mail, Action::reply("452 4.2.2 Over quota"));
    let smtp = scripted(script).await;
    let (pools, account) = (pools(), account(&smtp));
    send(&pools, &account).await;
    send(&pools, &account).await;
    for _ in 0..5 {
        let refused = open(lease(&pools, &account).await, &to(&["a@example.org"])).await;
        assert_eq!(codes(&refused.unwrap_err().results), [452]);
    }
    let counters = smtp.counters();
    assert_eq!((counters.connections, counters.command("MAIL")), (2, 2 + 6));
}
