//! A database that does not answer, or refuses: what must not come of it.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::proxy::Weather;
use postroom_testkit::smtp::SmtpServer;
use serde_json::json;

use crate::sends::account;
use crate::support::{World, eventually, mail, mails, proxied};

const LIMIT: Duration = Duration::from_mins(1);

#[tokio::test]
async fn a_worker_that_cannot_prove_that_it_lives_begins_nothing() {
    let mut world = World::ready().await;
    world.set("POSTROOM_LEASE", "3s");
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    let sql = world.sql().await;
    // Its heartbeats wait for this; anything else goes through.
    sql.batch_execute("BEGIN; SELECT FROM worker FOR UPDATE")
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    world.publish_mail(Level::Medium, "acme", "late").await;
    let delivered = || worker.count("postroom_deliveries_total");
    eventually(LIMIT, || async { delivered().await == 1 }).await;
    // What would go wrong would go wrong many times in this.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((delivered().await, server.counters().command("MAIL")), (1, 0));
    sql.batch_execute("COMMIT").await.unwrap();
    let sent = reports.final_of("late").await;
    assert_eq!(
        (sent.kind(), &sent.json["data"]["attempt"]),
        ("mail.sent", &json!(1))
    );
    assert_eq!(server.counters().command("MAIL"), 1);
}

/// As after a failover, while connections still lead to the old primary: the sessions stay open, and take no writes.
#[tokio::test]
async fn a_worker_whose_connections_lead_to_a_standby_is_not_ready_and_finds_the_primary_by_itself() {
    let mut world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    world.set("POSTROOM_LEASE", "3s");
    // Or none would be opened: then it would be as if the database were away.
    let any = format!("{}?target_session_attrs=any", world.database_url());
    world.set("POSTROOM_DATABASE_URL", any);
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    let sql = world.sql().await;
    let set = |what: &str| {
        format!(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I {what}', current_database()); END $$;
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'postroom' AND {}",
            if what.starts_with("SET") { "true" } else { "false" }
        )
    };
    sql.batch_execute(&set("SET default_transaction_read_only = on"))
        .await
        .unwrap();
    let told = async || {
        worker
            .get("/readyz")
            .await
            .is_some_and(|(_, told)| told.contains("takes no writes"))
    };
    eventually(LIMIT, told).await;
    world.publish_mail(Level::Medium, "acme", "late").await;
    // It does not take a heartbeat's luck for the database's health meanwhile.
    for _ in 0..30 {
        assert!(!worker.ready().await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    sql.batch_execute(&set("RESET default_transaction_read_only"))
        .await
        .unwrap();
    assert_eq!(reports.final_of("late").await.kind(), "mail.sent");
    eventually(LIMIT, || worker.ready()).await;
}

#[tokio::test]
async fn what_a_worker_cut_off_from_its_database_has_in_hand_is_sent_by_another() {
    const JOBS: usize = 100;
    let mut world = World::ready().await;
    world.set("POSTROOM_LEASE", "3s");
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let direct = world.database_url().to_owned();
    let (proxy, url) = proxied(&direct).await;
    world.set("POSTROOM_DATABASE_URL", url);
    let cut = world.start_worker().await;
    proxy.set(Weather::Cut);
    cut.wait_not_ready().await;
    // Not fresh any more, and not yet for so long that it would take nothing.
    tokio::time::sleep(Duration::from_secs(2)).await;
    world
        .publish_all(Level::Medium, &mails("acme", "job", JOBS))
        .await;
    let delivered = async || {
        cut.count("postroom_deliveries_total").await > 0 || cut.logs().contains("nothing is consumed")
    };
    eventually(LIMIT, delivered).await;
    world.set("POSTROOM_DATABASE_URL", direct);
    let mut other = world.start_worker().await;
    reports.finals(JOBS, LIMIT).await;
    let (_, told) = cut.get("/readyz").await.unwrap();
    assert!(told.contains("[-] intake"), "{told}");

    // It comes back by itself.
    other.term().await;
    proxy.heal();
    proxy.reset();
    world.publish_mail(Level::Medium, "acme", "later").await;
    assert_eq!(reports.final_of("later").await.kind(), "mail.sent");
    eventually(LIMIT, || cut.ready()).await;
    assert_eq!(server.received_count(), JOBS + 1);
}

#[tokio::test]
async fn a_worker_told_twice_to_end_while_it_waits_for_its_database_ends_at_once() {
    let mut world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let (proxy, url) = proxied(world.database_url()).await;
    world.set("POSTROOM_DATABASE_URL", url);
    let mut worker = world.start_worker().await;
    proxy.set(Weather::Cut);
    worker.wait_not_ready().await;
    world.publish_mail(Level::Medium, "acme", "waits").await;
    worker.wait_log("the directory cannot be read").await;
    worker.signal("TERM");
    worker.wait_log("shutting down").await;
    worker.signal("TERM");
    // Less than the grace period, which would end it too.
    let ended = tokio::time::timeout(LIMIT / 2, worker.wait()).await;
    assert!(ended.is_ok(), "{}", worker.logs());
    world.wait_depth("mail.jobs.medium", 1).await;
}

#[tokio::test]
async fn a_tenant_whose_settings_cannot_be_read_holds_up_nobody_else() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "broken", &server, &[]).await;
    account(&world, "acme", &server, &[]).await;
    let sql = world.sql().await;
    let set = |from: &str| format!("UPDATE account SET from_address = '{from}' WHERE tenant = 'broken'");
    sql.batch_execute(&set("nonsense")).await.unwrap();
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    for tenant in ["broken", "acme"] {
        world.publish_mail(Level::Medium, tenant, tenant).await;
    }
    assert_eq!(reports.final_of("acme").await.kind(), "mail.sent");
    let all = reports.until(|all| all.iter().any(|r| r.job() == "broken")).await;
    let waits = all.iter().find(|r| r.job() == "broken").unwrap();
    assert_eq!(
        (waits.kind(), &waits.json["data"]["reason"]),
        ("mail.deferred", &json!("configuration_unreadable")),
        "{}",
        waits.json
    );
    assert!(worker.logs().contains("broken/main"), "{}", worker.logs());
    sql.batch_execute(&set("post@example.com")).await.unwrap();
    let now = "UPDATE job SET due_at = now() WHERE state = 2; UPDATE lane SET next_at = now(), oldest_at = '-infinity'";
    sql.batch_execute(now).await.unwrap();
    assert_eq!(reports.final_of("broken").await.kind(), "mail.sent");
}

