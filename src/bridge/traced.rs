//! POSTs as spans (docs/tracing.md has their attributes).

use std::sync::Arc;

use url::Url;

use super::queue::{Leased, Settled};
use crate::telemetry::traces::{Attributes, Kind, Recording, Summary, Traces};

/// Begins the span of one POST, below `parent`, the attempt that the report is about. A report without a trace begins none.
pub(super) fn begin(traces: Option<&Arc<Traces>>, parent: Option<&str>) -> Option<Recording> {
    traces?.begin_below(parent?)
}

/// Ends it. The host only: paths of webhooks often hold tokens. Nor what the receiver said, which may repeat what it was sent.
pub(super) fn end(recording: Recording, leased: &Leased, settled: &Settled, result: &str) {
    let mut attributes = Attributes::default()
        .text("http.request.method", "POST")
        .text("postroom.tenant", leased.tenant.as_str())
        .text("postroom.event", leased.event_id.as_str())
        .text("postroom.report", leased.kind.as_str())
        .text("postroom.endpoint", format!("{}/{}", leased.owner, leased.name))
        .text("postroom.outcome", result);
    if let Ok(url) = Url::parse(&leased.url)
        && let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default())
    {
        attributes = attributes.server(host, port);
    }
    if leased.attempts > 0 {
        attributes = attributes.number("http.request.resend_count", leased.attempts);
    }
    if let Some(status) = settled.status {
        attributes = attributes.number("http.response.status_code", status);
    }
    let error = settled.error.is_some().then(|| {
        let status = settled.status.map(|status| status.to_string());
        status.map_or("no_answer".into(), Into::into)
    });
    recording.end(Summary {
        name: "POST".to_owned(),
        kind: Kind::Client,
        attributes,
        error,
        failed_at: None,
    });
}
