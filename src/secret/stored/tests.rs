use super::*;
use crate::directory::scratch::{KEY, OTHER_KEY, Scratch, keys};

/// Accounts `acme/a1` and so on, each with its name as password, sealed with the key; the first at number `from`.
async fn accounts(scratch: &Scratch, key: &str, from: usize, count: usize) {
    let keys = keys(key);
    let values: Vec<_> = (from..from + count)
        .map(|n| {
            let aad = account_password_aad(&"acme".parse().unwrap(), &format!("a{n}").parse().unwrap());
            let sealed = keys.seal(format!("a{n}").as_bytes(), &aad);
            format!("('acme', 'a{n}', 'h', 25, 'none', 'u', '{sealed}')")
        })
        .collect();
    scratch
        .execute(&format!(
            "INSERT INTO {{s}}.tenant (id) VALUES ('acme') ON CONFLICT DO NOTHING; \
             INSERT INTO {{s}}.account (tenant, id, host, port, tls, username, password) VALUES {}",
            values.join(",")
        ))
        .await;
}

#[test]
fn the_listed_columns_build_the_same_additional_data_as_their_writers() {
    let aad = account_password_aad(&"acme".parse().unwrap(), &"main".parse().unwrap());
    assert_eq!(aad, "account:acme/main:password");
    assert_eq!((COLUMNS[0].aad)(&["acme", "main"]), aad);
}

#[tokio::test]
async fn any_key_fits_an_empty_installation() {
    let scratch = Scratch::new().await;
    verify_keys(&scratch.db, &keys(KEY)).await.unwrap();
    scratch.end().await;
}

#[tokio::test]
async fn a_missing_or_wrong_key_is_noticed_at_start() {
    let scratch = Scratch::new().await;
    accounts(&scratch, KEY, 0, 3).await;
    accounts(&scratch, OTHER_KEY, 3, 1).await;
    verify_keys(&scratch.db, &keys(&format!("{KEY},{OTHER_KEY}")))
        .await
        .unwrap();
    verify_keys(&scratch.db, &keys(&format!("{OTHER_KEY},{KEY}")))
        .await
        .unwrap();

    let error = verify_keys(&scratch.db, &keys(&KEY.replace("k1", "k9")))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, StoredError::UnknownKeys(kids) if kids == &["k1", "k2"]),
        "{error}"
    );
    assert!(error.to_string().contains("POSTROOM_ENCRYPTION_KEYS"), "{error}");

    let wrong = keys(&format!("{},{OTHER_KEY}", OTHER_KEY.replace("k2", "k1")));
    let error = verify_keys(&scratch.db, &wrong).await.unwrap_err();
    assert!(
        matches!(&error, StoredError::WrongKey(kid) if kid == "k1"),
        "{error}"
    );
    scratch.end().await;
}

#[tokio::test]
async fn with_a_key_that_is_lost_the_installation_goes_on_and_rotation_lists_what_to_set_anew() {
    let scratch = Scratch::new().await;
    accounts(&scratch, KEY, 0, 2).await;
    accounts(&scratch, OTHER_KEY, 2, 2).await;
    assert!(verify_keys(&scratch.db, &keys(OTHER_KEY)).await.is_err());
    let others = keys(&format!("{OTHER_KEY},k1:lost"));
    verify_keys(&scratch.db, &others).await.unwrap();
    // A previous secret cannot be set anew.
    endpoint(&scratch, Some(OTHER_KEY), Some(KEY)).await;
    let new = keys(&format!("k3:{},{OTHER_KEY},k1:lost", &KEY[3..]));
    verify_sealing(&scratch.db, &new).await.unwrap();
    let rotated = rotate(&scratch.db, &new).await.unwrap();
    assert_eq!((rotated.resealed, rotated.failed), (3, 2));
    let places = ["account:acme/a0:password", "account:acme/a1:password"];
    assert_eq!(rotated.unopened, places);
    scratch.end().await;
}

#[tokio::test]
async fn one_damaged_row_does_not_stop_an_installation() {
    let scratch = Scratch::new().await;
    accounts(&scratch, KEY, 0, 4).await;
    scratch
        .execute(
            "UPDATE {s}.account SET password = (SELECT password FROM {s}.account WHERE id = 'a3') WHERE id = 'a0'; \
             UPDATE {s}.account SET password = 'in clear' WHERE id = 'a1'",
        )
        .await;
    verify_keys(&scratch.db, &keys(KEY)).await.unwrap();
    scratch.end().await;
}

