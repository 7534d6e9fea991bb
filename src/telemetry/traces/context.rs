//! The trace context (W3C Trace Context, level 1), and which traces are sampled.

use std::fmt;

use crate::config;

/// Sixteen bytes, not all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceId(u128);

/// Eight bytes, not all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanId(u64);

impl TraceId {
    /// The id of a trace that begins here, from bytes as good as random ones.
    #[must_use]
    pub fn from_random(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes).max(1))
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        self.0.to_be_bytes().to_vec()
    }
}

impl SpanId {
    pub(super) fn new() -> Self {
        Self(rand::random::<u64>().max(1))
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        self.0.to_be_bytes().to_vec()
    }
}

/// What a `traceparent` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: TraceId,
    /// The span that is the parent of what follows.
    pub span: SpanId,
    /// Whoever made it records it.
    pub sampled: bool,
}

impl Context {
    /// Reads a `traceparent`, of a later version too (§3.2.4: what is known of it counts).
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let more = parts.next().is_some();
        let version = hex(version, 2).filter(|version| *version != 0xff)?;
        if version == 0 && more {
            return None;
        }
        let trace = hex(trace, 32).filter(|id| *id != 0)?;
        let span = hex(span, 16).filter(|id| *id != 0)?;
        let flags = hex(flags, 2)?;
        Some(Self {
            trace: TraceId(trace),
            span: SpanId(span as u64),
            sampled: flags & 1 == 1,
        })
    }
}

fn hex(text: &str, length: usize) -> Option<u128> {
    let is_lower = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (text.len() == length && is_lower).then(|| u128::from_str_radix(text, 16).ok())?
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trace, span, sampled } = self;
        write!(
            f,
            "00-{:032x}-{:016x}-{:02x}",
            trace.0,
            span.0,
            u8::from(*sampled)
        )
    }
}

/// Whether spans of a trace are made. The share is one of trace ids, so that all who sample the same share sample the same
/// traces.
pub(super) fn is_sampled(sampler: config::Sampler, parent: Option<Context>, trace: TraceId) -> bool {
    match parent {
        Some(parent) if sampler.parent_based => parent.sampled,
        _ => {
            let low = (trace.0 as u64) >> 1;
            let bound = sampler.ratio * (1_u64 << 63) as f64;
            (low as f64) < bound
        }
    }
}
