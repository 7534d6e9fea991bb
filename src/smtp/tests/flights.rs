//! CHUNKING: a mail in one flight, and what goes wrong with it.

use postroom_testkit::smtp::{Action, Phase, RcptRule, TlsSetup};
use postroom_testkit::tls::TestCa;

use super::*;
use crate::failure::Stage;

const ANN: &[&str] = &["ann@example.org"];
const THREE: &[&str] = &["ann@example.org", "bob@example.org", "cid@example.org"];

fn chunking() -> Builder {
    traced().chunking(true)
}

/// A server, and pools with a connection on which BDAT has worked.
struct Scene {
    smtp: SmtpServer,
    pools: Arc<Pools>,
    account: Arc<Submission>,
}

impl Scene {
    async fn of(builder: Builder) -> Self {
        Self::with(builder, Setup::default()).await
    }

    async fn with(builder: Builder, setup: Setup) -> Self {
        let smtp = builder.start().await;
        let account = account(&smtp);
        let pools = setup.pools();
        let scene = Self { smtp, pools, account };
        scene.warm_up().await;
        scene
    }

    /// The script is that of what comes after the first mail.
    async fn scripted(script: Script) -> Self {
        Self::scripted_with(script, Setup::default()).await
    }

    async fn scripted_with(script: Script, setup: Setup) -> Self {
        let scene = Self::with(chunking(), setup).await;
        scene.smtp.set_script(script);
        scene
    }

    async fn warm_up(&self) {
        let outcome = send(&self.pools, &self.account).await;
        assert_eq!(codes(sent(&outcome)), [250]);
    }

    /// A mail as the pipeline sends it.
    async fn deliver(&self, recipients: &[&str], message: &[u8]) -> Outcome {
        let (envelope, mail) = (to(recipients), of(message.len(), false, false));
        let mut lease = lease(&self.pools, &self.account).await;
        if lease.may_deliver_at_once(&envelope, mail) {
            match lease.deliver_at_once(&envelope, mail, message).await {
                Ok(outcome) => return outcome,
                Err(NotBegun::Failed(error)) => return Outcome::Done(error.results),
                Err(NotBegun::Fresh(fresh)) => lease = *fresh,
            }
        }
        match open_mail(lease, &envelope, mail, message).await {
            Ok(transaction) => transaction.finish(message).await,
            Err(error) => Outcome::Done(error.results),
        }
    }

    /// Commands since the first mail, those of one flight together.
    fn flights(&self) -> Vec<String> {
        self.smtp.trace()[2..]
            .iter()
            .map(|verbs| verbs.join("+"))
            .collect()
    }
}

fn unknown(outcome: Outcome) -> (Vec<String>, Vec<u16>, Failure) {
    match outcome {
        Outcome::Uncertain {
            unknown,
            refused,
            failure,
        } => (
            unknown.iter().map(ToString::to_string).collect(),
            codes(&refused),
            failure,
        ),
        Outcome::Done(results) => panic!("{results:?}"),
    }
}

/// The server's turns for the second and third mail to it.
async fn turns(builder: Builder) -> u64 {
    let scene = Scene::of(builder).await;
    let before = scene.smtp.counters().turns;
    for _ in 0..2 {
        assert_eq!(codes(sent(&scene.deliver(ANN, MAIL).await)), [250]);
    }
    assert_eq!(scene.smtp.received_count(), 3);
    assert_eq!(scene.smtp.counters().connections, 1);
    scene.smtp.counters().turns - before
}

#[tokio::test]
async fn a_mail_takes_four_round_trips_two_with_pipelining_and_one_with_chunking() {
    let none = turns(traced().pipelining(false)).await;
    let pipelining = turns(traced()).await;
    let both = turns(chunking()).await;
    let chunking_alone = turns(chunking().pipelining(false)).await;
    assert_eq!((none, pipelining, both, chunking_alone), (8, 4, 2, 6));
}

