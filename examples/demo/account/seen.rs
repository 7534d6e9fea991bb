//! Everything that can be seen from outside, gathered once.

use std::collections::{BTreeMap, HashMap, HashSet};

use mail_parser::MessageParser;
use postroom_testkit::smtp::Received;
use serde_json::Value;

use crate::hook::{Hook, hooks};
use crate::process::{Process, metrics};
use crate::setup::World;

/// A mail at one of the SMTP servers.
pub(super) struct SeenMail {
    /// Of `X-Postroom-ID`.
    pub(super) id: String,
    pub(super) received: Received,
}

/// All sides but the published one.
pub(super) struct Seen {
    /// Mails by job id.
    pub(super) mails: HashMap<String, Vec<SeenMail>>,
    /// Webhooks as they came, repeats among them.
    pub(super) hooks: Vec<Hook>,
    /// The first webhook of every event, as positions in `hooks`.
    pub(super) events: Vec<usize>,
    /// Final events by tenant and job, as positions in `hooks`; `None` for those that name no job.
    pub(super) finals: HashMap<Option<(String, String)>, Vec<usize>>,
    /// What `postroom job list` says, by tenant and job.
    pub(super) ledger: HashMap<(String, String), Value>,
    /// Dead letters by reason.
    pub(super) dead: BTreeMap<String, usize>,
    /// Repeats recognised, by the workers' own count.
    pub(super) repeats: u64,
    /// CPU seconds and resident bytes of the workers together.
    pub(super) cpu: f64,
    pub(super) memory: f64,
}

impl Seen {
    pub(super) async fn gather(world: &World) -> Result<Self, String> {
        let hooks = hooks(world);
        let mut finals: HashMap<_, Vec<usize>> = HashMap::new();
        let (mut ids, mut events) = (HashSet::new(), Vec::new());
        for (index, hook) in hooks.iter().enumerate() {
            if !ids.insert(hook.request.event_id().to_owned()) {
                continue;
            }
            events.push(index);
            if !hook.is_final() {
                continue;
            }
            let (tenant, job) = (hook.text("tenant").to_owned(), hook.text("job").to_owned());
            let key = (!job.is_empty()).then_some((tenant, job));
            finals.entry(key).or_default().push(index);
        }
        let tenants = world.postroom.run(&["tenant", "list", "--json"], "").await?;
        let tenants: Vec<Value> = serde_json::from_str(&tenants).map_err(|error| error.to_string())?;
        let mut listed = String::new();
        for tenant in &tenants {
            let tenant = tenant["tenant"].as_str().unwrap_or_default();
            let list = ["job", "list", "--tenant", tenant, "--limit", "5000", "--json"];
            listed += &world.postroom.run(&list, "").await?;
        }
        let ledger = lines(&listed)?.into_iter().map(|job| {
            let text = |name: &str| job[name].as_str().unwrap_or_default().to_owned();
            ((text("tenant"), text("job")), job)
        });
        let mut dead = BTreeMap::new();
        for letter in lines(&world.postroom.run(&["dead", "list", "--json"], "").await?)? {
            let reason = letter["reason"].as_str().unwrap_or_default().to_owned();
            *dead.entry(reason).or_default() += 1;
        }
        let pages = metrics(&world.workers, &world.http).await;
        let sum = |series: &str| pages.iter().map(|page| page.sum(series)).sum::<f64>();
        let mut seen = Self {
            mails: HashMap::new(),
            events,
            finals,
            ledger: ledger.collect(),
            dead,
            repeats: sum("postroom_jobs_total{outcome=\"duplicate\"}") as u64,
            cpu: world.workers.iter().filter_map(Process::cpu).sum(),
            memory: sum("process_resident_memory_bytes"),
            hooks,
        };
        for received in [world.smtp.received(), world.own.received()].concat() {
            let id = job_id(&received);
            seen.mails
                .entry(id.clone())
                .or_default()
                .push(SeenMail { id, received });
        }
        Ok(seen)
    }

    /// Final reports of a job, each event once.
    pub(super) fn finals_of(&self, tenant: &str, id: &str) -> Vec<&Hook> {
        let found = self.finals.get(&Some((tenant.to_owned(), id.to_owned())));
        found
            .into_iter()
            .flatten()
            .map(|index| &self.hooks[*index])
            .collect()
    }

    /// Mails sent by a user of the SMTP server, in order.
    pub(super) fn mails_of_login(&self, login: &str) -> Vec<&SeenMail> {
        let all = self.mails.values().flatten();
        let mut mails: Vec<_> = all
            .filter(|mail| mail.received.user.as_deref() == Some(login))
            .collect();
        mails.sort_by_key(|mail| mail.received.at);
        mails
    }
}

fn job_id(received: &Received) -> String {
    let parsed = MessageParser::default().parse_headers(&received.data);
    let id = parsed.as_ref().and_then(|mail| mail.header_raw("X-Postroom-ID"));
    id.unwrap_or_default().trim().to_owned()
}

fn lines(text: &str) -> Result<Vec<Value>, String> {
    text.lines()
        .map(|line| serde_json::from_str(line).map_err(|error| format!("output of postroom: {error}")))
        .collect()
}
