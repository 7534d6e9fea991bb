//! How the worker's section is read.

use std::time::Duration;

use super::{DAY, MINUTE, SECOND, retention};
use crate::config::load::{FromSettings, Reader};
use crate::config::{Fetch, JobLimits, LEAST_CONCURRENCY, Process, UnknownTenant, Worker, parse};
use crate::memory::least_budget;
use crate::retry::{Breaker, RetryPolicy};

impl FromSettings for Worker {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let concurrency = r.get("POSTROOM_CONCURRENCY", |text| {
            parse::number(text, LEAST_CONCURRENCY as u64..=10_000)
        });
        let job_memory = job_memory(r);
        let outbox_limit = r.count("POSTROOM_OUTBOX_LIMIT", 100_000_000);
        let lease = r.duration("POSTROOM_LEASE", SECOND, 10 * MINUTE);
        let process = Process::read(r);
        let retention = retention(r);
        let unknown_tenant = r.get("POSTROOM_UNKNOWN_TENANT", |text| {
            parse::one_of(
                text,
                &[
                    ("reject", UnknownTenant::Reject),
                    ("platform", UnknownTenant::Platform),
                ],
            )
        });
        let deferred_report_after = r.duration("POSTROOM_DEFERRED_REPORT_AFTER", Duration::ZERO, 30 * DAY);
        let retry = retry_policy(r);
        let breaker = breaker(r);
        Some(Self {
            concurrency: concurrency? as usize,
            job_memory: job_memory?,
            outbox_limit: outbox_limit?,
            lease: lease?,
            grace_period: process?.grace_period,
            retention: retention?,
            unknown_tenant: unknown_tenant?,
            deferred_report_after: deferred_report_after?,
            retry: retry?,
            breaker: breaker?,
        })
    }
}

fn retry_policy(r: &mut Reader<'_>) -> Option<RetryPolicy> {
    let base = r.duration("POSTROOM_RETRY_BASE", Duration::from_millis(10), DAY);
    let cap = r.duration("POSTROOM_RETRY_CAP", Duration::from_millis(10), 7 * DAY);
    let (base, cap) = (base?, cap?);
    if cap < base {
        r.note(
            "POSTROOM_RETRY_CAP",
            "is below POSTROOM_RETRY_BASE",
            "give at least as much: the first wait is the shortest",
        );
    }
    Some(RetryPolicy {
        base,
        cap,
        ..RetryPolicy::default()
    })
}

fn breaker(r: &mut Reader<'_>) -> Option<Breaker> {
    let faults = r.count("POSTROOM_BREAKER_FAULTS", 10_000);
    let cooldown = r.duration("POSTROOM_BREAKER_COOLDOWN", Duration::from_millis(100), DAY);
    let cap = r.duration("POSTROOM_BREAKER_COOLDOWN_CAP", Duration::from_millis(100), DAY);
    let (faults, cooldown, cap) = (faults?, cooldown?, cap?);
    if cap < cooldown {
        r.note(
            "POSTROOM_BREAKER_COOLDOWN_CAP",
            "is below POSTROOM_BREAKER_COOLDOWN",
            "give at least as much: the first cooldown is the shortest",
        );
    }
    Some(Breaker {
        faults: u32::try_from(faults).unwrap_or(u32::MAX),
        cooldown,
        cap,
    })
}

/// What the budget leaves for jobs. The largest job must fit, also while it may use only a share.
fn job_memory(r: &mut Reader<'_>) -> Option<u64> {
    let budget = r.size("POSTROOM_MEMORY_BUDGET", 1 << 20, 1 << 40);
    let attachments = Fetch::read(r);
    let limits = JobLimits::read(r);
    let (budget, attachments, limits) = (budget?, attachments?, limits?);
    let beside = attachments.memory + attachments.cache();
    let least = least_budget(limits.max_inflated as u64);
    if budget < beside + least {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        r.note(
            "POSTROOM_MEMORY_BUDGET",
            "has no room for the largest job",
            &format!(
                "give at least {}MiB: {}MiB for attachments and their cache (POSTROOM_ATTACHMENT_MEMORY and a quarter), \
                 {}MiB for one job of POSTROOM_JOB_MAX_INFLATED_BYTES; or lower those",
                mib(beside) + mib(least),
                mib(beside),
                mib(least)
            ),
        );
        return None;
    }
    Some(budget - beside)
}
