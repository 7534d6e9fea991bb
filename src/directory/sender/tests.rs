use super::*;
use crate::directory::row::parse_mailbox;
use crate::directory::scratch::job;
use crate::failure::Reply;
use crate::job::TlsMode;

fn mailbox(text: &str) -> Mailbox {
    parse_mailbox(text).unwrap()
}

fn account(key: &str, from: Option<&str>) -> Account {
    let (tenant, name) = key.split_once('/').unwrap();
    let server = OverrideServer {
        host: format!("{name}.example"),
        port: 587,
        tls: TlsMode::StartTls,
        credentials: None,
        allow_plaintext_auth: false,
    };
    Account {
        key: AccountKey::from_stored(key),
        from: from.map(mailbox),
        ..override_account(&tenant.parse().unwrap(), server)
    }
}

/// A tenant `acme` named "Acme Ltd" with these accounts; the first is the default if `default`.
fn acme(accounts: Vec<Account>, default: bool, fallback: Fallback) -> TenantEntry {
    let mut tenant = Tenant::unknown("acme".parse().unwrap());
    tenant.name = Some("Acme Ltd".to_owned());
    tenant.fallback = fallback;
    let first = accounts
        .first()
        .map(|account| account.key.account().parse().unwrap());
    TenantEntry {
        tenant,
        accounts: accounts
            .into_iter()
            .map(|account| (account.key.account().parse().unwrap(), Arc::new(account)))
            .collect(),
        default: first.filter(|_| default),
    }
}

fn platform() -> TenantEntry {
    let mut entry = acme(
        vec![account("-/relay", Some("Postroom <post@platform.example>"))],
        true,
        Fallback::Never,
    );
    entry.tenant = Tenant::unknown(TenantId::platform());
    entry
}

fn own_server() -> OverrideServer {
    OverrideServer {
        host: "own.example".to_owned(),
        port: 2525,
        tls: TlsMode::Implicit,
        credentials: Some(("u".to_owned(), "canary".into())),
        allow_plaintext_auth: false,
    }
}

/// Who sends, as one line: `account acme/main`, `platform -/relay not_configured`, or the failure's reason.
fn outcome(result: Result<Chosen, Failure>) -> String {
    match result {
        Ok(chosen) => {
            let reason = chosen
                .reason
                .map(|reason| format!(" {reason}"))
                .unwrap_or_default();
            format!("{} {}{reason}", chosen.via.as_str(), chosen.account.key)
        }
        Err(failure) => format!("{:?} {}", failure.severity, failure.reason),
    }
}

/// Accounts of the tenant (main is the default), its policy, the job's policy, the account it names, whether it has an
/// override; who sends.
const LADDER: &str = "
    main*,bulk  never     -         -     -         account acme/main
    main*,bulk  never     -         bulk  -         account acme/bulk
    main*,bulk  never     -         bulk  override  override acme/~override
    main*,bulk  platform  -         nope  override  override acme/~override
    -           never     -         -     override  override acme/~override
    main*,bulk  never     -         nope  -         Permanent account_not_found
    main*,bulk  platform  -         nope  -         platform -/relay not_configured
    main*,bulk  platform  never     nope  -         Permanent account_not_found
    main*,bulk  never     platform  nope  -         platform -/relay not_configured
    main*,bulk  platform  -         -     -         account acme/main
    main,bulk   never     -         -     -         Permanent sender_not_configured
    main,bulk   platform  -         -     -         platform -/relay not_configured
    main,bulk   never     -         main  -         account acme/main
    -           never     -         -     -         Permanent sender_not_configured
    -           platform  -         -     -         platform -/relay not_configured
    -           platform  never     -     -         Permanent sender_not_configured
    -           never     platform  -     -         platform -/relay not_configured
";

