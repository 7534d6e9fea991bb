//! What reaches a webhook, and in which form.

use std::time::Duration;

use bytes::Bytes;
use postroom_testkit::webhook::{Reply, WebhookReceiver};

use super::world::{PATIENCE, World, ids, until};

#[tokio::test]
async fn a_report_is_recorded_then_acked_then_delivered_signed() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    let secret = world.set("acme", "default", &hook, &[]).await;
    let running = world.start();
    running.publish(1, Some("evt_1"), "acme", "mail.sent");
    let received = hook.wait_for(1, PATIENCE).await.unwrap();
    assert_eq!(received[0].event_id(), "evt_1");
    assert_eq!(received[0].path, "/acme/default");
    assert_eq!(received[0].header("content-type"), "application/json");
    assert!(received[0].header("user-agent").starts_with("postroom/"));
    assert_eq!(received[0].header("authorization"), "");
    assert_eq!(received[0].json()["data"]["tenant"], "acme");
    received[0].verify(&secret).unwrap();
    assert!(
        received[0]
            .verify("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")
            .is_err()
    );
    assert_eq!(*running.settled.acked.lock().unwrap(), [1]);
    world.until_deliveries("delivered", 1).await;
    running.stop().await;
}

#[tokio::test]
async fn no_report_is_acked_before_postgres_has_it() {
    let world = World::connected(&["acme"], 8).await;
    let locking = world.database.client().await.unwrap();
    let lock = world
        .database
        .sql("BEGIN; LOCK TABLE {s}.webhook_event IN SHARE MODE");
    locking.batch_execute(&lock).await.unwrap();
    let running = world.start();
    running.publish(1, Some("evt_1"), "acme", "mail.sent");
    let stuck = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'
                 AND query LIKE '%{s}.webhook_record_v%'";
    until(async || world.count(stuck).await == 1).await;
    let acked = || running.settled.acked.lock().unwrap().clone();
    let early = acked();
    locking.batch_execute("COMMIT").await.unwrap();
    assert!(early.is_empty());
    until(async || acked() == [1]).await;
    running.stop().await;
}

#[tokio::test]
async fn a_repeated_report_is_delivered_once() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    let (one, two) = (world.start(), world.start());
    for handle in 0..50 {
        let id = format!("evt_{}", handle % 10);
        one.publish(handle, Some(&id), "acme", "mail.sent");
        two.publish(handle, Some(&id), "acme", "mail.sent");
    }
    until(async || one.settled.acked.lock().unwrap().len() + two.settled.acked.lock().unwrap().len() == 100)
        .await;
    world.until_deliveries("delivered", 10).await;
    let received = hook.received();
    assert_eq!(received.len(), 10, "{:?}", ids(&received));
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn what_is_no_report_is_dead_lettered_and_blocks_nothing() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    let running = world.start();
    running.publish(1, None, "acme", "mail.sent");
    running.publish_raw(
        2,
        Some("evt_2"),
        "report.acme.mail.sent",
        Bytes::from_static(b"{\"type\":"),
    );
    running.publish_raw(3, Some("evt_3"), "low.acme", Bytes::from_static(b"{}"));
    running.publish(4, Some("evt_4"), "acme", "mail.sent");
    hook.wait_for(1, PATIENCE).await.unwrap();
    assert_eq!(*running.settled.acked.lock().unwrap(), [4]);
    assert_eq!(
        *running.settled.dead.lock().unwrap(),
        [
            (1, "invalid_event_id"),
            (2, "invalid_report"),
            (3, "invalid_routing_key")
        ]
    );
    running.stop().await;
}

#[tokio::test]
async fn endpoints_get_what_their_filter_lets_through() {
    let world = World::new(&["acme"]).await;
    let (plain, all, failures) = tokio::join!(
        WebhookReceiver::start(),
        WebhookReceiver::start(),
        WebhookReceiver::start()
    );
    let (plain, all, failures) = (plain.unwrap(), all.unwrap(), failures.unwrap());
    world.set("acme", "plain", &plain, &[]).await;
    world.set("acme", "all", &all, &["--events", "*"]).await;
    world
        .set(
            "acme",
            "failures",
            &failures,
            &["--events", "mail.failed,mail.rejected"],
        )
        .await;
    let running = world.start();
    for (id, kind) in [
        ("evt_a", "mail.sent"),
        ("evt_b", "mail.deferred"),
        ("evt_c", "mail.failed"),
    ] {
        running.publish(0, Some(id), "acme", kind);
    }
    world.until_deliveries("delivered", 6).await;
    assert_eq!(ids(&plain.received()), ["evt_a", "evt_c"]);
    assert_eq!(ids(&all.received()), ["evt_a", "evt_b", "evt_c"]);
    assert_eq!(ids(&failures.received()), ["evt_c"]);
    running.stop().await;
}

