//! Reading one job queue within the memory there is.
//!
//! A broker counts deliveries, not bytes: the prefetch of RabbitMQ knows no size. So each delivery is weighed when it
//! comes, and the window (the prefetch) follows the weights: wide for small jobs, narrow for large ones. What comes and
//! does not fit loses its body at once, and goes back to its queue when the window has been made narrower; in the
//! narrowest window nothing is given back, the queue waits instead. Reading is prompt otherwise, since lapin buffers
//! without a bound of its own. In a [`pause`] nothing is consumed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Worker, pause};
use crate::broker::{Consumer, Delivery, Receipt};
use crate::config::JobLimits;
use crate::level::Level;
use crate::memory::{self, FACTOR, Share};

/// The narrowest window. What one queue may have delivered beyond the budget, since lapin holds it.
const NARROWEST: u16 = 2;
/// The window a queue begins with: nobody knows yet what is in it.
pub const FIRST: u16 = NARROWEST;
/// Deliveries whose weights are remembered.
const REMEMBERED: usize = 64;
/// Time without a wider window after one proved too wide.
const CAUTION: Duration = Duration::from_secs(5);

/// The reader of one queue.
#[derive(Debug)]
pub struct Intake {
    worker: Arc<Worker>,
    consumer: Consumer,
    share: Share,
    window: Window,
    /// Deliveries whose bodies did not fit.
    bare: Vec<Receipt>,
    kept: mpsc::Sender<Delivery>,
    soft: CancellationToken,
    ended: CancellationToken,
    paused: watch::Receiver<bool>,
}

impl Intake {
    /// Reads into `kept` until `soft` or the end of the session. `widest`: most deliveries in hand.
    pub fn new(
        worker: Arc<Worker>,
        consumer: Consumer,
        widest: u16,
        kept: mpsc::Sender<Delivery>,
        (soft, ended): (CancellationToken, CancellationToken),
    ) -> Self {
        let share = share(consumer.subscription().level);
        Self {
            window: Window::new(widest, worker.memory.most(share)),
            share,
            bare: Vec::new(),
            paused: worker.pause.watch(),
            worker,
            consumer,
            kept,
            soft,
            ended,
        }
    }

    /// Runs it.
    pub async fn run(mut self) {
        loop {
            let delivery = tokio::select! {
                biased;
                () = self.soft.cancelled() => break,
                () = pause::begun(&mut self.paused) => {
                    if self.rest().await {
                        continue;
                    }
                    return;
                }
                delivery = self.consumer.next() => delivery,
            };
            let Some(delivery) = delivery else { return };
            if !self.take(delivery).await {
                break;
            }
            if let Some(window) = self.window.change(Instant::now())
                && !self.resize(window).await
            {
                return;
            }
        }
        self.stop().await;
    }

    /// Consumes no more. What was delivered but not begun goes back, by being dropped. False when the session is over.
    async fn stop(&mut self) -> bool {
        if self.consumer.stop().await.is_err() {
            return false;
        }
        while self.consumer.next().await.is_some() {}
        self.bare.drain(..).for_each(Receipt::give_back);
        true
    }

    /// A pause: all goes back, and consuming begins anew behind it. False when it is time to end.
    async fn rest(&mut self) -> bool {
        if !self.stop().await {
            return false;
        }
        tokio::select! {
            biased;
            () = self.soft.cancelled() => return false,
            () = self.ended.cancelled() => return false,
            () = pause::over(&mut self.paused) => {}
        }
        let first = FIRST.min(self.window.widest);
        self.window.set(first);
        self.consumer.start(first).await.is_ok()
    }

    /// Keeps a delivery if it fits; in the narrowest window as soon as it fits, unless a pause begins. False when it is time
    /// to end.
    async fn take(&mut self, mut delivery: Delivery) -> bool {
        let weight = weigh(&delivery, &self.worker.limits);
        self.window.note(weight);
        if weight > 0 {
            delivery.held = self.worker.memory.try_hold(self.share, weight);
        }
        if weight > 0 && delivery.held.is_none() {
            self.window.crowded(Instant::now());
            if !self.window.is_narrowest() {
                self.strip(delivery);
                return true;
            }
            delivery.held = tokio::select! {
                biased;
                () = self.soft.cancelled() => return false,
                () = self.ended.cancelled() => return false,
                () = pause::begun(&mut self.paused) => return true,
                held = self.worker.memory.hold(self.share, weight) => Some(held),
            };
        }
        tokio::select! {
            biased;
            () = self.soft.cancelled() => false,
            sent = self.kept.send(delivery) => sent.is_ok(),
        }
    }

    /// Drops the body and keeps the receipt: unacknowledged, it keeps the broker from sending more.
    fn strip(&mut self, delivery: Delivery) {
        self.bare.push(delivery.receipt);
    }

