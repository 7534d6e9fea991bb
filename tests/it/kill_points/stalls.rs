//! Workers that stand still for longer than their lease, as a suspended machine does, and then go on.

use std::time::Duration;

use postroom_testkit::smtp::{Action, Phase, Script};

use super::{Scene, job};
use crate::support::{Process, eventually};

impl Scene {
    /// A worker that stands still at this point with this job.
    async fn stands_still(&self, point: &str, id: &str) -> Process {
        // The broker takes its deliveries back when it misses heartbeats, by default for a minute.
        let url = format!("{}?heartbeat=2", self.world.amqp_url());
        let plan = format!("{point}=stop@1");
        let sleeper = self.worker_with(&plan, &[("POSTROOM_AMQP_URL", &url)]).await;
        self.publish(&job(id)).await;
        sleeper.wait_log(&format!("fail point {point}")).await;
        sleeper
    }
}

/// It goes on, learns that its life is over and begins another.
async fn wakes(sleeper: &Process) {
    sleeper.signal("CONT");
    sleeper.wait_log("another worker took over").await;
}

#[tokio::test]
async fn a_worker_that_slept_through_its_lease_before_its_last_look_does_not_write_and_begins_a_new_life() {
    let mut scene = Scene::new(Script::new()).await;
    let mut sleeper = scene.stands_still("envelope_accepted", "slept").await;
    let mut other = scene.worker("").await;
    scene.reports.final_of("slept").await;
    wakes(&sleeper).await;
    sleeper.wait_log("the lease was lost").await;
    // It is as good as new.
    assert!(other.term().await.success());
    scene.publish(&job("next")).await;
    scene.reports.final_of("next").await;
    scene.over().await;
    scene.was_sent("slept", 1, 1);
    scene.was_sent("next", 1, 0);
    assert_eq!(sleeper.count("postroom_duplicate_sends_total").await, 0);
    assert!(sleeper.term().await.success());
}

#[tokio::test]
async fn a_worker_that_sleeps_between_its_last_look_and_the_write_sends_twice_and_is_counted() {
    let mut scene = Scene::new(Script::new()).await;
    let sleeper = scene.stands_still("before_final_write", "slept").await;
    let _other = scene.worker("").await;
    scene.reports.final_of("slept").await;
    wakes(&sleeper).await;
    sleeper.wait_log("the lease was lost").await;
    eventually(Duration::from_secs(20), || async {
        sleeper.count("postroom_duplicate_sends_total").await == 1
    })
    .await;
    scene.over().await;
    scene.was_sent("slept", 2, 1);
}

#[tokio::test]
async fn what_a_server_said_to_a_worker_that_lost_its_lease_is_true_and_ends_the_job() {
    // The second time it would be deferred, and again.
    let busy = Action::reply("451 4.3.0 Come back");
    let script = Script::new().after(1, Phase::FinalDot, busy);
    let mut scene = Scene::new(script).await;
    let sleeper = scene.stands_still("replied", "slept").await;
    assert_eq!(scene.mails("slept"), 1);
    let _other = scene.worker("").await;
    scene.reports.until(|all| !all.is_empty()).await;
    assert_eq!(scene.reports.of("slept")[0].kind(), "mail.deferred");
    wakes(&sleeper).await;
    let told = scene.reports.final_of("slept").await;
    scene.over().await;
    scene.was_sent("slept", 1, 1);
    assert_eq!(told.reason(), "accepted_after_lost_lease", "{}", told.json);
    assert_eq!(sleeper.count("postroom_duplicate_sends_total").await, 0);
}
