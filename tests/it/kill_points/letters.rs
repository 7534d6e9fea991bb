//! Dead letters, and jobs that nobody holds any more.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::Script;

use super::{Scene, job, was_killed};

const DEAD: &str = "mail.jobs.dead";

#[tokio::test]
async fn a_worker_killed_after_a_dead_letter_leaves_it_twice_and_tells_it_under_one_id() {
    let mut scene = Scene::new(Script::new()).await;
    let mut doomed = scene.worker("dead_lettered=kill").await;
    let wrong = br#"{"id": "wrong", "tenant": "acme", "to": 5}"#;
    scene.world.publish_bytes(Level::High, "acme", wrong).await;
    was_killed(&mut doomed).await;
    scene.world.wait_depth(DEAD, 1).await;
    // Once more, now after its report: the acknowledgement is all that is missing.
    let _survivor = scene.worker("").await;
    scene.world.wait_depth(DEAD, 2).await;
    scene.over().await;
    let told = scene.the_final("wrong");
    assert_eq!(told.kind(), "mail.rejected");
    let (one, other) = (
        scene.world.amqp().await.get(DEAD).await.unwrap(),
        scene.world.amqp().await.get(DEAD).await.unwrap(),
    );
    assert_eq!((one.data, one.routing_key), (other.data, other.routing_key));
}

#[tokio::test]
async fn a_job_of_a_dead_worker_whose_message_is_a_dead_letter_is_sent_once_when_that_is_replayed() {
    let mut scene = Scene::new(Script::new()).await;
    scene.dies("leased=kill", || job("stranded")).await;
    // As the queue's own delivery limit would do: the broker has it no more, Postgres has no body.
    scene.world.wait_depth("mail.jobs.high", 1).await;
    let amqp = scene.world.amqp().await;
    let message = amqp.get("mail.jobs.high").await.unwrap();
    let key = message.routing_key.to_string();
    amqp.publish("mail.dlx", &key, message.properties, &message.data)
        .await;
    scene.world.wait_depth(DEAD, 1).await;
    let survivor = scene.worker("").await;
    survivor.wait_log("open=1").await;
    assert_eq!(scene.mails("stranded"), 0);
    let replay = ["dead", "replay", "--all"];
    scene.world.postroom(&replay).await.success();
    scene.reports.final_of("stranded").await;
    scene.over().await;
    scene.was_sent("stranded", 1, 1);
    assert!(scene.reports.none_for(Duration::from_millis(100)).await);
}

#[tokio::test]
async fn a_worker_that_loses_its_lease_while_it_buries_a_job_leaves_the_message_to_others() {
    let mut scene = Scene::new(Script::new()).await;
    scene.dies("leased=kill", || job("poison")).await;
    // As after a takeover, and two more deaths before it.
    let sql = scene.world.sql().await;
    let taken_over = "UPDATE worker SET dead = true; UPDATE job SET state = 0, claim = NULL, crashes = 3";
    sql.batch_execute(taken_over).await.unwrap();
    let _worker = scene.worker("dead_lettered=pause(3s)@1").await;
    scene.world.wait_depth(DEAD, 1).await;
    sql.batch_execute(taken_over).await.unwrap();
    // Only RabbitMQ has the body: it comes once more, and is buried for good.
    let told = scene.reports.final_of("poison").await;
    assert_eq!((told.kind(), told.reason()), ("mail.failed", "crash_loop"));
    scene.world.wait_depth("mail.jobs.high", 0).await;
    scene.world.wait_state("acme", "poison", 6).await;
    assert_eq!(scene.mails("poison"), 0);
}
