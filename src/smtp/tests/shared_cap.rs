use std::sync::Mutex;

use postroom_testkit::smtp::{Action, Phase};

use super::*;
use crate::smtp::caps::Caps;

/// A cap shared with workers that are not there.
#[derive(Default)]
struct Ledger {
    held: Mutex<u32>,
    asked: Mutex<u32>,
    wanted: Mutex<bool>,
    /// It does not hear of what is given back.
    silent: Mutex<bool>,
    restated: Mutex<u32>,
}

impl Ledger {
    fn held(&self) -> u32 {
        *self.held.lock().unwrap()
    }

    fn asked(&self) -> u32 {
        *self.asked.lock().unwrap()
    }
}

impl ConnectionCaps for Ledger {
    fn acquire<'a>(&'a self, _: &'a AccountKey, cap: u32) -> BoxFuture<'a, Result<bool, CapsError>> {
        Box::pin(async move {
            *self.asked.lock().unwrap() += 1;
            let mut held = self.held.lock().unwrap();
            let granted = *held < cap;
            *held += u32::from(granted);
            Ok(granted)
        })
    }

    fn wanted(&self) -> BoxFuture<'_, Result<Vec<AccountKey>, CapsError>> {
        let wanted = *self.wanted.lock().unwrap();
        let accounts = wanted.then(|| AccountKey::from_stored("acme/main"));
        Box::pin(async move { Ok(accounts.into_iter().collect()) })
    }

    fn release<'a>(&'a self, _: &'a AccountKey) -> BoxFuture<'a, Result<(), CapsError>> {
        Box::pin(async move {
            if *self.silent.lock().unwrap() {
                return std::future::pending().await;
            }
            *self.held.lock().unwrap() -= 1;
            Ok(())
        })
    }

    fn restate<'a>(&'a self, held: &'a [(AccountKey, u32)]) -> BoxFuture<'a, Result<(), CapsError>> {
        Box::pin(async move {
            *self.restated.lock().unwrap() += 1;
            *self.held.lock().unwrap() = held.iter().map(|(_, count)| count).sum();
            Ok(())
        })
    }
}

fn capped(smtp: &SmtpServer, cap: u32) -> Arc<Submission> {
    Arc::new(Submission {
        max_connections: Some(cap),
        ..submission(server_of(smtp))
    })
}

fn shared() -> (Arc<Ledger>, Setup) {
    let ledger = Arc::new(Ledger::default());
    let setup = Setup {
        caps: Arc::<Ledger>::clone(&ledger),
        ..Setup::default()
    };
    (ledger, setup)
}

#[tokio::test]
async fn a_lease_on_the_cap_lasts_as_long_as_its_connection() {
    let smtp = scripted(Script::new()).await;
    let (ledger, mut setup) = shared();
    setup.tuning.shared_idle = Duration::from_millis(80);
    let pools = setup.pools();
    let account = capped(&smtp, 3);
    send(&pools, &account).await;
    send(&pools, &account).await;
    assert_eq!(
        (ledger.held(), ledger.asked()),
        (1, 1),
        "held while idle, asked once"
    );
    until("given back after idling", || ledger.held() == 0).await;
    smtp.wait_closed(SECOND).await;
    open(lease(&pools, &account).await, &to(&["a@example.org"]))
        .await
        .unwrap()
        .abandon();
    until("given back after a crash landing", || ledger.held() == 0).await;
    drop(lease(&pools, &account).await);
    pools.close().await;
    assert_eq!(ledger.held(), 0, "given back at the end");
}

#[tokio::test]
async fn a_denial_is_busy_and_the_account_counts_as_full_for_a_moment() {
    let smtp = scripted(Script::new()).await;
    let (ledger, mut setup) = shared();
    setup.tuning.full_for = Duration::from_millis(60);
    let metrics = Arc::clone(&setup.metrics);
    let pools = setup.pools();
    let account = capped(&smtp, 2);
    *ledger.held.lock().unwrap() = 2;
    assert_eq!(pools.checkout(&account).await.unwrap_err(), CheckoutError::Busy);
    assert_eq!(pools.capacity(&account.key).total(), 0);
    assert_eq!(metrics.smtp_connects.with_label_values(&["denied"]).get(), 1);
    *ledger.held.lock().unwrap() = 1;
    let room = || pools.capacity_within(&account.key, Some(2)).openable;
    until("room again", || room() == 2).await;
    send(&pools, &account).await;
    assert_eq!(smtp.counters().connections, 1);
}

