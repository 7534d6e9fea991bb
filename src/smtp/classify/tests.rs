use std::time::Duration;

use proptest::prelude::{Just, prop_oneof};

use super::*;
use crate::failure::Class::{Auth, Content, Infrastructure, Policy, Rate, Recipient, Tls};
use crate::failure::Fault;
use crate::failure::Severity::{Permanent, Transient};
use crate::failure::Stage::{Auth as AtAuth, Connect, Data, MailFrom, RcptTo};
use crate::failure::{Class, Severity, Stage};

type Row = (Stage, u16, &'static str, Class, Fault, Severity, &'static str);

#[rustfmt::skip] // one row per reply
const RECIPIENTS: &[Row] = &[
    (RcptTo, 550, "5.1.1 User unknown", Recipient, Fault::Recipient, Permanent, "recipient_unknown"),
    (RcptTo, 550, "5.1.1 <a@b>: Recipient address rejected: undeliverable address: host mx.b[192.0.2.9] said: 554 5.7.1 Client host [192.0.2.1] blocked using zen.spamhaus.org (in reply to RCPT TO command)", Recipient, Fault::Recipient, Permanent, "recipient_unknown"),
    (RcptTo, 450, "4.1.1 <a@b>: Recipient address rejected: unverified address: host mx.b[192.0.2.9] said: 450 Client host rejected", Recipient, Fault::Recipient, Transient, "recipient_unknown"),
    (RcptTo, 550, "No such user here", Recipient, Fault::Recipient, Permanent, "recipient_unknown"),
    (RcptTo, 550, "The account does not exist", Recipient, Fault::Recipient, Permanent, "recipient_unknown"),
    (RcptTo, 550, "5.4.1 Recipient address rejected: Access denied. [AM0PR01.prod.protection.outlook.com]", Recipient, Fault::Recipient, Permanent, "recipient_unknown"),
    (RcptTo, 450, "4.1.1 unverified address", Recipient, Fault::Recipient, Transient, "recipient_unknown"),
    (RcptTo, 550, "5.1.2 bad destination system", Recipient, Fault::Recipient, Permanent, "domain_unknown"),
    (RcptTo, 501, "5.1.3 Bad recipient address syntax", Recipient, Fault::Recipient, Permanent, "address_refused"),
    (RcptTo, 553, "mailbox name not allowed", Recipient, Fault::Recipient, Permanent, "address_refused"),
    (RcptTo, 556, "5.1.10 null MX", Recipient, Fault::Recipient, Permanent, "domain_refuses_mail"),
    (RcptTo, 550, "5.2.1 The email account is disabled", Recipient, Fault::Recipient, Permanent, "mailbox_disabled"),
    (RcptTo, 550, "This mailbox is disabled", Recipient, Fault::Recipient, Permanent, "mailbox_disabled"),
    (RcptTo, 550, "The account has been closed", Recipient, Fault::Recipient, Permanent, "mailbox_disabled"),
    (Data, 554, "delivery error: dd Sorry your message to a@yahoo.com cannot be delivered. This account has been disabled or discontinued [#102].", Recipient, Fault::Recipient, Permanent, "mailbox_disabled"),
    (RcptTo, 452, "4.2.2 The email account is over quota", Recipient, Fault::Recipient, Transient, "mailbox_full"),
    (RcptTo, 552, "5.2.2 Over quota", Recipient, Fault::Recipient, Permanent, "mailbox_full"),
    (RcptTo, 552, "Mailbox full", Recipient, Fault::Recipient, Permanent, "mailbox_full"),
    (Data, 552, "5.2.2 mailbox full", Recipient, Fault::Recipient, Permanent, "mailbox_full"),
    (RcptTo, 550, "Email quota exceeded", Recipient, Fault::Recipient, Permanent, "mailbox_full"),
    (RcptTo, 552, "5.2.2 Mailbox size limit exceeded: too many messages", Recipient, Fault::Recipient, Permanent, "mailbox_full"),
    (Data, 554, "5.2.2 mailbox full; STOREDRV.Deliver.Exception:QuotaExceededException", Recipient, Fault::Recipient, Permanent, "mailbox_full"),
    (RcptTo, 551, "User not local", Recipient, Fault::Recipient, Permanent, "recipient_moved"),
    (RcptTo, 550, "Requested action not taken", Recipient, Fault::Recipient, Permanent, "recipient_refused"),
    (RcptTo, 450, "Requested action not taken", Recipient, Fault::Recipient, Transient, "mailbox_unavailable"),
    (RcptTo, 451, "Local error", Recipient, Fault::Recipient, Transient, "recipient_deferred"),
    (RcptTo, 571, "no", Recipient, Fault::Recipient, Permanent, "recipient_refused"),
];

