//! Files with certificate authorities.

use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// Checks that a text is PEM with at least one certificate, and that each can be a trust anchor.
///
/// # Errors
/// Says which certificate is wrong.
pub fn check_authorities(pem: &[u8]) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    for (index, certificate) in CertificateDer::pem_slice_iter(pem).enumerate() {
        let number = index + 1;
        let certificate = certificate.map_err(|error| format!("certificate {number}: {error}"))?;
        roots
            .add(certificate)
            .map_err(|error| format!("certificate {number}: {error}"))?;
    }
    if roots.is_empty() {
        return Err("no certificate found: expected PEM (`-----BEGIN CERTIFICATE-----`)".to_owned());
    }
    Ok(())
}

/// The same of a file.
pub(super) fn check_file(path: &Path) -> Result<(), String> {
    if !path.is_file() {
        return Err("no such file".to_owned());
    }
    let pem = std::fs::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    check_authorities(&pem)
}
