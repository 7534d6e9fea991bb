//! A connection in use.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::failure::Stage;
use crate::smtp::connection::Connection;
use crate::smtp::envelope::{Envelope, all_failed};
use crate::smtp::extensions::Extensions;
use crate::smtp::open::{self, Announcement, NotOpen, OpenError};
use crate::smtp::server::Submission;
use crate::smtp::transaction::Transaction;
use crate::smtp::trouble::Trouble;

use super::account::Place;
use super::core::{Core, Entry};

/// A connection, logged in and ready for MAIL. Goes back to its pool when dropped.
pub struct Lease {
    core: Arc<Core>,
    /// `None` once it was given back.
    entry: Option<Entry>,
    /// `None` for a connection that belongs to no pool.
    home: Option<Home>,
    /// It carried mails, or idled, before.
    reused: bool,
    /// When the mail must be written.
    deadline: Instant,
}

/// Where a lease came from.
pub(super) struct Home {
    pub(super) place: Place,
    pub(super) submission: Arc<Submission>,
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
    pub(super) fn new(
        core: Arc<Core>,
        entry: Entry,
        home: Option<Home>,
        reused: bool,
        begun: Instant,
    ) -> Self {
        Self {
            deadline: begun + core.config.timeouts.attempt,
            core,
            entry: Some(entry),
            home,
            reused,
        }
    }

    /// What the server offers.
    #[must_use]
    pub fn extensions(&self) -> Option<&Extensions> {
        self.entry.as_ref().map(|entry| &entry.connection.extensions)
    }

    /// Announces a mail of `size` bytes. `utf8`: its headers need SMTPUTF8 (addresses are looked at here); `eightbit`:
    /// it has bytes outside ASCII.
    ///
    /// A connection that was used before and turns out to be dead is replaced by a fresh one, once; that is no attempt.
    ///
    /// # Errors
    /// When no recipient was accepted; the connection is back in its pool, or closed.
    pub async fn open(
        mut self,
        envelope: &Envelope,
        size: usize,
        utf8: bool,
        eightbit: bool,
    ) -> Result<Transaction, OpenError> {
        let mail = Announcement {
            envelope,
            size,
            utf8,
            eightbit,
        };
        let begun = Instant::now();
        loop {
            let Some(entry) = &mut self.entry else {
                return Err(closed(envelope));
            };
            entry.connection.hurry(self.deadline);
            match open::open(&mut entry.connection, mail).await {
                Ok(results) => {
                    self.core.envelope_time.observe(begun.elapsed().as_secs_f64());
                    return Ok(Transaction::new(self, results));
                }
                Err(NotOpen::Stale(_)) if self.reused && self.home.is_some() => {
                    self.replace(envelope).await?;
                }
                Err(NotOpen::Stale(error) | NotOpen::Failed(error)) => return Err(error),
            }
        }
    }

    /// Puts a fresh connection in the place of a dead one.
    async fn replace(&mut self, envelope: &Envelope) -> Result<(), OpenError> {
        let (Some(old), Some(home)) = (self.entry.take(), &self.home) else {
            return Err(closed(envelope));
        };
        let cap = old.into_cap();
        let submission = &home.submission;
        match self.core.connect(&submission.server, self.deadline).await {
            Ok(connection) => {
                self.entry = Some(self.core.entry(connection, submission.version, cap));
                self.reused = false;
                Ok(())
            }
            Err(failure) => Err(OpenError {
                results: all_failed(&envelope.to, &failure),
                failure,
                mail_sent: false,
            }),
        }
    }

    pub(in crate::smtp) fn connection(&mut self) -> Option<&mut Connection> {
        self.entry.as_mut().map(|entry| &mut entry.connection)
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
        let Some(Home { place, .. }) = self.home.take() else {
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
        if let Some(outdated) = pool.put_back(entry) {
            self.core.retire(outdated, Some(place));
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
