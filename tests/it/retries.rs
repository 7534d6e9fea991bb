//! What a server refuses for now is tried again, what it refuses for good is not, recipient by recipient.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postroom::level::Level;
use postroom_testkit::smtp::{Action, Phase, RcptRule, Script, SmtpServer};
use serde_json::json;

use crate::sends::account;
use crate::support::{World, eventually, header, mail, taken};

async fn quick_retries() -> World {
    let mut world = World::ready().await;
    world.set("POSTROOM_RETRY_BASE", "200ms");
    world
}

#[tokio::test]
async fn a_mail_deferred_with_451_is_sent_by_the_next_attempt_as_the_same_mail() {
    let world = quick_retries().await;
    let script = Script::new().first(
        1,
        Phase::FinalDot,
        Action::reply("451 4.7.1 Greylisted, come back"),
    );
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_mail(Level::High, "acme", "grey").await;
    let sent = reports.final_of("grey").await;
    assert_eq!(sent.kind(), "mail.sent");
    assert_eq!(sent.json["data"]["attempt"], 2);
    let all = reports.of("grey");
    assert_eq!(all.len(), 2);
    let (deferred, sent) = (&all[0].json["data"], &all[1].json["data"]);
    assert_eq!(all[0].kind(), "mail.deferred");
    assert_eq!(deferred["final"], false);
    assert_eq!(deferred["attempt"], 1);
    assert_eq!(deferred["recipients"][0]["status"], "deferred");
    assert_eq!(deferred["recipients"][0]["code"], 451);
    assert_eq!(deferred["recipients"][0]["enhanced_code"], "4.7.1");
    assert!(deferred["next_attempt_at"].is_string());
    assert_eq!(deferred["message_id"], sent["message_id"]);
    let shown = world.job("acme", "grey").await;
    assert_eq!((&shown["state"], &shown["attempts"]), (&json!("done"), &json!(2)));
    assert_eq!(shown["message_id"], sent["message_id"]);
    let mails = server.received();
    assert_eq!(
        header(&mails[0], "Message-ID"),
        format!(
            "<{}>",
            sent["message_id"].as_str().unwrap().trim_matches(['<', '>'])
        )
    );
    world.assert_settled().await;
}

#[tokio::test]
async fn message_id_and_date_stay_the_same_over_attempts() {
    let world = quick_retries().await;
    // The first attempt's mail is kept by the server although the client does not learn of it.
    let script = Script::new().first(1, Phase::FinalDot, Action::TakeThenClose);
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_mail(Level::High, "acme", "twice").await;
    assert_eq!(reports.final_of("twice").await.kind(), "mail.sent");
    let mails = server.received();
    assert_eq!(mails.len(), 2);
    for name in ["Message-ID", "Date"] {
        assert_eq!(header(&mails[0], name), header(&mails[1], name));
        assert!(!header(&mails[0], name).is_empty());
    }
}

/// Counts RCPT per address, and answers by local part: `refused` for good, `busy` the first time.
fn recipients(seen: &Arc<Mutex<HashMap<String, u32>>>) -> Script {
    let seen = Arc::clone(seen);
    Script::new().recipients_with(move |address| {
        let mut seen = seen.lock().unwrap();
        let count = seen.entry(address.to_owned()).or_default();
        *count += 1;
        match address.split_once('@').unwrap().0 {
            "refused" => Some("550 5.1.1 No such user here".to_owned()),
            "busy" if *count == 1 => Some("450 4.2.1 Mailbox busy".to_owned()),
            _ => None,
        }
    })
}

#[tokio::test]
async fn only_the_recipients_deferred_are_tried_again_and_refused_ones_never() {
    let world = quick_retries().await;
    let seen = Arc::default();
    let server = SmtpServer::builder().script(recipients(&seen)).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut job = mail("acme", "three");
    job["to"] = json!(["fine@example.org", "busy@example.org", "refused@example.org"]);
    world.publish(Level::High, "acme", &job).await;
    let sent = reports.final_of("three").await;
    assert_eq!(sent.kind(), "mail.sent");
    let data = &sent.json["data"];
    assert_eq!((&data["partial"], &data["attempt"]), (&json!(true), &json!(2)));
    let statuses: Vec<_> = data["recipients"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| &r["status"])
        .collect();
    assert_eq!(statuses, ["accepted", "accepted", "refused"]);
    let refused = &data["recipients"][2];
    assert_eq!(
        (&refused["code"], &refused["enhanced_code"]),
        (&json!(550), &json!("5.1.1"))
    );
    assert!(
        refused["text"].as_str().unwrap().contains("No such user here"),
        "{refused}"
    );
    let seen = seen.lock().unwrap().clone();
    assert_eq!(
        (
            seen["fine@example.org"],
            seen["busy@example.org"],
            seen["refused@example.org"]
        ),
        (1, 2, 1)
    );
    let envelopes: Vec<_> = server.received().iter().map(|mail| mail.to.clone()).collect();
    assert_eq!(envelopes, [vec!["fine@example.org"], vec!["busy@example.org"]]);
    assert_eq!(reports.of("three").len(), 2, "deferred once, then final");
    assert_eq!(reports.of("three")[0].kind(), "mail.deferred");
    world.assert_settled().await;
}

