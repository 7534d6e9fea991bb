//! A connection in use.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::failure::Stage;
use crate::smtp::connection::{Bdat, Connection};
use crate::smtp::envelope::{Envelope, all_failed};
use crate::smtp::extensions::Extensions;
use crate::smtp::flight;
use crate::smtp::open::{self, Announcement, Mail, NotOpen, OpenError};
use crate::smtp::server::{Server, Submission};
use crate::smtp::transaction::{Outcome, Transaction};
use crate::smtp::trouble::Trouble;

use super::account::{AccountPool, Place};
use super::core::{Core, Entry};

/// How long an account's mails go by DATA after its server did not know BDAT, or left a flight without an answer.
const DISTRUST: Duration = Duration::from_hours(1);

/// Longest silence of a connection after which everything may go in one flight. A server that closes an idle connection
/// just then would leave the outcome unknown, while MAIL alone is repeated on a fresh one.
const WARM: Duration = Duration::from_secs(2);

/// A connection, logged in and ready for MAIL. Goes back to its pool when dropped.
pub struct Lease {
    core: Arc<Core>,
    /// `None` once it was given back.
    entry: Option<Entry>,
    /// `None` once it was given back.
    home: Option<Home>,
    /// It carried mails, or idled, before.
    reused: bool,
    /// BDAT made no trouble for this mail so far.
    chunking: bool,
    /// When the mail must be written.
    deadline: Instant,
}

/// A transaction that came to nothing so far; the server has taken nothing.
#[derive(Debug)]
pub enum NotBegun {
    /// The connection was dead, or knows nothing of BDAT after all: here is a fresh one, to begin anew if there is time. No
    /// attempt yet, though MAIL may have been heard. Comes twice at most.
    Fresh(Box<Lease>),
    /// No recipient can be sent to.
    Failed(OpenError),
}

/// Where a lease came from.
pub(super) enum Home {
    /// The pool of an account.
    Pool {
        place: Place,
        submission: Arc<Submission>,
    },
    /// No pool; this is the server.
    Outside(Box<Server>),
}

impl Home {
    fn pool(&self) -> Option<&Arc<AccountPool>> {
        match self {
            Self::Pool { place, .. } => Some(place.pool()),
            Self::Outside(_) => None,
        }
    }

    fn server(&self) -> &Server {
        match self {
            Self::Pool { submission, .. } => &submission.server,
            Self::Outside(server) => server,
        }
    }

    fn version(&self) -> i64 {
        match self {
            Self::Pool { submission, .. } => submission.version,
            Self::Outside(_) => 0,
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("entry", &self.entry)
            .field("reused", &self.reused)
            .finish_non_exhaustive()
    }
}

impl Lease {
    /// `begun`: when somebody began to wait for it.
    pub(super) fn new(core: Arc<Core>, entry: Entry, home: Home, reused: bool, begun: Instant) -> Self {
        Self {
            deadline: begun + core.config.timeouts.attempt,
            core,
            entry: Some(entry),
            home: Some(home),
            reused,
            chunking: true,
        }
    }

    /// What the server offers.
    #[must_use]
    pub fn extensions(&self) -> Option<&Extensions> {
        self.entry.as_ref().map(|entry| &entry.connection.extensions)
    }

    /// Announces a mail. Its first line may go out at once; without its end the server does not take it.
    ///
    /// A connection that was used before and turns out to be dead, or to take no more mails, is replaced by a fresh one,
    /// once, and so is one on which BDAT does not work although it is offered.
    ///
    /// # Errors
    /// [`NotBegun::Fresh`] has the replacement; [`NotBegun::Failed`] when no recipient was accepted, and the connection is back
    /// in its pool, or closed.
    pub async fn open(
        mut self,
        envelope: &Envelope,
        mail: Mail,
        message: &[u8],
    ) -> Result<Transaction, NotBegun> {
        let begun = Instant::now();
        let announcement = self.announcement(envelope, mail, message);
        let Some(entry) = &mut self.entry else {
            return Err(NotBegun::Failed(closed(envelope)));
        };
        entry.connection.hurry(self.deadline);
        let opened = open::open(&mut entry.connection, announcement).await;
        self.heed_bdat();
        match opened {
            Ok(opened) => {
                self.core.envelope_time.observe(begun.elapsed().as_secs_f64());
                Ok(Transaction::new(self, opened.results, opened.form))
            }
            Err(error) => Err(self.begin_anew(envelope, error).await),
        }
    }

    /// Whether envelope and mail may go in one flight ([`Lease::deliver_at_once`]): small, on a connection on which BDAT
    /// has worked and that has just been used.
    #[must_use]
    pub fn may_deliver_at_once(&self, envelope: &Envelope, mail: Mail) -> bool {
        self.trusts_bdat()
            && self.entry.as_ref().is_some_and(|entry| {
                flight::is_possible(&entry.connection, envelope, mail) && entry.silence() < WARM
            })
    }

