//! Networks between a process and its servers.

use postroom_testkit::proxy::Proxy;
use url::Url;

/// A proxy in front of the server in this URL, and the URL through it.
pub(crate) async fn proxied(url: &str) -> (Proxy, String) {
    let mut url: Url = url.parse().unwrap();
    let port = url.port().unwrap();
    let proxy = Proxy::start(format!("{}:{port}", url.host_str().unwrap())).await;
    url.set_host(Some("127.0.0.1")).unwrap();
    url.set_port(Some(proxy.port())).unwrap();
    (proxy, url.to_string())
}
