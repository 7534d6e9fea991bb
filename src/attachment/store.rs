//! The object store for large attachments: S3, Google Cloud Storage, Azure, or a local folder that a web server gives
//! out. Keys are made of tenant and content, so that a repeat uploads nothing twice within a day.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use object_store::path::Path;
use object_store::signer::{Method, SignedUrlOptions, Signer};
use object_store::{
    Attribute, Attributes, Error, MultipartUpload, ObjectStore, ObjectStoreExt, PutMultipartOptions,
    PutOptions, PutPayload,
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use url::Url;

use crate::failure::{Class, Failure, Fault, Stage};
use crate::id::TenantId;

mod open;

pub use open::StorageError;

/// Files above this go up in parts of this size, in bytes.
const PART: usize = 8 << 20;

/// Time limit of a call that moves no content.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Time limit of one upload of at most [`PART`] bytes, tries included.
const PART_TIMEOUT: Duration = Duration::from_mins(2);

/// Object written by [`Store::check`].
const PROBE: &str = ".postroom-check";

/// Unreserved characters of RFC 5987 §3.2.1.
const ATTRIBUTE: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Age from which an object is written again though it is there. Lifecycle rules of buckets count from the last write: a new
/// link must live as long as one to a new object.
const FRESH: Duration = Duration::from_hours(24);

/// Longest file name at the end of a public key.
const MAX_NAME: usize = 100;

/// The configured place for large files.
#[derive(Debug, Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    signer: Option<Arc<dyn Signer>>,
    /// Whether the store keeps Content-Type and Content-Disposition.
    keeps_attributes: bool,
    prefix: Path,
    public_url: Option<Url>,
    link_lifetime: Duration,
    /// Whether presigned links are signed with credentials that expire by themselves.
    temporary_credentials: bool,
}

/// A file to upload.
#[derive(Debug, Clone, Copy)]
pub(super) struct File<'a> {
    /// Name shown to the reader.
    pub(super) filename: &'a str,
    /// Media type.
    pub(super) content_type: &'a str,
    /// The content.
    pub(super) bytes: &'a Bytes,
}

/// Whether an upload was needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    /// It was.
    New,
    /// The file was there, and written lately.
    Present,
}

impl Stored {
    /// The label in metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::New => "stored",
            Self::Present => "present",
        }
    }
}

impl Store {
    /// The key of a file, below the prefix of `POSTROOM_STORAGE_URL`: tenant, digest and, for links through a public
    /// base that adds no Content-Disposition, the name. ASCII only.
    pub(super) fn key(&self, tenant: &TenantId, digest: &[u8; 32], filename: &str) -> String {
        let mut key = String::with_capacity(tenant.as_str().len() + 70);
        let _ = write!(key, "{tenant}/{:02x}/", digest[0]);
        for byte in digest {
            let _ = write!(key, "{byte:02x}");
        }
        if self.public_url.is_some() {
            key.push('/');
            key.push_str(&safe_name(filename));
        }
        key
    }

    /// Puts a file in its place, unless it has been put there lately.
    pub(super) async fn put(&self, key: &str, file: &File<'_>) -> Result<Stored, Failure> {
        let path = self.path(key);
        if self.has_fresh(&path, file.bytes.len() as u64).await? {
            return Ok(Stored::Present);
        }
        let attributes = self.attributes(file);
        if file.bytes.len() > PART {
            self.put_parts(&path, file.bytes, attributes).await?;
        } else {
            self.put_whole(&path, file.bytes, attributes).await?;
        }
        Ok(Stored::New)
    }

