//! Levels: urgent mail does not wait for bulk, and bulk is never starved.

use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::{Phase, Script, SmtpServer};

use crate::sends::account;
use crate::support::{World, header, mails};

async fn slow_server(delay: Duration) -> SmtpServer {
    let script = Script::new().delay(Phase::FinalDot, delay);
    SmtpServer::builder().script(script).start().await
}

async fn world_with_eight_permits(server: &SmtpServer) -> World {
    let mut world = World::ready().await;
    world.set("POSTROOM_CONCURRENCY", "8");
    account(&world, "acme", server, &[]).await;
    world
}

#[tokio::test]
async fn immediate_mail_is_sent_while_hundreds_of_low_jobs_are_on_their_way() {
    let server = slow_server(Duration::from_millis(100)).await;
    let world = world_with_eight_permits(&server).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_all(Level::Low, &mails("acme", "low", 400)).await;
    server.wait_for(8, Duration::from_secs(30)).await;
    let before = server.received_count();
    world.publish_mail(Level::Immediate, "acme", "now").await;
    let report = reports.final_of("now").await;
    assert_eq!(report.kind(), "mail.sent");
    let mails = server.received();
    let place = mails.iter().position(|mail| header(mail, "Subject") == "now");
    // Four low ones at a time, a hundred milliseconds each: behind them all it would have been some 390.
    let overtaken_by = place.unwrap() - before;
    assert!(overtaken_by < 100, "{overtaken_by} low mails went first");
}

#[tokio::test]
async fn low_mail_is_not_starved_by_a_stream_of_immediate_jobs() {
    let server = slow_server(Duration::from_millis(50)).await;
    let world = world_with_eight_permits(&server).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world
        .publish_all(Level::Immediate, &mails("acme", "now", 600))
        .await;
    world.publish_all(Level::Low, &mails("acme", "low", 10)).await;
    let mut low = 0;
    reports
        .until(|all| {
            low = all
                .iter()
                .filter(|r| r.job().starts_with("low") && r.is_final())
                .count();
            low == 10
        })
        .await;
    let urgent = server.received_count() - low;
    assert!(urgent < 500, "{urgent} immediate mails went first");
}
