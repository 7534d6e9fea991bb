//! One connection to the broker: URL, TLS, heartbeat, time limits.

use std::path::Path;
use std::time::Duration;

use lapin::tcp::OwnedTLSConfig;
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::timeout;

use super::BrokerError;
use crate::config;

/// TCP connect, TLS, AMQP handshake and login together.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// An orderly close; past it the socket is simply dropped.
const CLOSE_LIMIT: Duration = Duration::from_secs(3);
/// Seconds between heartbeats when the URL does not say; a dead peer is noticed after two of them.
const HEARTBEAT: u16 = 20;

/// Connects, within a time limit. `purpose` (`consume`, `publish`, `topology`) is shown by the management UI.
///
/// # Errors
/// [`BrokerError::Url`] and [`BrokerError::CaFile`] are the operator's; the others may pass by themselves.
pub async fn connect(config: &config::Broker, purpose: &str) -> Result<Connection, BrokerError> {
    let uri = parse_url(&config.url)?;
    let tls = OwnedTLSConfig {
        identity: None,
        cert_chain: match &config.ca_file {
            Some(path) => Some(read_ca_file(path).await?),
            None => None,
        },
    };
    let host = format!("{}:{}", uri.authority.host, uri.authority.port);
    let properties = ConnectionProperties::default()
        .with_connection_name(format!("postroom {purpose} {}", std::process::id()).into())
        .with_client_property("product".into(), "postroom".into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
    let runtime = lapin::runtime::default_runtime().map_err(BrokerError::Amqp)?;
    // Boxed: lapin's connect future is tens of kilobytes.
    let connecting = Box::pin(Connection::connect_uri_with_config(uri, properties, tls, runtime));
    match timeout(CONNECT_LIMIT, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(source)) => Err(BrokerError::Connect { host, source }),
        Err(_) => Err(BrokerError::ConnectTimeout {
            host,
            limit: CONNECT_LIMIT,
        }),
    }
}

/// Closes in order if the peer still answers.
pub async fn close(connection: &Connection) {
    let _ = timeout(CLOSE_LIMIT, connection.close(200, "bye".into())).await;
}

/// The virtual host an AMQP URL names.
///
/// # Errors
/// If the URL is not one.
pub fn vhost(url: &SecretString) -> Result<String, BrokerError> {
    Ok(parse_url(url)?.vhost)
}

/// The errors never quote the URL: it holds the password.
fn parse_url(url: &SecretString) -> Result<AMQPUri, BrokerError> {
    let mut uri = config::amqp_uri(url.expose_secret()).ok_or(BrokerError::Url)?;
    uri.query.heartbeat.get_or_insert(HEARTBEAT);
    Ok(uri)
}

async fn read_ca_file(path: &Path) -> Result<String, BrokerError> {
    tokio::fs::read_to_string(path)
        .await
        .map_err(|source| BrokerError::CaFile {
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Result<AMQPUri, BrokerError> {
        parse_url(&SecretString::from(url))
    }

    #[test]
    fn a_url_gives_host_vhost_and_heartbeat() {
        let uri = parsed("amqps://user:p%40ss@mq.example/orders").unwrap();
        assert_eq!(uri.authority.host, "mq.example");
        assert_eq!(uri.authority.port, 5671);
        assert_eq!(uri.authority.userinfo.password, "p@ss");
        assert_eq!(uri.vhost, "orders");
        assert_eq!(uri.query.heartbeat, Some(HEARTBEAT));
        assert_eq!(parsed("amqp://mq/?heartbeat=5").unwrap().query.heartbeat, Some(5));
    }

    #[test]
    fn an_absent_or_empty_path_is_the_default_vhost() {
        assert_eq!(parsed("amqp://mq").unwrap().vhost, "/");
        assert_eq!(parsed("amqp://mq/").unwrap().vhost, "/");
        assert_eq!(parsed("amqp://mq/%2f").unwrap().vhost, "/");
    }

    #[test]
    fn an_ipv6_host_is_kept() {
        assert_eq!(parsed("amqp://[::1]:5672").unwrap().authority.host, "::1");
        assert_eq!(parsed("amqp://127.0.0.1").unwrap().authority.host, "127.0.0.1");
    }

    #[test]
    fn an_invalid_url_is_not_quoted() {
        for bad in ["http://user:secret@mq", "secret", "amqp:secret"] {
            let error = parsed(bad).unwrap_err().to_string();
            assert!(error.contains("POSTROOM_AMQP_URL"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
