//! What trouble at one place does to others, and what a crash does.

use std::time::Duration;

use postroom_testkit::webhook::{Reply, WebhookReceiver};

use super::world::{PATIENCE, World, ids, keyring, report, until};
use crate::bridge::queue::{Leased, Outcome, Settled};
use crate::secret::stored::verify_keys;

pub(super) fn settled(leased: &Leased, outcome: Outcome) -> Settled {
    Settled {
        event: leased.event,
        endpoint: leased.endpoint,
        version: leased.version,
        lease: leased.lease,
        outcome,
        status: Some(500),
        error: Some("HTTP 500".into()),
        blame: outcome != Outcome::Delivered,
        pause: 0.0,
        gone: false,
    }
}

#[tokio::test]
async fn a_dead_endpoint_holds_up_only_its_own_reports() {
    let mut world = World::new(&["dead", "alive"]).await;
    world.config.concurrency = 8;
    world.config.timeout = Duration::from_mins(2);
    let (dead, alive) = (
        WebhookReceiver::start().await.unwrap(),
        WebhookReceiver::start().await.unwrap(),
    );
    dead.always(Reply::Hang);
    world.set("dead", "default", &dead, &[]).await;
    world.set("alive", "default", &alive, &[]).await;
    let backlog: Vec<_> = (0..5000)
        .map(|n| report(&format!("evt_dead_{n}"), "dead", "mail.sent"))
        .collect();
    world.bridge().record(&backlog).await.unwrap();
    let running = world.start();
    dead.wait_for(1, PATIENCE).await.unwrap();
    for n in 0..200 {
        running.publish(n, Some(&format!("evt_{n}")), "alive", "mail.sent");
    }
    // Well within one time limit of the dead one.
    alive.wait_for(200, PATIENCE).await.unwrap();
    world.until_deliveries("delivered", 200).await;
    assert_eq!(dead.received().len(), world.config.per_endpoint);
}

#[tokio::test]
async fn an_endpoint_in_trouble_is_probed_with_one_request_at_a_time() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    let ids: Vec<String> = (0..9).map(|n| format!("evt_{n}")).collect();
    let batch: Vec<_> = ids.iter().map(|id| report(id, "acme", "mail.sent")).collect();
    let bridge = world.bridge();
    bridge.record(&batch).await.unwrap();
    let due = "UPDATE {s}.webhook_delivery SET next_at = clock_timestamp()";
    for round in 0..3 {
        let leased = bridge.lease(16, 4).await.unwrap();
        assert_eq!(leased.len(), 4, "round {round}");
        let refused: Vec<_> = leased
            .iter()
            .map(|leased| settled(leased, Outcome::Retry(3600.0)))
            .collect();
        bridge.settle(&refused).await.unwrap();
        world.sql(due).await;
    }
    let probe = bridge.lease(16, 4).await.unwrap();
    assert_eq!(probe.len(), 1);
    bridge
        .settle(&[settled(&probe[0], Outcome::Delivered)])
        .await
        .unwrap();
    assert_eq!(bridge.lease(16, 4).await.unwrap().len(), 4);
}

#[tokio::test]
async fn a_rest_that_the_endpoint_asked_for_is_not_ended_by_what_was_in_flight_beside_it() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.backlog("acme", 9).await;
    let bridge = world.bridge();
    let leased = bridge.lease(16, 4).await.unwrap();
    assert_eq!(leased.len(), 4);
    let asked = Settled {
        pause: 3600.0,
        ..settled(&leased[0], Outcome::Retry(3600.0))
    };
    bridge.settle(&[asked]).await.unwrap();
    for (leased, outcome) in leased[1..].iter().zip([Outcome::Retry(5.0), Outcome::Delivered]) {
        bridge.settle(&[settled(leased, outcome)]).await.unwrap();
        assert!(bridge.lease(16, 4).await.unwrap().is_empty(), "{outcome:?}");
    }
    world.record(&[("evt_new", "acme", "mail.sent")]).await;
    assert!(bridge.lease(16, 4).await.unwrap().is_empty());

    world.endpoint(&["set", "acme", "--enable"], "").await.unwrap();
    // One of the first four is still in flight.
    let leased = bridge.lease(16, 4).await.unwrap();
    assert_eq!(leased.len(), 3);
    bridge
        .settle(&[settled(&leased[0], Outcome::Delivered)])
        .await
        .unwrap();
    assert_eq!(
        bridge.lease(16, 4).await.unwrap().len(),
        1,
        "the rest is over for good"
    );
}

