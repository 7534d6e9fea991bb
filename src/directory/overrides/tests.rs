use super::*;
use crate::directory::scratch::{KEY, OTHER_KEY, job, keys};
use crate::job::TlsMode;

/// `{"tenant":"acme","exp":4102444800,"host":"smtp.acme.example",…}` sealed by Python's `joserfc` with bytes 0 to 31
/// under key id `o1`.
const TOKEN: &str = "eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIiwia2lkIjoibzEifQ..5NDpDur42airnm3j.tg4Adbq2i5xYZ7AO73JTIvkig7sGAtizeia5QLyRiqSHBANwTeK8K8Y7mHaibqJWZXJgDCLZcej-IfgGWmgbq6bZGbD29oO-YsjV62M0cTu_-bnlijg6TQ4GcWofNHs9fXpnna8HN8PJkG-kZ2pJInbe_HSjAo6k9OXAJrwJtgfYTE-0Cfg.VpFBYTaqZgAtyBG9VOflAg";

fn sealed(token: &str) -> MailJob {
    MailJob {
        smtp_override: Some(SmtpOverride::Sealed(token.into())),
        ..job()
    }
}

fn override_keys() -> std::sync::Arc<Keyring> {
    keys(&KEY.replace("k1:", "o1:"))
}

fn refusal(job: &MailJob, overrides: Option<&Keyring>) -> (&'static str, bool) {
    let failure = open_override(job, &keys(KEY), overrides).unwrap_err();
    assert!(!format!("{failure:?}").contains("canary"));
    (failure.reason, failure.is_transient())
}

#[test]
fn a_job_without_an_override_has_none() {
    assert!(open_override(&job(), &keys(KEY), None).unwrap().is_none());
}

#[test]
fn what_a_producer_sealed_opens() {
    let server = open_override(&sealed(TOKEN), &keys(KEY), Some(&override_keys()))
        .unwrap()
        .unwrap();
    assert_eq!(
        (server.host.as_str(), server.port, server.tls),
        ("smtp.acme.example", 587, TlsMode::StartTls)
    );
    let (username, password) = server.credentials.unwrap();
    assert_eq!(
        (username.as_str(), password.expose_secret()),
        ("u", "canary-pässword")
    );
}

#[test]
fn the_keys_for_passwords_do_not_open_overrides() {
    // The same key, but in the ring for stored secrets.
    assert_eq!(
        refusal(&sealed(TOKEN), Some(&keys(OTHER_KEY))),
        ("key_unknown", true)
    );
    assert_eq!(refusal(&sealed(TOKEN), None), ("key_unknown", true));
}

#[test]
fn an_override_of_another_tenant_is_refused() {
    let mut job = sealed(TOKEN);
    job.tenant = "evil".parse().unwrap();
    assert_eq!(
        refusal(&job, Some(&override_keys())),
        ("override_other_tenant", false)
    );
}

#[test]
fn a_changed_token_is_refused_for_good() {
    let mut changed = TOKEN.to_owned();
    changed.replace_range(80..81, if &TOKEN[80..81] == "A" { "B" } else { "A" });
    assert_eq!(
        refusal(&sealed(&changed), Some(&override_keys())),
        ("override_invalid", false)
    );
    assert_eq!(
        refusal(&sealed("a.b.c"), Some(&override_keys())),
        ("override_invalid", false)
    );
}

#[test]
fn what_we_sealed_opens_for_its_job_only() {
    let plain = br#"{"host":"own.example","port":2525,"tls":"implicit","username":"u","password":"canary"}"#;
    let token = keys(KEY).seal(plain, &aad(&job().tenant, &job().id));
    let mut job = sealed(&token);
    let server = open_override(&job, &keys(KEY), None).unwrap().unwrap();
    assert_eq!((server.host.as_str(), server.port), ("own.example", 2525));

    let failure = open_override(&job, &keys(OTHER_KEY), None).unwrap_err();
    assert_eq!((failure.reason, failure.is_transient()), ("key_unknown", true));

    job.id = "order-2".parse().unwrap();
    assert_eq!(refusal(&job, None), ("override_invalid", false));
}
