//! From a job to the bytes on the wire, read again by an independent parser.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use jiff::Timestamp;
use mail_parser::{Message, MessageParser, PartType};

use super::{Input, is_one_line};
use crate::address::{Address, Mailbox};
use crate::attachment::{Link, Part, Prepared, rewrite as rewriting};
use crate::compose::{self as composing, Composition, Email};
use crate::job::{Attachment, ListUnsubscribe, MailJob, Source};
use crate::smtp::Blocks;

const ID: &str = "<0123456789abcdef@example.com>";
/// In the envelope of every mail here, and nowhere in it.
const HIDDEN: &str = "hidden-copy@bcc.invalid";

/// A mail of arbitrary texts, past all checks of the decoder: subject, text, html, author's name and address,
/// recipient's name and address, header name and value, file name, media type, Content-ID, unsubscribe URL, content.
pub fn compose(data: &[u8]) {
    let mut input = Input::new(data);
    let optional = |text: String| (!text.is_empty()).then_some(text);
    let mut job = blank();
    job.subject = optional(input.text().into_owned());
    job.text = optional(input.text().into_owned());
    job.html = optional(input.text().into_owned());
    job.from = Some(mailbox(&input.text(), &input.text()));
    let recipient = mailbox(&input.text(), &input.text());
    let (name, value) = (input.text().into_owned(), input.text().into_owned());
    if !name.is_empty() {
        job.headers.push((name, value));
    }
    let mut attachment = Attachment {
        filename: input.text().into_owned(),
        content_type: optional(input.text().into_owned()),
        inline: false,
        content_id: optional(input.text().into_owned()),
        sha256: None,
        source: Source::Bytes(Bytes::new()),
    };
    attachment.inline = attachment.content_id.is_some();
    job.list_unsubscribe = optional(input.text().into_owned()).map(|url| ListUnsubscribe {
        url: Some(url),
        mailto: Some(recipient.address.clone()),
    });
    let content = Bytes::copy_from_slice(input.bytes());
    job.to = vec![recipient.clone()];
    job.cc = vec![recipient];
    job.bcc = HIDDEN.parse().map(Mailbox::bare).into_iter().collect();
    let file = Attachment {
        inline: false,
        ..attachment.clone()
    };
    check(
        &job,
        vec![Part::new(&attachment, content.clone()), Part::new(&file, content)],
    );
}

fn blank() -> MailJob {
    MailJob {
        id: "order-42".parse().expect("an id"),
        tenant: "acme".parse().expect("a tenant"),
        account: None,
        from: None,
        to: vec![],
        cc: vec![],
        bcc: vec![],
        reply_to: vec![],
        return_path: None,
        subject: None,
        text: None,
        html: None,
        headers: vec![],
        locale: None,
        list_unsubscribe: None,
        attachments: vec![],
        send_at: None,
        expires_at: None,
        batch: None,
        tags: vec![],
        metadata: None,
        smtp_override: None,
        fallback: None,
        on_uncertain: None,
        digest: [0; 32],
    }
}

/// The address if it is one, else a harmless one.
fn mailbox(name: &str, address: &str) -> Mailbox {
    let fallback = || "ann@example.com".parse().expect("an address");
    Mailbox {
        name: (!name.is_empty()).then(|| name.to_owned()),
        address: address.parse().unwrap_or_else(|_| fallback()),
    }
}

/// A job that came through the decoder can be composed.
pub(super) fn check_decoded(job: &MailJob) {
    let mut job = job.clone();
    job.from.get_or_insert_with(|| mailbox("", ""));
    let parts = job
        .attachments
        .iter()
        .filter_map(|attachment| match &attachment.source {
            Source::Bytes(bytes) => Some(Part::new(attachment, bytes.clone())),
            Source::Url(_) => None,
        });
    let parts = parts.collect();
    assert!(check(&job, parts), "a decoded job cannot be composed");
}

