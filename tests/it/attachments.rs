//! Attachments on their way into a mail, or next to it: what the reader gets is byte for byte what the producer meant.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mail_parser::{Message, MessageParser, MimeHeaders as _};
use postroom::level::Level;
use postroom_testkit::files::{Answer, FileServer};
use postroom_testkit::s3::S3Server;
use postroom_testkit::smtp::{Action, Phase, RcptRule, Received, Script, SmtpServer};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::sends::account;
use crate::support::{World, eventually};

const LIMIT: Duration = Duration::from_secs(30);
const HTML: &str = "<html><body><p>Anbei</p><img src=\"cid:logo@acme\"></body></html>";

/// Bytes of every value, with line ends and dots among them.
fn bytes(length: usize, seed: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..length)
        .map(|n| (n.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8)
        .collect();
    let odd = b"\r\n.\r\n\n\r.\0\xff";
    bytes.splice(..odd.len().min(length), odd.iter().copied().take(length));
    bytes
}

fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

fn digest(bytes: &[u8]) -> String {
    let digits = |byte: &u8| [byte >> 4, byte & 15].map(|n| char::from_digit(n.into(), 16).unwrap());
    Sha256::digest(bytes).iter().flat_map(digits).collect()
}

fn job(id: &str, attachments: &Value) -> Value {
    json!({
        "id": id, "tenant": "acme", "to": "ann@example.org", "subject": "Files",
        "text": "See attached.", "html": HTML, "attachments": attachments,
    })
}

/// One file that tenants want uploaded who are set up by [`rewriting`].
fn large_file() -> Value {
    json!([{"filename": "large.bin", "base64": base64(&bytes(200_000, 9))}])
}

fn parsed(mail: &Received) -> Message<'_> {
    MessageParser::new().parse(&mail.data[..]).unwrap()
}

/// Name and content of everything attached, inline parts too.
fn files(message: &Message<'_>) -> Vec<(String, Vec<u8>)> {
    message
        .attachments()
        .map(|part| {
            (
                part.attachment_name().unwrap_or_default().to_owned(),
                part.contents().to_vec(),
            )
        })
        .collect()
}

/// URLs in a plain body.
fn links(text: &str) -> Vec<String> {
    text.split_whitespace()
        .filter(|word| word.starts_with("http"))
        .map(str::to_owned)
        .collect()
}

async fn status(url: &str) -> u16 {
    reqwest::get(url).await.unwrap().status().as_u16()
}

async fn download(url: &str) -> (String, Vec<u8>) {
    let response = reqwest::get(url).await.unwrap().error_for_status().unwrap();
    let disposition = response.headers().get("content-disposition");
    let disposition = disposition
        .map(|value| value.to_str().unwrap().to_owned())
        .unwrap_or_default();
    (disposition, response.bytes().await.unwrap().to_vec())
}

#[tokio::test]
async fn bodies_an_inline_image_and_a_file_arrive_as_they_were_given() {
    let world = World::ready().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let (image, file) = (bytes(3_001, 1), bytes(150_000, 2));
    let attachments = json!([
        {"filename": "logo.png", "inline": true, "content_id": "logo@acme", "base64": base64(&image)},
        {"filename": "Übersicht 2026.pdf", "content_type": "application/pdf", "base64": base64(&file), "sha256": digest(&file)},
        {"filename": "empty.txt", "base64": ""},
    ]);
    world
        .publish(Level::High, "acme", &job("files", &attachments))
        .await;
    assert_eq!(reports.final_of("files").await.kind(), "mail.sent");

    let mails = server.received();
    let message = parsed(&mails[0]);
    assert_eq!(message.body_text(0).unwrap().trim_end(), "See attached.");
    assert_eq!(message.body_html(0).unwrap().trim_end(), HTML);
    let expected = [
        ("logo.png", image),
        ("Übersicht 2026.pdf", file),
        ("empty.txt", Vec::new()),
    ];
    assert_eq!(
        files(&message),
        expected.map(|(name, bytes)| (name.to_owned(), bytes))
    );
    let parts: Vec<_> = message.attachments().collect();
    assert_eq!(parts[0].content_id(), Some("logo@acme"));
    assert!(parts[0].content_disposition().unwrap().is_inline());
    assert!(parts[1].content_disposition().unwrap().is_attachment());
    let media = parts[1].content_type().unwrap();
    assert_eq!((media.ctype(), media.subtype()), ("application", Some("pdf")));
}

