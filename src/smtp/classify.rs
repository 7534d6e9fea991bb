//! What a refusal means: the reply code says whether it passes, then the enhanced code (RFC 3463 and its registry),
//! then the words, then the code alone say what it is about and whose fault it is.

mod hint;
mod verdict;
mod words;

use crate::failure::{Class, Failure, Reply, Severity, Stage};

pub use hint::delay_hint;
use verdict::{
    ACCOUNT_DISABLED, ADDRESS_REFUSED, AUTH_MECHANISM_REFUSED, AUTH_REFUSED, AUTH_REQUIRED, AUTH_TEMPORARY,
    BAD_SEQUENCE, BLOCKLISTED, CLIENT_BLOCKED, CLIENT_REFUSED, CONTENT_REFUSED, DOMAIN_REFUSES_MAIL,
    DOMAIN_UNKNOWN, ENCRYPTION_REQUIRED, MAILBOX_DISABLED, MAILBOX_FULL, MAILBOX_UNAVAILABLE,
    MESSAGE_TOO_LARGE, POLICY_REFUSED, PROTOCOL_ERROR, QUOTA_EXCEEDED, RATE_LIMITED, RECIPIENT_DEFERRED,
    RECIPIENT_MOVED, RECIPIENT_REFUSED, RECIPIENT_UNKNOWN, ROUTING_FAILED, SENDER_NOT_AUTHENTICATED,
    SENDER_REFUSED, SERVER_ERROR, SERVER_FULL, SERVICE_UNAVAILABLE, SMTPUTF8_UNSUPPORTED, SPAM,
    STARTTLS_REFUSED, TOO_MANY_RECIPIENTS, Verdict,
};

/// Classifies a negative reply given at a stage.
#[must_use]
pub fn refusal(stage: Stage, reply: Reply) -> Failure {
    let verdict = verdict(stage, &reply);
    let mut failure = Failure::transient(
        verdict.class,
        verdict.fault,
        stage,
        verdict.reason,
        verdict.message,
    );
    failure.severity = match (verdict.severity, verdict.class) {
        (Some(severity), _) => severity,
        // What is wrong with the account, or with our address, says nothing about the mail: it waits for somebody to mend
        // that.
        (None, Class::Auth) => Severity::Transient,
        (None, _) if stage == Stage::Connect => Severity::Transient,
        (None, _) => reply.severity(),
    };
    if failure.is_transient() {
        failure.retry_after = delay_hint(&reply.text).or(verdict.wait);
    }
    failure.with_reply(reply)
}

fn verdict(stage: Stage, reply: &Reply) -> Verdict {
    let text = reply.text.to_ascii_lowercase();
    let detail = reply.enhanced.as_deref().and_then(|code| code.split_once('.'));
    let detail = detail.map_or("", |(_, detail)| detail);
    by_decisive_code(stage, reply.code, detail, &text)
        .or_else(|| about_us(&text))
        .or_else(|| by_detail(stage, reply, detail, &text))
        .or_else(|| by_text(stage, &text))
        .or_else(|| by_subject(stage, detail))
        .unwrap_or_else(|| by_code(stage, reply.code))
}

/// What is said about our address, or the name that we say in EHLO.
fn about_us(text: &str) -> Option<Verdict> {
    let quotes = words::VERIFICATION.iter().any(|words| text.contains(words));
    words::find(words::CLIENT, text).filter(|_| !quotes)
}

