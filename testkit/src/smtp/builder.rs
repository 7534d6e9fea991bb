//! How a test server is set up.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::{Script, SmtpServer};
use crate::tls::ServerCert;

/// TLS of a server.
#[derive(Debug, Clone, Default)]
pub enum TlsSetup {
    /// None.
    #[default]
    None,
    /// STARTTLS is offered.
    StartTls(ServerCert),
    /// TLS from the first byte.
    Implicit(ServerCert),
}

/// Settings of a server to be started.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "one switch per SMTP extension")]
pub struct Builder {
    pub(crate) bind: SocketAddr,
    pub(crate) tls: TlsSetup,
    pub(crate) users: Vec<(String, String)>,
    pub(crate) mechanisms: Vec<String>,
    pub(crate) auth_in_plain: bool,
    pub(crate) size: Option<u64>,
    pub(crate) pipelining: bool,
    pub(crate) eight_bit_mime: bool,
    pub(crate) smtputf8: bool,
    pub(crate) chunking: bool,
    pub(crate) offer_starttls: bool,
    pub(crate) keep_data: bool,
    pub(crate) trace: bool,
    pub(crate) latency: Option<Duration>,
    pub(crate) script: Arc<Script>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            tls: TlsSetup::None,
            users: Vec::new(),
            mechanisms: vec!["PLAIN".to_owned(), "LOGIN".to_owned()],
            auth_in_plain: true,
            size: None,
            pipelining: true,
            eight_bit_mime: true,
            smtputf8: true,
            chunking: false,
            offer_starttls: true,
            keep_data: true,
            trace: false,
            latency: None,
            script: Arc::default(),
        }
    }
}

macro_rules! switches {
    ($($(#[$doc:meta])+ $name:ident;)+) => {
        $($(#[$doc])+
        #[must_use]
        pub fn $name(mut self, on: bool) -> Self {
            self.$name = on;
            self
        })+
    };
}

impl Builder {
    switches! {
        /// PIPELINING (RFC 2920); on by default.
        pipelining;
        /// 8BITMIME (RFC 6152); on by default.
        eight_bit_mime;
        /// SMTPUTF8 (RFC 6531); on by default.
        smtputf8;
        /// CHUNKING (RFC 3030); off by default.
        chunking;
        /// Whether a server with STARTTLS announces it; off is what a stripping attacker leaves.
        offer_starttls;
        /// Whether AUTH is announced before TLS; on by default.
        auth_in_plain;
        /// Whether the bytes of mails are kept; switch off for benchmarks.
        keep_data;
        /// Whether [`SmtpServer::trace`] is recorded; off by default.
        trace;
    }

    /// Listens here instead of a free port of 127.0.0.1.
    #[must_use]
    pub fn bind(mut self, addr: SocketAddr) -> Self {
        self.bind = addr;
        self
    }

    /// Keeps replies back for this long, those that go out together only once: a server that is far away.
    #[must_use]
    pub fn latency(mut self, latency: Duration) -> Self {
        self.latency = Some(latency);
        self
    }

    /// TLS.
    #[must_use]
    pub fn tls(mut self, tls: TlsSetup) -> Self {
        self.tls = tls;
        self
    }

    /// Requires AUTH and accepts this user; may be called several times.
    #[must_use]
    pub fn auth(mut self, user: &str, password: &str) -> Self {
        self.users.push((user.to_owned(), password.to_owned()));
        self
    }

    /// The mechanisms announced, of PLAIN and LOGIN, or others to be refused.
    #[must_use]
    pub fn mechanisms(mut self, mechanisms: &[&str]) -> Self {
        self.mechanisms = mechanisms.iter().map(|&name| name.to_owned()).collect();
        self
    }

    /// SIZE (RFC 1870) with this limit in bytes.
    #[must_use]
    pub fn size(mut self, limit: u64) -> Self {
        self.size = Some(limit);
        self
    }

    /// What to do differently from a well-behaved server.
    #[must_use]
    pub fn script(mut self, script: Script) -> Self {
        self.script = Arc::new(script);
        self
    }

    /// Starts it.
    pub async fn start(self) -> SmtpServer {
        SmtpServer::start(self).await
    }
}
