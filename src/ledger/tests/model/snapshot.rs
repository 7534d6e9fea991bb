//! The tables as they are, compared with what they were one statement before.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::jobs::{Key, charged};
use super::{Model, Rule, Step, holds};

/// A row of `job`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct JobRow {
    pub(super) state: i16,
    pub(super) lease: (i64, i64),
    pub(super) sequence: i64,
    pub(super) has_body: bool,
    pub(super) accepted: BTreeSet<String>,
    pub(super) cancel: bool,
    /// Marked in its final write; an acceptance was merged under the present lease.
    under_lease: (bool, bool),
    recipients: Value,
    outcome: Option<String>,
    owed: BTreeSet<i64>,
    final_owed: BTreeSet<i64>,
    pub(super) slot: Option<(i64, i32)>,
    account: String,
}

/// Everything that is compared.
#[derive(Debug, Clone, Default)]
pub(super) struct Snapshot {
    pub(super) jobs: BTreeMap<Key, JobRow>,
    pub(super) dead: BTreeMap<i64, bool>,
    /// By key: what counts, the limit, and whether it counts recipients.
    used: BTreeMap<String, (i32, i32, bool)>,
    /// What is wrong with the lanes.
    lanes: Option<String>,
}

const JOBS: &str = "SELECT tenant, id, state, coalesce(epoch, 0), coalesce(claim, 0), seq, body IS NOT NULL,
    coalesce(recipients, '[]'), cancel, phase = 1, merged, outcome,
    ARRAY(SELECT o.body FROM {s}.outbox o WHERE o.tenant = x.tenant AND o.id = x.id ORDER BY o.n),
    ARRAY(SELECT o.seq FROM {s}.outbox o WHERE o.tenant = x.tenant AND o.id = x.id ORDER BY o.n),
    slot_at, slot_cost, account FROM {s}.job x";
const WORKERS: &str = "SELECT epoch, dead FROM {s}.worker";
const RATES: &str = "SELECT key, used[1], lim[1], unit[1] = 1 FROM {s}.rate";
const LANES: &str = "WITH waiting AS (SELECT * FROM {s}.job WHERE state = 2)
    SELECT string_agg(w, '; ') FROM (
        SELECT format('%s/%s, due at %s, has no lane that will look at it in time, but %s; limits %s; now %s', x.tenant,
            x.id, x.due_at, (SELECT json_agg(l) FROM {s}.lane l WHERE l.account = x.account AND l.tenant = x.tenant),
            (SELECT json_agg(json_build_array(r.key, {s}.instant(r.next_at))) FROM {s}.rate r), clock_timestamp()) AS w
        FROM waiting x
        WHERE NOT x.cancel AND NOT EXISTS (SELECT FROM {s}.lane l WHERE l.account = x.account
            AND l.level = x.level AND l.tenant = x.tenant AND l.oldest_at <= x.due_at
            AND l.next_at <= greatest(x.due_at, clock_timestamp(), (SELECT {s}.instant(max(r.next_at))
                FROM {s}.rate r WHERE r.key = ANY ({s}.charged_keys(x.tenant, x.account)))) + interval '100 ms')
        UNION ALL
        SELECT format('lane %s %s %s counts %s for %s', l.account, l.level, l.tenant, l.fifo, c.n)
        FROM {s}.lane l CROSS JOIN LATERAL (SELECT count(*) AS n FROM waiting x
            WHERE x.account = l.account AND x.level = l.level AND x.tenant = l.tenant AND x.reason IN (1, 4, 7)) c
        WHERE l.fifo <> c.n) y";

impl Model {
    /// All at once: nobody writes meanwhile.
    async fn read(&self) -> Snapshot {
        let client = self.world.db.client().await.unwrap();
        let texts = [JOBS, WORKERS, RATES, LANES].map(|text| self.world.db.sql(text));
        let mut statements = Vec::new();
        for text in &texts {
            statements.push(client.prepare_cached(text).await.unwrap());
        }
        let ask = statements.iter().map(|statement| client.query(statement, &[]));
        let answers = futures_util::future::try_join_all(ask).await.unwrap();
        let key = |row: &tokio_postgres::Row| Key {
            tenant: row.get::<_, &str>(0).parse().unwrap(),
            id: row.get::<_, &str>(1).parse().unwrap(),
        };
        Snapshot {
            jobs: answers[0].iter().map(|row| (key(row), job(row))).collect(),
            dead: answers[1].iter().map(|row| (row.get(0), row.get(1))).collect(),
            used: answers[2]
                .iter()
                .map(|row| (row.get(0), (row.get(1), row.get(2), row.get(3))))
                .collect(),
            lanes: answers[3][0].get(0),
        }
    }

