//! lettre's connection on a socket of one's own, without Nagle's delay; with TLS and a login if there is an authority.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use lettre::Message;
use lettre::transport::smtp::authentication::{Credentials, Mechanism};
use lettre::transport::smtp::client::{AsyncSmtpConnection, AsyncTokioStream};
use lettre::transport::smtp::extension::ClientId;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Options;
use crate::Failed;

/// One connection.
pub(super) struct Bare(AsyncSmtpConnection);

impl Bare {
    pub(super) async fn connect(options: &Options) -> Result<Self, Failed> {
        let stream = TcpStream::connect(("127.0.0.1", options.port)).await?;
        stream.set_nodelay(true)?;
        let name = ClientId::Domain("bench.example".to_owned());
        let Some(ca) = &options.ca else {
            let connection = AsyncSmtpConnection::connect_with_transport(Box::new(stream), &name).await?;
            return Ok(Self(connection));
        };
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca)?)?;
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = rustls::ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let host = ServerName::try_from("127.0.0.1")?;
        let stream = TlsConnector::from(Arc::new(config)).connect(host, stream).await?;
        let mut connection =
            AsyncSmtpConnection::connect_with_transport(Box::new(Tls(stream)), &name).await?;
        let credentials = Credentials::new("bench".to_owned(), "bench".to_owned());
        connection.auth(&[Mechanism::Plain], &credentials).await?;
        Ok(Self(connection))
    }

    pub(super) async fn send(&mut self, message: &Message) -> Result<(), Failed> {
        self.0.send(message.envelope(), &message.formatted()).await?;
        Ok(())
    }
}

#[derive(Debug)]
struct Tls(TlsStream<TcpStream>);

impl AsyncTokioStream for Tls {
    fn peer_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.get_ref().0.peer_addr()
    }
}

impl AsyncRead for Tls {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Tls {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
