//! Bridges killed between a report and its webhook.

use std::time::Duration;

use postroom_testkit::smtp::Script;
use postroom_testkit::webhook::WebhookReceiver;

use super::{Scene, job, was_killed};
use crate::support::Process;
use crate::webhooks::endpoint;

impl Scene {
    async fn bridge(&self, plan: &str) -> Process {
        let mut bridge = self.spawn("bridge", plan, &[]);
        bridge.wait_ready().await;
        bridge
    }
}

/// Where a bridge dies, and how often the webhook is called in the end.
const BOUNDARIES: [(&str, usize); 3] = [
    ("reports_taken", 1),
    ("reports_recorded", 1),
    ("webhook_answered", 2),
];

#[tokio::test]
async fn a_bridge_killed_at_any_boundary_loses_no_report_and_repeats_only_under_the_same_id() {
    let mut scene = Scene::new(Script::new()).await;
    let receiver = WebhookReceiver::start().await.unwrap();
    endpoint(&scene.world, "acme", &receiver, &[], "").await;
    let _worker = scene.worker("").await;
    for (point, _) in BOUNDARIES {
        // Not waited for: the one before may have been told to end between a lost answer and its repetition, and the report
        // it left in the queue ends this one as well.
        let mut doomed = scene.spawn("bridge", &format!("{point}=kill"), &[]);
        scene.publish(&job(point)).await;
        was_killed(&mut doomed).await;
        // What it leaves behind is done before the next one dies.
        let leases = "UPDATE webhook_delivery SET next_at = clock_timestamp() WHERE lease IS NOT NULL;
                      UPDATE endpoint_lane SET due_at = clock_timestamp()";
        scene.world.sql().await.batch_execute(leases).await.unwrap();
        let mut next = scene.bridge("reports_recorded=error@1").await;
        let recorded = "SELECT count(*) FROM webhook_delivery WHERE state = 'pending'";
        let id = scene.reports.final_of(point).await.id;
        crate::support::eventually(Duration::from_secs(30), || async {
            let owed: i64 = scene
                .world
                .sql()
                .await
                .query_one(recorded, &[])
                .await
                .unwrap()
                .get(0);
            owed == 0 && receiver.received().iter().any(|hook| hook.event_id() == id)
        })
        .await;
        assert!(next.term().await.success());
    }
    scene.over().await;
    for (point, calls) in BOUNDARIES {
        let id = scene.the_final(point).id;
        let hooks = receiver.received();
        let called = hooks.iter().filter(|hook| hook.event_id() == id).count();
        assert_eq!(called, calls, "{point}");
    }
    let events: i64 = scene
        .world
        .sql()
        .await
        .query_one("SELECT count(*) FROM webhook_event", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(events, 3, "each report once");
    scene
        .world
        .wait_depth(&scene.world.topology().reports_queue(), 0)
        .await;
}
