//! One message: what came of it, against what must come of it.

use serde_json::Value;

use super::links::Link;
use super::mail;
use super::seen::{Seen, SeenMail};
use crate::hook::Hook;
use crate::plan::{Expect, Mail, Message};

/// Mails of the message's job.
pub(super) fn mails<'a>(message: &Message, seen: &'a Seen) -> &'a [SeenMail] {
    let id = message.id.as_deref().unwrap_or_default();
    seen.mails.get(id).map_or(&[], Vec::as_slice)
}

/// Links in the mails of the message's job.
pub(super) fn links(message: &Message, seen: &Seen) -> Vec<Link> {
    let Expect::Sent(expected) = &message.expect else {
        return Vec::new();
    };
    let of = |mail: &SeenMail| mail::links(&message.name(), &mail.received, expected);
    mails(message, seen).iter().flat_map(of).collect()
}

/// Number of final reports of its job.
pub(super) fn finals(message: &Message, seen: &Seen) -> usize {
    message
        .id
        .as_deref()
        .map_or(0, |id| seen.finals_of(message.tenant, id).len())
}

/// What is not as it must be, each beginning with the name of the job.
pub(super) fn differences(message: &Message, seen: &Seen) -> Vec<String> {
    let mut found = Vec::new();
    match &message.expect {
        // Its original is looked at by itself.
        Expect::Duplicate => {}
        Expect::Conflict => found.extend(conflict(message, seen)),
        _ if message.id.is_none() => {}
        Expect::Sent(expected) => {
            found.extend(report(message, seen, "mail.sent", None));
            found.extend(sent(message, expected, seen));
            found.extend(ledger(message, seen, "sent"));
        }
        Expect::Failed(reason) => {
            found.extend(report(message, seen, "mail.failed", Some(reason)));
            found.extend(ledger(message, seen, "failed"));
        }
        Expect::Expired => {
            found.extend(report(message, seen, "mail.expired", None));
            found.extend(ledger(message, seen, "expired"));
        }
        Expect::Rejected(reason) => found.extend(report(message, seen, "mail.rejected", Some(reason))),
    }
    if message.has_final() && !matches!(message.expect, Expect::Sent(_)) && !mails(message, seen).is_empty() {
        found.push("a mail was sent, expected none".to_owned());
    }
    let name = message.name();
    found
        .into_iter()
        .map(|problem| format!("{name}: {problem}"))
        .collect()
}

/// Exactly one final report, of this type and for this reason.
fn report(message: &Message, seen: &Seen, kind: &str, reason: Option<&str>) -> Option<String> {
    let finals = seen.finals_of(message.tenant, message.id.as_deref()?);
    let describe = |hook: &&Hook| format!("{} {}", hook.kind(), hook.text("reason"));
    match &finals[..] {
        [] => Some(format!("no final report, expected {kind}")),
        [one] if one.kind() == kind && reason.is_none_or(|reason| one.text("reason") == reason) => None,
        [one] => Some(format!(
            "{}({}), expected {kind} {}",
            describe(one),
            one.text("detail"),
            reason.unwrap_or_default()
        )),
        several => {
            let kinds: Vec<String> = several.iter().map(describe).collect();
            Some(format!(
                "{} final reports ({}), expected one",
                several.len(),
                kinds.join(", ")
            ))
        }
    }
}

/// A rejection that is not final, and nothing else new.
fn conflict(message: &Message, seen: &Seen) -> Option<String> {
    let is_it = |hook: &&Hook| {
        hook.kind() == "mail.rejected"
            && hook.text("job") == message.id.as_deref().unwrap_or_default()
            && hook.text("reason") == "id_conflict"
            && !hook.is_final()
    };
    let count = seen.hooks.iter().filter(is_it).count();
    (count != 1).then(|| format!("{count} mail.rejected id_conflict reports, expected one that is not final"))
}

/// What the ledger says.
fn ledger(message: &Message, seen: &Seen, outcome: &str) -> Option<String> {
    let key = (message.tenant.to_owned(), message.id.clone()?);
    let Some(job) = seen.ledger.get(&key) else {
        return Some("not in the ledger".to_owned());
    };
    let text = |name: &str| job[name].as_str().unwrap_or("nothing").to_owned();
    let (state, found) = (text("state"), text("outcome"));
    let good = state == "done" && found.trim_start_matches("mail.") == outcome;
    (!good).then(|| format!("the ledger says {state}, {found}; expected done, {outcome}"))
}

/// The mails of a job that must be sent, and what its report says of them.
fn sent(message: &Message, expected: &Mail, seen: &Seen) -> Vec<String> {
    let mails = mails(message, seen);
    let mut found = Vec::new();
    if mails.len() != expected.mails {
        found.push(format!(
            "{} mails at the SMTP server, expected {}",
            mails.len(),
            expected.mails
        ));
    }
    let mut got: Vec<&str> = mails
        .iter()
        .flat_map(|mail| &mail.received.to)
        .map(String::as_str)
        .collect();
    let mut want: Vec<&str> = expected.accepted.iter().map(String::as_str).collect();
    got.sort_unstable();
    want.sort_unstable();
    if got != want {
        found.push(format!("the SMTP server took it for {got:?}, expected {want:?}"));
    }
    for seen in mails {
        found.extend(mail::differences(&seen.received, expected));
    }
    if let Some(hook) = seen
        .finals_of(message.tenant, message.id.as_deref().unwrap_or_default())
        .first()
    {
        found.extend(told(hook, expected));
        for seen in mails {
            let id = mail::message_id(&seen.received);
            if hook.text("message_id").trim_matches(['<', '>']) != id {
                found.push(format!(
                    "the report says Message-ID {}, the mail <{id}>",
                    hook.data("message_id")
                ));
            }
        }
    }
    found
}

/// What the final report of a sent job says.
fn told(hook: &Hook, expected: &Mail) -> Vec<String> {
    let mut found = Vec::new();
    let partial = hook.data("partial") == true;
    if partial == expected.refused.is_empty() {
        found.push(format!("the report says partial: {partial}"));
    }
    let via = hook.data("sender")["via"].as_str().unwrap_or("nobody");
    if via != expected.via {
        found.push(format!("sent via {via}, expected {}", expected.via));
    }
    let attempt = hook.data("attempt").as_u64().unwrap_or(0);
    if attempt < expected.attempts {
        found.push(format!(
            "attempt {attempt}, expected {} or more",
            expected.attempts
        ));
    }
    let links = hook.data("links").as_array().map_or(0, Vec::len);
    if links != expected.links() {
        found.push(format!(
            "the report names {links} links, expected {}",
            expected.links()
        ));
    }
    for (status, addresses) in [("accepted", &expected.accepted), ("refused", &expected.refused)] {
        let mut listed = addressed(hook, status);
        let mut want: Vec<&str> = addresses.iter().map(String::as_str).collect();
        listed.sort_unstable();
        want.sort_unstable();
        if listed != want {
            found.push(format!("the report says {status}: {listed:?}, expected {want:?}"));
        }
    }
    found
}

/// The recipients of this status.
fn addressed<'a>(hook: &'a Hook, status: &str) -> Vec<&'a str> {
    let recipients = hook.data("recipients").as_array().into_iter().flatten();
    recipients
        .filter(|recipient| recipient["status"] == status)
        .filter_map(|recipient| recipient.get("address").and_then(Value::as_str))
        .collect()
}