#[tokio::test]
async fn the_first_mail_of_a_connection_asks_with_its_date_as_a_chunk_of_its_own() {
    // As Exchange does.
    let hangs_up = Action::ReplyThenClose("501 5.5.4 Invalid arguments".to_owned());
    let script = Script::new().on(Phase::EmptyChunk, hangs_up);
    let scene = Scene::of(chunking().script(script)).await;
    let mail = b"Subject: x\r\n\r\n.\r\n..\r\n.a\r\nMAIL FROM:<x>\r\n";
    scene.deliver(ANN, mail).await;
    assert_eq!(
        scene.smtp.trace(),
        [
            vec!["EHLO"],
            vec!["MAIL", "RCPT", "BDAT"],
            vec!["BDAT"],
            vec!["MAIL", "RCPT", "BDAT"]
        ]
    );
    let received = scene.smtp.received();
    assert_eq!(
        (received[0].data.as_slice(), received[1].data.as_slice()),
        (MAIL, &mail[..])
    );
    assert_eq!(scene.smtp.counters().connections, 1);
}

#[tokio::test]
async fn a_mail_that_does_not_begin_with_its_date_does_not_ask() {
    let smtp = chunking().start().await;
    let (pools, mail) = (pools(), b"Subject: x\r\nDate: y\r\n\r\nhello\r\n");
    let lease = lease(&pools, &account(&smtp)).await;
    let opened = lease.open(&to(ANN), of(mail.len(), false, false), mail).await;
    assert_eq!(codes(sent(&opened.unwrap().finish(mail).await)), [250]);
    assert_eq!(smtp.trace().last().unwrap(), &["MAIL", "RCPT", "DATA"]);
    assert_eq!(smtp.received()[0].data, mail);
}

#[tokio::test]
async fn nothing_is_a_chunk_when_it_is_switched_off() {
    let smtp = chunking().start().await;
    let mut setup = Setup::default();
    setup.config.chunking = false;
    let pools = setup.pools();
    send(&pools, &account(&smtp)).await;
    send(&pools, &account(&smtp)).await;
    assert_eq!((smtp.counters().command("BDAT"), smtp.received_count()), (0, 2));
}

#[tokio::test]
async fn a_large_mail_waits_for_its_recipients_then_goes_as_one_chunk() {
    let script = Script::new().recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"));
    let scene = Scene::scripted(script).await;
    let large = b"0123456.89abcdef\r\n.\r\n".repeat(20_000);
    assert_eq!(codes(sent(&scene.deliver(ANN, &large).await)), [250]);
    assert!(scene.smtp.received()[1].data == large);
    let refused = scene.deliver(&["nobody@example.org"], &large).await;
    assert_eq!(codes(sent(&refused)), [550]);
    assert_eq!(scene.flights().last().unwrap(), "RSET");
    assert_eq!(scene.smtp.counters().command("DATA"), 0);
}

#[tokio::test]
async fn a_connection_that_rested_hears_mail_answered_before_it_sends_the_mail() {
    let scene = Scene::of(chunking()).await;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    scene.deliver(ANN, MAIL).await;
    assert_eq!(scene.flights(), ["BDAT", "MAIL+RCPT", "BDAT"]);
}

#[tokio::test]
async fn in_a_flight_each_recipient_has_its_own_result_and_the_accepted_get_the_mail() {
    let script = Script::new()
        .recipient("bob", RcptRule::refuse("550 5.1.1 No such user"))
        .recipient("cid", RcptRule::refuse("451 4.7.1 Greylisted"));
    let scene = Scene::scripted(script).await;
    let outcome = scene.deliver(THREE, MAIL).await;
    assert_eq!(codes(sent(&outcome)), [250, 550, 451]);
    assert!(sent(&outcome)[0].1.reply().unwrap().text.contains("queued as"));
    assert_eq!(sent(&outcome)[2].1.failure().unwrap().reason, "greylisted");
    assert_eq!(scene.smtp.received()[1].to, ANN);
    assert_eq!(scene.smtp.counters().connections, 1);
}