#[tokio::test]
async fn a_wait_for_a_key_ends_with_the_next_success() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.backlog("acme", 9).await;
    let bridge = world.bridge();
    let leased = bridge.lease(16, 4).await.unwrap();
    let no_key = Settled {
        pause: 3600.0,
        blame: false,
        ..settled(&leased[0], Outcome::Release(3600.0))
    };
    bridge.settle(&[no_key]).await.unwrap();
    assert!(bridge.lease(16, 4).await.unwrap().is_empty());
    bridge
        .settle(&[settled(&leased[1], Outcome::Delivered)])
        .await
        .unwrap();
    assert_eq!(bridge.lease(16, 4).await.unwrap().len(), 2);
}

#[tokio::test]
async fn an_endpoint_gets_only_so_many_requests_at_a_time_from_all_bridges_together() {
    let mut world = World::new(&["acme"]).await;
    world.config.per_endpoint = 3;
    let hook = WebhookReceiver::start().await.unwrap();
    hook.always(Reply::Slow(Duration::from_millis(30), 200));
    world.set("acme", "default", &hook, &[]).await;
    world.backlog("acme", 60).await;
    let running = [world.start(), world.start(), world.start()];
    world.until_deliveries("delivered", 60).await;
    assert_eq!(hook.received().len(), 60);
    assert_eq!(hook.most_in_flight(), 3);
    for bridge in running {
        bridge.stop().await;
    }
}

#[tokio::test]
async fn a_recovered_endpoint_gets_its_backlog() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    hook.script(vec![Reply::Status(500); 12]);
    world.set("acme", "default", &hook, &[]).await;
    world.backlog("acme", 40).await;
    let running = world.start();
    world.until_deliveries("delivered", 40).await;
    assert_eq!(hook.received().len(), 52);
    assert!(world.show("acme", "default").await["failing_since"].is_null());
    running.stop().await;
}

#[tokio::test]
async fn a_crash_between_post_and_record_repeats_the_same_event_id_only() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    hook.script([Reply::Hang]);
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let killed = world.start();
    hook.wait_for(1, PATIENCE).await.unwrap();
    drop(killed);
    // As long as the lease lasts, nobody repeats it.
    let running = world.start();
    world.record(&[("evt_2", "acme", "mail.sent")]).await;
    world.until_deliveries("delivered", 1).await;
    assert_eq!(ids(&hook.received()), ["evt_1", "evt_2"]);
    world
        .sql("UPDATE {s}.webhook_delivery SET next_at = clock_timestamp() WHERE state = 'pending'")
        .await;
    world
        .sql("UPDATE {s}.endpoint_lane SET due_at = clock_timestamp()")
        .await;
    world.until_deliveries("delivered", 2).await;
    assert_eq!(ids(&hook.received()), ["evt_1", "evt_1", "evt_2"]);
    running.stop().await;
}

#[tokio::test]
async fn a_lost_lease_is_looked_at_again_when_it_ends() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let leased = world.bridge().lease(10, 1).await.unwrap();
    assert_eq!(leased.len(), 1);
    assert!(world.bridge().lease(10, 1).await.unwrap().is_empty());
    let same = "SELECT count(*) FROM {s}.endpoint_lane l JOIN {s}.webhook_delivery d USING (endpoint) \
                WHERE l.due_at = d.next_at AND d.next_at > clock_timestamp()";
    assert_eq!(world.count(same).await, 1);
}

