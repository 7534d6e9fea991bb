//! Producers as they really are, in Python: pika, aio-pika and kombu, each declaring the exchange itself or not.
//!
//! Their libraries go into a virtual environment below `target/`, made once per set of versions. It needs `python3` with
//! its `venv` module (Debian: `apt-get install python3 python3-venv`) and an index that `pip` can reach.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mail_parser::MessageParser;
use postroom_testkit::smtp::SmtpServer;
use sha2::{Digest as _, Sha256};
use tokio::process::Command;

use crate::sends::account;
use crate::support::{World, eventually};

const LIMIT: Duration = Duration::from_mins(1);
/// Download and installation, on a slow line.
const INSTALL_LIMIT: Duration = Duration::from_mins(4);

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python")
}

async fn run(limit: Duration, command: &mut Command) {
    let shown = command.as_std().get_program().to_string_lossy().into_owned();
    let output = tokio::time::timeout(limit, command.kill_on_drop(true).output())
        .await
        .unwrap_or_else(|_| panic!("{shown} does not end"))
        .unwrap_or_else(|error| panic!("{shown}: {error}; install python3 and python3-venv"));
    assert!(
        output.status.success(),
        "{shown} failed (is python3-venv installed?):\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The interpreter of the environment. Tests of other processes may want it at the same time: one makes it.
async fn python() -> PathBuf {
    let requirements = scripts().join("requirements.txt");
    let digest = Sha256::digest(std::fs::read(&requirements).unwrap());
    let name = format!(
        "python-{:02x}{:02x}{:02x}{:02x}",
        digest[0], digest[1], digest[2], digest[3]
    );
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let lock = File::create(folder.with_extension("lock")).unwrap();
    let lock = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock))
        .await
        .unwrap()
        .unwrap();
    let python = folder.join("bin/python");
    let complete = folder.join("complete");
    if !complete.exists() {
        run(
            INSTALL_LIMIT,
            Command::new("python3")
                .args(["-m", "venv", "--clear"])
                .arg(&folder),
        )
        .await;
        let mut install = Command::new(&python);
        install
            .args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-input",
                "-r",
            ])
            .arg(&requirements);
        run(INSTALL_LIMIT, &mut install).await;
        File::create(&complete).unwrap();
    }
    drop(lock);
    python
}

/// Runs a script that publishes jobs with these names.
async fn produce(world: &World, python: &Path, script: &str, variables: &[(&str, &str)], names: &[&str]) {
    let mut command = Command::new(python);
    command
        .arg(scripts().join(script))
        .args(names)
        .env("AMQP_URL", world.amqp_url())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .envs(variables.iter().copied());
    run(LIMIT, &mut command).await;
}

const DECLARES: (&str, &str) = ("DECLARES", "yes");

/// A script, its variables, and what its jobs are called.
type Run = (&'static str, Vec<(&'static str, &'static str)>, &'static str);

#[tokio::test]
async fn mail_of_pika_aio_pika_and_kombu_is_sent() {
    let python = python().await;
    let world = World::new().await;
    world.postroom(&["migrate"]).await.success();
    let server = SmtpServer::builder().start().await;
    account(&world, "acme", &server, &[]).await;
    // These come before any worker: they declare the exchange, and nothing of it is in our way later. A message without a
    // queue is returned to them, so they only declare.
    for script in ["with_pika.py", "with_aio_pika.py"] {
        produce(&world, &python, script, &[DECLARES], &[]).await;
    }
    let worker = world.start_worker().await;
    let mut reports = world.reports().await;
    let compressed = |name| ("COMPRESSION", name);
    let runs: [Run; 10] = [
        ("with_pika.py", vec![], "pika"),
        ("with_pika.py", vec![DECLARES], "pika-declares"),
        ("with_aio_pika.py", vec![], "aio-pika"),
        ("with_aio_pika.py", vec![DECLARES], "aio-pika-declares"),
        ("with_kombu.py", vec![], "kombu"),
        ("with_kombu.py", vec![DECLARES], "kombu-declares"),
        ("with_kombu.py", vec![compressed("gzip")], "kombu-gzip"),
        (
            "with_kombu.py",
            vec![DECLARES, compressed("gzip")],
            "kombu-gzip-declares",
        ),
        ("with_kombu.py", vec![compressed("zlib")], "kombu-zlib"),
        (
            "with_kombu.py",
            vec![DECLARES, compressed("zlib")],
            "kombu-zlib-declares",
        ),
    ];
    let mut subjects = BTreeSet::new();
    for (script, variables, name) in &runs {
        let twice = [format!("{name}-1"), format!("{name}-2")];
        produce(&world, &python, script, variables, &[&twice[0], &twice[1]]).await;
        for id in &twice {
            let report = reports.final_of(id).await;
            assert_eq!(report.kind(), "mail.sent", "{}", report.json);
            let correlation = if *script == "with_pika.py" {
                format!("pika/{id}")
            } else {
                id.clone()
            };
            assert_eq!(report.json["data"]["correlation_id"], *correlation);
            subjects.insert(format!("Grüße von {id}"));
        }
    }
    let received = server.received().into_iter().map(|mail| {
        let parsed = MessageParser::default().parse(&mail.data).unwrap();
        assert!(parsed.body_text(0).unwrap().starts_with("Hello from Python."));
        parsed.subject().unwrap().to_owned()
    });
    // Two of one producer may overtake each other.
    assert_eq!(received.collect::<BTreeSet<_>>(), subjects);
    assert_eq!(server.received_count(), 2 * runs.len());
    eventually(LIMIT, || async { world.depth("mail.jobs.low").await == 0 }).await;
    assert_eq!(world.depth("mail.jobs.dead").await, 0, "{}", worker.logs());
}
