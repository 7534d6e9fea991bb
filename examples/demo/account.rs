//! Adding up: what was published, what the SMTP servers took, what the webhooks said, what the ledger and the dead-letter
//! queue hold. Every difference is named.

mod checks;
mod figures;
mod links;
mod mail;
mod message;
mod seen;

use std::collections::BTreeMap;

use crate::plan::{Kind, Outcome, Plan, SHARES, Share};
use crate::run::Times;
use crate::setup::World;

use seen::Seen;

/// One line of the table.
pub(crate) struct Row {
    pub(crate) kind: Kind,
    pub(crate) published: usize,
    /// What must become of them.
    pub(crate) outcome: Outcome,
    /// SMTP transactions.
    pub(crate) mails: usize,
    /// Final reports.
    pub(crate) finals: usize,
    pub(crate) good: bool,
}

/// The result.
#[derive(Default)]
pub(crate) struct Audit {
    pub(crate) rows: Vec<Row>,
    /// What was reported, and repeats recognised.
    pub(crate) outcomes: BTreeMap<Outcome, usize>,
    /// Mails at the SMTP servers.
    pub(crate) mails: usize,
    /// Final reports.
    pub(crate) finals: usize,
    pub(crate) checks: Vec<(bool, String)>,
    /// What is wrong with all together.
    pub(crate) problems: Vec<String>,
    /// What is wrong with single jobs, each beginning with its name.
    pub(crate) differences: Vec<String>,
    pub(crate) figures: Vec<(&'static str, String)>,
}

impl Audit {
    /// Looks at everything and compares.
    pub(crate) async fn of(world: &World, plan: &Plan, times: &Times) -> Result<Self, String> {
        let seen = Seen::gather(world).await?;
        let mut audit = Self {
            mails: seen.mails.values().map(Vec::len).sum(),
            finals: seen.finals.values().map(Vec::len).sum(),
            ..Self::default()
        };
        audit.rows(plan, &seen);
        audit.sum(plan, &seen);
        let (text, strays) = checks::all_agree(plan, &seen);
        audit.differences.extend(strays);
        audit.checks.push((audit.differences.is_empty(), text));
        audit.check(checks::one_final_report_each(plan, &seen));
        audit.check(checks::signatures(world, &seen));
        audit.check(checks::dead_letters(plan, &seen));
        audit.check(checks::rate_limits(&seen));
        audit.check(checks::connections(world));
        audit.check(checks::urgent_mail(plan, &seen, times));
        audit.check(checks::repeats(plan, &seen));
        audit.check(checks::links(world, plan, &seen).await);
        audit.figures = figures::figures(world, plan, &seen, times);
        Ok(audit)
    }

    /// Notes a check with the differences it found.
    pub(crate) fn check(&mut self, (text, problems): (String, Vec<String>)) {
        self.checks.push((problems.is_empty(), text));
        self.problems.extend(problems);
    }

    /// Whether everything adds up.
    pub(crate) fn is_good(&self) -> bool {
        self.problems.is_empty() && self.differences.is_empty()
    }

    /// The sum over all messages, as their receivers see it.
    fn sum(&mut self, plan: &Plan, seen: &Seen) {
        let reported = seen
            .events
            .iter()
            .filter_map(|index| seen.hooks[*index].outcome());
        let repeated = std::iter::repeat_n(Outcome::Duplicate, seen.repeats as usize);
        for outcome in reported.chain(repeated) {
            *self.outcomes.entry(outcome).or_default() += 1;
        }
        for outcome in Outcome::ALL {
            let have = self.outcomes.get(&outcome).copied().unwrap_or(0);
            let want = plan.count(|message| message.outcome() == outcome);
            if have != want {
                self.problems
                    .push(format!("{have} {} in all, expected {want}", outcome.name()));
            }
        }
    }

    /// Every message by itself, added up by kind.
    fn rows(&mut self, plan: &Plan, seen: &Seen) {
        for share in SHARES {
            let (mut row, found) = row(share, plan, seen);
            self.differences.extend(found);
            if share.kind == Kind::Malformed {
                // Some have no id: their reports are counted together.
                let nameless = plan.count(|message| message.id.is_none());
                let told = seen.finals.get(&None).map_or(0, Vec::len);
                row.finals += told;
                row.good &= told == nameless;
                if told != nameless {
                    let text = format!("{told} final reports for bodies without an id, expected {nameless}");
                    self.differences.push(text);
                }
            }
            self.rows.push(row);
        }
    }
}

fn row(share: &Share, plan: &Plan, seen: &Seen) -> (Row, Vec<String>) {
    let mut differences = Vec::new();
    let mut row = Row {
        kind: share.kind,
        published: 0,
        outcome: Outcome::Sent,
        mails: 0,
        finals: 0,
        good: true,
    };
    for message in plan.messages.iter().filter(|message| message.kind == share.kind) {
        row.published += 1;
        row.outcome = message.outcome();
        if message.has_final() {
            row.mails += message::mails(message, seen).len();
            row.finals += message::finals(message, seen);
        }
        differences.extend(message::differences(message, seen));
    }
    row.good = differences.is_empty();
    (row, differences)
}
