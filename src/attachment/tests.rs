//! Against a web server and an S3 server that checks signatures.

use std::time::Duration;

use jiff::Timestamp;
use postroom_testkit::files::{Answer, FileServer};
use postroom_testkit::proxy::Proxy;
use postroom_testkit::s3::S3Server;
use sha2::{Digest, Sha256};

use super::*;

const MIB: u64 = 1 << 20;

fn acme() -> TenantId {
    "acme".parse().unwrap()
}

fn loopback() -> Arc<EgressGuard> {
    Arc::new(EgressGuard::new(config::Egress {
        allow: vec!["127.0.0.0/8".parse().unwrap()],
    }))
}

fn limits() -> config::Fetch {
    config::Fetch {
        timeout: Duration::from_secs(10),
        ..config::Fetch::default()
    }
}

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new().unwrap())
}

fn without_store(limits: config::Fetch) -> Attachments {
    Attachments::new(limits, None, loopback(), metrics()).unwrap()
}

fn storage(url: &str) -> config::Storage {
    config::Storage {
        url: url.to_owned(),
        public_url: None,
        link_lifetime: Duration::from_hours(24),
    }
}

fn with_s3(server: &S3Server) -> Attachments {
    let store = Store::open_with(&storage("s3://files/mail"), server.env()).unwrap();
    Attachments::with_store(limits(), Some(store), loopback(), metrics()).unwrap()
}

fn by_url(filename: &str, url: &str) -> Attachment {
    Attachment {
        filename: filename.to_owned(),
        content_type: None,
        inline: false,
        content_id: None,
        sha256: None,
        source: Source::Url(url.parse().unwrap()),
    }
}

fn by_bytes(filename: &str, bytes: &[u8]) -> Attachment {
    Attachment {
        source: Source::Bytes(bytes.to_vec().into()),
        ..by_url(filename, "http://unused.example/")
    }
}

fn rewrite_above(threshold: u64) -> LargeFiles {
    LargeFiles {
        threshold: Some(threshold),
        action: LargeFileAction::Rewrite,
    }
}

async fn prepare(attachments: &Attachments, files: &[Attachment]) -> Result<Prepared, Failure> {
    attachments.prepare(&acme(), files, &LargeFiles::default()).await
}

async fn failure(attachments: &Attachments, file: Attachment) -> Failure {
    prepare(attachments, &[file]).await.unwrap_err()
}

/// What a reader's browser does.
async fn download(url: &str) -> reqwest::Response {
    egress::client().get(url).send().await.unwrap()
}

mod egress {
    pub(super) fn client() -> reqwest::Client {
        crate::egress::install_crypto_provider();
        reqwest::Client::builder()
            .no_proxy()
            .timeout(std::time::Duration::from_secs(10))
            .build()
            .unwrap()
    }
}

#[tokio::test]
async fn no_file_is_taken_from_a_host_whose_certificate_nobody_vouches_for() {
    let web = FileServer::start().await.unwrap();
    let clear = web.put("/a.txt", Answer::file("a"));
    let host: url::Url = clear.parse().unwrap();
    let tls = Proxy::start_tls(format!("127.0.0.1:{}", host.port().unwrap())).await;
    let attachments = without_store(limits());
    let file = by_url("a.txt", &format!("https://localhost:{}/a.txt", tls.port()));
    let failure = failure(&attachments, file).await;
    assert_eq!(failure.reason, "attachment_unreachable");
    assert!(
        failure.message.contains("cannot be connected to"),
        "{}",
        failure.message
    );
    assert_eq!(web.requests("/a.txt"), 0);
    prepare(&attachments, &[by_url("a.txt", &clear)]).await.unwrap();
    assert_eq!(web.requests("/a.txt"), 1);
}

#[tokio::test]
async fn files_come_from_the_job_and_from_the_web_in_the_order_of_the_job() {
    let web = FileServer::start().await.unwrap();
    let slow = web.put(
        "/slow.pdf",
        Answer::file("slow").after(Duration::from_millis(100)),
    );
    let unknown = web.put("/unknown", Answer::file(vec![7; 300_000]).declaring(None));
    let files = [
        by_url("slow.pdf", &slow),
        by_bytes("b.txt", b"b"),
        by_url("c", &unknown),
    ];
    let prepared = prepare(&without_store(limits()), &files).await.unwrap();
    let parts: Vec<_> = prepared
        .parts
        .iter()
        .map(|p| (p.filename.as_str(), p.content_type.as_str(), p.bytes.len()))
        .collect();
    assert_eq!(
        parts,
        [
            ("slow.pdf", "application/pdf", 4),
            ("b.txt", "text/plain", 1),
            ("c", "application/octet-stream", 300_000)
        ]
    );
}

