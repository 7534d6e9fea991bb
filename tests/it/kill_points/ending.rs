//! SIGTERM: not ready, nothing new, what has begun is finished; a second one does not wait.

use std::time::{Duration, Instant};

use postroom_testkit::smtp::{Action, Phase, Script};

use super::{LONG_LEASE, Scene, job};
use crate::support::eventually;

impl Scene {
    /// Waits until so many mails are on their way to the server.
    async fn sending(&self, mails: u64) {
        eventually(Duration::from_secs(20), || async {
            self.server.counters().command("DATA") == mails
        })
        .await;
    }
}

#[tokio::test]
async fn a_worker_told_to_end_is_not_ready_takes_nothing_new_and_quits_after_the_last_reply() {
    let script = Script::new().delay(Phase::FinalDot, Duration::from_secs(3));
    let mut scene = Scene::new(script).await;
    let mut worker = scene.worker_with("", &[LONG_LEASE]).await;
    scene.publish(&job("begun")).await;
    scene.sending(1).await;
    worker.signal("TERM");
    worker.wait_not_ready().await;
    assert!(
        !worker.logs().contains("accepted=1"),
        "it was ready until the reply came"
    );
    let (status, _) = worker.get("/livez").await.unwrap();
    assert_eq!(status, 200);
    // What comes now is for others, at once: it is not even taken in hand.
    scene.publish(&job("later")).await;
    scene.world.wait_depth("mail.jobs.high", 1).await;
    assert!(worker.wait().await.success(), "{}", worker.logs());
    // Outcome, acknowledgement and report came before the end.
    let told = scene.reports.final_of("begun").await;
    assert_eq!(told.kind(), "mail.sent");
    assert_eq!(scene.world.depth("mail.jobs.high").await, 1);
    assert_eq!(scene.server.counters().command("QUIT"), 1);
    let owned = "SELECT (SELECT count(*) FROM job WHERE state = 1) + (SELECT count(*) FROM outbox)";
    let sql = scene.world.sql().await;
    assert_eq!(sql.query_one(owned, &[]).await.unwrap().get::<_, i64>(0), 0);
    let living = "SELECT count(*) FROM worker WHERE NOT dead";
    assert_eq!(
        sql.query_one(living, &[]).await.unwrap().get::<_, i64>(0),
        0,
        "it has signed off"
    );
    // Nobody waits for a lease.
    let _next = scene.worker_with("", &[LONG_LEASE]).await;
    scene.reports.final_of("later").await;
    scene.over().await;
    scene.was_sent("begun", 1, 0);
    scene.was_sent("later", 1, 0);
}

#[tokio::test]
async fn a_second_signal_ends_a_worker_at_once_and_its_mail_is_left_to_the_lease() {
    let silent = Action::Silence;
    let mut scene = Scene::new(Script::new().first(1, Phase::FinalDot, silent)).await;
    let mut worker = scene.worker("").await;
    scene.publish(&job("begun")).await;
    scene.sending(1).await;
    worker.signal("TERM");
    worker.wait_log("finishing what has begun").await;
    worker.wait_not_ready().await;
    let asked = Instant::now();
    worker.signal("TERM");
    let status = worker.wait().await;
    // The grace period is a minute, the server's reply would be waited for ten.
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    assert!(
        worker.logs().contains("second signal"),
        "{status}\n{}",
        worker.logs()
    );
    assert!(scene.reports.none_for(Duration::from_millis(100)).await);
    let _next = scene.worker("").await;
    scene.reports.final_of("begun").await;
    scene.over().await;
    scene.was_sent("begun", 1, 1);
}
