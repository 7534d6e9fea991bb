//! The operator's commands, and upkeep.

use postroom_testkit::webhook::WebhookReceiver;

use super::world::{PATIENCE, World, ids, keyring, report, until};

#[tokio::test]
async fn secrets_are_write_only() {
    let world = World::new(&["acme"]).await;
    let secret = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
    let arguments = [
        "set",
        "acme",
        "--url",
        "https://example.com/hook",
        "--secret-stdin",
        "--bearer-stdin",
    ];
    let (output, remarks) = world
        .endpoint(&arguments, &format!("{secret}\ntoken-canary\n"))
        .await
        .unwrap();
    assert_eq!((&*output, &*remarks), ("", ""));
    let shown = world.show("acme", "default").await;
    assert_eq!(
        (&shown["has_secret"], &shown["has_credential"]),
        (&true.into(), &true.into())
    );
    let (text, _) = world.endpoint(&["show", "acme"], "").await.unwrap();
    let (list, _) = world.endpoint(&["list", "--json"], "").await.unwrap();
    let client = world.database.client().await.unwrap();
    let row = client
        .query_one(&world.database.sql("SELECT e::text FROM {s}.endpoint e"), &[])
        .await
        .unwrap();
    for place in [shown.to_string(), text, list, row.get(0)] {
        assert!(
            !place.contains("C2FVsBQ") && !place.contains("token-canary"),
            "{place}"
        );
    }
}

#[tokio::test]
async fn secrets_are_not_sealed_with_another_key_of_the_same_name() {
    let mut world = World::new(&["acme"]).await;
    let url = "https://example.com/hook";
    world
        .endpoint(&["set", "acme", "--url", url, "--generate-secret"], "")
        .await
        .unwrap();
    world.keyring = keyring("k1", 9);
    let sealed = "SELECT count(*) FROM {s}.endpoint WHERE secret IS NOT NULL OR credential IS NOT NULL";
    for (arguments, input) in [
        (&["set", "acme", "new", "--url", url, "--generate-secret"][..], ""),
        (&["set", "acme", "new", "--url", url, "--bearer-stdin"], "token\n"),
        (
            &[
                "set",
                "acme",
                "new",
                "--url",
                url,
                "--basic-user",
                "u",
                "--password-stdin",
            ],
            "p\n",
        ),
    ] {
        let error = world.endpoint(arguments, input).await.unwrap_err();
        assert!(error.contains("key `k1` is not the key"), "{error}");
        assert!(!error.contains("whsec_"), "{error}");
    }
    assert_eq!(world.count(sealed).await, 1);
    // What needs no key works.
    world.endpoint(&["set", "acme", "--disable"], "").await.unwrap();
}

#[tokio::test]
async fn an_endpoint_that_is_off_stays_off_since_the_first_time() {
    let world = World::new(&["acme"]).await;
    let first = ["set", "acme", "--url", "https://example.com/", "--disable"];
    world.endpoint(&first, "").await.unwrap();
    let since = world.show("acme", "default").await["disabled_at"].take();
    assert!(since.is_string());
    world.endpoint(&["set", "acme", "--disable"], "").await.unwrap();
    assert_eq!(world.show("acme", "default").await["disabled_at"], since);
    let (_, remarks) = world.endpoint(&["set", "acme", "--enable"], "").await.unwrap();
    assert!(remarks.contains(since.as_str().unwrap()), "{remarks}");
    assert!(world.show("acme", "default").await["disabled_at"].is_null());
}