    /// Another window; what was stripped goes back then. False when the session is over.
    async fn resize(&mut self, window: u16) -> bool {
        let (memory, limits, share) = (&self.worker.memory, &self.worker.limits, self.share);
        let (bare, mut kept) = (&mut self.bare, Vec::new());
        let resized = self.consumer.resize(window, |mut delivery| {
            let weight = weigh(&delivery, limits);
            delivery.held = memory.try_hold(share, weight);
            if delivery.held.is_some() {
                kept.push(delivery);
            } else {
                bare.push(delivery.receipt);
            }
        });
        if resized.await.is_err() {
            return false;
        }
        if !self.bare.is_empty() {
            let queue = &self.consumer.subscription().queue;
            tracing::debug!(%queue, jobs = self.bare.len(), window, "jobs beyond the memory budget go back to their queue");
            self.worker.metrics.beyond_budget.inc_by(self.bare.len() as u64);
        }
        self.bare.drain(..).for_each(Receipt::give_back);
        self.window.set(window);
        for delivery in kept {
            if self.kept.send(delivery).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// The share of the memory that a level may use.
fn share(level: Option<Level>) -> Share {
    match level {
        Some(Level::Immediate | Level::High) => Share::Urgent,
        _ => Share::Bulk,
    }
}

/// What a delivery will weigh. A compressed body says in its last bytes how large it is (RFC 1952 §2.3.1); where it does
/// not, it counts as large as it may be.
fn weigh(delivery: &Delivery, limits: &JobLimits) -> u64 {
    let bytes = delivery.body.len() as u64;
    let encoding = delivery.content_encoding().unwrap_or_default();
    let is_compressed = encoding.to_ascii_lowercase().contains("gzip") || delivery.has_header("compression");
    if !is_compressed {
        return memory::weight(bytes);
    }
    let most = limits.max_inflated as u64;
    let said = delivery
        .body
        .last_chunk::<4>()
        .map(|said| u64::from(u32::from_le_bytes(*said)));
    let inflated = match said {
        Some(said) if said >= bytes / 2 && said <= most => said,
        // zlib has no such field; deflate makes a thousandth of its input at best.
        _ => most.min(bytes.saturating_mul(1032)),
    };
    match memory::weight(inflated.max(bytes)) {
        0 => 0,
        // Kept as received, and plain besides.
        weight => weight + bytes,
    }
}

/// How many deliveries to ask for.
#[derive(Debug)]
struct Window {
    now: u16,
    widest: u16,
    /// Bytes that all of them together should not exceed.
    bytes: u64,
    recent: VecDeque<u64>,
    /// Deliveries since the last change.
    since: u16,
    crowded: bool,
    careful_until: Option<Instant>,
}

impl Window {
    fn new(widest: u16, bytes: u64) -> Self {
        Self {
            now: FIRST.min(widest),
            widest,
            bytes,
            recent: VecDeque::with_capacity(REMEMBERED),
            since: 0,
            crowded: false,
            careful_until: None,
        }
    }

    fn is_narrowest(&self) -> bool {
        self.now <= NARROWEST
    }

    fn note(&mut self, weight: u64) {
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(weight);
        self.since = self.since.saturating_add(1);
    }

    /// A delivery did not fit.
    fn crowded(&mut self, now: Instant) {
        self.crowded = true;
        self.careful_until = Some(now + CAUTION);
    }

    /// As many of the heaviest lately seen as fit.
    fn fitting(&self) -> u16 {
        let heaviest = self.recent.iter().copied().max().unwrap_or(0).max(FACTOR);
        let fitting = u16::try_from(self.bytes / heaviest).unwrap_or(u16::MAX);
        fitting.clamp(NARROWEST, self.widest.max(NARROWEST))
    }

    /// The window that should be, if it differs enough from the present one. Narrower at once; wider after a whole
    /// window of deliveries that fit.
    fn change(&self, now: Instant) -> Option<u16> {
        let fitting = self.fitting();
        if self.crowded && !self.is_narrowest() {
            return Some(fitting.min(self.now / 2).max(NARROWEST));
        }
        if fitting <= self.now / 2 {
            return Some(fitting);
        }
        let careful = self.careful_until.is_some_and(|until| now < until);
        let wider = fitting >= self.now.saturating_mul(2) || (fitting == self.widest && fitting > self.now);
        (wider && !careful && self.since >= self.now).then_some(fitting)
    }

    fn set(&mut self, window: u16) {
        self.now = window;
        self.since = 0;
        self.crowded = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn noted(window: &mut Window, weight: u64, times: u16) {
        (0..times).for_each(|_| window.note(weight));
    }

    #[test]
    fn small_jobs_widen_the_window_in_one_step() {
        let now = Instant::now();
        let mut window = Window::new(256, 100 * MIB);
        noted(&mut window, 0, FIRST - 1);
        assert_eq!(window.change(now), None);
        noted(&mut window, 0, 1);
        assert_eq!(window.change(now), Some(256));
        window.set(256);
        noted(&mut window, 0, 1000);
        assert_eq!(window.change(now), None);
    }

    #[test]
    fn one_large_job_narrows_the_window_to_what_would_fit_of_its_kind() {
        let mut window = Window::new(256, 100 * MIB);
        window.set(256);
        window.note(20 * MIB);
        assert_eq!(window.change(Instant::now()), Some(5));
        window.set(5);
        noted(&mut window, 20 * MIB, 100);
        assert_eq!(window.change(Instant::now()), None);
    }

    #[test]
    fn a_crowded_window_is_halved_down_to_two_and_grows_again_only_later() {
        let now = Instant::now();
        let mut window = Window::new(256, 100 * MIB);
        window.set(16);
        noted(&mut window, MIB, 16);
        for expected in [8, 4, 2] {
            window.crowded(now);
            assert_eq!(window.change(now), Some(expected));
            window.set(expected);
        }
        window.crowded(now);
        noted(&mut window, MIB, 50);
        assert_eq!(window.change(now), None);
        assert_eq!(window.change(now + CAUTION), Some(100));
    }

    #[test]
    fn a_job_larger_than_everything_still_has_a_window() {
        let mut window = Window::new(32, MIB);
        window.set(32);
        window.note(50 * MIB);
        assert_eq!(window.change(Instant::now()), Some(NARROWEST));
    }
}
