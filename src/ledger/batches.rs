//! The ledger as jobs see it: one call per job, one statement per batch, and each call's own answer to trouble.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

use super::admit::Absorb;
use super::coalesce::{Bounds, Coalescer};
use super::outbox::ReportNumber;
use super::settle::{Answer, Settlement};
use super::slots::{SlotAnswer, SlotRequest};
use super::{Ledger, Row};
use crate::db::DbError;
use crate::fail_point::{self, Point};

/// Coalesced calls of the ledger. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Batches {
    ledger: Ledger,
    settle: Coalescer<Arc<Settlement>, Answer>,
    slots: Coalescer<SlotRequest, Option<SlotAnswer>>,
    absorb: Coalescer<Absorb, bool>,
    clear: Coalescer<ReportNumber, bool>,
    mark: Coalescer<Row, bool>,
}

/// A function of the ledger as a coalescer takes it.
fn with<I, F>(ledger: &Ledger, run: fn(Ledger, Vec<I>) -> F) -> impl Fn(Vec<I>) -> F + use<I, F> {
    let ledger = ledger.clone();
    move |batch| run(ledger.clone(), batch)
}

/// Most rows in one statement.
const ROWS: usize = 256;

/// Bodies in one statement, in bytes: it holds no lock others wait for, but must not hold the connection long.
const BODY_BYTES: usize = 4 << 20;

/// Calls that make a second statement worth its while beside one that is running.
const CROWD: usize = 32;

/// From one statement that settles to the next. The connection of such a mail is in use again already; what waits is its
/// report, and its place at the broker.
const SETTLE_PACE: Duration = Duration::from_millis(5);

/// From one statement that strikes published reports off the outbox to the next. Nobody waits for that; what dies in
/// between publishes its reports once more, under the same ids.
const CLEAR_PACE: Duration = Duration::from_millis(100);

impl Batches {
    /// Starts the tasks behind the calls.
    #[must_use]
    pub fn new(ledger: &Ledger) -> Self {
        let rows = |parallel| Bounds {
            rows: ROWS,
            weight: BODY_BYTES,
            parallel,
            crowd: CROWD,
            pace: Duration::ZERO,
        };
        Self {
            ledger: ledger.clone(),
            settle: Coalescer::spawn(
                Bounds {
                    pace: SETTLE_PACE,
                    ..rows(2)
                },
                with(ledger, settle),
            ),
            slots: Coalescer::spawn(rows(1), with(ledger, slots)),
            absorb: Coalescer::spawn(rows(1), with(ledger, absorb)),
            clear: Coalescer::spawn(
                Bounds {
                    pace: CLEAR_PACE,
                    crowd: ROWS,
                    ..rows(1)
                },
                with(ledger, clear),
            ),
            mark: Coalescer::spawn(rows(1), with(ledger, mark)),
        }
    }

    /// Writes an outcome, and gives back what was to be written. Repeated until Postgres has it: without it nothing may be
    /// acknowledged.
    pub async fn settle(&self, settlement: Settlement) -> (Settlement, Answer) {
        let weight = settlement.weight();
        let settlement = Arc::new(settlement);
        let answer = self.settle.call(Arc::clone(&settlement), weight).await;
        // The task ends only with the process; then nobody reads this.
        let answer = answer.unwrap_or(Answer::LEASE_LOST);
        // The batch has been dropped before it was answered: this copies nothing.
        (Arc::unwrap_or_clone(settlement), answer)
    }

    /// Writes outcomes that came together, in as few statements as they fit into; otherwise like [`Batches::settle`].
    pub async fn settle_together(&self, settlements: Vec<Settlement>) -> Vec<(Settlement, Answer)> {
        let mut settled = Vec::with_capacity(settlements.len());
        let mut rest = settlements.into_iter().map(Arc::new).peekable();
        while rest.peek().is_some() {
            let (mut batch, mut weight) = (Vec::new(), 0);
            while let Some(next) =
                rest.next_if(|next| batch.is_empty() || weight + next.weight() <= BODY_BYTES)
            {
                weight += next.weight();
                batch.push(next);
                if batch.len() == ROWS {
                    break;
                }
            }
            let answers = settle(self.ledger.clone(), batch.clone()).await;
            settled.extend(batch.into_iter().map(Arc::unwrap_or_clone).zip(answers));
        }
        settled
    }