#[tokio::test]
async fn the_global_endpoint_gets_the_reports_of_tenants_without_one_or_of_all() {
    let world = World::new(&["acme", "umbrella"]).await;
    let (own, global, all) = tokio::join!(
        WebhookReceiver::start(),
        WebhookReceiver::start(),
        WebhookReceiver::start()
    );
    let (own, global, all) = (own.unwrap(), global.unwrap(), all.unwrap());
    world.set("acme", "default", &own, &[]).await;
    world.set("-", "default", &global, &[]).await;
    world.set("-", "audit", &all, &["--all"]).await;
    // The last tenant is not even in the directory: the report of a rejected job.
    world
        .record(&[
            ("evt_a", "acme", "mail.sent"),
            ("evt_u", "umbrella", "mail.sent"),
            ("evt_x", "nobody", "mail.rejected"),
        ])
        .await;
    let running = world.start();
    world.until_deliveries("delivered", 6).await;
    assert_eq!(ids(&own.received()), ["evt_a"]);
    assert_eq!(ids(&global.received()), ["evt_u", "evt_x"]);
    assert_eq!(ids(&all.received()), ["evt_a", "evt_u", "evt_x"]);
    running.stop().await;
}

#[tokio::test]
async fn an_event_that_nobody_wants_is_not_kept() {
    let world = World::new(&["acme"]).await;
    assert_eq!(world.record(&[("evt_1", "acme", "mail.sent")]).await, 0);
    assert_eq!(world.count("SELECT count(*) FROM {s}.webhook_event").await, 0);
}

#[tokio::test]
async fn bearer_and_basic_credentials_are_sent() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    let url = hook.url("/");
    world
        .endpoint(
            &["set", "acme", "bearer", "--url", &url, "--bearer-stdin"],
            "s3cret-token\n",
        )
        .await
        .unwrap();
    let basic = [
        "set",
        "acme",
        "basic",
        "--url",
        &url,
        "--basic-user",
        "Aladdin",
        "--password-stdin",
    ];
    world.endpoint(&basic, "open sesame\n").await.unwrap();
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    let received = hook.wait_for(2, PATIENCE).await.unwrap();
    let mut sent: Vec<&str> = received
        .iter()
        .map(|request| request.header("authorization"))
        .collect();
    sent.sort_unstable();
    assert_eq!(
        sent,
        ["Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==", "Bearer s3cret-token"]
    );
    assert_eq!(received[0].header("webhook-signature"), "");
    running.stop().await;
}

#[tokio::test]
async fn both_secrets_sign_while_they_are_rotated() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    let old = world.set("acme", "default", &hook, &[]).await;
    let new = world
        .set("acme", "default", &hook, &["--rotate-keep", "1h"])
        .await;
    assert_ne!(old, new);
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    let received = hook.wait_for(1, PATIENCE).await.unwrap();
    received[0].verify(&old).unwrap();
    received[0].verify(&new).unwrap();
    assert_eq!(received[0].header("webhook-signature").split(' ').count(), 2);
    world
        .sql("UPDATE {s}.endpoint SET previous_secret_until = clock_timestamp()")
        .await;
    world.record(&[("evt_2", "acme", "mail.sent")]).await;
    let received = hook.wait_for(2, PATIENCE).await.unwrap();
    received[1].verify(&new).unwrap();
    assert!(received[1].verify(&old).is_err());
    world.bridge().forget().await.unwrap();
    let kept = "SELECT count(*) FROM {s}.endpoint WHERE previous_secret IS NOT NULL";
    assert_eq!(world.count(kept).await, 0);
    running.stop().await;
}

