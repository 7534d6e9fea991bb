//! Why something did not work, classified once where it happened and carried unchanged to the report.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::address::masked_in;

/// The reason of a failure that waits for a key.
pub const KEY_UNKNOWN: &str = "key_unknown";

/// What kind of trouble it is; the label in reports and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// The recipient's address or mailbox: unknown, disabled, full.
    Recipient,
    /// The mail itself: too large, malformed, refused as spam or virus, an attachment that cannot be had.
    Content,
    /// A rule of the provider about this sender: not allowed to send as, blocked, reputation.
    Policy,
    /// The account's credentials.
    Auth,
    /// The provider asks us to slow down.
    Rate,
    /// Name resolution, connections, time-outs, the provider's own trouble.
    Infrastructure,
    /// The TLS handshake or the server's certificate.
    Tls,
    /// Our own side: configuration, keys, object store.
    Local,
}

impl Class {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Recipient => "recipient",
            Self::Content => "content",
            Self::Policy => "policy",
            Self::Auth => "auth",
            Self::Rate => "rate",
            Self::Infrastructure => "infrastructure",
            Self::Tls => "tls",
            Self::Local => "local",
        }
    }
}

/// Whose fault it is. Only the provider's faults say something about the account's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The recipient's side.
    Recipient,
    /// Whoever wrote the job: its content, addresses or credentials.
    Sender,
    /// The SMTP server of the account.
    Provider,
    /// Postroom or its operator.
    Us,
}

impl Fault {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Recipient => "recipient",
            Self::Sender => "sender",
            Self::Provider => "provider",
            Self::Us => "us",
        }
    }
}

/// The stage of the pipeline at which it happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Reading and checking the job.
    Decode,
    /// Finding the account that sends.
    Resolve,
    /// Getting attachments.
    Fetch,
    /// Putting large attachments into the object store.
    Upload,
    /// Building the mail.
    Compose,
    /// Connecting, TLS, EHLO.
    Connect,
    /// SMTP AUTH.
    Auth,
    /// MAIL FROM.
    MailFrom,
    /// RCPT TO.
    RcptTo,
    /// DATA and the mail itself, up to the final reply.
    Data,
    /// Recording the outcome.
    Settle,
}

impl Stage {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Resolve => "resolve",
            Self::Fetch => "fetch",
            Self::Upload => "upload",
            Self::Compose => "compose",
            Self::Connect => "connect",
            Self::Auth => "auth",
            Self::MailFrom => "mail_from",
            Self::RcptTo => "rcpt_to",
            Self::Data => "data",
            Self::Settle => "settle",
        }
    }
}

/// Whether trying again later can help (RFC 5321 §4.2.1: 4yz and 5yz).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    /// May work later.
    Transient,
    /// Will not work by itself.
    Permanent,
}

/// An SMTP reply (RFC 5321 §4.2) with its enhanced status code (RFC 3463), cleaned for storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Three-digit code.
    pub code: u16,
    /// Enhanced status code such as `5.1.1`, if the server gave one.
    pub enhanced: Option<Arc<str>>,
    /// The text after the codes; control characters replaced, at most [`Reply::MAX_TEXT`] bytes.
    pub text: Arc<str>,
}

impl Reply {
    /// Longest reply text kept, in bytes.
    pub const MAX_TEXT: usize = 1024;

    /// Builds a reply from its code and all its text lines joined; splits off the enhanced code and cleans the text
    /// (server replies are foreign bytes: no NUL, no control characters, bounded).
    #[must_use]
    pub fn new(code: u16, text: &str) -> Self {
        let cleaned = without_controls(text.trim());
        let (enhanced, rest) = split_enhanced(code, &cleaned);
        let text = rest.trim();
        let text = &text[..text.floor_char_boundary(Self::MAX_TEXT)];
        Self {
            code,
            enhanced: enhanced.map(Arc::from),
            text: Arc::from(text),
        }
    }

    /// 2yz or 3yz.
    #[must_use]
    pub fn is_positive(&self) -> bool {
        (200..400).contains(&self.code)
    }

    /// 4yz is transient, anything else negative is permanent.
    #[must_use]
    pub fn severity(&self) -> Severity {
        if (400..500).contains(&self.code) {
            Severity::Transient
        } else {
            Severity::Permanent
        }
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        if let Some(enhanced) = &self.enhanced {
            write!(f, " {enhanced}")?;
        }
        if !self.text.is_empty() {
            write!(f, " {}", self.text)?;
        }
        Ok(())
    }
}

/// With a space for each control character.
fn without_controls(text: &str) -> Cow<'_, str> {
    if text.chars().any(char::is_control) {
        text.replace(char::is_control, " ").into()
    } else {
        text.into()
    }
}

/// Splits `5.1.1 No such user` into code and text; the class digit must agree with the reply code (RFC 2034 §4).
fn split_enhanced(code: u16, text: &str) -> (Option<&str>, &str) {
    let (first, rest) = text.split_once(' ').unwrap_or((text, ""));
    let mut parts = first.split('.');
    let agrees = |part: &str| part.parse::<u16>().is_ok_and(|class| class == code / 100);
    let subject = |part: &str| (1..=3).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(a), Some(b), Some(c), None) if agrees(a) && subject(b) && subject(c) => (Some(first), rest),
        _ => (None, text),
    }
}

