//! The words by which servers say what their codes do not. All in lower case; the first row that fits counts.

use super::verdict::{
    ACCOUNT_DISABLED, BLOCKLISTED, CLIENT_REFUSED, CONNECTION_LIMIT, DOMAIN_UNKNOWN, GREYLISTED,
    MAILBOX_DISABLED, MAILBOX_FULL, MESSAGE_TOO_LARGE, QUOTA_EXCEEDED, RATE_LIMITED, RECIPIENT_UNKNOWN,
    RELAY_DENIED, SENDER_NOT_AUTHENTICATED, SENDER_REFUSED, SPAM, TOO_MANY_RECIPIENTS, VIRUS, Verdict,
};

type Row = (&'static [&'static str], Verdict);

/// About anything.
pub(super) const GENERAL: &[Row] = &[
    (&["greylist", "graylist", "grey list", "greylisted"], GREYLISTED),
    (&["too many recipients"], TOO_MANY_RECIPIENTS),
    (
        &[
            "mailbox full",
            "mailbox is full",
            "over quota",
            "quota exceeded",
            "exceeded storage",
            "out of storage",
        ],
        MAILBOX_FULL,
    ),
    (
        &[
            "message too large",
            "message size",
            "size exceeds",
            "too big",
            "exceeds maximum",
            "exceeds size",
        ],
        MESSAGE_TOO_LARGE,
    ),
    (&["virus", "malware", "infected"], VIRUS),
    (
        &[
            "relay access denied",
            "relaying denied",
            "relay denied",
            "unable to relay",
            "not permitted to relay",
            "relay not permitted",
        ],
        RELAY_DENIED,
    ),
    (
        &[
            "blacklist",
            "blocklist",
            "block list",
            "spamhaus",
            "spamcop",
            "barracuda",
            "dnsbl",
            "rbl",
            "reputation",
        ],
        BLOCKLISTED,
    ),
    (
        &[
            "not owned by user",
            "permission to send as",
            "permissions to send as",
            "allowed to send as",
            "sendasdenied",
        ],
        SENDER_REFUSED,
    ),
    (
        &["spf", "dkim", "dmarc", "sender is unauthenticated"],
        SENDER_NOT_AUTHENTICATED,
    ),
    (&["spam", "junk", "unsolicited"], SPAM),
];

/// About the account that sends, at any stage.
pub(super) const OWN_ACCOUNT: &[Row] = &[(
    &[
        // cPanel, of a domain whose mail its operator has stopped.
        "outgoing mail suspension",
        "outgoing mail from",
        "your account has been",
        "your account is disabled",
        "your account is suspended",
        "your account is blocked",
        "your account is locked",
        "your account was",
        "sender account is",
        "sender account has been",
    ],
    ACCOUNT_DISABLED,
)];

/// About an account: the stage tells whose.
pub(super) const SOME_ACCOUNT: &[Row] = &[(
    &[
        "account disabled",
        "account is disabled",
        "account suspended",
        "account has been",
    ],
    ACCOUNT_DISABLED,
)];

/// About the sender's address, whatever else is said: that its user is unknown, for one.
pub(super) const SENDER: &[Row] = &[(
    &[
        "sender address rejected",
        "sender address [",
        "sender verify",
        "sender verification fail",
    ],
    SENDER_REFUSED,
)];

/// Not in answers to RCPT, where it may be the recipient's.
pub(super) const ELSEWHERE: &[Row] = &[(&["email quota exceeded"], QUOTA_EXCEEDED)];

/// About our address, or the name that we say in EHLO. Many servers check those with the first recipient (Postfix'
/// `smtpd_delay_reject`). That something is on a list alone may as well mean a link in the mail.
pub(super) const CLIENT: &[Row] = &[(
    &["client host", "helo command", "is in a black list at"],
    CLIENT_REFUSED,
)];

/// About a recipient, whatever is quoted: Postfix passes on what the next server said when it looked whether there is such an
/// address (`reject_unverified_recipient`).
pub(super) const VERIFICATION: &[&str] = &["recipient address rejected", "undeliverable address"];

/// Only in answers to RCPT.
pub(super) const RECIPIENT: &[Row] = &[
    (
        &[
            "user unknown",
            "unknown user",
            "no such user",
            "no such recipient",
            "does not exist",
            "unknown recipient",
            "recipient not found",
            "no mailbox",
            "mailbox not found",
            "invalid recipient",
            "user not found",
            "unknown local",
            "no such mailbox",
            "recipient address rejected: unknown",
        ],
        RECIPIENT_UNKNOWN,
    ),
    (
        &["disabled", "inactive", "suspended", "no longer"],
        MAILBOX_DISABLED,
    ),
    (
        &[
            "domain not found",
            "unknown domain",
            "host or domain name not found",
        ],
        DOMAIN_UNKNOWN,
    ),
];

/// Requests to go slower.
pub(super) const THROTTLED: &[Row] = &[
    (
        &[
            "too many connections",
            "too many concurrent",
            "concurrent connections",
            "concurrent server connections",
            "connection limit",
            "too many sessions",
        ],
        CONNECTION_LIMIT,
    ),
    (
        &[
            "daily message quota",
            "daily sending quota",
            "daily user sending",
            "daily limit",
            "sending limit",
            "sending quota",
            "message quota",
            "submission quota",
            "submissionquotaexceeded",
            // The policy daemons of Postfix and Zimbra, of the sender although it stands in answers to RCPT.
            "policy rejection; quota",
            "policy rejection: quota",
            "quota of messages",
            "number of allowed outgoing",
            "exceeded the recipient limit",
            "messages per day",
            "emails per day",
        ],
        QUOTA_EXCEEDED,
    ),
    (
        &[
            "rate limit",
            "ratelimit",
            "sending rate",
            "throttl",
            "too many messages",
            "too many mails",
            "too fast",
            "too much mail",
            "slow down",
            "rate exceeded",
            "exceeded the rate",
            "message rate",
            "submission rate",
            "too many requests",
            "too many emails",
            "messages per",
            "emails per",
            "defers and failures per hour",
            "receiving mail at a rate",
            "login rate",
            "too many login",
            "too many auth",
        ],
        RATE_LIMITED,
    ),
];

/// The meaning of the first row with a word that is in the text.
pub(super) fn find(rows: &[Row], text: &str) -> Option<Verdict> {
    let row = rows
        .iter()
        .find(|(words, _)| words.iter().any(|word| says(text, word)));
    row.map(|(_, verdict)| *verdict)
}

/// Whether the text has the word; a short one must stand alone (`rbl` is no part of `marble`).
fn says(text: &str, word: &str) -> bool {
    if word.len() > 4 {
        return text.contains(word);
    }
    text.split(|c: char| !c.is_ascii_alphanumeric())
        .any(|part| part == word)
}