#[test]
fn the_ladder_is_gone_down_rung_by_rung() {
    for row in LADDER.lines().map(str::trim).filter(|row| !row.is_empty()) {
        let mut words = row.split_whitespace();
        let mut word = || words.next().filter(|word| *word != "-");
        let (accounts, tenants) = (word(), word());
        let mut job = job();
        job.fallback = word().map(|policy| policy.parse().unwrap());
        job.account = word().map(|named| named.parse().unwrap());
        let opened = word().map(|_| own_server());
        let expected: Vec<_> = words.collect();

        let names = accounts.iter().flat_map(|names| names.split(','));
        let names: Vec<_> = names
            .map(|name| format!("acme/{}", name.trim_end_matches('*')))
            .collect();
        let has_default = accounts.is_some_and(|names| names.contains('*'));
        let accounts = names.iter().map(|key| account(key, None)).collect();
        let entry = acme(accounts, has_default, tenants.unwrap().parse().unwrap());
        let result = choose(&job, &entry, Some(&platform()), opened);
        assert_eq!(outcome(result), expected.join(" "), "{row}");
    }
}

#[test]
fn a_platform_without_a_default_account_sends_for_nobody() {
    let mut empty = platform();
    empty.default = None;
    for platform in [None, Some(&empty)] {
        let failure = choose(&job(), &acme(vec![], false, Fallback::Platform), platform, None).unwrap_err();
        assert_eq!(failure.reason, "sender_not_configured");
        assert!(failure.message.contains("platform"), "{failure}");
        assert!(!failure.is_transient());
    }
}

#[test]
fn an_unknown_tenant_is_rejected_or_sent_for_by_the_platform() {
    let id: TenantId = "acme".parse().unwrap();
    let failure = unknown_tenant(&id, UnknownTenant::Reject).unwrap_err();
    assert_eq!(
        (failure.reason, failure.is_transient()),
        ("tenant_not_found", false)
    );

    let entry = unknown_tenant(&id, UnknownTenant::Platform).unwrap();
    let chosen = choose(&job(), &entry, Some(&platform()), None).unwrap();
    assert_eq!(outcome(Ok(chosen.clone())), "platform -/relay not_configured");
    assert_eq!(
        chosen.from,
        mailbox("Ann <post@platform.example>"),
        "no tenant name is known"
    );

    let mut strict = job();
    strict.fallback = Some(Fallback::Never);
    let result = choose(&strict, &entry, Some(&platform()), None);
    assert_eq!(outcome(result), "Permanent sender_not_configured");
}

#[test]
fn the_mail_is_from_whom_the_job_says_else_the_account() {
    let entry = |from| acme(vec![account("acme/main", from)], true, Fallback::Never);
    let mut job = job();
    job.reply_to = vec![mailbox("help@acme.example")];
    let chosen = choose(&job, &entry(Some("office@acme.example")), None, None).unwrap();
    assert_eq!(chosen.from, mailbox("Ann <ann@acme.example>"));
    assert_eq!(chosen.reply_to, job.reply_to);
    assert_eq!(chosen.envelope_from, Some("ann@acme.example".parse().unwrap()));

    job.from = None;
    job.return_path = Some("bounce@acme.example".parse().unwrap());
    let chosen = choose(&job, &entry(Some("office@acme.example")), None, None).unwrap();
    assert_eq!(chosen.from, mailbox("office@acme.example"));
    assert_eq!(chosen.envelope_from, job.return_path);

    for opened in [None, Some(own_server())] {
        let result = choose(&job, &entry(None), None, opened);
        assert_eq!(outcome(result), "Permanent from_missing");
    }
}

