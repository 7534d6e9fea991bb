//! `postroom healthcheck`: asks `/readyz` of the process in the same container.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::CliError;
use crate::config;

/// Below the usual time limit of container health checks.
const TIMEOUT: Duration = Duration::from_secs(4);

/// The process says that it is not ready.
#[derive(Debug, thiserror::Error)]
#[error("{status} from http://{addr}/readyz\n{body}")]
struct NotReady {
    addr: SocketAddr,
    status: reqwest::StatusCode,
    body: String,
}

/// Asks once.
pub(super) async fn run(config: &config::Telemetry, out: &mut dyn Write) -> Result<(), CliError> {
    let Some(addr) = config.http_addr.map(reachable) else {
        return Err(CliError::Usage(
            "POSTROOM_HTTP_ADDR is off: nothing can be asked".into(),
        ));
    };
    let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build()?;
    let response = client.get(format!("http://{addr}/readyz?verbose")).send().await?;
    let status = response.status();
    let body = response.text().await?;
    if !status.is_success() {
        return Err(NotReady {
            addr,
            status,
            body: body.trim_end().into(),
        }
        .into());
    }
    out.write_all(body.as_bytes())?;
    Ok(())
}

/// An address to connect to, for one to listen on.
fn reachable(addr: SocketAddr) -> SocketAddr {
    let ip = match addr.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, addr.port())
}