#[tokio::test]
async fn a_file_is_fetched_again_after_a_passing_error_and_a_lasting_one_fails_the_mail() {
    let mut world = World::new().await;
    world.set("POSTROOM_RETRY_BASE", "100ms");
    world.prepare().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let host = FileServer::start().await.unwrap();
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    let file = bytes(70_000, 3);
    let good = host.put("/good", Answer::file(file.clone()).failing(1));
    let other = host.put("/other", Answer::file(bytes(70_000, 4)));
    let at = |url: &str| json!([{"filename": "a.bin", "url": url, "sha256": digest(&file)}]);
    for (id, url) in [
        ("good", &good),
        ("absent", &host.url("/absent")),
        ("other", &other),
    ] {
        world.publish(Level::High, "acme", &job(id, &at(url))).await;
    }

    let sent = reports.final_of("good").await;
    assert_eq!(
        (sent.kind(), &sent.json["data"]["attempt"]),
        ("mail.sent", &json!(2))
    );
    assert_eq!(host.requests("/good"), 2);
    let mails = server.received();
    assert_eq!(files(&parsed(&mails[0])), [("a.bin".to_owned(), file.clone())]);
    for (id, reason) in [
        ("absent", "attachment_unavailable"),
        ("other", "attachment_digest_mismatch"),
    ] {
        let failed = reports.final_of(id).await;
        assert_eq!((failed.kind(), failed.reason()), ("mail.failed", reason));
        assert_eq!(failed.json["data"]["attempt"], 1);
    }
    assert_eq!(host.requests("/absent"), 1);
    assert_eq!(server.received_count(), 1);
    let logs = worker.logs();
    assert!(
        logs.contains("attachment_digest_mismatch") && !logs.contains("a.bin"),
        "{logs}"
    );

    // What has been fetched once is known by its digest.
    world
        .publish(Level::High, "acme", &job("again", &at(&good)))
        .await;
    assert_eq!(reports.final_of("again").await.kind(), "mail.sent");
    assert_eq!(host.requests("/good"), 2);
    for (result, count) in [("ok", 2), ("failed", 2), ("cached", 1)] {
        let series = format!("postroom_attachment_fetches_total{{result=\"{result}\"}}");
        assert_eq!(worker.count(&series).await, count, "{result}");
    }
    assert_eq!(worker.count("postroom_attachment_bytes").await, 0);
}

#[tokio::test]
async fn a_file_that_cannot_be_fetched_is_given_up_when_its_account_says_so_and_the_report_names_that_account()
 {
    let mut world = World::new().await;
    world.set("POSTROOM_RETRY_BASE", "100ms");
    world.prepare().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &["--max-attempts", "2"]).await;
    let host = FileServer::start().await.unwrap();
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let busy = host.put("/busy", Answer::status(503));
    let file = |url: &str| json!([{"filename": "a.bin", "url": url}]);
    world
        .publish(Level::High, "acme", &job("busy", &file(&busy)))
        .await;
    let failed = reports.final_of("busy").await;
    let data = &failed.json["data"];
    assert_eq!(
        (failed.kind(), &data["attempt"], failed.reason()),
        ("mail.failed", &json!(2), "attachment_unreachable")
    );
    for report in reports.of("busy") {
        assert_eq!(report.json["data"]["account"], "main");
    }
    assert_eq!((host.requests("/busy"), server.received_count()), (2, 0));
}

