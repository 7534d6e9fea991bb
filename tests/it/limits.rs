//! Rolling limits, judged by the clock of the server that receives the mail.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postroom::level::Level;
use postroom_testkit::smtp::{Action, Builder, Phase, RcptRule, Script, SmtpServer};
use serde_json::{Value, json};

use crate::sends::account;
use crate::support::{Process, World, eventually, header, mail, mails, most_within, taken, times};

const WINDOW: Duration = Duration::from_secs(3);

/// How late the server here may date a mail: where more is to be done than the machine can, its tasks stand still while
/// mails wait in their sockets, and some of one moment are dated like those of the next.
struct Lateness(Arc<AtomicU64>);

impl Lateness {
    fn watch() -> Self {
        let longest = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&longest);
        tokio::spawn(async move {
            let nap = Duration::from_millis(5);
            loop {
                let begun = Instant::now();
                tokio::time::sleep(nap).await;
                let late = begun.elapsed().saturating_sub(nap);
                seen.fetch_max(late.as_millis() as u64, Ordering::Relaxed);
            }
        });
        Self(longest)
    }

    fn longest(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    /// The length of time that dates surely cover if they span this window.
    fn within(&self, window: Duration) -> Duration {
        window.saturating_sub(self.longest().min(window / 2))
    }
}

async fn parked(workers: &[&Process]) -> f64 {
    let mut parked = 0.0;
    for worker in workers {
        parked += worker.metric(r#"postroom_jobs_total{outcome="parked"}"#).await;
    }
    parked
}

#[tokio::test]
async fn five_hundred_jobs_over_two_workers_never_exceed_the_limit_and_use_most_of_it() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &["--limit", "60/3s"]).await;
    let mut reports = world.reports().await;
    let (one, two) = (world.start_worker().await, world.start_worker().await);
    let lateness = Lateness::watch();
    world.publish_all(Level::Medium, &mails("acme", "job", 500)).await;
    let finals = reports.finals(500, Duration::from_mins(2)).await;
    assert_eq!(finals.len(), 500, "one final report each");
    assert!(finals.iter().all(|report| report.kind() == "mail.sent"));
    let times = times(&server.received());
    assert_eq!(times.len(), 500, "one mail each");
    let (window, most) = (
        lateness.within(WINDOW),
        most_within(&times, lateness.within(WINDOW)),
    );
    assert!(most <= 60, "{most} within {window:?}");
    // Sixty may go at once, and sixty more each window: the last of nine bursts comes after eight windows.
    let took = times[499] - times[0];
    // Each may begin as late as anything does here.
    let best = WINDOW * 8;
    let late = lateness.longest() * 8;
    assert!(
        took.mul_f64(0.8) <= best + late,
        "{took:?} instead of {best:?}, and {late:?}"
    );
    // Parked once each, not over and over again; how many come after the first burst depends on the machine.
    let parked = parked(&[&one, &two]).await;
    assert!((1.0..=500.0).contains(&parked), "{parked} times parked");
    for worker in [&one, &two] {
        assert!(worker.metric(r#"postroom_jobs_total{outcome="sent"}"#).await > 0.0);
    }
    world.assert_settled().await;
}

#[tokio::test]
async fn a_job_that_waited_for_its_limit_counts_with_its_wait_at_its_first_attempt_and_once() {
    let mut world = World::ready().await;
    world.set("POSTROOM_RETRY_BASE", "200ms");
    let script = Script::new().recipient("later", RcptRule::defer_first(1, "451 4.7.1 greylisted"));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &["--limit", "1/4s"]).await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    world.publish_mail(Level::High, "acme", "first").await;
    reports.final_of("first").await;
    let (counted, waited) = (
        "postroom_queue_age_seconds_count",
        "postroom_queue_age_seconds_sum",
    );
    assert_eq!(worker.count(counted).await, 1);
    let before = worker.metric(waited).await;
    let mut second = mail("acme", "second");
    second["to"] = json!("later@example.org");
    world.publish(Level::High, "acme", &second).await;
    assert_eq!(reports.final_of("second").await.json["data"]["attempt"], 2);
    assert_eq!(worker.count(counted).await, 2);
    let waited = worker.metric(waited).await - before;
    assert!((2.5..7.5).contains(&waited), "{waited}");
}