#[rustfmt::skip] // one row per reply
const CONTENT: &[Row] = &[
    (MailFrom, 552, "5.3.4 Message size exceeds fixed limit", Content, Fault::Sender, Permanent, "message_too_large"),
    (Data, 552, "Too bad", Content, Fault::Sender, Permanent, "message_too_large"),
    (Data, 552, "message size exceeds limit", Content, Fault::Sender, Permanent, "message_too_large"),
    (RcptTo, 452, "4.3.4 message too big", Content, Fault::Sender, Transient, "message_too_large"),
    (Data, 554, "5.7.1 Message identified as SPAM", Content, Fault::Sender, Permanent, "spam"),
    (Data, 541, "rejected", Content, Fault::Sender, Permanent, "spam"),
    (Data, 554, "Virus Eicar-Test found", Content, Fault::Sender, Permanent, "virus"),
    (Data, 550, "5.6.0 malformed header", Content, Fault::Sender, Permanent, "content_refused"),
    (Data, 554, "Executables are not taken, please resend as zip", Content, Fault::Sender, Permanent, "content_refused"),
    (Data, 554, "Transaction failed", Content, Fault::Sender, Permanent, "content_refused"),
    (RcptTo, 553, "5.6.7 SMTPUTF8 needed", Content, Fault::Sender, Permanent, "smtputf8_not_supported"),
];

#[rustfmt::skip] // one row per reply
const POLICY: &[Row] = &[
    (RcptTo, 554, "5.7.1 <a@b>: Relay access denied", Policy, Fault::Sender, Permanent, "relay_denied"),
    (RcptTo, 550, "relay not permitted", Policy, Fault::Sender, Permanent, "relay_denied"),
    (RcptTo, 550, "5.7.1 Unable to relay", Policy, Fault::Sender, Permanent, "relay_denied"),
    (RcptTo, 550, "5.7.1 not authorized", Policy, Fault::Sender, Permanent, "policy_refused"),
    (Data, 550, "5.7.1 refused", Policy, Fault::Sender, Permanent, "policy_refused"),
    (MailFrom, 553, "5.7.1 Sender address rejected: not owned by user x", Policy, Fault::Sender, Permanent, "sender_refused"),
    (MailFrom, 550, "5.7.60 SMTP; Client does not have permissions to send as this sender", Policy, Fault::Sender, Permanent, "sender_refused"),
    (MailFrom, 550, "5.1.0 rejected", Policy, Fault::Sender, Permanent, "sender_refused"),
    (MailFrom, 550, "5.1.8 sender domain not found", Policy, Fault::Sender, Permanent, "sender_refused"),
    (RcptTo, 550, "5.1.0 <noreply@acme.example>: Sender address rejected: User unknown in virtual mailbox table", Policy, Fault::Sender, Permanent, "sender_refused"),
    (RcptTo, 550, "5.1.1 <noreply@acme.example>: Sender address rejected: undeliverable address", Policy, Fault::Sender, Permanent, "sender_refused"),
    (RcptTo, 550, "Verification failed for <noreply@acme.example>\nNo Such User Here\nSender verify failed", Policy, Fault::Sender, Permanent, "sender_refused"),
    (Data, 554, "5.2.252 SendAsDenied; a not allowed to send as b", Policy, Fault::Sender, Permanent, "sender_refused"),
    (Data, 550, "5.7.26 unauthenticated", Policy, Fault::Sender, Permanent, "sender_not_authenticated"),
    (Data, 550, "5.7.30 DKIM authentication did not pass", Policy, Fault::Sender, Permanent, "sender_not_authenticated"),
    (Data, 550, "5.7.9 This mail has been blocked because the sender is unauthenticated.", Policy, Fault::Sender, Permanent, "sender_not_authenticated"),
    (Data, 554, "5.7.9 Message not accepted for policy reasons.", Policy, Fault::Sender, Permanent, "policy_refused"),
    (RcptTo, 554, "5.7.9 Message not accepted for policy reasons.", Policy, Fault::Sender, Permanent, "policy_refused"),
    (Data, 550, "DMARC check failed", Policy, Fault::Sender, Permanent, "sender_not_authenticated"),
    (Connect, 554, "5.7.1 Service unavailable; Client host [192.0.2.1] blocked using zen.spamhaus.org", Policy, Fault::Us, Transient, "client_blocked"),
    (Connect, 554, "No SMTP service here", Policy, Fault::Us, Transient, "client_blocked"),
    (RcptTo, 554, "5.7.1 Service unavailable; Client host [192.0.2.1] blocked using zen.spamhaus.org", Policy, Fault::Us, Transient, "client_blocked"),
    (RcptTo, 450, "4.7.25 Client host rejected: cannot find your reverse hostname, [192.0.2.1]", Policy, Fault::Us, Transient, "client_blocked"),
    (RcptTo, 504, "5.5.2 <worker-0>: Helo command rejected: need fully-qualified hostname", Policy, Fault::Us, Transient, "client_blocked"),
    (MailFrom, 550, "5.7.1 <worker-0>: Helo command rejected: Host not found", Policy, Fault::Us, Transient, "client_blocked"),
    (RcptTo, 550, "rejected because 192.0.2.1 is in a black list at zen.spamhaus.org", Policy, Fault::Us, Transient, "client_blocked"),
    (Connect, 554, "5.7.1 blocked, see spamhaus", Policy, Fault::Us, Transient, "client_blocked"),
    (Data, 554, "5.7.1 a link in the mail is listed by spamhaus", Policy, Fault::Sender, Permanent, "blocklisted"),
    (Data, 451, "4.7.1 a link in the mail is listed by spamhaus", Policy, Fault::Sender, Transient, "blocklisted"),
    (RcptTo, 554, "5.7.1 Service unavailable; Sender address [a@b.example] blocked using dbl.spamhaus.org", Policy, Fault::Sender, Permanent, "sender_refused"),
    (RcptTo, 451, "4.7.1 Greylisted, try again in 5 minutes", Policy, Fault::Recipient, Transient, "greylisted"),
    (RcptTo, 450, "Greylisting in effect", Policy, Fault::Recipient, Transient, "greylisted"),
];

