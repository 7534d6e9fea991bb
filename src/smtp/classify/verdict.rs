//! The kinds of refusal, each with its documented reason word.

use std::time::Duration;

use crate::failure::{Class, Fault, Severity};

/// What a refusal means.
#[derive(Debug, Clone, Copy)]
pub(super) struct Verdict {
    pub(super) class: Class,
    pub(super) fault: Fault,
    pub(super) reason: &'static str,
    pub(super) message: &'static str,
    /// Where the reply code is known to mislead.
    pub(super) severity: Option<Severity>,
    /// Least wait when the server names none.
    pub(super) wait: Option<Duration>,
}

const fn verdict(class: Class, fault: Fault, reason: &'static str, message: &'static str) -> Verdict {
    Verdict {
        class,
        fault,
        reason,
        message,
        severity: None,
        wait: None,
    }
}

/// Passes by itself whatever the code says: some providers answer 550 when a day's quota is used up.
const fn passing(mut verdict: Verdict) -> Verdict {
    verdict.severity = Some(Severity::Transient);
    verdict
}

const fn waiting(mut verdict: Verdict, seconds: u64) -> Verdict {
    verdict.wait = Some(Duration::from_secs(seconds));
    verdict
}

macro_rules! verdicts {
    ($($name:ident = $class:ident $fault:ident $reason:literal $message:literal;)+) => {
        $(pub(super) const $name: Verdict = verdict(Class::$class, Fault::$fault, $reason, $message);)+
    };
}

verdicts! {
    RECIPIENT_UNKNOWN = Recipient Recipient "recipient_unknown" "The server does not know this recipient";
    DOMAIN_UNKNOWN = Recipient Recipient "domain_unknown" "The recipient's domain does not exist or cannot be reached";
    DOMAIN_REFUSES_MAIL = Recipient Recipient "domain_refuses_mail" "The recipient's domain takes no mail";
    ADDRESS_REFUSED = Recipient Recipient "address_refused" "The server refuses the form of the address";
    RECIPIENT_MOVED = Recipient Recipient "recipient_moved" "The recipient is no longer at this address";
    MAILBOX_DISABLED = Recipient Recipient "mailbox_disabled" "The recipient's mailbox is disabled";
    MAILBOX_FULL = Recipient Recipient "mailbox_full" "The recipient's mailbox is full";
    MAILBOX_UNAVAILABLE = Recipient Recipient "mailbox_unavailable" "The recipient's mailbox is not available";
    RECIPIENT_REFUSED = Recipient Recipient "recipient_refused" "The server refuses this recipient";
    RECIPIENT_DEFERRED = Recipient Recipient "recipient_deferred" "The server does not take mail for this recipient now";
    MESSAGE_TOO_LARGE = Content Sender "message_too_large" "The mail is larger than the server takes";
    CONTENT_REFUSED = Content Sender "content_refused" "The server refuses the mail";
    SPAM = Content Sender "spam" "The server takes the mail for spam";
    VIRUS = Content Sender "virus" "The server found a virus in the mail";
    SMTPUTF8_UNSUPPORTED = Content Sender "smtputf8_not_supported" "An address needs SMTPUTF8, which the receiver lacks";
    SENDER_REFUSED = Policy Sender "sender_refused" "The server refuses the sender's address";
    SENDER_NOT_AUTHENTICATED = Policy Sender "sender_not_authenticated" "SPF, DKIM, DMARC or reverse DNS of the sender failed";
    RELAY_DENIED = Policy Sender "relay_denied" "The server does not relay for this account";
    CLIENT_BLOCKED = Policy Us "client_blocked" "The server refuses mail from our address, or from the name that we say in EHLO";
    BLOCKLISTED = Policy Sender "blocklisted" "Something is on a blocklist: the sender's domain, a link in the mail, or our address";
    POLICY_REFUSED = Policy Sender "policy_refused" "The server refuses the mail by policy";
    GREYLISTED = Policy Recipient "greylisted" "The server takes mail from strangers only at the second attempt";
    AUTH_REFUSED = Auth Sender "auth_refused" "The server refuses the user name or password";
    AUTH_REQUIRED = Auth Sender "auth_required" "The server wants a login";
    AUTH_MECHANISM_REFUSED = Auth Sender "auth_mechanism_refused" "The server refuses this way of logging in";
    AUTH_TEMPORARY = Auth Provider "auth_temporary" "The server cannot check logins now";
    ACCOUNT_DISABLED = Auth Sender "account_disabled" "The account is disabled at the provider";
    SERVICE_UNAVAILABLE = Infrastructure Provider "service_unavailable" "The server is closing the connection";
    SERVER_ERROR = Infrastructure Provider "server_error" "The server has trouble of its own";
    SERVER_FULL = Infrastructure Provider "server_full" "The server is out of space";
    ROUTING_FAILED = Infrastructure Provider "routing_failed" "The server cannot reach the next one";
    ENCRYPTION_REQUIRED = Tls Sender "encryption_required" "The server wants TLS; set the account's TLS mode";
    STARTTLS_REFUSED = Tls Provider "starttls_refused" "The server does not start TLS now";
}

/// Whoever the mail is for: it waits until address, name or list are mended.
pub(super) const CLIENT_REFUSED: Verdict = passing(CLIENT_BLOCKED);
pub(super) const CONNECTION_LIMIT: Verdict = passing(verdict(
    Class::Rate,
    Fault::Provider,
    "connection_limit",
    "The server allows fewer connections; set max_connections of the account",
));
pub(super) const RATE_LIMITED: Verdict = passing(verdict(
    Class::Rate,
    Fault::Provider,
    "rate_limited",
    "The server asks to send more slowly",
));
/// A day's quota does not come back within a minute.
pub(super) const QUOTA_EXCEEDED: Verdict = waiting(
    passing(verdict(
        Class::Rate,
        Fault::Provider,
        "quota_exceeded",
        "The account's quota at the provider is used up",
    )),
    3600,
);
/// RFC 5321 §4.5.3.1.10: a 552 here is to be read as a 452.
pub(super) const TOO_MANY_RECIPIENTS: Verdict = passing(verdict(
    Class::Rate,
    Fault::Provider,
    "too_many_recipients",
    "The server takes fewer recipients per mail",
));
pub(super) const PROTOCOL_ERROR: Verdict = verdict(
    Class::Infrastructure,
    Fault::Provider,
    "protocol_error",
    "The server did not understand or expect the command",
);
/// 503 tells of a lost state of the session rather than of the mail.
pub(super) const BAD_SEQUENCE: Verdict = passing(PROTOCOL_ERROR);
