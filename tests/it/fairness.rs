//! One account's backlog or slow server is that account's own trouble.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::files::{Answer, FileServer};
use postroom_testkit::smtp::{Phase, Received, Script, SmtpServer};

use serde_json::json;

use crate::sends::account;
use crate::support::{World, eventually, header, mail, mails};

/// How many mails a server took before the one with this subject.
fn place(server: &SmtpServer, subject: &str) -> usize {
    let mails = server.received();
    mails
        .iter()
        .position(|mail| header(mail, "Subject") == subject)
        .unwrap()
}

#[tokio::test]
async fn a_job_behind_twenty_thousand_of_a_limited_account_leaves_before_one_percent_of_them() {
    const BULK: usize = 20_000;
    let mut world = World::ready().await;
    world.set("POSTROOM_LOG", "info");
    let (bulk, other) = (
        SmtpServer::builder().start().await,
        SmtpServer::builder().start().await,
    );
    account(&world, "bulk", &bulk, &["--limit", "8/4s"]).await;
    account(&world, "other", &other, &[]).await;
    world
        .publish_all(Level::Medium, &mails("bulk", "bulk", BULK))
        .await;
    world.publish_mail(Level::Medium, "other", "behind").await;
    let mut reports = world.reports().await;
    let _workers = (world.start_worker().await, world.start_worker().await);
    let wait = Duration::from_mins(3);
    reports
        .until_within(wait, |all| {
            all.iter().any(|r| r.job() == "behind" && r.is_final())
        })
        .await;
    let gone = bulk.received_count();
    assert!(gone < BULK / 100, "{gone} of {BULK} went first");
    let gone = bulk.received_count();
    // The limited account's own urgent job waits for the limit, but not for those who wait for it too.
    world.publish_mail(Level::Immediate, "bulk", "urgent").await;
    reports
        .until_within(wait, |all| {
            all.iter().any(|r| r.job() == "urgent" && r.is_final())
        })
        .await;
    let place = place(&bulk, "urgent");
    // Two turns of the limit at most.
    assert!(place <= gone + 16, "{} of {BULK} went first", place - gone);
    let deferred = reports
        .all()
        .iter()
        .filter(|r| r.job() == "urgent" && !r.is_final());
    assert_eq!(deferred.count(), 0, "it was told to wait long");
}

