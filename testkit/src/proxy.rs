//! A TCP proxy that breaks the network between two parties as told: delay, stall, reset, cut without a word, heal. It can
//! speak TLS in front of a server that speaks none, with a certificate authority of its own; and it counts what clients say.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::tls::TestCa;

/// What the network does to bytes on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Weather {
    /// They pass.
    #[default]
    Clear,
    /// They pass after this time, block by block.
    Delay(Duration),
    /// They are held back, and pass when this is over.
    Stall,
    /// They vanish, and nobody is told: connections of this time are dead for ever, though both ends think them open.
    Cut,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    weather: Weather,
    /// How often all connections were reset, and cut.
    resets: u64,
    cuts: u64,
}

/// A running proxy on a port of its own; ends when dropped, with all its connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    ca_pem: String,
    pieces: Arc<AtomicU64>,
    state: watch::Sender<State>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// In front of `upstream` (`host:port`).
    ///
    /// # Panics
    /// If no port can be bound.
    pub async fn start(upstream: impl Into<String>) -> Self {
        Self::with(upstream.into(), None, String::new()).await
    }

    /// The same, speaking TLS to those who connect, with a certificate for `localhost`.
    ///
    /// # Panics
    /// If no certificate can be made or no port bound.
    pub async fn start_tls(upstream: impl Into<String>) -> Self {
        let ca = TestCa::new();
        let acceptor = TlsAcceptor::from(ca.server(&["localhost"]).server_config());
        Self::with(upstream.into(), Some(acceptor), ca.ca_pem()).await
    }

    #[expect(clippy::expect_used, reason = "an instrument that cannot start has no use")]
    async fn with(upstream: String, tls: Option<TlsAcceptor>, ca_pem: String) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let state = watch::Sender::new(State::default());
        let pieces = Arc::new(AtomicU64::new(0));
        let network = Network {
            upstream: upstream.into(),
            tls,
            pieces: Arc::clone(&pieces),
            state: state.subscribe(),
        };
        let task = tokio::spawn(accept(listener, network));
        Self {
            address,
            ca_pem,
            pieces,
            state,
            task,
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Certificate of its authority, PEM; empty without TLS.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Pieces in which clients sent what they had to say so far: about one for each question to a database.
    #[must_use]
    pub fn pieces(&self) -> u64 {
        self.pieces.load(Ordering::Relaxed)
    }

    /// From now on the network is like this.
    pub fn set(&self, weather: Weather) {
        self.state.send_modify(|state| {
            state.cuts += u64::from(weather == Weather::Cut);
            state.weather = weather;
        });
    }

    /// [`Weather::Clear`] again. What was cut stays dead.
    pub fn heal(&self) {
        self.set(Weather::Clear);
    }

    /// Ends all connections of this moment with RST, to both sides.
    pub fn reset(&self) {
        self.state.send_modify(|state| state.resets += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What each connection is given.
#[derive(Clone)]
struct Network {
    upstream: Arc<str>,
    tls: Option<TlsAcceptor>,
    pieces: Arc<AtomicU64>,
    state: watch::Receiver<State>,
}

async fn accept(listener: TcpListener, network: Network) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                connections.spawn(serve(client, network.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(client: TcpStream, network: Network) {
    let Network {
        upstream,
        tls,
        pieces,
        state,
    } = network;
    let _ = client.set_nodelay(true);
    let begun = *state.borrow();
    if begun.weather == Weather::Cut {
        return vanish(client, None).await;
    }
    let Ok(server) = TcpStream::connect(&*upstream).await else {
        return;
    };
    let _ = server.set_nodelay(true);
    if let Some(tls) = tls {
        if let Ok(mut client) = tls.accept(client).await {
            let mut server = server;
            carry(&mut client, &mut server, begun, (pieces, state)).await;
        }
        return;
    }
    let (mut client, mut server) = (client, server);
    match carry(&mut client, &mut server, begun, (pieces, state)).await {
        End::Closed => {}
        End::Reset => {
            let _ = client.set_zero_linger();
            let _ = server.set_zero_linger();
        }
        End::Cut => vanish(client, Some(server)).await,
    }
}

/// How a connection ended.
enum End {
    Closed,
    Reset,
    Cut,
}

async fn carry<C, S>(
    client: &mut C,
    server: &mut S,
    begun: State,
    (pieces, mut state): (Arc<AtomicU64>, watch::Receiver<State>),
) -> End
where
    C: AsyncRead + AsyncWrite + Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (from_client, to_client) = tokio::io::split(client);
    let (from_server, to_server) = tokio::io::split(server);
    let both = async {
        tokio::join!(
            pump(from_client, to_server, state.clone(), || {
                pieces.fetch_add(1, Ordering::Relaxed);
            }),
            pump(from_server, to_client, state.clone(), || {}),
        )
    };
    let mut severing = state.clone();
    tokio::select! {
        biased;
        severed = severing.wait_for(|now| now.resets > begun.resets || now.cuts > begun.cuts) => {
            match severed {
                Ok(now) if now.cuts > begun.cuts => End::Cut,
                Ok(_) => End::Reset,
                // The proxy is gone.
                Err(_) => End::Closed,
            }
        }
        _ = both => {
            let _ = state.borrow_and_update();
            End::Closed
        }
    }
}

/// Passes bytes on in one direction until its end, and tells of each piece.
async fn pump<R, W>(
    mut from: ReadHalf<R>,
    mut to: WriteHalf<W>,
    mut state: watch::Receiver<State>,
    tell: impl Fn(),
) where
    R: AsyncRead,
    W: AsyncWrite,
{
    let mut block = vec![0; 16 << 10];
    loop {
        let read = from.read(&mut block).await.unwrap_or(0);
        if read > 0 {
            tell();
        }
        let weather = state.borrow().weather;
        if let Weather::Delay(delay) = weather {
            tokio::time::sleep(delay).await;
        }
        if state.wait_for(|now| now.weather != Weather::Stall).await.is_err() {
            return;
        }
        if read == 0 || to.write_all(&block[..read]).await.is_err() {
            let _ = to.shutdown().await;
            return;
        }
    }
}

/// Swallows what the client says until it gives up; the server never hears of it again.
async fn vanish(mut client: TcpStream, server: Option<TcpStream>) {
    let mut block = vec![0; 16 << 10];
    while client.read(&mut block).await.is_ok_and(|read| read > 0) {}
    drop(server);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(150);
    const LONG: Duration = Duration::from_secs(10);

    /// A server that echoes, behind a proxy, and a connection to it.
    async fn connected() -> (Proxy, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        let proxy = Proxy::start(address.to_string()).await;
        let stream = TcpStream::connect(proxy.address()).await.expect("it listens");
        (proxy, stream)
    }

    async fn echo(stream: &mut TcpStream, limit: Duration) -> Option<u8> {
        stream.write_all(b"x").await.ok()?;
        tokio::time::timeout(limit, stream.read_u8()).await.ok()?.ok()
    }

    #[tokio::test]
    async fn what_is_stalled_comes_later_and_whole() {
        let (proxy, mut stream) = connected().await;
        assert_eq!(echo(&mut stream, LONG).await, Some(b'x'));
        proxy.set(Weather::Stall);
        assert_eq!(echo(&mut stream, SHORT).await, None);
        proxy.heal();
        assert_eq!(stream.read_u8().await.ok(), Some(b'x'));
    }

    #[tokio::test]
    async fn what_is_cut_is_dead_for_ever_and_nobody_is_told() {
        let (proxy, mut stream) = connected().await;
        assert_eq!(echo(&mut stream, LONG).await, Some(b'x'));
        proxy.set(Weather::Cut);
        proxy.heal();
        assert_eq!(echo(&mut stream, SHORT).await, None);
        let mut fresh = TcpStream::connect(proxy.address()).await.expect("it listens");
        assert_eq!(echo(&mut fresh, LONG).await, Some(b'x'));
    }

    #[tokio::test]
    async fn a_reset_ends_the_connections_of_that_moment_only() {
        let (proxy, mut stream) = connected().await;
        assert_eq!(echo(&mut stream, LONG).await, Some(b'x'));
        proxy.reset();
        let read = tokio::time::timeout(LONG, stream.read_u8()).await;
        assert!(read.is_ok_and(|read| read.is_err()));
        let mut fresh = TcpStream::connect(proxy.address()).await.expect("it listens");
        assert_eq!(echo(&mut fresh, LONG).await, Some(b'x'));
    }

    #[tokio::test]
    async fn a_delay_is_no_loss() {
        let (proxy, mut stream) = connected().await;
        proxy.set(Weather::Delay(SHORT));
        let begun = std::time::Instant::now();
        assert_eq!(echo(&mut stream, LONG).await, Some(b'x'));
        assert!(begun.elapsed() >= 2 * SHORT);
    }
}