    /// Takes a slot; `None` if Postgres cannot be asked.
    pub async fn take_slot(&self, request: SlotRequest) -> Option<SlotAnswer> {
        self.slots.call(request, 64).await.flatten()
    }

    /// Keeps a body for a job in flight elsewhere. `false`: the job was given back meanwhile and is to be admitted.
    pub async fn absorb(&self, body: Absorb) -> bool {
        let weight = body.body.len() + 256;
        self.absorb.call(body, weight).await.unwrap_or(false)
    }

    /// Strikes a published report off the outbox. If that fails it is published once more, under the same id.
    pub async fn clear(&self, report: ReportNumber) {
        self.clear.call(report, 8).await;
    }

    /// Marks the beginning of the final write. `false`: it must not begin.
    pub async fn mark_data(&self, row: Row) -> bool {
        let weight = 128 + 128 * row.recipients.len();
        self.mark.call(row, weight).await.unwrap_or(false)
    }
}

impl Batches {
    /// Accounts in trouble, as far as is known here.
    #[must_use]
    pub fn health(&self) -> &super::Known {
        self.ledger.health()
    }

    /// Says that work on the content of a suspect begins, or is over. `false`: it must not begin. Rare, so by itself.
    pub async fn mark_suspect(&self, row: &Row, marked: bool) -> bool {
        match self.ledger.mark_suspect(row, marked).await {
            Ok(stands) => stands,
            Err(error) => {
                trouble(&self.ledger, "suspect", &error);
                false
            }
        }
    }
}

async fn settle(ledger: Ledger, batch: Vec<Arc<Settlement>>) -> Vec<Answer> {
    let mut answers = vec![Answer::LEASE_LOST; batch.len()];
    for (places, part) in by_epoch(batch, |s| s.row.lease.epoch.number()) {
        for (place, answer) in places.into_iter().zip(settle_all(&ledger, part).await) {
            answers[place] = answer;
        }
    }
    answers
}

/// Repeats passing trouble for ever; splits a batch that one row poisons until that row stands alone.
async fn settle_all(ledger: &Ledger, mut batch: Vec<Arc<Settlement>>) -> Vec<Answer> {
    let mut waits = pauses();
    let mut reduced = false;
    loop {
        match ledger.settle(&batch).await {
            Ok(_) if fail_point::loses(Point::Settled, batch.iter().map(|s| s.row.id.as_str())) => {}
            // The caller has the report as it was: what was stored is for the sweeper to publish.
            Ok(answers) if reduced => {
                let left = |answer: Answer| Answer {
                    report: None,
                    ..answer
                };
                return answers.into_iter().map(left).collect();
            }
            Ok(answers) => return answers,
            Err(error) if !error.is_row_fault() => {
                trouble(ledger, "settle", &error);
                tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))).await;
            }
            Err(error) if batch.len() > 1 => {
                trouble(ledger, "settle", &error);
                let rest = batch.split_off(batch.len() / 2);
                let mut answers = Box::pin(settle_all(ledger, batch)).await;
                answers.extend(Box::pin(settle_all(ledger, rest)).await);
                return answers;
            }
            Err(error) => {
                tracing::error!(%error, "a settlement cannot be written as it is; its details are dropped, its outcome is kept");
                reduce(&mut batch);
                reduced = true;
                tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))).await;
            }
        }
    }
}