#[tokio::test]
async fn recipients_given_up_or_failed_before_rcpt_are_counted_as_refused() {
    let world = World::ready().await;
    let script = Script::new().recipient("tired", RcptRule::refuse("451 4.7.1 Greylisted, come back"));
    let server = SmtpServer::builder().script(script).start().await;
    account(&world, "acme", &server, &["--max-attempts", "1"]).await;
    let host = FileServer::start().await.unwrap();
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    let absent = json!([{"filename": "a.bin", "url": host.url("/absent")}]);
    let mut given_up = job("given-up", &json!([]));
    given_up["to"] = json!("tired@example.org");
    for job in [&job("absent", &absent), &given_up] {
        world.publish(Level::High, "acme", job).await;
    }
    for id in ["absent", "given-up"] {
        assert_eq!(reports.final_of(id).await.kind(), "mail.failed");
    }
    for (class, status, count) in [
        ("content", "refused", 1),
        ("policy", "refused", 1),
        ("policy", "deferred", 0),
    ] {
        let series = format!("postroom_recipients_total{{class=\"{class}\",status=\"{status}\"}}");
        assert_eq!(worker.count(&series).await, count, "{series}");
    }
}

/// A world whose large files go to this server.
async fn rewriting(s3: &S3Server, smtp: &SmtpServer) -> World {
    let mut world = World::new().await;
    for (name, value) in s3.env() {
        world.set(&name, value);
    }
    world.set("POSTROOM_STORAGE_URL", "s3://mail/files");
    world.set("POSTROOM_RETRY_BASE", "100ms");
    world.prepare().await;
    account(&world, "acme", smtp, &[]).await;
    let policy = [
        "tenant",
        "set",
        "acme",
        "--large-file-bytes",
        "100000",
        "--large-file-action",
        "rewrite",
    ];
    world.postroom(&policy).await.success();
    world
}

#[tokio::test]
#[expect(
    clippy::too_many_lines,
    reason = "one mail and everything that must be true of its links"
)]
async fn large_files_become_links_that_only_work_unchanged_and_a_retry_uploads_nothing_twice() {
    let s3 = S3Server::start("mail").await.unwrap();
    let busy = Script::new().first(1, Phase::FinalDot, Action::reply("451 4.3.0 busy"));
    let server = SmtpServer::builder().script(busy).start().await;
    let world = rewriting(&s3, &server).await;
    let host = FileServer::start().await.unwrap();
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    // One goes up at once, one in parts; the image stays where the HTML shows it, however large.
    let (image, small, large, huge) = (
        bytes(120_000, 5),
        bytes(100_000, 6),
        bytes(100_001, 7),
        bytes(9 << 20, 8),
    );
    let attachments = json!([
        {"filename": "logo.png", "inline": true, "content_id": "logo@acme", "base64": base64(&image)},
        {"filename": "small.bin", "base64": base64(&small)},
        {"filename": "Gro\u{df} & \"<b>\".bin", "base64": base64(&large)},
        {"filename": "huge.bin", "url": host.put("/huge", Answer::file(huge.clone()))},
    ]);
    world
        .publish(Level::High, "acme", &job("large", &attachments))
        .await;
    let sent = reports.final_of("large").await;
    assert_eq!(sent.kind(), "mail.sent", "{}", worker.logs());
    assert_eq!(sent.json["data"]["attempt"], 2);
    let linked = sent.json["data"]["links"].as_array().unwrap();
    assert_eq!(linked.len(), 2);
    assert_eq!(
        (&linked[0]["size"], &linked[1]["filename"]),
        (&json!(100_001), &json!("huge.bin"))
    );
    assert!(linked.iter().all(|link| link["expires_at"].is_string()));

    let mails = server.received();
    let message = parsed(&mails[0]);
    let names: Vec<_> = files(&message).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["logo.png", "small.bin"]);
    let (text, html) = (message.body_text(0).unwrap(), message.body_html(0).unwrap());
    let links = links(&text);
    assert_eq!(links.len(), 2, "{text}");
    for link in &links {
        assert!(html.contains(&link.replace('&', "&amp;")), "{html}");
    }
    assert!(
        html.contains("Gro\u{df} &amp; &quot;&lt;b&gt;&quot;.bin</a>") && html.ends_with("</body></html>"),
        "{html}"
    );
    let (disposition, content) = download(&links[0]).await;
    assert!(
        content == large && disposition.contains("filename*=UTF-8''Gro%C3%9F%20%26"),
        "{disposition}"
    );
    assert!(download(&links[1]).await.1 == huge);
    let tampered = [
        links[0].replace(
            "response-content-disposition=attachment",
            "response-content-disposition=inline",
        ),
        links[0].replace("X-Amz-Expires=604800", "X-Amz-Expires=604799"),
        links[0].split('?').next().unwrap().to_owned(),
    ];
    for link in tampered {
        assert!(link != links[0] && status(&link).await == 403, "{link}");
    }

    // One PUT for the file, two for the parts, although there were two attempts; and the next job needs none.
    assert_eq!(s3.requests("PUT"), 3);
    assert_eq!(s3.objects().len(), 2);
    world
        .publish(Level::Low, "acme", &job("same", &attachments))
        .await;
    assert_eq!(reports.final_of("same").await.kind(), "mail.sent");
    assert_eq!(s3.requests("PUT"), 3);
    assert_eq!(worker.count("postroom_uploads_total{result=\"stored\"}").await, 2);
    assert_eq!(
        worker.count("postroom_uploads_total{result=\"present\"}").await,
        4
    );
    let uploaded = worker.count("postroom_upload_bytes_total").await;
    assert_eq!(uploaded, (large.len() + huge.len()) as u64);
    assert!(
        !worker.logs().contains("X-Amz-Signature"),
        "links are for the reader only"
    );
}