    /// The address for the reader, and when it stops working.
    pub(super) async fn link(
        &self,
        key: &str,
        filename: &str,
    ) -> Result<(String, Option<Timestamp>), Failure> {
        if let Some(base) = &self.public_url {
            return Ok((self.public_link(base, key), None));
        }
        let Some(signer) = &self.signer else {
            return Err(failure(
                "the object store cannot make links and has no public address",
            ));
        };
        let path = self.path(key);
        let expires_at = Timestamp::now() + self.link_lifetime;
        // Whoever uploaded the same content before may have called it otherwise. Azure signs no such query: there the
        // name of the last upload holds.
        let options =
            SignedUrlOptions::new().with_query([("response-content-disposition", disposition(filename))]);
        let link = timed(
            CALL_TIMEOUT,
            signer.signed_url_opts(Method::GET, &path, self.link_lifetime, &options),
        );
        let url = match link.await? {
            Err(Error::NotSupported { .. } | Error::NotImplemented { .. }) => {
                timed(
                    CALL_TIMEOUT,
                    signer.signed_url(Method::GET, &path, self.link_lifetime),
                )
                .await?
            }
            other => other,
        };
        let url = url.map_err(|error| unavailable("sign", &error))?;
        Ok((url.into(), Some(expires_at)))
    }

    /// Below the address of the bucket, where the object has its prefix too.
    fn public_link(&self, base: &Url, key: &str) -> String {
        let mut link = base.clone();
        if let Ok(mut path) = link.path_segments_mut() {
            path.pop_if_empty().extend(self.path(key).parts());
        }
        link.into()
    }

    /// Whether links stop working before their time: a presigned link dies with the session that signed it.
    #[must_use]
    pub fn links_die_early(&self) -> bool {
        self.temporary_credentials && self.public_url.is_none()
    }

    /// Whether files can be written, by writing a small one.
    pub(super) async fn check(&self) -> Result<(), StorageError> {
        let path = self.path(PROBE);
        let put = self.objects.put(&path, PutPayload::from_static(b"postroom"));
        match tokio::time::timeout(CALL_TIMEOUT, put).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(StorageError::Unreachable(redacted(&error))),
            Err(_) => Err(StorageError::Unreachable("no answer in time".to_owned())),
        }
    }

    fn path(&self, key: &str) -> Path {
        self.prefix
            .parts()
            .chain(key.split('/').map(Into::into))
            .collect()
    }

    /// Whether there is an object of this size that was written lately.
    async fn has_fresh(&self, path: &Path, size: u64) -> Result<bool, Failure> {
        match timed(CALL_TIMEOUT, self.objects.head(path)).await? {
            Ok(meta) => {
                let age = Timestamp::now().as_second() - meta.last_modified.timestamp();
                Ok(meta.size == size && age < FRESH.as_secs() as i64)
            }
            // Without the right to list, S3 says "denied" of what is not there.
            Err(Error::NotFound { .. } | Error::PermissionDenied { .. }) => Ok(false),
            Err(error) => Err(unavailable("head", &error)),
        }
    }

    /// Never on condition that nothing is there: some S3 servers refuse that, and the digest in the key makes sure that
    /// only the same content is overwritten.
    async fn put_whole(&self, path: &Path, bytes: &Bytes, attributes: Attributes) -> Result<(), Failure> {
        let options = PutOptions::from(attributes);
        let put = self
            .objects
            .put_opts(path, PutPayload::from(bytes.clone()), options);
        let done = timed(PART_TIMEOUT, put).await?;
        done.map(drop).map_err(|error| unavailable("put", &error))
    }

    async fn put_parts(&self, path: &Path, bytes: &Bytes, attributes: Attributes) -> Result<(), Failure> {
        let options = PutMultipartOptions {
            attributes,
            ..PutMultipartOptions::default()
        };
        let mut upload = timed(CALL_TIMEOUT, self.objects.put_multipart_opts(path, options))
            .await?
            .map_err(|error| unavailable("begin", &error))?;
        let result = send_parts(upload.as_mut(), bytes).await;
        if result.is_err() {
            // What cannot be taken back now is left to the lifecycle rule of the bucket.
            let _ = tokio::time::timeout(CALL_TIMEOUT, upload.abort()).await;
        }
        result
    }

    fn attributes(&self, file: &File<'_>) -> Attributes {
        let mut attributes = Attributes::new();
        if self.keeps_attributes {
            attributes.insert(Attribute::ContentType, file.content_type.to_owned().into());
            attributes.insert(Attribute::ContentDisposition, disposition(file.filename).into());
        }
        attributes
    }
}

