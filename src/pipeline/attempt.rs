//! The stages of one attempt.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use lettre::Address;

use super::resolve::{Entries, is_for};
use super::task::{SharedClock, Task};
use super::transact::{Covered, refuse_unspeakable, unspeakable};
use super::turns::Turns;
use super::{Attempt, Verdict, evidence, room};
use crate::attachment::{self, Attachments, Part, Prepared};
use crate::compose::{self, Composition, Email};
use crate::config::UnknownTenant;
use crate::directory::{Chosen, Directory, Via, sender};
use crate::fail_point::{self, Point};
use crate::failure::{Class, Failure, Fault, Stage};
use crate::id::TenantId;
use crate::ledger::batches::Batches;
use crate::ledger::slots::{SlotAnswer, SlotRequest};
use crate::ledger::{Slot, WaitReason};
use crate::memory::{Held, Memory};
use crate::report::LinkedFile;
use crate::secret::Keys;
use crate::smtp::{self, CheckoutError, Pools, Submission};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces;

/// How long a job waits in the waiting room when its account has no connection free.
const BUSY_DELAY: Duration = Duration::from_millis(250);
/// Pauses, in ms, before another slot is asked for where one came too late to be used.
const LATE_SLOT_PAUSES: [u64; 4] = [50, 100, 200, 400];
/// How long the mail waits then for a faster database.
const LATE_SLOT_DELAY: Duration = Duration::from_secs(5);
/// How long a mail waits that has stood in line for its files in vain: as long as it has waited already, within this.
const FILES_DELAY: RangeInclusive<Duration> = Duration::from_secs(10)..=Duration::from_mins(1);

/// Everything an attempt talks to.
#[derive(Debug)]
pub struct Pipeline {
    /// Tenants and accounts.
    pub directory: Arc<Directory>,
    /// Files.
    pub attachments: Attachments,
    /// SMTP connections.
    pub pools: Arc<Pools>,
    /// Slots and marks.
    pub batches: Batches,
    /// Keys at rest, and those producers seal overrides with.
    pub keys: Keys,
    /// Bytes of jobs in hand.
    pub memory: Arc<Memory>,
    /// Keys Message-IDs.
    pub installation_secret: Vec<u8>,
    /// What to do with unknown tenants.
    pub unknown_tenant: UnknownTenant,
    /// The database's clock.
    pub clock: Arc<SharedClock>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Watched alone: one prime suspect at a time.
    pub alone: tokio::sync::Semaphore,
}

/// What all tries of an attempt have in common, down the ladder.
struct Ready<'a> {
    entries: &'a Entries,
    prepared: &'a Prepared,
    /// When the first of them began. Whatever their number, no transaction begins later than the time of one after that.
    begun: Instant,
}

impl<'a> Ready<'a> {
    fn now(entries: &'a Entries, prepared: &'a Prepared) -> Self {
        let begun = Instant::now();
        Self {
            entries,
            prepared,
            begun,
        }
    }
}

impl Pipeline {
    /// Makes one attempt. Never fails: whatever happens is a verdict.
    pub async fn attempt(&self, task: &Task) -> Attempt {
        let mut attempt = task.begin();
        attempt.verdict = match self.run(task, &mut attempt).await {
            Ok(verdict) | Err(verdict) => verdict,
        };
        if let Verdict::Failed(failure) | Verdict::Uncertain(failure) = &attempt.verdict {
            attempt.failure.get_or_insert_with(|| failure.clone());
        }
        attempt
    }

