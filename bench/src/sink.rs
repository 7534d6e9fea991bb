//! An SMTP server that takes everything at as little cost as possible, in a process of its own, and a receiver of webhooks
//! that does. It is told over a control connection what to be, and tells what it took.

mod hooks;
mod protocol;

use std::collections::HashSet;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufStream,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio_rustls::TlsAcceptor;

use crate::Failed;
use protocol::Protocol;

/// What is read at once.
const READ: usize = 32 * 1024;

/// What the sink is to be from now on; connections that are open keep what they began with, but for the delay.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, PartialEq)]
pub(crate) struct Mode {
    /// Pause before the replies to whatever came in one piece: a round trip.
    pub(crate) delay_ms: u64,
    pub(crate) pipelining: bool,
    pub(crate) chunking: bool,
}

/// What the sink took since it was told its mode.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Taken {
    pub(crate) mails: u64,
    pub(crate) connections: u64,
    /// Recipients refused for now.
    pub(crate) deferred: u64,
    /// Of the first and the last mail, in µs since 1970.
    pub(crate) first_us: u64,
    pub(crate) last_us: u64,
}

/// Certificate and key of the sink, in PEM.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    certificate: std::path::PathBuf,
    #[arg(long)]
    key: std::path::PathBuf,
}

#[derive(Debug, Default)]
struct Shared {
    mode: Mutex<Mode>,
    mails: AtomicU64,
    connections: AtomicU64,
    deferred: AtomicU64,
    first_us: AtomicU64,
    last_us: AtomicU64,
    /// Recipients that were deferred once.
    seen: Mutex<HashSet<Vec<u8>>>,
}

impl Shared {
    fn mode(&self) -> Mode {
        self.mode.lock().map(|mode| *mode).unwrap_or_default()
    }

    fn took(&self) {
        let now = now_us();
        if self.mails.fetch_add(1, Relaxed) == 0 {
            self.first_us.store(now, Relaxed);
        }
        self.last_us.store(now, Relaxed);
    }

    /// Whether this recipient is put off: `later-…`, the first time.
    fn defers(&self, recipient: &[u8]) -> bool {
        let defers = recipient.starts_with(b"later-")
            && self
                .seen
                .lock()
                .is_ok_and(|mut seen| seen.insert(recipient.to_vec()));
        if defers {
            self.deferred.fetch_add(1, Relaxed);
        }
        defers
    }

    fn taken(&self) -> Taken {
        Taken {
            mails: self.mails.load(Relaxed),
            connections: self.connections.load(Relaxed),
            deferred: self.deferred.load(Relaxed),
            first_us: self.first_us.load(Relaxed),
            last_us: self.last_us.load(Relaxed),
        }
    }

    fn begin(&self, mode: Mode) {
        for count in [
            &self.mails,
            &self.connections,
            &self.deferred,
            &self.first_us,
            &self.last_us,
        ] {
            count.store(0, Relaxed);
        }
        if let Ok(mut seen) = self.seen.lock() {
            seen.clear();
        }
        if let Ok(mut current) = self.mode.lock() {
            *current = mode;
        }
    }
}

/// Microseconds since 1970.
pub(crate) fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_micros() as u64)
}

/// Serves until it is ended; prints the ports of SMTP, SMTP in TLS, webhooks, and control.
pub(crate) async fn run(options: Options) -> Result<(), Failed> {
    let local = ("127.0.0.1", 0);
    let (plain, tls, hooks, control) = tokio::try_join!(
        TcpListener::bind(local),
        TcpListener::bind(local),
        TcpListener::bind(local),
        TcpListener::bind(local)
    )?;
    let acceptor = acceptor(&options)?;
    println!(
        "{} {} {} {}",
        plain.local_addr()?.port(),
        tls.local_addr()?.port(),
        hooks.local_addr()?.port(),
        control.local_addr()?.port()
    );
    let shared = Arc::new(Shared::default());
    loop {
        let shared = Arc::clone(&shared);
        tokio::select! {
            Ok((stream, _)) = plain.accept() => { tokio::spawn(serve(stream, None, shared)); }
            Ok((stream, _)) = tls.accept() => { tokio::spawn(serve(stream, Some(acceptor.clone()), shared)); }
            Ok((stream, _)) = hooks.accept() => { tokio::spawn(hooks::serve(stream, shared)); }
            Ok((stream, _)) = control.accept() => { tokio::spawn(obey(stream, shared)); }
        }
    }
}

