//! From a server's settings to a session ready for MAIL.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lettre::transport::smtp::extension::ClientId;
use prometheus::Histogram;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config;
use crate::failure::{Class, Failure, Fault, Stage};
use crate::job::TlsMode;
use crate::telemetry::metrics::Metrics;

use super::auth;
use super::connection::{self, Connection};
use super::server::{Refusal, Resolver, Server};
use super::tls::Tls;
use super::trouble;
use super::wire::Wire;

/// Time an address gets before the next is tried beside it (RFC 8305 §5).
const STAGGER: Duration = Duration::from_millis(250);
/// Addresses tried of a host.
const MAX_ADDRESSES: usize = 8;

/// Opens sessions.
pub(super) struct Dialer {
    config: config::Smtp,
    hello: ClientId,
    resolver: Arc<dyn Resolver>,
    tls: Tls,
    metrics: Arc<Metrics>,
    connect_time: Histogram,
    tls_time: Histogram,
    auth_time: Histogram,
}

impl Dialer {
    pub(super) fn new(
        config: config::Smtp,
        resolver: Arc<dyn Resolver>,
        tls: Tls,
        metrics: Arc<Metrics>,
    ) -> Self {
        let phase = |name: &str| metrics.smtp_phase.with_label_values(&[name]);
        Self {
            hello: hello(&config.ehlo_name),
            connect_time: phase("connect"),
            tls_time: phase("tls"),
            auth_time: phase("auth"),
            config,
            resolver,
            tls,
            metrics,
        }
    }

    /// Connects, secures and logs in.
    pub(super) async fn connect(&self, server: &Server) -> Result<Connection, Failure> {
        // Boxed, because the handshakes' state is large and connecting is rare.
        let result = Box::pin(self.establish(server)).await;
        let label = if result.is_ok() { "ok" } else { "failed" };
        self.metrics.smtp_connects.with_label_values(&[label]).inc();
        result
    }

    async fn establish(&self, server: &Server) -> Result<Connection, Failure> {
        refuse_plaintext_password(server)?;
        let timeouts = self.config.timeouts;
        let secured = match server.tls {
            TlsMode::None => None,
            TlsMode::StartTls | TlsMode::Implicit => {
                let tls = self.tls.connector(&server.host, server.ca_pem.as_ref());
                Some(tls.map_err(|error| trouble::tls_setup(&error))?)
            }
        };
        let begun = Instant::now();
        let wire = Wire::new(self.reach(server).await?);
        self.connect_time.observe(begun.elapsed().as_secs_f64());

        let begun = Instant::now();
        let mut connection = match (server.tls, secured) {
            (TlsMode::Implicit, Some(tls)) => {
                connection::upgrade(&wire, tls, timeouts.greeting).await?;
                self.tls_time.observe(begun.elapsed().as_secs_f64());
                Connection::greet(wire, &self.hello, timeouts).await?
            }
            (TlsMode::StartTls, Some(tls)) => {
                let mut connection = Connection::greet(wire, &self.hello, timeouts).await?;
                connection.starttls(tls, &self.hello).await?;
                self.tls_time.observe(begun.elapsed().as_secs_f64());
                connection
            }
            _ => Connection::greet(wire, &self.hello, timeouts).await?,
        };
        if let Some(credentials) = &server.credentials {
            let begun = Instant::now();
            auth::log_in(&mut connection, credentials).await?;
            self.auth_time.observe(begun.elapsed().as_secs_f64());
        }
        Ok(connection)
    }

    async fn reach(&self, server: &Server) -> Result<TcpStream, Failure> {
        let limit = self.config.timeouts.connect;
        let resolving = self.resolver.resolve(&server.host, server.port, server.trusted);
        let addresses = timeout(limit, resolving)
            .await
            .map_err(|_| no_address("The host name was not resolved in time".to_owned()))?
            .map_err(|refusal| match refusal {
                Refusal::Lookup(message) => no_address(message),
                Refusal::Denied(message) => Failure::permanent(
                    Class::Local,
                    Fault::Sender,
                    Stage::Connect,
                    "host_not_allowed",
                    message,
                ),
            })?;
        let stream = timeout(limit, race(&addresses))
            .await
            .unwrap_or_else(|_| {
                Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no answer within {limit:?}"),
                ))
            })
            .map_err(|error| trouble::unreachable(&error))?;
        // Without it, the small writes of SMTP wait for delayed acknowledgements, 40 ms each.
        stream
            .set_nodelay(true)
            .map_err(|error| trouble::unreachable(&error))?;
        Ok(stream)
    }
}

fn no_address(message: String) -> Failure {
    Failure::transient(
        Class::Infrastructure,
        Fault::Provider,
        Stage::Connect,
        "host_lookup_failed",
        message,
    )
}