#[tokio::test]
async fn an_account_with_a_very_slow_server_does_not_hold_up_the_jobs_of_others() {
    let world = World::ready().await;
    // Nothing here waits for it.
    let script = Script::new().delay(Phase::FinalDot, Duration::from_mins(1));
    let (slow, quick) = (
        SmtpServer::builder().script(script).start().await,
        SmtpServer::builder().start().await,
    );
    account(&world, "slow", &slow, &[]).await;
    account(&world, "quick", &quick, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world
        .publish_all(Level::Medium, &mails("slow", "slow", 300))
        .await;
    eventually(Duration::from_secs(20), || async {
        slow.counters().command("DATA") >= 16
    })
    .await;
    for round in 0..3 {
        world
            .publish_mail(Level::Medium, "quick", &format!("quick-{round}"))
            .await;
        assert_eq!(
            reports.final_of(&format!("quick-{round}")).await.kind(),
            "mail.sent"
        );
        let ended = reports
            .all()
            .iter()
            .filter(|report| report.tenant() == "slow")
            .count();
        assert_eq!(ended, 0, "it waited for a slow one to end");
    }
}

#[tokio::test]
async fn what_stands_behind_a_busy_account_is_parked_although_no_permit_is_free() {
    const PERMITS: usize = 4;
    let mut world = World::ready().await;
    // Of 8, as many are for `medium`.
    world.set("POSTROOM_CONCURRENCY", "8");
    let script = Script::new().delay(Phase::FinalDot, Duration::from_secs(20));
    let slow = SmtpServer::builder().script(script).start().await;
    account(&world, "slow", &slow, &["--max-connections", "4"]).await;
    account(&world, "other", &slow, &[]).await;
    let _worker = world.start_worker().await;
    world
        .publish_all(Level::Medium, &mails("slow", "slow", PERMITS))
        .await;
    eventually(Duration::from_secs(20), || async {
        slow.counters().command("DATA") == PERMITS as u64
    })
    .await;
    // It finds no permit; the account of those behind it is full.
    world.publish_mail(Level::Medium, "other", "first").await;
    world
        .publish_all(Level::Medium, &mails("slow", "behind", 2))
        .await;
    let sql = world.sql().await;
    let count = async |condition: &str| {
        let query = format!("SELECT count(*) FROM job WHERE {condition}");
        sql.query_one(&query, &[]).await.unwrap().get::<_, i64>(0)
    };
    eventually(Duration::from_secs(15), || async {
        count("state = 2 AND reason = 4 AND tenant = 'slow'").await == 2
    })
    .await;
    assert_eq!(count("state = 1").await, PERMITS as i64, "they are still sending");
}

#[tokio::test]
async fn jobs_that_lack_a_permit_go_in_the_order_in_which_they_came() {
    const COUNT: usize = 300;
    /// In hand at once: those may go in any order.
    const IN_HAND: usize = 64;
    let mut world = World::ready().await;
    world.set("POSTROOM_CONCURRENCY", "16");
    // Permits become free one by one, and what is in hand waits for more than a second.
    let mut servers = Vec::new();
    for delay in [190, 230, 270, 310, 370] {
        let script = Script::new().delay(Phase::FinalDot, Duration::from_millis(delay));
        servers.push(SmtpServer::builder().script(script).start().await);
    }
    for (n, server) in servers.iter().enumerate() {
        account(&world, &format!("t-{n}"), server, &[]).await;
    }
    // Each job has an account of its own.
    let others = "INSERT INTO tenant (id) SELECT 't-' || n FROM generate_series(5, 299) n;
        INSERT INTO account (tenant, id, host, port, tls, from_address, is_default)
            SELECT 't-' || n, a.id, host, port, tls, from_address, is_default
            FROM generate_series(5, 299) n JOIN account a ON a.tenant = 't-' || n % 5";
    world.sql().await.batch_execute(others).await.unwrap();
    let jobs: Vec<_> = (0..COUNT)
        .map(|n| {
            let tenant = format!("t-{n}");
            let job = mail(&tenant, &n.to_string());
            (tenant, job)
        })
        .collect();
    world.publish_all(Level::Medium, &jobs).await;
    let _worker = world.start_worker().await;
    let taken = || servers.iter().flat_map(SmtpServer::received).collect::<Vec<_>>();
    eventually(Duration::from_mins(1), || async { taken().len() == COUNT }).await;
    let mut mails = taken();
    mails.sort_by_key(|mail| mail.at);
    let overtaken_by = |(place, mail): (usize, &Received)| {
        place.saturating_sub(header(mail, "Subject").parse::<usize>().unwrap())
    };
    let most = mails.iter().enumerate().map(overtaken_by).max().unwrap();
    assert!(most <= IN_HAND, "one was overtaken by {most}");
}

#[tokio::test]
async fn a_file_host_that_hangs_holds_up_no_other_tenant_of_the_same_account() {
    const OTHERS: usize = 20;
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    let web = FileServer::start().await.unwrap();
    let hanging = web.put("/hanging", Answer::file("x").after(Duration::from_mins(10)));
    account(&world, "-", &server, &[]).await;
    for tenant in ["hangs", "other"] {
        let set = ["tenant", "set", tenant, "--fallback", "platform"];
        world.postroom(&set).await.success();
    }
    let mut jobs = mails("hangs", "hangs", 40);
    for (_, job) in &mut jobs {
        job["attachments"] = json!([{"filename": "a.pdf", "url": hanging}]);
    }
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_all(Level::Medium, &jobs).await;
    // As many at once as one tenant may.
    eventually(Duration::from_secs(20), || async {
        web.requests("/hanging") >= 4
    })
    .await;
    world
        .publish_all(Level::Medium, &mails("other", "other", OTHERS))
        .await;
    // Less than a fetch may take.
    reports.finals(OTHERS, Duration::from_secs(40)).await;
    assert_eq!(server.received_count(), OTHERS);
    let decided = reports.all().iter().filter(|report| report.tenant() == "hangs");
    assert_eq!(decided.count(), 0, "the host still hangs");
}