#[tokio::test]
async fn a_digest_that_does_not_match_stays_wrong() {
    let web = FileServer::start().await.unwrap();
    let url = web.put("/a", Answer::file("tampered"));
    let right = Sha256::digest(b"original").into();
    for file in [by_url("a", &url), by_bytes("a", b"tampered")] {
        let failure = failure(
            &without_store(limits()),
            Attachment {
                sha256: Some(right),
                ..file
            },
        )
        .await;
        assert_eq!(failure.reason, "attachment_digest_mismatch");
        assert!(!failure.is_transient());
    }
}

#[tokio::test]
async fn names_of_attachments_are_not_logged() {
    let web = FileServer::start().await.unwrap();
    let attachments = without_store(config::Fetch {
        max_bytes: 10,
        memory: 15,
        ..limits()
    });
    let name = "Kuendigung_Mueller.pdf";
    let url = web.url("/Kuendigung_Mueller.pdf");
    let wrong = Attachment {
        sha256: Some([0; 32]),
        ..by_url(name, &url)
    };
    let file = || Answer::file("too short");
    for (answer, files, reason) in [
        (file().declaring(Some(11)), 1, "attachment_too_large"),
        (
            Answer::file("much too large").declaring(None),
            1,
            "attachment_too_large",
        ),
        (file(), 0, "attachment_digest_mismatch"),
        (file(), 2, "attachments_too_large"),
        (
            file().header("Content-Encoding", "br"),
            1,
            "attachment_unavailable",
        ),
        (Answer::status(404), 1, "attachment_unavailable"),
        (Answer::status(503), 1, "attachment_unreachable"),
    ] {
        web.put("/Kuendigung_Mueller.pdf", answer);
        let mut files = vec![by_url(name, &url); files];
        if files.is_empty() {
            files.push(wrong.clone());
        }
        let failure = prepare(&attachments, &files).await.unwrap_err();
        let logged = failure.for_log();
        assert_eq!(failure.reason, reason);
        assert!(
            logged.starts_with(reason) && !logged.contains("Mueller"),
            "{logged}"
        );
    }
}

#[tokio::test]
async fn a_file_with_a_digest_is_fetched_once_per_tenant() {
    let web = FileServer::start().await.unwrap();
    let url = web.put("/a", Answer::file("content"));
    let attachments = without_store(limits());
    let known = Attachment {
        sha256: Some(Sha256::digest(b"content").into()),
        ..by_url("a", &url)
    };
    for _ in 0..3 {
        let prepared = prepare(&attachments, std::slice::from_ref(&known)).await.unwrap();
        assert_eq!(&prepared.parts[0].bytes[..], b"content");
    }
    assert_eq!(web.requests("/a"), 1);
    attachments
        .prepare(&"other".parse().unwrap(), &[known], &LargeFiles::default())
        .await
        .unwrap();
    assert_eq!(web.requests("/a"), 2);
}

#[tokio::test]
async fn wrong_content_under_a_digest_is_not_remembered() {
    let web = FileServer::start().await.unwrap();
    let (wrong, right) = (
        web.put("/wrong", Answer::file("poison")),
        web.put("/right", Answer::file("content")),
    );
    let attachments = without_store(limits());
    let with = |url: &str| Attachment {
        sha256: Some(Sha256::digest(b"content").into()),
        ..by_url("a", url)
    };
    let refused = failure(&attachments, with(&wrong)).await;
    assert_eq!(refused.reason, "attachment_digest_mismatch");
    let prepared = prepare(&attachments, &[with(&right)]).await.unwrap();
    assert_eq!(&prepared.parts[0].bytes[..], b"content");
    // Without a digest nothing is remembered: the same URL may give each tenant something else.
    for _ in 0..2 {
        prepare(&attachments, &[by_url("a", &wrong)]).await.unwrap();
    }
    assert_eq!(web.requests("/wrong"), 3);
}

#[tokio::test]
async fn the_same_file_of_two_tenants_is_two_objects() {
    let server = S3Server::start("files").await.unwrap();
    let attachments = with_s3(&server);
    let large = [by_bytes("big.bin", &[7; 5000])];
    for tenant in ["a", "a-b", "ab"] {
        let tenant = tenant.parse().unwrap();
        attachments
            .prepare(&tenant, &large, &rewrite_above(1000))
            .await
            .unwrap();
    }
    let keys: Vec<String> = server.objects().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys.len(), 3, "{keys:?}");
    for tenant in ["a", "a-b", "ab"] {
        let own = keys
            .iter()
            .filter(|key| key.split('/').any(|part| part == tenant));
        assert_eq!(own.count(), 1, "{keys:?}");
    }
}