async fn send_parts(upload: &mut dyn MultipartUpload, bytes: &Bytes) -> Result<(), Failure> {
    let mut offset = 0;
    while offset < bytes.len() {
        let end = bytes.len().min(offset + PART);
        let part = upload.put_part(PutPayload::from(bytes.slice(offset..end)));
        timed(PART_TIMEOUT, part)
            .await?
            .map_err(|error| unavailable("part", &error))?;
        offset = end;
    }
    let done = timed(CALL_TIMEOUT, upload.complete()).await?;
    done.map(drop).map_err(|error| unavailable("complete", &error))
}

/// Content-Disposition for HTTP (RFC 6266): a plain name for old readers, the exact one after it.
fn disposition(filename: &str) -> String {
    let exact = utf8_percent_encode(filename, ATTRIBUTE);
    format!(
        "attachment; filename=\"{}\"; filename*=UTF-8''{exact}",
        safe_name(filename)
    )
}

/// The name in characters that mean nothing anywhere, its extension kept.
fn safe_name(filename: &str) -> String {
    let safe = |c: char| {
        if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') {
            c
        } else {
            '_'
        }
    };
    let count = filename.chars().count();
    let name: String = filename
        .chars()
        .skip(count.saturating_sub(MAX_NAME))
        .map(safe)
        .collect();
    let name = name.trim_start_matches('.');
    if name.is_empty() {
        "file".to_owned()
    } else {
        name.to_owned()
    }
}

async fn timed<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<Result<T, Error>, Failure> {
    tokio::time::timeout(limit, call)
        .await
        .map_err(|_| failure("the object store did not answer in time"))
}

fn unavailable(call: &'static str, error: &Error) -> Failure {
    tracing::warn!(call, error = %redacted(error), "the object store refused or could not be reached");
    failure("the object store could not be reached or refused")
}

fn failure(message: &str) -> Failure {
    Failure::transient(
        Class::Local,
        Fault::Us,
        Stage::Upload,
        "storage_unavailable",
        message,
    )
}

/// The text of an error without the queries of URLs, which may hold signatures.
fn redacted(error: &Error) -> String {
    let mut out = String::new();
    for word in error.to_string().split_inclusive(char::is_whitespace) {
        match word.split_once('?') {
            Some((before, _)) if before.contains("://") => {
                out.push_str(before);
                out.push_str("?… ");
            }
            _ => out.push_str(word),
        }
        if out.len() > 500 {
            out.push('…');
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_gets_a_plain_and_an_exact_name() {
        assert_eq!(
            disposition("Bilanz \"Ü\" 2026.pdf"),
            "attachment; filename=\"Bilanz___2026.pdf\"; filename*=UTF-8''Bilanz%20%22%C3%9C%22%202026.pdf"
                .replace("Bilanz___", "Bilanz_____")
        );
    }

    #[test]
    fn public_names_hold_nothing_that_means_something_in_a_path() {
        for (name, safe) in [
            ("report.pdf", "report.pdf"),
            ("../../etc/passwd", "_.._etc_passwd"),
            ("..", "file"),
            ("", "file"),
            ("a?b#c%.txt", "a_b_c_.txt"),
        ] {
            assert_eq!(safe_name(name), safe);
        }
        assert_eq!(
            safe_name(&format!("{}.pdf", "x".repeat(300))),
            format!("{}.pdf", "x".repeat(96))
        );
    }

    #[test]
    fn errors_are_shown_without_queries() {
        let error = Error::Generic {
            store: "x",
            source: "at https://h/p?sig=secret failed".into(),
        };
        let text = redacted(&error);
        assert!(
            text.contains("https://h/p?…") && !text.contains("secret"),
            "{text}"
        );
    }
}