/// Whether the mail could be composed. If so, it is what the job says and nothing else.
fn check(job: &MailJob, parts: Vec<Part>) -> bool {
    let recipients: Vec<Address> = job.recipients().cloned().collect();
    let prepared = Prepared {
        parts,
        ..Prepared::default()
    };
    let author = job.from.as_ref().expect("an author");
    let composed = composing::compose(&Composition {
        job,
        from: author,
        reply_to: None,
        envelope_from: job.return_path.as_ref().or(Some(&author.address)),
        recipients: &recipients,
        message_id: ID,
        date: Timestamp::UNIX_EPOCH,
        prepared: &prepared,
    });
    let Ok(email) = composed else {
        return false;
    };
    check_wire_form(&email);
    check_envelope(&email, &recipients);
    check_header(&email, job);
    check_content(&email, job, &prepared.parts);
    stuffing(&email.message);
    true
}

/// RFC 5322 §2.1.1 and RFC 2045 §2.7.
fn check_wire_form(email: &Email) {
    let message = &email.message[..];
    assert!(message.ends_with(b"\r\n"));
    assert!(email.is_8bit || message.is_ascii(), "8 bits without saying so");
    assert!(!email.is_8bit || email.needs_utf8);
    let text = std::str::from_utf8(message).expect("a mail is UTF-8");
    for line in text.split("\r\n") {
        assert!(line.len() <= 998, "a line of {} bytes", line.len());
        assert!(is_one_line(line), "{line:?}");
    }
}

/// The same recipients in the same order; a domain may be in its ASCII form.
fn check_envelope(email: &Email, recipients: &[Address]) {
    assert_eq!(email.recipients.len(), recipients.len());
    for (sent, asked) in email.recipients.iter().zip(recipients) {
        assert_eq!(sent.user(), asked.user());
        let text: &str = sent.as_ref();
        assert!(
            sent.domain().is_ascii() && !text.contains(char::is_control),
            "{text:?}"
        );
        assert!(!asked.domain().is_ascii() || sent.domain() == asked.domain());
    }
}

/// The fields that belong there, each once, and nobody who gets a blind copy.
fn check_header(email: &Email, job: &MailJob) {
    let text = std::str::from_utf8(&email.message).expect("a mail is UTF-8");
    let (header, _) = text.split_once("\r\n\r\n").expect("a header ends");
    let found: Vec<&str> = header
        .split("\r\n")
        .filter(|line| !line.starts_with([' ', '\t']))
        .map(|line| line.split_once(':').expect("a field has a name").0)
        .filter(|name| !name.starts_with("Content-"))
        .collect();
    let mut expected = vec!["Date", "From"];
    let given = |present: bool, name| present.then_some(name);
    expected.extend(given(!job.reply_to.is_empty(), "Reply-To"));
    expected.extend(given(!job.to.is_empty() || job.cc.is_empty(), "To"));
    expected.extend(given(!job.cc.is_empty(), "Cc"));
    expected.extend(given(job.subject.is_some(), "Subject"));
    expected.push("Message-ID");
    expected.extend(job.headers.iter().map(|(name, _)| name.as_str()));
    let unsubscribe = job.list_unsubscribe.as_ref();
    expected.extend(given(unsubscribe.is_some(), "List-Unsubscribe"));
    let one_click = found.contains(&"List-Unsubscribe-Post");
    expected.extend(given(unsubscribe.is_some() && one_click, "List-Unsubscribe-Post"));
    expected.extend(["X-Postroom-ID", "MIME-Version"]);
    assert_eq!(found, expected);
    for line in header.split("\r\n") {
        assert!(
            !line.trim().is_empty(),
            "a line of blanks may end the header for some readers"
        );
    }
    assert!(!text.contains(HIDDEN), "a blind copy is told");
}

