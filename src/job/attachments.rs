//! The files of a job.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use url::Url;

use super::bounds::{MAX_CONTENT_ID, MAX_CONTENT_TYPE, MAX_FILENAME, MAX_URL};
use super::errors::{Errors, Pointer};
use super::json::Node;
use super::object::Fields;
use super::{Attachment, Source, values};

/// Fields of an attachment.
pub(super) const ATTACHMENT_FIELDS: &[&str] = &[
    "filename",
    "content_type",
    "inline",
    "content_id",
    "sha256",
    "base64",
    "url",
];

/// Reads `attachments`.
pub(super) fn attachments(
    node: Node<'_>,
    has_html: bool,
    max: usize,
    at: &Pointer<'_>,
    errors: &mut Errors,
) -> Vec<Attachment> {
    let items = match node {
        Node::Array(items) => items,
        other => {
            values::mistyped(&other, "a list of attachments", at, errors);
            return Vec::new();
        }
    };
    if items.len() > max {
        errors.push(at, format!("holds {} attachments; at most {max}", items.len()));
        return Vec::new();
    }
    let mut attachments: Vec<Attachment> = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        let at = at.index(index);
        let Some(attachment) = attachment(item, has_html, &at, errors) else {
            continue;
        };
        let id = &attachment.content_id;
        if id.is_some() && attachments.iter().any(|other| other.content_id == *id) {
            errors.push(&at.key("content_id"), "is already used by an earlier attachment");
        }
        attachments.push(attachment);
    }
    attachments
}

fn attachment(node: Node<'_>, has_html: bool, at: &Pointer<'_>, errors: &mut Errors) -> Option<Attachment> {
    let entries = match node {
        Node::Object(entries) => entries,
        other => {
            values::mistyped(&other, "an object", at, errors);
            return None;
        }
    };
    let mut fields = Fields::new(entries, ATTACHMENT_FIELDS, at, errors);
    let filename = filename(fields.take("filename"), &at.key("filename"), errors);
    let content_type = fields
        .take("content_type")
        .and_then(|node| media_type(node, &at.key("content_type"), errors));
    let inline = fields
        .take("inline")
        .and_then(|node| values::boolean(&node, &at.key("inline"), errors))
        .unwrap_or(false);
    let id_node = fields.take("content_id");
    if inline && id_node.is_none() {
        errors.push(&at.key("content_id"), "is required when `inline` is true");
    }
    if inline && !has_html {
        errors.push(&at.key("inline"), "needs an `html` body that shows it");
    }
    let content_id = id_node.and_then(|node| content_id(node, &at.key("content_id"), errors));
    let sha256 = fields
        .take("sha256")
        .and_then(|node| sha256(node, &at.key("sha256"), errors));
    let source = source(&mut fields, sha256.as_ref(), at, errors);
    Some(Attachment {
        filename: filename?,
        content_type,
        inline,
        content_id,
        sha256,
        source: source?,
    })
}

fn filename(node: Option<Node<'_>>, at: &Pointer<'_>, errors: &mut Errors) -> Option<String> {
    let Some(node) = node else {
        errors.push(at, "is required: the name the reader sees");
        return None;
    };
    let name = values::label(node, MAX_FILENAME, at, errors)?;
    if name.contains(['/', '\\']) || matches!(name.trim(), "" | "." | "..") {
        errors.push(
            at,
            "must be a file name without path: no `/` or `\\`, not `.` or `..`",
        );
        return None;
    }
    Some(name.into_owned())
}

