//! `postroom worker`.

use super::{CliError, Service, load};
use crate::config::{self, Sources};
use crate::worker;

type Sections = (
    (
        config::Telemetry,
        Option<config::Traces>,
        config::Process,
        config::Broker,
        config::Database,
        config::Keys,
    ),
    (
        config::Smtp,
        Option<config::Storage>,
        config::Fetch,
        config::JobLimits,
        config::Worker,
        config::Egress,
    ),
);

/// Runs a worker until it is told to end.
pub(super) async fn run(sources: &Sources) -> Result<(), CliError> {
    let (
        (telemetry, traces, process, broker, database, keys),
        (smtp, storage, fetch, limits, worker, egress),
    ): Sections = load(sources)?;
    let service = Service::start("worker", &telemetry, traces.as_ref(), process, sources).await?;
    let settings = worker::Settings {
        broker,
        database,
        keys,
        smtp,
        storage,
        fetch,
        limits,
        worker,
        egress,
    };
    Ok(worker::run(settings, service).await?)
}