#[tokio::test]
async fn limits_count_recipients_and_span_the_accounts_of_a_tenant() {
    let world = World::ready().await;
    let (server, other, third) = (
        SmtpServer::builder().start().await,
        SmtpServer::builder().start().await,
        SmtpServer::builder().start().await,
    );
    account(&world, "people", &server, &["--limit", "30/3s:recipients"]).await;
    account(&world, "both", &other, &[]).await;
    let port = third.port().to_string();
    let second = [
        "account",
        "set",
        "both",
        "second",
        "--host",
        "127.0.0.1",
        "--port",
        &port,
        "--tls",
        "none",
    ];
    world
        .postroom(&[&second[..], &["--from", "b@example.com"]].concat())
        .await
        .success();
    world
        .postroom(&["tenant", "set", "both", "--limit", "20/3s"])
        .await
        .success();
    let mut reports = world.reports().await;
    let _workers = (world.start_worker().await, world.start_worker().await);
    let lateness = Lateness::watch();
    let mut jobs: Vec<(String, Value)> = Vec::new();
    for n in 0..20 {
        let mut job = mail("people", &format!("people-{n}"));
        job["to"] = (0..4).map(|r| format!("r{r}@example.org")).collect();
        jobs.push(("people".to_owned(), job));
    }
    for n in 0..50 {
        let mut job = mail("both", &format!("both-{n}"));
        job["account"] = json!(if n % 2 == 0 { "main" } else { "second" });
        jobs.push(("both".to_owned(), job));
    }
    world.publish_all(Level::Medium, &jobs).await;
    let finals = reports.finals(70, Duration::from_mins(2)).await;
    assert_eq!(finals.len(), 70);
    let each_recipient: Vec<_> = server.received().into_iter().flat_map(|m| vec![m; 4]).collect();
    assert_eq!(each_recipient.len(), 80);
    assert!(most_within(&times(&each_recipient), lateness.within(WINDOW)) <= 30);
    let together = [other.received(), third.received()].concat();
    assert_eq!(together.len(), 50);
    assert!(most_within(&times(&together), lateness.within(WINDOW)) <= 20);
    assert_eq!((other.received_count(), third.received_count()), (25, 25));
    world.assert_settled().await;
}

#[tokio::test]
async fn an_envelope_larger_than_a_limit_is_split_under_one_message_id() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &["--limit", "3/2s:recipients"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let lateness = Lateness::watch();
    let mut job = mail("acme", "many");
    let names: Vec<String> = (0..7).map(|n| format!("r{n}@example.org")).collect();
    job["to"] = json!(names);
    world.publish(Level::Medium, "acme", &job).await;
    let sent = reports.final_of("many").await;
    assert_eq!(sent.kind(), "mail.sent");
    assert_ne!(sent.json["data"]["partial"], true);
    let mails = server.received();
    let sizes: Vec<_> = mails.iter().map(|mail| mail.to.len()).collect();
    assert_eq!(sizes, [3, 3, 1]);
    let to: Vec<_> = mails.iter().flat_map(|mail| mail.to.clone()).collect();
    assert_eq!(to, names);
    for name in ["Message-ID", "Date"] {
        assert!(
            mails
                .iter()
                .all(|mail| header(mail, name) == header(&mails[0], name))
        );
    }
    let each_recipient: Vec<_> = mails
        .into_iter()
        .flat_map(|m| vec![m.clone(); m.to.len()])
        .collect();
    assert!(most_within(&times(&each_recipient), lateness.within(Duration::from_secs(2))) <= 3);
    world.assert_settled().await;
}

