use secrecy::ExposeSecret;

use super::*;
use crate::directory::scratch::{KEY, OTHER_KEY, Scratch, keys};
use crate::secret::SecretError;

fn id(text: &str) -> TenantId {
    text.parse().unwrap()
}

async fn tenants(scratch: &Scratch) {
    let password = keys(KEY).seal(b"hunter2", "account:acme/main:password");
    scratch
        .execute(&format!(
            "INSERT INTO {{s}}.tenant (id, name, fallback, on_uncertain, limits, large_file_bytes, large_file_action) \
             VALUES ('acme', 'Acme Ltd', 'platform', 'hold', '[{{\"limit\":5,\"per\":1000000,\"unit\":\"messages\"}}]', \
             1000, 'rewrite'), ('globex', NULL, 'never', 'resend', '[]', NULL, 'warn'); \
             INSERT INTO {{s}}.account (tenant, id, host, port, tls, username, password, from_address, max_connections, \
             max_attempts, max_age_seconds, is_default, version) VALUES \
             ('acme', 'main', 'smtp.acme.example', 587, 'starttls', 'u', '{password}', 'Office <o@acme.example>', 3, \
             7, 3600, true, 42), ('acme', 'bulk', 'bulk.acme.example', 25, 'none', NULL, NULL, NULL, NULL, NULL, NULL, \
             false, 1), ('-', 'relay', 'relay.example', 465, 'implicit', NULL, NULL, NULL, NULL, NULL, NULL, true, 1)"
        ))
        .await;
}

#[tokio::test]
async fn a_tenant_comes_with_everything_the_worker_needs() {
    let scratch = Scratch::new().await;
    tenants(&scratch).await;
    let directory = Directory::new(scratch.db.clone(), keys(KEY), RetryPolicy::default());
    let acme = directory.tenant(&id("acme")).await.unwrap().unwrap();
    assert_eq!(acme.tenant.name.as_deref(), Some("Acme Ltd"));
    assert_eq!(
        (acme.tenant.fallback.as_str(), acme.tenant.on_uncertain.as_str()),
        ("platform", "hold")
    );
    assert!(acme.tenant.limited);
    assert_eq!(acme.tenant.large_files.threshold, Some(1000));
    assert_eq!(acme.default.as_ref().unwrap().as_str(), "main");
    assert_eq!(acme.accounts.len(), 2);

    let main = &acme.accounts[&"main".parse().unwrap()];
    assert_eq!(
        (main.key.as_str(), main.version, main.is_default),
        ("acme/main", 42, true)
    );
    assert_eq!(
        (main.server.host.as_str(), main.server.port),
        ("smtp.acme.example", 587)
    );
    let credentials = main.server.credentials.as_ref().unwrap();
    assert_eq!(
        (
            credentials.username.as_str(),
            credentials.password.expose_secret()
        ),
        ("u", "hunter2")
    );
    assert_eq!(main.from.as_ref().unwrap().to_string(), "Office <o@acme.example>");
    assert_eq!((main.max_connections, main.retry.max_attempts), (Some(3), 7));
    assert_eq!(main.retry.max_age, Duration::from_hours(1));
    assert!(!main.server.trusted && !main.limited && main.locked.is_none());
    assert!(!format!("{acme:?}").contains("hunter2"));

    let bulk = &acme.accounts[&"bulk".parse().unwrap()];
    assert!(bulk.server.credentials.is_none() && bulk.locked.is_none());
    assert_eq!(bulk.retry, RetryPolicy::default());

    let platform = directory.tenant(&TenantId::platform()).await.unwrap().unwrap();
    assert!(
        platform.accounts[&"relay".parse().unwrap()].server.trusted,
        "the operator's own"
    );
    scratch.end().await;
}

#[tokio::test]
async fn a_password_whose_key_is_missing_locks_its_account_only() {
    let scratch = Scratch::new().await;
    tenants(&scratch).await;
    let directory = Directory::new(scratch.db.clone(), keys(OTHER_KEY), RetryPolicy::default());
    let acme = directory.tenant(&id("acme")).await.unwrap().unwrap();
    let main = &acme.accounts[&"main".parse().unwrap()];
    assert_eq!(
        main.locked,
        Some(SecretError::UnknownKey { kid: "k1".to_owned() })
    );
    assert!(main.server.credentials.is_none());
    assert!(acme.accounts[&"bulk".parse().unwrap()].locked.is_none());
    scratch.end().await;
}

