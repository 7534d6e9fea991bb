//! The ladder of senders through a real worker: who sent, as whom, and what the report says about it.

use mail_parser::MessageParser;
use postroom::level::Level;
use postroom_testkit::smtp::{Action, Phase, RcptRule, Received as Mail, Script, SmtpServer};
use serde_json::{Value, json};

use crate::sends::{account, account_with_password};
use crate::support::{Received, Reports, World};

fn job(id: &str, tenant: &str, more: &Value) -> Value {
    let mut job = json!({"id": id, "tenant": tenant, "to": "ann@example.org", "subject": "s", "text": "t"});
    for (name, value) in more.as_object().unwrap() {
        job[name] = value.clone();
    }
    job
}

async fn outcome(world: &World, reports: &mut Reports, job: &Value) -> Received {
    let tenant = job["tenant"].as_str().unwrap();
    world.publish(Level::High, tenant, job).await;
    reports.final_of(job["id"].as_str().unwrap()).await
}

async fn set(world: &World, arguments: &[&str]) {
    world.postroom(arguments).await.success();
}

/// Another account of a tenant that exists.
async fn add_account(world: &World, tenant: &str, name: &str, server: &SmtpServer, more: &[&str]) {
    let port = server.port().to_string();
    let mut arguments = vec![
        "account",
        "set",
        tenant,
        name,
        "--host",
        "127.0.0.1",
        "--port",
        &port,
    ];
    arguments.extend(["--tls", "none"]);
    arguments.extend(more);
    set(world, &arguments).await;
}

/// The mail's From and Reply-To as `name <address>`.
fn author(mail: &Mail) -> (String, Option<String>) {
    let parsed = MessageParser::default().parse(&mail.data).unwrap();
    let shown = |address: &mail_parser::Address<'_>| {
        let first = address.first().unwrap();
        format!(
            "{} <{}>",
            first.name().unwrap_or_default(),
            first.address().unwrap()
        )
    };
    (shown(parsed.from().unwrap()), parsed.reply_to().map(shown))
}

fn sender(report: &Received) -> &Value {
    &report.json["data"]["sender"]
}

