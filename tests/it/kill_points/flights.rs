//! Mails in one flight: from its first byte on nobody knows, and not before.

use std::time::Duration;

use postroom_testkit::smtp::SmtpServer;
use serde_json::Value;

use super::{LONG_LEASE, Scene, held, job, was_killed};

/// One connection, so that the second of two mails goes right behind the first, in one flight.
const ONE: (&str, &str) = ("POSTROOM_POOL_SIZE", "1");

async fn scene() -> Scene {
    Scene::at(SmtpServer::builder().chunking(true).trace(true)).await
}

/// A worker that sends a first mail, and dies of its plan while it handles `doomed` right behind it.
async fn dies_behind_another(scene: &mut Scene, plan: &str, doomed: &Value) {
    let mut worker = scene.worker_with(plan, &[LONG_LEASE, ONE]).await;
    scene.publish(&job("first")).await;
    scene.publish(doomed).await;
    was_killed(&mut worker).await;
    scene.leaves_soon().await;
}

fn flights(scene: &Scene) -> usize {
    let trace = scene.server.trace();
    trace
        .iter()
        .filter(|verbs| **verbs == ["MAIL", "RCPT", "BDAT"])
        .count()
}

#[tokio::test]
async fn a_worker_killed_before_its_flight_leaves_nothing_and_after_it_the_same_mail_once_more() {
    // The first mail of a connection asks with its first line as a chunk, in a write that looks like a flight.
    for (plan, flown, mails) in [
        ("before_final_write=kill@job=doomed", 1, 1),
        ("mail_written=kill@2", 2, 2),
    ] {
        let mut scene = scene().await;
        dies_behind_another(&mut scene, plan, &job("doomed")).await;
        scene.server.wait_closed(Duration::from_secs(20)).await;
        assert_eq!(
            (flights(&scene), scene.mails("doomed")),
            (flown, mails - 1),
            "{plan}"
        );
        let _survivor = scene.worker("").await;
        scene.reports.final_of("doomed").await;
        scene.reports.final_of("first").await;
        scene.over().await;
        scene.was_sent("doomed", mails, 1);
    }
}

#[tokio::test]
async fn what_is_to_be_held_is_marked_before_its_flight() {
    let mut scene = scene().await;
    dies_behind_another(&mut scene, "data_marked=kill", &held("marked")).await;
    scene.server.wait_closed(Duration::from_secs(20)).await;
    assert_eq!(scene.mails("marked"), 0);
    let sql = scene.world.sql().await;
    let phase = "SELECT phase::integer FROM job WHERE id = 'marked'";
    let phase: i32 = sql.query_one(phase, &[]).await.unwrap().get(0);
    assert_eq!(phase, 1, "in its final write");
}
