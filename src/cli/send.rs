//! `postroom send`: publishes one job, as a producer would.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use jiff::Timestamp;
use serde_json::Value;
use tokio::io::AsyncReadExt as _;

use crate::broker::{self, BrokerError, Properties, PublishError, Publisher, Topology};
use crate::config;
use crate::id::{JobId, TenantId};
use crate::level::Level;
use crate::telemetry::metrics::Metrics;

/// RabbitMQ 4 takes 16 MiB at most; the worker's hard limit is 15.
const MAX_BYTES: u64 = 15 << 20;

/// `postroom send …`
#[derive(Debug, Clone, Args)]
pub struct SendArgs {
    /// Priority level: immediate, high, medium or low
    #[arg(long, value_name = "LEVEL")]
    pub level: Level,
    /// A file with one job in JSON, or `-` for standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Why the job was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Its path, `-` for standard input.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is too large for the broker.
    #[error("the job has more than {} MiB", MAX_BYTES >> 20)]
    TooLarge,
    /// It is not JSON.
    #[error("the job is not JSON: {0}")]
    NotJson(serde_json::Error),
    /// It does not name a job and a tenant. The worker checks the rest.
    #[error("the job's `{field}` must be {rule}")]
    Field {
        /// `id` or `tenant`.
        field: &'static str,
        /// What is allowed.
        rule: &'static str,
    },
    /// The broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// It is not known to be stored.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Metrics could not be set up.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// Standard output.
    #[error("cannot write the output: {0}")]
    Output(io::Error),
}

/// Runs the command: prints the job's id when the broker has stored it.
///
/// # Errors
/// See [`SendError`].
pub async fn run(
    args: &SendArgs,
    config: &config::Broker,
    out: &mut (dyn Write + Send),
) -> Result<(), SendError> {
    let body = read(&args.file).await?;
    let (id, tenant) = envelope(&body)?;
    let topology = Topology::new(&config.prefix, &config.extra_queues);
    let connection = broker::connect(config, "send").await?;
    let publisher = Publisher::on(&connection, Arc::new(Metrics::new()?)).await?;
    let properties = Properties::default()
        .with_content_type("application/json".into())
        .with_type("mail.job.v1".into())
        .with_message_id(id.as_str().into())
        .with_timestamp(Timestamp::now().as_second().max(0) as u64)
        .with_app_id("postroom".into());
    let key = format!("{}.{tenant}", args.level);
    let stored = publisher
        .publish(&topology.jobs_exchange(), &key, properties, &body)
        .await;
    broker::close(&connection).await;
    stored?;
    writeln!(out, "{id}").map_err(SendError::Output)
}

async fn read(path: &Path) -> Result<Vec<u8>, SendError> {
    let failed = |source| SendError::Read {
        path: path.to_owned(),
        source,
    };
    let mut body = Vec::new();
    let read = if path.as_os_str() == "-" {
        tokio::io::stdin()
            .take(MAX_BYTES + 1)
            .read_to_end(&mut body)
            .await
    } else {
        let file = tokio::fs::File::open(path).await.map_err(failed)?;
        file.take(MAX_BYTES + 1).read_to_end(&mut body).await
    };
    read.map_err(failed)?;
    if body.len() as u64 > MAX_BYTES {
        return Err(SendError::TooLarge);
    }
    Ok(body)
}

/// The job's id and tenant, which the message is addressed with.
fn envelope(body: &[u8]) -> Result<(JobId, TenantId), SendError> {
    let job: Value = serde_json::from_slice(body).map_err(SendError::NotJson)?;
    let text = |field: &str| job.get(field).and_then(Value::as_str).unwrap_or_default();
    let id = text("id").parse().map_err(|_| SendError::Field {
        field: "id",
        rule: JobId::RULE,
    })?;
    let tenant = text("tenant").parse().map_err(|_| SendError::Field {
        field: "tenant",
        rule: TenantId::RULE,
    })?;
    Ok((id, tenant))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_names_itself_and_its_tenant() {
        let (id, tenant) = envelope(br#"{"id": "1", "tenant": "acme"}"#).unwrap();
        assert_eq!((id.as_str(), tenant.as_str()), ("1", "acme"));
        for (bad, says) in [
            ("{", "not JSON"),
            (r#"{"id": "1"}"#, "`tenant` must be"),
            (r#"{"tenant": "acme"}"#, "`id` must be"),
            (r#"{"id": "1", "tenant": "a.b"}"#, "`tenant` must be"),
        ] {
            let error = envelope(bad.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