#[tokio::test]
async fn a_denied_checkout_gets_the_workers_own_connection_that_comes_back_soon() {
    let smtp = scripted(Script::new()).await;
    let (ledger, mut setup) = shared();
    setup.tuning.own_wait = 5 * SECOND;
    let pools = setup.pools();
    let account = capped(&smtp, 2);
    let held = lease(&pools, &account).await;
    // The other one is another worker's.
    *ledger.held.lock().unwrap() = 2;
    let second = tokio::spawn({
        let (pools, account) = (Arc::clone(&pools), Arc::clone(&account));
        async move { pools.checkout(&account).await.is_ok() }
    });
    until("denied", || ledger.asked() == 2).await;
    drop(held);
    assert!(second.await.unwrap());
    assert_eq!((smtp.counters().connections, ledger.asked()), (1, 2));
}

#[tokio::test]
async fn idle_connections_that_another_worker_wants_are_given_up_before_their_time() {
    let smtp = scripted(Script::new()).await;
    let (ledger, setup) = shared();
    let pools = setup.pools();
    let account = capped(&smtp, 1);
    send(&pools, &account).await;
    assert_eq!(ledger.held(), 1);
    *ledger.wanted.lock().unwrap() = true;
    until("given up", || ledger.held() == 0).await;
}

#[tokio::test]
async fn a_replaced_connection_keeps_its_place_under_the_cap() {
    let smtp = scripted(Script::new().once_after(1, Phase::Mail, Action::Close)).await;
    let (ledger, setup) = shared();
    let pools = setup.pools();
    let account = capped(&smtp, 1);
    send(&pools, &account).await;
    send(&pools, &account).await;
    assert_eq!(
        (ledger.held(), ledger.asked(), smtp.counters().connections),
        (1, 1, 2)
    );
}

#[tokio::test]
async fn a_cap_that_appears_holds_at_once_and_no_connection_from_before_it_stays_uncounted() {
    let smtp = scripted(Script::new()).await;
    let (ledger, mut setup) = shared();
    setup.config.pool_size = 3;
    setup.tuning.wait = Duration::from_millis(50);
    let pools = setup.pools();
    let (open_to_all, narrow) = (account(&smtp), capped(&smtp, 1));
    let held = [
        lease(&pools, &open_to_all).await,
        lease(&pools, &open_to_all).await,
    ];
    drop(lease(&pools, &open_to_all).await);
    assert_eq!(pools.checkout(&narrow).await.unwrap_err(), CheckoutError::Busy);
    until("the idle one is closed", || smtp.counters().open == 2).await;
    drop(held);
    smtp.wait_closed(5 * SECOND).await;
    until("their places are free", || pools.checked_out(&narrow.key) == 0).await;
    let one = lease(&pools, &narrow).await;
    assert_eq!(ledger.held(), 1);
    assert_eq!(pools.checkout(&narrow).await.unwrap_err(), CheckoutError::Busy);
    drop(one);
    // And without it again, what is there is used.
    let three = [
        lease(&pools, &open_to_all).await,
        lease(&pools, &open_to_all).await,
        lease(&pools, &open_to_all).await,
    ];
    assert_eq!(smtp.counters().connections, 6);
    assert_eq!((smtp.counters().open, ledger.held()), (3, 1));
    drop(three);
    assert_eq!(pools.capacity(&narrow.key).idle, 3);
}

