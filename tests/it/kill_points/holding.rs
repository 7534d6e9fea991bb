//! `on_uncertain = hold`: the beginning of the final write is on record, so that "before" and "after" can be told apart.

use std::time::Duration;

use postroom_testkit::smtp::Script;
use tokio_postgres::Client;

use super::{Scene, held};
use crate::support::eventually;

/// Where a worker dies while it handles a job of that name, and the mails the server has by then.
const MARKED: [(&str, usize); 2] = [("data_marked", 0), ("replied", 1)];

/// Jobs in their final write, and of them those whose worker is known to be dead.
async fn marked(sql: &Client) -> (i64, i64) {
    let text = "SELECT count(*), count(*) FILTER (WHERE w.dead) FROM job LEFT JOIN worker w USING (epoch)
                WHERE state = 1 AND phase = 1";
    let row = sql.query_one(text, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

#[tokio::test]
async fn what_is_to_be_held_is_held_if_its_worker_died_after_the_mark_and_sent_if_it_died_before() {
    let mut scene = Scene::new(Script::new()).await;
    let before = "envelope_accepted";
    for (point, _) in MARKED.iter().chain([&(before, 0)]) {
        scene
            .dies(&format!("{point}=kill@job={point}"), || held(point))
            .await;
    }
    let survivor = scene.worker("").await;
    scene.reports.final_of(before).await;
    let sql = scene.world.sql().await;
    // Their worker may only be cut off from Postgres, and still wait for the server's reply: nobody decides before every
    // deadline of the attempt has passed.
    eventually(Duration::from_secs(20), || async { marked(&sql).await == (2, 2) }).await;
    let later = "UPDATE job SET leased_at = leased_at - interval '25 minutes' WHERE phase = 1";
    assert_eq!(sql.execute(later, &[]).await.unwrap(), 2);
    for (id, mails) in MARKED {
        let uncertain = |r: &&crate::support::Received| r.job() == id;
        scene.reports.until(|all| all.iter().any(|r| uncertain(&r))).await;
        let told = scene.reports.of(id);
        assert_eq!((told.len(), told[0].kind()), (1, "mail.uncertain"), "{id}");
        assert!(
            !told[0].is_final() && told[0].json["data"]["uncertain_attempts"] == 1,
            "{}",
            told[0].json
        );
        let (message_id, recipients) = (
            &told[0].json["data"]["message_id"],
            &told[0].json["data"]["recipients"],
        );
        assert!(message_id.is_string(), "{}", told[0].json);
        assert_eq!(told[0].json["data"]["attempt"], 1, "{}", told[0].json);
        assert_eq!(recipients[0]["status"], "pending", "{}", told[0].json);
        assert_eq!(scene.mails(id), mails, "{id}");
        let told = |line: &str| line.contains("lost in the final write") && line.contains(id);
        eventually(Duration::from_secs(5), || async {
            survivor.logs().lines().any(told)
        })
        .await;
    }
    let held = r#"postroom_jobs_total{outcome="uncertain"}"#;
    assert_eq!(survivor.count(held).await, 2);
    // Somebody decides: once more, please.
    for (id, _) in MARKED {
        let decide = ["job", "resolve", "acme", id, "--not-sent"];
        scene.world.postroom(&decide).await.success();
        scene.reports.final_of(id).await;
    }
    scene.over().await;
    scene.was_sent(before, 1, 1);
    for (id, mails) in MARKED {
        scene.was_sent(id, mails + 1, 1);
    }
}
