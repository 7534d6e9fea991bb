//! Every metric of postroom, with its meaning, in one place. Base units; labels from fixed sets, never addresses.

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

/// Content type of [`Metrics::render`]; Prometheus 3 refuses a scrape without it.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Up to the time limit of a statement.
const STATEMENTS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];
/// Up to the longest time limits of an attempt: a server may take 10 minutes for its last reply.
const STAGES: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0, 600.0, 900.0,
];
const SLOW: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0,
];

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $field:ident: $type:ident $name:literal $([$($label:literal),+])? $(in $buckets:ident)?;)+) => {
        /// Handles to all metrics, registered once per process and passed to whoever counts.
        #[derive(Debug)]
        pub struct Metrics {
            registry: Registry,
            $($(#[doc = $doc])+ pub $field: $type,)+
        }

        impl Metrics {
            /// Registers everything.
            ///
            /// # Errors
            /// If a name is malformed or taken: a mistake in the table above.
            pub fn new() -> prometheus::Result<Self> {
                let registry = Registry::new_custom(None, None)?;
                $(let $field = make!($type, $name, concat!($($doc),+).trim(), [$($($label),+)?], $($buckets)?);
                registry.register(Box::new($field.clone()))?;)+
                #[cfg(target_os = "linux")]
                registry.register(Box::new(
                    prometheus::process_collector::ProcessCollector::for_self(),
                ))?;
                Ok(Self { registry, $($field,)+ })
            }
        }
    };
}

macro_rules! make {
    (IntCounter, $name:literal, $help:expr, [], ) => { IntCounter::new($name, $help)? };
    (IntGauge, $name:literal, $help:expr, [], ) => { IntGauge::new($name, $help)? };
    (IntCounterVec, $name:literal, $help:expr, [$($label:literal),+], ) => {
        IntCounterVec::new(Opts::new($name, $help), &[$($label),+])?
    };
    (IntGaugeVec, $name:literal, $help:expr, [$($label:literal),+], ) => {
        IntGaugeVec::new(Opts::new($name, $help), &[$($label),+])?
    };
    (Histogram, $name:literal, $help:expr, [], $buckets:ident) => {
        Histogram::with_opts(HistogramOpts::new($name, $help).buckets($buckets.to_vec()))?
    };
    (HistogramVec, $name:literal, $help:expr, [$($label:literal),+], $buckets:ident) => {
        HistogramVec::new(HistogramOpts::new($name, $help).buckets($buckets.to_vec()), &[$($label),+])?
    };
}

metrics! {
    /// Deliveries taken from job queues.
    deliveries: IntCounterVec "postroom_deliveries_total" ["level", "redelivered"];
    /// Jobs that ended or changed state, by outcome: sent, failed, rejected, expired, cancelled, uncertain, parked, duplicate,
    /// `given_back`, `too_new`.
    jobs: IntCounterVec "postroom_jobs_total" ["outcome"];
    /// Recipients by result: accepted, deferred, refused; with failure class.
    recipients: IntCounterVec "postroom_recipients_total" ["status", "class"];
    /// Attempts that did not end in acceptance, by class and fault.
    failures: IntCounterVec "postroom_attempt_failures_total" ["class", "fault", "stage"];
    /// From the job's AMQP timestamp, or its `send_at` if that is later, to the beginning of its first attempt; once per job.
    queue_age: HistogramVec "postroom_queue_age_seconds" ["level"] in SLOW;
    /// Time a job spends in one stage: decode, fetch, connection, slot, compose, send.
    stage: HistogramVec "postroom_stage_duration_seconds" ["stage"] in STAGES;
    /// Time of one SMTP phase: connect, tls, auth, envelope, data.
    smtp_phase: HistogramVec "postroom_smtp_phase_duration_seconds" ["phase"] in STAGES;
    /// SMTP connections attempted, by result: ok, failed, denied.
    smtp_connects: IntCounterVec "postroom_smtp_connects_total" ["result"];
    /// Open SMTP connections: idle, busy.
    smtp_connections: IntGaugeVec "postroom_smtp_connections" ["state"];
    /// Permits to send, by level: in use.
    permits_used: IntGaugeVec "postroom_permits_in_use" ["level"];
    /// Jobs between delivery and settlement.
    in_flight: IntGauge "postroom_in_flight_jobs";
    /// Bytes of jobs in hand, counted against `POSTROOM_MEMORY_BUDGET`.
    job_bytes: IntGauge "postroom_job_bytes";
    /// Deliveries given back to their queue because memory was full.
    beyond_budget: IntCounter "postroom_deliveries_beyond_budget_total";
    /// Waiting jobs of the whole installation by reason: rate, retry, schedule, busy, contract, key, unhealthy; counted up to
    /// 200 000 in all, every 15 s or more rarely while that takes long; every worker shows it.
    waiting: IntGaugeVec "postroom_waiting_jobs" ["reason"];
    /// Jobs of the whole installation that are held, since nobody knows whether they were sent and their tenant wants to be
    /// asked; counted with those that wait; every worker shows it.
    held: IntGauge "postroom_held_jobs";
    /// Accounts of the whole installation whose circuit breaker is not closed; every worker shows it.
    unhealthy_accounts: IntGauge "postroom_unhealthy_accounts";
    /// Transitions of circuit breakers that this process brought about: opened, recovered, `opened_again`, unproved.
    breaker_changes: IntCounterVec "postroom_breaker_changes_total" ["change"];
    /// Rate slots asked for, by answer: granted (also where nothing limits), denied, lost (with the lease).
    slots: IntCounterVec "postroom_rate_slots_total" ["answer"];
    /// Rows per coalesced SQL statement.
    batch_rows: HistogramVec "postroom_sql_batch_rows" ["statement"] in COUNTS;
    /// Duration of one coalesced SQL statement.
    batch_seconds: HistogramVec "postroom_sql_batch_duration_seconds" ["statement"] in STATEMENTS;
    /// Open connections to the database: idle, busy; looked at every 5 s.
    database_connections: IntGaugeVec "postroom_database_connections" ["state"];
    /// Statements that wait for a connection to the database; looked at every 5 s.
    database_waiting: IntGauge "postroom_database_waiting";
    /// SQL statements that failed and were repeated, by class: connection, pool (none was free), timeout, conflict, resources,
    /// server, schema, data, constraint, other.
    sql_errors: IntCounterVec "postroom_sql_errors_total" ["class"];
    /// Leases lost to another worker before the outcome was written.
    leases_lost: IntCounter "postroom_leases_lost_total";
    /// Sends whose job turned out to be already final: duplicates, as far as we know of them.
    duplicate_sends: IntCounter "postroom_duplicate_sends_total";
    /// Messages put on the dead-letter exchange, by reason.
    dead_lettered: IntCounterVec "postroom_dead_lettered_total" ["reason"];
    /// Publishes by result: confirmed, nacked, returned, timeout, error.
    publishes: IntCounterVec "postroom_publishes_total" ["result"];
    /// Reports of the whole installation not yet published, up to `POSTROOM_OUTBOX_LIMIT`; every worker shows it.
    outbox_jobs: IntGauge "postroom_outbox_jobs";
    /// Age of the oldest report of the whole installation not yet published; every worker shows it.
    outbox_age: IntGauge "postroom_outbox_oldest_seconds";
    /// Whether nothing new is sent because that many reports (`POSTROOM_OUTBOX_LIMIT`) are not yet published; every worker
    /// shows it.
    outbox_full: IntGauge "postroom_outbox_full";
    /// Attachments fetched, by result: ok, cached, failed.
    fetches: IntCounterVec "postroom_attachment_fetches_total" ["result"];
    /// Uploads to the object store, by result: stored, present, failed.
    uploads: IntCounterVec "postroom_uploads_total" ["result"];
    /// Bytes uploaded.
    upload_bytes: IntCounter "postroom_upload_bytes_total";
    /// Attachment bytes in memory.
    attachment_bytes: IntGauge "postroom_attachment_bytes";
    /// Webhook attempts by result: delivered, retried, failed, gone.
    webhook_attempts: IntCounterVec "postroom_webhook_attempts_total" ["result"];
    /// Endpoints disabled by the bridge, by reason: gone, failing.
    webhook_disabled: IntCounterVec "postroom_webhook_endpoints_disabled_total" ["reason"];
    /// Duration of one webhook POST.
    webhook_seconds: Histogram "postroom_webhook_duration_seconds" in SLOW;
    /// Events waiting for delivery to a webhook.
    webhook_pending: IntGauge "postroom_webhook_pending";
    /// Age of the oldest event waiting for delivery.
    webhook_oldest: IntGauge "postroom_webhook_oldest_pending_seconds";
    /// Spans by what became of them: exported, rejected (by the collector), failed (the collector could not be reached or did
    /// not take the request), dropped (no room).
    trace_spans: IntCounterVec "postroom_trace_spans_total" ["result"];
    /// Whether a dependency is connected: amqp, database.
    connected: IntGaugeVec "postroom_connected" ["dependency"];
    /// Sessions with the broker begun.
    broker_sessions: IntCounter "postroom_broker_sessions_total";
    /// What this process is, worker or bridge, and its version; always 1.
    build_info: IntGaugeVec "postroom_build_info" ["version", "process"];
}

const COUNTS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0];