#[tokio::test]
async fn changes_and_new_tenants_arrive_within_seconds() {
    let scratch = Scratch::new().await;
    tenants(&scratch).await;
    let directory = Directory::new(scratch.db.clone(), keys(KEY), RetryPolicy::default());
    let old = directory.tenant(&id("globex")).await.unwrap().unwrap();
    assert!(directory.tenant(&id("initech")).await.unwrap().is_none());
    scratch.execute("UPDATE {s}.tenant SET name = 'new' WHERE id = 'globex'; INSERT INTO {s}.tenant VALUES ('initech')").await;
    // Still from memory.
    assert!(Arc::ptr_eq(
        &old,
        &directory.tenant(&id("globex")).await.unwrap().unwrap()
    ));

    let deadline = Instant::now() + Duration::from_secs(10);
    while directory
        .tenant(&id("globex"))
        .await
        .unwrap()
        .unwrap()
        .tenant
        .name
        .is_none()
        || directory.tenant(&id("initech")).await.unwrap().is_none()
    {
        assert!(Instant::now() < deadline, "changes never arrived");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    scratch.end().await;
}

#[tokio::test]
async fn many_tenants_wanted_at_once_take_few_statements() {
    let scratch = Scratch::new().await;
    scratch
        .execute("INSERT INTO {s}.tenant (id) SELECT 't' || n FROM generate_series(1, 1200) n")
        .await;
    let directory = Arc::new(Directory::new(
        scratch.db.clone(),
        keys(KEY),
        RetryPolicy::default(),
    ));
    let mut tasks = tokio::task::JoinSet::new();
    for n in 1..=1200 {
        let directory = Arc::clone(&directory);
        tasks.spawn(async move {
            directory
                .tenant(&id(&format!("t{n}")))
                .await
                .unwrap()
                .unwrap()
                .tenant
                .id
                .clone()
        });
    }
    let mut found: Vec<_> = tasks.join_all().await;
    found.sort();
    found.dedup();
    assert_eq!(found.len(), 1200);

    let names: Vec<_> = (1..=1300).map(|n| id(&format!("t{n}"))).collect();
    directory.prefetch(&names).await.unwrap();
    let counts = {
        let known = directory.known.lock().unwrap();
        let absent = known.values().filter(|known| known.entry.is_none()).count();
        (known.len(), absent)
    };
    assert_eq!(counts, (1300, 100));
    scratch.end().await;
}

#[tokio::test]
async fn tenants_in_use_are_read_again_together() {
    let scratch = Scratch::new().await;
    scratch
        .execute("INSERT INTO {s}.tenant (id) SELECT 't' || n FROM generate_series(1, 300) n")
        .await;
    let directory = Directory::new(scratch.db.clone(), keys(KEY), RetryPolicy::default());
    let names: Vec<_> = (1..=300).map(|n| id(&format!("t{n}"))).collect();
    directory.prefetch(&names).await.unwrap();
    for name in &names[..200] {
        assert!(directory.tenant(name).await.unwrap().is_some());
    }
    let read_at = |n: usize| directory.known.lock().unwrap()[&names[n]].since;
    let before = read_at(0);
    tokio::time::sleep(FRESH).await;
    assert!(directory.tenant(&names[0]).await.unwrap().is_some());
    assert!(read_at(199) == read_at(0) && read_at(0) > before);
    assert_eq!(read_at(200), before, "nobody had asked for it");
    scratch.end().await;
}

#[tokio::test]
async fn a_row_that_makes_no_sense_fails_its_tenant_only() {
    let scratch = Scratch::new().await;
    tenants(&scratch).await;
    scratch
        .execute("UPDATE {s}.account SET from_address = 'nonsense' WHERE id = 'bulk'")
        .await;
    let directory = Directory::new(scratch.db.clone(), keys(KEY), RetryPolicy::default());
    directory.prefetch(&[id("acme"), id("globex")]).await.unwrap();
    assert!(directory.tenant(&id("globex")).await.unwrap().is_some());
    let error = directory.tenant(&id("acme")).await.unwrap_err();
    assert!(error.to_string().contains("acme/bulk"), "{error}");
    scratch.end().await;
}

#[tokio::test]
async fn without_the_database_a_tenant_is_unknown_to_us_not_missing() {
    let config = crate::config::Database {
        url: "postgres://127.0.0.1:1/d".into(),
        schema: "s".to_owned(),
        ca_file: None,
        pool_size: 1,
    };
    let directory = Directory::new(
        Database::connect(&config).unwrap(),
        keys(KEY),
        RetryPolicy::default(),
    );
    assert!(matches!(
        directory.tenant(&id("acme")).await,
        Err(DirectoryError::Database(_))
    ));
}

#[test]
fn memory_is_bounded() {
    let config = crate::config::Database {
        url: "postgres://127.0.0.1:1/d".into(),
        schema: "s".to_owned(),
        ca_file: None,
        pool_size: 1,
    };
    let directory = Directory::new(
        Database::connect(&config).unwrap(),
        keys(KEY),
        RetryPolicy::default(),
    );
    for round in 0..3 {
        let flood = (0..CAPACITY - 1)
            .map(|n| (id(&format!("r{round}n{n}")), Ok(None)))
            .collect();
        directory.remember(&flood);
        assert!(directory.known.lock().unwrap().len() <= CAPACITY);
    }
}
