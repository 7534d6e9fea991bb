//! Circuit breakers: every account that became unhealthy was told about once, and recovered, or is still open.

use std::collections::{BTreeMap, HashSet};

use super::{Audit, Evidence};

impl Audit {
    /// Openings and recoveries alternate: of each account there are as many of both, or one opening more.
    pub(super) fn accounts(&mut self, evidence: &Evidence) {
        let mut seen = HashSet::new();
        let mut balance: BTreeMap<String, i64> = BTreeMap::new();
        for hook in evidence.accounts.iter().filter(|hook| seen.insert(&hook.event)) {
            let data = &hook.report["data"];
            let account = format!("{}/{}", data["tenant"], data["account"]);
            let opened = hook.kind() == "account.unhealthy";
            self.breakers += usize::from(opened);
            *balance.entry(account).or_default() += if opened { 1 } else { -1 };
        }
        for (account, open) in balance.into_iter().filter(|(_, open)| !(0..=1).contains(open)) {
            self.violations.push(format!(
                "{account}: {open} more webhooks say that it is unhealthy than that it has recovered"
            ));
        }
    }
}