#[tokio::test]
async fn a_mail_refused_for_one_of_two_is_sent_partially_and_refused_for_all_fails() {
    let world = quick_retries().await;
    let seen = Arc::default();
    let server = SmtpServer::builder().script(recipients(&seen)).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for (id, to) in [
        ("half", json!(["fine@example.org", "refused@example.org"])),
        ("none", json!(["refused@example.net"])),
    ] {
        let mut job = mail("acme", id);
        job["to"] = to;
        world.publish(Level::High, "acme", &job).await;
    }
    let half = reports.final_of("half").await;
    assert_eq!(
        (half.kind(), &half.json["data"]["partial"]),
        ("mail.sent", &json!(true))
    );
    let none = reports.final_of("none").await;
    assert_eq!(none.kind(), "mail.failed");
    let data = &none.json["data"];
    assert_eq!(
        (&data["class"], &data["fault"], &data["attempt"]),
        (&json!("recipient"), &json!("recipient"), &json!(1))
    );
    // Several base delays: nobody tries again.
    assert!(reports.none_for(Duration::from_secs(1)).await);
    assert_eq!(
        *seen.lock().unwrap(),
        HashMap::from([
            ("fine@example.org".to_owned(), 1),
            ("refused@example.org".to_owned(), 1),
            ("refused@example.net".to_owned(), 1),
        ])
    );
    world.assert_settled().await;
}

#[tokio::test]
async fn a_mail_that_keeps_being_deferred_fails_after_the_last_attempt_allowed() {
    let world = quick_retries().await;
    let script = Script::new().recipient("tired", RcptRule::refuse("451 4.3.0 Come back"));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &["--max-attempts", "3"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    world.publish_mail(Level::High, "acme", "tired").await;
    let failed = reports.final_of("tired").await;
    assert_eq!(failed.kind(), "mail.failed");
    let data = &failed.json["data"];
    assert_eq!(data["attempt"], 3);
    assert_eq!(data["recipients"][0]["status"], "refused");
    assert_eq!(data["recipients"][0]["code"], 451);
    assert_eq!(reports.of("tired").len(), 2, "deferred once, then failed");
    assert_eq!(server.counters().command("RCPT"), 3);
    assert!(taken(&server).is_empty());
    world.assert_settled().await;
}

#[tokio::test]
async fn a_server_that_hangs_up_over_one_recipient_keeps_the_mail_from_no_other() {
    let world = quick_retries().await;
    let script = Script::new().recipients_with(|address| {
        let hangs_up = address.starts_with("bank");
        hangs_up.then(|| "421 4.7.0 TLS required for RCPT domain, closing connection".to_owned())
    });
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &["--max-attempts", "2"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut job = mail("acme", "three");
    job["to"] = json!(["ann@example.org", "bank@example.net", "bob@example.org"]);
    world.publish(Level::High, "acme", &job).await;
    let sent = reports.final_of("three").await;
    assert_eq!(
        (sent.kind(), &sent.json["data"]["partial"]),
        ("mail.sent", &json!(true))
    );
    let first = &reports.of("three")[0].json["data"]["recipients"];
    assert_eq!(
        [&first[0]["status"], &first[1]["status"], &first[2]["status"]],
        ["accepted", "deferred", "accepted"]
    );
    let envelopes: Vec<_> = server.received().iter().map(|mail| mail.to.clone()).collect();
    assert_eq!(envelopes, [["ann@example.org", "bob@example.org"]]);
    world.assert_settled().await;
}

#[tokio::test]
async fn a_recipient_outside_ascii_is_refused_alone_by_a_server_that_cannot_name_it() {
    let world = quick_retries().await;
    let server = SmtpServer::builder().smtputf8(false).start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut job = mail("acme", "three");
    job["bcc"] = json!(["jürgen@example.org", "bob@example.org"]);
    world.publish(Level::High, "acme", &job).await;
    let sent = reports.final_of("three").await;
    let data = &sent.json["data"];
    assert_eq!((sent.kind(), &data["partial"]), ("mail.sent", &json!(true)));
    assert_eq!(
        (&data["reason"], &data["recipients"][1]["status"]),
        (&json!("smtputf8_not_supported"), &json!("refused"))
    );
    assert_eq!(server.received()[0].to, ["three@example.org", "bob@example.org"]);
    world.assert_settled().await;
}

#[tokio::test]
async fn a_recipient_whom_the_server_cannot_name_does_not_fail_the_mail_of_others_who_have_had_their_turn() {
    let world = quick_retries().await;
    let script = Script::new().recipient("three", RcptRule::refuse("451 4.7.1 Greylisted"));
    let first = SmtpServer::builder().script(script).start().await;
    let second = SmtpServer::builder().smtputf8(false).start().await;
    let limit = ["--limit", "1/3s:recipients"];
    account(&world, "acme", &first, &limit).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let mut job = mail("acme", "three");
    job["bcc"] = json!(["jürgen@example.org"]);
    world.publish(Level::High, "acme", &job).await;
    let begun = || async { first.counters().command("RCPT") > 0 };
    eventually(Duration::from_secs(30), begun).await;
    account(&world, "acme", &second, &limit).await;
    let sent = reports.final_of("three").await;
    let recipients = &sent.json["data"]["recipients"];
    assert_eq!(
        [&recipients[0]["status"], &recipients[1]["status"]],
        ["accepted", "refused"]
    );
    assert_eq!(second.received()[0].to, ["three@example.org"]);
    world.assert_settled().await;
}
