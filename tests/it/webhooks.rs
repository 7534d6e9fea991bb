//! Reports reach the webhooks of those they are about: signed, each under one id however often it is sent, and nobody
//! waits for somebody else's receiver.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use lapin::BasicProperties;
use postroom::level::Level;
use postroom_testkit::smtp::{RcptRule, Script, SmtpServer};
use postroom_testkit::webhook::{Received, Reply, WebhookReceiver};
use serde_json::{Value, json};

use crate::sends::account;
use crate::support::{Amqp, Private, RABBITMQ, World, eventually};

const LIMIT: Duration = Duration::from_mins(1);

/// Sets an endpoint and gives its signing secret. `input` goes to standard input.
pub(crate) async fn endpoint(
    world: &World,
    tenant: &str,
    receiver: &WebhookReceiver,
    more: &[&str],
    input: &str,
) -> String {
    if tenant != "-" {
        world.postroom(&["tenant", "set", tenant]).await.success();
    }
    let url = receiver.url("/hook?token=t0ken");
    let mut arguments = vec!["endpoint", "set", tenant];
    let (names, flags): (Vec<&str>, Vec<&str>) = more.iter().partition(|word| word.starts_with("name="));
    arguments.extend(names.iter().map(|name| &name["name=".len()..]));
    arguments.extend(["--url", &url, "--generate-secret"]);
    arguments.extend(flags);
    let printed = world.postroom_stdin(&arguments, input.as_bytes()).await.success();
    let mut words = printed.split_whitespace();
    words.find(|word| word.starts_with("whsec_")).unwrap().to_owned()
}

/// Publishes a report as a worker does.
async fn report(amqp: &Amqp, world: &World, tenant: &str, kind: &str, id: &str) {
    let body = json!({
        "type": kind, "timestamp": "2026-01-01T00:00:00Z",
        "data": {"job": id, "tenant": tenant, "account": null, "recipients": [], "attempt": 1, "final": true, "sequence": 1},
    });
    let properties = BasicProperties::default()
        .with_message_id(id.into())
        .with_type("mail.report.v1".into())
        .with_content_type("application/json".into());
    let (exchange, key) = (
        world.topology().reports_exchange(),
        format!("report.{tenant}.{kind}"),
    );
    amqp.publish(&exchange, &key, properties, body.to_string().as_bytes())
        .await;
}

/// Publishes `count` reports of a tenant and gives their ids.
pub(crate) async fn reports(
    amqp: &Amqp,
    world: &World,
    tenant: &str,
    prefix: &str,
    count: usize,
) -> BTreeSet<String> {
    let ids: BTreeSet<String> = (0..count).map(|n| format!("evt_{tenant}_{prefix}{n}")).collect();
    let publishes = ids.iter().map(|id| report(amqp, world, tenant, "mail.sent", id));
    futures_util::future::join_all(publishes).await;
    ids
}

fn ids(hooks: &[Received]) -> BTreeSet<String> {
    hooks.iter().map(|hook| hook.event_id().to_owned()).collect()
}

/// Waits until all of these have come.
pub(crate) async fn wait_for_all(receiver: &WebhookReceiver, expected: &BTreeSet<String>) {
    eventually(LIMIT, || async {
        ids(&receiver.received()).is_superset(expected)
    })
    .await;
}

async fn shown(world: &World, tenant: &str) -> Value {
    let shown = world
        .postroom(&["endpoint", "show", tenant, "--json"])
        .await
        .success();
    serde_json::from_str(&shown).unwrap()
}