#[tokio::test]
async fn answers_that_may_change_are_transient_and_others_stay() {
    let web = FileServer::start().await.unwrap();
    let attachments = without_store(limits());
    for (status, transient) in [
        (500, true),
        (503, true),
        (429, true),
        (408, true),
        (400, false),
        (401, false),
        (403, false),
        (404, false),
        (410, false),
        (204, false),
    ] {
        let url = web.put("/a", Answer::status(status).header("Retry-After", "30"));
        let failure = failure(&attachments, by_url("a", &url)).await;
        assert_eq!(failure.is_transient(), transient, "{status}");
        assert_eq!(
            failure.retry_after,
            transient.then(|| Duration::from_secs(30)),
            "{status}"
        );
        assert!(
            failure.message.contains("127.0.0.1") && !failure.message.contains("/a"),
            "{failure}"
        );
    }
}

#[tokio::test]
async fn a_file_that_fails_for_a_while_comes_in_the_end() {
    let web = FileServer::start().await.unwrap();
    let url = web.put("/a", Answer::file("here").failing(1));
    let attachments = without_store(limits());
    assert!(failure(&attachments, by_url("a", &url)).await.is_transient());
    assert_eq!(
        &prepare(&attachments, &[by_url("a", &url)]).await.unwrap().parts[0].bytes[..],
        b"here"
    );
}

#[tokio::test]
async fn nobody_listening_and_broken_answers_are_transient() {
    let web = FileServer::start().await.unwrap();
    let broken = web.put("/short", Answer::file("short").declaring(Some(100)));
    let attachments = without_store(config::Fetch {
        timeout: Duration::from_millis(300),
        ..limits()
    });
    let slow = web.put("/slow", Answer::file("x").after(Duration::from_mins(1)));
    // A port that was free a moment ago.
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    for url in [broken, slow, format!("http://{closed}/")] {
        let failure = failure(&attachments, by_url("a", &url)).await;
        assert!(failure.is_transient(), "{url}: {failure}");
        assert_eq!(failure.fault, Fault::Sender);
    }
}

#[tokio::test]
async fn a_file_above_the_limit_is_refused_whatever_its_server_says() {
    let web = FileServer::start().await.unwrap();
    let attachments = without_store(config::Fetch {
        max_bytes: 1000,
        ..limits()
    });
    for declared in [Some(1001), None, Some(u64::MAX / 4)] {
        let url = web.put("/a", Answer::file(vec![0; 1001]).declaring(declared));
        let failure = failure(&attachments, by_url("a", &url)).await;
        assert_eq!(failure.reason, "attachment_too_large", "{declared:?}");
        assert!(!failure.is_transient());
    }
    let exact = web.put("/a", Answer::file(vec![0; 1000]).declaring(None));
    assert!(prepare(&attachments, &[by_url("a", &exact)]).await.is_ok());
}

fn gzip(content: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test]
async fn a_file_that_its_server_compresses_anyway_arrives_as_it_was_meant() {
    let web = FileServer::start().await.unwrap();
    // Compressed to a thousandth, to about itself, and of two parts.
    let flat = vec![b'0'; 3 * MIB as usize];
    let noise: Vec<u8> = (0..200_000_u64)
        .map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 29) as u8)
        .collect();
    let twice = [gzip(b"one,"), gzip(b"two")].concat();
    for (content, packed) in [
        (flat.clone(), gzip(&flat)),
        (noise.clone(), gzip(&noise)),
        (b"one,two".to_vec(), twice),
        (Vec::new(), Vec::new()),
    ] {
        for declared in [Some(packed.len() as u64), None] {
            let answer = Answer::file(packed.clone()).header("Content-Encoding", "gzip");
            let file = Attachment {
                sha256: Some(Sha256::digest(&content).into()),
                ..by_url("report.csv", &web.put("/a", answer.declaring(declared)))
            };
            let prepared = prepare(&without_store(limits()), &[file]).await.unwrap();
            assert!(prepared.parts[0].bytes == content, "{declared:?}");
            assert_eq!(prepared.parts[0].held_bytes(), content.len() as u64);
        }
    }
    let compressed = |packed: Vec<u8>| Answer::file(packed).header("Content-Encoding", "gzip");
    let itself = by_url("a.tar.gz", &web.put("/a", compressed(gzip(b"tar"))));
    let prepared = prepare(&without_store(limits()), &[itself]).await.unwrap();
    assert_eq!(prepared.parts[0].bytes, gzip(b"tar"));
}

