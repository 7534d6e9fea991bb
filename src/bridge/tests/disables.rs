//! When an endpoint is given up, and how it comes back.

use std::time::Duration;

use postroom_testkit::webhook::{Reply, WebhookReceiver};

use super::isolates::settled;
use super::world::{PATIENCE, World, ids, until};
use crate::bridge::queue::{Outcome, Settled};

#[tokio::test]
async fn a_410_disables_the_endpoint_and_tells_the_others() {
    let world = World::new(&["acme"]).await;
    let (gone, other, global) = tokio::join!(
        WebhookReceiver::start(),
        WebhookReceiver::start(),
        WebhookReceiver::start()
    );
    let (gone, other, global) = (gone.unwrap(), other.unwrap(), global.unwrap());
    gone.always(Reply::Status(410));
    world.set("acme", "gone", &gone, &[]).await;
    world
        .set("acme", "other", &other, &["--events", "endpoint.disabled"])
        .await;
    world.set("-", "default", &global, &[]).await;
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    let (told, operator) = tokio::join!(other.wait_for(1, PATIENCE), global.wait_for(1, PATIENCE));
    let (told, operator) = (told.unwrap(), operator.unwrap());
    assert_eq!(told[0].json()["type"], "endpoint.disabled");
    let data = serde_json::json!({"tenant": "acme", "endpoint": "gone", "reason": "gone"});
    assert_eq!(told[0].json()["data"], data);
    assert_eq!(told[0].event_id(), operator[0].event_id());
    let shown = world.show("acme", "gone").await;
    assert_eq!(
        (&shown["enabled"], &shown["disabled_reason"]),
        (&false.into(), &"gone".into())
    );
    {
        let published = running.published.lock().unwrap();
        assert_eq!(published.len(), 1);
        assert_eq!(published[0].routing_key, "report.acme.endpoint.disabled");
        assert_eq!(published[0].event_id, told[0].event_id());
    }
    until(async || world.count("SELECT count(*) FROM {s}.event_outbox").await == 0).await;
    assert_eq!(gone.received().len(), 1);
    running.stop().await;
}

#[tokio::test]
async fn an_answer_to_the_url_before_a_change_disables_nothing() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world
        .record(&[("evt_1", "acme", "mail.sent"), ("evt_2", "acme", "mail.sent")])
        .await;
    let bridge = world.bridge();
    for (event, changes) in [(0, true), (1, false)] {
        let leased = bridge.lease(1, 4).await.unwrap().remove(0);
        if changes {
            let url = hook.url("/moved");
            world.endpoint(&["set", "acme", "--url", &url], "").await.unwrap();
        }
        let gone = Settled {
            gone: true,
            ..settled(&leased, Outcome::Retry(60.0))
        };
        for failing in [&[leased.endpoint][..], &[]] {
            bridge.disable(std::slice::from_ref(&gone), failing).await;
            let enabled = &world.show("acme", "default").await["enabled"];
            assert_eq!(*enabled, changes, "event {event}");
        }
        bridge.settle(&[gone]).await.unwrap();
    }
}

#[tokio::test]
async fn what_waited_for_a_disabled_endpoint_is_sent_when_it_is_enabled_again() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    hook.script([Reply::Status(410)]);
    // Not the report about itself, which may come back when it is enabled again.
    world
        .set("acme", "default", &hook, &["--events", "mail.sent"])
        .await;
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    until(async || world.show("acme", "default").await["enabled"] == false).await;
    // Not queued, but remembered.
    world.record(&[("evt_2", "acme", "mail.sent")]).await;
    assert_eq!(hook.received().len(), 1);
    let (_, remarks) = world.endpoint(&["set", "acme", "--enable"], "").await.unwrap();
    assert!(
        remarks.contains("endpoint replay acme default --since"),
        "{remarks}"
    );
    hook.wait_for(2, PATIENCE).await.unwrap();
    world
        .endpoint(&["replay", "acme", "--event", "evt_2"], "")
        .await
        .unwrap();
    hook.wait_for(3, PATIENCE).await.unwrap();
    assert_eq!(ids(&hook.received()), ["evt_1", "evt_1", "evt_2"]);
    running.stop().await;
}

#[tokio::test]
async fn an_endpoint_that_fails_for_too_long_is_disabled() {
    let mut world = World::new(&["acme"]).await;
    // Less than ten attempts take: then it would be given up instead.
    world.config.disable_after = Duration::from_millis(1);
    let hook = WebhookReceiver::start().await.unwrap();
    hook.always(Reply::Text(500, "out of\u{0} order".into()));
    world.set("acme", "default", &hook, &[]).await;
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    until(async || world.show("acme", "default").await["enabled"] == false).await;
    let shown = world.show("acme", "default").await;
    assert_eq!(shown["disabled_reason"], "failing");
    assert_eq!(
        (&shown["last_status"], &shown["last_error"]),
        (&500.into(), &"HTTP 500: out of  order".into())
    );
    assert!(hook.received().len() >= 2);
    running.stop().await;
}

#[tokio::test]
async fn after_ten_attempts_a_delivery_is_given_up_until_it_is_replayed() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    hook.script(vec![Reply::Status(400); 10]);
    world.set("acme", "default", &hook, &[]).await;
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    world.until_deliveries("failed", 1).await;
    assert_eq!(hook.received().len(), 10);
    assert_eq!(world.show("acme", "default").await["failed"], 1);
    let (output, _) = world.endpoint(&["replay", "acme", "--failed"], "").await.unwrap();
    assert_eq!(output, "1 events will be sent again\n");
    world.until_deliveries("delivered", 1).await;
    assert_eq!(hook.received().len(), 11);
    running.stop().await;
}
