//! What a job costs where it counts most: statements and round trips, counted on a batch of jobs. No times: those are for
//! `make bench`.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::SmtpServer;
use postroom_testkit::webhook::{Reply, WebhookReceiver};
use serde_json::json;

use crate::sends::account;
use crate::support::{World, mail, proxied};
use crate::webhooks::{endpoint, reports, wait_for_all};

const JOBS: usize = 400;

#[tokio::test]
async fn a_batch_of_jobs_shares_its_statements_and_each_mail_takes_two_round_trips() {
    let mut world = World::ready().await;
    // One mail per connection would hide the round trips behind greetings.
    world.set("POSTROOM_POOL_SIZE", "8");
    let server = SmtpServer::builder()
        .pipelining(true)
        .keep_data(false)
        .trace(true)
        .start()
        .await;
    account(&world, "acme", &server, &["--limit", "1000000/1h"]).await;
    let mut reports = world.reports().await;
    let jobs: Vec<_> = (0..JOBS)
        .map(|n| {
            let job = json!({"id": format!("j{n}"), "tenant": "acme", "to": "ann@example.org", "text": "x"});
            ("acme".to_owned(), job)
        })
        .collect();
    world.publish_all(Level::Medium, &jobs).await;
    let worker = world.start_worker().await;
    for n in 0..JOBS {
        assert_eq!(reports.final_of(&format!("j{n}")).await.kind(), "mail.sent");
    }
    let statements = worker.count("postroom_sql_batch_rows_count").await;
    // One at a time, each job would take three: admit, settle, clear the outbox.
    assert!(
        statements <= JOBS as u64,
        "{statements} statements for {JOBS} jobs: are calls no longer coalesced?\n{}",
        worker.logs()
    );
    let flights = server.trace().len() as u64;
    let counters = server.counters();
    let connections = counters.connections;
    // MAIL, RCPT and DATA in one piece; the mail is the second. A connection has its EHLO and QUIT.
    assert!(
        flights <= JOBS as u64 + 2 * connections,
        "{flights} pieces of commands for {JOBS} mails on {connections} connections: {:?}",
        counters.commands
    );
    assert!(connections <= 8, "{connections} connections");
    assert_eq!(counters.command("RSET"), 0, "a reset costs a round trip");
    assert_eq!(
        counters.command("NOOP"),
        0,
        "a look at the connection costs a round trip"
    );
}

#[tokio::test]
async fn an_invoice_takes_its_slot_with_its_admission_and_a_file_from_elsewhere_when_it_is_there() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &["--limit", "1000/1h"]).await;
    let mut reports = world.reports().await;
    let files = WebhookReceiver::start().await.unwrap();
    files.always(Reply::Text(200, "content".to_owned()));
    let worker = world.start_worker().await;
    let slots = "postroom_sql_batch_rows_count{statement=\"slots\"}";
    for (id, file, statements) in [
        ("with", json!({"filename": "a.pdf", "base64": "JVBERi0="}), 0),
        (
            "from",
            json!({"filename": "a.pdf", "url": files.url("/a.pdf")}),
            1,
        ),
    ] {
        let mut job = mail("acme", id);
        job["attachments"] = json!([file]);
        world.publish(Level::Medium, "acme", &job).await;
        assert_eq!(
            reports.final_of(id).await.kind(),
            "mail.sent",
            "{}",
            worker.logs()
        );
        assert_eq!(worker.count(slots).await, statements, "{id}");
    }
}

/// Puts something in the place of the tenants that counts the statements that read them in a sequence `reads`, and takes a
/// while for each, as a database elsewhere does.
const COUNT_READS: &str = "
    CREATE SEQUENCE reads;
    ALTER TABLE tenant RENAME TO counted_tenant;
    CREATE VIEW tenant AS
        WITH read AS MATERIALIZED (SELECT nextval('reads'), pg_sleep(0.05))
        SELECT counted_tenant.* FROM read, counted_tenant;";

#[tokio::test]
async fn the_tenants_of_a_backlog_are_read_many_at_a_time() {
    const TENANTS: usize = 512;
    let mut world = World::ready().await;
    world.set("POSTROOM_POOL_SIZE", "64");
    let server = SmtpServer::builder().keep_data(false).start().await;
    account(&world, "-", &server, &[]).await;
    let sql = world.sql().await;
    let tenants =
        "INSERT INTO tenant (id, fallback) SELECT 't-' || n, 'platform' FROM generate_series(1, $1) n";
    sql.execute(tenants, &[&(TENANTS as i32)]).await.unwrap();
    sql.batch_execute(COUNT_READS).await.unwrap();
    let mut reports = world.reports().await;
    let jobs: Vec<_> = (1..=TENANTS)
        .map(|n| {
            let tenant = format!("t-{n}");
            let job = mail(&tenant, &format!("j{n}"));
            (tenant, job)
        })
        .collect();
    world.publish_all(Level::Medium, &jobs).await;
    let worker = world.start_worker().await;
    let finals = reports.finals(TENANTS, Duration::from_mins(1)).await;
    assert!(finals.iter().all(|report| report.kind() == "mail.sent"));
    let reads = "SELECT last_value FROM reads";
    let reads: i64 = sql.query_one(reads, &[]).await.unwrap().get(0);
    // 64 jobs at a time; what was read longer ago than 2 s is read again, and the first lots are small. By itself each
    // tenant would take one.
    assert!(
        (2..=TENANTS as i64 / 16).contains(&reads),
        "{reads} statements for {TENANTS} tenants\n{}",
        worker.logs()
    );
}

#[tokio::test]
async fn webhooks_to_many_endpoints_share_their_statements() {
    const ENDPOINTS: usize = 10;
    const EACH: usize = 60;
    let mut world = World::ready().await;
    let receiver = WebhookReceiver::start().await.unwrap();
    receiver.always(Reply::Slow(Duration::from_millis(20), 204));
    for n in 0..ENDPOINTS {
        endpoint(&world, &format!("tenant-{n}"), &receiver, &[], "").await;
    }
    let mut expected = std::collections::BTreeSet::new();
    for n in 0..ENDPOINTS {
        expected.extend(reports(world.amqp().await, &world, &format!("tenant-{n}"), "x", EACH).await);
    }
    let (database, url) = proxied(world.database_url()).await;
    world.set("POSTROOM_DATABASE_URL", url);
    let _bridge = world.start_bridge().await;
    wait_for_all(&receiver, &expected).await;
    let (statements, hooks) = (database.pieces(), (ENDPOINTS * EACH) as u64);
    // One at a time, each would take two: to lease it, and to write what became of it.
    assert!(
        3 * statements <= hooks,
        "{statements} statements for {hooks} webhooks"
    );
}