#[tokio::test]
async fn rotation_reseals_everything_and_says_what_it_could_not_open() {
    let scratch = Scratch::new().await;
    accounts(&scratch, KEY, 0, 1_100).await;
    accounts(&scratch, OTHER_KEY, 1_100, 5).await;
    scratch
        .execute("UPDATE {s}.account SET password = 'v1:k1:AAAA' WHERE id = 'a7'")
        .await;
    let versions = "SELECT string_agg(version::text, ',' ORDER BY id) FROM {s}.account";
    let before = scratch.text(versions).await;

    let both = keys(&format!("{OTHER_KEY},{KEY}"));
    let rotated = rotate(&scratch.db, &both).await.unwrap();
    assert_eq!((rotated.resealed, rotated.failed), (1_099, 1));
    assert_eq!(rotated.unopened, ["account:acme/a7:password"]);
    assert_eq!(
        scratch.text(versions).await,
        before,
        "the credentials are the same"
    );

    let sealed = scratch
        .text("SELECT password FROM {s}.account WHERE id = 'a1000'")
        .await;
    let opened = keys(OTHER_KEY)
        .open(&sealed, "account:acme/a1000:password")
        .unwrap();
    assert_eq!(secrecy::ExposeSecret::expose_secret(&opened), "a1000");

    assert_eq!(rotate(&scratch.db, &both).await.unwrap().resealed, 0);
    scratch.execute("DELETE FROM {s}.account WHERE id = 'a7'").await;
    verify_keys(&scratch.db, &keys(OTHER_KEY)).await.unwrap();
    scratch.end().await;
}

/// `acme/hook` with these sealed signing secrets, the present one and the one before.
async fn endpoint(scratch: &Scratch, secret: Option<&str>, previous: Option<&str>) {
    let sealed = |key: Option<&str>| {
        key.map_or("NULL".to_owned(), |key| {
            format!("'{}'", keys(key).seal(b"s", "endpoint:acme/hook:secret"))
        })
    };
    scratch
        .execute(&format!(
            "INSERT INTO {{s}}.tenant (id) VALUES ('acme') ON CONFLICT DO NOTHING; \
             INSERT INTO {{s}}.endpoint (tenant, name, url, secret, previous_secret) \
             VALUES ('acme', 'hook', 'https://example.com', {}, {})",
            sealed(secret),
            sealed(previous)
        ))
        .await;
}

#[tokio::test]
async fn a_previous_secret_that_does_not_open_stops_nothing() {
    for previous in [OTHER_KEY.to_owned(), OTHER_KEY.replace("k2", "k1")] {
        let scratch = Scratch::new().await;
        endpoint(&scratch, Some(KEY), Some(&previous)).await;
        verify_keys(&scratch.db, &keys(KEY)).await.unwrap();
        verify_sealing(&scratch.db, &keys(KEY)).await.unwrap();
        scratch.end().await;
    }
}

#[tokio::test]
async fn a_ring_seals_once_its_active_key_has_opened_something() {
    let scratch = Scratch::new().await;
    let impostor = OTHER_KEY.replace("k2", "k1");
    let is_wrong = |checked: Result<(), StoredError>| matches!(checked, Err(StoredError::WrongKey(_)));
    verify_sealing(&scratch.db, &keys(KEY)).await.unwrap();

    endpoint(&scratch, Some(&impostor), None).await;
    assert!(is_wrong(verify_sealing(&scratch.db, &keys(KEY)).await));

    accounts(&scratch, KEY, 0, 1).await;
    verify_sealing(&scratch.db, &keys(KEY)).await.unwrap();
    assert!(is_wrong(verify_keys(&scratch.db, &keys(KEY)).await));

    // A new active key has sealed nothing yet: the ring must open all there is.
    let rotated = keys(&format!("{OTHER_KEY},{KEY}"));
    assert!(is_wrong(verify_sealing(&scratch.db, &rotated).await));
    let alone = verify_sealing(&scratch.db, &keys(OTHER_KEY)).await;
    assert!(matches!(alone, Err(StoredError::UnknownKeys(_))), "{alone:?}");
    scratch.execute("DELETE FROM {s}.endpoint").await;
    verify_sealing(&scratch.db, &rotated).await.unwrap();
    scratch.end().await;
}
