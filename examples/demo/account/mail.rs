//! One mail, read as a mail program would, against what the job asked for.

use std::time::Duration;

use jiff::Timestamp;
use mail_parser::{Message, MessageParser, MimeHeaders as _};
use postroom_testkit::smtp::Received;

use super::links::Link;
use crate::plan::{Delivered, File, Mail};

/// The clocks of the database and of this machine may differ by so much.
const CLOCKS: Duration = Duration::from_secs(1);

/// What is not as it must be.
pub(super) fn differences(received: &Received, expected: &Mail) -> Vec<String> {
    let Some(mail) = MessageParser::default().parse(&received.data) else {
        return vec!["its mail cannot be read".to_owned()];
    };
    let mut found = envelope(received, expected);
    let from = mail
        .from()
        .and_then(|from| from.first()?.address())
        .unwrap_or_default();
    if from != expected.from {
        found.push(format!("From {from}, expected {}", expected.from));
    }
    if mail.subject() != Some(&expected.subject) {
        found.push(format!(
            "subject {:?}, expected {:?}",
            mail.subject(),
            expected.subject
        ));
    }
    let whole = String::from_utf8_lossy(&received.data);
    for hidden in expected
        .hidden
        .iter()
        .filter(|address| whole.contains(address.as_str()))
    {
        found.push(format!("the mail shows the Bcc recipient {hidden}"));
    }
    found.extend(bodies(&mail, expected));
    found.extend(files(&mail, expected));
    found
}

fn envelope(received: &Received, expected: &Mail) -> Vec<String> {
    let mut found = Vec::new();
    let user = received.user.as_deref().unwrap_or("nobody");
    if user != expected.login {
        found.push(format!("sent by user {user}, expected {}", expected.login));
    }
    if !received.tls {
        found.push("sent without TLS".to_owned());
    }
    if let Some(due) = expected.not_before
        && Timestamp::try_from(received.time + CLOCKS).is_ok_and(|at| at < due)
    {
        found.push(format!("sent before {due}"));
    }
    found
}

/// The bodies, and a link in each for every large file.
fn bodies(mail: &Message<'_>, expected: &Mail) -> Vec<String> {
    let mut found = Vec::new();
    let text = mail.body_text(0).map(|body| unix(&body));
    if let Some(want) = &expected.text
        && !is_body(text.as_deref(), &unix(want), expected)
    {
        found.push(format!("text {text:?}, expected {want:?}"));
    }
    let html = mail.body_html(0).map(|body| unix(&body));
    if let Some(want) = &expected.html {
        // Links stand before the end of the body.
        let want = unix(want);
        let start = want.trim_end_matches("</body></html>");
        if !is_body(
            html.as_deref(),
            if expected.links() > 0 { start } else { &want },
            expected,
        ) {
            found.push(format!("HTML {html:?}, expected {want:?}"));
        }
    }
    let bodies = usize::from(expected.text.is_some()) + usize::from(expected.html.is_some());
    let links = urls(mail, expected).len();
    if links != bodies * expected.links() {
        found.push(format!(
            "{links} links, expected {} in each of {bodies} bodies",
            expected.links()
        ));
    }
    found
}

/// The same; with links, the beginning is the same.
fn is_body(body: Option<&str>, want: &str, expected: &Mail) -> bool {
    body.is_some_and(|body| {
        if expected.links() > 0 {
            body.starts_with(want)
        } else {
            body == want
        }
    })
}

/// Line ends differ on their way; blank lines at the end do not count.
fn unix(text: &str) -> String {
    text.replace("\r\n", "\n").trim_end().to_owned()
}

/// Files in the mail.
fn files(mail: &Message<'_>, expected: &Mail) -> Vec<String> {
    let inside: Vec<&File> = expected
        .files
        .iter()
        .filter(|file| file.delivered != Delivered::Linked)
        .collect();
    let mut found = Vec::new();
    if mail.attachment_count() != inside.len() {
        found.push(format!(
            "{} attachments, expected {}",
            mail.attachment_count(),
            inside.len()
        ));
    }
    for file in inside {
        let same = mail.attachments().any(|part| {
            let id = match file.delivered {
                Delivered::Inline(id) => Some(id),
                _ => part.content_id(),
            };
            part.attachment_name() == Some(&file.name)
                && part.contents() == file.bytes
                && part.content_id() == id
        });
        if !same {
            found.push(format!("attachment {} is missing or not the same", file.name));
        }
    }
    found
}

/// The links of a mail, as in its text and in its HTML.
fn urls(mail: &Message<'_>, expected: &Mail) -> Vec<String> {
    let text = expected
        .text
        .as_ref()
        .and_then(|_| mail.body_text(0))
        .unwrap_or_default();
    let html = expected
        .html
        .as_ref()
        .and_then(|_| mail.body_html(0))
        .unwrap_or_default();
    let lines = text.lines().filter(|line| line.starts_with("http://"));
    let anchors = html
        .split("href=\"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next());
    lines
        .map(str::to_owned)
        .chain(anchors.map(|url| url.replace("&amp;", "&")))
        .collect()
}

/// The links with what must be behind them.
pub(super) fn links(job: &str, received: &Received, expected: &Mail) -> Vec<Link> {
    let Some(file) = expected
        .files
        .iter()
        .find(|file| file.delivered == Delivered::Linked)
    else {
        return Vec::new();
    };
    let mail = MessageParser::default().parse(&received.data);
    let urls = mail.map(|mail| urls(&mail, expected)).unwrap_or_default();
    let link = |url| Link {
        job: job.to_owned(),
        url,
        expected: file.bytes.clone(),
    };
    urls.into_iter().map(link).collect()
}

/// Its Message-ID without brackets.
pub(super) fn message_id(received: &Received) -> String {
    let mail = MessageParser::default().parse_headers(&received.data);
    mail.as_ref()
        .and_then(Message::message_id)
        .unwrap_or_default()
        .to_owned()
}