#[tokio::test]
async fn a_refusal_in_a_flight_is_certain_whoever_it_is_of() {
    let nobody = RcptRule::refuse("550 5.1.1 No such user");
    for (what, script, results, stage) in [
        (
            "the sender",
            Script::new().first(1, Phase::Mail, Action::reply("553 5.7.1 Not yours")),
            [553; 3],
            Stage::MailFrom,
        ),
        (
            "all recipients",
            Script::new().recipients_with(|_| Some("550 5.1.1 No such user".to_owned())),
            [550; 3],
            Stage::RcptTo,
        ),
        (
            "the mail",
            Script::new().first(1, Phase::FinalDot, Action::reply("554 5.7.1 Spam")),
            [554; 3],
            Stage::Data,
        ),
        (
            "the mail, of those accepted",
            Script::new()
                .recipient("bob", nobody)
                .first(1, Phase::FinalDot, Action::reply("452 4.3.1 Full")),
            [452, 550, 452],
            Stage::Data,
        ),
    ] {
        let scene = Scene::scripted(script).await;
        let outcome = scene.deliver(THREE, MAIL).await;
        assert_eq!(codes(sent(&outcome)), results, "{what}");
        assert_eq!(sent(&outcome)[0].1.failure().unwrap().stage, stage, "{what}");
        assert_eq!(scene.smtp.received_count(), 1, "{what}");
        assert_eq!(scene.flights().last().unwrap(), "RSET", "{what}");
        scene.smtp.set_script(Script::new());
        assert_eq!(codes(sent(&scene.deliver(ANN, MAIL).await)), [250], "{what}");
        assert_eq!(scene.flights().last().unwrap(), "MAIL+RCPT+BDAT", "{what}");
        assert_eq!(scene.smtp.counters().connections, 1, "{what}");
        assert_eq!(scene.smtp.received()[1].data, MAIL, "{what}: still in step");
    }
}

#[tokio::test]
async fn a_421_in_a_flight_is_certain_and_ends_the_connection() {
    for (phase, results) in [(Phase::Rcpt, [421, 0, 0]), (Phase::FinalDot, [421, 421, 421])] {
        let scene = Scene::scripted(Script::new().first(1, phase, Action::shutting_down())).await;
        let outcome = scene.deliver(THREE, MAIL).await;
        assert_eq!(codes(sent(&outcome)), results);
        assert_eq!(scene.smtp.received_count(), 1);
        scene.deliver(ANN, MAIL).await;
        assert_eq!(scene.smtp.counters().connections, 2);
    }
}

#[tokio::test]
async fn a_connection_that_says_421_to_mail_is_replaced_and_that_is_no_attempt() {
    let scene = Scene::scripted(Script::new().first(1, Phase::Mail, Action::shutting_down())).await;
    assert_eq!(codes(sent(&scene.deliver(ANN, MAIL).await)), [250]);
    assert_eq!(scene.smtp.received_count(), 2);
    assert_eq!(scene.smtp.counters().connections, 2);
    assert_eq!(scene.smtp.counters().command("DATA"), 0);
}

#[tokio::test]
async fn a_flight_without_its_last_reply_is_uncertain_whether_taken_or_not() {
    for (action, taken, reason) in [
        (Action::TakeThenClose, 1, "connection_lost"),
        (Action::Close, 0, "connection_lost"),
        (Action::TakeThenSilence, 1, "timeout"),
        (Action::Silence, 0, "timeout"),
        (Action::reply("354 go on"), 0, "malformed_reply"),
        (Action::reply("HTTP/1.1 400 Bad Request"), 0, "malformed_reply"),
    ] {
        let script = Script::new()
            .recipient("bob", RcptRule::refuse("550 5.1.1 No such user"))
            .first(1, Phase::FinalDot, action.clone());
        let scene = Scene::scripted_with(script, Setup::against(&action)).await;
        let (open, refused, failure) = unknown(scene.deliver(THREE, MAIL).await);
        assert_eq!(open, ["ann@example.org", "cid@example.org"], "{action:?}");
        assert_eq!(refused, [550]);
        assert_eq!(
            (failure.reason, failure.stage),
            (reason, Stage::Data),
            "{action:?}"
        );
        assert_eq!(scene.smtp.received_count(), 1 + taken, "{action:?}");
        // For a while, the account's mails go the careful way.
        scene.deliver(ANN, MAIL).await;
        assert_eq!(scene.flights().last().unwrap(), "MAIL+RCPT+DATA", "{action:?}");
        assert_eq!(scene.smtp.counters().connections, 2);
    }
}

