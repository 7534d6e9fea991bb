//! The client against the scripted server of the test kit: real sockets, real TLS.

mod cancel;
mod data;
mod deadline;
mod envelope;
mod flights;
mod hostile;
mod login;
mod pooling;
mod secure;
mod shared_cap;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use postroom_testkit::smtp::{Action, Builder, Script, SmtpServer};

use super::pool::Tuning;
use super::*;
use crate::config;
use crate::failure::Failure;
use crate::id::AccountKey;
use crate::job::TlsMode;
use crate::telemetry::metrics::Metrics;

const SECOND: Duration = Duration::from_secs(1);
const MAIL: &[u8] = b"Date: Mon, 2 Nov 2026 08:09:10 +0000\r\nSubject: x\r\n\r\nhello\r\n";

/// Resolves `localhost` and addresses, and refuses all else.
struct Direct;

impl Resolver for Direct {
    fn resolve<'a>(
        &'a self,
        host: &'a str,
        port: u16,
        _trusted: bool,
    ) -> BoxFuture<'a, Result<Vec<SocketAddr>, Refusal>> {
        Box::pin(async move {
            match host {
                "localhost" => Ok(vec![SocketAddr::from(([127, 0, 0, 1], port))]),
                "missing.example" => Err(Refusal::Lookup("no such host".to_owned())),
                _ => match host.parse() {
                    Ok(ip) => Ok(vec![SocketAddr::new(ip, port)]),
                    Err(_) => Err(Refusal::Denied("see POSTROOM_EGRESS_ALLOW".to_owned())),
                },
            }
        })
    }
}

/// Nobody but us.
struct NoCaps;

impl ConnectionCaps for NoCaps {
    fn acquire<'a>(&'a self, _: &'a AccountKey, _: u32) -> BoxFuture<'a, Result<bool, CapsError>> {
        Box::pin(async { Ok(true) })
    }

    fn release<'a>(&'a self, _: &'a AccountKey) -> BoxFuture<'a, Result<(), CapsError>> {
        Box::pin(async { Ok(()) })
    }

    fn restate<'a>(&'a self, _: &'a [(AccountKey, u32)]) -> BoxFuture<'a, Result<(), CapsError>> {
        Box::pin(async { Ok(()) })
    }
}

/// What a test changes about the pools.
struct Setup {
    config: config::Smtp,
    tuning: Tuning,
    caps: Arc<dyn ConnectionCaps>,
    metrics: Arc<Metrics>,
}

impl Default for Setup {
    fn default() -> Self {
        let limit = 2 * SECOND;
        Self {
            config: config::Smtp {
                ca_file: None,
                ehlo_name: "client.example".to_owned(),
                pool_size: 4,
                max_messages: 1000,
                max_age: 600 * SECOND,
                max_idle: 30 * SECOND,
                chunking: true,
                timeouts: config::SmtpTimeouts {
                    connect: limit,
                    greeting: limit,
                    command: limit,
                    write: limit,
                    attempt: 60 * SECOND,
                    final_reply: limit,
                },
            },
            tuning: Tuning {
                sweep: Duration::from_millis(20),
                ..Tuning::default()
            },
            caps: Arc::new(NoCaps),
            metrics: Arc::new(Metrics::new().unwrap()),
        }
    }
}

impl Setup {
    /// All time limits of the SMTP phases.
    fn limit(mut self, limit: Duration) -> Self {
        self.config.timeouts = config::SmtpTimeouts {
            connect: limit,
            greeting: limit,
            command: limit,
            write: limit,
            attempt: 60 * SECOND,
            final_reply: limit,
        };
        self
    }

    /// Time limits of the reply to a command, and to a whole mail.
    fn replies_within(mut self, command: Duration, final_reply: Duration) -> Self {
        self.config.timeouts.command = command;
        self.config.timeouts.final_reply = final_reply;
        self
    }

