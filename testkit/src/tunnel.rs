//! A TLS front for a server that speaks none, with a certificate authority of its own.

use std::net::SocketAddr;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// Accepts TLS on a port of its own and passes the plain text on. Ends when dropped.
#[derive(Debug)]
pub struct Tunnel {
    address: SocketAddr,
    ca_pem: String,
    task: JoinHandle<()>,
}

impl Tunnel {
    /// Starts a tunnel to `upstream` (`host:port`) with a certificate for `localhost`.
    ///
    /// # Panics
    /// If no certificate can be made or no port bound.
    #[expect(clippy::expect_used, reason = "an instrument that cannot start has no use")]
    pub async fn start(upstream: String) -> Self {
        let mut ca = CertificateParams::new(Vec::<String>::new()).expect("valid parameters");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().expect("a key")).expect("a CA");
        let key = KeyPair::generate().expect("a key");
        let certificate = CertificateParams::new(vec!["localhost".to_owned()])
            .expect("valid parameters")
            .signed_by(&key, &ca)
            .expect("a certificate");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring supports them")
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            )
            .expect("the key fits the certificate");
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        Self {
            address,
            ca_pem: ca.pem(),
            task: tokio::spawn(accept(listener, acceptor, upstream)),
        }
    }

    /// Port on which it speaks TLS; the certificate is for `localhost`.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Certificate of its authority, PEM.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, upstream: String) {
    while let Ok((client, _)) = listener.accept().await {
        let (acceptor, upstream) = (acceptor.clone(), upstream.clone());
        tokio::spawn(async move {
            if let (Ok(mut client), Ok(mut server)) =
                tokio::join!(acceptor.accept(client), TcpStream::connect(upstream))
            {
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            }
        });
    }
}