#[tokio::test]
async fn a_flight_that_nobody_answers_is_uncertain_for_all() {
    for phase in [Phase::Mail, Phase::Rcpt] {
        for action in [Action::Close, Action::Silence] {
            let setup = Setup::against(&action);
            let scene = Scene::scripted_with(Script::new().first(1, phase, action), setup).await;
            let (open, refused, _) = unknown(scene.deliver(THREE, MAIL).await);
            assert_eq!((open.len(), refused.len()), (3, 0));
        }
    }
}

#[tokio::test]
async fn the_replies_to_a_flight_may_take_as_long_as_that_to_a_whole_mail() {
    let setup = Setup::default().replies_within(SECOND, 20 * SECOND);
    let slow = Script::new().delay(Phase::FinalDot, 2 * SECOND);
    let scene = Scene::scripted_with(slow, setup).await;
    assert_eq!(codes(sent(&scene.deliver(ANN, MAIL).await)), [250]);
    assert_eq!(scene.flights(), ["BDAT", "MAIL+RCPT+BDAT"]);
}

#[tokio::test]
async fn nobody_has_a_mail_for_which_all_were_refused_even_if_the_connection_breaks() {
    let everybody = |_: &str| Some("550 5.1.1 No such user".to_owned());
    for end in [
        Action::Close,
        Action::Silence,
        // A lie.
        Action::reply("250 2.0.0 Ok: queued"),
    ] {
        let script = Script::new()
            .recipients_with(everybody)
            .on(Phase::FinalDot, end.clone());
        let scene = Scene::scripted_with(script, Setup::against(&end)).await;
        assert_eq!(
            codes(sent(&scene.deliver(THREE, MAIL).await)),
            [550; 3],
            "{end:?}"
        );
        scene.smtp.set_script(Script::new());
        assert_eq!(codes(sent(&scene.deliver(ANN, MAIL).await)), [250], "{end:?}");
        assert_eq!(scene.smtp.counters().connections, 2, "{end:?}");
    }
}

#[tokio::test]
async fn a_server_that_answers_too_often_or_too_rarely_leaves_it_uncertain() {
    for (what, script) in [
        (
            "too often",
            Script::new().first(1, Phase::Rcpt, Action::reply("250 2.1.5 Ok\r\n250 2.1.5 Ok")),
        ),
        (
            "too rarely",
            Script::new().first(1, Phase::Rcpt, Action::reply("250-2.1.5 Ok")),
        ),
    ] {
        let scene = Scene::scripted(script).await;
        let (open, ..) = unknown(scene.deliver(ANN, MAIL).await);
        assert_eq!(open, ANN, "{what}");
        scene.deliver(ANN, MAIL).await;
        assert_eq!(scene.smtp.counters().connections, 2, "{what}");
    }
}

#[tokio::test]
async fn a_farewell_after_the_last_reply_is_none_too_many() {
    let reply = Action::reply("250 2.0.0 Ok: queued\r\n421 4.3.2 Bye");
    let scene = Scene::scripted(Script::new().first(1, Phase::FinalDot, reply)).await;
    assert_eq!(codes(sent(&scene.deliver(ANN, MAIL).await)), [250]);
    scene.deliver(ANN, MAIL).await;
    assert_eq!(scene.smtp.counters().connections, 2);
}

