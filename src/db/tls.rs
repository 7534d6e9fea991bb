//! TLS to Postgres, by rustls: the system's certificate authorities and those of `POSTROOM_DATABASE_CA_FILE`.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::DbError;

/// What a server's certificate must prove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Proof {
    /// Nothing (`sslmode=prefer` without a CA).
    Nothing,
    /// That a trusted authority signed it.
    Chain,
    /// That and the host's name.
    ChainAndName,
}

/// The connector for tokio-postgres.
pub(super) fn connector(proof: Proof, ca_files: &[&Path]) -> Result<MakeRustlsConnect, DbError> {
    let provider = Arc::new(ring::default_provider());
    let setup = |error: Error| DbError::Setup(error.to_string());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(setup)?;
    let config = match proof {
        Proof::ChainAndName => builder
            .with_root_certificates(roots(ca_files)?)
            .with_no_client_auth(),
        Proof::Nothing | Proof::Chain => {
            let chain = match proof {
                Proof::Nothing => None,
                _ => Some(
                    WebPkiServerVerifier::builder_with_provider(
                        Arc::new(roots(ca_files)?),
                        Arc::clone(&provider),
                    )
                    .build()
                    .map_err(|error| DbError::Setup(error.to_string()))?,
                ),
            };
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Lenient { chain, provider }))
                .with_no_client_auth()
        }
    };
    Ok(MakeRustlsConnect::new(config))
}

/// The system's authorities plus those in the files. A system without any is fine if a file names some.
fn roots(ca_files: &[&Path]) -> Result<RootCertStore, DbError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    for path in ca_files {
        let refuse = |reason: String| DbError::CaFile {
            path: path.display().to_string(),
            reason,
        };
        let before = roots.len();
        for certificate in CertificateDer::pem_file_iter(path).map_err(|error| refuse(error.to_string()))? {
            let certificate = certificate.map_err(|error| refuse(error.to_string()))?;
            roots
                .add(certificate)
                .map_err(|error| refuse(error.to_string()))?;
        }
        if roots.len() == before {
            return Err(refuse("holds no certificate in PEM form".into()));
        }
    }
    if roots.is_empty() {
        return Err(DbError::Setup(
            "no certificate authorities on this system: install ca-certificates or set POSTROOM_DATABASE_CA_FILE".into(),
        ));
    }
    Ok(roots)
}

/// Checks less than rustls would: the chain without the name (`verify-ca`), or nothing (`prefer`).
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(chain) = &self.chain else {
            return Ok(ServerCertVerified::assertion());
        };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The name is compared last: the chain has been found good before.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
