//! `send_at` and `expires_at`.

use std::time::{Duration, SystemTime};

use jiff::{SignedDuration, Timestamp};
use postroom::level::Level;
use postroom_testkit::smtp::{Action, Phase, Script, SmtpServer};
use serde_json::Value;

use crate::sends::account;
use crate::support::{World, eventually, header, mail, mails, taken};

/// What passes between the look at the clock that says how long to wait, and the writing of it: much, on a busy machine.
const UNTOLD: SignedDuration = SignedDuration::from_secs(5);

fn in_seconds(seconds: i64) -> Timestamp {
    Timestamp::now()
        .checked_add(SignedDuration::from_secs(seconds))
        .unwrap()
}

fn with(mut job: Value, name: &str, value: Timestamp) -> Value {
    job[name] = value.to_string().into();
    job
}

#[tokio::test]
async fn a_scheduled_job_waits_in_the_ledger_and_is_sent_once_not_before_its_time() {
    let mut world = World::ready().await;
    world.set("POSTROOM_DEFERRED_REPORT_AFTER", "1s");
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let send_at = in_seconds(3600);
    let job = with(mail("acme", "later"), "send_at", send_at);
    world.publish(Level::High, "acme", &job).await;
    reports.until(|all| all.iter().any(|r| r.job() == "later")).await;
    let deferred = reports.of("later")[0].clone();
    assert_eq!(
        (deferred.kind(), deferred.reason()),
        ("mail.deferred", "schedule")
    );
    assert_eq!(deferred.json["data"]["attempt"], 0);
    assert_eq!(deferred.json["data"]["account"], "main");
    world.wait_depth("mail.jobs.high", 0).await;
    let listed = world
        .postroom(&["job", "list", "--tenant", "acme"])
        .await
        .success();
    assert!(listed.contains("waiting (schedule)"), "{listed}");
    let shown = world.job("acme", "later").await;
    let next: Timestamp = shown["next_attempt_at"].as_str().unwrap().parse().unwrap();
    assert!(next.duration_since(send_at).abs() < UNTOLD, "{shown}");
    world
        .postroom(&["job", "cancel", "acme", "later"])
        .await
        .success();
    assert_eq!(reports.final_of("later").await.kind(), "mail.cancelled");
    assert_eq!(server.received_count(), 0);

    let send_at = in_seconds(5);
    let job = with(mail("acme", "soon"), "send_at", send_at);
    world.publish(Level::High, "acme", &job).await;
    let sent = reports.final_of("soon").await;
    assert_eq!(sent.kind(), "mail.sent");
    assert_eq!(sent.json["data"]["attempt"], 1);
    let mails = server.received();
    assert!(
        mails[0].time >= SystemTime::from(send_at),
        "{:?} {send_at}",
        mails[0].time
    );
    let dated = jiff::fmt::rfc2822::parse(&header(&mails[0], "Date")).unwrap();
    assert_eq!(dated.timestamp().as_second(), send_at.as_second());
    assert!(reports.none_for(Duration::from_millis(500)).await);
    assert_eq!((taken(&server)["soon"], reports.of("soon").len()), (1, 2));
    world.assert_settled().await;
}

#[tokio::test]
async fn a_scheduled_job_that_comes_out_before_its_time_goes_back_to_wait_for_it() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let send_at = in_seconds(3600);
    let job = with(mail("acme", "later"), "send_at", send_at);
    world.publish(Level::High, "acme", &job).await;
    world.wait_depth("mail.jobs.high", 0).await;
    // As a takeover leaves a job that was being parked.
    let sql = world.sql().await;
    let early = "UPDATE job SET due_at = clock_timestamp(), reason = 2;
                 SELECT touch_lanes(ARRAY['acme'], ARRAY['later'])";
    let waits = "SELECT count(*) FROM job WHERE state = 2 AND reason = 3 AND due_at > clock_timestamp() + interval '59 min'";
    let is_waiting = || async { sql.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 1 };
    eventually(Duration::from_secs(30), is_waiting).await;
    sql.batch_execute(early).await.unwrap();
    eventually(Duration::from_secs(30), is_waiting).await;
    assert_eq!(server.received_count(), 0);
    // By hand it goes at once.
    world
        .postroom(&["job", "release", "acme", "later"])
        .await
        .success();
    assert_eq!(reports.final_of("later").await.kind(), "mail.sent");
}

