//! The Message-ID: the same for every attempt at a job, unguessable for everybody else.

use std::fmt::Write as _;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::id::{JobId, TenantId};

/// The Message-ID with angle brackets (RFC 5322 §3.6.4): 128 bits of HMAC-SHA-256 over tenant, job and `born`, the
/// time of the job's first claim in milliseconds (an id may come back after the ledger has forgotten it). `domain` is
/// that of the author; in ASCII form.
#[must_use]
pub fn message_id(
    installation_secret: &[u8],
    tenant: &TenantId,
    job: &JobId,
    born: i64,
    domain: &str,
) -> String {
    #[expect(clippy::expect_used, reason = "HMAC takes keys of every length (RFC 2104 §2)")]
    let mut mac =
        Hmac::<Sha256>::new_from_slice(installation_secret).expect("HMAC takes a key of any length");
    for part in [tenant.as_str(), job.as_str()] {
        mac.update(&(part.len() as u64).to_be_bytes());
        mac.update(part.as_bytes());
    }
    mac.update(&born.to_be_bytes());
    let digest = mac.finalize().into_bytes();
    let domain = super::header::ascii_domain(domain);
    let mut id = String::with_capacity(36 + domain.len());
    id.push('<');
    for byte in &digest[..16] {
        let _ = write!(id, "{byte:02x}");
    }
    id.push('@');
    id.push_str(&domain);
    id.push('>');
    id
}
