//! The MIME tree (RFC 2046): alternative bodies, inline images beside the HTML, files around all of it.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

use super::body::{self, Encoding};
use super::header;
use crate::attachment::Part;

/// What goes into the mail.
#[derive(Debug, Clone, Copy)]
pub(super) struct Content<'a> {
    /// Plain body.
    pub(super) text: Option<&'a str>,
    /// HTML body.
    pub(super) html: Option<&'a str>,
    /// Files, inline or attached.
    pub(super) parts: &'a [Part],
}

impl Content<'_> {
    /// About how long the mail becomes.
    pub(super) fn size_hint(&self) -> usize {
        let bodies: usize = self
            .text
            .iter()
            .chain(&self.html)
            .map(|body| body.len() + body.len() / 8)
            .sum();
        let files: usize = self
            .parts
            .iter()
            .map(|part| body::base64_len(part.bytes.len()) + 512)
            .sum();
        bodies + files
    }
}

enum Node<'a> {
    Body {
        subtype: &'static str,
        body: &'a str,
    },
    File(&'a Part),
    Multi {
        subtype: &'static str,
        children: Vec<Node<'a>>,
    },
}

/// Writes the content fields of the header, the empty line and the body. Boundaries derive from the Message-ID, so
/// that they repeat with it and nobody could have put one into a body.
pub(super) fn write(content: &Content<'_>, message_id: &str, out: &mut String) {
    let mut boundaries = Boundaries {
        message_id,
        secret: None,
        count: 0,
    };
    write_node(&tree(content), &mut boundaries, out);
}

fn tree<'a>(content: &Content<'a>) -> Node<'a> {
    let inline_goes_along = content.html.is_some();
    let (inline, files): (Vec<_>, Vec<_>) = content
        .parts
        .iter()
        .partition(|part| part.inline && inline_goes_along);
    let text = content.text.map(|body| Node::Body {
        subtype: "plain",
        body,
    });
    let html = content.html.map(|body| {
        let html = Node::Body {
            subtype: "html",
            body,
        };
        wrap(
            "related",
            std::iter::once(html)
                .chain(inline.into_iter().map(Node::File))
                .collect(),
        )
    });
    let body = match (text, html) {
        (Some(text), Some(html)) => wrap("alternative", vec![text, html]),
        (Some(only), None) | (None, Some(only)) => only,
        (None, None) => Node::Body {
            subtype: "plain",
            body: "",
        },
    };
    wrap(
        "mixed",
        std::iter::once(body)
            .chain(files.into_iter().map(Node::File))
            .collect(),
    )
}

/// A multipart of these, or the only one itself.
fn wrap<'a>(subtype: &'static str, mut children: Vec<Node<'a>>) -> Node<'a> {
    match (children.len(), children.pop()) {
        (1, Some(only)) => only,
        (_, last) => {
            children.extend(last);
            Node::Multi { subtype, children }
        }
    }
}

fn write_node(node: &Node<'_>, boundaries: &mut Boundaries<'_>, out: &mut String) {
    match node {
        Node::Body { subtype, body } => write_body(subtype, body, out),
        Node::File(part) => write_file(part, out),
        Node::Multi { subtype, children } => {
            let boundary = boundaries.next();
            // RFC 2387 §3.1 wants the type of the first part, which is the HTML.
            let kind = if *subtype == "related" {
                "; type=\"text/html\""
            } else {
                ""
            };
            out.extend([
                "Content-Type: multipart/",
                subtype,
                kind,
                ";\r\n boundary=\"",
                &boundary,
                "\"\r\n\r\n",
            ]);
            for child in children {
                out.extend(["--", &boundary, "\r\n"]);
                write_node(child, boundaries, out);
                out.push_str("\r\n");
            }
            out.extend(["--", &boundary, "--\r\n"]);
        }
    }
}

fn write_body(subtype: &str, text: &str, out: &mut String) {
    let text = body::with_crlf(text);
    let encoding = Encoding::of(&text);
    out.extend(["Content-Type: text/", subtype, "; charset=utf-8\r\n"]);
    header::verbatim(out, "Content-Transfer-Encoding", encoding.as_str());
    out.push_str("\r\n");
    body::write_text(out, &text, encoding);
}

fn write_file(part: &Part, out: &mut String) {
    // A message or multipart may not be base64 (RFC 2045 §6.4): such a file goes as bytes.
    let kind = part.content_type.split('/').next().unwrap_or_default().trim();
    let is_composite = ["message", "multipart"]
        .iter()
        .any(|composite| kind.eq_ignore_ascii_case(composite));
    let media = if is_composite {
        super::media::BYTES
    } else {
        part.content_type.as_str()
    };
    header::unstructured(out, "Content-Type", media);
    header::verbatim(out, "Content-Transfer-Encoding", Encoding::Base64.as_str());
    out.push_str("Content-Disposition: ");
    out.push_str(if part.inline { "inline" } else { "attachment" });
    if !part.filename.is_empty() {
        header::parameter(out, "filename", &part.filename);
    }
    out.push_str("\r\n");
    if let Some(content_id) = &part.content_id {
        let id: String = content_id
            .chars()
            .filter(|c| c.is_ascii_graphic() && !matches!(c, '<' | '>'))
            .take(header::MAX_WORD)
            .collect();
        header::verbatim(out, "Content-ID", &format!("<{id}>"));
    }
    out.push_str("\r\n");
    body::write_base64(out, &part.bytes);
}

/// Gives boundaries; hashes only for mails that have any.
struct Boundaries<'a> {
    message_id: &'a str,
    secret: Option<String>,
    count: u32,
}

impl Boundaries<'_> {
    fn next(&mut self) -> String {
        let secret = self.secret.get_or_insert_with(|| {
            let digest = Sha256::digest(self.message_id.as_bytes());
            digest[..16]
                .iter()
                .fold(String::with_capacity(32), |mut hex, byte| {
                    let _ = write!(hex, "{byte:02x}");
                    hex
                })
        });
        self.count += 1;
        // `=_` stands in no quoted-printable or base64 body (RFC 2045 §6.7).
        format!("=_{secret}_{}", self.count)
    }
}
