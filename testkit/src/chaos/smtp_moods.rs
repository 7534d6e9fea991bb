//! How the SMTP servers of a campaign misbehave.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::smtp::{Action, Phase, Script};

/// Time limit of the workers for the reply to the final dot (`POSTROOM_SMTP_FINAL_TIMEOUT`).
pub const FINAL_TIMEOUT: Duration = Duration::from_secs(3);

/// A way to misbehave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mood {
    /// 421 at any command.
    ShuttingDown,
    /// 4yz at any command.
    Defers,
    /// 5yz at DATA and after the dot.
    Refuses,
    /// The connection ends before the mail is taken.
    DropsBefore,
    /// The connection ends after it, without an answer.
    DropsAfter,
    /// The 250 comes late, sometimes too late.
    Late,
    /// It does not answer any more.
    Silent,
    /// Replies come byte by byte.
    Drips,
    /// Logins fail, for now or for good.
    Logins,
}

impl Mood {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::ShuttingDown,
        Self::Defers,
        Self::Refuses,
        Self::DropsBefore,
        Self::DropsAfter,
        Self::Late,
        Self::Silent,
        Self::Drips,
        Self::Logins,
    ];

    /// Its name in the table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ShuttingDown => "says 421",
            Self::Defers => "answers 4yz",
            Self::Refuses => "answers 5yz",
            Self::DropsBefore => "drops connections before it takes mail",
            Self::DropsAfter => "takes mail and drops the connection",
            Self::Late => "answers the dot late",
            Self::Silent => "stops answering",
            Self::Drips => "drips its replies",
            Self::Logins => "refuses logins",
        }
    }

    fn add(self, script: Script) -> Script {
        let late = |millis| Action::Delay(Duration::from_millis(millis));
        match self {
            Self::ShuttingDown => [
                Phase::Greeting,
                Phase::Ehlo,
                Phase::Auth,
                Phase::Mail,
                Phase::Data,
            ]
            .into_iter()
            .chain([Phase::Rcpt, Phase::FinalDot, Phase::Rset])
            .fold(script, |script, phase| {
                script.sometimes(0.1, phase, Action::shutting_down())
            }),
            Self::Defers => [Phase::Mail, Phase::Rcpt, Phase::Data, Phase::FinalDot]
                .into_iter()
                .fold(script, |script, phase| {
                    script.sometimes(0.2, phase, Action::reply("451 4.3.0 Try again later"))
                }),
            Self::Refuses => [Phase::Data, Phase::FinalDot]
                .into_iter()
                .fold(script, |script, phase| {
                    script.sometimes(0.05, phase, Action::reply("554 5.7.1 Not that"))
                }),
            Self::DropsBefore => script
                .sometimes(0.1, Phase::Mail, Action::Close)
                .sometimes(0.2, Phase::Content, Action::Close)
                .sometimes(0.2, Phase::FinalDot, Action::Close),
            Self::DropsAfter => script.sometimes(0.2, Phase::FinalDot, Action::TakeThenClose),
            Self::Late => script
                .sometimes(
                    0.05,
                    Phase::FinalDot,
                    late(FINAL_TIMEOUT.as_millis() as u64 + 1500),
                )
                .sometimes(0.3, Phase::FinalDot, late(400)),
            Self::Silent => script
                .sometimes(0.03, Phase::Mail, Action::Silence)
                .sometimes(0.03, Phase::FinalDot, Action::Silence)
                .sometimes(0.03, Phase::FinalDot, Action::TakeThenSilence),
            Self::Drips => script.drip(Duration::from_millis(2)),
            Self::Logins => script
                .sometimes(
                    0.3,
                    Phase::Auth,
                    Action::reply("454 4.7.0 Temporary authentication failure"),
                )
                .sometimes(
                    0.3,
                    Phase::Auth,
                    Action::reply("535 5.7.8 Authentication credentials invalid"),
                ),
        }
    }
}

/// The recipients of the campaign: whoever is called nobody is unknown, whoever is called later is deferred once.
#[derive(Debug, Clone, Default)]
pub struct Recipients(Arc<Mutex<HashSet<String>>>);

impl Recipients {
    /// The script of a server in this mood.
    #[must_use]
    pub fn script(&self, mood: Option<Mood>, seed: u64) -> Script {
        let deferred = Arc::clone(&self.0);
        let script = Script::new().seed(seed).recipients_with(move |address| {
            if address.starts_with("nobody-") {
                return Some("550 5.1.1 No such user here".to_owned());
            }
            let first = address.starts_with("later-")
                && deferred
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(address.to_owned());
            first.then(|| "451 4.7.1 Greylisted, please try again".to_owned())
        });
        match mood {
            Some(mood) => mood.add(script),
            None => script,
        }
    }
}
