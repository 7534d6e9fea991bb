//! Memory for what composing makes of fetched files; those that came with a job were weighed with it.

use std::time::Duration;

use crate::failure::{Class, Failure, Fault, Stage};
use crate::memory::{Held, Memory, Share};

/// How long a mail with fetched files waits for memory. Several may wait for what the others hold: who waits too long frees
/// what it has, and comes back later.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits for memory for the copies of so many bytes of fetched files in the mail, beside the bytes held for the job.
///
/// # Errors
/// A content failure if there will never be room for both; a transient one if there was none for some seconds.
pub(super) async fn for_copy(memory: &Memory, held: u64, fetched: u64) -> Result<Held, Failure> {
    // In base64 and lines of 76 characters.
    let copy = fetched / 5 * 7;
    if !memory.fits_beside(held, copy) {
        return Err(never(memory, held + copy));
    }
    let holding = memory.hold(Share::Urgent, copy);
    tokio::time::timeout(PATIENCE, holding).await.map_err(|_| full())
}

fn never(memory: &Memory, needed: u64) -> Failure {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    Failure::permanent(
        Class::Content,
        Fault::Sender,
        Stage::Fetch,
        "attachments_too_large",
        format!(
            "the job and the mail with its attachments need {} MiB at once, and POSTROOM_MEMORY_BUDGET leaves {} MiB \
             for jobs",
            mib(needed),
            memory.most(Share::Urgent) >> 20
        ),
    )
}

fn full() -> Failure {
    let mut failure = Failure::transient(
        Class::Local,
        Fault::Us,
        Stage::Fetch,
        "attachment_memory",
        "the memory for mails with attachments was full",
    );
    failure.retry_after = Some(PATIENCE);
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn memory() -> std::sync::Arc<Memory> {
        Memory::new(52 * MIB, prometheus::IntGauge::new("held", "held").unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_mail_whose_copy_cannot_fit_beside_its_job_fails_with_a_reason() {
        let memory = memory();
        let job = memory.try_hold(Share::Bulk, 80 << 10).unwrap();
        let failure = for_copy(&memory, job.bytes(), 40 * MIB).await.unwrap_err();
        assert_eq!(
            (failure.reason, failure.is_transient()),
            ("attachments_too_large", false)
        );
        assert!(
            failure.message.contains("57 MiB")
                && failure.message.contains("POSTROOM_MEMORY_BUDGET leaves 52"),
            "{failure}"
        );
        // All that the job leaves.
        let files = (52 * MIB - job.bytes()) / 7 * 5;
        assert!(for_copy(&memory, job.bytes(), files).await.is_ok());
        assert!(for_copy(&memory, job.bytes(), files + (8 << 10)).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_mail_for_whose_copy_others_leave_no_room_comes_back_after_an_attempt() {
        let memory = memory();
        let others = memory.try_hold(Share::Urgent, 40 * MIB).unwrap();
        let failure = for_copy(&memory, 0, 10 * MIB).await.unwrap_err();
        assert_eq!(
            (failure.reason, failure.is_transient()),
            ("attachment_memory", true)
        );
        assert_eq!(failure.retry_after, Some(PATIENCE));
        drop(others);
        assert!(for_copy(&memory, 0, 10 * MIB).await.is_ok());
    }
}
