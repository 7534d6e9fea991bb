//! Which hosts named by tenants may be reached: public ones, and what the operator allows. Checked on the resolved
//! address at the moment of connecting, so that a name cannot lead inside.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use crate::config;

/// Time limit of one name resolution.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a host cannot be reached. `Display` may be shown to a tenant: it names the host as given, never the address
/// that a name resolves to inside the operator's network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EgressError {
    /// The address is not public and not allowed. Stays.
    #[error(
        "`{host}` is not at a public address; to allow it, the operator adds its network to POSTROOM_EGRESS_ALLOW"
    )]
    Refused {
        /// The host as given.
        host: String,
        /// The address, for the operator's log.
        address: IpAddr,
    },
    /// Not an http or https URL with a host. Stays.
    #[error("only http and https URLs with a host can be fetched")]
    Scheme,
    /// The name has no address, or the resolver failed. May pass.
    #[error("the name `{host}` cannot be resolved")]
    Unresolved {
        /// The name.
        host: String,
    },
    /// The resolver did not answer in time. May pass.
    #[error("the name `{host}` was not resolved within {} s", RESOLVE_TIMEOUT.as_secs())]
    TimedOut {
        /// The name.
        host: String,
    },
}

impl EgressError {
    /// Whether the same host may be reachable later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unresolved { .. } | Self::TimedOut { .. })
    }

    /// Finds a refusal inside the error of an HTTP client.
    #[must_use]
    pub fn find<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            next = error.source();
        }
        None
    }
}

/// Checks addresses against the public ranges and `POSTROOM_EGRESS_ALLOW`.
#[derive(Debug, Clone, Default)]
pub struct EgressGuard {
    config: config::Egress,
    #[cfg(test)]
    names: Option<Arc<rebinding::Names>>,
}

impl EgressGuard {
    /// A guard with the operator's exceptions.
    #[must_use]
    pub fn new(config: config::Egress) -> Self {
        Self {
            config,
            #[cfg(test)]
            names: None,
        }
    }

    /// Whether a tenant's host may be at this address.
    ///
    /// # Errors
    /// [`EgressError::Refused`] if it is neither public nor allowed.
    pub fn check(&self, address: IpAddr) -> Result<(), EgressError> {
        if is_public(address) || self.is_allowed(address) {
            Ok(())
        } else {
            let host = address.to_string();
            Err(EgressError::Refused { host, address })
        }
    }

    /// Checks what can be checked of a URL before connecting: its scheme, and its host if that is an address (HTTP
    /// clients do not ask the resolver then). Names are checked by [`EgressGuard::resolve`].
    ///
    /// # Errors
    /// [`EgressError::Scheme`] or [`EgressError::Refused`].
    pub fn check_url(&self, url: &Url) -> Result<(), EgressError> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(EgressError::Scheme);
        }
        match url.host() {
            Some(Host::Ipv4(ip)) => self.check(ip.into()),
            Some(Host::Ipv6(ip)) => self.check(ip.into()),
            Some(Host::Domain(_)) => Ok(()),
            None => Err(EgressError::Scheme),
        }
    }

    /// Resolves a host, a name or an address, and keeps the addresses that may be reached. `trusted` is for the
    /// operator's own hosts, which may be anywhere.
    ///
    /// # Errors
    /// [`EgressError::Refused`] if no address is left, or that the name does not resolve in time.
    pub async fn resolve(
        &self,
        host: &str,
        port: u16,
        trusted: bool,
    ) -> Result<Vec<SocketAddr>, EgressError> {
        let host = host
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
            .unwrap_or(host);
        let mut found: Vec<SocketAddr> = match host.parse::<IpAddr>() {
            Ok(ip) => vec![SocketAddr::new(ip, port)],
            Err(_) => self.look_up(host, port).await?,
        };
        let Some(first) = found.first().copied() else {
            return Err(EgressError::Unresolved {
                host: host.to_owned(),
            });
        };
        if !trusted {
            found.retain(|address| self.check(address.ip()).is_ok());
        }
        if found.is_empty() {
            let (host, address) = (host.to_owned(), first.ip());
            return Err(EgressError::Refused { host, address });
        }
        Ok(found)
    }

    fn is_allowed(&self, address: IpAddr) -> bool {
        let embedded = match address {
            IpAddr::V6(v6) => embedded_v4(v6).map(IpAddr::V4),
            IpAddr::V4(_) => None,
        };
        let allow = &self.config.allow;
        allow
            .iter()
            .any(|net| net.contains(&address) || embedded.is_some_and(|v4| net.contains(&v4)))
    }

    async fn look_up(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, EgressError> {
        #[cfg(test)]
        if let Some(names) = &self.names {
            return Ok(names.look_up(port));
        }
        look_up(host, port).await
    }
}