    /// Waits shortly for the reply to a whole mail where it is to wait in vain, and only there.
    fn against(action: &Action) -> Self {
        let setup = Self::default();
        match action {
            Action::Silence | Action::TakeThenSilence => setup.replies_within(2 * SECOND, SECOND),
            _ => setup,
        }
    }

    fn pools(self) -> Arc<Pools> {
        Pools::tuned(
            self.config,
            Arc::new(Direct),
            self.caps,
            self.metrics,
            self.tuning,
        )
        .unwrap()
    }
}

fn pools() -> Arc<Pools> {
    Setup::default().pools()
}

fn server_of(smtp: &SmtpServer) -> Server {
    Server {
        host: "localhost".to_owned(),
        port: smtp.port(),
        tls: TlsMode::None,
        credentials: None,
        allow_plaintext_auth: false,
        ca_pem: None,
        trusted: false,
    }
}

fn credentials(username: &str, password: &str) -> Credentials {
    Credentials {
        username: username.to_owned(),
        password: password.to_owned().into(),
    }
}

fn submission(server: Server) -> Submission {
    Submission {
        key: AccountKey::from_stored("acme/main"),
        version: 1,
        server,
        max_connections: None,
    }
}

fn account(smtp: &SmtpServer) -> Arc<Submission> {
    Arc::new(submission(server_of(smtp)))
}

fn to(recipients: &[&str]) -> Envelope {
    Envelope {
        from: Some("sender@acme.example".parse().unwrap()),
        to: recipients
            .iter()
            .map(|address| address.parse().unwrap())
            .collect(),
    }
}

async fn scripted(script: Script) -> SmtpServer {
    SmtpServer::builder().script(script).start().await
}

fn traced() -> Builder {
    SmtpServer::builder().trace(true)
}

/// A checkout that is to work.
async fn lease(pools: &Pools, account: &Arc<Submission>) -> Lease {
    pools.checkout(account).await.expect("a connection")
}

/// A checkout that is to fail.
async fn refused(pools: &Pools, server: Server) -> Failure {
    match pools.checkout(&Arc::new(submission(server))).await {
        Err(CheckoutError::Failed(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

fn of(size: usize, utf8: bool, eightbit: bool) -> Mail {
    Mail { size, utf8, eightbit }
}

async fn open(lease: Lease, envelope: &Envelope) -> Result<Transaction, OpenError> {
    open_mail(lease, envelope, of(MAIL.len(), false, false), MAIL).await
}

/// Opens a transaction, on a fresh connection where the first one does not do.
async fn open_mail(
    mut lease: Lease,
    envelope: &Envelope,
    mail: Mail,
    message: &[u8],
) -> Result<Transaction, OpenError> {
    loop {
        match lease.open(envelope, mail, message).await {
            Ok(transaction) => return Ok(transaction),
            Err(NotBegun::Failed(error)) => return Err(error),
            Err(NotBegun::Fresh(fresh)) => lease = *fresh,
        }
    }
}

/// Sends one mail to one recipient; how it ended.
async fn send(pools: &Pools, account: &Arc<Submission>) -> Outcome {
    let lease = lease(pools, account).await;
    let transaction = open(lease, &to(&["a@example.org"])).await.expect("accepted");
    transaction.finish(MAIL).await
}

/// The results as codes, in order.
fn codes(results: &[(crate::address::Address, RcptResult)]) -> Vec<u16> {
    results
        .iter()
        .map(|(_, result)| result.reply().map_or(0, |reply| reply.code))
        .collect()
}

fn sent(outcome: &Outcome) -> &Results {
    match outcome {
        Outcome::Done(results) => results,
        Outcome::Uncertain { .. } => panic!("{outcome:?}"),
    }
}

/// Waits for a condition, at most five seconds.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(
        tokio::time::timeout(5 * SECOND, waiting).await.is_ok(),
        "not in time: {what}"
    );
}
