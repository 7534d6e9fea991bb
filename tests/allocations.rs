//! What a plain job allocates where no server is involved: a guard against copies that creep in. Counted, not timed.

use jiff::Timestamp;
use postroom::attachment::Prepared;
use postroom::compose::{Composition, compose};
use postroom::config::JobLimits;
use postroom::job::decode::{Incoming, decode};

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

/// Allocations, and bytes in all of them.
fn counted<T>(work: impl FnOnce() -> T) -> (T, u64, u64) {
    let before = dhat::HeapStats::get();
    let done = work();
    let after = dhat::HeapStats::get();
    (
        done,
        after.total_blocks - before.total_blocks,
        after.total_bytes - before.total_bytes,
    )
}

fn incoming(body: &[u8]) -> Incoming<'_> {
    Incoming {
        body,
        content_type: Some("application/json"),
        key_tenant: Some("acme"),
        ..Incoming::default()
    }
}

/// One test: what others allocate meanwhile would be counted too.
#[test]
fn decoding_and_composing_a_plain_job_allocates_little_and_copies_its_text_a_few_times() {
    let _counting = dhat::Profiler::builder().testing().build();
    let text = "Lorem ipsum dolor sit amet.\\r\\n".repeat(4000);
    let bytes = text.len() as u64;
    let body = format!(
        r#"{{"id":"order-4711","tenant":"acme","to":"ann@example.org","subject":"Your order","text":"{text}"}}"#
    );
    let limits = JobLimits::default();
    // What is made once.
    decode(&incoming(body.as_bytes()), &limits).unwrap();

    let (job, blocks, total) = counted(|| decode(&incoming(body.as_bytes()), &limits).unwrap());
    assert!(blocks <= 32, "decoding takes {blocks} allocations");
    assert!(total <= 5 * bytes, "decoding takes {total} bytes for {bytes} of text");

    let from = job.to[0].clone();
    let recipients = [from.address.clone()];
    let prepared = Prepared::default();
    let composition = Composition {
        job: &job,
        from: &from,
        reply_to: None,
        envelope_from: Some(&from.address),
        recipients: &recipients,
        message_id: "<0123456789abcdef@example.com>",
        date: Timestamp::UNIX_EPOCH,
        prepared: &prepared,
    };
    compose(&composition).unwrap();
    let (_, blocks, total) = counted(|| compose(&composition).unwrap());
    assert!(blocks <= 14, "composing takes {blocks} allocations");
    assert!(total <= 3 * bytes, "composing takes {total} bytes for {bytes} of text");
}