    /// resolve → fetch → connect → compose → slot → send, down the ladder of senders.
    async fn run(&self, task: &Task, attempt: &mut Attempt) -> Result<Verdict, Verdict> {
        fail_point::hit(Point::Leased, [task.job.id.as_str()]);
        in_its_time(task, self.clock.now())?;
        if task.row.probe {
            // The account may have been mended a moment ago.
            self.directory.forget(&[&task.job.tenant, &TenantId::platform()]);
        }
        let since = Instant::now();
        let resolved = self.resolve(&task.job).await;
        traces::stage("resolve", since);
        let (entries, mut chosen) = resolved.map_err(|verdict| match verdict {
            // No attempt: nothing was tried, and the key may come at any time.
            Verdict::Failed(failure) if failure.is_missing_key() => {
                tracing::warn!(%failure, "the job waits for a key");
                Verdict::Failed(failure)
            }
            Verdict::Failed(failure) => started(attempt, failure),
            other => other,
        })?;
        attempt.on_uncertain = task
            .job
            .on_uncertain
            .unwrap_or(entries.tenant.tenant.on_uncertain);
        is_for(attempt, &chosen);
        chosen = self.healthy(task, attempt, &entries, chosen)?;
        let turn = self.turn_for_files(task).await?;
        let watched = self.watch(task).await?;
        let fetched = Instant::now();
        let large_files = &entries.tenant.tenant.large_files;
        let prepared = self
            .attachments
            .prepare(&task.job.tenant, &task.job.attachments, large_files)
            .await
            .map_err(|failure| started(attempt, failure))?;
        drop(turn);
        self.note_files(task, attempt, &prepared, fetched);
        let copy = self.room_for_copy(task, &prepared).await;
        let _copy = copy.map_err(|failure| started(attempt, failure))?;
        if let Some(watched) = watched {
            self.rehearse(task, attempt, &chosen, &prepared);
            self.unwatch(task, watched).await?;
        }
        let ready = Ready::now(&entries, &prepared);
        loop {
            chosen = self.healthy(task, attempt, &entries, chosen)?;
            let verdict = self.try_sender(task, attempt, &chosen, &ready).await;
            if has_become_unhealthy(&verdict) {
                continue;
            }
            let Verdict::Failed(failure) = &verdict else {
                return Ok(verdict);
            };
            let platform = entries.platform.as_deref();
            match sender::after_failure(&chosen, failure, &task.job, &entries.tenant, platform) {
                // A marked send is taken over 25 minutes after its lease: what comes late is for the next attempt.
                Some(other)
                    if ready.begun.elapsed() < self.pools.attempt_limit()
                        && self.trouble(task, &other).is_none() =>
                {
                    chosen = other;
                }
                _ => return Ok(verdict),
            }
        }
    }