#[tokio::test]
async fn while_the_object_store_fails_the_mail_waits_and_is_not_sent_with_the_file_in_it() {
    let s3 = S3Server::start("mail").await.unwrap();
    let server = SmtpServer::builder().start().await;
    let world = rewriting(&s3, &server).await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    s3.fail(true);
    world
        .publish(Level::High, "acme", &job("large", &large_file()))
        .await;
    reports.until(|all| !all.is_empty()).await;
    let deferred = &reports.all()[0];
    assert_eq!(
        (deferred.kind(), deferred.reason()),
        ("mail.deferred", "storage_unavailable")
    );
    // What needs no store is sent meanwhile.
    world
        .publish(Level::High, "acme", &job("plain", &json!([])))
        .await;
    assert_eq!(reports.final_of("plain").await.kind(), "mail.sent");
    assert_eq!(server.received_count(), 1);
    assert!(worker.count("postroom_uploads_total{result=\"failed\"}").await >= 1);
    s3.fail(false);
    let sent = reports.final_of("large").await;
    assert_eq!(
        (sent.kind(), sent.json["data"]["links"].as_array().unwrap().len()),
        ("mail.sent", 1)
    );
    let mails = server.received();
    assert!(files(&parsed(&mails[1])).is_empty());
}

#[tokio::test]
async fn attempts_that_fail_before_the_mail_use_nothing_of_the_limit() {
    let s3 = S3Server::start("mail").await.unwrap();
    let server = SmtpServer::builder().start().await;
    let world = rewriting(&s3, &server).await;
    account(&world, "acme", &server, &["--limit", "2/1h"]).await;
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    s3.fail(true);
    // Small enough to be admitted with its slot, and yet one that this tenant wants uploaded.
    world
        .publish(Level::High, "acme", &job("large", &large_file()))
        .await;
    eventually(Duration::from_secs(30), || async {
        worker.count("postroom_uploads_total{result=\"failed\"}").await >= 3
    })
    .await;
    s3.fail(false);
    assert_eq!(reports.final_of("large").await.kind(), "mail.sent");
    world
        .publish(Level::High, "acme", &job("plain", &json!([])))
        .await;
    assert_eq!(reports.final_of("plain").await.kind(), "mail.sent");
    assert_eq!(server.received_count(), 2);
}