#[tokio::test]
async fn a_second_rotation_asks_which_secret_the_receiver_knows_and_leaves_it_that_one() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    let known = world.set("acme", "default", &hook, &[]).await;
    let rotate = ["set", "acme", "default", "--generate-secret"];
    // Given out, as far as anybody knows, and never seen.
    let (unseen, _) = world.endpoint(&rotate, "").await.unwrap();
    let refused = world.endpoint(&rotate, "").await.unwrap_err();
    assert!(refused.contains("--receiver-has"), "{refused}");
    let previous = [&rotate[..], &["--receiver-has", "previous"]].concat();
    let (given, _) = world.endpoint(&previous, "").await.unwrap();
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    let received = hook.wait_for(1, PATIENCE).await.unwrap();
    received[0].verify(&known).unwrap();
    received[0].verify(given.trim()).unwrap();
    assert!(received[0].verify(unseen.trim()).is_err());
    let current = [&rotate[..], &["--receiver-has", "current"]].concat();
    let (newest, _) = world.endpoint(&current, "").await.unwrap();
    world.record(&[("evt_2", "acme", "mail.sent")]).await;
    let received = hook.wait_for(2, PATIENCE).await.unwrap();
    received[1].verify(given.trim()).unwrap();
    received[1].verify(newest.trim()).unwrap();
    assert!(received[1].verify(&known).is_err());
    // Over at once, if that is wanted.
    let at_once = [&rotate[..], &["--rotate-keep", "0"]].concat();
    let (last, _) = world.endpoint(&at_once, "").await.unwrap();
    world.record(&[("evt_3", "acme", "mail.sent")]).await;
    let received = hook.wait_for(3, PATIENCE).await.unwrap();
    received[2].verify(last.trim()).unwrap();
    assert!(received[2].verify(newest.trim()).is_err());
    running.stop().await;
}

#[tokio::test]
async fn a_secret_that_is_set_again_rotates_nothing() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    let secret = world.set("acme", "default", &hook, &[]).await;
    for _ in 0..3 {
        let again = ["set", "acme", "default", "--secret-stdin"];
        world.endpoint(&again, &format!("{secret}\n")).await.unwrap();
        let shown = world.show("acme", "default").await;
        assert!(shown["previous_secret_until"].is_null(), "{shown}");
    }
}

#[tokio::test]
async fn a_redirect_is_a_failure_and_not_followed() {
    let world = World::new(&["acme"]).await;
    let (hook, elsewhere) = (
        WebhookReceiver::start().await.unwrap(),
        WebhookReceiver::start().await.unwrap(),
    );
    hook.script([Reply::Redirect(elsewhere.url("/stolen"))]);
    world.set("acme", "default", &hook, &[]).await;
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    world.until_deliveries("delivered", 1).await;
    assert_eq!(ids(&hook.received()), ["evt_1", "evt_1"]);
    assert!(elsewhere.received().is_empty());
    running.stop().await;
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    hook.script([Reply::RetryAfter(429, "2".into())]);
    world.set("acme", "default", &hook, &[]).await;
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    hook.wait_for(1, PATIENCE).await.unwrap();
    world.until_deliveries("pending", 1).await;
    // The endpoint asked to be left alone: that goes for other events too.
    world.record(&[("evt_2", "acme", "mail.sent")]).await;
    let received = hook.wait_for(3, PATIENCE).await.unwrap();
    for later in &received[1..] {
        let waited = later.at.duration_since(received[0].at).unwrap();
        assert!(waited >= Duration::from_millis(1990), "{waited:?}");
    }
    running.stop().await;
}

#[tokio::test]
async fn an_internal_address_is_not_called_unless_allowed() {
    let mut world = World::new(&["acme"]).await;
    world.forbid_loopback();
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "address", &hook, &[]).await;
    let named = format!("http://localhost:{}/", hook.address().port());
    world
        .endpoint(&["set", "acme", "name", "--url", &named, "--generate-secret"], "")
        .await
        .unwrap();
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    for name in ["address", "name"] {
        until(async || world.show("acme", name).await["last_error"].is_string()).await;
        let shown = world.show("acme", name).await;
        let error = shown["last_error"].as_str().unwrap();
        assert!(error.contains("POSTROOM_EGRESS_ALLOW"), "{name}: {error}");
    }
    assert!(hook.received().is_empty());
    running.stop().await;
}

#[tokio::test]
async fn shutdown_finishes_what_is_in_flight() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    hook.always(Reply::Slow(Duration::from_millis(400), 200));
    world.set("acme", "default", &hook, &[]).await;
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    hook.wait_for(1, PATIENCE).await.unwrap();
    running.stop().await;
    assert_eq!(world.deliveries("delivered").await, 1);
}
