//! From the bytes on the wire to the plain JSON: size, encoding, decompression, each bounded. And the way back.

use std::borrow::Cow;
use std::io::{self, BufRead, Read};

use flate2::Compression;
use flate2::bufread::{GzEncoder, MultiGzDecoder, ZlibDecoder};

use super::decode::{Incoming, RejectReason};
use super::errors::excerpt;
use crate::config::JobLimits;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Why a body cannot be had.
pub(super) type Trouble = (RejectReason, String);

enum Coding {
    Plain,
    Gzip,
    /// kombu calls it `application/x-gzip`, but writes zlib (RFC 1950).
    ZlibOrGzip,
}

/// The body, decompressed if it came compressed.
pub(super) fn plain<'a>(incoming: &Incoming<'a>, limits: &JobLimits) -> Result<Cow<'a, [u8]>, Trouble> {
    let body = incoming.body;
    if body.len() > limits.max_bytes {
        return Err((
            RejectReason::TooLarge,
            format!("has {} bytes; at most {}", body.len(), limits.max_bytes),
        ));
    }
    let max = limits.max_inflated;
    match coding(incoming)? {
        Coding::Plain if body.len() > max => Err(too_large(max)),
        Coding::Plain => Ok(Cow::Borrowed(body)),
        Coding::ZlibOrGzip if !body.starts_with(&GZIP_MAGIC) => zlib(body, max).map(Cow::Owned),
        Coding::Gzip | Coding::ZlibOrGzip => {
            read(MultiGzDecoder::new(body), body.len(), max, "gzip").map(Cow::Owned)
        }
    }
}

/// Plain JSON as it can be published with the content encoding `gzip`.
///
/// # Errors
/// None: what it reads is in memory.
pub fn gzip(plain: &[u8]) -> io::Result<Vec<u8>> {
    let mut packed = Vec::new();
    GzEncoder::new(plain, Compression::default()).read_to_end(&mut packed)?;
    Ok(packed)
}

/// What `content_encoding` and kombu's `compression` header say.
fn coding(incoming: &Incoming<'_>) -> Result<Coding, Trouble> {
    let refused = |message: String| Err((RejectReason::BadEncoding, message));
    let encoding = incoming
        .content_encoding
        .unwrap_or("")
        .trim()
        .to_ascii_lowercase();
    // Spring AMQP writes `gzip:UTF-8` or `gzip, UTF-8`.
    let compressed = match encoding.split([':', ',']).next().unwrap_or("").trim() {
        "gzip" | "x-gzip" => true,
        "" | "utf-8" | "utf8" | "us-ascii" | "ascii" | "binary" | "identity" => false,
        _ => {
            return refused(format!(
                "has the content_encoding {}, which is not understood; use none, `utf-8` or `gzip`",
                excerpt(&encoding)
            ));
        }
    };
    let kombu = incoming.compression.unwrap_or("").trim();
    match kombu.to_ascii_lowercase().as_str() {
        "" if compressed => Ok(Coding::Gzip),
        "" => Ok(Coding::Plain),
        "application/x-gzip" | "application/gzip" | "gzip" | "zlib" if compressed => refused(
            "has gzip both as content_encoding and in the header `compression`; compress once".to_owned(),
        ),
        "application/x-gzip" | "application/gzip" | "gzip" | "zlib" => Ok(Coding::ZlibOrGzip),
        _ => refused(format!(
            "has the header compression {}, which is not understood; use none or `application/x-gzip`",
            excerpt(kombu)
        )),
    }
}

fn zlib(body: &[u8], max: usize) -> Result<Vec<u8>, Trouble> {
    let mut decoder = ZlibDecoder::new(body);
    let inflated = read(&mut decoder, body.len(), max, "zlib")?;
    match decoder.into_inner().fill_buf() {
        Ok([]) => Ok(inflated),
        _ => Err((
            RejectReason::BadEncoding,
            "has bytes after the end of its zlib data".to_owned(),
        )),
    }
}

/// Reads at most `max` bytes; the bound holds while inflating, not after.
fn read(decoder: impl Read, packed: usize, max: usize, name: &str) -> Result<Vec<u8>, Trouble> {
    let mut inflated = Vec::with_capacity(packed.saturating_mul(4).min(max).min(1 << 20));
    match decoder.take(max as u64 + 1).read_to_end(&mut inflated) {
        Ok(size) if size > max => Err(too_large(max)),
        Ok(_) => Ok(inflated),
        Err(error) => Err((RejectReason::BadEncoding, broken(&error, name))),
    }
}

fn broken(error: &io::Error, name: &str) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => format!("ends in the middle of its {name} data"),
        _ => format!("is said to be compressed but is not valid {name} data"),
    }
}

fn too_large(max: usize) -> Trouble {
    (
        RejectReason::TooLarge,
        format!("has more than {max} bytes when decompressed"),
    )
}

/// What a body that is not UTF-8 probably is instead.
pub(super) fn guess(body: &[u8]) -> &'static str {
    match body {
        [0x1f, 0x8b, ..] => "; it looks like gzip: set content_encoding to `gzip`",
        [0x78, 0x01 | 0x5e | 0x9c | 0xda, ..] => "; it looks like zlib data: set the header `compression`",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [b'{', 0, ..] | [0, b'{', ..] => "; it looks like UTF-16",
        [0x80, 2..=5, ..] => "; it looks like a Python pickle",
        _ => "",
    }
}