#[test]
fn the_platform_sends_from_its_own_address_with_the_tenants_name() {
    // job's from, tenant's name, job's reply_to → from, reply_to
    let table = [
        (
            Some("Ann <ann@acme.example>"),
            Some("Acme Ltd"),
            None,
            "Acme Ltd <post@platform.example>",
            Some("Ann <ann@acme.example>"),
        ),
        (
            Some("Ann <ann@acme.example>"),
            None,
            None,
            "Ann <post@platform.example>",
            Some("Ann <ann@acme.example>"),
        ),
        (
            Some("ann@acme.example"),
            None,
            None,
            "Postroom <post@platform.example>",
            Some("ann@acme.example"),
        ),
        (
            Some("Ann <ann@acme.example>"),
            Some("Acme Ltd"),
            Some("help@acme.example"),
            "Acme Ltd <post@platform.example>",
            Some("help@acme.example"),
        ),
        (
            None,
            Some("Acme Ltd"),
            None,
            "Acme Ltd <post@platform.example>",
            None,
        ),
        (
            Some("X <post@platform.example>"),
            None,
            None,
            "X <post@platform.example>",
            None,
        ),
    ];
    for (row, (from, name, reply_to, expected, answers)) in table.into_iter().enumerate() {
        let mut job = job();
        job.from = from.map(mailbox);
        job.reply_to = reply_to.map(mailbox).into_iter().collect();
        job.return_path = Some("bounce@acme.example".parse().unwrap());
        let mut entry = acme(vec![], false, Fallback::Platform);
        entry.tenant.name = name.map(str::to_owned);
        let chosen = choose(&job, &entry, Some(&platform()), None).unwrap();
        assert_eq!(chosen.from, mailbox(expected), "row {row}");
        assert_eq!(
            chosen.reply_to,
            answers.map(mailbox).into_iter().collect::<Vec<_>>(),
            "row {row}"
        );
        assert_eq!(
            chosen.envelope_from,
            Some("post@platform.example".parse().unwrap()),
            "row {row}"
        );
    }
}

#[test]
fn a_platform_account_without_an_address_cannot_stand_in() {
    let mut platform = platform();
    platform.accounts = [("relay".parse().unwrap(), Arc::new(account("-/relay", None)))].into();
    let result = choose(
        &job(),
        &acme(vec![], false, Fallback::Platform),
        Some(&platform),
        None,
    );
    assert_eq!(outcome(result), "Permanent from_missing");
}

#[test]
fn jobs_wait_for_an_account_whose_password_does_not_open() {
    for (error, reason) in [
        (
            SecretError::UnknownKey { kid: "k9".to_owned() },
            "Transient key_unknown",
        ),
        (SecretError::Corrupt, "Transient secret_unreadable"),
    ] {
        let mut locked = account("acme/main", None);
        locked.locked = Some(error.clone());
        // The policy would allow the platform, but this passes.
        let entry = acme(vec![locked], true, Fallback::Platform);
        assert_eq!(outcome(choose(&job(), &entry, Some(&platform()), None)), reason);

        let mut relay = account("-/relay", Some("post@platform.example"));
        relay.locked = Some(error);
        let mut platform = platform();
        platform.accounts = [("relay".parse().unwrap(), Arc::new(relay))].into();
        let entry = acme(vec![], false, Fallback::Platform);
        assert_eq!(outcome(choose(&job(), &entry, Some(&platform), None)), reason);
    }
}

#[test]
fn after_a_failure_the_platform_stands_in_only_for_the_accounts_own_trouble() {
    use {Class as C, Fault as F, Stage as S};
    let table = [
        (C::Auth, F::Sender, S::Auth, true),
        (C::Auth, F::Provider, S::Auth, true),
        (C::Tls, F::Provider, S::Connect, true),
        (C::Infrastructure, F::Provider, S::Connect, true),
        (C::Policy, F::Provider, S::Connect, true),
        (C::Policy, F::Sender, S::Auth, false),
        (C::Infrastructure, F::Us, S::Connect, false),
        (C::Local, F::Us, S::Connect, false),
        (C::Rate, F::Provider, S::Connect, false),
        (C::Recipient, F::Recipient, S::Connect, false),
        (C::Content, F::Sender, S::Connect, false),
        (C::Auth, F::Sender, S::MailFrom, false),
        (C::Policy, F::Provider, S::MailFrom, false),
        (C::Recipient, F::Recipient, S::RcptTo, false),
        (C::Infrastructure, F::Provider, S::RcptTo, false),
        (C::Infrastructure, F::Provider, S::Data, false),
        (C::Content, F::Sender, S::Data, false),
        (C::Infrastructure, F::Provider, S::Fetch, false),
        (C::Infrastructure, F::Provider, S::Settle, false),
    ];
    let entry = acme(vec![account("acme/main", None)], true, Fallback::Platform);
    let platform = platform();
    let chosen = choose(&job(), &entry, Some(&platform), None).unwrap();
    for (class, fault, stage, expected) in table {
        for failure in [
            Failure::transient(class, fault, stage, "x", "x"),
            Failure::permanent(class, fault, stage, "x", "x").with_reply(Reply::new(535, "5.7.8 no")),
        ] {
            let next = after_failure(&chosen, &failure, &job(), &entry, Some(&platform));
            assert_eq!(next.is_some(), expected, "{failure:?}");
            if let Some(next) = next {
                assert_eq!(outcome(Ok(next.clone())), "platform -/relay send_error");
                assert_eq!(next.reply_to, vec![mailbox("Ann <ann@acme.example>")]);
            }
        }
    }
}

