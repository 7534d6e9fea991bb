//! Rolling limits, seen from the server.

use std::time::{Duration, Instant};

/// The largest number of mails within any interval of this length, wherever it begins. `times` is sorted.
pub(super) fn most_within(times: &[Instant], period: Duration) -> usize {
    let mut first = 0;
    let mut most = 0;
    for (last, time) in times.iter().enumerate() {
        while times[first] + period <= *time {
            first += 1;
        }
        most = most.max(last + 1 - first);
    }
    most
}
