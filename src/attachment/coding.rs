//! Content codings of answers (RFC 9110 §8.4). None is asked for, but object stores and their caches give out a file as it
//! was stored, with `Content-Encoding: gzip` beside it if it was compressed first.

use std::io::{self, Write as _};

use flate2::write::MultiGzDecoder;
use reqwest::header::{CONTENT_ENCODING, HeaderMap};

/// Bytes unpacked at a time: they become at most about a thousand times as many before these are counted.
pub(super) const PIECE: usize = 1 << 10;

/// Longest name of a coding that is quoted, in characters.
const MAX_QUOTED: usize = 40;

/// What stands in the header and means that the bytes are the file. `aws-chunked` is left there by some S3 servers, names
/// of character sets by people.
const NONE: [&str; 6] = ["", "identity", "aws-chunked", "utf-8", "utf8", "binary"];

/// Names of files that are compressed themselves. Servers that take their coding from the name say it of what the reader
/// wants as it is.
const PACKED_NAMES: [&str; 3] = [".gz", ".tgz", ".svgz"];

/// How a file comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    /// As it is.
    Identity,
    /// Compressed (RFC 1952).
    Gzip,
}

impl Coding {
    /// What the headers say of a file that is to be attached under this name.
    ///
    /// # Errors
    /// The coding that cannot be undone.
    pub(super) fn of(headers: &HeaderMap, filename: &str) -> Result<Self, String> {
        let mut codings = Vec::new();
        for value in headers.get_all(CONTENT_ENCODING) {
            let value = String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase();
            codings.extend(value.split(',').map(|coding| coding.trim().to_owned()));
        }
        codings.retain(|coding| !NONE.contains(&coding.as_str()));
        match codings.as_slice() {
            [] => Ok(Self::Identity),
            [coding] if coding == "gzip" || coding == "x-gzip" => Ok(if is_packed(filename) {
                Self::Identity
            } else {
                Self::Gzip
            }),
            _ => Err(codings.join(", ").chars().take(MAX_QUOTED).collect()),
        }
    }
}

fn is_packed(filename: &str) -> bool {
    let name = filename.to_ascii_lowercase();
    PACKED_NAMES.iter().any(|end| name.ends_with(end))
}

/// Undoes gzip, piece by piece.
#[derive(Debug, Default)]
pub(super) struct Unpacker {
    /// None until the first byte: an empty answer is an empty file.
    decoder: Option<MultiGzDecoder<Vec<u8>>>,
}

impl Unpacker {
    /// What another piece becomes, or what became of earlier ones.
    pub(super) fn unpack(&mut self, packed: &[u8]) -> io::Result<Vec<u8>> {
        let decoder = self
            .decoder
            .get_or_insert_with(|| MultiGzDecoder::new(Vec::new()));
        decoder.write_all(packed)?;
        Ok(std::mem::take(decoder.get_mut()))
    }

    /// What is left at the end.
    ///
    /// # Errors
    /// If there should have come more, or something else.
    pub(super) fn finish(self) -> io::Result<Vec<u8>> {
        self.decoder
            .map_or_else(|| Ok(Vec::new()), MultiGzDecoder::finish)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coding(values: &[&str], filename: &str) -> Result<Coding, String> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(CONTENT_ENCODING, value.parse().unwrap());
        }
        Coding::of(&headers, filename)
    }

    #[test]
    fn only_gzip_is_undone_and_a_file_that_is_gzip_itself_is_left_alone() {
        let (plain, gzip) = (Ok(Coding::Identity), Ok(Coding::Gzip));
        let refused = |text: &str| Err(text.to_owned());
        for (values, filename, expected) in [
            (&[][..], "a.csv", plain.clone()),
            (&["identity"], "a.csv", plain.clone()),
            (&["UTF-8"], "a.csv", plain.clone()),
            (&["gzip"], "a.csv", gzip.clone()),
            (&["X-GZIP"], "a.csv", gzip.clone()),
            (&["gzip,aws-chunked"], "a.csv", gzip.clone()),
            (&["aws-chunked", "gzip"], "a.csv", gzip),
            (&["gzip"], "backup.tar.GZ", plain.clone()),
            (&["x-gzip"], "backup.tgz", plain),
            (&["br"], "a.csv", refused("br")),
            (&["gzip, gzip"], "a.csv", refused("gzip, gzip")),
            (&["deflate", "gzip"], "a.csv", refused("deflate, gzip")),
        ] {
            assert_eq!(coding(values, filename), expected, "{values:?} {filename}");
        }
        let long = coding(&["é".repeat(500).as_str()], "a").unwrap_err();
        assert_eq!(long.chars().count(), MAX_QUOTED);
    }
}