/// Bodies and files come back from another parser byte for byte.
fn check_content(email: &Email, job: &MailJob, parts: &[Part]) {
    let message = MessageParser::new().parse(&email.message[..]).expect("a mail");
    let leaves: Vec<_> = message
        .parts
        .iter()
        .filter(|part| !matches!(part.body, PartType::Multipart(_)))
        .collect();
    let bodies = [&job.text, &job.html].into_iter().flatten().count().max(1);
    assert_eq!(
        leaves.len(),
        bodies + parts.len(),
        "{:?}",
        String::from_utf8_lossy(&email.message)
    );
    // Inline parts stand with the HTML, before the others.
    let inline = parts.iter().filter(|part| part.inline && job.html.is_some());
    let others = parts.iter().filter(|part| !part.inline || job.html.is_none());
    for (leaf, part) in leaves[bodies..].iter().zip(inline.chain(others)) {
        let raw = &email.message[leaf.offset_body as usize..leaf.offset_end as usize];
        let encoded: Vec<u8> = raw
            .iter()
            .copied()
            .filter(|byte| !byte.is_ascii_whitespace())
            .collect();
        assert_eq!(STANDARD.decode(encoded).ok().as_deref(), Some(&part.bytes[..]));
        assert!(
            !matches!(leaf.body, PartType::Message(_)),
            "base64 in a message (RFC 2045 §6.4)"
        );
        if let PartType::Binary(read) | PartType::InlineBinary(read) = &leaf.body {
            assert_eq!(&read[..], &part.bytes[..]);
        }
    }
    check_body(&message, job.text.as_deref(), false);
    check_body(&message, job.html.as_deref(), true);
}

fn check_body(message: &Message<'_>, given: Option<&str>, html: bool) {
    let Some(given) = given else { return };
    let bodies = if html {
        &message.html_body
    } else {
        &message.text_body
    };
    let first = *bodies.first().expect("the body is one") as usize;
    let read = match &message.parts[first].body {
        PartType::Text(text) | PartType::Html(text) => text,
        other => panic!("a body is no text: {other:?}"),
    };
    let lines = |text: &str| text.replace("\r\n", "\n").replace('\r', "\n");
    // A mail of one part ends its last line.
    assert_eq!(
        lines(read).trim_end_matches('\n'),
        lines(given).trim_end_matches('\n')
    );
}

/// The receiver's reading of RFC 5321 §4.5.2 gives the mail back, and its end is nowhere before the end.
pub fn stuffing(data: &[u8]) {
    let mut wire = Vec::new();
    let mut blocks = Blocks::new(data);
    while let Some(block) = blocks.next_block() {
        wire.extend_from_slice(block.bytes);
    }
    let end = wire.windows(5).position(|window| window == b"\r\n.\r\n");
    let begins_empty = wire == b".\r\n";
    assert!(
        begins_empty || end == Some(wire.len() - 5),
        "the end of the mail is at {end:?} of {}",
        wire.len()
    );
    let mut read = Vec::new();
    let body = &wire[..wire.len() - 3];
    let mut at_start = true;
    for &byte in body {
        if !(at_start && byte == b'.') {
            read.push(byte);
        }
        // Doubled after a lone LF as well: some servers take it for an end of line.
        at_start = byte == b'\n';
    }
    let mut expected = data.to_vec();
    if !expected.is_empty() && !expected.ends_with(b"\r\n") {
        expected.extend_from_slice(b"\r\n");
    }
    assert_eq!(read, expected);
}

/// Links in bodies: body, file name, URL, locale.
pub fn rewrite(data: &[u8]) {
    let mut input = Input::new(data);
    let (body, filename) = (input.text(), input.text());
    let (url, locale) = (input.text(), input.text());
    let link = Link {
        filename: filename.into_owned(),
        size: data.len() as u64,
        url: url.into_owned(),
        expires_at: None,
    };
    let links = [link.clone(), link];
    let locale = Some(&*locale);
    let block = rewriting::into_html("", &links, locale);
    assert_eq!(
        block.matches('<').count(),
        8 + 4 * links.len(),
        "a name or URL adds a tag: {block}"
    );
    let html = rewriting::into_html(&body, &links, locale);
    assert_eq!(html.len(), body.len() + block.len());
    let at = (0..=body.len())
        .filter(|at| body.is_char_boundary(*at))
        .find(|at| {
            html[*at..].starts_with(&block)
                && html[..*at] == body[..*at]
                && html[at + block.len()..] == body[*at..]
        });
    assert!(at.is_some(), "the body is changed");
    let text = rewriting::into_text(&body, &links, locale);
    assert!(text.starts_with(&*body));
    let mut job = blank();
    job.from = Some(mailbox("", ""));
    job.to = vec![mailbox("", "")];
    (job.text, job.html) = (Some(text), Some(html));
    assert!(check(&job, Vec::new()));
}