#[tokio::test]
async fn a_cap_changed_under_load_holds_at_once_and_closes_no_more_than_is_too_many() {
    let smtp = scripted(Script::new()).await;
    let (ledger, mut setup) = shared();
    setup.config.pool_size = 4;
    setup.tuning.wait = Duration::from_millis(50);
    let pools = setup.pools();
    let (wide, narrow) = (capped(&smtp, 4), capped(&smtp, 2));
    let [a, b, c, d] = [
        lease(&pools, &wide).await,
        lease(&pools, &wide).await,
        lease(&pools, &wide).await,
        lease(&pools, &wide).await,
    ];
    drop(d);
    assert_eq!(pools.checkout(&narrow).await.unwrap_err(), CheckoutError::Busy);
    until("the idle one is closed", || smtp.counters().open == 3).await;
    drop(a);
    until("the first to come back is closed", || smtp.counters().open == 2).await;
    until("and given back", || ledger.held() == 2).await;
    drop((b, c));
    assert_eq!(pools.capacity(&narrow.key), Capacity { idle: 2, openable: 0 });
    let two = [lease(&pools, &narrow).await, lease(&pools, &narrow).await];
    assert_eq!(smtp.counters().connections, 4);
    let more = [lease(&pools, &wide).await, lease(&pools, &wide).await];
    assert_eq!((smtp.counters().connections, smtp.counters().open), (6, 4));
    drop((two, more));
    assert_eq!(pools.capacity(&wide.key).idle, 4);
}

#[tokio::test]
async fn a_failed_connect_gives_its_place_back() {
    let smtp = scripted(Script::new().on(Phase::Greeting, Action::reply("421 4.3.2 no"))).await;
    let (ledger, setup) = shared();
    let pools = setup.pools();
    assert!(matches!(
        pools.checkout(&capped(&smtp, 1)).await,
        Err(CheckoutError::Failed(_))
    ));
    until("given back", || ledger.held() == 0).await;
}

#[tokio::test]
async fn a_ledger_that_cannot_be_asked_is_our_own_passing_trouble() {
    struct Down;
    impl ConnectionCaps for Down {
        fn acquire<'a>(&'a self, _: &'a AccountKey, _: u32) -> BoxFuture<'a, Result<bool, CapsError>> {
            Box::pin(async { Err(CapsError("no database".to_owned())) })
        }
        fn release<'a>(&'a self, _: &'a AccountKey) -> BoxFuture<'a, Result<(), CapsError>> {
            Box::pin(async { Err(CapsError("no database".to_owned())) })
        }
        fn restate<'a>(&'a self, _: &'a [(AccountKey, u32)]) -> BoxFuture<'a, Result<(), CapsError>> {
            Box::pin(async { Err(CapsError("no database".to_owned())) })
        }
    }
    let smtp = scripted(Script::new()).await;
    let setup = Setup {
        caps: Arc::new(Down),
        ..Setup::default()
    };
    let Err(CheckoutError::Failed(failure)) = setup.pools().checkout(&capped(&smtp, 1)).await else {
        panic!("it was granted");
    };
    assert_eq!(
        (failure.reason, failure.fault),
        ("connection_cap_unavailable", crate::failure::Fault::Us)
    );
    assert!(failure.is_transient());
}

#[tokio::test(start_paused = true)]
async fn what_the_ledger_did_not_hear_of_is_told_until_it_is_true_and_then_no_more() {
    let ledger = Arc::new(Ledger::default());
    let caps = Arc::new(Caps::new(
        Arc::<Ledger>::clone(&ledger),
        tokio::runtime::Handle::current(),
    ));
    let key = AccountKey::from_stored("acme/main");
    let acquire = async || caps.acquire(&key, 2).await.unwrap();
    let (first, second) = (acquire().await.unwrap(), acquire().await.unwrap());
    assert!(acquire().await.is_none());
    *ledger.silent.lock().unwrap() = true;
    drop(first);
    tokio::time::sleep(11 * SECOND).await;
    assert_eq!(ledger.held(), 2, "one of them is not there any more");
    *ledger.silent.lock().unwrap() = false;
    let tell = async || {
        tokio::time::sleep(16 * SECOND).await;
        caps.restate().await;
    };
    tell().await;
    assert_eq!(ledger.held(), 1);
    // A statement given up may still have been running.
    *ledger.held.lock().unwrap() = 2;
    tell().await;
    assert_eq!(ledger.held(), 1);
    assert!(acquire().await.is_some());
    drop(second);
    for _ in 0..10 {
        tell().await;
    }
    let told = *ledger.restated.lock().unwrap();
    tell().await;
    assert_eq!((ledger.held(), *ledger.restated.lock().unwrap()), (0, told));
}