#[tokio::test]
async fn a_server_that_only_says_it_knows_bdat_gets_data_and_never_a_mail_as_commands() {
    for reply in [
        "500 5.5.2 Unknown command",
        "502 5.5.1 No",
        "503 5.5.1 No",
        "554 5.5.0 No",
        "354 Go on",
    ] {
        let smtp = chunking()
            .script(Script::new().on(Phase::Bdat, Action::reply(reply)))
            .start()
            .await;
        let (pools, account) = (pools(), account(&smtp));
        for _ in 0..2 {
            assert_eq!(codes(sent(&send(&pools, &account).await)), [250], "{reply}");
        }
        let steps: Vec<String> = smtp.trace().into_iter().map(|batch| batch.join("+")).collect();
        // Its date is all that it may have read as a command.
        assert_eq!(
            steps,
            [
                "EHLO",
                "MAIL+RCPT+BDAT+DATE:",
                "EHLO",
                "MAIL+RCPT+DATA",
                "MAIL+RCPT+DATA"
            ],
            "{reply}"
        );
        let received = smtp.received();
        assert_eq!(received.len(), 2, "{reply}");
        assert!(received.iter().all(|mail| mail.data == MAIL), "{reply}");
    }
}

#[tokio::test]
async fn a_server_that_reads_the_date_as_a_command_is_in_step_or_left_when_nobody_was_accepted() {
    let script = Script::new()
        .recipient("nobody", RcptRule::refuse("550 5.1.1 No such user"))
        .on(Phase::Bdat, Action::reply("503 5.5.1 No"));
    let smtp = chunking().script(script).start().await;
    let scene = Scene {
        account: account(&smtp),
        smtp,
        pools: pools(),
    };
    let refused = scene.deliver(&["nobody@example.org"], MAIL).await;
    assert_eq!(codes(sent(&refused)), [550]);
    assert_eq!(codes(sent(&scene.deliver(ANN, MAIL).await)), [250]);
    assert_eq!(scene.smtp.received_count(), 1);
    assert_eq!(scene.smtp.received()[0].data, MAIL);
}

#[tokio::test]
async fn a_server_that_forgets_bdat_gets_the_mail_on_a_fresh_connection_by_data() {
    for reply in ["500 5.5.2 Unknown command", "502 5.5.1 No", "503 5.5.1 No"] {
        let scene = Scene::scripted(Script::new().on(Phase::Bdat, Action::reply(reply))).await;
        assert_eq!(codes(sent(&scene.deliver(ANN, MAIL).await)), [250], "{reply}");
        assert_eq!(scene.smtp.received_count(), 2, "{reply}");
        assert_eq!(scene.smtp.received()[1].data, MAIL);
        assert_eq!(scene.smtp.counters().connections, 2, "{reply}");
        assert_eq!(scene.flights().last().unwrap(), "MAIL+RCPT+DATA", "{reply}");
    }
}

#[tokio::test]
async fn a_large_mail_of_which_a_server_forgets_bdat_is_tried_again_by_data() {
    let scene = Scene::scripted(Script::new().on(Phase::Bdat, Action::reply("502 5.5.1 No"))).await;
    let large = vec![b'x'; 200_000];
    let outcome = scene.deliver(ANN, &large).await;
    let failure = sent(&outcome)[0].1.failure().unwrap();
    assert!(failure.is_transient(), "{failure:?}");
    assert_eq!(codes(sent(&scene.deliver(ANN, &large).await)), [250]);
    assert_eq!(scene.smtp.received_count(), 2);
}

#[tokio::test]
async fn a_server_that_goes_or_talks_nonsense_at_the_sight_of_bdat_gets_the_mail_by_data_at_once() {
    for action in [
        Action::Close,
        Action::ReplyThenClose("501 5.5.4 Invalid arguments".to_owned()),
        Action::reply("HTTP/1.1 400 Bad Request"),
        Action::Silence,
    ] {
        let smtp = chunking()
            .script(Script::new().on(Phase::Bdat, action.clone()))
            .start()
            .await;
        let setup = Setup::default();
        let pools = match action {
            Action::Silence => setup.replies_within(SECOND, 2 * SECOND).pools(),
            _ => setup.pools(),
        };
        let account = account(&smtp);
        // Outside the pools nobody remembers; an account does.
        let once = pools.connect_once(&server_of(&smtp)).await.unwrap();
        let once = open(once, &to(ANN)).await.unwrap();
        assert_eq!(codes(sent(&once.finish(MAIL).await)), [250], "{action:?}");
        for _ in 0..2 {
            assert_eq!(codes(sent(&send(&pools, &account).await)), [250], "{action:?}");
        }
        let counters = smtp.counters();
        assert_eq!(
            (counters.command("BDAT"), counters.command("DATA")),
            (2, 3),
            "{action:?}"
        );
        assert_eq!(counters.connections, 4, "{action:?}");
        assert!(smtp.received().iter().all(|mail| mail.data == MAIL));
        assert_eq!(smtp.received_count(), 3);
    }
}