#[tokio::test]
async fn the_tenants_policy_may_also_be_to_refuse_large_files_or_to_attach_them_all_the_same() {
    let mut world = World::new().await;
    let folder = world.dir().join("files");
    std::fs::create_dir(&folder).unwrap();
    world.set("POSTROOM_STORAGE_URL", format!("file://{}", folder.display()));
    world.set("POSTROOM_STORAGE_PUBLIC_URL", "https://files.example/mail/");
    world.prepare().await;
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    let mut reports = world.reports().await;
    let _worker = world.start_worker().await;
    let large = bytes(50_001, 10);
    let attachments = json!([{"filename": "Größe.pdf", "base64": base64(&large)}]);
    for action in ["reject", "warn", "rewrite"] {
        let tenant = format!("of-{action}");
        account(&world, &tenant, &server, &[]).await;
        let policy = [
            "tenant",
            "set",
            &tenant,
            "--large-file-bytes",
            "50000",
            "--large-file-action",
            action,
        ];
        world.postroom(&policy).await.success();
        let mut job = job(action, &attachments);
        job["tenant"] = json!(tenant);
        world.publish(Level::High, &tenant, &job).await;
    }

    let rejected = reports.final_of("reject").await;
    assert_eq!(
        (rejected.kind(), rejected.reason()),
        ("mail.failed", "attachment_too_large")
    );
    let warned = reports.final_of("warn").await;
    assert_eq!(
        (warned.kind(), &warned.json["data"]["links"]),
        ("mail.sent", &Value::Null)
    );
    // A folder that a web server gives out: the link is the public address, and does not expire.
    let rewritten = reports.final_of("rewrite").await;
    assert_eq!(
        rewritten.json["data"]["links"],
        json!([{"filename": "Größe.pdf", "size": 50_001}])
    );
    let mails = server.received();
    assert_eq!(mails.len(), 2);
    let (attached, linked): (Vec<_>, Vec<_>) =
        mails.iter().partition(|mail| !files(&parsed(mail)).is_empty());
    assert_eq!(
        files(&parsed(attached[0])),
        [("Größe.pdf".to_owned(), large.clone())]
    );
    let text = parsed(linked[0]).body_text(0).unwrap().into_owned();
    let path = links(&text)[0]
        .strip_prefix("https://files.example/mail/")
        .unwrap()
        .to_owned();
    assert!(std::fs::read(folder.join(path)).unwrap() == large);
}

#[tokio::test]
async fn a_tenants_file_is_not_fetched_from_networks_that_are_not_allowed() {
    let mut world = World::new().await;
    // The SMTP server is on the one address that is allowed.
    world.set("POSTROOM_EGRESS_ALLOW", "127.0.0.2/32");
    world.prepare().await;
    let server = SmtpServer::builder()
        .bind("127.0.0.2:0".parse().unwrap())
        .start()
        .await;
    account(&world, "acme", &server, &[]).await;
    let host = ["account", "set", "acme", "main", "--host", "127.0.0.2"];
    world.postroom(&host).await.success();
    let host = FileServer::start().await.unwrap();
    host.put("/secret", Answer::file("internal"));
    let mut reports = world.reports().await;
    let worker = world.start_worker().await;
    world
        .publish(Level::High, "acme", &job("plain", &json!([])))
        .await;
    assert_eq!(
        reports.final_of("plain").await.kind(),
        "mail.sent",
        "{}",
        worker.logs()
    );
    let url = host.url("/secret");
    for (id, url) in [
        ("literal", url.clone()),
        ("name", url.replace("127.0.0.1", "localhost")),
        ("mapped", url.replace("127.0.0.1", "[::ffff:127.0.0.1]")),
        ("decimal", url.replace("127.0.0.1", "2130706433")),
    ] {
        let attachments = json!([{"filename": "a.txt", "url": url}]);
        world.publish(Level::High, "acme", &job(id, &attachments)).await;
        let failed = reports.final_of(id).await;
        assert_eq!(
            (failed.kind(), failed.reason()),
            ("mail.failed", "egress_refused"),
            "{id}"
        );
    }
    assert_eq!(host.requests("/secret"), 0);
    assert!(worker.logs().contains("POSTROOM_EGRESS_ALLOW"));
    assert_eq!(server.wait_for(1, LIMIT).await.len(), 1);
}