#[tokio::test]
async fn compressed_files_that_are_too_large_broken_or_in_another_coding_are_refused() {
    let web = FileServer::start().await.unwrap();
    let attachments = without_store(config::Fetch {
        max_bytes: 64 << 10,
        ..limits()
    });
    let answer = |packed: Vec<u8>, coding| Answer::file(packed).header("Content-Encoding", coding);
    let bomb = gzip(&vec![0; 2 * MIB as usize]);
    let nothing = gzip(b"").repeat(10_000);
    let cut = gzip(b"content")[..20].to_vec();
    for (answer, reason, transient) in [
        (answer(bomb, "gzip"), "attachment_too_large", false),
        (answer(nothing, "gzip"), "attachment_too_large", false),
        (
            answer(b"plain text, really".to_vec(), "gzip"),
            "attachment_unavailable",
            false,
        ),
        (answer(cut, "gzip"), "attachment_unreachable", true),
        (answer(b"packed".to_vec(), "br"), "attachment_unavailable", false),
        (
            answer(gzip(&gzip(b"a")), "gzip, gzip"),
            "attachment_unavailable",
            false,
        ),
    ] {
        let failure = failure(&attachments, by_url("a", &web.put("/a", answer))).await;
        assert_eq!(
            (failure.reason, failure.is_transient()),
            (reason, transient),
            "{failure}"
        );
    }
}

#[tokio::test]
async fn redirects_are_followed_three_times_and_checked_each_time() {
    let web = FileServer::start().await.unwrap();
    web.put("/3", Answer::file("end"));
    web.put("/2", Answer::redirect("3"));
    web.put("/1", Answer::redirect("/2"));
    let start = web.put("/0", Answer::redirect(&web.url("/1")));
    let longer = web.put("/-1", Answer::redirect("/0"));
    let attachments = without_store(limits());
    assert_eq!(
        &prepare(&attachments, &[by_url("a", &start)]).await.unwrap().parts[0].bytes[..],
        b"end"
    );
    assert_eq!(
        failure(&attachments, by_url("a", &longer)).await.reason,
        "attachment_unavailable"
    );

    for target in [
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]:1/",
        "http://[::ffff:10.0.0.1]/",
        "file:///etc/passwd",
    ] {
        let url = web.put("/r", Answer::redirect(target));
        let failure = failure(&attachments, by_url("a", &url)).await;
        assert_eq!(failure.reason, "egress_refused", "{target}");
        assert!(!failure.is_transient());
    }
}

#[tokio::test]
async fn inner_hosts_are_refused_by_default() {
    let web = FileServer::start().await.unwrap();
    let url = web.put("/a", Answer::file("secret"));
    let named = url.replace("127.0.0.1", "localhost");
    let guard = Arc::new(EgressGuard::default());
    let attachments = Attachments::new(limits(), None, guard, metrics()).unwrap();
    for url in [&url, &named, "http://169.254.169.254/"] {
        let failure = failure(&attachments, by_url("a", url)).await;
        assert_eq!(failure.reason, "egress_refused", "{url}");
        assert!(failure.message.contains("POSTROOM_EGRESS_ALLOW"), "{failure}");
    }
    assert_eq!(web.requests("/a"), 0);
}

#[tokio::test]
async fn a_file_host_that_hangs_holds_up_only_its_own_tenant() {
    let web = FileServer::start().await.unwrap();
    let hanging = web.put("/hanging", Answer::file("x").after(Duration::from_mins(1)));
    let there = web.put("/there", Answer::file("there"));
    let attachments = without_store(config::Fetch {
        concurrency: 4,
        ..limits()
    });
    let files = vec![by_url("a", &hanging); 10];
    let other: TenantId = "other".parse().unwrap();
    tokio::select! {
        result = prepare(&attachments, &files) => panic!("{result:?}"),
        result = async {
            while web.requests("/hanging") < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let file = [by_url("b", &there)];
            attachments.prepare(&other, &file, &LargeFiles::default()).await
        } => assert_eq!(&result.unwrap().parts[0].bytes[..], b"there"),
    }
    assert_eq!(web.requests("/hanging"), 2);
}

#[tokio::test]
async fn the_first_file_that_fails_ends_the_fetching_of_a_mail() {
    let web = FileServer::start().await.unwrap();
    let hanging = web.put("/hanging", Answer::file("x").after(Duration::from_mins(1)));
    let files = [by_url("a", &hanging), by_url("b", &web.url("/missing"))];
    let attachments = without_store(config::Fetch {
        timeout: Duration::from_mins(1),
        ..limits()
    });
    let fetching = prepare(&attachments, &files);
    let ended = tokio::time::timeout(Duration::from_secs(20), fetching).await;
    assert_eq!(ended.unwrap().unwrap_err().reason, "attachment_unavailable");
}

#[tokio::test]
async fn all_files_of_a_mail_together_have_a_time_limit() {
    let web = FileServer::start().await.unwrap();
    let mut attachments = without_store(config::Fetch {
        concurrency: 1,
        ..limits()
    });
    attachments.together = Duration::from_millis(500);
    let slow = web.put("/slow", Answer::file("x").after(Duration::from_millis(200)));
    let failure = prepare(&attachments, &vec![by_url("a", &slow); 10]).await;
    let failure = failure.unwrap_err();
    assert_eq!(
        (failure.reason, failure.is_transient()),
        ("attachment_unreachable", true)
    );
    assert!(web.requests("/slow") < 10);
}