#[tokio::test]
async fn a_server_that_cannot_take_the_first_chunk_now_has_refused_the_mail() {
    for (action, code) in [
        (Action::shutting_down(), 421),
        (Action::reply("452 4.3.1 Full"), 452),
    ] {
        let script = Script::new()
            .recipient("bob", RcptRule::refuse("550 5.1.1 No such user"))
            .on(Phase::Bdat, action);
        let smtp = chunking().script(script).start().await;
        let pools = pools();
        let error = open(lease(&pools, &account(&smtp)).await, &to(THREE))
            .await
            .unwrap_err();
        assert_eq!(codes(&error.results), [code, 550, code]);
        assert_eq!(error.failure.stage, Stage::Data);
        assert_eq!(smtp.counters().connections, 1);
    }
}

#[tokio::test]
async fn a_refused_sender_stays_refused_when_the_server_then_goes_at_the_sight_of_bdat() {
    let script = Script::new()
        .on(Phase::Mail, Action::reply("553 5.7.1 Not yours"))
        .on(Phase::Bdat, Action::Close);
    let smtp = chunking().script(script).start().await;
    let pools = pools();
    let error = open(lease(&pools, &account(&smtp)).await, &to(THREE))
        .await
        .unwrap_err();
    assert_eq!(codes(&error.results), [553; 3]);
    assert_eq!(error.failure.stage, Stage::MailFrom);
    assert_eq!(smtp.counters().connections, 1);
}

#[tokio::test]
async fn what_was_said_to_each_recipient_stands_when_there_is_no_second_connection_for_data() {
    let script = Script::new()
        .recipient("bob", RcptRule::refuse("550 5.1.1 No such user"))
        .once_after(1, Phase::Greeting, Action::shutting_down())
        .on(Phase::Bdat, Action::reply("502 5.5.1 No"));
    let smtp = chunking().script(script).start().await;
    let pools = pools();
    let error = open(lease(&pools, &account(&smtp)).await, &to(THREE))
        .await
        .unwrap_err();
    assert_eq!(codes(&error.results), [502, 550, 502]);
    assert!(error.mail_sent && error.failure.is_transient());
    assert_eq!(smtp.received_count(), 0);
}

#[tokio::test]
async fn a_flight_that_breaks_off_before_its_last_octet_is_no_uncertain_outcome() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = Server {
        host: "127.0.0.1".to_owned(),
        port: listener.local_addr().unwrap().port(),
        tls: TlsMode::None,
        credentials: None,
        allow_plaintext_auth: false,
        ca_pem: None,
        trusted: false,
    };
    let account = Arc::new(submission(server));
    let serving = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut buf = vec![0; 4096];
        for reply in [
            "220 x\r\n",
            "250-x\r\n250-PIPELINING\r\n250 CHUNKING\r\n",
            "250 ok\r\n250 ok\r\n250 ok\r\n",
            "250 ok\r\n",
        ] {
            socket.write_all(reply.as_bytes()).await.unwrap();
            if reply != "250 ok\r\n" {
                assert!(socket.read(&mut buf).await.unwrap() > 0);
            }
        }
        // Says no, and goes, before the mail is there.
        socket.read_exact(&mut buf[..100]).await.unwrap();
        socket
            .write_all(b"250 ok\r\n452 4.2.2 Full\r\n250 ok\r\n")
            .await
            .unwrap();
        socket.set_zero_linger().unwrap();
    });
    let scene = Scene {
        smtp: chunking().start().await,
        pools: pools(),
        account,
    };
    scene.warm_up().await;
    // More than the buffers of a connection that nobody reads from; as if small mails could be that large.
    let message = b"0123456789abcdef\r\n".repeat(1_000_000);
    let (envelope, mail) = (to(THREE), of(100, false, false));
    let lease = lease(&scene.pools, &scene.account).await;
    assert!(lease.may_deliver_at_once(&envelope, mail));
    let delivered = lease.deliver_at_once(&envelope, mail, &message).await;
    match delivered {
        Ok(Outcome::Done(results)) => {
            assert_eq!(codes(&results), [452, 0, 0], "the refusal was heard");
            let failure = results[1].1.failure().unwrap();
            assert_eq!(failure.reason, "connection_lost");
        }
        // A reset may overtake the replies: then nobody has heard anything, and a fresh connection is tried.
        Err(NotBegun::Failed(error)) => assert!(error.failure.is_transient()),
        other => panic!("{other:?}"),
    }
    serving.await.unwrap();
}