#[tokio::test]
async fn a_compressed_job_larger_than_the_bound_on_the_wire_is_sent_after_it_waited() {
    let mut world = World::ready().await;
    world.set("POSTROOM_JOB_MAX_BYTES", "64KiB");
    world.set("POSTROOM_RETRY_BASE", "200ms");
    world.set("POSTROOM_DEFERRED_REPORT_AFTER", "0s");
    let script = Script::new().first(1, Phase::Mail, Action::reply("451 4.3.0 Not now"));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &[]).await;
    account(&world, "slow", &server, &["--limit", "1/1h"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let large = |tenant, id| {
        let mut job = mail(tenant, id);
        job["text"] = "Hello again.\n".repeat(16_000).into();
        job
    };
    world
        .publish_gzip(Level::High, "acme", &large("acme", "waits"))
        .await;
    let sent = reports.final_of("waits").await;
    assert_eq!(
        (sent.kind(), sent.json["data"]["attempt"].as_u64()),
        ("mail.sent", Some(2))
    );
    assert_eq!(reports.of("waits")[0].kind(), "mail.deferred");

    world.publish_mail(Level::High, "slow", "before").await;
    reports.final_of("before").await;
    let late = with(large("slow", "late"), "expires_at", in_seconds(5));
    world.publish_gzip(Level::High, "slow", &late).await;
    assert_eq!(reports.final_of("late").await.kind(), "mail.expired");
    assert_eq!(taken(&server).len(), 2);
}

#[tokio::test]
async fn a_job_accepted_under_larger_bounds_is_sent_under_smaller_ones() {
    let mut world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let mut worker = world.start_worker().await;
    let mut job = with(mail("acme", "many"), "send_at", in_seconds(3600));
    job["to"] = serde_json::json!(["a@example.org", "b@example.org", "c@example.org"]);
    job["metadata"] = serde_json::json!({"nested": {"deeply": {"so": 1}}});
    world.publish(Level::High, "acme", &job).await;
    world.wait_state("acme", "many", 2).await;
    worker.term().await;
    world.set("POSTROOM_JOB_MAX_BYTES", "1KiB");
    world.set("POSTROOM_JOB_MAX_RECIPIENTS", "1");
    world.set("POSTROOM_JOB_MAX_DEPTH", "2");
    let _worker = world.start_worker().await;
    world
        .postroom(&["job", "release", "acme", "many"])
        .await
        .success();
    let sent = reports.final_of("many").await;
    assert_eq!(sent.kind(), "mail.sent");
    assert_eq!(sent.json["data"]["recipients"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn an_expired_job_is_reported_and_never_sent_also_when_it_expires_while_it_waits() {
    let mut world = World::ready().await;
    world.set("POSTROOM_RETRY_BASE", "3s");
    let busy = Script::new().on(Phase::Mail, Action::reply("451 4.3.0 Not now"));
    let server = SmtpServer::builder().script(busy).start().await;
    account(&world, "acme", &server, &[]).await;
    let free = SmtpServer::builder().start().await;
    account(&world, "slow", &free, &["--limit", "1/4s"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let expires = |job, at| with(job, "expires_at", in_seconds(at));
    world
        .publish(Level::High, "acme", &expires(mail("acme", "old"), -1))
        .await;
    world
        .publish(Level::High, "acme", &expires(mail("acme", "tried"), 2))
        .await;
    world.publish_mail(Level::High, "slow", "first").await;
    reports.final_of("first").await;
    world
        .publish(Level::High, "slow", &expires(mail("slow", "limited"), 1))
        .await;
    world.publish_mail(Level::High, "slow", "second").await;
    let old = reports.final_of("old").await;
    assert_eq!(
        (old.kind(), &old.json["data"]["attempt"]),
        ("mail.expired", &0.into())
    );
    let tried = reports.final_of("tried").await;
    assert_eq!(tried.kind(), "mail.expired");
    assert_eq!(tried.json["data"]["attempt"], 1);
    assert_eq!(reports.final_of("limited").await.kind(), "mail.expired");
    assert_eq!(reports.final_of("second").await.kind(), "mail.sent");
    assert_eq!(server.received_count(), 0);
    assert_eq!(
        taken(&free).keys().map(String::as_str).collect::<Vec<_>>(),
        ["first", "second"]
    );
    world.assert_settled().await;
}

#[tokio::test]
async fn a_job_that_expires_while_its_account_is_in_trouble_or_over_its_limit_is_reported_at_once() {
    let mut world = World::ready().await;
    world.set("POSTROOM_BREAKER_FAULTS", "1");
    world.set("POSTROOM_BREAKER_COOLDOWN", "10m");
    let dead = Script::new().on(Phase::Greeting, Action::shutting_down());
    let dead = SmtpServer::builder().script(dead).start().await;
    account(&world, "ill", &dead, &[]).await;
    let free = SmtpServer::builder().start().await;
    account(&world, "limited", &free, &["--limit", "1/1h"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_mail(Level::High, "ill", "tried").await;
    world.publish_mail(Level::High, "limited", "first").await;
    reports.final_of("first").await;
    reports.until(|all| all.iter().any(|r| r.job() == "tried")).await;
    let expires = in_seconds(4);
    for (tenant, id) in [("ill", "ill"), ("limited", "over")] {
        let code = with(mail(tenant, id), "expires_at", expires);
        world.publish(Level::High, tenant, &code).await;
    }
    for id in ["ill", "over"] {
        let report = reports.final_of(id).await;
        assert_eq!(report.kind(), "mail.expired");
        assert_eq!(report.json["data"]["account"], "main");
        assert_eq!(report.json["data"]["attempt"], 0);
        // Its lane is looked at once a minute.
        let told: Timestamp = report.json["timestamp"].as_str().unwrap().parse().unwrap();
        let late = told.duration_since(expires);
        assert!(late < SignedDuration::from_secs(15), "{late}");
    }
    assert_eq!((dead.received_count(), free.received_count()), (0, 1));
}

#[tokio::test]
async fn jobs_for_later_are_parked_by_one_statement_each_lot_and_what_is_known_goes_the_ordinary_way() {
    const JOBS: usize = 300;
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let send_at = in_seconds(3600);
    let later = |id: &str| with(mail("acme", id), "send_at", send_at);
    world
        .postroom(&["job", "cancel", "acme", "not-this"])
        .await
        .success();
    let mut jobs: Vec<_> = (0..JOBS).map(|n| later(&format!("later-{n}"))).collect();
    jobs.extend([later("not-this"), later("twice"), later("twice"), later("other")]);
    let mut other = later("other");
    other["subject"] = "something else".into();
    jobs.push(other);
    let jobs: Vec<_> = jobs.into_iter().map(|job| ("acme".to_owned(), job)).collect();
    world.publish_all(Level::Medium, &jobs).await;
    let worker = world.start_worker().await;
    reports
        .until(|all| {
            let told = |kind, id| all.iter().any(|r| r.kind() == kind && r.job() == id);
            told("mail.cancelled", "not-this")
                && told("mail.rejected", "other")
                && told("mail.deferred", "twice")
                && all.iter().filter(|r| r.kind() == "mail.deferred").count() == JOBS + 2
        })
        .await;
    world.wait_depth("mail.jobs.medium", 0).await;
    let sql = world.sql().await;
    let waiting =
        "SELECT count(*) FROM job WHERE state = 2 AND reason = 3 AND due_at = $1 AND body IS NOT NULL";
    let waiting: i64 = sql.query_one(waiting, &[&send_at]).await.unwrap().get(0);
    assert_eq!(waiting as usize, JOBS + 2);
    for report in reports.all().iter().filter(|r| r.kind() == "mail.deferred") {
        let next: Timestamp = report.json["data"]["next_attempt_at"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap();
        assert!(next.duration_since(send_at).abs() < UNTOLD, "{next}");
    }
    let statements = |name| {
        let series = format!("postroom_sql_batch_rows_count{{statement=\"{name}\"}}");
        let worker = &worker;
        async move { worker.metric(&series).await }
    };
    let (parks, admissions) = (statements("park").await, statements("admit").await);
    assert!((1.0..=JOBS as f64 / 3.0).contains(&parks), "{parks} statements");
    assert!((1.0..=3.0).contains(&admissions), "{admissions} admissions");
    let count = |outcome| {
        let series = format!("postroom_jobs_total{{outcome=\"{outcome}\"}}");
        let worker = &worker;
        async move { worker.metric(&series).await as usize }
    };
    assert_eq!(
        (
            count("parked").await,
            count("cancelled").await,
            count("duplicate").await
        ),
        (JOBS + 2, 1, 1)
    );
    assert_eq!(server.received_count(), 0);
}

async fn waiting(sql: &tokio_postgres::Client) -> usize {
    let waiting = "SELECT count(*) FROM job WHERE state = 2 AND reason = 3";
    let waiting: i64 = sql.query_one(waiting, &[]).await.unwrap().get(0);
    waiting as usize
}

#[tokio::test]
async fn a_worker_told_to_end_while_it_parks_leaves_every_job_in_one_place() {
    const JOBS: usize = 2_000;
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let (sql, send_at) = (world.sql().await, in_seconds(3600));
    let jobs: Vec<_> = mails("acme", "later", JOBS)
        .into_iter()
        .map(|(tenant, job)| (tenant, with(job, "send_at", send_at)))
        .collect();
    world.publish_all(Level::Medium, &jobs).await;
    let mut first = world.start_worker().await;
    eventually(Duration::from_secs(30), || async { waiting(&sql).await > 0 }).await;
    assert!(first.term().await.success(), "{}", first.logs());
    let parked = waiting(&sql).await;
    world.wait_depth("mail.jobs.medium", (JOBS - parked) as u32).await;
    let _second = world.start_worker().await;
    eventually(Duration::from_secs(30), || async { waiting(&sql).await == JOBS }).await;
    world.wait_depth("mail.jobs.medium", 0).await;
    assert_eq!(world.depth("mail.jobs.dead").await, 0);
}

#[tokio::test]
async fn a_job_for_later_that_the_database_refuses_is_buried_alone() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let sql = world.sql().await;
    sql.batch_execute("ALTER TABLE job ADD CONSTRAINT refused CHECK (id <> 'later-7')")
        .await
        .unwrap();
    let jobs: Vec<_> = mails("acme", "later", 20)
        .into_iter()
        .map(|(tenant, job)| (tenant, with(job, "send_at", in_seconds(3600))))
        .collect();
    world.publish_all(Level::Medium, &jobs).await;
    let _worker = world.start_worker().await;
    eventually(Duration::from_secs(30), || async { waiting(&sql).await == 19 }).await;
    world.wait_depth("mail.jobs.dead", 1).await;
    let letters = world.postroom(&["dead", "list", "--json"]).await.success();
    assert!(letters.contains("refused_by_database"), "{letters}");
    world.wait_depth("mail.jobs.medium", 0).await;
}
