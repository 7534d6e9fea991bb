//! Spans, exported over OTLP. A piece of work is followed while it runs ([`follow`]): stages note how long they took
//! ([`stage`]), and when it has ended its span and theirs are put together and handed to the exporter, which works in the
//! background. Nothing here waits: what the exporter has no room for is dropped and counted.
//!
//! Without a collector there is no [`Traces`], and noting something costs a look at a variable of the thread.

mod attributes;
mod context;
mod export;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::future::Either;
use opentelemetry_proto::tonic::trace::v1 as proto;
use tokio::task::futures::TaskLocalFuture;

use crate::config;

pub use attributes::Attributes;
pub use context::{Context, SpanId, TraceId};
use export::Queue;
pub use export::{Exporter, SetupError};

/// Stages noted of one piece of work; a mail in very many transactions has more, which are left out.
const MAX_STAGES: usize = 24;

/// Span status code of an error.
const ERROR: i32 = proto::status::StatusCode::Error as i32;

/// Makes spans.
#[derive(Debug)]
pub struct Traces {
    sampler: config::Sampler,
    queue: Queue,
}

/// What a span is to others (`SpanKind` of OpenTelemetry).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Work of our own.
    Internal,
    /// A request to a server.
    Client,
    /// Publishing a message.
    Producer,
    /// Working on a message.
    Consumer,
}

impl Kind {
    fn code(self) -> i32 {
        let kind = match self {
            Self::Internal => proto::span::SpanKind::Internal,
            Self::Client => proto::span::SpanKind::Client,
            Self::Producer => proto::span::SpanKind::Producer,
            Self::Consumer => proto::span::SpanKind::Consumer,
        };
        kind as i32
    }
}

/// What there is to tell about a piece of work when it is over.
#[derive(Debug)]
pub struct Summary {
    /// Name of the span: few different ones.
    pub name: String,
    /// What it is to others.
    pub kind: Kind,
    /// What is known of it. No addresses, no content, no secrets.
    pub attributes: Attributes,
    /// A word out of few, if it failed.
    pub error: Option<Cow<'static, str>>,
    /// The stage at which it failed.
    pub failed_at: Option<&'static str>,
}

/// A span that has begun.
#[derive(Debug)]
pub struct Recording {
    traces: Arc<Traces>,
    context: Context,
    parent: Option<SpanId>,
    began: Instant,
    /// The same on the wall clock, in nanoseconds since 1970.
    began_unix: u64,
    noted: RefCell<Noted>,
}

#[derive(Debug, Default)]
struct Noted {
    stages: Vec<Stage>,
    server: Option<(String, u16)>,
    summary: Option<Summary>,
}

#[derive(Debug)]
struct Stage {
    name: &'static str,
    from: Instant,
    to: Instant,
    server: Option<(String, u16)>,
}

tokio::task_local! {
    static CURRENT: Recording;
}

impl Traces {
    /// Spans go to `exporter`'s queue.
    #[must_use]
    pub fn new(sampler: config::Sampler, exporter: &Exporter) -> Arc<Self> {
        Arc::new(Self {
            sampler,
            queue: exporter.queue(),
        })
    }

    /// Begins a span below `parent`, a `traceparent`, or of a trace of its own under the id that `root` gives. `None`: it is
    /// not sampled.
    pub fn begin(
        self: &Arc<Self>,
        parent: Option<&str>,
        root: impl FnOnce() -> TraceId,
    ) -> Option<Recording> {
        let parent = parent.and_then(Context::parse);
        let trace = parent.map_or_else(root, |parent| parent.trace);
        self.sample(parent, trace)
    }

    /// Begins a span below `parent`, a `traceparent`. `None`: it is none, or not sampled.
    #[must_use]
    pub fn begin_below(self: &Arc<Self>, parent: &str) -> Option<Recording> {
        let parent = Context::parse(parent)?;
        self.sample(Some(parent), parent.trace)
    }

    fn sample(self: &Arc<Self>, parent: Option<Context>, trace: TraceId) -> Option<Recording> {
        let sampled = context::is_sampled(self.sampler, parent, trace);
        sampled.then(|| Recording {
            traces: Arc::clone(self),
            context: Context {
                trace,
                span: SpanId::new(),
                sampled: true,
            },
            parent: parent.map(|parent| parent.span),
            began: Instant::now(),
            began_unix: unix_nanos(),
            noted: RefCell::default(),
        })
    }
}