#[tokio::test]
async fn jobs_that_the_ledger_cannot_take_for_a_reason_that_is_not_theirs_wait_and_are_not_buried() {
    const COUNT: usize = 10;
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let sql = world.sql().await;
    for function in ["admit_v1", "settle_v1"] {
        let mut worker = world.start_worker().await;
        let rename = |from: &str, to: &str| {
            format!(
                "DO $$ BEGIN EXECUTE (SELECT 'ALTER FUNCTION ' || oid::regprocedure || ' RENAME TO {to}'
                 FROM pg_proc WHERE proname = '{from}' AND pronamespace = current_schema::regnamespace); END $$"
            )
        };
        sql.batch_execute(&rename(function, "gone")).await.unwrap();
        world
            .publish_all(Level::Medium, &mails("acme", function, COUNT))
            .await;
        worker.wait_log("does not exist").await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        sql.batch_execute(&rename("gone", function)).await.unwrap();
        for n in 0..COUNT {
            let sent = reports.final_of(&format!("{function}-{n}")).await;
            assert_eq!(sent.kind(), "mail.sent");
            assert!(
                sent.json["data"]["recipients"][0]["text"].is_string(),
                "{}",
                sent.json
            );
        }
        assert_eq!(world.depth("mail.jobs.dead").await, 0);
        worker.term().await;
    }
    assert_eq!(server.received_count(), 2 * COUNT);
}

#[tokio::test]
async fn a_worker_judges_what_is_expired_by_the_clock_of_the_database_from_the_first_job_on() {
    let mut world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let sql = world.sql().await;
    // To whoever asks by the plain name, it is an hour later.
    sql.batch_execute(
        "CREATE SCHEMA later;
         CREATE FUNCTION later.clock_timestamp() RETURNS timestamptz LANGUAGE sql
             AS 'SELECT pg_catalog.clock_timestamp() + interval ''1 hour'''",
    )
    .await
    .unwrap();
    let url = format!(
        "{}?options=-c%20search_path%3Dlater,pg_catalog",
        world.database_url()
    );
    world.set("POSTROOM_DATABASE_URL", url);
    let mut reports = world.reports().await;
    let mut job = mail("acme", "soon");
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_mins(30);
    job["expires_at"] = json!(soon.to_string());
    world.publish(Level::High, "acme", &job).await;
    let _worker = world.start_worker().await;
    assert_eq!(reports.final_of("soon").await.kind(), "mail.expired");
    assert_eq!(server.received_count(), 0);
}

#[tokio::test]
async fn what_an_outage_left_counted_as_open_is_free_again() {
    let mut world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &["--max-connections", "1"]).await;
    let (proxy, url) = proxied(world.database_url()).await;
    world.set("POSTROOM_DATABASE_URL", url);
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    world.publish_mail(Level::Medium, "acme", "before").await;
    assert_eq!(reports.final_of("before").await.kind(), "mail.sent");
    // The idle connection ends meanwhile, and nobody can be told.
    proxy.set(Weather::Cut);
    eventually(LIMIT, || async { server.counters().command("QUIT") == 1 }).await;
    tokio::time::sleep(Duration::from_secs(11)).await;
    proxy.heal();
    let sql = world.sql().await;
    let held = async || {
        let counted = "SELECT coalesce(sum(held), 0)::bigint FROM connection_lease";
        sql.query_one(counted, &[]).await.unwrap().get::<_, i64>(0)
    };
    eventually(LIMIT, || async { held().await == 0 }).await;
    eventually(LIMIT, || worker.ready()).await;
    world.publish_mail(Level::Medium, "acme", "after").await;
    assert_eq!(reports.final_of("after").await.kind(), "mail.sent");
}