#[tokio::test]
async fn a_limit_raised_or_removed_while_jobs_wait_takes_effect_at_once() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &["--limit", "5/1h"]).await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    world.publish_all(Level::Medium, &mails("acme", "job", 40)).await;
    world.wait_depth("mail.jobs.medium", 0).await;
    crate::support::eventually(Duration::from_secs(20), || async {
        parked(&[&worker]).await >= 35.0
    })
    .await;
    server.wait_for(5, Duration::from_secs(20)).await;
    assert_eq!(server.received_count(), 5);
    let shown = world
        .postroom(&["job", "list", "--state", "waiting"])
        .await
        .success();
    assert!(shown.contains("waiting (rate)"), "{shown}");
    // A cancelled one must not make the others be forgotten.
    for n in 0..40 {
        let id = format!("job-{n}");
        if world.job("acme", &id).await["state"] == "waiting" {
            world.postroom(&["job", "cancel", "acme", &id]).await.success();
            break;
        }
    }
    world
        .postroom(&["account", "set", "acme", "main", "--limit", "15/1h"])
        .await
        .success();
    server.wait_for(15, Duration::from_secs(30)).await;
    assert!(reports.finals(16, Duration::from_secs(30)).await.len() >= 16);
    assert_eq!(server.received_count(), 15);
    world
        .postroom(&["account", "set", "acme", "main", "--limit", "0/1h"])
        .await
        .success();
    let finals = reports.finals(40, Duration::from_secs(30)).await;
    assert_eq!(finals.iter().filter(|r| r.kind() == "mail.sent").count(), 39);
    assert_eq!(taken(&server).len(), 39);
    world.assert_settled().await;
}

