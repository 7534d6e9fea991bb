//! The contract, seen from outside: what is taken, what is refused and how.

use serde_json::{Value, json};

use super::MailJob;
use super::decode::{Incoming, Rejection, decode};
use crate::config::JobLimits;

mod accepted;
mod overrides;
mod properties;
mod refused;
mod schema;
mod wire;

/// The smallest valid job.
fn minimal() -> Value {
    json!({"id": "1", "tenant": "acme", "to": "ann@example.org", "text": "hi"})
}

/// The smallest valid job with more members, or others.
fn with(changes: Value) -> Value {
    let mut job = minimal();
    let Value::Object(changes) = changes else {
        panic!("not an object")
    };
    for (name, value) in changes {
        job[name] = value;
    }
    job
}

fn read(body: impl AsRef<[u8]>) -> Result<MailJob, Rejection> {
    let incoming = Incoming {
        body: body.as_ref(),
        ..Incoming::default()
    };
    decode(&incoming, &JobLimits::default())
}

fn read_value(job: &Value) -> Result<MailJob, Rejection> {
    read(job.to_string())
}
