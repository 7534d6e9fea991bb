//! Plain jobs, and finding them again in what a server took.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use postroom::level::Level;
use postroom_testkit::smtp::{Received, SmtpServer};
use serde_json::{Value, json};

use super::World;

/// A small job to one recipient; its subject is its id.
pub(crate) fn mail(tenant: &str, id: &str) -> Value {
    json!({
        "id": id, "tenant": tenant, "to": format!("{id}@example.org"), "subject": id, "text": "Hello",
    })
}

/// `count` of them, `prefix-0` and so on, as [`World::publish_all`] wants them.
pub(crate) fn mails(tenant: &str, prefix: &str, count: usize) -> Vec<(String, Value)> {
    let one = |n| (tenant.to_owned(), mail(tenant, &format!("{prefix}-{n}")));
    (0..count).map(one).collect()
}

/// The value of a header of a mail.
pub(crate) fn header(mail: &Received, name: &str) -> String {
    let text = String::from_utf8_lossy(&mail.data);
    let start = format!("{name}: ");
    let line = text.lines().find_map(|line| line.strip_prefix(&start));
    line.unwrap_or_default().trim().to_owned()
}

/// How often a server took each job, by subject.
pub(crate) fn taken(server: &SmtpServer) -> BTreeMap<String, usize> {
    let mut taken = BTreeMap::new();
    for mail in server.received() {
        *taken.entry(header(&mail, "Subject")).or_default() += 1;
    }
    taken
}

/// When a server took each mail, in order.
pub(crate) fn times(mails: &[Received]) -> Vec<Instant> {
    let mut times: Vec<_> = mails.iter().map(|mail| mail.at).collect();
    times.sort();
    times
}

/// Most of these in any interval of this length.
pub(crate) fn most_within(times: &[Instant], window: Duration) -> usize {
    let from = |start: usize| {
        times[start..]
            .iter()
            .take_while(|at| **at - times[start] < window)
            .count()
    };
    (0..times.len()).map(from).max().unwrap_or(0)
}

impl World {
    /// What `job show --json` says.
    pub(crate) async fn job(&self, tenant: &str, id: &str) -> Value {
        let shown = self.postroom(&["job", "show", tenant, id, "--json"]).await;
        serde_json::from_str(&shown.success()).unwrap()
    }

    /// Waits until the ledger has a job in this state (2 waiting, 3 done, 4 uncertain, …).
    pub(crate) async fn wait_state(&self, tenant: &str, id: &str, state: i16) {
        let sql = self.sql().await;
        super::eventually(Duration::from_secs(30), || async {
            let row = sql
                .query_opt(
                    "SELECT state FROM job WHERE tenant = $1 AND id = $2",
                    &[&tenant, &id],
                )
                .await;
            row.unwrap().is_some_and(|row| row.get::<_, i16>(0) == state)
        })
        .await;
    }

    /// Publishes a small job.
    pub(crate) async fn publish_mail(&self, level: Level, tenant: &str, id: &str) {
        self.publish(level, tenant, &mail(tenant, id)).await;
    }

    /// Requires that nothing is left behind: empty queues, no leases, nothing waiting, no report owed.
    pub(crate) async fn assert_settled(&self) {
        for (_, queue) in self.topology().job_queues() {
            self.wait_depth(queue, 0).await;
        }
        let sql = self.sql().await;
        // Striking a report off the list follows its confirm; for a worker that died in between, others do it after
        // half a minute.
        super::eventually(Duration::from_mins(1), || async {
            let rows = sql
                .query_one(
                    "SELECT (SELECT count(*) FROM job WHERE state <> 3) + (SELECT count(*) FROM outbox)",
                    &[],
                )
                .await
                .unwrap();
            rows.get::<_, i64>(0) == 0
        })
        .await;
        let lanes: i64 = sql
            .query_one("SELECT count(*) FROM lane", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(lanes, 0, "lanes without jobs");
    }
}
