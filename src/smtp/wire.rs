//! The socket under an SMTP session, plain or TLS, shared by lettre (which reads replies from it) and this module
//! (which writes commands and mails to it).
//!
//! It hands lettre at most one line per read. So nothing that came in clear can wait in lettre's buffer when the
//! connection turns to TLS: an attacker's reply put in behind the one to STARTTLS is found here, and the connection
//! fails (RFC 3207 §6, CVE-2011-0411). It also makes lines fit for lettre's parser, which knows only UTF-8 and the
//! codes of RFC 5321 (a `571` is real): what the server really said is kept in [`Wire::reply`].

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf as _, BytesMut};
use lettre::transport::smtp::client::AsyncTokioStream;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::reply::ReplyText;

/// Longest reply line taken; RFC 5321 §4.5.3.1.5 allows 512 bytes.
const MAX_LINE: usize = 8192;

/// Lines of one reply. The longest that are known, to EHLO, have about 30; lettre reads all of a reply again for each.
const MAX_LINES: usize = 500;

#[derive(Debug, Clone)]
pub(super) struct Wire(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    socket: Socket,
    /// Received, not handed out yet.
    inbound: BytesMut,
    /// The line being handed out.
    line: BytesMut,
    reply: ReplyText,
    /// Lines of the reply that is being read.
    lines: usize,
    /// The server closed its side.
    ended: bool,
}

#[derive(Debug)]
enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    /// The handshake is under way or failed.
    Gone,
}

/// Why a connection did not become a TLS one.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpgradeError {
    #[error("the server sent more than its reply to STARTTLS in clear; somebody may be tampering")]
    Injected,
    #[error(transparent)]
    Handshake(#[from] io::Error),
}

impl Wire {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            socket: Socket::Plain(stream),
            inbound: BytesMut::with_capacity(4096),
            line: BytesMut::new(),
            reply: ReplyText::default(),
            lines: 0,
            ended: false,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The latest complete reply, as the server said it.
    pub(super) fn reply(&self) -> crate::failure::Reply {
        self.lock().reply.reply()
    }

    /// The latest refusal, even if lettre said QUIT since.
    pub(super) fn refusal(&self) -> crate::failure::Reply {
        self.lock().reply.refusal()
    }

    /// The text lines of the latest reply.
    pub(super) fn reply_lines(&self) -> Vec<String> {
        self.lock().reply.lines().map(str::to_owned).collect()
    }

    /// Whether the server closed the connection.
    pub(super) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Whether it speaks TLS.
    pub(super) fn is_tls(&self) -> bool {
        matches!(self.lock().socket, Socket::Tls(_))
    }

    /// Turns the connection into a TLS one.
    pub(super) async fn upgrade(
        &self,
        connector: &TlsConnector,
        name: ServerName<'static>,
    ) -> Result<(), UpgradeError> {
        let tcp = {
            let mut inner = self.lock();
            if !inner.inbound.is_empty() || !inner.line.is_empty() {
                return Err(UpgradeError::Injected);
            }
            match std::mem::replace(&mut inner.socket, Socket::Gone) {
                Socket::Plain(tcp) => tcp,
                Socket::Tls(_) | Socket::Gone => return Err(UpgradeError::Injected),
            }
        };
        let tls = connector.connect(name, tcp).await?;
        self.lock().socket = Socket::Tls(Box::new(tls));
        Ok(())
    }

    /// Waits until the first line of a reply is there, so that it has a time limit of its own.
    pub(super) async fn wait_line(&self) -> io::Result<()> {
        poll_fn(|cx| {
            let mut inner = self.lock();
            while !inner.inbound.contains(&b'\n') {
                if ready!(inner.poll_fill(cx))? == 0 {
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// Writes everything and flushes; `written` tells how far it came, even if the future is dropped.
    pub(super) async fn write_all(&self, bytes: &[u8], written: &mut usize) -> io::Result<()> {
        poll_fn(|cx| {
            let mut inner = self.lock();
            while *written < bytes.len() {
                let n = ready!(inner.socket.poll_write(cx, &bytes[*written..]))?;
                if n == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                *written += n;
            }
            inner.socket.poll_flush(cx)
        })
        .await
    }

    /// Whether nothing has come in on an idle connection. A 421 or an end means that it is dead; costs no round trip.
    pub(super) fn is_quiet(&self) -> bool {
        let inner = self.lock();
        let tcp = match &inner.socket {
            Socket::Plain(tcp) => tcp,
            Socket::Tls(tls) => tls.get_ref().0,
            Socket::Gone => return false,
        };
        let mut byte = [0; 1];
        let peeked = tcp.poll_peek(
            &mut Context::from_waker(Waker::noop()),
            &mut ReadBuf::new(&mut byte),
        );
        inner.inbound.is_empty() && peeked.is_pending()
    }
}

impl Inner {
    /// Reads once from the network; 0 is the end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.inbound.len() > MAX_LINE {
            let error = io::Error::new(io::ErrorKind::InvalidData, "reply line too long");
            return Poll::Ready(Err(error));
        }
        let mut chunk = [0; 4096];
        let mut buf = ReadBuf::new(&mut chunk);
        ready!(self.socket.poll_read(cx, &mut buf))?;
        self.ended = buf.filled().is_empty();
        self.inbound.extend_from_slice(buf.filled());
        Poll::Ready(Ok(buf.filled().len()))
    }

    /// Moves the next line, if it is whole, to where it is handed out from.
    fn next_line(&mut self) -> io::Result<bool> {
        let Some(end) = self.inbound.iter().position(|b| *b == b'\n') else {
            return Ok(false);
        };
        self.line = self.inbound.split_to(end + 1);
        self.reply.push(&mut self.line);
        self.lines = if self.reply.is_complete() {
            0
        } else {
            self.lines + 1
        };
        if self.lines > MAX_LINES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "reply of too many lines",
            ));
        }
        Ok(true)
    }
}

impl Socket {
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
            Self::Gone => Poll::Ready(Ok(())),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, bytes),
            Self::Gone => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
            Self::Gone => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.lock();
        while inner.line.is_empty() && !inner.next_line()? {
            if ready!(inner.poll_fill(cx))? == 0 {
                return Poll::Ready(Ok(()));
            }
        }
        let n = inner.line.len().min(buf.remaining());
        buf.put_slice(&inner.line[..n]);
        inner.line.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.lock().socket.poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.lock().socket.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.lock().socket {
            Socket::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Socket::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
            Socket::Gone => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncTokioStream for Wire {
    fn peer_addr(&self) -> io::Result<SocketAddr> {
        match &self.lock().socket {
            Socket::Plain(tcp) => tcp.peer_addr(),
            Socket::Tls(tls) => tls.get_ref().0.peer_addr(),
            Socket::Gone => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}