/// The second mail finds the connection of no use. All three MAIL that the server hears count, and it ends with this attempt.
async fn every_mail_heard_counts(server: Builder, script: Script, attempt: u32) {
    let mut world = World::ready().await;
    world.set("POSTROOM_RETRY_BASE", "200ms");
    let server = server.script(script).start().await;
    account(&world, "acme", &server, &["--limit", "10/10s"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for (id, attempt) in [("first", 1), ("second", attempt)] {
        world.publish_mail(Level::High, "acme", id).await;
        let sent = reports.final_of(id).await;
        assert_eq!(
            (sent.kind(), &sent.json["data"]["attempt"]),
            ("mail.sent", &json!(attempt))
        );
    }
    let counters = server.counters();
    // A second attempt follows a connection on which no MAIL was said.
    assert_eq!(
        (counters.command("MAIL"), counters.connections),
        (3, 1 + u64::from(attempt))
    );
    let sql = world.sql().await;
    let used = sql.query_one("SELECT used[1] FROM rate", &[]).await.unwrap();
    assert_eq!(used.get::<_, i32>(0), 3, "one for each MAIL");
}

#[tokio::test]
async fn a_mail_whose_connection_took_long_to_replace_takes_another_slot() {
    // A new connection takes longer than a slot is good for.
    let slow = || Script::new().delay(Phase::Greeting, Duration::from_secs(1));
    let closed = slow().once_after(1, Phase::Mail, Action::Close);
    every_mail_heard_counts(SmtpServer::builder(), closed, 1).await;
    // In a flight, a connection closed without a word leaves the outcome unknown; 421 does not.
    let told = slow().once_after(1, Phase::Mail, Action::shutting_down());
    every_mail_heard_counts(SmtpServer::builder().chunking(true), told, 1).await;
}

/// So many commits that grant a slot stand still for longer than it is good for, that of the admission first.
async fn stall_grants(world: &World, stalled: u64) {
    let stall = format!(
        "CREATE SEQUENCE grants;
         CREATE FUNCTION stall() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
         BEGIN
             IF nextval('grants') <= {stalled} THEN PERFORM pg_sleep(1); END IF;
             RETURN NULL;
         END $$;
         CREATE CONSTRAINT TRIGGER stall AFTER INSERT OR UPDATE ON job DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW WHEN (NEW.slot_at IS NOT NULL) EXECUTE FUNCTION stall()"
    );
    world.sql().await.batch_execute(&stall).await.unwrap();
}

#[tokio::test]
async fn a_mail_all_of_whose_slots_came_late_waits_a_while_for_a_faster_database() {
    // One with the admission, and five more.
    const ASKED: i64 = 6;
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &["--limit", "60/1m"]).await;
    stall_grants(&world, 1_000).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_mail(Level::High, "acme", "late").await;
    let sql = world.sql().await;
    let waits = || async {
        let waits = "SELECT count(*) FROM job WHERE state = 2 AND reason = 4 AND due_at > updated_at + interval '4 s'";
        sql.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 1
    };
    eventually(Duration::from_mins(1), waits).await;
    let asked = sql.query_one("SELECT last_value FROM grants", &[]).await.unwrap();
    assert_eq!(asked.get::<_, i64>(0), ASKED);
    sql.batch_execute("DROP TRIGGER stall ON job").await.unwrap();
    let sent = reports.final_of("late").await;
    assert_eq!(
        (sent.kind(), &sent.json["data"]["attempt"]),
        ("mail.sent", &json!(1))
    );
}

#[tokio::test]
async fn a_slot_whose_answer_came_late_is_not_used_and_the_mail_goes_with_another() {
    const STALLED: u64 = 3;
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &["--limit", "60/1m"]).await;
    stall_grants(&world, STALLED).await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    world.publish_mail(Level::High, "acme", "late").await;
    let sent = reports.final_of("late").await;
    assert_eq!(
        (sent.kind(), &sent.json["data"]["attempt"]),
        ("mail.sent", &json!(1))
    );
    assert_eq!(reports.of("late").len(), 1, "it did not wait");
    let granted = worker
        .count(r#"postroom_rate_slots_total{answer="granted"}"#)
        .await;
    assert_eq!(granted, STALLED + 1);
    let sql = world.sql().await;
    let used = sql.query_one("SELECT used[1] FROM rate", &[]).await.unwrap();
    assert_eq!(used.get::<_, i32>(0), 1, "the others went back");
}

#[tokio::test]
async fn a_mail_that_was_heard_counts_even_if_its_connection_cannot_be_replaced() {
    let script = || {
        Script::new()
            .once_after(1, Phase::Mail, Action::shutting_down())
            .once_after(1, Phase::Greeting, Action::shutting_down())
    };
    every_mail_heard_counts(SmtpServer::builder(), script(), 2).await;
    every_mail_heard_counts(SmtpServer::builder().chunking(true), script(), 2).await;
}

#[tokio::test]
async fn a_mail_over_which_a_server_hangs_up_keeps_no_other_out_of_the_limit_and_is_given_up_in_time() {
    let mut world = World::ready().await;
    world.set("POSTROOM_RETRY_BASE", "200ms");
    let script = Script::new().recipients_with(|address| {
        let hangs_up = address.starts_with("bank");
        hangs_up.then(|| "421 4.7.0 TLS required for RCPT domain, closing connection".to_owned())
    });
    let server = SmtpServer::builder().script(script).start().await;
    account(
        &world,
        "acme",
        &server,
        &["--limit", "1/1s", "--max-attempts", "2"],
    )
    .await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut job = mail("acme", "both");
    job["to"] = json!(["bank@example.net", "bank@example.org"]);
    world.publish(Level::High, "acme", &job).await;
    let begun = || async { server.counters().command("MAIL") > 0 };
    eventually(Duration::from_secs(30), begun).await;
    world.publish_mail(Level::High, "acme", "later").await;
    let failed = reports.final_of("both").await;
    assert_eq!(
        (failed.kind(), &failed.json["data"]["attempt"]),
        ("mail.failed", &json!(2))
    );
    assert_eq!(reports.of("later").len(), 1, "it went between the two attempts");
    assert_eq!(
        server.counters().command("MAIL"),
        5,
        "two for each attempt, one for the other mail"
    );
    world.assert_settled().await;
}

#[tokio::test]
async fn a_mail_sent_in_more_parts_than_attempts_are_allowed_is_in_its_first_attempt_until_the_last() {
    let mut world = World::ready().await;
    world.set("POSTROOM_RETRY_BASE", "200ms");
    let script = Script::new().recipient(
        "grey",
        RcptRule::defer_first(1, "451 4.7.1 Greylisted, come back"),
    );
    let server = SmtpServer::builder().script(script).start().await;
    let limit = ["--limit", "1/1s:recipients", "--max-attempts", "2"];
    account(&world, "acme", &server, &limit).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut job = mail("acme", "parts");
    job["to"] = json!(["grey@example.org", "a@example.org", "b@example.org"]);
    world.publish(Level::High, "acme", &job).await;
    let sent = reports.final_of("parts").await;
    let data = &sent.json["data"];
    assert_eq!((sent.kind(), &data["partial"]), ("mail.sent", &Value::Null));
    assert_eq!(data["attempt"], 2);
    let first = &reports.of("parts")[0].json["data"];
    assert_eq!(
        (&first["attempt"], &first["reason"]),
        (&json!(1), &json!("greylisted"))
    );
    world.assert_settled().await;
}
