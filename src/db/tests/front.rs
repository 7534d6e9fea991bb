//! What stands in front of a Postgres: something that refuses start-up options as `PgBouncer` does, and a TLS listener
//! with certificates of its own. Both pass everything else on to the real server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::*;

/// The real server's address.
fn upstream(url: &str) -> String {
    let config: tokio_postgres::Config = url.parse().unwrap();
    let tokio_postgres::config::Host::Tcp(host) = &config.get_hosts()[0] else {
        panic!("tests need a server reached by TCP");
    };
    format!("{host}:{}", config.get_ports().first().copied().unwrap_or(5432))
}

/// The URL with another address.
fn through(url: &str, addr: SocketAddr, host: &str) -> String {
    url.replace(&upstream(url), &format!("{host}:{}", addr.port()))
}

async fn pipe(mut client: impl AsyncRead + AsyncWrite + Unpin, first: &[u8], upstream: String) {
    let mut server = TcpStream::connect(upstream).await.unwrap();
    server.write_all(first).await.unwrap();
    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
}

/// A start-up packet: its length, then the rest.
async fn startup(client: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let length = client.read_u32().await.unwrap();
    let mut packet = vec![0; length as usize];
    packet[..4].copy_from_slice(&length.to_be_bytes());
    client.read_exact(&mut packet[4..]).await.unwrap();
    packet
}

#[tokio::test]
async fn a_pooler_that_refuses_options_is_asked_without() {
    let scratch = Scratch::new();
    let target = upstream(scratch.config.url.expose_secret());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let target = target.clone();
            tokio::spawn(async move {
                let packet = startup(&mut client).await;
                if packet.windows(8).any(|window| window == b"options\0") {
                    let fields = b"SFATAL\0VFATAL\0C08P01\0Munsupported startup parameter: options\0\0";
                    client.write_u8(b'E').await.unwrap();
                    client.write_u32(fields.len() as u32 + 4).await.unwrap();
                    client.write_all(fields).await.unwrap();
                    return;
                }
                pipe(client, &packet, target).await;
            });
        }
    });
    let config = scratch.with_url(|url| with_option(&through(url, addr, "127.0.0.1"), "sslmode=disable"));
    let client = Database::connect(&config).unwrap().client().await.unwrap();
    let row = client
        .query_one("SELECT current_setting('application_name')", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), "postroom");
}

/// A certificate authority with a file that holds it.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    file: PathBuf,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let file = std::env::temp_dir().join(format!("postroom-{name}-{}.pem", uuid::Uuid::new_v4()));
        std::fs::write(&file, issuer.pem()).unwrap();
        Self { issuer, file }
    }

    /// A listener that speaks TLS as Postgres does, with a certificate for `localhost`.
    async fn listen(&self, target: String) -> SocketAddr {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".into()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let (acceptor, target) = (acceptor.clone(), target.clone());
                tokio::spawn(async move {
                    assert_eq!(
                        startup(&mut client).await[4..],
                        80_877_103_u32.to_be_bytes(),
                        "an SSLRequest"
                    );
                    client.write_u8(b'S').await.unwrap();
                    if let Ok(client) = acceptor.accept(client).await {
                        pipe(client, &[], target).await;
                    }
                });
            }
        });
        addr
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

#[tokio::test]
async fn sslmode_decides_what_a_certificate_must_prove() {
    let scratch = Scratch::new();
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let addr = ours.listen(upstream(scratch.config.url.expose_secret())).await;
    let (good, bad) = (Some(&ours.file), Some(&other.file));
    for (host, mode, ca, connects) in [
        ("localhost", "", None, true),
        ("localhost", "sslmode=prefer", None, true),
        ("localhost", "sslmode=prefer", bad, false),
        ("localhost", "sslmode=require", None, false),
        ("localhost", "sslmode=require", good, true),
        ("localhost", "sslmode=verify-full", good, true),
        ("localhost", "sslmode=verify-full", bad, false),
        ("127.0.0.1", "sslmode=verify-full", good, false),
        ("127.0.0.1", "sslmode=verify-ca", good, true),
        ("127.0.0.1", "sslmode=verify-ca", bad, false),
        // An authority alone means verify-full.
        ("localhost", "", good, true),
        ("localhost", "", bad, false),
        ("127.0.0.1", "", good, false),
    ] {
        let mut config = scratch.with_url(|url| with_option(&through(url, addr, host), mode));
        config.ca_file = ca.cloned();
        let result = Database::connect(&config).unwrap().client().await;
        assert_eq!(
            result.is_ok(),
            connects,
            "{host} {mode} {ca:?}: {:?}",
            result.err()
        );
    }
    let with_root = |url: &str| {
        let file = ours.file.display();
        with_option(
            &through(url, addr, "localhost"),
            &format!("sslmode=verify-full&sslrootcert={file}"),
        )
    };
    let _client = Database::connect(&scratch.with_url(with_root))
        .unwrap()
        .client()
        .await
        .unwrap();
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_tls_is_required() {
    let scratch = Scratch::new();
    let authority = Authority::new("plain");
    for mode in ["sslmode=require", "sslmode=verify-ca", "sslmode=verify-full", ""] {
        let mut config = scratch.with_url(|url| with_option(url, mode));
        config.ca_file = Some(authority.file.clone());
        let error = Database::connect(&config).unwrap().client().await.unwrap_err();
        assert!(matches!(error, DbError::Connect(_)), "{mode}: {error}");
    }
}

#[test]
fn a_certificate_file_that_holds_none_is_named() {
    let mut config = config("postgres://h/d", "s");
    config.ca_file = Some("Cargo.toml".into());
    let error = Database::connect(&config).unwrap_err();
    assert!(error.to_string().contains("Cargo.toml"), "{error}");
}