/// What is left of a settlement that Postgres refuses: the outcome, who has the mail, and a report without foreign text.
fn reduce(batch: &mut [Arc<Settlement>]) {
    for settlement in batch.iter_mut().map(Arc::make_mut) {
        for recipient in settlement.recipients.iter_mut().flatten() {
            // Their addresses are the job's. Without them the next attempt would send to everybody again.
            recipient.text = None;
            recipient.enhanced_code = None;
        }
        settlement.error = None;
        settlement.evidence.clear();
        if let Some(report) = &mut settlement.report {
            let data = report.data_mut();
            data.metadata = None;
            data.detail = None;
            data.tags.clear();
            for recipient in &mut data.recipients {
                recipient.text = None;
            }
        }
    }
}

async fn slots(ledger: Ledger, batch: Vec<SlotRequest>) -> Vec<Option<SlotAnswer>> {
    let mut answers = vec![None; batch.len()];
    for (places, part) in by_epoch(batch, |r| r.lease.epoch.number()) {
        for wait in pauses().take(5) {
            match ledger.take_slots(&part).await {
                Ok(given) => {
                    for (place, answer) in places.iter().zip(given) {
                        answers[*place] = Some(answer);
                    }
                    break;
                }
                Err(error) => trouble(&ledger, "slots", &error),
            }
            tokio::time::sleep(wait).await;
        }
    }
    answers
}

async fn absorb(ledger: Ledger, batch: Vec<Absorb>) -> Vec<bool> {
    let mut waits = pauses();
    loop {
        match ledger.absorb(&batch).await {
            Ok(answers) => return answers,
            Err(error) => trouble(&ledger, "absorb", &error),
        }
        tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(5))).await;
    }
}

async fn clear(ledger: Ledger, batch: Vec<ReportNumber>) -> Vec<bool> {
    let cleared = ledger.clear_outbox(&batch).await;
    if let Err(error) = &cleared {
        trouble(&ledger, "clear", error);
    }
    vec![cleared.is_ok(); batch.len()]
}

async fn mark(ledger: Ledger, batch: Vec<Row>) -> Vec<bool> {
    let mut answers = vec![false; batch.len()];
    for (places, part) in by_epoch(batch, |row| row.lease.epoch.number()) {
        match ledger.mark_data(&part).await {
            Ok(stands) => {
                for (place, stands) in places.into_iter().zip(stands) {
                    answers[place] = stands;
                }
            }
            Err(error) => trouble(&ledger, "mark", &error),
        }
    }
    answers
}

/// Parts of a batch by the epoch of their lease (nearly always one), each with its places in the whole.
fn by_epoch<T>(batch: Vec<T>, epoch: impl Fn(&T) -> i64) -> Vec<(Vec<usize>, Vec<T>)> {
    let mut parts: Vec<(i64, Vec<usize>, Vec<T>)> = Vec::with_capacity(1);
    for (place, item) in batch.into_iter().enumerate() {
        let number = epoch(&item);
        let at = parts.iter().position(|(n, ..)| *n == number).unwrap_or_else(|| {
            parts.push((number, Vec::new(), Vec::new()));
            parts.len() - 1
        });
        parts[at].1.push(place);
        parts[at].2.push(item);
    }
    parts
        .into_iter()
        .map(|(_, places, items)| (places, items))
        .collect()
}

fn trouble(ledger: &Ledger, statement: &str, error: &DbError) {
    ledger
        .metrics
        .sql_errors
        .with_label_values(&[error.class()])
        .inc();
    ledger.db.learn_from(error);
    tracing::warn!(statement, %error, "the database did not answer; trying again");
}

/// Pauses between tries: 50 ms doubling to 5 s, jittered.
pub(crate) fn pauses() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times()
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_parted_by_epoch_and_keeps_its_places() {
        let parts = by_epoch(vec![(7, 'a'), (8, 'b'), (7, 'c')], |item| item.0);
        assert_eq!(
            parts,
            [(vec![0, 2], vec![(7, 'a'), (7, 'c')]), (vec![1], vec![(8, 'b')])]
        );
    }
}