async fn look_up(host: &str, port: u16) -> Result<Vec<SocketAddr>, EgressError> {
    match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((host, port))).await {
        Ok(Ok(found)) => Ok(found.collect()),
        Ok(Err(_)) => Err(EgressError::Unresolved {
            host: host.to_owned(),
        }),
        Err(_) => Err(EgressError::TimedOut {
            host: host.to_owned(),
        }),
    }
}

/// Whether anybody on the Internet could be reached at this address, by the special-purpose registries of IANA
/// (RFC 6890).
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => embedded_v4(v6).map_or_else(|| is_public_v6(v6), is_public_v4),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let special = match address.octets() {
        // Carrier-grade NAT (RFC 6598), which holds a metadata service too.
        [100, second, ..] => second & 0xc0 == 64,
        [172, second, ..] => second & 0xf0 == 16,
        // This network, private, loopback, multicast and reserved with broadcast.
        [0 | 10 | 127 | 224..=255, ..]
        // Link-local, with the metadata services of most clouds.
        | [169, 254, ..]
        // Protocol assignments, documentation, 6to4 relays, private.
        | [192, 0, 0 | 2, _]
        | [192, 88, 99, _]
        | [192, 168, ..]
        // Benchmarking and documentation.
        | [198, 18 | 19, ..]
        | [198, 51, 100, _]
        | [203, 0, 113, _] => true,
        _ => false,
    };
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    // Only 2000::/3 is global unicast: loopback, unspecified, ULA, link-local and multicast lie outside.
    let special = match address.segments() {
        // Protocol assignments with Teredo and ORCHID, documentation, 6to4.
        [0x2001, second, ..] => second < 0x0200 || second == 0x0db8,
        [0x2002, ..] => true,
        [0x3fff, second, ..] => second < 0x1000,
        [first, ..] => first & 0xe000 != 0x2000,
    };
    !special
}

/// The IPv4 address that an IPv6 address stands for: IPv4-mapped, or behind the well-known NAT64 prefix (RFC 6052).
fn embedded_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [prefix @ .., high, low] = address.segments();
    match prefix {
        [0, 0, 0, 0, 0, 0xffff] | [0x64, 0xff9b, 0, 0, 0, 0] => {
            Some(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)))
        }
        _ => None,
    }
}

/// The guard as resolver of an HTTP client.
#[derive(Debug, Clone)]
pub struct GuardedDns(pub Arc<EgressGuard>);

impl Resolve for GuardedDns {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = Arc::clone(&self.0);
        Box::pin(async move {
            // Port 0: the client puts in that of the URL.
            let found = guard.resolve(name.as_str(), 0, false).await?;
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// An HTTP client for URLs given by tenants: it connects only where the guard lets it, follows no redirect and uses
/// no proxy. Whoever uses it calls [`EgressGuard::check_url`] on each URL first.
///
/// # Errors
/// If TLS cannot be set up, for want of any trusted certificate authority.
pub fn http_client(
    guard: Arc<EgressGuard>,
    connect: Duration,
    total: Duration,
) -> Result<reqwest::Client, reqwest::Error> {
    install_crypto_provider();
    reqwest::Client::builder()
        .dns_resolver(Arc::new(GuardedDns(guard)))
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .connect_timeout(connect)
        .timeout(total)
        .user_agent(concat!("postroom/", env!("CARGO_PKG_VERSION")))
        .build()
}

/// Makes ring the process-wide provider of rustls, unless one is installed. Needed before any TLS client is built.
pub fn install_crypto_provider() {
    // An error says that it has been done before.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The guard as resolver of the SMTP client.
impl crate::smtp::Resolver for EgressGuard {
    fn resolve<'a>(
        &'a self,
        host: &'a str,
        port: u16,
        trusted: bool,
    ) -> futures_util::future::BoxFuture<'a, Result<Vec<SocketAddr>, crate::smtp::Refusal>> {
        Box::pin(async move {
            Self::resolve(self, host, port, trusted).await.map_err(|error| {
                if error.is_transient() {
                    crate::smtp::Refusal::Lookup(error.to_string())
                } else {
                    crate::smtp::Refusal::Denied(error.to_string())
                }
            })
        })
    }
}

#[cfg(test)]
pub(crate) mod rebinding;

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(allow: &[&str]) -> EgressGuard {
        EgressGuard::new(config::Egress {
            allow: allow.iter().map(|net| net.parse().unwrap()).collect(),
        })
    }

    #[test]
    fn public_addresses_are_allowed() {
        for ip in [
            "1.1.1.1",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "198.20.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2001:4860:4860::8888",
            "::ffff:1.1.1.1",
            "64:ff9b::8.8.8.8",
        ] {
            assert_eq!(guard(&[]).check(ip.parse().unwrap()), Ok(()), "{ip}");
        }
    }

    #[test]
    fn inner_addresses_are_refused_and_the_refusal_names_the_setting() {
        for ip in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "100.100.100.200",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff::1",
            "5f00::1",
            "100::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::a00:1",
        ] {
            let error = guard(&[]).check(ip.parse().unwrap()).unwrap_err();
            assert!(
                error.to_string().contains("POSTROOM_EGRESS_ALLOW"),
                "{ip}: {error}"
            );
            assert!(!error.is_transient());
        }
    }