#[rustfmt::skip] // one row per reply
const LOGIN: &[Row] = &[
    (AtAuth, 535, "5.7.8 Authentication credentials invalid", Auth, Fault::Sender, Transient, "auth_refused"),
    (AtAuth, 535, "5.7.139 Authentication unsuccessful, basic authentication is disabled.", Auth, Fault::Sender, Transient, "auth_mechanism_refused"),
    (AtAuth, 550, "5.7.30 Basic authentication is not supported", Auth, Fault::Sender, Transient, "auth_mechanism_refused"),
    (AtAuth, 534, "5.7.9 Application-specific password required", Auth, Fault::Sender, Transient, "auth_mechanism_refused"),
    (MailFrom, 550, "5.7.9 Authentication mechanism is too weak", Auth, Fault::Sender, Transient, "auth_mechanism_refused"),
    (AtAuth, 504, "5.5.4 Unrecognized authentication type", Auth, Fault::Sender, Transient, "auth_mechanism_refused"),
    (AtAuth, 454, "4.7.0 Temporary authentication failure", Auth, Fault::Provider, Transient, "auth_temporary"),
    (AtAuth, 451, "4.3.0 internal", Auth, Fault::Provider, Transient, "auth_temporary"),
    (AtAuth, 550, "no", Auth, Fault::Sender, Transient, "auth_refused"),
    (AtAuth, 525, "5.7.13 User account disabled", Auth, Fault::Sender, Transient, "account_disabled"),
    (AtAuth, 550, "This account has been suspended", Auth, Fault::Sender, Transient, "account_disabled"),
    (MailFrom, 550, "5.2.1 Mailbox disabled", Auth, Fault::Sender, Transient, "account_disabled"),
    (MailFrom, 550, "account is disabled", Auth, Fault::Sender, Transient, "account_disabled"),
    (Data, 550, "5.7.1 Your account has been suspended", Auth, Fault::Sender, Transient, "account_disabled"),
    (RcptTo, 550, "5.2.1 Your account is suspended", Auth, Fault::Sender, Transient, "account_disabled"),
    (RcptTo, 550, "Domain example.com has an outgoing mail suspension.  Message discarded.", Auth, Fault::Sender, Transient, "account_disabled"),
    (RcptTo, 550, "Outgoing mail from \"acme@example.com\" has been suspended.", Auth, Fault::Sender, Transient, "account_disabled"),
    (MailFrom, 530, "5.7.0 Authentication required", Auth, Fault::Sender, Transient, "auth_required"),
    (MailFrom, 550, "5.7.57 Client was not authenticated to send mail", Auth, Fault::Sender, Transient, "auth_required"),
    (MailFrom, 530, "5.7.0 Must issue a STARTTLS command first", Tls, Fault::Sender, Permanent, "encryption_required"),
    (Connect, 454, "4.7.0 TLS not available due to local problem", Tls, Fault::Provider, Transient, "starttls_refused"),
];