fn refuse_plaintext_password(server: &Server) -> Result<(), Failure> {
    if server.tls == TlsMode::None && server.credentials.is_some() && !server.allow_plaintext_auth {
        return Err(Failure::permanent(
            Class::Auth,
            Fault::Sender,
            Stage::Auth,
            "plaintext_auth_refused",
            "The password would go over an unencrypted connection; use TLS, or set allow_plaintext_auth",
        ));
    }
    Ok(())
}

/// Connects to the first address that answers; each gets a head start over the next.
async fn race(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut rest = addresses.iter().take(MAX_ADDRESSES);
    let mut attempts = FuturesUnordered::new();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    loop {
        match rest.next() {
            Some(address) => attempts.push(TcpStream::connect(*address)),
            None if attempts.is_empty() => return Err(last),
            None => {}
        }
        tokio::select! {
            Some(done) = attempts.next() => match done {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            },
            () = tokio::time::sleep(STAGGER), if rest.len() > 0 => {}
        }
    }
}

/// The name for EHLO; an address goes as an address literal (RFC 5321 §4.1.3).
fn hello(name: &str) -> ClientId {
    match name.parse() {
        Ok(std::net::IpAddr::V4(address)) => ClientId::Ipv4(address),
        Ok(std::net::IpAddr::V6(address)) => ClientId::Ipv6(address),
        Err(_) => ClientId::Domain(name.to_owned()),
    }
}

/// Whether a name for EHLO is that of a host without its domain, which servers that look refuse (Postfix'
/// `reject_non_fqdn_helo_hostname`).
pub(super) fn lacks_domain(name: &str) -> bool {
    !name.contains(['.', ':'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_host_alone_lacks_its_domain() {
        assert!(lacks_domain("worker-0") && lacks_domain("localhost"));
        for name in ["mail.example", "192.0.2.1", "[192.0.2.1]", "[IPv6:2001:db8::1]"] {
            assert!(!lacks_domain(name), "{name}");
        }
    }

    #[test]
    fn an_address_is_said_as_a_literal() {
        assert_eq!(hello("192.0.2.1").to_string(), "[192.0.2.1]");
        assert_eq!(hello("2001:db8::1").to_string(), "[IPv6:2001:db8::1]");
        assert_eq!(hello("mail.example").to_string(), "mail.example");
    }

    #[tokio::test]
    async fn a_dead_address_does_not_keep_a_live_one_from_being_used() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let live = listener.local_addr().unwrap();
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dead = closed.local_addr().unwrap();
        drop(closed);
        assert_eq!(race(&[dead, live]).await.unwrap().peer_addr().unwrap(), live);
        assert!(race(&[dead]).await.is_err());
        assert!(race(&[]).await.is_err());
    }

    #[tokio::test]
    async fn the_socket_does_not_wait_to_fill_its_segments() {
        struct Here;
        impl Resolver for Here {
            fn resolve<'a>(
                &'a self,
                _: &'a str,
                port: u16,
                _: bool,
            ) -> futures_util::future::BoxFuture<'a, Result<Vec<SocketAddr>, Refusal>> {
                Box::pin(async move { Ok(vec![SocketAddr::from(([127, 0, 0, 1], port))]) })
            }
        }
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialer = dialer(Arc::new(Here));
        let server = server("localhost", listener.local_addr().unwrap().port());
        assert!(dialer.reach(&server).await.unwrap().nodelay().unwrap());
    }

    fn dialer(resolver: Arc<dyn Resolver>) -> Dialer {
        let config = config::Smtp {
            ca_file: None,
            ehlo_name: "x".to_owned(),
            pool_size: 1,
            max_messages: 1,
            max_age: STAGGER,
            max_idle: STAGGER,
            chunking: true,
            timeouts: config::SmtpTimeouts::default(),
        };
        let metrics = Arc::new(Metrics::new().unwrap());
        Dialer::new(config, resolver, Tls::new(None).unwrap(), metrics)
    }

    fn server(host: &str, port: u16) -> Server {
        Server {
            host: host.to_owned(),
            port,
            tls: TlsMode::None,
            credentials: None,
            allow_plaintext_auth: false,
            ca_pem: None,
            trusted: false,
        }
    }

    #[tokio::test]
    async fn a_server_whose_name_turns_inside_is_not_dialled() {
        use crate::egress::rebinding::{INSIDE, OUTSIDE, Sites, guard};
        let sites = Sites::start("").await;
        let dialer = dialer(guard(&[&[OUTSIDE], &[INSIDE], &[INSIDE, OUTSIDE]]));
        let server = server("rebind.example", sites.port);
        let outside = |stream: TcpStream| stream.peer_addr().unwrap().ip().to_string() == OUTSIDE;
        assert!(outside(dialer.reach(&server).await.unwrap()));
        let refused = dialer.reach(&server).await.unwrap_err();
        assert_eq!(refused.reason, "host_not_allowed");
        assert!(outside(dialer.reach(&server).await.unwrap()));
        assert_eq!(sites.visits().1, 0);
    }
}
