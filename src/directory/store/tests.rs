use std::sync::Arc;

use super::*;
use crate::directory::row::parse_mailbox;
use crate::directory::scratch::{KEY, OTHER_KEY, Scratch, keys};
use crate::directory::store::limits::LimitChanges;
use crate::id::AccountId;
use crate::job::{Fallback, OnUncertain, TlsMode};

fn acme() -> TenantId {
    "acme".parse().unwrap()
}

fn account(text: &str) -> AccountId {
    text.parse().unwrap()
}

fn exact(limits: &[&str]) -> LimitChanges {
    LimitChanges {
        exact: limits.iter().map(|limit| limit.parse().unwrap()).collect(),
        ..LimitChanges::default()
    }
}

/// What a new account needs.
fn new_account() -> AccountChange {
    AccountChange {
        host: Some("smtp.example.com".to_owned()),
        port: Some(587),
        tls: Some(TlsMode::StartTls),
        ..AccountChange::default()
    }
}

fn with_password(password: &str) -> AccountChange {
    AccountChange {
        username: Some("u".to_owned()),
        password: Some(password.into()),
        ..new_account()
    }
}

/// A store with tenant `acme`.
async fn with_acme() -> (Scratch, Store) {
    let scratch = Scratch::new().await;
    let store = scratch.store();
    store.set_tenant(&acme(), &TenantChange::default()).await.unwrap();
    (scratch, store)
}

/// What the rate limiter has for a key: limits with their periods in microseconds.
async fn limiter(scratch: &Scratch, key: &str) -> String {
    scratch
        .text(&format!(
            "SELECT coalesce((SELECT lim::text || per::text FROM {{s}}.rate WHERE key = '{key}'), '-')"
        ))
        .await
}

async fn cap(scratch: &Scratch, key: &str) -> String {
    scratch
        .text(&format!(
            "SELECT coalesce((SELECT cap::text FROM {{s}}.connection_cap WHERE account = '{key}'), '-')"
        ))
        .await
}

#[tokio::test]
async fn setting_a_tenant_changes_only_what_is_named() {
    let (scratch, store) = with_acme().await;
    let change = TenantChange {
        name: Some("Acme Ltd".to_owned()),
        fallback: Some(Fallback::Platform),
        on_uncertain: Some(OnUncertain::Hold),
        limits: exact(&["100/1h"]),
        large_file_bytes: Some(1_000_000),
        large_file_action: Some(crate::attachment::LargeFileAction::Rewrite),
    };
    let all = store.set_tenant(&acme(), &change).await.unwrap();
    assert_eq!(
        all,
        store.set_tenant(&acme(), &TenantChange::default()).await.unwrap()
    );
    assert_eq!(all, store.tenant(&acme()).await.unwrap());
    assert_eq!(
        (all.name.as_deref(), all.fallback),
        (Some("Acme Ltd"), Fallback::Platform)
    );

    let change = TenantChange {
        name: Some(String::new()),
        large_file_bytes: Some(0),
        ..TenantChange::default()
    };
    let less = store.set_tenant(&acme(), &change).await.unwrap();
    assert_eq!((&less.name, less.large_files.threshold), (&None, None));
    assert_eq!((less.on_uncertain, less.limits.len()), (OnUncertain::Hold, 1));

    let names: Vec<_> = store
        .tenants()
        .await
        .unwrap()
        .iter()
        .map(|tenant| tenant.id.to_string())
        .collect();
    assert_eq!(names, ["-", "acme"]);
    scratch.end().await;
}