#[rustfmt::skip] // one row per reply
const RATES: &[Row] = &[
    (AtAuth, 454, "Throttling failure: Maximum sending rate exceeded.", Rate, Fault::Provider, Transient, "rate_limited"),
    (Data, 454, "Throttling failure: Daily message quota exceeded.", Rate, Fault::Provider, Transient, "quota_exceeded"),
    (Connect, 432, "4.3.2 Concurrent connections limit exceeded", Rate, Fault::Provider, Transient, "connection_limit"),
    (Connect, 421, "4.7.0 Too many connections from your IP", Rate, Fault::Provider, Transient, "connection_limit"),
    (Connect, 421, "4.3.2 The maximum number of concurrent server connections has exceeded a limit, closing transmission channel", Rate, Fault::Provider, Transient, "connection_limit"),
    (Connect, 421, "4.3.2 The maximum number of concurrent server connections has exceeded a per-source limit, closing transmission channel", Rate, Fault::Provider, Transient, "connection_limit"),
    (MailFrom, 421, "4.7.0 try again later", Rate, Fault::Provider, Transient, "rate_limited"),
    (Data, 451, "4.7.500 Server busy", Rate, Fault::Provider, Transient, "rate_limited"),
    (RcptTo, 450, "4.2.1 The user you are trying to contact is receiving mail at a rate that", Rate, Fault::Provider, Transient, "rate_limited"),
    (Data, 550, "5.4.5 Daily user sending limit exceeded", Rate, Fault::Provider, Transient, "quota_exceeded"),
    (RcptTo, 554, "5.2.0 STOREDRV; exceeded the recipient limit", Rate, Fault::Provider, Transient, "quota_exceeded"),
    (Data, 554, "5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException; Failed to process message due to a permanent exception with message The message can't be submitted because the sender's submission quota was exceeded.", Rate, Fault::Provider, Transient, "quota_exceeded"),
    (Data, 554, "5.2.2 mailbox full; STOREDRV.Submission.Exception:QuotaExceededException.MapiExceptionQuotaExceeded; Failed to process message", Rate, Fault::Provider, Transient, "quota_exceeded"),
    (Data, 554, "5.7.0 Your message could not be sent. The limit on the number of allowed outgoing messages was exceeded. Try again later.", Rate, Fault::Provider, Transient, "quota_exceeded"),
    (Data, 550, "5.7.1 Email quota exceeded.", Rate, Fault::Provider, Transient, "quota_exceeded"),
    (RcptTo, 550, "Domain example.com has exceeded the max emails per hour (100/100 (100%)) allowed. Message discarded.", Rate, Fault::Provider, Transient, "rate_limited"),
    (RcptTo, 550, "Domain example.com has exceeded the max defers and failures per hour (5/5 (100%)) allowed. Message discarded.", Rate, Fault::Provider, Transient, "rate_limited"),
    (RcptTo, 554, "5.7.1 <a@b.example>: Recipient address rejected: Policy Rejection; Quota exceeded.", Rate, Fault::Provider, Transient, "quota_exceeded"),
    (Data, 550, "You may send 500 emails per day", Rate, Fault::Provider, Transient, "quota_exceeded"),
    (Data, 550, "5.2.251 Sender throttled due to continuous mailbox full errors.", Rate, Fault::Provider, Transient, "rate_limited"),
    (Data, 550, "5.2.252 Sender throttled due to continuous send as denied errors.", Rate, Fault::Provider, Transient, "rate_limited"),
    (Data, 550, "5.2.254", Rate, Fault::Provider, Transient, "rate_limited"),
    (RcptTo, 452, "4.5.3 Too many recipients", Rate, Fault::Provider, Transient, "too_many_recipients"),
    (RcptTo, 552, "Too many recipients", Rate, Fault::Provider, Transient, "too_many_recipients"),
];