#[tokio::test]
async fn the_memory_bound_holds_for_all_jobs_together() {
    let web = FileServer::start().await.unwrap();
    let url = web.put("/mib", Answer::file(vec![1; MIB as usize]));
    let metrics = metrics();
    let limits = config::Fetch {
        memory: 2 * MIB,
        timeout: Duration::from_secs(2),
        ..limits()
    };
    let attachments = Attachments::new(limits, None, loopback(), Arc::clone(&metrics)).unwrap();

    let files = [by_url("a", &url), by_url("b", &url)];
    let first = prepare(&attachments, &files).await.unwrap();
    assert_eq!(metrics.attachment_bytes.get(), 2 * MIB as i64);
    assert_eq!(first.parts[0].held_bytes(), MIB);

    let waiting = failure(&attachments, by_url("c", &url)).await;
    assert_eq!(
        (waiting.reason, waiting.is_transient()),
        ("attachment_memory", true)
    );
    drop(first);
    assert_eq!(metrics.attachment_bytes.get(), 0);
    assert!(prepare(&attachments, &[by_url("c", &url)]).await.is_ok());

    let three = [by_url("a", &url), by_url("b", &url), by_url("c", &url)];
    let never = prepare(&attachments, &three).await.unwrap_err();
    assert_eq!(
        (never.reason, never.is_transient()),
        ("attachments_too_large", false)
    );
    assert_eq!(metrics.attachment_bytes.get(), 0);
}

/// Takes its turn and prepares it, as the pipeline does; `None` if its turn does not come.
async fn in_turn(attachments: &Attachments, files: &[Attachment]) -> Option<Result<Prepared, Failure>> {
    let _turn = attachments.turn(&acme(), files).await?;
    Some(prepare(attachments, files).await)
}

#[tokio::test]
async fn mails_of_one_tenant_get_their_files_one_after_another_and_not_all_too_late() {
    let web = FileServer::start().await.unwrap();
    let mut attachments = without_store(config::Fetch {
        concurrency: 2,
        ..limits()
    });
    // Enough for the files of one mail, and not for those of all.
    attachments.together = Duration::from_secs(4);
    attachments.line = Duration::from_mins(1);
    let slow = web.put("/slow", Answer::file("x").after(Duration::from_millis(100)));
    let files = vec![by_url("a", &slow); 8];
    let mails = (0..8).map(|_| in_turn(&attachments, &files));
    for prepared in futures_util::future::join_all(mails).await {
        assert_eq!(prepared.unwrap().unwrap().parts.len(), 8);
    }
}

#[tokio::test]
async fn who_stands_in_line_in_vain_has_asked_for_nothing() {
    let web = FileServer::start().await.unwrap();
    let mut attachments = without_store(config::Fetch {
        concurrency: 2,
        ..limits()
    });
    attachments.line = Duration::from_millis(50);
    let there = web.put("/there", Answer::file("there"));
    let files = [by_url("a", &there)];
    let first = attachments.turn(&acme(), &files).await.unwrap();
    assert!(in_turn(&attachments, &files).await.is_none());
    assert_eq!(web.requests("/there"), 0);
    assert!(attachments.turn(&acme(), &[]).await.is_some(), "nothing to fetch");
    let other: TenantId = "other".parse().unwrap();
    assert!(attachments.turn(&other, &files).await.is_some());
    drop(first);
    assert!(in_turn(&attachments, &files).await.is_some());
}

#[tokio::test]
async fn files_of_unknown_length_count_with_their_real_size() {
    let web = FileServer::start().await.unwrap();
    let metrics = metrics();
    let limits = config::Fetch {
        memory: 4 * MIB,
        timeout: Duration::from_secs(4),
        ..limits()
    };
    let attachments = Attachments::new(limits, None, loopback(), Arc::clone(&metrics)).unwrap();
    let size = 550 << 10;
    let file = Answer::file(vec![1; size]).declaring(None);
    let files: Vec<_> = (0..7)
        .map(|n| by_url("a", &web.put(&format!("/{n}"), file.clone())))
        .collect();
    let prepared = prepare(&attachments, &files).await.unwrap();
    assert!(prepared.parts.iter().all(|part| part.held_bytes() == size as u64));
    assert_eq!(metrics.attachment_bytes.get(), 7 * size as i64);
    drop(prepared);
    assert_eq!(metrics.attachment_bytes.get(), 0);

    let more = [files.as_slice(), &files[..1]].concat();
    let never = prepare(&attachments, &more).await.unwrap_err();
    assert_eq!(never.reason, "attachments_too_large");
    assert_eq!(metrics.attachment_bytes.get(), 0);
}