    #[test]
    fn an_allowed_network_is_allowed_in_its_mapped_form_too() {
        let guard = guard(&["10.0.0.0/8", "fd00::/8"]);
        for ip in ["10.9.8.7", "::ffff:10.9.8.7", "64:ff9b::10.9.8.7", "fd12::1"] {
            assert_eq!(guard.check(ip.parse().unwrap()), Ok(()), "{ip}");
        }
        assert!(guard.check("192.168.0.1".parse().unwrap()).is_err());
    }

    #[test]
    fn urls_with_an_inner_address_in_any_spelling_are_refused() {
        for url in [
            "http://127.0.0.1/",
            "http://0x7f.1/",
            "http://2130706433/",
            "http://0177.0.0.1:8080/",
            "http://017700000001/",
            "http://127.1/",
            "http://127.0.0.1./",
            "http://%31%32%37.0.0.1/",
            "http://①②⑦.⓪.⓪.①/",
            "http://example.com@127.0.0.1/",
            "http://127.0.0.1\\\\@example.com/",
            "http://1.1.1.1&@10.0.0.1:80#@8.8.8.8/",
            "http:10.0.0.1",
            "http://[::1]/",
            "http://[::]/",
            "http://[::ffff:7f00:1]/",
            "http://[::127.0.0.1]/",
            "http://[64:ff9b::7f00:1]/",
            "http://[64:ff9b:1::a00:1]/",
            "http://[2002:7f00:1::]/",
            "http://[fe80::1]/",
            "unix:///var/run/docker.sock",
            "gopher://example.com/",
            "https://[::ffff:169.254.169.254]/latest",
            "ftp://example.com/",
            "file:///etc/passwd",
        ] {
            assert!(guard(&[]).check_url(&url.parse().unwrap()).is_err(), "{url}");
        }
        assert_eq!(
            guard(&[]).check_url(&"https://example.com/a".parse().unwrap()),
            Ok(())
        );
    }

    #[tokio::test]
    async fn a_name_that_leads_inside_is_refused_unless_trusted_or_allowed() {
        let refused = guard(&[]).resolve("localhost", 25, false).await.unwrap_err();
        assert!(
            matches!(&refused, EgressError::Refused { host, .. } if host == "localhost"),
            "{refused:?}"
        );
        assert!(!refused.to_string().contains("127."), "{refused}");
        assert!(
            !guard(&[])
                .resolve("localhost", 25, true)
                .await
                .unwrap()
                .is_empty()
        );
        let allowed = guard(&["127.0.0.0/8", "::1/128"])
            .resolve("localhost", 25, false)
            .await
            .unwrap();
        assert_eq!(allowed[0].port(), 25);
        assert!(guard(&[]).resolve("[::1]", 25, false).await.is_err());
    }

    #[tokio::test]
    async fn a_host_of_an_smtp_server_leads_inside_in_no_spelling() {
        for host in [
            "127.0.0.1",
            "127.1",
            "0x7f.1",
            "0177.0.0.1",
            "2130706433",
            "0",
            "::1",
            "[::ffff:127.0.0.1]",
            "::ffff:7f00:1",
            "fe80::1%lo",
            "localhost.",
            "LOCALHOST",
            "/var/run/smtp.sock",
            "127.0.0.1:25",
            "user@127.0.0.1",
            "",
        ] {
            assert!(guard(&[]).resolve(host, 25, false).await.is_err(), "{host}");
        }
    }

    #[tokio::test]
    async fn the_http_client_does_not_connect_to_a_name_that_leads_inside() {
        let limit = Duration::from_secs(5);
        let client = http_client(Arc::new(guard(&[])), limit, limit).unwrap();
        let error = client.get("http://localhost:9/").send().await.unwrap_err();
        assert!(
            matches!(EgressError::find(&error), Some(EgressError::Refused { .. })),
            "{error:?}"
        );
    }
}