#[rustfmt::skip] // one row per reply
const INFRASTRUCTURE: &[Row] = &[
    (MailFrom, 421, "4.3.2 Service shutting down", Infrastructure, Fault::Provider, Transient, "service_unavailable"),
    (Connect, 421, "", Infrastructure, Fault::Provider, Transient, "service_unavailable"),
    (Connect, 450, "later", Infrastructure, Fault::Provider, Transient, "service_unavailable"),
    (Data, 451, "4.3.0 Error: queue file write error", Infrastructure, Fault::Provider, Transient, "server_error"),
    (Data, 451, "Local error in processing", Infrastructure, Fault::Provider, Transient, "server_error"),
    (MailFrom, 452, "4.3.1 Insufficient system storage", Infrastructure, Fault::Provider, Transient, "server_full"),
    (MailFrom, 452, "Insufficient", Infrastructure, Fault::Provider, Transient, "server_full"),
    (RcptTo, 451, "4.4.3 Temporary lookup failure", Infrastructure, Fault::Provider, Transient, "routing_failed"),
    (MailFrom, 503, "5.5.1 Bad sequence of commands", Infrastructure, Fault::Provider, Transient, "protocol_error"),
    (MailFrom, 555, "parameters not recognized", Infrastructure, Fault::Provider, Permanent, "protocol_error"),
    (Connect, 502, "5.5.1 EHLO not implemented", Infrastructure, Fault::Provider, Transient, "protocol_error"),
];

#[test]
fn refusals_are_classified_by_code_then_enhanced_code_then_words() {
    let tables = [RECIPIENTS, CONTENT, POLICY, LOGIN, RATES, INFRASTRUCTURE];
    for (stage, code, text, class, fault, severity, reason) in tables.into_iter().flatten() {
        let failure = refusal(*stage, Reply::new(*code, text));
        let found = (failure.class, failure.fault, failure.severity, failure.reason);
        assert_eq!(
            found,
            (*class, *fault, *severity, *reason),
            "{stage:?} {code} {text}"
        );
        assert_eq!(failure.stage, *stage);
        assert_eq!(failure.reply.map(|reply| reply.code), Some(*code));
    }
}

#[test]
fn what_is_said_about_one_mail_or_recipient_is_no_fault_of_the_account() {
    for (stage, code, text, is_of_account) in [
        (Data, 451, "4.7.1 a link in the mail is listed by spamhaus", false),
        (RcptTo, 451, "4.7.1 the domain's reputation is low", false),
        (
            RcptTo,
            450,
            "4.1.1 <a@b>: Recipient address rejected: unverified address: host mx.b said: 450 Client host rejected",
            false,
        ),
        (
            RcptTo,
            554,
            "5.7.1 Client host [192.0.2.1] blocked using zen.spamhaus.org",
            true,
        ),
        (Connect, 554, "5.7.1 blocked, see spamhaus", true),
    ] {
        let failure = refusal(stage, Reply::new(code, text));
        assert_eq!(failure.is_of_account(), is_of_account, "{failure:?}");
    }
}

#[test]
fn a_delay_asked_for_is_carried_along() {
    let wait = |code, text: &str| refusal(Stage::RcptTo, Reply::new(code, text)).retry_after;
    assert_eq!(
        wait(451, "4.7.1 Greylisted, try again in 5 minutes"),
        Some(Duration::from_mins(5))
    );
    assert_eq!(wait(450, "try later"), None);
    assert_eq!(
        wait(550, "5.1.1 try again in 5 minutes"),
        None,
        "a permanent refusal is not tried again"
    );
    assert_eq!(
        wait(454, "Throttling failure: Daily message quota exceeded."),
        Some(Duration::from_hours(1)),
        "a quota of a day is not asked for every minute"
    );
}

#[test]
fn short_words_must_stand_alone() {
    let reason = |text: &str| refusal(Stage::Data, Reply::new(554, text)).reason;
    assert_eq!(reason("blocked by rbl.example"), "blocklisted");
    assert_eq!(reason("marble and spfx"), "content_refused");
}

proptest::proptest! {
    #[test]
    fn every_reply_has_a_class_and_only_the_code_a_limit_the_account_connecting_or_our_address_makes_it_pass(
        code in 400u16..600,
        text in prop_oneof![9 => ".{0,80}", 1 => Just("Client host rejected".to_owned())],
    ) {
        for stage in [Stage::Connect, Stage::Auth, Stage::MailFrom, Stage::RcptTo, Stage::Data] {
            let failure = refusal(stage, Reply::new(code, &text));
            let is_about_us = failure.reason == "client_blocked";
            let passes = code < 500
                || code == 503
                || matches!(failure.class, Rate | Auth)
                || stage == Stage::Connect
                || is_about_us;
            proptest::prop_assert_eq!(failure.is_transient(), passes);
        }
    }
}