/// Codes and stages that leave no doubt.
fn by_decisive_code(stage: Stage, code: u16, detail: &str, text: &str) -> Option<Verdict> {
    Some(match code {
        421 => throttled(text).unwrap_or(if detail.starts_with("7.") {
            RATE_LIMITED
        } else {
            SERVICE_UNAVAILABLE
        }),
        454 if stage != Stage::Auth && text.contains("tls") => throttled(text).unwrap_or(STARTTLS_REFUSED),
        432 | 450..=454 if stage == Stage::Auth => throttled(text).unwrap_or(AUTH_TEMPORARY),
        500..=502 | 504 if stage == Stage::Auth => AUTH_MECHANISM_REFUSED,
        534 | 538 => AUTH_MECHANISM_REFUSED,
        535 if text.contains("basic authentication is disabled") => AUTH_MECHANISM_REFUSED,
        535 => AUTH_REFUSED,
        530 if text.contains("starttls") => ENCRYPTION_REQUIRED,
        530 => AUTH_REQUIRED,
        523 => ENCRYPTION_REQUIRED,
        521 | 556 if stage == Stage::RcptTo => DOMAIN_REFUSES_MAIL,
        503 => BAD_SEQUENCE,
        _ if stage == Stage::Auth => return None,
        541 => SPAM,
        551 => RECIPIENT_MOVED,
        _ => return None,
    })
}

/// Enhanced codes with one meaning, `detail` being what follows the class digit.
fn by_detail(stage: Stage, reply: &Reply, detail: &str, text: &str) -> Option<Verdict> {
    let at_sender = stage == Stage::MailFrom || words::find(words::SENDER, text).is_some();
    Some(match detail {
        "1.1" | "1.2" | "1.3" | "1.4" | "1.0" if at_sender => SENDER_REFUSED,
        "1.1" => RECIPIENT_UNKNOWN,
        "1.2" => DOMAIN_UNKNOWN,
        "1.3" | "1.4" => ADDRESS_REFUSED,
        "1.6" | "2.4" => RECIPIENT_MOVED,
        "1.7" | "1.8" | "7.60" => SENDER_REFUSED,
        "2.252" if text.contains("sendasdenied") => SENDER_REFUSED,
        "1.10" => DOMAIN_REFUSES_MAIL,
        "2.1" => throttled(text).unwrap_or_else(|| disabled(stage, text)),
        // The mailbox that sends, full: Exchange stores what it submits there.
        "2.2" if text.contains("storedrv.submission") => QUOTA_EXCEEDED,
        "2.2" => MAILBOX_FULL,
        "2.3" | "3.4" => MESSAGE_TOO_LARGE,
        "3.1" => SERVER_FULL,
        // Exchange Online, of a recipient that its directory does not have.
        "4.1" if stage == Stage::RcptTo && text.contains("recipient address rejected: access denied") => {
            RECIPIENT_UNKNOWN
        }
        "4.5" => throttled(text).unwrap_or(RATE_LIMITED),
        "4.1" | "4.2" | "4.3" | "4.4" | "4.6" | "4.7" => ROUTING_FAILED,
        "5.3" => TOO_MANY_RECIPIENTS,
        "6.7" => SMTPUTF8_UNSUPPORTED,
        "7.8" | "7.139" if is_about_login(stage) => AUTH_REFUSED,
        "7.9" | "7.30" if is_about_login(stage) => AUTH_MECHANISM_REFUSED,
        // Gmail: neither SPF nor DKIM has passed.
        "7.30" => SENDER_NOT_AUTHENTICATED,
        "7.10" | "7.11" => ENCRYPTION_REQUIRED,
        "7.13" => ACCOUNT_DISABLED,
        "7.57" => AUTH_REQUIRED,
        "7.20" | "7.21" | "7.22" | "7.23" | "7.24" | "7.25" | "7.26" | "7.27" | "7.29" => {
            SENDER_NOT_AUTHENTICATED
        }
        // 5.2.25x is what Exchange Online says to a sender that has repeated an error too often.
        "7.28" | "2.251" | "2.252" | "2.253" | "2.254" | "2.255" => RATE_LIMITED,
        "7.705" | "7.708" => QUOTA_EXCEEDED,
        _ if detail.starts_with("6.") => CONTENT_REFUSED,
        // Exchange Online throttles as 4.7.500 to 4.7.699.
        _ if reply.code < 500 && detail.len() == 5 && matches!(&detail[..3], "7.5" | "7.6") => RATE_LIMITED,
        _ => return None,
    })
}