fn media_type(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<String> {
    let text = values::string(node, at, errors)?;
    if text.len() > MAX_CONTENT_TYPE || !is_media_type(&text) {
        errors.push(
            at,
            format!("must be a media type such as `application/pdf`, at most {MAX_CONTENT_TYPE} characters"),
        );
        return None;
    }
    let is_multipart = text
        .get(..10)
        .is_some_and(|start| start.eq_ignore_ascii_case("multipart/"));
    if is_multipart {
        errors.push(at, "must not be a multipart type");
        return None;
    }
    Some(text.into_owned())
}

/// `type/subtype` with parameters (RFC 2045 §5.1); quoted values without backslash.
fn is_media_type(text: &str) -> bool {
    let is_token = |text: &str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`{|}~".contains(&b))
    };
    let is_quoted = |text: &str| {
        text.strip_prefix('"')
            .and_then(|rest| rest.strip_suffix('"'))
            .is_some_and(|inner| {
                inner
                    .bytes()
                    .all(|b| matches!(b, b' '..=b'~') && !b"\"\\;".contains(&b))
            })
    };
    let mut parts = text.split(';');
    let essence = parts
        .next()
        .and_then(|essence| essence.trim_end_matches(' ').split_once('/'));
    essence.is_some_and(|(kind, subtype)| is_token(kind) && is_token(subtype))
        && parts.all(|parameter| {
            parameter
                .trim_matches(' ')
                .split_once('=')
                .is_some_and(|(name, value)| is_token(name) && (is_token(value) || is_quoted(value)))
        })
}

fn content_id(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<String> {
    let text = values::string(node, at, errors)?;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~.@".contains(&b);
    if (1..=MAX_CONTENT_ID).contains(&text.len()) && text.bytes().all(allowed) {
        return Some(text.into_owned());
    }
    errors.push(
        at,
        format!(
            "must be 1 to {MAX_CONTENT_ID} characters of A-Z a-z 0-9 !#$%&'*+-/=?^_`{{|}}~.@, without angle brackets"
        ),
    );
    None
}

fn sha256(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<[u8; 32]> {
    let text = values::string(node, at, errors)?;
    let digest = from_hex(&text);
    if digest.is_none() {
        errors.push(at, "must be a SHA-256 digest: 64 hexadecimal digits");
    }
    digest
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(digest)
}

fn source(
    fields: &mut Fields<'_>,
    sha256: Option<&[u8; 32]>,
    at: &Pointer<'_>,
    errors: &mut Errors,
) -> Option<Source> {
    match (fields.take("base64"), fields.take("url")) {
        (Some(node), None) => {
            let bytes = content(node, &at.key("base64"), errors)?;
            if sha256.is_some_and(|expected| *expected != <[u8; 32]>::from(Sha256::digest(&bytes))) {
                errors.push(&at.key("sha256"), "is not the digest of the content in `base64`");
                return None;
            }
            Some(Source::Bytes(bytes))
        }
        (None, Some(node)) => web_address(node, &at.key("url"), errors).map(Source::Url),
        (None, None) => {
            errors.push(at, "needs its content: one of `base64` and `url`");
            None
        }
        (Some(_), Some(_)) => {
            errors.push(at, "has both `base64` and `url`; give one");
            None
        }
    }
}

fn content(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<Bytes> {
    let text = values::string(node, at, errors)?;
    // Most have no line breaks in them: not looked for before it is known that there is something.
    if let Ok(bytes) = STANDARD.decode(text.as_bytes()) {
        return Some(Bytes::from(bytes));
    }
    let is_blank = |b: &u8| matches!(b, b' ' | b'\t' | b'\r' | b'\n');
    let packed: Vec<u8> = text.bytes().filter(|b| !is_blank(b)).collect();
    if let Ok(bytes) = STANDARD.decode(&packed) {
        return Some(Bytes::from(bytes));
    }
    let hint = if text.starts_with("data:") {
        "; leave out the `data:…;base64,` in front"
    } else if packed.contains(&b'-') || packed.contains(&b'_') {
        "; this is the URL-safe alphabet"
    } else {
        ""
    };
    errors.push(
        at,
        format!("must be base64 in the standard alphabet (`+` and `/`) with its padding{hint}"),
    );
    None
}

/// An http(s) URL without user name and password. The message does not show it: its query may be a secret.
fn web_address(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<Url> {
    let text = values::string(node, at, errors)?;
    let url = url(&text, MAX_URL, &["http", "https"]);
    if url.is_none() {
        errors.push(
            at,
            format!("must be an http or https URL of at most {MAX_URL} characters, without user name, password and blanks"),
        );
    }
    url
}

/// A URL of one of `schemes`. The parser would silently drop line breaks, so blanks are refused before.
pub(super) fn url(text: &str, max: usize, schemes: &[&str]) -> Option<Url> {
    if text.len() > max || text.contains(values::is_blank) {
        return None;
    }
    let url = Url::parse(text).ok()?;
    let plain = url.username().is_empty() && url.password().is_none() && url.has_host();
    // `http:host` and `http:\\host` parse too; nobody means them.
    let written = text
        .split_once("://")
        .is_some_and(|(scheme, _)| scheme.eq_ignore_ascii_case(url.scheme()));
    (plain && written && schemes.contains(&url.scheme())).then_some(url)
}
