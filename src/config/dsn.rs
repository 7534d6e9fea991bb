//! The URL of Postgres. Takes `sslmode` and `sslrootcert` out of it: the driver does not know `verify-ca`, `verify-full` and
//! `sslrootcert`, though managed Postgres services hand out URLs with them. And looks whether the URL says which servers
//! will do.

use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use tokio_postgres::{Config, Error};

/// How much TLS the URL asks for, in the words of libpq.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// Never.
    Disable,
    /// If the server offers it; without a CA the certificate is not checked, as with libpq: whoever can forge it
    /// could as well strip TLS.
    Prefer,
    /// Always, chain checked, name not.
    VerifyCa,
    /// Always, chain and name checked. `require` means this too: encryption to nobody in particular is none.
    VerifyFull,
}

/// A URL without its TLS parameters, and those.
pub struct Dsn {
    /// What the driver may read.
    url: String,
    /// `sslmode`, if given.
    pub mode: Option<SslMode>,
    /// `sslrootcert`, if given and not `system`.
    pub root_cert: Option<PathBuf>,
    /// Whether it has a `target_session_attrs`.
    pub has_target: bool,
}

impl std::fmt::Debug for Dsn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL holds the password.
        f.debug_struct("Dsn")
            .field("mode", &self.mode)
            .field("root_cert", &self.root_cert)
            .field("has_target", &self.has_target)
            .finish_non_exhaustive()
    }
}

impl Dsn {
    /// Splits a `postgres://` URL.
    ///
    /// # Errors
    /// Says what is wrong, never what stands there: it may hold a password.
    pub fn parse(url: &str) -> Result<Self, String> {
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err("must begin with postgres:// or postgresql://".into());
        }
        // The password may hold a question mark, and a parameter an `@`: as for the driver, it ends at the first `@`.
        let host = url.find('@').unwrap_or(0);
        let Some(query_at) = url[host..].find('?').map(|at| host + at) else {
            return Ok(Self {
                url: url.into(),
                mode: None,
                root_cert: None,
                has_target: false,
            });
        };
        let (base, query) = (&url[..query_at], &url[query_at + 1..]);
        let (mut mode, mut root_cert, mut has_target, mut kept) = (None, None, false, Vec::new());
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("sslmode", value)) => mode = Some(ssl_mode(value)?),
                Some(("sslrootcert", "system")) => {}
                Some(("sslrootcert", value)) => {
                    root_cert = Some(PathBuf::from(
                        percent_decode_str(value).decode_utf8_lossy().as_ref(),
                    ));
                }
                Some(("sslcert" | "sslkey" | "sslpassword", _)) => {
                    return Err("client certificates are not supported; use a password".into());
                }
                other => {
                    has_target |= other.is_some_and(|(name, _)| name == "target_session_attrs");
                    kept.push(pair);
                }
            }
        }
        let separator = if kept.is_empty() { "" } else { "?" };
        Ok(Self {
            url: format!("{base}{separator}{}", kept.join("&")),
            mode,
            root_cert,
            has_target,
        })
    }

    /// The rest as the driver reads it.
    ///
    /// # Errors
    /// Says which parameter it does not take, or that there is no host.
    pub fn for_driver(&self) -> Result<Config, String> {
        let config: Config = self.url.parse().map_err(|error| self.refused(&error))?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err("names no host".into());
        }
        Ok(config)
    }

    /// The driver quotes names of parameters: what follows an `@` in a password that is not encoded would be taken for some.
    fn refused(&self, error: &Error) -> String {
        if self.url.matches('@').count() > 1 {
            return "cannot be read: an `@` in user name or password is written %40".into();
        }
        std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
    }
}

fn ssl_mode(value: &str) -> Result<SslMode, String> {
    match value {
        "disable" => Ok(SslMode::Disable),
        "allow" | "prefer" => Ok(SslMode::Prefer),
        "verify-ca" => Ok(SslMode::VerifyCa),
        "require" | "verify-full" => Ok(SslMode::VerifyFull),
        _ => Err("sslmode must be disable, prefer, require, verify-ca or verify-full".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Dsn {
        Dsn::parse(url).unwrap()
    }

    #[test]
    fn tls_parameters_are_taken_out_and_the_rest_is_kept() {
        let dsn =
            parse("postgres://u:p@h/db?sslmode=verify-ca&connect_timeout=3&sslrootcert=%2Fetc%2Fca.pem");
        assert_eq!(dsn.url, "postgres://u:p@h/db?connect_timeout=3");
        assert_eq!(dsn.mode, Some(SslMode::VerifyCa));
        assert_eq!(dsn.root_cert, Some("/etc/ca.pem".into()));
        assert_eq!(parse("postgres://h/db?sslmode=require").url, "postgres://h/db");
    }

    #[test]
    fn what_the_url_says_about_the_server_is_kept_and_known() {
        let dsn = parse("postgres://a,b/db?target_session_attrs=any");
        assert_eq!(dsn.url, "postgres://a,b/db?target_session_attrs=any");
        assert!(dsn.has_target);
        assert!(!parse("postgres://a,b/db?sslmode=disable").has_target);
    }

    #[test]
    fn require_verifies() {
        assert_eq!(
            parse("postgres://h/?sslmode=require").mode,
            Some(SslMode::VerifyFull)
        );
    }

    #[test]
    fn the_system_store_is_no_file() {
        assert_eq!(parse("postgres://h/?sslrootcert=system").root_cert, None);
    }

    #[test]
    fn a_password_with_a_question_mark_is_left_alone() {
        let dsn = parse("postgres://u:a?sslmode=disable@h/db");
        assert_eq!(dsn.url, "postgres://u:a?sslmode=disable@h/db");
        assert_eq!(dsn.mode, None);
    }

    #[test]
    fn an_at_sign_in_a_parameter_does_not_hide_the_sslmode() {
        let dsn = parse("postgres://u:p@db/mail?sslmode=require&application_name=postroom@eu");
        assert_eq!(dsn.mode, Some(SslMode::VerifyFull));
        assert_eq!(dsn.url, "postgres://u:p@db/mail?application_name=postroom@eu");
        let config = dsn.for_driver().unwrap();
        assert_eq!(config.get_application_name(), Some("postroom@eu"));
        assert_eq!(
            config.get_hosts(),
            [tokio_postgres::config::Host::Tcp("db".into())]
        );
    }

    #[test]
    fn what_is_refused_does_not_show_the_password() {
        for url in [
            "mysql://u:hunter2@h/",
            "postgres://u:hunter2@h/?sslmode=on",
            "postgres://u:hunter2@h/?sslkey=k",
        ] {
            let error = Dsn::parse(url).unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn what_the_driver_cannot_use_is_named_without_the_password() {
        for (url, why) in [
            ("postgres://u:hunter2@h:99999/d", "`port`"),
            ("postgres://u:hunter2@h/d?foo=1", "`foo`"),
            (
                "postgres://u:hunter2@h/d?connect_timeout=soon",
                "`connect_timeout`",
            ),
            ("postgres://u:x@y?hunter2=z@h/d", "%40"),
            ("postgres:///d", "no host"),
        ] {
            let error = parse(url).for_driver().unwrap_err();
            assert!(
                error.contains(why) && !error.contains("hunter2"),
                "{url}: {error}"
            );
        }
        assert!(parse("postgres:///d?host=/run/postgresql").for_driver().is_ok());
        assert!(!format!("{:?}", parse("postgres://u:hunter2@h/d")).contains("hunter2"));
    }
}