/// Whether a refusal may be the login's. Later ones are about recipient and mail: Yahoo refuses those with 5.7.9 too.
fn is_about_login(stage: Stage) -> bool {
    matches!(stage, Stage::Auth | Stage::MailFrom)
}

/// Words of servers whose codes say little. The first that fits.
fn by_text(stage: Stage, text: &str) -> Option<Verdict> {
    let of_stage = if stage == Stage::RcptTo {
        words::RECIPIENT
    } else {
        words::ELSEWHERE
    };
    throttled(text)
        .or_else(|| words::find(words::SENDER, text))
        .or_else(|| words::find(words::OWN_ACCOUNT, text))
        .or_else(|| words::find(of_stage, text))
        .or_else(|| words::find(words::GENERAL, text).map(|found| whose_listing(stage, found)))
        .or_else(|| words::find(words::SOME_ACCOUNT, text).map(|_| disabled(stage, text)))
}

/// What is on a blocklist: before MAIL the server knows nothing but our address.
fn whose_listing(stage: Stage, found: Verdict) -> Verdict {
    let listed = found.reason == BLOCKLISTED.reason;
    if listed && matches!(stage, Stage::Connect | Stage::Auth) {
        CLIENT_REFUSED
    } else {
        found
    }
}

/// Whose account is disabled: after MAIL it is the recipient's, unless the server says otherwise.
fn disabled(stage: Stage, text: &str) -> Verdict {
    let own = is_about_login(stage) || words::find(words::OWN_ACCOUNT, text).is_some();
    if own { ACCOUNT_DISABLED } else { MAILBOX_DISABLED }
}

/// Whether the server asks to go slower, and how.
fn throttled(text: &str) -> Option<Verdict> {
    words::find(words::THROTTLED, text)
}

/// Enhanced codes that say only the subject.
fn by_subject(stage: Stage, detail: &str) -> Option<Verdict> {
    let subject = detail.split('.').next()?;
    Some(match (subject, stage) {
        ("1" | "7", Stage::MailFrom) => SENDER_REFUSED,
        ("1", _) => ADDRESS_REFUSED,
        ("2", Stage::MailFrom) | ("7", Stage::Auth) => return None,
        ("2", _) => MAILBOX_UNAVAILABLE,
        ("3", _) => SERVER_ERROR,
        ("4", _) => ROUTING_FAILED,
        ("5", _) => PROTOCOL_ERROR,
        ("7", _) => POLICY_REFUSED,
        _ => return None,
    })
}

/// All that is left: the code, at its stage.
fn by_code(stage: Stage, code: u16) -> Verdict {
    match (code, stage) {
        (400..=499, Stage::Auth) => AUTH_TEMPORARY,
        (_, Stage::Auth) => AUTH_REFUSED,
        (400..=499, Stage::Connect) => SERVICE_UNAVAILABLE,
        (500..=504, _) => PROTOCOL_ERROR,
        (_, Stage::Connect) => CLIENT_BLOCKED,
        (450, Stage::RcptTo) => MAILBOX_UNAVAILABLE,
        (452, _) => SERVER_FULL,
        (400..=499, Stage::RcptTo) => RECIPIENT_DEFERRED,
        (400..=499, _) => SERVER_ERROR,
        (552, _) => MESSAGE_TOO_LARGE,
        (553, Stage::RcptTo) => ADDRESS_REFUSED,
        (_, Stage::RcptTo) => RECIPIENT_REFUSED,
        (555, _) => PROTOCOL_ERROR,
        (_, Stage::MailFrom) => SENDER_REFUSED,
        (_, Stage::Data) => CONTENT_REFUSED,
        _ => POLICY_REFUSED,
    }
}

#[cfg(test)]
mod tests;