impl Metrics {
    /// The page Prometheus scrapes, see [`CONTENT_TYPE`].
    ///
    /// # Errors
    /// If encoding fails.
    pub fn render(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_rendered_with_its_help() {
        let metrics = Metrics::new().unwrap();
        metrics.jobs.with_label_values(&["sent"]).inc();
        let page = metrics.render().unwrap();
        assert!(page.contains("postroom_jobs_total{outcome=\"sent\"} 1"), "{page}");
        assert!(page.contains("# HELP postroom_jobs_total Jobs that ended"));
        assert!(page.contains("postroom_in_flight_jobs 0"));
    }

    #[test]
    fn a_phase_that_takes_minutes_is_told_from_one_of_ten_seconds() {
        let metrics = Metrics::new().unwrap();
        let histograms = [
            metrics.stage.with_label_values(&["send"]),
            metrics.smtp_phase.with_label_values(&["data"]),
        ];
        for histogram in &histograms {
            for seconds in [11.0, 90.0, 200.0, 590.0] {
                histogram.observe(seconds);
            }
        }
        metrics.batch_seconds.with_label_values(&["admit"]).observe(20.0);
        let page = metrics.render().unwrap();
        let counted = |series: &str| {
            let line = page.lines().find(|line| line.starts_with(series)).unwrap();
            line.rsplit_once(' ').unwrap().1.to_owned()
        };
        for name in [
            r#"postroom_stage_duration_seconds_bucket{stage="send""#,
            r#"postroom_smtp_phase_duration_seconds_bucket{phase="data""#,
        ] {
            for (bound, count) in [(10, "0"), (30, "1"), (120, "2"), (300, "3"), (600, "4")] {
                assert_eq!(
                    counted(&format!("{name},le=\"{bound}\"}}")),
                    count,
                    "{name} {bound}"
                );
            }
        }
        let statement = r#"postroom_sql_batch_duration_seconds_bucket{statement="admit",le="30"}"#;
        assert_eq!(counted(statement), "1");
    }
}