#[tokio::test]
async fn every_tenant_gets_its_own_reports_as_they_were_published_signed_and_authorised() {
    let world = World::ready().await;
    let script = Script::new().recipient("nobody", RcptRule::refuse("550 5.1.1 unknown"));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &[]).await;
    account(&world, "beta", &server, &[]).await;
    let (own, failures, global) = tokio::join!(
        WebhookReceiver::start(),
        WebhookReceiver::start(),
        WebhookReceiver::start()
    );
    let (own, failures, global) = (own.unwrap(), failures.unwrap(), global.unwrap());
    let own_secret = endpoint(&world, "acme", &own, &["--bearer-stdin"], "t0ps3cret\n").await;
    let only_failed = ["name=failures", "--events", "mail.failed"];
    let failures_secret = endpoint(&world, "acme", &failures, &only_failed, "").await;
    let basic = ["--basic-user", "hook", "--password-stdin"];
    let global_secret = endpoint(&world, "-", &global, &basic, "pa:ss\n").await;
    let mut published = world.reports().await;
    let (_worker, bridge) = tokio::join!(world.start_worker(), world.start_bridge());
    let jobs: Vec<(String, Value)> = (0..40)
        .map(|n| {
            let tenant = if n % 2 == 0 { "acme" } else { "beta" };
            let to = if n % 10 == 0 { "nobody@example.org" } else { "ann@example.org" };
            let job = json!({"id": format!("job-{n}"), "tenant": tenant, "to": to, "subject": "Grüße", "text": "t", "metadata": {"n": n}});
            (tenant.to_owned(), job)
        })
        .collect();
    world.publish_all(Level::Low, &jobs).await;
    let all = published.until(|all| all.len() >= 40).await.to_vec();

    let of = |tenant: &str| {
        all.iter()
            .filter(|r| r.tenant() == tenant)
            .cloned()
            .collect::<Vec<_>>()
    };
    let failed: Vec<_> = of("acme")
        .into_iter()
        .filter(|r| r.kind() == "mail.failed")
        .collect();
    assert_eq!(failed.len(), 4);
    for (receiver, secret, expected, authorization) in [
        (&own, &own_secret, of("acme"), "Bearer t0ps3cret"),
        (&failures, &failures_secret, failed, ""),
        (&global, &global_secret, of("beta"), "Basic aG9vazpwYTpzcw=="),
    ] {
        receiver.wait_for(expected.len(), LIMIT).await.unwrap();
        let hooks = receiver.received();
        assert_eq!(hooks.len(), expected.len());
        let by_id: BTreeMap<_, _> = hooks.iter().map(|hook| (hook.event_id(), hook)).collect();
        for report in &expected {
            let hook = by_id[report.id.as_str()];
            hook.verify(secret).unwrap();
            assert_eq!(hook.body, report.body, "byte for byte");
            assert_eq!(hook.header("authorization"), authorization);
            assert_eq!(hook.header("content-type"), "application/json");
        }
    }
    let delivered = "postroom_webhook_attempts_total{result=\"delivered\"}";
    eventually(LIMIT, || async { bridge.count(delivered).await == 44 }).await;
    assert_eq!(bridge.count("postroom_webhook_attempts_total").await, 44);
    assert_eq!(bridge.count("postroom_webhook_duration_seconds_count").await, 44);
    world.wait_depth(&world.topology().reports_queue(), 0).await;
    let logs = bridge.logs();
    for secret in ["t0ps3cret", "pa:ss", "t0ken", &own_secret[6..], "aG9vazpwYTpzcw"] {
        assert!(!logs.contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn a_killed_bridge_loses_nothing_and_repeats_only_under_the_same_id() {
    let mut world = World::new().await;
    // A dead bridge's deliveries are made again when their leases end: this and 15 s.
    world.set("POSTROOM_WEBHOOK_TIMEOUT", "1s");
    world.prepare().await;
    let mut tenants = Vec::new();
    for tenant in ["a", "b", "c"] {
        let receiver = WebhookReceiver::start().await.unwrap();
        receiver.always(Reply::Slow(Duration::from_millis(50), 204));
        let secret = endpoint(&world, tenant, &receiver, &[], "").await;
        tenants.push((tenant, receiver, secret, BTreeSet::new()));
    }
    let mut bridge = world.start_bridge().await;
    let amqp = world.amqp().await;
    for (tenant, _, _, expected) in &mut tenants {
        *expected = reports(amqp, &world, tenant, "", 150).await;
    }
    // Amid it all, some are recorded but not sent, some sent but not settled.
    eventually(LIMIT, || async {
        tenants
            .iter()
            .all(|(_, receiver, ..)| receiver.received().len() > 20)
    })
    .await;
    bridge.kill().await;
    let before: usize = tenants
        .iter()
        .map(|(_, receiver, ..)| receiver.received().len())
        .sum();
    assert!(before < 450, "killed too late: {before}");
    let _bridge = world.start_bridge().await;
    for (_, receiver, secret, expected) in &tenants {
        wait_for_all(receiver, expected).await;
        let mut bodies: BTreeMap<String, Vec<Received>> = BTreeMap::new();
        for hook in receiver.received() {
            hook.verify(secret).unwrap();
            bodies.entry(hook.event_id().to_owned()).or_default().push(hook);
        }
        assert_eq!(bodies.keys().cloned().collect::<BTreeSet<_>>(), *expected);
        assert!(
            bodies
                .values()
                .all(|hooks| hooks.iter().all(|hook| hook.body == hooks[0].body))
        );
        // Only what was in flight, four at most, or finished and about to be settled, can have been sent twice.
        let repeated = bodies.values().filter(|hooks| hooks.len() > 1).count();
        assert!(
            repeated <= 16 && bodies.values().all(|hooks| hooks.len() <= 2),
            "{repeated} repeated"
        );
    }
    world.wait_depth(&world.topology().reports_queue(), 0).await;
}

#[tokio::test]
async fn a_dead_receiver_does_not_hold_up_another_tenants() {
    let mut world = World::new().await;
    world.set("POSTROOM_WEBHOOK_TIMEOUT", "2m");
    world.set("POSTROOM_WEBHOOK_CONCURRENCY", "8");
    world.prepare().await;
    let (dead, alive) = tokio::join!(WebhookReceiver::start(), WebhookReceiver::start());
    let (dead, alive) = (dead.unwrap(), alive.unwrap());
    dead.always(Reply::Hang);
    endpoint(&world, "dead", &dead, &[], "").await;
    endpoint(&world, "alive", &alive, &[], "").await;
    let bridge = world.start_bridge().await;
    let amqp = world.amqp().await;
    reports(amqp, &world, "dead", "", 200).await;
    dead.wait_for(4, LIMIT).await.unwrap();
    let expected = reports(amqp, &world, "alive", "", 200).await;
    wait_for_all(&alive, &expected).await;
    assert_eq!(alive.received().len(), 200);
    assert_eq!(
        dead.received().len(),
        4,
        "no more than its share in flight, and none has timed out"
    );
    assert_eq!(bridge.count("postroom_webhook_attempts_total").await, 200);
}

#[tokio::test]
async fn a_receiver_that_is_gone_is_disabled_and_told_of_until_an_operator_replays_what_it_missed() {
    let mut world = World::new().await;
    world.set("POSTROOM_WEBHOOK_RETRY_SCALE", "0.01");
    world.prepare().await;
    let (gone, platform) = tokio::join!(WebhookReceiver::start(), WebhookReceiver::start());
    let (gone, platform) = (gone.unwrap(), platform.unwrap());
    let secret = endpoint(&world, "acme", &gone, &[], "").await;
    endpoint(&world, "-", &platform, &[], "").await;
    let mut published = world.reports().await;
    let bridge = world.start_bridge().await;
    let amqp = world.amqp().await;

    // First it is busy, and says for how long.
    gone.script([Reply::RetryAfter(503, "2".to_owned())]);
    let busy = reports(amqp, &world, "acme", "busy", 1).await;
    let hooks = gone.wait_for(2, LIMIT).await.unwrap();
    assert_eq!(ids(&hooks), busy);
    assert!(hooks[1].at.duration_since(hooks[0].at).unwrap() >= Duration::from_millis(1_900));

    gone.always(Reply::Status(410));
    let missed = reports(amqp, &world, "acme", "missed", 1).await;
    published
        .until(|all| all.iter().any(|report| report.kind() == "endpoint.disabled"))
        .await;
    let disabled = published.all().last().unwrap();
    assert_eq!(disabled.key, "report.acme.endpoint.disabled");
    assert_eq!(
        disabled.json["data"],
        json!({"tenant": "acme", "endpoint": "default", "reason": "gone"})
    );
    // Its own endpoint cannot take it any more: the platform's does.
    let told = platform.wait_for(1, LIMIT).await.unwrap();
    assert_eq!(told[0].body, disabled.body);
    let state = shown(&world, "acme").await;
    assert_eq!(
        (&state["enabled"], &state["disabled_reason"]),
        (&json!(false), &json!("gone"))
    );
    for (series, count) in [
        ("postroom_webhook_attempts_total{result=\"gone\"}", 1),
        ("postroom_webhook_attempts_total{result=\"retried\"}", 1),
        ("postroom_webhook_endpoints_disabled_total{reason=\"gone\"}", 1),
    ] {
        assert_eq!(bridge.count(series).await, count, "{series}");
    }

    // Nothing is sent to it, until it is enabled: then what waited, and on demand what came meanwhile.
    gone.always(Reply::Status(200));
    let meanwhile = reports(amqp, &world, "acme", "meanwhile", 3).await;
    world.wait_depth(&world.topology().reports_queue(), 0).await;
    assert_eq!(gone.received().len(), 3);
    world
        .postroom(&["endpoint", "set", "acme", "--enable"])
        .await
        .success();
    gone.wait_for(4, LIMIT).await.unwrap();
    assert_eq!(ids(&gone.received()[3..]), missed);
    world
        .postroom(&["endpoint", "replay", "acme", "--since", "1h"])
        .await
        .success();
    wait_for_all(&gone, &meanwhile).await;
    let count = gone.received().len();
    let one = busy.first().unwrap();
    world
        .postroom(&["endpoint", "replay", "acme", "--event", one])
        .await
        .success();
    eventually(LIMIT, || async {
        gone.received()[count..].iter().any(|hook| hook.event_id() == one)
    })
    .await;
    for hook in gone.received() {
        hook.verify(&secret).unwrap();
    }
}

#[tokio::test]
async fn what_is_no_report_goes_to_the_dead_reports_and_holds_up_nothing() {
    let world = World::ready().await;
    let receiver = WebhookReceiver::start().await.unwrap();
    endpoint(&world, "acme", &receiver, &[], "").await;
    let bridge = world.start_bridge().await;
    let amqp = world.amqp().await;
    let exchange = world.topology().reports_exchange();
    for (id, key, body) in [
        ("evt_json", "report.acme.mail.sent", "{\"type\":"),
        ("evt_key", "report.acme", "{\"type\":\"mail.sent\",\"data\":{}}"),
        (
            "not an id",
            "report.acme.mail.sent",
            "{\"type\":\"mail.sent\",\"data\":{}}",
        ),
    ] {
        let properties = BasicProperties::default().with_message_id(id.into());
        amqp.publish(&exchange, key, properties, body.as_bytes()).await;
    }
    let expected = reports(amqp, &world, "acme", "", 5).await;
    wait_for_all(&receiver, &expected).await;
    world.wait_depth("mail.reports.dead", 3).await;
    world.wait_depth(&world.topology().reports_queue(), 0).await;
    let listed = world
        .postroom(&["dead", "list", "--queue", "reports", "--json"])
        .await
        .success();
    for reason in ["invalid_report", "invalid_routing_key", "invalid_event_id"] {
        assert!(listed.contains(reason), "{listed}");
        let series = format!("postroom_dead_lettered_total{{reason=\"{reason}\"}}");
        assert_eq!(bridge.count(&series).await, 1, "{reason}");
    }
    assert_eq!(receiver.received().len(), 5);
}

#[tokio::test]
async fn a_running_bridge_goes_on_after_a_restart_of_the_broker() {
    let private = Private::start().await;
    let world = World::on(private.servers()).await;
    world.prepare().await;
    let receiver = WebhookReceiver::start().await.unwrap();
    endpoint(&world, "acme", &receiver, &[], "").await;
    let mut bridge = world.start_bridge().await;
    let amqp = Amqp::connect(world.amqp_url()).await;
    let mut expected = reports(&amqp, &world, "acme", "before", 50).await;
    receiver.wait_for(1, LIMIT).await.unwrap();
    private.kill(RABBITMQ).await;
    bridge.wait_not_ready().await;
    private.start_again(RABBITMQ).await;
    bridge.wait_ready().await;
    let amqp = Amqp::connect(world.amqp_url()).await;
    expected.extend(reports(&amqp, &world, "acme", "after", 50).await);
    wait_for_all(&receiver, &expected).await;
    // What was recorded but not acked came again, and was known.
    assert_eq!(receiver.received().len(), 100);
    let queue = world.topology().reports_queue();
    eventually(LIMIT, || async { amqp.depth(&queue).await == Some(0) }).await;
    assert!(bridge.term().await.success());
}

#[tokio::test]
async fn a_second_signal_ends_a_bridge_at_once_and_what_was_answered_is_recorded() {
    let mut world = World::ready().await;
    world.set("POSTROOM_WEBHOOK_TIMEOUT", "2m");
    let (hanging, slow) = (
        WebhookReceiver::start().await.unwrap(),
        WebhookReceiver::start().await.unwrap(),
    );
    hanging.always(Reply::Hang);
    slow.always(Reply::Slow(Duration::from_secs(1), 200));
    endpoint(&world, "acme", &hanging, &[], "").await;
    endpoint(&world, "beta", &slow, &[], "").await;
    let mut bridge = world.start_bridge().await;
    let amqp = world.amqp().await;
    reports(amqp, &world, "acme", "hangs", 1).await;
    hanging.wait_for(1, LIMIT).await.unwrap();
    reports(amqp, &world, "beta", "slow", 1).await;
    slow.wait_for(1, LIMIT).await.unwrap();
    bridge.signal("TERM");
    // While another one is still waited for.
    let sql = world.sql().await;
    let states = "SELECT array_agg(state::text ORDER BY event) FROM webhook_delivery";
    let recorded = async || sql.query_one(states, &[]).await.unwrap().get::<_, Vec<String>>(0);
    eventually(Duration::from_secs(15), || async {
        recorded().await == ["pending", "delivered"]
    })
    .await;
    let asked = Instant::now();
    bridge.signal("TERM");
    bridge.wait().await;
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    assert!(bridge.logs().contains("webhooks in flight were given up"));
    assert_eq!(recorded().await, ["pending", "delivered"]);
}