#[test]
fn the_platform_stands_in_only_where_the_policy_allows_and_only_once() {
    let refused = Failure::permanent(Class::Auth, Fault::Sender, Stage::Auth, "x", "x");
    let platform = platform();
    let entry = acme(vec![account("acme/main", None)], true, Fallback::Never);
    let chosen = choose(&job(), &entry, Some(&platform), None).unwrap();
    assert!(after_failure(&chosen, &refused, &job(), &entry, Some(&platform)).is_none());
    assert!(while_unhealthy(&chosen, &job(), &entry, Some(&platform)).is_none());

    let mut allowed = job();
    allowed.fallback = Some(Fallback::Platform);
    let next = while_unhealthy(&chosen, &allowed, &entry, Some(&platform)).unwrap();
    assert_eq!(outcome(Ok(next.clone())), "platform -/relay unhealthy");
    assert!(after_failure(&next, &refused, &allowed, &entry, Some(&platform)).is_none());
    assert!(while_unhealthy(&chosen, &allowed, &entry, None).is_none());
    for (chosen, job, platform, may) in [
        (&chosen, &allowed, Some(&platform), true),
        (&chosen, &job(), Some(&platform), false),
        (&chosen, &allowed, None, false),
        (&next, &allowed, Some(&platform), false),
    ] {
        assert_eq!(may_detour(chosen, job, &entry, platform), may);
    }

    let over = choose(&allowed, &entry, Some(&platform), Some(own_server())).unwrap();
    assert!(after_failure(&over, &refused, &allowed, &entry, Some(&platform)).is_some());
}

#[test]
fn an_override_sends_through_its_own_server_and_shows_no_password() {
    let entry = acme(vec![account("acme/main", None)], true, Fallback::Never);
    let chosen = choose(&job(), &entry, None, Some(own_server())).unwrap();
    let server = &chosen.account.server;
    assert_eq!(
        (server.host.as_str(), server.port, server.tls),
        ("own.example", 2525, TlsMode::Implicit)
    );
    assert!(!server.trusted);
    assert!(server.credentials.is_some());
    assert!(!format!("{chosen:?}").contains("canary"));
}

#[test]
fn reports_name_the_sender_and_why() {
    let platform = platform();
    let entry = acme(vec![account("acme/main", None)], true, Fallback::Platform);
    let own = choose(&job(), &entry, Some(&platform), None).unwrap();
    assert_eq!(
        serde_json::to_string(&own.sender()).unwrap(),
        r#"{"via":"account","account":"acme/main"}"#
    );
    let over = choose(&job(), &entry, Some(&platform), Some(own_server())).unwrap();
    assert_eq!(
        serde_json::to_string(&over.sender()).unwrap(),
        r#"{"via":"override"}"#
    );
    let next = while_unhealthy(&own, &job(), &entry, Some(&platform)).unwrap();
    assert_eq!(
        serde_json::to_string(&next.sender()).unwrap(),
        r#"{"via":"platform","account":"-/relay","reason":"unhealthy"}"#
    );
}
