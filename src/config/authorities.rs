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
    check_authorities(&read(path)?)
}

/// Checks that a file has a certificate that can be a trust anchor: what else it has, the client of RabbitMQ passes over.
pub(super) fn check_file_for_amqp(path: &Path) -> Result<(), String> {
    let pem = read(path)?;
    let certificates = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok);
    match RootCertStore::empty().add_parsable_certificates(certificates) {
        (0, _) => check_authorities(&pem),
        _ => Ok(()),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    if !path.is_file() {
        return Err("no such file".to_owned());
    }
    std::fs::read(path).map_err(|error| format!("cannot be read: {error}"))
}