fn acceptor(options: &Options) -> Result<TlsAcceptor, Failed> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let certificate = CertificateDer::from_pem_file(&options.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&options.key)?;
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn serve(stream: TcpStream, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    shared.connections.fetch_add(1, Relaxed);
    // A client that goes away is none of the sink's business.
    let _ = match tls {
        Some(tls) => match tls.accept(stream).await {
            Ok(stream) => Box::pin(converse(stream, &shared)).await,
            Err(error) => Err(error),
        },
        None => converse(stream, &shared).await,
    };
}

async fn converse<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, shared: &Shared) -> std::io::Result<()> {
    let mut protocol = Protocol::new(shared);
    let (mut input, mut output) = (Vec::with_capacity(READ), b"220 sink ESMTP\r\n".to_vec());
    loop {
        if !output.is_empty() {
            let delay = shared.mode().delay_ms;
            if delay > 0 {
                tokio::time::sleep(Duration::from_millis(delay)).await;
            }
            stream.write_all(&output).await?;
            stream.flush().await?;
            output.clear();
        }
        input.reserve(READ);
        if protocol.ended() || stream.read_buf(&mut input).await? == 0 {
            return Ok(());
        }
        protocol.take(&mut input, &mut output);
    }
}

/// Each line is a mode, or asks (`?`) what was taken.
async fn obey(stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let mut stream = BufStream::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
        if let Ok(mode) = serde_json::from_str(&line) {
            shared.begin(mode);
        }
        let mut answer = serde_json::to_vec(&shared.taken()).unwrap_or_default();
        answer.push(b'\n');
        if stream.write_all(&answer).await.is_err() || stream.flush().await.is_err() {
            return;
        }
        line.clear();
    }
}

/// A running sink, seen from the outside.
#[derive(Debug)]
pub(crate) struct Sink {
    child: Child,
    control: BufStream<TcpStream>,
    pub(crate) port: u16,
    pub(crate) tls_port: u16,
    pub(crate) hooks_port: u16,
}

impl Sink {
    /// Starts one with this certificate.
    pub(crate) async fn start(certificate: &std::path::Path, key: &std::path::Path) -> Result<Self, Failed> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("sink")
            .arg("--certificate")
            .arg(certificate)
            .arg("--key")
            .arg(key)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut output = tokio::io::BufReader::new(child.stdout.take().ok_or("the sink says nothing")?);
        let mut line = String::new();
        output.read_line(&mut line).await?;
        let ports: Vec<u16> = line
            .split_whitespace()
            .filter_map(|port| port.parse().ok())
            .collect();
        let [port, tls_port, hooks_port, control] = ports[..] else {
            return Err(format!("the sink said {line:?}").into());
        };
        let control = TcpStream::connect(("127.0.0.1", control)).await?;
        control.set_nodelay(true)?;
        Ok(Self {
            child,
            control: BufStream::new(control),
            port,
            tls_port,
            hooks_port,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// Counts from zero, and is this from now on.
    pub(crate) async fn begin(&mut self, mode: Mode) -> Result<(), Failed> {
        self.ask(&serde_json::to_string(&mode)?).await.map(drop)
    }

    pub(crate) async fn taken(&mut self) -> Result<Taken, Failed> {
        self.ask("?").await
    }

    async fn ask(&mut self, question: &str) -> Result<Taken, Failed> {
        self.control.write_all(question.as_bytes()).await?;
        self.control.write_all(b"\n").await?;
        self.control.flush().await?;
        let mut answer = String::new();
        self.control.read_line(&mut answer).await?;
        Ok(serde_json::from_str(&answer)?)
    }
}