    /// Looks at the tables after a statement.
    pub(super) async fn look(&mut self) -> Step {
        let now = self.read().await;
        let then = std::mem::replace(&mut self.tables, now.clone());
        let cleared = std::mem::take(&mut self.cleared);
        let refunded = std::mem::take(&mut self.refunded);
        for (key, row) in &now.jobs {
            if let Some(before) = then.jobs.get(key) {
                compare(key, before, row, &cleared)?;
            }
            let job = self.job(key);
            job.owed.extend(&row.owed);
            let finals = &mut job.finals;
            finals.extend(&row.final_owed);
            let ids = finals.len();
            holds(ids < 2, Rule::OneFinal, || {
                format!("{key} has {ids} final reports")
            })?;
            holds(row.slot.is_none() || row.state == 1, Rule::SlotsCounted, || {
                format!("{key} keeps a slot in state {}", row.state)
            })?;
        }
        for (epoch, was_dead) in &then.dead {
            let is_dead = now.dead.get(epoch).copied().unwrap_or(true);
            holds(!was_dead || is_dead, Rule::DeadStayDead, || {
                format!("{epoch} lives again")
            })?;
        }
        for key in self.jobs.keys() {
            self.owned(key)?;
        }
        self.slots(&then, &refunded)?;
        self.owners()?;
        let lanes = &self.tables.lanes;
        holds(lanes.is_none(), Rule::LanesRight, || {
            lanes.clone().unwrap_or_default()
        })
    }

    pub(super) fn owes(&self, key: &Key, sequence: i64) -> bool {
        let row = self.tables.jobs.get(key);
        row.is_some_and(|row| row.owed.contains(&sequence))
    }

    pub(super) fn nothing_is_owed(&self) -> bool {
        self.tables.jobs.values().all(|row| row.owed.is_empty())
    }

    /// Somebody has the body of every job that is not final.
    fn owned(&self, key: &Key) -> Step {
        let at_broker = self.jobs[key].ready > 0
            || self.workers.iter().any(|worker| {
                worker.tasks.iter().any(|task| task.delivery && task.key == *key)
                    || worker.asked.iter().any(|(asked, _)| asked == key)
                    || worker.to_absorb.contains(key)
            });
        let here = self
            .tables
            .jobs
            .get(key)
            .is_some_and(|row| row.state == 3 || (row.has_body && matches!(row.state, 1 | 2 | 4)));
        holds(at_broker || here, Rule::NothingLost, || {
            format!("nobody has {key}: {:?}", self.tables.jobs.get(key))
        })
    }

    /// Nobody else among the living has a task of the same job.
    fn owners(&self) -> Step {
        let mut owners: BTreeMap<&Key, usize> = BTreeMap::new();
        for worker in &self.workers {
            if self.tables.dead.get(&worker.epoch.number()) != Some(&false) {
                continue;
            }
            for task in worker.tasks.iter().filter(|task| task.unanswered.is_none()) {
                *owners.entry(&task.key).or_default() += 1;
            }
        }
        let twice = owners.into_iter().find(|(_, count)| *count > 1);
        holds(twice.is_none(), Rule::OneOwner, || {
            format!("leased to the living: {twice:?}")
        })
    }