#[tokio::test]
async fn a_cached_file_of_unknown_length_takes_no_more_memory_than_its_size() {
    let web = FileServer::start().await.unwrap();
    let attachments = without_store(limits());
    let known = Attachment {
        sha256: Some(Sha256::digest(b"content").into()),
        ..by_url("a", &web.put("/a", Answer::file("content").declaring(None)))
    };
    let mut prepared = prepare(&attachments, &[known]).await.unwrap();
    let bytes = prepared.parts.remove(0).bytes;
    // The same memory as that in the cache, which is gone with the last that knows it.
    drop((prepared, attachments));
    assert_eq!(bytes.try_into_mut().unwrap().capacity(), "content".len());
}

#[tokio::test]
async fn large_files_follow_the_policy_and_inline_images_never_leave_the_mail() {
    let attachments = without_store(limits());
    let large = by_bytes("large.bin", &[0; 2000]);
    let policy = |action| LargeFiles {
        threshold: Some(1999),
        action,
    };
    let run = async |file: &Attachment, action| {
        attachments
            .prepare(&acme(), std::slice::from_ref(file), &policy(action))
            .await
    };

    let warned = run(&large, LargeFileAction::Warn).await.unwrap();
    assert_eq!((warned.parts.len(), warned.warnings.len()), (1, 1));
    assert_eq!(
        run(&large, LargeFileAction::Reject).await.unwrap_err().reason,
        "attachment_too_large"
    );
    let unset = run(&large, LargeFileAction::Rewrite).await.unwrap_err();
    assert_eq!(
        (unset.reason, unset.class, unset.is_transient()),
        ("storage_not_configured", Class::Local, false)
    );

    let inline = Attachment {
        inline: true,
        content_id: Some("x".to_owned()),
        ..large
    };
    for action in [
        LargeFileAction::Warn,
        LargeFileAction::Reject,
        LargeFileAction::Rewrite,
    ] {
        let prepared = run(&inline, action).await.unwrap();
        assert_eq!(
            (
                prepared.parts.len(),
                prepared.links.len(),
                prepared.warnings.len()
            ),
            (1, 0, 0)
        );
    }
}

