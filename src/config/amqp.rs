//! The URL of the broker.

use lapin::uri::AMQPUri;
use url::{Host, Url};

/// Reads `amqp[s]://user:password@host:port/vhost`; `None` if it is none. No error quotes it: it holds the password.
#[must_use]
pub fn amqp_uri(text: &str) -> Option<AMQPUri> {
    let parsed = Url::parse(text).ok()?;
    let mut uri: AMQPUri = text.parse().ok()?;
    // AMQPUri takes names only and would fall back to localhost.
    if let Host::Ipv6(address) = parsed.host()? {
        uri.authority.host = address.to_string();
    }
    if uri.vhost.is_empty() {
        "/".clone_into(&mut uri.vhost);
    }
    Some(uri)
}
