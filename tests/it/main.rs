//! Scenarios against real servers: one binary, one module per scenario. See `support` for how they are written.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a scenario that cannot go on has failed"
)]

mod asyncapi;
mod attachments;
mod bad_input;
mod bounds;
mod breaker;
mod broker_commands;
mod broker_restart;
mod broker_session;
mod broker_tls;
mod broker_topology;
mod broker_versions;
mod chaos;
mod connection_caps;
mod costs;
mod crash;
mod database_trouble;
mod duplicates;
mod fairness;
mod frame;
mod isolation;
mod job_commands;
#[cfg(feature = "fail-points")]
mod kill_points;
mod levels;
mod limits;
mod lost_connections;
mod outages;
mod poison;
mod producers;
mod publishing;
mod quiet;
mod receivers;
mod retries;
mod schedule;
mod secret_files;
mod secrets;
mod sends;
mod smtp_trouble;
mod support;
mod traces;
mod watching;
mod webhooks;
mod who_sends;
