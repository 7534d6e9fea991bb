//! What must hold whatever comes in from outside, as functions of arbitrary bytes: they panic when it does not.
//!
//! One place for both users: the fuzz targets in `fuzz/` (through the feature `fuzzing`), and plain tests over the
//! fuzzers' corpus and generated input, which need no nightly compiler. Fields of structured input are separated by the
//! byte 0xff, which stands in no UTF-8 text; missing ones are empty.
#![expect(clippy::expect_used, reason = "a property that does not hold panics")]

mod job;
mod mail;
mod secrets;
mod smtp;
mod web;

#[cfg(test)]
mod tests;

use std::borrow::Cow;

pub use job::{address, compressed, job};
pub use mail::{compose, rewrite, stuffing};
pub use secrets::secrets;
pub use smtp::smtp_reply;
pub use web::{report, url};

/// A property of arbitrary bytes.
pub type Property = fn(&[u8]);

/// All of them by the name of their fuzz target and corpus.
pub const ALL: [(&str, Property); 10] = [
    ("job", job),
    ("address", address),
    ("compressed", compressed),
    ("compose", compose),
    ("rewrite", rewrite),
    ("stuffing", stuffing),
    ("smtp_reply", smtp_reply),
    ("secrets", secrets),
    ("url", url),
    ("report", report),
];

/// Fields of structured input, one after the other; empty when there are no more.
struct Input<'a>(std::slice::Split<'a, u8, fn(&u8) -> bool>);

impl<'a> Input<'a> {
    fn new(data: &'a [u8]) -> Self {
        Self(data.split(|byte| *byte == 0xff))
    }

    fn bytes(&mut self) -> &'a [u8] {
        self.0.next().unwrap_or_default()
    }

    fn text(&mut self) -> Cow<'a, str> {
        String::from_utf8_lossy(self.bytes())
    }
}

/// Whether a text can stand in a line of a log or header without ending it.
fn is_one_line(text: &str) -> bool {
    !text.contains(['\r', '\n', '\0'])
}