#[tokio::test]
async fn a_large_file_becomes_a_link_that_downloads_it_under_its_name() {
    let s3 = S3Server::start("files").await.unwrap();
    let attachments = with_s3(&s3);
    attachments.check().await.unwrap();
    let files = [
        by_bytes("Übersicht 2026.pdf", &[7; 2000]),
        by_bytes("small.txt", b"small"),
    ];
    let prepared = attachments
        .prepare(&acme(), &files, &rewrite_above(1000))
        .await
        .unwrap();
    assert_eq!((prepared.parts.len(), prepared.links.len()), (1, 1));
    let link = &prepared.links[0];
    assert_eq!((link.filename.as_str(), link.size), ("Übersicht 2026.pdf", 2000));
    let left = link
        .expires_at
        .unwrap()
        .duration_since(Timestamp::now())
        .as_hours();
    assert!((23..=24).contains(&left), "{left}");

    let response = download(&link.url).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/pdf");
    let disposition = response.headers()["content-disposition"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(
        disposition.contains("filename*=UTF-8''%C3%9Cbersicht%202026.pdf"),
        "{disposition}"
    );
    assert_eq!(response.bytes().await.unwrap(), vec![7; 2000]);

    let (base, query) = link.url.split_once('?').unwrap();
    assert!(base.contains("/files/mail/acme/"), "{base}");
    assert_eq!(download(base).await.status(), 403);
    assert_eq!(download(&format!("{base}x?{query}")).await.status(), 403);
    assert_eq!(
        download(&link.url.replace("X-Amz-Expires=86400", "X-Amz-Expires=99999"))
            .await
            .status(),
        403
    );
}

#[tokio::test]
async fn large_files_that_become_links_need_memory_one_at_a_time() {
    let (s3, web) = (S3Server::start("files").await.unwrap(), FileServer::start().await);
    let web = web.unwrap();
    let limits = config::Fetch {
        memory: 2 * MIB,
        ..limits()
    };
    let store = Store::open_with(&storage("s3://files/mail"), s3.env()).unwrap();
    let attachments = Attachments::with_store(limits, Some(store), loopback(), metrics()).unwrap();
    let large = |name: &str, length: Option<u64>| {
        let content = vec![name.as_bytes()[0]; 3 * MIB as usize / 2];
        by_url(
            name,
            &web.put(&format!("/{name}"), Answer::file(content).declaring(length)),
        )
    };
    let known = Some(3 * MIB / 2);
    let files = [
        large("a", known),
        by_bytes("small.txt", b"small"),
        large("b", None),
        large("c", known),
    ];
    let prepared = attachments
        .prepare(&acme(), &files, &rewrite_above(1000))
        .await
        .unwrap();
    let names: Vec<_> = prepared.links.iter().map(|link| &link.filename[..]).collect();
    assert_eq!((names, prepared.parts.len()), (vec!["a", "b", "c"], 1));
}

#[tokio::test]
async fn a_retry_uploads_nothing_twice() {
    let s3 = S3Server::start("files").await.unwrap();
    let attachments = with_s3(&s3);
    let file = [by_bytes("a.bin", &[1; 3000])];
    for _ in 0..3 {
        attachments
            .prepare(&acme(), &file, &rewrite_above(1000))
            .await
            .unwrap();
    }
    assert_eq!(s3.requests("PUT"), 1);
    // Another tenant's file is another object, though its content is the same.
    attachments
        .prepare(&"other".parse().unwrap(), &file, &rewrite_above(1000))
        .await
        .unwrap();
    assert_eq!(s3.requests("PUT"), 2);
    let uploads = |label| attachments.metrics.uploads.with_label_values(&[label]).get();
    assert_eq!((uploads("stored"), uploads("present")), (2, 2));
    assert_eq!(attachments.metrics.upload_bytes.get(), 6000);
}

#[tokio::test]
async fn an_object_uploaded_long_ago_is_written_again_so_that_a_new_link_outlives_the_lifecycle_rule() {
    let s3 = S3Server::start("files").await.unwrap();
    let attachments = with_s3(&s3);
    let (small, in_parts) = (vec![1; 3000], vec![1; 9 * MIB as usize]);
    for (content, puts) in [(small, 1), (in_parts, 2)] {
        let file = [by_bytes("a.bin", &content)];
        let before = s3.requests("PUT");
        // Uploaded; there; too old, after which it counts as written today.
        for (age, uploads) in [(0, 1), (20, 1), (30, 2), (0, 2)] {
            s3.age(Duration::from_hours(age)).unwrap();
            attachments
                .prepare(&acme(), &file, &rewrite_above(1000))
                .await
                .unwrap();
            assert_eq!(s3.requests("PUT") - before, uploads * puts, "{age} hours");
        }
    }
}

#[tokio::test]
async fn a_store_that_refuses_conditional_puts_gets_the_file_all_the_same() {
    let s3 = S3Server::start("files").await.unwrap();
    s3.refuse_conditions();
    let attachments = with_s3(&s3);
    let file = [by_bytes("a.bin", &[1; 3000])];
    let prepared = attachments
        .prepare(&acme(), &file, &rewrite_above(1000))
        .await
        .unwrap();
    let response = download(&prepared.links[0].url).await;
    assert_eq!(response.bytes().await.unwrap(), vec![1; 3000]);
    assert_eq!(s3.requests("PUT"), 1);
}

#[tokio::test]
async fn a_very_large_file_goes_up_in_parts() {
    let s3 = S3Server::start("files").await.unwrap();
    let attachments = with_s3(&s3);
    let content: Vec<u8> = (0..9 * MIB).map(|n| (n % 251) as u8).collect();
    let file = [by_bytes("a.bin", &content)];
    let prepared = attachments
        .prepare(&acme(), &file, &rewrite_above(1000))
        .await
        .unwrap();
    assert_eq!(s3.requests("PUT"), 2);
    let response = download(&prepared.links[0].url).await;
    assert!(response.bytes().await.unwrap() == content);
    attachments
        .prepare(&acme(), &file, &rewrite_above(1000))
        .await
        .unwrap();
    assert_eq!(s3.requests("PUT"), 2);
}

#[tokio::test]
async fn trouble_with_the_store_is_ours_and_passes() {
    let s3 = S3Server::start("files").await.unwrap();
    let attachments = with_s3(&s3);
    let file = [by_bytes("a.bin", &[1; 3000])];
    s3.fail(true);
    let failure = attachments
        .prepare(&acme(), &file, &rewrite_above(1000))
        .await
        .unwrap_err();
    assert_eq!(
        (failure.reason, failure.class, failure.fault),
        ("storage_unavailable", Class::Local, Fault::Us)
    );
    assert!(failure.is_transient());
    assert!(attachments.check().await.is_err());
    s3.fail(false);
    assert_eq!(
        attachments
            .prepare(&acme(), &file, &rewrite_above(1000))
            .await
            .unwrap()
            .links
            .len(),
        1
    );
}

#[tokio::test]
async fn a_wrong_key_is_refused_and_not_shown() {
    let s3 = S3Server::start("files").await.unwrap();
    let mut env = s3.env();
    env[1].1 = "wrong-secret".to_owned();
    let store = Store::open_with(&storage("s3://files"), env).unwrap();
    let text = store.check().await.unwrap_err().to_string();
    assert!(!text.contains("wrong-secret"), "{text}");
}

#[tokio::test]
async fn a_public_link_of_a_bucket_with_a_prefix_leads_to_the_object() {
    for base in ["https://files.example.com", "https://example.com/files/"] {
        let s3 = S3Server::start("files").await.unwrap();
        let config = config::Storage {
            public_url: Some(base.to_owned()),
            ..storage("s3://files/mail/out")
        };
        let store = Store::open_with(&config, s3.env()).unwrap();
        let attachments = Attachments::with_store(limits(), Some(store), loopback(), metrics()).unwrap();
        let file = [by_bytes("a.bin", &[1; 3000])];
        let prepared = attachments
            .prepare(&acme(), &file, &rewrite_above(1000))
            .await
            .unwrap();
        let path = prepared.links[0].url.strip_prefix(base.trim_end_matches('/'));
        let key = path.unwrap().strip_prefix('/').unwrap().to_owned();
        assert!(key.starts_with("mail/out/acme/"), "{key}");
        assert!(s3.objects().contains(&(key, 3000)), "{:?}", s3.objects());
    }
}

#[tokio::test]
async fn a_folder_gives_links_below_its_public_address() {
    let folder = std::env::temp_dir().join(format!("postroom-{}", uuid::Uuid::new_v4()));
    let url = url::Url::from_directory_path(&folder).unwrap();
    let config = config::Storage {
        public_url: Some("https://files.example/mail/".to_owned()),
        ..storage(url.as_str())
    };
    let attachments = Attachments::new(limits(), Some(&config), loopback(), metrics()).unwrap();
    attachments.check().await.unwrap();
    for _ in 0..2 {
        let file = [by_bytes("Größe.pdf", &[1; 3000])];
        let prepared = attachments
            .prepare(&acme(), &file, &rewrite_above(1000))
            .await
            .unwrap();
        let link = &prepared.links[0];
        let key = link.url.strip_prefix("https://files.example/mail/").unwrap();
        assert!(key.starts_with("acme/") && key.ends_with("/Gr__e.pdf"), "{key}");
        assert_eq!(std::fs::read(folder.join(key)).unwrap(), [1; 3000]);
        assert_eq!(link.expires_at, None);
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn storage_settings_that_cannot_work_say_what_to_do() {
    for (url, public, part) in [
        ("nonsense", None, "POSTROOM_STORAGE_URL"),
        ("ftp://x/y", None, "`ftp:`"),
        ("s3:///prefix", None, "POSTROOM_STORAGE_URL"),
        ("file:///tmp/x", None, "POSTROOM_STORAGE_PUBLIC_URL"),
        ("file:///tmp/x", Some("ftp://x"), "POSTROOM_STORAGE_PUBLIC_URL"),
    ] {
        let config = config::Storage {
            public_url: public.map(str::to_owned),
            ..storage(url)
        };
        let error = Store::open_with(&config, []).unwrap_err();
        assert!(error.to_string().contains(part), "{url}: {error}");
    }
}

#[test]
fn links_signed_with_temporary_credentials_are_known_to_die_early() {
    let region = ("AWS_REGION", "eu-central-1");
    let key = ("AWS_ACCESS_KEY_ID", "key");
    let secret = ("AWS_SECRET_ACCESS_KEY", "secret");
    let token = ("AWS_SESSION_TOKEN", "token");
    let role = ("AWS_ROLE_ARN", "arn:aws:iam::1:role/mail");
    let file = ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token");
    let public = Some("https://files.example");
    let cases = [
        (vec![region, key, secret], None, false),
        (vec![region, key, secret, token], None, true),
        (vec![region, role, file], None, true),
        (vec![region], None, true),
        (vec![region, key, secret, token], public, false),
        (vec![region], public, false),
    ];
    for (variables, public_url, early) in cases {
        let config = config::Storage {
            public_url: public_url.map(str::to_owned),
            ..storage("s3://files/mail")
        };
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let store = Store::open_with(&config, variables).unwrap();
        assert_eq!(store.links_die_early(), early, "{config:?}");
    }
}

#[tokio::test]
async fn a_redirect_to_a_name_that_has_turned_inside_is_refused() {
    use crate::egress::rebinding::{INSIDE, OUTSIDE, Sites, guard};
    let answer = "HTTP/1.1 302 Found\r\nlocation: /again\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let sites = Sites::start(answer).await;
    let guard = guard(&[&[OUTSIDE], &[OUTSIDE], &[INSIDE]]);
    let attachments = Attachments::with_store(limits(), None, guard, metrics()).unwrap();
    let url = format!("http://rebind.example:{}/", sites.port);
    let failure = failure(&attachments, by_url("a", &url)).await;
    assert_eq!(failure.reason, "egress_refused", "{failure}");
    assert_eq!(sites.visits(), (2, 0));
}
