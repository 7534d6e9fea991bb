//! Checking content by its digest.

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::memory::Held;
use crate::failure::{Class, Failure, Fault, Stage};
use crate::job::Attachment;

/// Content above this, in bytes, is hashed on a thread for blocking work.
const HASH_INLINE: usize = 256 << 10;

/// Content with its digest, if that was needed so far.
pub(super) struct Content {
    /// The content.
    pub(super) bytes: Bytes,
    /// Its share of the memory.
    pub(super) held: Option<Held>,
    /// Its digest, if known.
    pub(super) digest: Option<[u8; 32]>,
}

/// Checks the content against the digest in the job, if there is one.
pub(super) async fn verified(
    attachment: &Attachment,
    bytes: Bytes,
    held: Option<Held>,
) -> Result<Content, Failure> {
    let digest = match attachment.sha256 {
        None => None,
        Some(expected) if sha256(&bytes).await? == expected => Some(expected),
        Some(_) => {
            return Err(Failure::permanent(
                Class::Content,
                Fault::Sender,
                Stage::Fetch,
                "attachment_digest_mismatch",
                format!(
                    "the content of `{}` does not have the sha256 given in the job",
                    attachment.filename
                ),
            )
            .naming_a_file());
        }
    };
    Ok(Content { bytes, held, digest })
}

/// The digest, computed where it does not hold up other jobs.
pub(super) async fn sha256(bytes: &Bytes) -> Result<[u8; 32], Failure> {
    if bytes.len() <= HASH_INLINE {
        return Ok(Sha256::digest(bytes).into());
    }
    let bytes = bytes.clone();
    tokio::task::spawn_blocking(move || Sha256::digest(&bytes).into())
        .await
        .map_err(|_| {
            Failure::transient(
                Class::Local,
                Fault::Us,
                Stage::Fetch,
                "shutting_down",
                "the worker is stopping",
            )
        })
}
