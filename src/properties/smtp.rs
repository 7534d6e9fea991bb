//! What SMTP servers say.

use bytes::BytesMut;
use lettre::transport::smtp::response::Response;

use super::is_one_line;
use crate::failure::{Reply, Stage};
use crate::retry::MAX_HINT;
use crate::smtp::{Extensions, ReplyText, classify};

const STAGES: [Stage; 5] = [
    Stage::Connect,
    Stage::Auth,
    Stage::MailFrom,
    Stage::RcptTo,
    Stage::Data,
];

/// A conversation's replies, line by line.
pub fn smtp_reply(data: &[u8]) {
    let mut text = ReplyText::default();
    let mut parseable = Vec::new();
    for said in data.split_inclusive(|byte| *byte == b'\n') {
        let mut line = BytesMut::from(said);
        text.push(&mut line);
        assert!(line.len() <= 8 && line.ends_with(b"\r\n"), "{line:?}");
        parseable.extend_from_slice(&line);
        check_reply(&text.reply());
        check_reply(&text.refusal());
    }
    let parseable = std::str::from_utf8(&parseable).expect("what lettre reads is ASCII");
    let _ = parseable.parse::<Response>();
    let kept: usize = text.lines().map(str::len).sum();
    assert!(kept <= 16 << 10, "{kept} bytes of one reply are kept");
    let offered = Extensions::parse(text.lines());
    assert!(offered.auth.iter().map(String::len).sum::<usize>() <= kept);
}

fn check_reply(reply: &Reply) {
    assert!(reply.text.len() <= Reply::MAX_TEXT);
    assert!(
        is_one_line(&reply.text) && !reply.text.contains(char::is_control),
        "{reply:?}"
    );
    assert!(is_one_line(&reply.to_string()));
    assert!(
        reply.enhanced.as_ref().is_none_or(|code| code.len() <= 16),
        "{reply:?}"
    );
    for stage in STAGES {
        let failure = classify::refusal(stage, reply.clone());
        assert!(
            failure.retry_after.is_none_or(|wait| wait <= MAX_HINT),
            "{failure:?}"
        );
        assert!(is_one_line(&failure.to_string()));
    }
}