    /// What counts under every limit is what it was, with the slots granted, without those given back.
    fn slots(&self, then: &Snapshot, refunded: &BTreeSet<Key>) -> Step {
        let mut change: BTreeMap<String, i32> = BTreeMap::new();
        let mut outstanding: BTreeMap<String, i32> = BTreeMap::new();
        let count = |into: &mut BTreeMap<String, i32>, key: &Key, row: &JobRow, cost: i32, sign: i32| {
            for limit in charged(&key.tenant, &row.account) {
                let recipients = self.tables.used.get(&limit).is_some_and(|used| used.2);
                *into.entry(limit).or_default() += sign * if recipients { cost } else { 1 };
            }
        };
        for (key, row) in &self.tables.jobs {
            let before = then.jobs.get(key);
            let had = before.and_then(|before| before.slot);
            if let Some((at, cost)) = row.slot
                && !self.used.contains(&(key.clone(), at))
            {
                count(&mut outstanding, key, row, cost, 1);
            }
            if row.slot == had {
                continue;
            }
            if let Some((_, cost)) = row.slot {
                count(&mut change, key, row, cost, 1);
            }
            if let (Some(before), Some((_, cost)), true) = (before, had, refunded.contains(key)) {
                count(&mut change, key, before, cost, -1);
            }
        }
        for (limit, (used, most, _)) in &self.tables.used {
            holds(used <= most, Rule::WithinLimits, || {
                format!("{limit}: {used} of {most}")
            })?;
            let (allowed, sent) = self.limits.get(limit).copied().unwrap_or_default();
            holds(sent <= allowed, Rule::WithinLimits, || {
                format!("{limit}: {sent} sent of {allowed}")
            })?;
            let may = sent + outstanding.get(limit).copied().unwrap_or_default();
            holds(may <= *used, Rule::SlotsCounted, || {
                format!("{limit}: {may} may be sent, {used} count")
            })?;
            if let Some((before, ..)) = then.used.get(limit) {
                let expected = before + change.get(limit).copied().unwrap_or_default();
                holds(*used == expected, Rule::SlotsCounted, || {
                    format!("{limit}: {used} count, should be {expected}")
                })?;
            }
        }
        Ok(())
    }
}

fn job(row: &tokio_postgres::Row) -> JobRow {
    let recipients: Value = row.get(7);
    let accepted = recipients
        .as_array()
        .into_iter()
        .flatten()
        .filter(|r| r["status"] == "accepted")
        .map(|r| r["address"].as_str().unwrap().to_owned())
        .collect();
    let sequences: Vec<i64> = row.get(13);
    let texts: Vec<String> = row.get(12);
    let is_final = |text: &String| {
        let report: Value = serde_json::from_str(text).unwrap();
        report["data"]["final"].as_bool().unwrap()
    };
    let final_owed = sequences.iter().zip(&texts).filter(|(_, text)| is_final(text));
    JobRow {
        state: row.get(2),
        lease: (row.get(3), row.get(4)),
        sequence: row.get(5),
        has_body: row.get(6),
        accepted,
        cancel: row.get(8),
        under_lease: (row.get(9), row.get(10)),
        recipients,
        outcome: row.get(11),
        final_owed: final_owed.map(|(sequence, _)| *sequence).collect(),
        owed: sequences.into_iter().collect(),
        slot: row
            .get::<_, Option<i64>>(14)
            .map(|at| (at, row.get::<_, Option<i32>>(15).unwrap_or_default())),
        account: row.get(16),
    }
}

fn compare(key: &Key, before: &JobRow, row: &JobRow, cleared: &BTreeSet<(Key, i64)>) -> Step {
    if before.state == 3 {
        let same = row.state == 3
            && (row.sequence, &row.outcome, &row.recipients)
                == (before.sequence, &before.outcome, &before.recipients);
        holds(same, Rule::FinalStays, || {
            format!("{key} was {before:?} and is {row:?}")
        })?;
    }
    holds(row.sequence >= before.sequence, Rule::ReportsOwed, || {
        format!("{key} counts its reports backwards")
    })?;
    let forgotten: Vec<_> = before.accepted.difference(&row.accepted).collect();
    holds(forgotten.is_empty(), Rule::AcceptedStays, || {
        format!("{key} was accepted for {forgotten:?}")
    })?;
    let unpaid: Vec<_> = before
        .owed
        .difference(&row.owed)
        .filter(|sequence| !cleared.contains(&(key.clone(), **sequence)))
        .collect();
    holds(unpaid.is_empty(), Rule::ReportsOwed, || {
        format!("{key} owes {unpaid:?} no more")
    })
}