#[tokio::test]
async fn limits_reach_the_limiter_in_the_same_transaction() {
    let (scratch, store) = with_acme().await;
    let change = TenantChange {
        limits: exact(&["100/1h"]),
        ..TenantChange::default()
    };
    store.set_tenant(&acme(), &change).await.unwrap();
    assert_eq!(limiter(&scratch, "acme/").await, "{100}{3600000000}");

    let change = AccountChange {
        limits: exact(&["60/3s", "9/1d:recipients"]),
        max_connections: Some(3),
        ..new_account()
    };
    store
        .set_account(&acme(), &account("main"), &change)
        .await
        .unwrap();
    assert_eq!(
        limiter(&scratch, "acme/main").await,
        "{60,9}{3000000,86400000000}"
    );
    assert_eq!(cap(&scratch, "acme/main").await, "3");

    let change = AccountChange {
        limits: exact(&["0/3s", "0/1d:recipients"]),
        max_connections: Some(0),
        ..AccountChange::default()
    };
    let stored = store
        .set_account(&acme(), &account("main"), &change)
        .await
        .unwrap();
    assert!(stored.limits.is_empty() && stored.max_connections.is_none());
    assert_eq!(limiter(&scratch, "acme/main").await, "-");
    assert_eq!(cap(&scratch, "acme/main").await, "-");

    // A limiter that refuses refuses the whole change.
    scratch
        .execute(
            "CREATE OR REPLACE FUNCTION {s}.set_limits_v1(p_key text, p_limits jsonb) RETURNS void \
                  LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$",
        )
        .await;
    let change = TenantChange {
        name: Some("never".to_owned()),
        limits: exact(&["1/1h"]),
        ..TenantChange::default()
    };
    store.set_tenant(&acme(), &change).await.unwrap_err();
    assert_eq!(store.tenant(&acme()).await.unwrap().name, None);
    scratch.end().await;
}

#[tokio::test]
async fn a_new_account_needs_a_tenant_and_host_port_and_tls() {
    let (scratch, store) = with_acme().await;
    let error = store
        .set_account(&"nope".parse().unwrap(), &account("main"), &new_account())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("postroom tenant set nope"), "{error}");
    assert!(!error.is_wrong_use());

    let change = AccountChange {
        host: Some("h".to_owned()),
        ..AccountChange::default()
    };
    let error = store
        .set_account(&acme(), &account("main"), &change)
        .await
        .unwrap_err();
    assert!(error.to_string().ends_with("add --port, --tls"), "{error}");
    assert!(error.is_wrong_use());
    assert!(store.accounts(&acme()).await.unwrap().is_empty());
    assert!(matches!(
        store.accounts(&"nope".parse().unwrap()).await,
        Err(DirectoryError::NoTenant(_))
    ));
    let error = store.account(&acme(), &account("main")).await.unwrap_err();
    assert!(matches!(error, DirectoryError::NoAccount(_)), "{error}");
    scratch.end().await;
}

#[tokio::test]
async fn values_that_make_no_sense_are_refused() {
    let (scratch, store) = with_acme().await;
    let changes = [
        AccountChange {
            host: Some(String::new()),
            ..new_account()
        },
        AccountChange {
            host: Some("http://x/".to_owned()),
            ..new_account()
        },
        AccountChange {
            host: Some("bücher.example".to_owned()),
            ..new_account()
        },
        AccountChange {
            port: Some(0),
            ..new_account()
        },
        AccountChange {
            username: Some("u".to_owned()),
            ..new_account()
        },
        AccountChange {
            password: Some("p".into()),
            ..new_account()
        },
        AccountChange {
            username: Some("u\n".to_owned()),
            ..with_password("p")
        },
        with_password(""),
        with_password("a\0b"),
        AccountChange {
            max_connections: Some(u32::MAX),
            ..new_account()
        },
    ];
    for change in changes {
        let error = store
            .set_account(&acme(), &account("main"), &change)
            .await
            .unwrap_err();
        assert!(error.is_wrong_use(), "{change:?}: {error}");
    }
    assert!(store.accounts(&acme()).await.unwrap().is_empty());
    scratch.end().await;
}

/// Applies the changes one by one; gives by how much the version rose each time.
async fn rises(store: &Store, changes: Vec<AccountChange>) -> Vec<i64> {
    let mut version = store.account(&acme(), &account("main")).await.unwrap().version;
    let mut rises = Vec::new();
    for change in changes {
        let stored = store
            .set_account(&acme(), &account("main"), &change)
            .await
            .unwrap();
        rises.push(stored.version - version);
        version = stored.version;
    }
    rises
}