    /// Sends envelope and mail in one flight (RFC 3030 §4.2) and waits for the server's verdict; then the connection goes
    /// back to its pool. The outcome is open from the first byte on: the last check whether we may still send comes
    /// before. Only after [`Lease::may_deliver_at_once`].
    ///
    /// # Errors
    /// [`NotBegun`]; the server has taken nothing.
    pub async fn deliver_at_once(
        mut self,
        envelope: &Envelope,
        mail: Mail,
        message: &[u8],
    ) -> Result<Outcome, NotBegun> {
        let announcement = self.announcement(envelope, mail, message);
        let Some(entry) = &mut self.entry else {
            return Err(NotBegun::Failed(closed(envelope)));
        };
        let begun = Instant::now();
        entry.connection.hurry(self.deadline);
        let delivered = flight::deliver(&mut entry.connection, announcement).await;
        self.heed_bdat();
        match delivered {
            Ok(outcome) => {
                self.observe_data(begun.elapsed());
                Ok(outcome)
            }
            Err(error) => Err(self.begin_anew(envelope, error).await),
        }
    }

    fn announcement<'a>(&self, envelope: &'a Envelope, mail: Mail, message: &'a [u8]) -> Announcement<'a> {
        Announcement {
            envelope,
            mail,
            message,
            chunking: self.trusts_bdat(),
        }
    }

    fn trusts_bdat(&self) -> bool {
        self.core.config.chunking && self.chunking && self.pool().is_none_or(|pool| pool.trusts_bdat())
    }

    fn pool(&self) -> Option<&Arc<AccountPool>> {
        self.home.as_ref().and_then(Home::pool)
    }

    /// Lets the account know when BDAT turned out not to work here.
    pub(in crate::smtp) fn heed_bdat(&self) {
        let broken = |entry: &Entry| entry.connection.bdat == Bdat::Broken;
        if self.entry.as_ref().is_some_and(broken)
            && let Some(pool) = self.pool()
            && pool.trusts_bdat()
        {
            pool.distrust_bdat(DISTRUST);
        }
    }

    /// Prepares for another try with a fresh connection, where there is hope: once for a dead one, once by DATA.
    async fn begin_anew(mut self, envelope: &Envelope, error: NotOpen) -> NotBegun {
        let replaced = match error {
            NotOpen::Stale(_) if self.reused => self.replace(envelope).await,
            NotOpen::Mistrusted(error) if self.chunking => {
                self.chunking = false;
                // MAIL was sent, and what the server said to each recipient stands.
                self.replace(envelope).await.map_err(|_| error)
            }
            NotOpen::Stale(error) | NotOpen::Mistrusted(error) | NotOpen::Failed(error) => Err(error),
        };
        match replaced {
            Ok(()) => NotBegun::Fresh(Box::new(self)),
            Err(error) => NotBegun::Failed(error),
        }
    }

    /// Puts a fresh connection in the place of a dead one.
    async fn replace(&mut self, envelope: &Envelope) -> Result<(), OpenError> {
        let (Some(old), Some(home)) = (self.entry.take(), &self.home) else {
            return Err(closed(envelope));
        };
        let cap = old.into_cap();
        match self.core.connect(home.server(), self.deadline).await {
            Ok(connection) => {
                self.entry = Some(self.core.entry(connection, home.version(), cap));
                self.reused = false;
                Ok(())
            }
            Err(failure) => Err(OpenError {
                results: all_failed(&envelope.to, &failure),
                failure,
                // On the dead one.
                mail_sent: true,
            }),
        }
    }

    pub(in crate::smtp) fn connection(&mut self) -> Option<&mut Connection> {
        self.entry.as_mut().map(|entry| &mut *entry.connection)
    }

    pub(in crate::smtp) fn observe_data(&self, time: Duration) {
        self.core.data_time.observe(time.as_secs_f64());
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(mut entry) = self.entry.take() else {
            return;
        };
        let Some(Home::Pool { place, .. }) = self.home.take() else {
            self.core.retire(entry, None);
            return;
        };
        if !self.core.may_stay(&entry) {
            self.core.retire(entry, Some(place));
            return;
        }
        entry.connection.take_time();
        entry.rest();
        let pool = Arc::clone(place.pool());
        if let Some((outdated, place)) = pool.put_back(entry, place) {
            self.core.retire(outdated, place);
        }
    }
}

/// A lease without a connection is not handed out; kept as an answer rather than a panic.
fn closed(envelope: &Envelope) -> OpenError {
    let failure = Trouble::Closed.failure(Stage::Connect);
    OpenError {
        results: all_failed(&envelope.to, &failure),
        failure,
        mail_sent: false,
    }
}
