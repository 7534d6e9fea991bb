//! Waiting on conditions.

use std::future::Future;
use std::time::{Duration, Instant};

/// Waits until `condition` holds, checking often.
///
/// # Panics
/// After `limit`.
#[track_caller]
pub(crate) fn eventually<F, C>(limit: Duration, mut condition: C) -> impl Future<Output = ()>
where
    C: FnMut() -> F,
    F: Future<Output = bool>,
{
    eventually_some(limit, move || {
        let holds = condition();
        async move { holds.await.then_some(()) }
    })
}

/// Waits until `attempt` gives something.
///
/// # Panics
/// After `limit`, naming the caller.
#[track_caller]
pub(crate) fn eventually_some<T, F, C>(limit: Duration, mut attempt: C) -> impl Future<Output = T>
where
    C: FnMut() -> F,
    F: Future<Output = Option<T>>,
{
    let caller = std::panic::Location::caller();
    async move {
        let start = Instant::now();
        let mut pause = Duration::from_millis(5);
        loop {
            if let Some(value) = attempt().await {
                return value;
            }
            assert!(
                start.elapsed() < limit,
                "not within {limit:?}, waited for at {caller}"
            );
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }
}