#[tokio::test]
async fn what_a_connection_does_not_depend_on_leaves_the_version() {
    let (scratch, store) = with_acme().await;
    store
        .set_account(&acme(), &account("main"), &with_password("one"))
        .await
        .unwrap();
    let from = Some(parse_mailbox("Müller, Jörg <j@acme.example>").unwrap());
    let change = AccountChange {
        from: Some(from.clone()),
        limits: exact(&["1/1h"]),
        max_connections: Some(2),
        max_attempts: Some(3),
        max_age: Some(Duration::from_hours(1)),
        allow_plaintext_auth: Some(true),
        make_default: true,
        ..AccountChange::default()
    };
    let changes = vec![AccountChange::default(), with_password("one"), change];
    assert_eq!(rises(&store, changes).await, [0, 0, 0]);
    let stored = store.account(&acme(), &account("main")).await.unwrap();
    assert_eq!((stored.from, stored.max_attempts), (from, Some(3)));
    assert_eq!(
        (stored.max_age, stored.allow_plaintext_auth),
        (Some(Duration::from_hours(1)), true)
    );
    scratch.end().await;
}

#[tokio::test]
async fn what_a_connection_depends_on_raises_the_version() {
    let (scratch, store) = with_acme().await;
    store
        .set_account(&acme(), &account("main"), &with_password("one"))
        .await
        .unwrap();
    let bare = AccountChange::default;
    let changes = vec![
        with_password("two"),
        AccountChange {
            host: Some("other.example.com".to_owned()),
            ..bare()
        },
        AccountChange {
            port: Some(25),
            ..bare()
        },
        AccountChange {
            tls: Some(TlsMode::Implicit),
            ..bare()
        },
        AccountChange {
            ca_pem: Some("pem".to_owned()),
            ..bare()
        },
        AccountChange {
            username: Some("v".to_owned()),
            ..bare()
        },
        AccountChange {
            username: Some(String::new()),
            ..bare()
        },
    ];
    assert_eq!(rises(&store, changes).await, [1; 7]);
    let old = store.account(&acme(), &account("main")).await.unwrap();
    assert_eq!((old.username, old.password), (None, None));

    store.remove_account(&acme(), &account("main")).await.unwrap();
    let again = store
        .set_account(&acme(), &account("main"), &new_account())
        .await
        .unwrap();
    assert!(
        again.version > old.version,
        "connections of the removed account must not serve the new one"
    );
    scratch.end().await;
}

#[tokio::test]
async fn the_first_account_is_the_default_until_another_is_made_it() {
    let (scratch, store) = with_acme().await;
    let set = async |name: &str, make_default| {
        let change = AccountChange {
            make_default,
            ..new_account()
        };
        store
            .set_account(&acme(), &account(name), &change)
            .await
            .unwrap()
            .is_default
    };
    assert!(set("one", false).await);
    assert!(!set("two", false).await);
    assert!(set("three", true).await);
    assert!(!store.account(&acme(), &account("one")).await.unwrap().is_default);
    // Being the default stays when something else is changed.
    assert!(set("three", false).await);

    store.remove_account(&acme(), &account("three")).await.unwrap();
    assert!(
        store
            .accounts(&acme())
            .await
            .unwrap()
            .iter()
            .all(|account| !account.is_default)
    );
    scratch.end().await;
}

#[tokio::test]
async fn passwords_are_stored_sealed_and_shown_nowhere() {
    let (scratch, store) = with_acme().await;
    let stored = store
        .set_account(&acme(), &account("main"), &with_password("canary-7"))
        .await
        .unwrap();
    let everything = scratch.text("SELECT a::text FROM {s}.account a").await;
    assert!(!format!("{everything}{stored:?}").contains("canary-7"));
    let sealed = stored.password.unwrap();
    assert!(sealed.starts_with("v1:k1:"));
    let opened = keys(KEY).open(&sealed, "account:acme/main:password").unwrap();
    assert_eq!(secrecy::ExposeSecret::expose_secret(&opened), "canary-7");

    let without = Store::new(scratch.db.clone(), None);
    let error = without
        .set_account(&acme(), &account("main"), &with_password("x"))
        .await
        .unwrap_err();
    assert!(matches!(error, DirectoryError::NoKeys), "{error}");
    // What needs no key works without.
    let change = AccountChange {
        port: Some(2525),
        ..AccountChange::default()
    };
    assert!(
        without
            .set_account(&acme(), &account("main"), &change)
            .await
            .unwrap()
            .password
            .is_some()
    );

    let wrong = Store::new(scratch.db.clone(), Some(keys(&OTHER_KEY.replace("k2", "k1"))));
    let error = wrong
        .set_account(&acme(), &account("main"), &with_password("x"))
        .await
        .unwrap_err();
    assert!(matches!(error, DirectoryError::Keys(_)), "{error}");
    scratch.end().await;
}