#[tokio::test]
async fn set_changes_only_what_is_named() {
    let world = World::new(&["acme"]).await;
    let url = "https://example.com/hook";
    let first = [
        "set",
        "acme",
        "--url",
        url,
        "--generate-secret",
        "--events",
        "mail.failed",
    ];
    let (output, remarks) = world.endpoint(&first, "").await.unwrap();
    assert!(output.starts_with("whsec_"), "{output}");
    assert_eq!(remarks, "");
    world
        .endpoint(&["set", "acme", "--basic-user", "u", "--password-stdin"], "p\n")
        .await
        .unwrap();
    let shown = world.show("acme", "default").await;
    assert_eq!((&shown["url"], &shown["auth"]), (&url.into(), &"basic".into()));
    assert_eq!(
        (&shown["username"], &shown["has_secret"]),
        (&"u".into(), &true.into())
    );
    assert_eq!(shown["events"], serde_json::json!(["mail.failed"]));
    assert!(shown["previous_secret_until"].is_null());
    world
        .endpoint(&["set", "acme", "--no-auth", "--events", "default"], "")
        .await
        .unwrap();
    let shown = world.show("acme", "default").await;
    assert_eq!(
        (&shown["auth"], &shown["has_credential"]),
        (&"none".into(), &false.into())
    );
    assert!(shown["events"].is_null());
    world.endpoint(&["remove", "acme"], "").await.unwrap();
    assert_eq!(world.endpoint(&["list", "--json"], "").await.unwrap().0, "[]\n");
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_what_to_do() {
    let world = World::new(&["acme"]).await;
    let url = "https://example.com/";
    for (arguments, input, told) in [
        (&["set", "acme"][..], "", "needs --url"),
        (&["set", "nobody", "--url", url], "", "postroom tenant set nobody"),
        (&["set", "acme", "--url", "ftp://example.com"], "", "https://"),
        (
            &["set", "acme", "--url", "https://u:p@example.com"],
            "",
            "--basic-user",
        ),
        (
            &["set", "acme", "--url", url, "--events", "mail.delivered"],
            "",
            "mail.sent",
        ),
        (
            &["set", "acme", "--url", url, "--secret-stdin"],
            "short\n",
            "whsec_",
        ),
        (
            &["set", "acme", "--url", url, "--secret-stdin"],
            "",
            "no signing secret",
        ),
        (
            &["set", "acme", "--url", url, "--bearer-stdin"],
            "a b\n",
            "printable",
        ),
        (&["set", "acme", "--url", url, "--all"], "", "tenant `-`"),
        (&["show", "acme", "nothing"], "", "endpoint list acme"),
        (&["remove", "acme", "nothing"], "", "no endpoint `nothing`"),
        (
            &["replay", "acme", "nothing", "--failed"],
            "",
            "no endpoint `nothing`",
        ),
        (&["replay", "acme"], "", "--event"),
        (&["replay", "acme", "--since", "yesterday"], "", "neither a time"),
    ] {
        let error = world.endpoint(arguments, input).await.unwrap_err();
        assert!(error.contains(told), "{arguments:?}: {error}");
    }
    let (_, remarks) = world
        .endpoint(&["set", "acme", "--url", "http://example.com"], "")
        .await
        .unwrap();
    assert!(
        remarks.contains("in clear") && remarks.contains("--generate-secret"),
        "{remarks}"
    );
    let error = world
        .endpoint(&["replay", "acme", "--event", "evt_1"], "")
        .await
        .unwrap_err();
    assert!(error.contains("not remembered"), "{error}");
}

#[tokio::test]
async fn endpoints_are_listed_by_tenant() {
    let world = World::new(&["acme", "umbrella"]).await;
    for (tenant, name) in [
        ("umbrella", "default"),
        ("acme", "b"),
        ("acme", "a"),
        ("-", "audit"),
    ] {
        world
            .endpoint(&["set", tenant, name, "--url", "https://example.com"], "")
            .await
            .unwrap();
    }
    let (list, _) = world.endpoint(&["list", "--json"], "").await.unwrap();
    let list: Vec<serde_json::Value> = serde_json::from_str(&list).unwrap();
    let names: Vec<String> = list
        .iter()
        .map(|e| {
            format!(
                "{}/{}",
                e["tenant"].as_str().unwrap(),
                e["name"].as_str().unwrap()
            )
        })
        .collect();
    assert_eq!(names, ["-/audit", "acme/a", "acme/b", "umbrella/default"]);
    let (table, _) = world.endpoint(&["list", "acme"], "").await.unwrap();
    assert_eq!(table.lines().count(), 3, "{table}");
}

#[tokio::test]
async fn events_are_replayed_by_time_and_by_id() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.backlog("acme", 1100).await;
    world
        .sql("UPDATE {s}.webhook_delivery SET state = 'delivered'")
        .await;
    world.sql("UPDATE {s}.webhook_event SET received_at = clock_timestamp() - interval '1 day' WHERE event_id <> 'evt_7'").await;
    let running = world.start();
    let (output, _) = world
        .endpoint(&["replay", "acme", "--since", "2h"], "")
        .await
        .unwrap();
    assert_eq!(output, "1 events will be sent again\n");
    hook.wait_for(1, PATIENCE).await.unwrap();
    world.until_deliveries("pending", 0).await;
    world
        .endpoint(&["replay", "acme", "--event", "evt_9"], "")
        .await
        .unwrap();
    let received = hook.wait_for(2, PATIENCE).await.unwrap();
    assert_eq!(ids(&received), ["evt_7", "evt_9"]);
    world.until_deliveries("pending", 0).await;
    running.stop().await;
    let (output, _) = world
        .endpoint(&["replay", "acme", "--since", "3d", "--until", "1h"], "")
        .await
        .unwrap();
    assert_eq!(output, "1099 events will be sent again\n");
    let (output, _) = world
        .endpoint(&["replay", "acme", "--since", "3d"], "")
        .await
        .unwrap();
    assert_eq!(
        output, "1 events will be sent again\n",
        "what waits already is left alone"
    );
}