/// Something that did not work. `Display` is safe to show to a tenant: it never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What kind.
    pub class: Class,
    /// Whose.
    pub fault: Fault,
    /// Where.
    pub stage: Stage,
    /// Whether to come back.
    pub severity: Severity,
    /// A fixed, documented word such as `recipient_unknown` or `sender_not_configured`.
    pub reason: &'static str,
    /// What the server said, if a server said it.
    pub reply: Option<Reply>,
    /// What happened, in a sentence.
    pub message: String,
    /// The message names a file of the job, which is for the tenant to read and not for the log.
    pub names_file: bool,
    /// The delay the other side asked for.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// A failure that may pass by itself.
    #[must_use]
    pub fn transient(
        class: Class,
        fault: Fault,
        stage: Stage,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        let message = message.into();
        Self {
            class,
            fault,
            stage,
            severity: Severity::Transient,
            reason,
            reply: None,
            message,
            names_file: false,
            retry_after: None,
        }
    }

    /// A failure that stays.
    #[must_use]
    pub fn permanent(
        class: Class,
        fault: Fault,
        stage: Stage,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            severity: Severity::Permanent,
            ..Self::transient(class, fault, stage, reason, message)
        }
    }

    /// Adds what the server said.
    #[must_use]
    pub fn with_reply(mut self, reply: Reply) -> Self {
        self.reply = Some(reply);
        self
    }

    /// Says that the message names a file of the job.
    #[must_use]
    pub fn naming_a_file(self) -> Self {
        Self {
            names_file: true,
            ..self
        }
    }

    /// What the log says of it: no names of files, no addresses but their domains.
    #[must_use]
    pub fn for_log(&self) -> String {
        if self.names_file {
            return format!("{}: a file of the job; its report names it", self.reason);
        }
        masked_in(&self.to_string()).into_owned()
    }

    /// Whether a key is not there (yet). Such a job waits for it: that is no attempt, and never ends in failure.
    #[must_use]
    pub fn is_missing_key(&self) -> bool {
        self.reason == KEY_UNKNOWN
    }

    /// Whether it says that the account or its server does not work, rather than something about one mail: no connection,
    /// no TLS, no login, a server that takes nothing from our address; a conversation that breaks off, or is ended with 421. Replies about a recipient or a mail, and
    /// requests to go slower, say that the server works. What will not pass by itself ends its mail, and is no matter of
    /// waiting.
    #[must_use]
    pub fn is_of_account(&self) -> bool {
        let of_account = matches!(self.fault, Fault::Provider | Fault::Sender);
        match self.class {
            _ if !self.is_transient() => false,
            Class::Auth | Class::Tls => of_account,
            Class::Policy => self.stage == Stage::Connect || self.fault == Fault::Us,
            Class::Infrastructure if self.fault == Fault::Provider => {
                matches!(self.stage, Stage::Connect | Stage::Auth)
                    || self.reply.as_ref().is_none_or(|reply| reply.code == 421)
            }
            _ => false,
        }
    }

    /// Whether trying again later can help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.severity == Severity::Transient
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reply {
            Some(reply) => write!(f, "{}: {} (server said: {reply})", self.reason, self.message),
            None => write!(f, "{}: {}", self.reason, self.message),
        }
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_has_no_names_of_files_and_of_addresses_the_domains() {
        let failure = |message: &str| {
            Failure::permanent(
                Class::Content,
                Fault::Sender,
                Stage::Fetch,
                "attachment_too_large",
                message,
            )
        };
        let named = failure("`Kuendigung_Mueller.pdf` is larger than 50 MB").naming_a_file();
        assert!(named.to_string().contains("Mueller"));
        assert_eq!(
            named.for_log(),
            "attachment_too_large: a file of the job; its report names it"
        );
        let masked = failure("no room for ann@example.org").for_log();
        assert_eq!(masked, "attachment_too_large: no room for ***@example.org");
    }

    #[test]
    fn a_reply_splits_off_an_enhanced_code_that_agrees_with_its_class() {
        let reply = Reply::new(550, "5.1.1 No such user");
        assert_eq!(reply.enhanced.as_deref(), Some("5.1.1"));
        assert_eq!(&*reply.text, "No such user");
        assert_eq!(reply.to_string(), "550 5.1.1 No such user");
        assert_eq!(Reply::new(550, "4.1.1 odd").enhanced, None);
        assert_eq!(Reply::new(550, "127.0.0.1 blocked").enhanced, None);
    }

    #[test]
    fn reply_text_is_cleaned_and_bounded() {
        let reply = Reply::new(451, &format!("4.3.0 a\0b\r\nc{}", "ü".repeat(2000)));
        assert!(reply.text.starts_with("a b  c"), "{}", &reply.text[..10]);
        assert!(reply.text.len() <= Reply::MAX_TEXT);
    }
}