    /// No attempt if it does not come: nobody has been asked for a file.
    async fn turn_for_files(&self, task: &Task) -> Result<attachment::Turn<'_>, Verdict> {
        let job = &task.job;
        let turn = self.attachments.turn(&job.tenant, &job.attachments).await;
        turn.ok_or_else(|| {
            let waited = self.clock.now().duration_since(task.date());
            Verdict::Wait {
                reason: WaitReason::Busy,
                delay: files_delay(Duration::try_from(waited).unwrap_or_default()),
            }
        })
    }

    async fn room_for_copy(&self, task: &Task, prepared: &Prepared) -> Result<Option<Held>, Failure> {
        let fetched: u64 = prepared.parts.iter().map(Part::held_bytes).sum();
        if fetched == 0 {
            return Ok(None);
        }
        room::for_copy(&self.memory, task.weight, fetched).await.map(Some)
    }

    fn note_files(&self, task: &Task, attempt: &mut Attempt, prepared: &Prepared, since: Instant) {
        if !task.job.attachments.is_empty() {
            self.observe("fetch", since);
        }
        for warning in &prepared.warnings {
            tracing::warn!(job = %task.job.id, tenant = %task.job.tenant, warning);
        }
        attempt.links = prepared
            .links
            .iter()
            .map(|link| LinkedFile {
                filename: link.filename.clone(),
                size: link.size,
                expires_at: link.expires_at,
            })
            .collect();
    }

    /// One try, through one sender, and what it says about that one.
    async fn try_sender(
        &self,
        task: &Task,
        attempt: &mut Attempt,
        chosen: &Chosen,
        ready: &Ready<'_>,
    ) -> Verdict {
        let accepted = evidence::accepted(attempt);
        // What another has said before is no evidence against this one.
        let earlier = attempt.failure.take();
        let mut turns = Turns::of(attempt);
        let verdict = match self.send(task, attempt, chosen, ready, &mut turns).await {
            Ok(verdict) | Err(verdict) => verdict,
        };
        let verdict = turns.after(verdict, attempt);
        turns.end(attempt);
        let found = evidence::of(chosen, &verdict, attempt, accepted);
        attempt.evidence.extend(found);
        if let Some(earlier) = earlier {
            attempt.failure = Some(match attempt.failure.take() {
                Some(now) if !earlier.is_transient() => now,
                _ => earlier,
            });
        }
        verdict
    }

    /// Sends to everybody whose turn it is, in as many transactions as the slots ask for.
    async fn send(
        &self,
        task: &Task,
        attempt: &mut Attempt,
        chosen: &Chosen,
        ready: &Ready<'_>,
        turns: &mut Turns,
    ) -> Result<Verdict, Verdict> {
        attempt.sender = Some(chosen.sender());
        is_for(attempt, chosen);
        let message_id = self.message_id(task, chosen, attempt);
        let bound = task.row.slot.is_none_or(|slot| slot.until.is_some());
        let limited = bound || ready.entries.limit(chosen);
        let mut slot = task.row.slot.filter(|_| chosen.account.key == task.row.account);
        loop {
            let mut open = turns.next(attempt);
            if open.is_empty() {
                return Ok(Verdict::Attempted);
            }
            self.may_begin(ready)?;
            let lease = self.connection(task, attempt, chosen).await?;
            let foreign = unspeakable(&lease, &mut open);
            if open.is_empty() {
                refuse_unspeakable(attempt, &foreign);
                continue;
            }
            let begun = Instant::now();
            let mut email = Self::compose(task, chosen, ready.prepared, &message_id, &open)
                .map_err(|failure| started(attempt, failure))?;
            self.observe("compose", begun);
            // Last of all: a slot is valid only briefly, and the limit has to hold at the provider.
            let granted = match slot.take().filter(Slot::is_valid) {
                Some(slot) => slot,
                None if !limited => Slot::unlimited(),
                None => self.take_slot(task, attempt, chosen, open.len()).await?,
            };
            // Before, the mail may still have to wait, and that is no attempt.
            refuse_unspeakable(attempt, &foreign);
            open.truncate(granted.recipients as usize);
            email.recipients.truncate(open.len());
            turns.begin(&open);
            if task.is_expired(self.clock.now()) {
                return Err(Verdict::Expired);
            }
            let begun = Instant::now();
            let part = Covered {
                recipients: &open,
                slot: &granted,
            };
            let result = self.transact(task, attempt, lease, &email, part).await;
            attempt.smtp = Some(attempt.smtp.unwrap_or_default() + begun.elapsed());
            self.observe("send", begun);
            match result {
                Ok(untold) => turns.answered(&untold),
                Err(verdict) => {
                    if matches!(verdict, Verdict::Wait { .. }) {
                        turns.have_again(&open);
                    }
                    return Err(verdict);
                }
            }
        }
    }

    /// A marked send is taken over 25 minutes after its lease: what comes late is for the next time.
    fn may_begin(&self, ready: &Ready<'_>) -> Result<(), Verdict> {
        if ready.begun.elapsed() < self.pools.attempt_limit() {
            return Ok(());
        }
        Err(Verdict::Wait {
            reason: WaitReason::Busy,
            delay: Duration::ZERO,
        })
    }

    /// The Message-ID: that of earlier attempts, else made from what identifies the job.
    pub(super) fn message_id(&self, task: &Task, chosen: &Chosen, attempt: &mut Attempt) -> Arc<str> {
        let from = task.job.from.as_ref().unwrap_or(&chosen.from);
        let message_id = attempt.message_id.get_or_insert_with(|| {
            compose::message_id(
                &self.installation_secret,
                &task.job.tenant,
                &task.job.id,
                task.row.born,
                from.address.domain(),
            )
            .into()
        });
        Arc::clone(message_id)
    }

    pub(super) fn compose(
        task: &Task,
        chosen: &Chosen,
        prepared: &Prepared,
        message_id: &str,
        recipients: &[Address],
    ) -> Result<Email, Failure> {
        fail_point::hit(Point::Composing, [task.job.id.as_str()]);
        compose::compose(&Composition {
            job: &task.job,
            from: &chosen.from,
            reply_to: Some(&chosen.reply_to),
            envelope_from: chosen.envelope_from.as_ref(),
            recipients,
            message_id,
            date: task.date(),
            prepared,
        })
    }

    /// A connection of the account, before any slot is taken: the limit must hold at the provider.
    async fn connection(
        &self,
        task: &Task,
        attempt: &mut Attempt,
        chosen: &Chosen,
    ) -> Result<smtp::Lease, Verdict> {
        let since = Instant::now();
        let account = &chosen.account;
        traces::server(&account.server.host, account.server.port);
        let checked_out = if chosen.via == Via::Override {
            self.pools
                .connect_once(&account.server)
                .await
                .map_err(CheckoutError::Failed)
        } else {
            let submission = Submission {
                key: account.key.clone(),
                version: account.version,
                server: account.server.clone(),
                max_connections: account.max_connections,
            };
            let in_trouble = || self.trouble(task, chosen).is_some();
            self.pools
                .checkout_unless(&Arc::new(submission), &in_trouble)
                .await
        };
        self.observe("connection", since);
        match checked_out {
            Ok(lease) => Ok(lease),
            Err(CheckoutError::Busy) if self.trouble(task, chosen).is_some() => {
                // It failed for others while this one stood in line: the question who sends is asked anew.
                Err(Verdict::Wait {
                    reason: WaitReason::Unhealthy,
                    delay: Duration::ZERO,
                })
            }
            Err(CheckoutError::Busy) => {
                tracing::debug!(job = %task.job.id, account = %account.key, "no connection is free");
                attempt.found_busy = true;
                Err(Verdict::Wait {
                    reason: WaitReason::Busy,
                    delay: BUSY_DELAY,
                })
            }
            Err(CheckoutError::Failed(failure)) => Err(started(attempt, failure)),
        }
    }

    /// A slot that may be used. One whose answer came late counts where it was granted, and MAIL would come elsewhere: it
    /// goes back for another.
    async fn take_slot(
        &self,
        task: &Task,
        attempt: &mut Attempt,
        chosen: &Chosen,
        recipients: usize,
    ) -> Result<Slot, Verdict> {
        let mut pauses = LATE_SLOT_PAUSES.into_iter();
        loop {
            let slot = self.ask_for_slot(task, attempt, chosen, recipients).await?;
            if slot.is_valid() {
                return Ok(slot);
            }
            let Some(pause) = pauses.next() else {
                break;
            };
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        tracing::warn!(account = %chosen.account.key, "Postgres answers too late for a slot of the account's limits to be used");
        // Over a limit it would be released again at once: there is room in it.
        Err(Verdict::Wait {
            reason: WaitReason::Busy,
            delay: LATE_SLOT_DELAY,
        })
    }

    async fn ask_for_slot(
        &self,
        task: &Task,
        attempt: &mut Attempt,
        chosen: &Chosen,
        recipients: usize,
    ) -> Result<Slot, Verdict> {
        let since = Instant::now();
        let request = SlotRequest {
            tenant: task.row.tenant.clone(),
            id: task.row.id.clone(),
            lease: task.row.lease.clone(),
            account: chosen.account.key.clone(),
            recipients: recipients as u32,
            // Whoever sent under it, and whoever sends now.
            keep: attempt.reached_mail_from,
        };
        let answer = self.batches.take_slot(request).await;
        self.observe("slot", since);
        match answer {
            Some(SlotAnswer::Granted(slot)) => {
                attempt.reached_mail_from = false;
                Ok(slot)
            }
            Some(SlotAnswer::Denied(delay)) => Err(Verdict::Wait {
                reason: WaitReason::Rate,
                delay,
            }),
            Some(SlotAnswer::LeaseLost) | None => Err(Verdict::GiveBack),
        }
    }

    fn observe(&self, stage: &'static str, since: Instant) {
        traces::stage(stage, since);
        self.metrics
            .stage
            .with_label_values(&[stage])
            .observe(since.elapsed().as_secs_f64());
    }
}

