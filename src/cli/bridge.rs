//! `postroom bridge`.

use super::{CliError, Service, load};
use crate::bridge;
use crate::config::{self, Sources};

type Sections = (
    (config::Telemetry, Option<config::Traces>, config::Process),
    (
        config::Broker,
        config::Database,
        config::Keys,
        config::Webhook,
        config::Egress,
    ),
);

/// Runs a bridge until it is told to end.
pub(super) async fn run(sources: &Sources) -> Result<(), CliError> {
    let ((telemetry, traces, process), (broker, database, keys, webhook, egress)): Sections = load(sources)?;
    let service = Service::start("bridge", &telemetry, traces.as_ref(), process, sources).await?;
    let settings = bridge::Settings {
        broker,
        database,
        keys,
        webhook,
        egress,
    };
    Ok(bridge::run(settings, service).await?)
}
