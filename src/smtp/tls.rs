//! TLS to SMTP servers: whom to trust.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

/// Configurations kept for accounts with authorities of their own.
const MAX_CACHED: usize = 256;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsSetupError {
    /// `POSTROOM_SMTP_CA_FILE` cannot be read.
    #[error("POSTROOM_SMTP_CA_FILE: cannot read certificates from {path}: {reason}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The account's own authorities cannot be read.
    #[error("the account's CA certificates cannot be read: {0}; set them again with `account set --ca-file`")]
    AccountCa(String),
    /// The host is no name a certificate can be for.
    #[error("`{host}` is no name a certificate can be for: {reason}")]
    Host {
        /// The host.
        host: String,
        /// What is wrong with it.
        reason: InvalidDnsNameError,
    },
    /// rustls refuses its own defaults.
    #[error("TLS cannot be set up: {0}")]
    Rustls(#[from] rustls::Error),
}

/// The TLS side of all connections of a process. Sessions are resumed per set of authorities.
#[derive(Debug)]
pub(super) struct Tls {
    roots: RootCertStore,
    default: Arc<ClientConfig>,
    by_ca: Mutex<HashMap<Arc<str>, Arc<ClientConfig>>>,
}

impl Tls {
    /// Loads the system's authorities and those of `ca_file`.
    pub(super) fn new(ca_file: Option<&Path>) -> Result<Self, TlsSetupError> {
        let mut roots = RootCertStore::empty();
        // Some of a system's certificates may be unreadable; with none at all, handshakes fail and say so.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(path) = ca_file {
            let failed = |reason: String| TlsSetupError::CaFile {
                path: path.to_owned(),
                reason,
            };
            let pem = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
            add_pem(&mut roots, &pem).map_err(failed)?;
        }
        Ok(Self {
            default: client_config(roots.clone())?,
            roots,
            by_ca: Mutex::default(),
        })
    }

    /// What connects to `host`, trusting the account's authorities too.
    pub(super) fn connector(
        &self,
        host: &str,
        ca_pem: Option<&Arc<str>>,
    ) -> Result<(TlsConnector, ServerName<'static>), TlsSetupError> {
        let name = ServerName::try_from(host.to_owned()).map_err(|reason| TlsSetupError::Host {
            host: host.to_owned(),
            reason,
        })?;
        let config = match ca_pem {
            None => Arc::clone(&self.default),
            Some(pem) => self.with_ca(pem)?,
        };
        Ok((TlsConnector::from(config), name))
    }

    fn with_ca(&self, pem: &Arc<str>) -> Result<Arc<ClientConfig>, TlsSetupError> {
        let mut by_ca = self.by_ca.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = by_ca.get(pem) {
            return Ok(Arc::clone(config));
        }
        let mut roots = self.roots.clone();
        add_pem(&mut roots, pem.as_bytes()).map_err(TlsSetupError::AccountCa)?;
        let config = client_config(roots)?;
        if by_ca.len() >= MAX_CACHED {
            by_ca.clear();
        }
        by_ca.insert(Arc::clone(pem), Arc::clone(&config));
        Ok(config)
    }
}

fn add_pem(roots: &mut RootCertStore, pem: &[u8]) -> Result<(), String> {
    let before = roots.len();
    for cert in CertificateDer::pem_slice_iter(pem) {
        let cert = cert.map_err(|error| error.to_string())?;
        roots.add(cert).map_err(|error| error.to_string())?;
    }
    if roots.len() == before {
        return Err("no certificate in it".to_owned());
    }
    Ok(())
}

fn client_config(roots: RootCertStore) -> Result<Arc<ClientConfig>, TlsSetupError> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_file_without_certificates_is_refused_by_name() {
        let dir = std::env::temp_dir().join(format!("postroom-ca-{}", std::process::id()));
        std::fs::write(&dir, "nothing").unwrap();
        let error = Tls::new(Some(&dir)).unwrap_err().to_string();
        std::fs::remove_file(&dir).unwrap();
        assert!(error.starts_with("POSTROOM_SMTP_CA_FILE"), "{error}");
        assert!(Tls::new(Some(Path::new("/nowhere"))).is_err());
    }

    #[test]
    fn configurations_are_shared_between_connections_with_the_same_authorities() {
        let tls = Tls::new(None).unwrap();
        let pem: Arc<str> = postroom_testkit::tls::TestCa::new().ca_pem().into();
        let same: Arc<str> = (*pem).into();
        assert!(Arc::ptr_eq(
            &tls.with_ca(&pem).unwrap(),
            &tls.with_ca(&same).unwrap()
        ));
        assert!(tls.connector("localhost", Some(&"junk".into())).is_err());
        assert!(tls.connector("not a name", None).is_err());
    }
}