/// Neither too early nor too late.
fn in_its_time(task: &Task, now: Timestamp) -> Result<(), Verdict> {
    if task.is_expired(now) {
        return Err(Verdict::Expired);
    }
    match task.is_early_by(now) {
        Some(delay) => Err(Verdict::Wait {
            reason: WaitReason::Schedule,
            delay,
        }),
        None => Ok(()),
    }
}

/// A mail behind a host that hangs is leased and read for nothing each time: the longer that lasts, the less often.
fn files_delay(waited: Duration) -> Duration {
    waited.clamp(*FILES_DELAY.start(), *FILES_DELAY.end())
}

/// Whether the account got into trouble while the job stood in line for a connection.
fn has_become_unhealthy(verdict: &Verdict) -> bool {
    let unhealthy = WaitReason::Unhealthy;
    matches!(verdict, Verdict::Wait { reason, .. } if *reason == unhealthy)
}

/// A failure that counts as an attempt.
fn started(attempt: &mut Attempt, failure: Failure) -> Verdict {
    attempt.started = true;
    Verdict::Failed(failure)
}

/// What a panic in an attempt is told as.
#[must_use]
pub fn panicked() -> Failure {
    Failure::transient(
        Class::Local,
        Fault::Us,
        Stage::Compose,
        "internal_error",
        "an internal error stopped this attempt; see the log of the worker",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_a_mail_has_stood_in_line_for_its_files_the_less_often_it_comes_back() {
        let delays = [0, 13, 39, 3600].map(|waited| files_delay(Duration::from_secs(waited)));
        assert_eq!(delays.map(|delay| delay.as_secs()), [10, 13, 39, 60]);
    }
}