#[tokio::test]
async fn a_success_counts_whoever_reports_it_and_a_failure_only_from_the_holder() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let bridge = world.bridge();
    let stale = bridge.lease(1, 1).await.unwrap().remove(0);
    world
        .sql("UPDATE {s}.webhook_delivery SET next_at = clock_timestamp()")
        .await;
    world
        .sql("UPDATE {s}.endpoint_lane SET due_at = clock_timestamp()")
        .await;
    let holder = bridge.lease(1, 1).await.unwrap().remove(0);
    assert_ne!(stale.lease, holder.lease);
    bridge.settle(&[settled(&stale, Outcome::Failed)]).await.unwrap();
    assert_eq!(world.deliveries("pending").await, 1);
    assert_eq!(
        world.count("SELECT lease FROM {s}.webhook_delivery").await,
        holder.lease
    );
    bridge
        .settle(&[settled(&stale, Outcome::Delivered)])
        .await
        .unwrap();
    assert_eq!(world.deliveries("delivered").await, 1);
    bridge.settle(&[settled(&holder, Outcome::Failed)]).await.unwrap();
    assert_eq!(world.deliveries("delivered").await, 1);
}

#[tokio::test]
async fn without_the_key_webhooks_wait_and_no_attempt_is_counted() {
    let mut world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let ours = std::mem::replace(&mut world.keyring, keyring("k2", 9));
    let running = world.start();
    until(async || {
        world
            .count("SELECT count(*) FROM {s}.webhook_delivery WHERE last_error IS NOT NULL")
            .await
            == 1
    })
    .await;
    assert_eq!(
        world
            .count("SELECT attempts::bigint FROM {s}.webhook_delivery")
            .await,
        0
    );
    assert!(hook.received().is_empty());
    running.stop().await;
    world.keyring = ours;
    world
        .sql("UPDATE {s}.webhook_delivery SET next_at = clock_timestamp()")
        .await;
    world
        .sql("UPDATE {s}.endpoint_lane SET due_at = clock_timestamp(), paused_until = NULL")
        .await;
    let running = world.start();
    world.until_deliveries("delivered", 1).await;
    running.stop().await;
}

#[tokio::test]
async fn an_endpoint_whose_secret_is_unreadable_is_mended_by_a_new_one() {
    let world = World::new(&["acme", "umbrella"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("umbrella", "default", &hook, &[]).await;
    world.set("acme", "default", &hook, &[]).await;
    let lost = keyring("k1", 9).seal(b"whsec_AAAA", "endpoint:acme/default:secret");
    world
        .sql(&format!(
            "UPDATE {{s}}.endpoint SET secret = '{lost}' WHERE tenant = 'acme'"
        ))
        .await;
    let secret = world.set("acme", "default", &hook, &[]).await;
    assert!(world.show("acme", "default").await["previous_secret_until"].is_string());
    verify_keys(&world.database, &world.keyring).await.unwrap();
    world.record(&[("evt_1", "acme", "mail.sent")]).await;
    let running = world.start();
    let received = hook.wait_for(1, PATIENCE).await.unwrap();
    received[0].verify(&secret).unwrap();
    running.stop().await;
}

#[tokio::test]
async fn a_report_recorded_while_its_lane_is_found_empty_is_not_forgotten() {
    let world = World::new(&["acme"]).await;
    let hook = WebhookReceiver::start().await.unwrap();
    world.set("acme", "default", &hook, &[]).await;
    let mut client = world.database.client().await.unwrap();
    let leasing = client.transaction().await.unwrap();
    let sql = "SELECT count(*) FROM {s}.webhook_lease_v1(10, 4, interval '1 minute')";
    let row = leasing.query_one(&world.database.sql(sql), &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 0);
    let bridge = world.bridge();
    let recording = tokio::spawn(async move { bridge.record(&[report("evt_1", "acme", "mail.sent")]).await });
    let schema = world.database.schema();
    let waiting = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%{schema}%record%'"
    );
    until(async || recording.is_finished() || world.count(&waiting).await == 1).await;
    leasing.commit().await.unwrap();
    assert_eq!(recording.await.unwrap().unwrap(), 1);
    let due = "SELECT count(*) FROM {s}.endpoint_lane WHERE due_at <= clock_timestamp()";
    assert_eq!(world.count(due).await, 1);
}