#[tokio::test]
async fn a_replay_holds_up_nobody_while_it_looks_through_the_events_of_others() {
    let world = World::new(&["acme", "umbrella"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.set("umbrella", "default", &hook, &[]).await;
    world.backlog("umbrella", 20).await;
    let mut client = world.database.client().await.unwrap();
    let taking_in = client.transaction().await.unwrap();
    let lanes = world.database.sql("SELECT FROM {s}.endpoint_lane FOR UPDATE");
    taking_in.execute_typed(&lanes, &[]).await.unwrap();
    // It would wait for the lane, as those who take reports in would for a replay that has it.
    let (output, _) = world
        .endpoint(&["replay", "acme", "--since", "1h"], "")
        .await
        .unwrap();
    assert_eq!(output, "0 events will be sent again\n");
    taking_in.rollback().await.unwrap();
}

#[tokio::test]
async fn a_replay_ends_at_the_events_that_were_there_when_it_began() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.backlog("acme", 2).await;
    world
        .sql("UPDATE {s}.webhook_delivery SET state = 'delivered'")
        .await;
    // One that comes while it looks.
    world
        .sql("UPDATE {s}.webhook_event SET received_at = clock_timestamp() + interval '1 minute' WHERE event_id = 'evt_1'")
        .await;
    let (output, _) = world
        .endpoint(&["replay", "acme", "--since", "1h"], "")
        .await
        .unwrap();
    assert_eq!(output, "1 events will be sent again\n");
}

#[tokio::test]
async fn an_event_of_another_tenant_is_not_replayed() {
    let world = World::new(&["acme", "umbrella"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.set("umbrella", "default", &hook, &[]).await;
    world.record(&[("evt_u", "umbrella", "mail.sent")]).await;
    assert!(
        world
            .endpoint(&["replay", "acme", "--event", "evt_u"], "")
            .await
            .is_err()
    );
    let (output, _) = world
        .endpoint(&["replay", "acme", "--since", "1h"], "")
        .await
        .unwrap();
    assert_eq!(output, "0 events will be sent again\n");
}

#[tokio::test]
async fn old_events_are_forgotten_unless_an_enabled_endpoint_waits_for_them() {
    let world = World::new(&["acme", "off"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.set("off", "default", &hook, &[]).await;
    world.backlog("acme", 2500).await;
    world.record(&[("evt_off", "off", "mail.sent")]).await;
    world.endpoint(&["set", "off", "--disable"], "").await.unwrap();
    world
        .sql("UPDATE {s}.webhook_delivery SET state = 'delivered' WHERE event % 5 <> 0 AND event <> 2501")
        .await;
    assert_eq!(world.bridge().forget().await.unwrap(), 0);
    world.sql("UPDATE {s}.webhook_event SET received_at = received_at - interval '31 days' WHERE event_id <> 'evt_1'").await;
    let gone = world.bridge().forget().await.unwrap();
    let kept = world.count("SELECT count(*) FROM {s}.webhook_event").await;
    assert_eq!(
        kept,
        world.count("SELECT count(*) FROM {s}.webhook_delivery").await
    );
    assert!((500..=501).contains(&kept), "{kept}");
    assert_eq!(gone as i64 + kept, 2501);
    assert_eq!(
        world
            .count("SELECT count(*) FROM {s}.webhook_event WHERE event_id IN ('evt_1', 'evt_off')")
            .await,
        1
    );
}

#[tokio::test]
async fn the_backlog_is_measured() {
    let world = World::new(&["acme", "off"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.set("off", "default", &hook, &[]).await;
    let bridge = world.bridge();
    bridge.measure().await.unwrap();
    assert_eq!(
        (
            world.metrics.webhook_pending.get(),
            world.metrics.webhook_oldest.get()
        ),
        (0, 0)
    );
    world
        .record(&[
            ("evt_1", "acme", "mail.sent"),
            ("evt_2", "acme", "mail.sent"),
            ("evt_3", "off", "mail.sent"),
        ])
        .await;
    world.endpoint(&["set", "off", "--disable"], "").await.unwrap();
    world.sql("UPDATE {s}.webhook_event SET received_at = clock_timestamp() - interval '100 s' WHERE event_id = 'evt_1'").await;
    bridge.measure().await.unwrap();
    assert_eq!(world.metrics.webhook_pending.get(), 2);
    assert!((100..110).contains(&world.metrics.webhook_oldest.get()));
}

#[tokio::test]
async fn statements_of_a_bridge_that_fail_are_counted() {
    let world = World::new(&["acme"]).await;
    let bridge = world.bridge();
    let counted = || world.metrics.sql_errors.with_label_values(&["schema"]).get();
    assert!(bridge.measure().await.is_ok());
    assert_eq!(counted(), 0);
    world.sql("ALTER TABLE {s}.webhook_event RENAME TO away").await;
    assert!(
        bridge
            .record(&[report("evt_1", "acme", "mail.sent")])
            .await
            .is_err()
    );
    assert_eq!(counted(), 1);
    assert!(bridge.measure().await.is_err());
    assert_eq!(counted(), 2);
    // As the process runs it.
    let _running = world.start();
    until(async || counted() > 2).await;
}
