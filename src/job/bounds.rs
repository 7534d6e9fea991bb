//! Fixed bounds of the contract. Those an operator can change are in [`crate::config::JobLimits`].
//! `schema/mail-job.v1.json` states the same numbers; a test compares them.

/// Octets of an address (RFC 5321 §4.5.3.1.3 allows a path of 256 with its angle brackets).
pub const MAX_ADDRESS: usize = 254;
/// Octets of what stands before the `@` (RFC 5321 §4.5.3.1.1).
pub const MAX_LOCAL_PART: usize = 64;
/// Characters of an address with its display name in one string.
pub const MAX_ADDRESS_TEXT: usize = 600;
/// Characters of a display name.
pub const MAX_NAME: usize = 256;
/// Addresses in `reply_to`.
pub const MAX_REPLY_TO: usize = 10;
/// Characters of the subject.
pub const MAX_SUBJECT: usize = 998;
/// Entries in `headers`.
pub const MAX_HEADERS: usize = 64;
/// Characters of a header's name.
pub const MAX_HEADER_NAME: usize = 76;
/// Characters of a header's value.
pub const MAX_HEADER_VALUE: usize = 4096;
/// Characters of `locale`.
pub const MAX_LOCALE: usize = 35;
/// Characters of `batch`.
pub const MAX_BATCH: usize = 128;
/// Entries in `tags`.
pub const MAX_TAGS: usize = 16;
/// Characters of a tag.
pub const MAX_TAG: usize = 64;
/// Bytes of `metadata`, written as JSON without white space.
pub const MAX_METADATA: usize = 4096;
/// Characters of an attachment's file name.
pub const MAX_FILENAME: usize = 255;
/// Characters of an attachment's media type with its parameters.
pub const MAX_CONTENT_TYPE: usize = 255;
/// Characters of a Content-ID.
pub const MAX_CONTENT_ID: usize = 200;
/// Characters of the URL in `list_unsubscribe` as it is written: it must fit into one header line (RFC 5322 §2.1.1).
pub const MAX_LIST_URL: usize = 900;
/// Characters of an attachment's URL.
pub const MAX_URL: usize = 8192;
/// Characters of an SMTP server's host name.
pub const MAX_HOST: usize = 253;
/// Characters of an SMTP user name.
pub const MAX_USERNAME: usize = 320;
/// Characters of an SMTP password.
pub const MAX_PASSWORD: usize = 1024;
/// Characters of a sealed `smtp_override`.
pub const MAX_SEALED: usize = 16_384;
/// Field errors listed for one job; one more entry says how many there were beyond.
pub const MAX_ERRORS: usize = 100;
