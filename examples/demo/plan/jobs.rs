//! The jobs of every kind, each with what must come of it.

use jiff::SignedDuration;
use serde_json::json;

use super::draft::Draft;
use super::kind::SHARES;
use super::letter::{Delivered, File};
use super::{Expect, Kind, LARGE_FILE_BYTES, Message, PLATFORM_FROM, Surroundings};

/// The `n`th message of a kind.
pub(super) fn message(kind: Kind, n: usize, around: &Surroundings) -> Message {
    let mut draft = Draft::new(kind, n);
    match kind {
        Kind::Repeated => return repeated(n, around),
        Kind::SameIdOtherContent => return conflicting(n),
        Kind::Malformed => return malformed(n, draft.finish()),
        Kind::Refused
        | Kind::NoSender
        | Kind::Expired
        | Kind::UnknownTenant
        | Kind::UnknownAccount
        | Kind::Misspelt => unsendable(&mut draft, kind, n, around),
        _ => sendable(&mut draft, kind, n, around),
    }
    draft.finish()
}

/// What a job of a kind that ends in a mail has beyond text for one recipient.
fn sendable(draft: &mut Draft, kind: Kind, n: usize, around: &Surroundings) {
    let address = |name: &str| format!("{name}-{n}@example.org");
    match kind {
        Kind::Html => draft.bodies(n, false, true),
        Kind::Both | Kind::Compressed => draft.bodies(n, true, true),
        Kind::Copies => draft.copies(n),
        Kind::InlineImage => draft.inline_image(n),
        Kind::SmallFile => draft.attach(&File::noise("terms.pdf", n, 2000, Delivered::Attached), None),
        Kind::LargeFile => {
            draft.bodies(n, true, n.is_multiple_of(2));
            // Five contents for all of them: what is stored already is not stored again.
            let file = File::noise("catalogue.pdf", n % 5, LARGE_FILE_BYTES + 9000, Delivered::Linked);
            draft.attach(&file, None);
        }
        Kind::FetchedFile if n == 0 => {
            let (url, file) = &around.fetched_late;
            draft.attach(file, Some(url));
            draft.mail.attempts = 2;
        }
        Kind::FetchedFile => {
            let (url, file) = &around.fetched[n % around.fetched.len()];
            draft.attach(file, Some(url));
        }
        Kind::FetchedLarge => draft.attach(&around.fetched_large.1, Some(&around.fetched_large.0)),
        Kind::Scheduled => draft.scheduled(n, around),
        Kind::Newsletter | Kind::Urgent => draft.newsletter(kind),
        Kind::Greylisted => {
            draft.to(&[&address("later")], &[]);
            draft.mail.attempts = 2;
        }
        Kind::PartlyGreylisted => {
            draft.to(&[&address("ready"), &address("later-again")], &[]);
            (draft.mail.attempts, draft.mail.mails) = (2, 2);
        }
        Kind::PartlyRefused => draft.to(&[&address("here")], &[&address("nobody")]),
        Kind::Platform => {
            draft.tenant("hooli");
            draft.set("from", json!("Hooli <news@hooli.example>"));
            (draft.mail.login, draft.mail.via, draft.mail.from) = ("platform", "platform", PLATFORM_FROM);
        }
        Kind::SealedServer | Kind::PlainServer => draft.own_server(kind, around),
        _ => {}
    }
}

/// The same for one that ends otherwise.
fn unsendable(draft: &mut Draft, kind: Kind, n: usize, around: &Surroundings) {
    match kind {
        Kind::Refused => {
            draft.to(&[], &[&format!("nobody-{n}@example.net")]);
            draft.message.expect = Expect::Failed("recipient_unknown");
        }
        Kind::NoSender => draft.ends("umbrella", Expect::Failed("sender_not_configured")),
        Kind::UnknownTenant => draft.ends("nobody-knows", Expect::Rejected("unknown_tenant")),
        Kind::UnknownAccount => {
            draft.set("account", json!("typo"));
            draft.message.expect = Expect::Rejected("unknown_account");
        }
        Kind::Misspelt => {
            let subject = draft.json.remove("subject").unwrap_or_default();
            draft.set("subjcet", subject);
            draft.message.expect = Expect::Rejected("invalid");
        }
        _ => {
            let past = around.now - SignedDuration::from_mins(1);
            draft.set("expires_at", json!(past.to_string()));
            draft.message.expect = Expect::Expired;
        }
    }
}

/// Not JSON: a job that breaks off, whose id can still be told, or no job at all.
fn malformed(n: usize, job: Message) -> Message {
    let mut message = Message {
        expect: Expect::Rejected("not_json"),
        ..job
    };
    if n.is_multiple_of(2) {
        message.body.truncate(message.body.len() / 2);
    } else {
        message.body = format!("Dear Sir or Madam, please send mail number {n}").into_bytes();
        message.id = None;
    }
    message
}

/// A job published once more, without a change: some at once, some while the first waits for its account, some after
/// its final report.
fn repeated(n: usize, around: &Surroundings) -> Message {
    let original = if n % 7 == 6 {
        message(Kind::Newsletter, 100 + n, around)
    } else {
        message(Kind::Text, n, around)
    };
    Message {
        kind: Kind::Repeated,
        after_original: n % 2 == 1 && original.kind == Kind::Text,
        expect: Expect::Duplicate,
        ..original
    }
}

/// Another mail under the id of a job that is over.
fn conflicting(n: usize) -> Message {
    let mut draft = Draft::new(Kind::Text, 100 + n);
    draft.set("subject", json!("Something else altogether"));
    draft.message.kind = Kind::SameIdOtherContent;
    draft.message.after_original = true;
    draft.message.expect = Expect::Conflict;
    draft.finish()
}

const _: () = assert!(
    SHARES[Kind::Text as usize].count >= 106 && SHARES[Kind::Newsletter as usize].count >= 114,
    "the jobs that are repeated exist"
);