#[tokio::test]
async fn under_tls_and_with_all_its_parameters_a_flight_is_the_same() {
    let ca = TestCa::new();
    let smtp = chunking()
        .tls(TlsSetup::Implicit(ca.server(&["localhost"])))
        .size(1000)
        .start()
        .await;
    let mut server = server_of(&smtp);
    server.tls = TlsMode::Implicit;
    server.ca_pem = Some(ca.ca_pem().into());
    let scene = Scene {
        account: Arc::new(submission(server)),
        smtp,
        pools: pools(),
    };
    scene.warm_up().await;
    let (envelope, mail) = (to(&["jürgen@example.org"]), of(MAIL.len(), true, true));
    let again = lease(&scene.pools, &scene.account).await;
    assert!(again.may_deliver_at_once(&envelope, mail));
    let outcome = again.deliver_at_once(&envelope, mail, MAIL).await.unwrap();
    assert_eq!(codes(sent(&outcome)), [250]);
    let params = &scene.smtp.received()[1].params;
    assert_eq!(params, &format!("SIZE={} BODY=8BITMIME SMTPUTF8", MAIL.len()));
    let too_large = lease(&scene.pools, &scene.account).await;
    let error = too_large
        .deliver_at_once(&envelope, of(1001, false, false), MAIL)
        .await;
    match error {
        Err(NotBegun::Failed(error)) => {
            assert_eq!(error.failure.reason, "message_too_large");
            assert!(!error.mail_sent);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(scene.smtp.counters().command("MAIL"), 2);
}

#[tokio::test]
async fn a_cancelled_flight_does_not_give_back_a_connection_out_of_step() {
    let scene = Scene::scripted(Script::new().first(1, Phase::FinalDot, Action::Silence)).await;
    tokio::select! {
        outcome = scene.deliver(ANN, MAIL) => panic!("{outcome:?}"),
        () = until("BDAT", || scene.smtp.counters().command("BDAT") == 3) => {}
    }
    scene.smtp.wait_closed(5 * SECOND).await;
    assert_eq!(scene.pools.checked_out(&scene.account.key), 0);
}

#[tokio::test]
async fn a_flight_on_a_connection_that_takes_no_more_mails_is_repeated_on_a_fresh_one() {
    let script = Script::new().mails_per_connection(2, "452 4.3.2 Too many messages in this session");
    let scene = Scene::of(chunking().script(script)).await;
    for _ in 0..3 {
        assert_eq!(codes(sent(&scene.deliver(ANN, MAIL).await)), [250]);
    }
    assert_eq!(
        (scene.smtp.counters().connections, scene.smtp.received_count()),
        (2, 4)
    );
}

#[tokio::test]
async fn a_421_to_one_recipient_of_a_flight_is_its_own_and_nobody_has_the_mail() {
    let hangs_up = "421 4.7.0 TLS required for RCPT domain, closing connection";
    let scene = Scene::scripted(Script::new().recipient("bob", RcptRule::refuse(hangs_up))).await;
    let outcome = scene.deliver(THREE, MAIL).await;
    assert_eq!(codes(sent(&outcome)), [0, 421, 0]);
    assert_eq!(sent(&outcome)[2].1, RcptResult::Untold);
}
