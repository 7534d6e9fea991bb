use std::borrow::Cow;

use mail_parser::{Message, MessageParser, MimeHeaders, PartType};
use proptest::prelude::*;

use super::*;
use crate::attachment::{Link, Part};
use crate::job::{Attachment, Source};

const ID: &str = "<0123456789abcdef@example.com>";

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

fn mailbox(name: Option<&str>, addr: &str) -> Mailbox {
    Mailbox {
        name: name.map(str::to_owned),
        address: address(addr),
    }
}

fn job() -> MailJob {
    MailJob {
        id: "order-42".parse().unwrap(),
        tenant: "acme".parse().unwrap(),
        account: None,
        from: Some(mailbox(Some("Acme"), "info@acme.example")),
        to: vec![mailbox(None, "ann@example.com")],
        cc: vec![],
        bcc: vec![],
        reply_to: vec![],
        return_path: None,
        subject: Some("Hello".to_owned()),
        text: Some("Hi".to_owned()),
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

fn file(filename: &str, bytes: &[u8]) -> Part {
    let attachment = Attachment {
        filename: filename.to_owned(),
        content_type: None,
        inline: false,
        content_id: None,
        sha256: None,
        source: Source::Bytes(bytes.to_vec().into()),
    };
    Part::new(&attachment, bytes.to_vec().into())
}

fn image(filename: &str, cid: &str, bytes: &[u8]) -> Part {
    let mut part = file(filename, bytes);
    part.inline = true;
    part.content_id = Some(cid.to_owned());
    part
}

fn try_compose(job: &MailJob, prepared: &Prepared) -> Result<Email, Failure> {
    let recipients: Vec<Address> = job.recipients().cloned().collect();
    compose(&Composition {
        job,
        from: job.from.as_ref().unwrap(),
        reply_to: None,
        envelope_from: Some(&address("bounce@acme.example")),
        recipients: &recipients,
        message_id: ID,
        date: "2026-11-02T08:09:10Z".parse().unwrap(),
        prepared,
    })
}

fn composed(job: &MailJob) -> Email {
    try_compose(job, &Prepared::default()).unwrap()
}

fn with_parts(job: &MailJob, parts: Vec<Part>) -> Email {
    try_compose(
        job,
        &Prepared {
            parts,
            ..Prepared::default()
        },
    )
    .unwrap()
}

fn text(email: &Email) -> &str {
    std::str::from_utf8(&email.message).unwrap()
}

fn parsed(email: &Email) -> Message<'_> {
    assert_wire_form(email);
    MessageParser::new().parse(&email.message[..]).unwrap()
}

/// What every mail must be, whatever is in it.
fn assert_wire_form(email: &Email) {
    let message = text(email);
    assert!(message.ends_with("\r\n"));
    assert!(email.is_8bit || message.is_ascii());
    for line in message.split("\r\n") {
        assert!(line.len() <= 998, "a line of {} bytes", line.len());
        assert!(!line.contains(['\r', '\n', '\0']), "{line:?}");
    }
}

/// The field names of the main header, in order.
fn field_names(email: &Email) -> Vec<&str> {
    let (header, _) = text(email).split_once("\r\n\r\n").unwrap();
    header
        .split("\r\n")
        .filter(|line| !line.starts_with([' ', '\t']))
        .map(|line| line.split_once(':').unwrap().0)
        .collect()
}

fn body<'a>(message: &'a Message<'_>, html: bool) -> Cow<'a, str> {
    let ids = if html {
        &message.html_body
    } else {
        &message.text_body
    };
    match &message.parts[ids[0] as usize].body {
        PartType::Text(text) | PartType::Html(text) => Cow::Borrowed(text.as_ref()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_plain_mail_is_exactly_this() {
    assert_eq!(
        text(&composed(&job())),
        "Date: Mon, 2 Nov 2026 08:09:10 +0000\r\n\
         From: Acme <info@acme.example>\r\n\
         To: ann@example.com\r\n\
         Subject: Hello\r\n\
         Message-ID: <0123456789abcdef@example.com>\r\n\
         X-Postroom-ID: order-42\r\n\
         MIME-Version: 1.0\r\n\
         Content-Type: text/plain; charset=utf-8\r\n\
         Content-Transfer-Encoding: 7bit\r\n\
         \r\n\
         Hi\r\n"
    );
}

#[test]
fn all_parts_come_back_in_their_places() {
    let mut job = job();
    job.html = Some("<p>Grüße <img src=cid:logo></p>".to_owned());
    let email = with_parts(
        &job,
        vec![
            image("logo.png", "logo", b"\x89PNG\0"),
            file("übersicht.pdf", b"%PDF\r\n\n"),
        ],
    );
    let message = parsed(&email);
    let kinds: Vec<_> = message
        .parts
        .iter()
        .map(|part| {
            part.content_type()
                .map(|t| format!("{}/{}", t.ctype(), t.subtype().unwrap()))
                .unwrap()
        })
        .collect();
    assert_eq!(
        kinds,
        [
            "multipart/mixed",
            "multipart/alternative",
            "text/plain",
            "multipart/related",
            "text/html",
            "image/png",
            "application/pdf"
        ]
    );
    let related = message.parts[3].content_type().unwrap();
    assert_eq!(related.attribute("type"), Some("text/html"));
    assert_eq!(body(&message, false), "Hi");
    assert_eq!(body(&message, true), "<p>Grüße <img src=cid:logo></p>");
    assert_eq!(message.parts[5].content_id(), Some("logo"));
    assert_eq!(message.parts[5].contents(), b"\x89PNG\0");
    assert_eq!(message.parts[6].attachment_name(), Some("übersicht.pdf"));
    assert_eq!(message.parts[6].contents(), b"%PDF\r\n\n");
}

#[test]
fn html_alone_and_nothing_at_all_are_valid_mails() {
    let html = MailJob {
        text: None,
        html: Some("<b>x</b>".to_owned()),
        ..job()
    };
    assert_eq!(body(&parsed(&composed(&html)), true), "<b>x</b>\r\n");
    let empty = MailJob {
        text: None,
        subject: None,
        ..job()
    };
    assert_eq!(body(&parsed(&composed(&empty)), false), "");
}

#[test]
fn the_same_job_gives_the_same_bytes() {
    let job = MailJob {
        html: Some("<p>ü</p>".to_owned()),
        ..job()
    };
    let parts = || vec![file("a.pdf", &[1, 2, 3])];
    assert_eq!(
        with_parts(&job, parts()).message,
        with_parts(&job, parts()).message
    );
}

#[test]
fn bcc_is_in_the_envelope_alone() {
    let mut job = job();
    job.bcc = vec![mailbox(Some("Secret"), "hidden@example.org")];
    let email = composed(&job);
    assert!(email.recipients.contains(&address("hidden@example.org")));
    assert!(!text(&email).to_lowercase().contains("hidden") && !text(&email).contains("Secret"));
    job.to.clear();
    let email = composed(&job);
    assert!(text(&email).contains("\r\nTo: undisclosed-recipients:;\r\n"));
    parsed(&email);
}

/// A server that offers CHUNKING and does not know BDAT reads the first line as a command: it must be one that nobody
/// outside has a say in.
#[test]
fn a_mail_begins_with_its_date_on_one_short_line() {
    let from = "Date: ".repeat(60);
    let job = MailJob {
        from: Some(mailbox(Some(&from), "info@acme.example")),
        headers: vec![("X-Date".to_owned(), "x".to_owned())],
        ..job()
    };
    let email = composed(&job);
    let first = text(&email).split_inclusive("\r\n").next().unwrap();
    assert_eq!(first, "Date: Mon, 2 Nov 2026 08:09:10 +0000\r\n");
}

#[test]
fn a_job_cannot_set_a_field_that_postroom_writes() {
    for name in [
        "Bcc",
        "bCC",
        "Subject",
        "Message-ID",
        "Content-Type",
        "MIME-Version",
        "X: y",
        "a b",
        "",
        "é",
        "a\r\nBcc",
    ] {
        let job = MailJob {
            headers: vec![(name.to_owned(), "x".to_owned())],
            ..job()
        };
        let failure = try_compose(&job, &Prepared::default()).unwrap_err();
        assert_eq!(failure.reason, "header_forbidden", "{name}");
    }
}

#[test]
fn a_job_may_say_itself_how_to_unsubscribe_but_not_beside_list_unsubscribe() {
    let url = format!("<https://u.example/{}>", "x".repeat(800));
    let given = MailJob {
        headers: vec![
            ("List-Unsubscribe".to_owned(), url.clone()),
            (
                "List-Unsubscribe-Post".to_owned(),
                "List-Unsubscribe=One-Click".to_owned(),
            ),
        ],
        ..job()
    };
    let email = composed(&given);
    let fields = format!("List-Unsubscribe: {url}\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n");
    assert!(text(&email).contains(&fields), "{}", text(&email));
    let twice = MailJob {
        list_unsubscribe: Some(ListUnsubscribe {
            url: None,
            mailto: Some(address("off@u.example")),
        }),
        ..given
    };
    let failure = try_compose(&twice, &Prepared::default()).unwrap_err();
    assert_eq!(failure.reason, "header_forbidden");
}

#[test]
fn an_address_in_a_given_field_stays_readable_for_machines_whatever_its_name() {
    for (value, written) in [
        ("Jürgen <j@x.example>", "=?utf-8?b?SsO8cmdlbg==?= <j@x.example>"),
        (
            "\"Jürgen\" <j@x.example>",
            "=?utf-8?b?SsO8cmdlbg==?= <j@x.example>",
        ),
        ("Jürgen<j@x.example>", "=?utf-8?b?SsO8cmdlbg==?= <j@x.example>"),
        (
            "Ann B <a@x.example>, Jürgen <j@x.example>,<k@x.example>",
            "Ann B <a@x.example>, =?utf-8?b?SsO8cmdlbg==?= <j@x.example>, <k@x.example>",
        ),
        ("<l.x.example> ü", "<l.x.example> =?utf-8?b?w7w=?="),
        ("=?x?= <l.x.example>", "=?utf-8?b?PT94Pz0=?= <l.x.example>"),
        // Nothing that a machine could read.
        ("1 < 2 > ü", "=?utf-8?b?MSA8IDIgPiDDvA==?="),
        ("<ü@x.example>", "=?utf-8?b?PMO8QHguZXhhbXBsZT4=?="),
        ("ü <a", "=?utf-8?b?w7wgPGE=?="),
    ] {
        let job = MailJob {
            headers: vec![("Errors-To".to_owned(), value.to_owned())],
            ..job()
        };
        let email = composed(&job);
        let unfolded = text(&email).replace("\r\n ", " ");
        assert!(
            unfolded.contains(&format!("\r\nErrors-To: {written}\r\n")),
            "{value}: {unfolded}"
        );
    }
}

#[test]
fn given_fields_keep_their_order_and_repetitions() {
    let headers = [("X-Tag", "one"), ("References", "<a@b> <c@d>"), ("X-Tag", "two")];
    let job = MailJob {
        headers: headers.map(|(n, v)| (n.to_owned(), v.to_owned())).to_vec(),
        ..job()
    };
    let email = composed(&job);
    assert_eq!(field_names(&email)[5..8], ["X-Tag", "References", "X-Tag"]);
    assert!(text(&email).contains("\r\nReferences: <a@b> <c@d>\r\nX-Tag: two\r\n"));
}

#[test]
fn unsubscribing_is_offered_by_url_and_mail_and_in_one_click_by_https_alone() {
    let with = |url: Option<&str>, mailto: Option<&str>| {
        let list_unsubscribe = Some(ListUnsubscribe {
            url: url.map(str::to_owned),
            mailto: mailto.map(address),
        });
        composed(&MailJob {
            list_unsubscribe,
            ..job()
        })
    };
    let both = with(Some("https://u.example/?a=1,2"), Some("off+1@u.example"));
    assert!(
        text(&both).contains(
            "List-Unsubscribe: <https://u.example/?a=1%2C2>,\r\n <mailto:off%2B1@u.example>\r\n\
             List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n"
        ),
        "{}",
        text(&both)
    );
    assert!(!text(&with(Some("http://u.example/"), None)).contains("Unsubscribe-Post"));
    let longest = format!("https://u.example/{}", ",".repeat(294));
    assert_wire_form(&with(Some(&longest), Some("off@u.example")));
    assert!(!text(&with(None, Some("off@u.example"))).contains("Unsubscribe-Post"));
}

#[test]
fn international_domains_are_ascii_and_only_local_parts_need_smtputf8() {
    let mut job = job();
    job.to = vec![mailbox(Some("Jürgen"), "info@bücher.example")];
    let email = composed(&job);
    assert_eq!(email.recipients, [address("info@xn--bcher-kva.example")]);
    assert!(!email.needs_utf8 && !email.is_8bit);
    assert!(text(&email).contains("<info@xn--bcher-kva.example>"));

    job.to = vec![mailbox(None, "jürgen@bücher.example")];
    let email = composed(&job);
    assert_eq!(email.recipients, [address("jürgen@xn--bcher-kva.example")]);
    assert!(email.needs_utf8 && email.is_8bit);
    assert!(text(&email).contains("To: jürgen@xn--bcher-kva.example\r\n"));

    job.bcc = std::mem::take(&mut job.to);
    let email = composed(&job);
    assert!(
        email.needs_utf8 && !email.is_8bit,
        "the envelope alone is international"
    );
}

#[test]
fn a_domain_without_an_ascii_form_is_refused() {
    let mut job = job();
    job.to = vec![mailbox(None, "info@b\u{fc}cher.ex#ample")];
    let failure = try_compose(&job, &Prepared::default()).unwrap_err();
    assert_eq!(failure.reason, "invalid_address");
}

#[test]
fn display_names_come_back_as_they_were() {
    for name in [
        "Ann Smith",
        "Smith, Ann",
        "\"Q\" \\ R",
        "Jürgen",
        "=?utf-8?b?eA==?=",
        "a.b",
        "Ann (Sales)",
        &"Ürsula ".repeat(30),
        &"long ".repeat(40),
    ] {
        let job = MailJob {
            cc: vec![
                mailbox(Some(name), "x@example.com"),
                mailbox(None, "y@example.com"),
            ],
            ..job()
        };
        let email = composed(&job);
        let message = parsed(&email);
        let cc = message.cc().unwrap().as_list().unwrap();
        assert_eq!(cc[0].name(), Some(name.trim()), "{}", text(&email));
        assert_eq!(
            (cc[0].address(), cc[1].address()),
            (Some("x@example.com"), Some("y@example.com"))
        );
    }
}

#[test]
fn a_long_list_of_recipients_is_folded() {
    let to = (0..100)
        .map(|n| mailbox(None, &format!("recipient{n}@example.com")))
        .collect();
    let email = composed(&MailJob { to, ..job() });
    assert_eq!(parsed(&email).to().unwrap().as_list().unwrap().len(), 100);
    assert!(text(&email).split("\r\n").all(|line| line.len() <= 78));
}

#[test]
fn a_fallback_send_is_from_the_platform_and_answers_go_to_the_author() {
    let job = MailJob {
        reply_to: vec![mailbox(None, "elsewhere@acme.example")],
        ..job()
    };
    let (platform, author) = (
        mailbox(Some("Acme"), "mail@platform.example"),
        [mailbox(None, "info@acme.example")],
    );
    let email = compose(&Composition {
        job: &job,
        from: &platform,
        reply_to: Some(&author),
        envelope_from: None,
        recipients: &[],
        message_id: ID,
        date: Timestamp::UNIX_EPOCH,
        prepared: &Prepared::default(),
    })
    .unwrap();
    assert_eq!(email.envelope_from, None);
    assert!(text(&email).contains("From: Acme <mail@platform.example>\r\nReply-To: info@acme.example\r\n"));
}

#[test]
fn links_are_in_both_bodies() {
    let link = Link {
        filename: "big.zip".to_owned(),
        size: 30_000_000,
        url: "https://s3.example/key?sig=1".to_owned(),
        expires_at: None,
    };
    let prepared = Prepared {
        links: vec![link],
        ..Prepared::default()
    };
    let job = MailJob {
        html: Some("<body>x</body>".to_owned()),
        ..job()
    };
    let email = try_compose(&job, &prepared).unwrap();
    let message = parsed(&email);
    assert!(body(&message, false).contains("https://s3.example/key?sig=1"));
    assert!(body(&message, true).contains("href=\"https://s3.example/key?sig=1\""));
    let bare = MailJob {
        text: None,
        html: None,
        ..job
    };
    assert!(body(&parsed(&try_compose(&bare, &prepared).unwrap()), false).contains("big.zip (30.0 MB)"));
}

#[test]
fn an_attached_message_is_not_declared_as_one() {
    let email = with_parts(&job(), vec![file("mail.eml", b"Subject: x\n\nbody")]);
    let message = parsed(&email);
    assert_eq!(message.parts[2].contents(), b"Subject: x\n\nbody");
    assert!(text(&email).contains("Content-Type: application/octet-stream"));
    // Media types are compared without case (RFC 2045 §5.1).
    for declared in ["Message/RFC822", "MULTIPART/mixed; boundary=x"] {
        let mut part = file("mail", b"Subject: x\n\nbody");
        part.content_type = declared.to_owned();
        let email = with_parts(&job(), vec![part]);
        assert!(
            text(&email).contains("Content-Type: application/octet-stream"),
            "{declared}"
        );
    }
}

#[test]
fn a_declared_media_type_is_believed_when_well_formed() {
    for (name, declared, media) in [
        ("a.pdf", None, "application/pdf"),
        ("a.PDF", Some(""), "application/pdf"),
        ("a", None, media::BYTES),
        (
            "a.csv",
            Some("text/csv; charset=\"latin1\""),
            "text/csv; charset=\"latin1\"",
        ),
        ("a.csv", Some("text/csv\r\nBcc: x"), "text/csv"),
        ("a.csv", Some("nonsense"), "text/csv"),
    ] {
        assert_eq!(media::media_type(name, declared), media);
    }
    // As long as a job may declare it.
    let long = |len: usize| format!("text/x; a={}", "x".repeat(len - "text/x; a=".len()));
    assert_eq!(media::media_type("a", Some(&long(255))), long(255));
    assert_eq!(media::media_type("a", Some(&long(256))), media::BYTES);
}

#[test]
fn message_ids_repeat_for_a_job_and_differ_for_any_other() {
    let (acme, other) = ("acme".parse().unwrap(), "acm".parse().unwrap());
    let id = |secret: &[u8], tenant, job: &str, born| {
        message_id(secret, tenant, &job.parse().unwrap(), born, "bücher.example")
    };
    let first = id(b"k", &acme, "1", 5);
    assert_eq!(first, id(b"k", &acme, "1", 5));
    assert!(
        first.starts_with('<') && first.ends_with("@xn--bcher-kva.example>") && first.len() == 56,
        "{first}"
    );
    for other in [
        id(b"l", &acme, "1", 5),
        id(b"k", &acme, "2", 5),
        id(b"k", &acme, "1", 6),
        id(b"k", &other, "e1", 5),
    ] {
        assert_ne!(first, other);
    }
}

/// Text as people and programs write it, with everything that has a meaning in mail.
fn nasty() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        "[a-zA-Z0-9 .,;:=?_<>@\"'()%-]{0,20}",
        "\\PC{0,10}",
        Just("\r\n".to_owned()),
        Just("\r\nBcc: evil@example.net\r\n\r\n".to_owned()),
        Just("\n.\n".to_owned()),
        Just("\r".to_owned()),
        Just("\0".to_owned()),
        Just("=?utf-8?q?x?=".to_owned()),
        Just("--=_".to_owned()),
        Just("x".repeat(1200)),
        Just("ü€😀".repeat(40)),
        Just(" ".repeat(100)),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn no_value_injects_a_field_or_a_part(
        subject in nasty(), name in nasty(), value in nasty(), filename in nasty(), cid in nasty(), media in nasty(),
    ) {
        let mut job = job();
        job.to = vec![mailbox(Some(&name), "ann@example.com")];
        job.bcc = vec![mailbox(Some(&name), "hidden@example.org")];
        job.subject = Some(subject.clone());
        job.headers = vec![("X-One".to_owned(), format!("{value}<{name}>{subject} <a@b>"))];
        job.html = Some("<p>x</p>".to_owned());
        let mut inline = image(&filename, &cid, b"bytes");
        inline.content_type = media;
        let email = with_parts(&job, vec![inline, file(&filename, b"attached")]);
        let message = parsed(&email);
        prop_assert_eq!(field_names(&email), [
            "Date", "From", "To", "Subject", "Message-ID", "X-One", "X-Postroom-ID", "MIME-Version", "Content-Type",
        ]);
        prop_assert!(!text(&email).contains("hidden@"));
        prop_assert_eq!(message.parts.len(), 7);
        prop_assert_eq!(message.parts[5].contents(), b"bytes");
        prop_assert_eq!(message.parts[6].contents(), b"attached");
        let whole: String = header::clean(&filename).into_owned();
        if !whole.trim().is_empty() && whole.trim() == whole {
            prop_assert_eq!(message.parts[6].attachment_name(), Some(whole.as_str()));
        }
    }

    #[test]
    fn subjects_come_back(subject in "[a-zA-Z0-9=?_ü€😀][\\PC ]{0,200}[a-z=?ü]") {
        let email = composed(&MailJob { subject: Some(subject.clone()), ..job() });
        let message = parsed(&email);
        prop_assert_eq!(message.subject(), Some(subject.as_str()));
    }

    #[test]
    fn bodies_come_back_with_mail_line_ends(plain in nasty(), html in nasty(), data in prop::collection::vec(any::<u8>(), 0..500)) {
        let job = MailJob { text: Some(plain.clone()), html: Some(html.clone()), ..job() };
        let email = with_parts(&job, vec![file("a.bin", &data)]);
        let message = parsed(&email);
        prop_assert_eq!(body(&message, false), body::with_crlf(&plain));
        prop_assert_eq!(body(&message, true), body::with_crlf(&html));
        prop_assert_eq!(message.parts.last().unwrap().contents(), &data[..]);
    }
}