/// Runs `work`; what it notes belongs to the recording, which ends with it.
pub fn follow<F: Future>(recording: Option<Recording>, work: F) -> Either<F, TaskLocalFuture<Recording, F>> {
    match recording {
        None => Either::Left(work),
        Some(recording) => Either::Right(CURRENT.scope(recording, work)),
    }
}

/// Notes a stage of the work being followed, which has just ended.
pub fn stage(name: &'static str, since: Instant) {
    let _ = CURRENT.try_with(|recording| recording.note(name, since));
}

/// Notes which server the stages from now on talk to, as far as they talk to one.
pub fn server(host: &str, port: u16) {
    let _ = CURRENT.try_with(|recording| recording.noted.borrow_mut().server = Some((host.to_owned(), port)));
}

/// The `traceparent` for what follows from the work being followed; none if it has no span.
#[must_use]
pub fn traceparent() -> Option<String> {
    CURRENT.try_with(Recording::traceparent).ok()
}

/// Says what the work being followed was. Without a summary there is no span.
pub fn summarise(summary: impl FnOnce() -> Summary) {
    let _ = CURRENT.try_with(|recording| recording.noted.borrow_mut().summary = Some(summary()));
}

impl Recording {
    /// The `traceparent` for what follows from it.
    #[must_use]
    pub fn traceparent(&self) -> String {
        self.context.to_string()
    }

    /// Ends it.
    pub fn end(self, summary: Summary) {
        self.noted.borrow_mut().summary = Some(summary);
    }

    fn note(&self, name: &'static str, from: Instant) {
        let noted = &mut *self.noted.borrow_mut();
        if noted.stages.len() < MAX_STAGES {
            let server = noted.server.clone().filter(|_| talks_to_server(name));
            let to = Instant::now();
            noted.stages.push(Stage {
                name,
                from,
                to,
                server,
            });
        }
    }

    fn unix(&self, at: Instant) -> u64 {
        self.began_unix + at.saturating_duration_since(self.began).as_nanos() as u64
    }

    fn span(&self, id: SpanId, parent: Option<SpanId>, name: String, during: (u64, u64)) -> proto::Span {
        proto::Span {
            trace_id: self.context.trace.bytes(),
            span_id: id.bytes(),
            parent_span_id: parent.map(SpanId::bytes).unwrap_or_default(),
            // The lowest byte is that of `traceparent`: sampled.
            flags: 1,
            name,
            start_time_unix_nano: during.0,
            end_time_unix_nano: during.1,
            ..proto::Span::default()
        }
    }

    fn spans(&self, noted: Noted, summary: Summary) -> Vec<proto::Span> {
        let failed = noted
            .stages
            .iter()
            .rposition(|stage| Some(stage.name) == summary.failed_at);
        let mut spans = Vec::with_capacity(1 + noted.stages.len());
        for (place, stage) in noted.stages.into_iter().enumerate() {
            let during = (self.unix(stage.from), self.unix(stage.to));
            let mut span = self.span(
                SpanId::new(),
                Some(self.context.span),
                stage.name.to_owned(),
                during,
            );
            span.kind = Kind::Internal.code();
            if let Some((host, port)) = stage.server {
                span.kind = Kind::Client.code();
                span.attributes = Attributes::default().server(host, port).into_proto();
            }
            span.status = summary
                .error
                .as_deref()
                .filter(|_| failed == Some(place))
                .map(status);
            spans.push(span);
        }
        let during = (self.began_unix, self.unix(Instant::now()));
        let mut span = self.span(self.context.span, self.parent, summary.name, during);
        span.kind = summary.kind.code();
        span.status = summary.error.as_deref().map(status);
        span.attributes = summary
            .attributes
            .text_if("error.type", summary.error)
            .into_proto();
        spans.push(span);
        spans
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let mut noted = self.noted.take();
        if let Some(summary) = noted.summary.take() {
            let spans = self.spans(noted, summary);
            self.traces.queue.push(spans);
        }
    }
}

fn status(error: &str) -> proto::Status {
    proto::Status {
        code: ERROR,
        message: error.to_owned(),
    }
}

/// Stages of the SMTP conversation.
fn talks_to_server(stage: &str) -> bool {
    matches!(stage, "connection" | "send")
}

fn unix_nanos() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_nanos() as u64
}