#[tokio::test]
async fn the_named_account_sends_else_the_default_else_the_job_fails_aloud() {
    let world = World::ready().await;
    let (main, second) = (
        SmtpServer::builder().start().await,
        SmtpServer::builder().start().await,
    );
    account(&world, "acme", &main, &[]).await;
    add_account(
        &world,
        "acme",
        "second",
        &second,
        &["--from", "second@example.com"],
    )
    .await;
    set(&world, &["tenant", "set", "bare"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;

    let named = outcome(
        &world,
        &mut reports,
        &job("named", "acme", &json!({"account": "second"})),
    )
    .await;
    assert_eq!(named.kind(), "mail.sent");
    assert_eq!(
        sender(&named),
        &json!({"via": "account", "account": "acme/second"})
    );
    assert_eq!(author(&second.received()[0]).0, " <second@example.com>");

    let default = outcome(&world, &mut reports, &job("default", "acme", &json!({}))).await;
    assert_eq!(
        sender(&default),
        &json!({"via": "account", "account": "acme/main"})
    );
    let own = json!({"from": "Ann <own@example.com>"});
    outcome(&world, &mut reports, &job("own", "acme", &own)).await;
    assert_eq!(author(&main.received()[1]).0, "Ann <own@example.com>");

    let nobody = outcome(&world, &mut reports, &job("nobody", "bare", &json!({}))).await;
    assert_eq!(
        (nobody.kind(), nobody.reason()),
        ("mail.failed", "sender_not_configured")
    );
    assert_eq!(nobody.json["data"]["recipients"][0]["status"], "refused");

    // An account that does not exist is a mistake in the job, not a matter of policy.
    set(&world, &["tenant", "set", "bare", "--fallback", "platform"]).await;
    let unknown = job(
        "unknown",
        "bare",
        &json!({"account": "nowhere", "fallback": "never"}),
    );
    let unknown = outcome(&world, &mut reports, &unknown).await;
    assert_eq!(
        (unknown.kind(), unknown.reason()),
        ("mail.rejected", "unknown_account")
    );
    let no_platform = outcome(&world, &mut reports, &job("no-platform", "bare", &json!({}))).await;
    assert_eq!(no_platform.kind(), "mail.failed");
    assert!(
        no_platform.json["data"]["detail"]
            .to_string()
            .contains("platform"),
        "{}",
        no_platform.json
    );
}

#[tokio::test]
async fn the_platform_sends_for_a_tenant_without_account_where_the_policy_says_so() {
    let mut world = World::ready().await;
    world.set("POSTROOM_UNKNOWN_TENANT", "platform");
    let platform = SmtpServer::builder().start().await;
    add_account(
        &world,
        "-",
        "relay",
        &platform,
        &["--from", "Post <post@platform.example>"],
    )
    .await;
    set(
        &world,
        &[
            "tenant",
            "set",
            "bare",
            "--name",
            "Bare Ltd",
            "--fallback",
            "platform",
        ],
    )
    .await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;

    let from = json!({"from": "Shop <shop@bare.example>"});
    let sent = outcome(&world, &mut reports, &job("1", "bare", &from)).await;
    assert_eq!(sent.kind(), "mail.sent", "{}", sent.json);
    let expected = json!({"via": "platform", "account": "-/relay", "reason": "not_configured"});
    assert_eq!(sender(&sent), &expected);
    let mail = platform.received().remove(0);
    assert_eq!(mail.from, "post@platform.example");
    let reply_to = Some("Shop <shop@bare.example>".to_owned());
    assert_eq!(
        author(&mail),
        ("Bare Ltd <post@platform.example>".to_owned(), reply_to)
    );

    // The job's own policy is stronger than the tenant's.
    let never = job("2", "bare", &json!({"fallback": "never"}));
    let never = outcome(&world, &mut reports, &never).await;
    assert_eq!(
        (never.kind(), never.reason()),
        ("mail.failed", "sender_not_configured")
    );

    let unknown = outcome(&world, &mut reports, &job("3", "stranger", &from)).await;
    assert_eq!(unknown.kind(), "mail.sent", "{}", unknown.json);
    assert_eq!(sender(&unknown), &expected);
    assert_eq!(author(&platform.received()[1]).0, "Shop <post@platform.example>");
}

/// The platform, and tenant `acme` (named Acme) that may fall back to it, with `own` as its default account.
async fn world_with_fallback(platform: &SmtpServer, own: &SmtpServer) -> World {
    let world = World::ready().await;
    let from = ["--from", "post@platform.example"];
    add_account(&world, "-", "relay", platform, &from).await;
    account(&world, "acme", own, &[]).await;
    let fallback = [
        "tenant",
        "set",
        "acme",
        "--name",
        "Acme",
        "--fallback",
        "platform",
    ];
    set(&world, &fallback).await;
    world
}

#[tokio::test]
async fn the_platform_sends_when_the_login_of_the_account_is_refused() {
    let platform = SmtpServer::builder().start().await;
    let script = Script::new().on(Phase::Auth, Action::reply("535 5.7.8 Credentials invalid"));
    let closed = SmtpServer::builder().script(script).auth("u", "p").start().await;
    let world = world_with_fallback(&platform, &closed).await;
    account_with_password(&world, "main", &closed, "wrong", "--from acme@example.com").await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;

    let sent = outcome(&world, &mut reports, &job("1", "acme", &json!({}))).await;
    assert_eq!(sent.kind(), "mail.sent", "{}", sent.json);
    let expected = json!({"via": "platform", "account": "-/relay", "reason": "send_error"});
    assert_eq!(sender(&sent), &expected);
    let reply_to = Some(" <acme@example.com>".to_owned());
    let mail = platform.received().remove(0);
    assert_eq!(
        author(&mail),
        ("Acme <post@platform.example>".to_owned(), reply_to)
    );
    assert_eq!(closed.received_count(), 0);

    // Without that policy the mail waits for the right password.
    let never = job("2", "acme", &json!({"fallback": "never"}));
    world.publish(Level::High, "acme", &never).await;
    let all = reports.until(|all| all.iter().any(|r| r.job() == "2")).await;
    let waiting = all.iter().find(|r| r.job() == "2").unwrap();
    assert_eq!(waiting.kind(), "mail.deferred");
    assert_eq!(waiting.json["data"]["class"], "auth");
}

#[tokio::test]
async fn what_the_platform_sends_instead_of_an_account_counts_against_its_limits() {
    let platform = SmtpServer::builder().start().await;
    // A login that can never succeed opens no circuit breaker: each mail tries.
    let own = SmtpServer::builder().start().await;
    let world = world_with_fallback(&platform, &own).await;
    account_with_password(&world, "main", &own, "p", "--from acme@example.com").await;
    set(&world, &["tenant", "set", "-", "--limit", "1/1h"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for n in 0..5 {
        let job = job(&format!("{n}"), "acme", &json!({}));
        world.publish(Level::High, "acme", &job).await;
    }
    let told = |all: &[Received]| {
        let told: std::collections::HashSet<_> = all.iter().map(Received::job).collect();
        told.len() == 5
    };
    let all = reports.until(told).await;
    let kinds = |kind: &str| all.iter().filter(|r| r.kind() == kind).count();
    assert_eq!((kinds("mail.sent"), kinds("mail.deferred")), (1, 4));
    assert_eq!(platform.received_count(), 1);
}

#[tokio::test]
async fn a_mail_that_an_account_heard_counts_there_even_if_the_platform_sends_it() {
    let platform = SmtpServer::builder().start().await;
    // The second MAIL finds the connection closed, and there is no other.
    let script = Script::new()
        .once_after(1, Phase::Mail, Action::shutting_down())
        .once_after(1, Phase::Greeting, Action::shutting_down());
    let own = SmtpServer::builder().script(script).start().await;
    let world = world_with_fallback(&platform, &own).await;
    set(&world, &["account", "set", "acme", "main", "--limit", "10/1h"]).await;
    set(&world, &["account", "set", "-", "relay", "--limit", "10/1h"]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    for (id, via) in [("1", "account"), ("2", "platform")] {
        let sent = outcome(&world, &mut reports, &job(id, "acme", &json!({}))).await;
        assert_eq!(
            (sent.kind(), sender(&sent)["via"].as_str()),
            ("mail.sent", Some(via))
        );
    }
    assert_eq!(
        (
            own.counters().command("MAIL"),
            platform.counters().command("MAIL")
        ),
        (2, 1)
    );
    let sql = world.sql().await;
    for (key, heard) in [("acme/main", 2), ("-/relay", 1)] {
        let used = sql
            .query_one("SELECT used[1] FROM rate WHERE key = $1", &[&key])
            .await
            .unwrap();
        assert_eq!(used.get::<_, i32>(0), heard, "{key}");
    }
}

#[tokio::test]
async fn the_platform_never_sends_after_a_fault_of_the_recipient() {
    let script = Script::new()
        .recipient("gone", RcptRule::refuse("550 5.1.1 No such user"))
        .recipient("later", RcptRule::refuse("451 4.2.2 Mailbox full"));
    let platform = SmtpServer::builder().start().await;
    let own = SmtpServer::builder().script(script).start().await;
    let world = world_with_fallback(&platform, &own).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;

    let gone = job("gone", "acme", &json!({"to": "gone@example.org"}));
    let gone = outcome(&world, &mut reports, &gone).await;
    assert_eq!(gone.kind(), "mail.failed");
    assert_eq!(gone.json["data"]["class"], "recipient");
    assert_eq!(sender(&gone)["via"], "account");
    let later = job("later", "acme", &json!({"to": "later@example.org"}));
    world.publish(Level::High, "acme", &later).await;
    let is_deferred = |r: &Received| r.job() == "later" && r.kind() == "mail.deferred";
    reports.until(|all| all.iter().any(is_deferred)).await;
    assert_eq!(platform.counters().connections, 0);
}