#[tokio::test]
async fn removing_a_tenant_removes_accounts_and_limits() {
    let (scratch, store) = with_acme().await;
    let change = TenantChange {
        limits: exact(&["1/1h"]),
        ..TenantChange::default()
    };
    store.set_tenant(&acme(), &change).await.unwrap();
    let change = AccountChange {
        limits: exact(&["1/1h"]),
        max_connections: Some(1),
        ..new_account()
    };
    store
        .set_account(&acme(), &account("main"), &change)
        .await
        .unwrap();
    scratch
        .execute(
            "INSERT INTO {s}.account_health (account, state, until) \
             VALUES ('acme/main', 1, now()), ('acme-2/main', 1, now())",
        )
        .await;
    store.remove_tenant(&acme()).await.unwrap();
    let left = "SELECT (SELECT count(*) FROM {s}.rate) + (SELECT count(*) FROM {s}.connection_cap) \
                + (SELECT count(*) FROM {s}.account) || ''";
    assert_eq!(scratch.text(left).await, "0");
    let ill = "SELECT string_agg(account, ',') FROM {s}.account_health";
    assert_eq!(scratch.text(ill).await, "acme-2/main");
    assert!(matches!(
        store.remove_tenant(&acme()).await,
        Err(DirectoryError::NoTenant(_))
    ));
    assert!(matches!(
        store.remove_tenant(&TenantId::platform()).await,
        Err(DirectoryError::Platform)
    ));
    let error = store
        .remove_account(&TenantId::platform(), &account("x"))
        .await
        .unwrap_err();
    assert!(matches!(error, DirectoryError::NoAccount(_)), "{error}");
    scratch.end().await;
}

/// A settlement locks limits, then lanes.
#[tokio::test]
async fn removing_a_tenant_holds_no_lane_while_it_waits_for_a_limit() {
    let (scratch, store) = with_acme().await;
    let change = AccountChange {
        limits: exact(&["1/1h"]),
        ..new_account()
    };
    store
        .set_account(&acme(), &account("main"), &change)
        .await
        .unwrap();
    scratch
        .execute("INSERT INTO {s}.lane (account, level, tenant, next_at) VALUES ('acme/main', 1, 'acme', 'infinity')")
        .await;
    let mut client = scratch.db.client().await.unwrap();
    let settling = client.transaction().await.unwrap();
    let lock = async |table: &str| {
        let sql = format!("SELECT FROM {{s}}.{table} FOR UPDATE NOWAIT");
        settling.execute(&scratch.db.sql(&sql), &[]).await
    };
    lock("rate").await.unwrap();
    let removing = tokio::spawn(async move { store.remove_tenant(&acme()).await });
    let waiting = "SELECT count(*)::text FROM pg_locks l JOIN pg_class c ON c.oid = l.relation \
                   WHERE c.oid = '{s}.rate'::regclass AND l.locktype = 'tuple'";
    while scratch.text(waiting).await == "0" {
        assert!(!removing.is_finished());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    lock("lane").await.unwrap();
    settling.commit().await.unwrap();
    removing.await.unwrap().unwrap();
    scratch.end().await;
}

#[tokio::test]
async fn changes_at_the_same_time_come_one_after_the_other() {
    let (scratch, store) = with_acme().await;
    let store = Arc::new(store);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..8 {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let change = AccountChange {
                make_default: n % 2 == 0,
                ..new_account()
            };
            store
                .set_account(&acme(), &account(&format!("a{n}")), &change)
                .await
                .unwrap();
        });
    }
    tasks.join_all().await;
    let accounts = store.accounts(&acme()).await.unwrap();
    assert_eq!(accounts.len(), 8);
    assert_eq!(accounts.iter().filter(|account| account.is_default).count(), 1);
    scratch.end().await;
}
