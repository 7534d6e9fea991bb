//! Acknowledgements of one channel, coalesced.
//!
//! Delivery tags of a channel count from 1. The finished prefix is acknowledged with one `multiple` frame. When an
//! unfinished delivery holds the prefix back, what lies behind it is acknowledged singly, after a moment or when it fills
//! a quarter of the prefetch: otherwise one slow job would stop its level.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::session::Shared;

/// How long finished deliveries wait behind an unfinished one.
const STUCK: Duration = Duration::from_millis(50);
/// For writing one frame; past it the connection is as good as lost.
const WRITE_LIMIT: Duration = Duration::from_secs(15);
/// Requests taken at once.
const BATCH: usize = 256;

#[derive(Debug)]
enum Request {
    Ack(u64),
    GiveBack(u64),
    Flush(oneshot::Sender<()>),
}

/// The sending side of a channel's acknowledgements.
#[derive(Debug, Clone)]
pub(super) struct Acker {
    // Holds at most one request per unacknowledged delivery: the prefetch bounds it.
    requests: mpsc::UnboundedSender<Request>,
    quarter: Arc<AtomicUsize>,
}

impl Acker {
    pub(super) fn start(channel: Channel, prefetch: u16, shared: Arc<Shared>) -> Self {
        let (requests, inbox) = mpsc::unbounded_channel();
        let quarter = Arc::new(AtomicUsize::new(quarter_of(prefetch)));
        let worker = Worker {
            channel,
            quarter: Arc::clone(&quarter),
            window: Window::default(),
            stuck_until: None,
        };
        tokio::spawn(worker.run(inbox, shared));
        Self { requests, quarter }
    }

    /// The channel's prefetch is another one now.
    pub(super) fn resize(&self, prefetch: u16) {
        self.quarter.store(quarter_of(prefetch), Ordering::Relaxed);
    }

    pub(super) fn receipt(&self, tag: u64) -> Receipt {
        Receipt {
            tag,
            requests: Some(self.requests.clone()),
        }
    }

    /// Returns when everything handed in before has been written, or the session is over.
    pub(super) async fn flush(&self) {
        let (done, written) = oneshot::channel();
        if self.requests.send(Request::Flush(done)).is_ok() {
            let _ = timeout(WRITE_LIMIT, written).await;
        }
    }
}

/// The right to acknowledge one delivery. After its session's end all of it is without effect: the broker has taken the
/// message back. Dropped unused, it gives the message back.
#[derive(Debug)]
pub struct Receipt {
    tag: u64,
    requests: Option<mpsc::UnboundedSender<Request>>,
}

impl Receipt {
    /// A receipt of nothing, for jobs that did not come from the broker.
    #[must_use]
    pub fn none() -> Self {
        Self {
            tag: 0,
            requests: None,
        }
    }

    /// The message has a durable owner elsewhere; the broker may forget it. Returns at once, the frame follows.
    pub fn ack(mut self) {
        self.send(Request::Ack(self.tag));
    }

    /// The broker shall deliver it again, to anybody.
    pub fn give_back(mut self) {
        self.send(Request::GiveBack(self.tag));
    }

    fn send(&mut self, request: Request) {
        if let Some(requests) = self.requests.take() {
            // Fails when the session is over.
            let _ = requests.send(request);
        }
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        self.send(Request::GiveBack(self.tag));
    }
}

fn quarter_of(prefetch: u16) -> usize {
    usize::from(prefetch / 4).max(1)
}

struct Worker {
    channel: Channel,
    quarter: Arc<AtomicUsize>,
    window: Window,
    stuck_until: Option<Instant>,
}

impl Worker {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Request>, shared: Arc<Shared>) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let deadline = self.stuck_until;
            let stuck = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            let written = tokio::select! {
                () = shared.ended.cancelled() => return,
                received = inbox.recv_many(&mut batch, BATCH) => {
                    if received == 0 {
                        return;
                    }
                    timeout(WRITE_LIMIT, self.handle(&mut batch)).await
                }
                () = stuck => timeout(WRITE_LIMIT, self.write_stragglers()).await,
            };
            match written {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return shared.fail(format!("acknowledging: {error}")),
                Err(_) => return shared.fail("acknowledging: the connection does not take it"),
            }
        }
    }

    async fn handle(&mut self, batch: &mut Vec<Request>) -> lapin::Result<()> {
        let mut flushes = Vec::new();
        for request in batch.drain(..) {
            match request {
                Request::Ack(tag) => self.window.finish(tag),
                Request::GiveBack(tag) => {
                    self.window.settle(tag);
                    let options = BasicNackOptions {
                        multiple: false,
                        requeue: true,
                    };
                    self.channel.basic_nack(tag, options).await?;
                }
                Request::Flush(done) => flushes.push(done),
            }
        }
        if let Some((tag, multiple)) = self.window.take_prefix() {
            self.channel.basic_ack(tag, BasicAckOptions { multiple }).await?;
        }
        if !flushes.is_empty() || self.window.stragglers >= self.quarter.load(Ordering::Relaxed) {
            self.write_stragglers().await?;
        }
        self.stuck_until = match (self.window.stragglers, self.stuck_until) {
            (0, _) => None,
            (_, None) => Some(Instant::now() + STUCK),
            (_, since) => since,
        };
        for done in flushes {
            let _ = done.send(());
        }
        Ok(())
    }

    async fn write_stragglers(&mut self) -> lapin::Result<()> {
        self.stuck_until = None;
        for tag in self.window.take_stragglers() {
            self.channel.basic_ack(tag, BasicAckOptions::default()).await?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// Delivered, or not yet.
    Open,
    /// To be acknowledged.
    Finished,
    /// Nothing left to write.
    Settled,
}

/// Which tags are finished, from the lowest that is not settled on.
#[derive(Debug)]
struct Window {
    first: u64,
    slots: VecDeque<Slot>,
    /// Finished slots, all of them behind an open one after [`Window::take_prefix`].
    stragglers: usize,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            first: 1,
            slots: VecDeque::new(),
            stragglers: 0,
        }
    }
}

impl Window {
    fn finish(&mut self, tag: u64) {
        if let Some(slot) = self.slot(tag)
            && *slot == Slot::Open
        {
            *slot = Slot::Finished;
            self.stragglers += 1;
        }
    }

    fn settle(&mut self, tag: u64) {
        if let Some(slot) = self.slot(tag)
            && *slot == Slot::Open
        {
            *slot = Slot::Settled;
        }
    }

    fn slot(&mut self, tag: u64) -> Option<&mut Slot> {
        let index = usize::try_from(tag.checked_sub(self.first)?).ok()?;
        if index >= self.slots.len() {
            self.slots.resize(index + 1, Slot::Open);
        }
        self.slots.get_mut(index)
    }

    /// The last finished tag before the first open one, and whether it stands for several. It must itself be
    /// unacknowledged: the broker closes the channel for a `multiple` up to a tag it no longer knows.
    fn take_prefix(&mut self) -> Option<(u64, bool)> {
        let mut last = None;
        let mut count = 0;
        while let Some(slot) = self.slots.front().copied()
            && slot != Slot::Open
        {
            if slot == Slot::Finished {
                last = Some(self.first);
                count += 1;
            }
            self.slots.pop_front();
            self.first += 1;
        }
        self.stragglers -= count;
        last.map(|tag| (tag, count > 1))
    }

    fn take_stragglers(&mut self) -> Vec<u64> {
        let first = self.first;
        let tags = (first..)
            .zip(&mut self.slots)
            .filter(|(_, slot)| **slot == Slot::Finished)
            .map(|(tag, slot)| {
                *slot = Slot::Settled;
                tag
            });
        let tags = tags.collect();
        self.stragglers = 0;
        tags
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_finished_prefix_is_one_frame() {
        let mut window = Window::default();
        for tag in [2, 1, 3, 5] {
            window.finish(tag);
        }
        assert_eq!(window.take_prefix(), Some((3, true)));
        assert_eq!(window.take_prefix(), None);
        assert_eq!(window.take_stragglers(), [5]);
        window.finish(4);
        // 5 is acknowledged already: naming it again would close the channel.
        assert_eq!(window.take_prefix(), Some((4, false)));
        window.finish(6);
        assert_eq!(window.take_prefix(), Some((6, false)));
    }

    #[test]
    fn what_was_given_back_is_never_acknowledged() {
        let mut window = Window::default();
        window.finish(1);
        window.settle(2);
        window.finish(2);
        assert_eq!(window.take_prefix(), Some((1, false)));
        window.finish(3);
        assert_eq!(window.take_prefix(), Some((3, false)));
    }

    /// The broker's side: which tags are unacknowledged, and what it does about a frame (`rabbit_channel:collect_acks`).
    struct Model(BTreeSet<u64>);

    impl Model {
        fn ack(&mut self, tag: u64, multiple: bool) -> BTreeSet<u64> {
            assert!(self.0.contains(&tag), "unknown delivery tag {tag}");
            let acked: BTreeSet<u64> = if multiple {
                self.0.range(..=tag).copied().collect()
            } else {
                [tag].into()
            };
            self.0.retain(|other| !acked.contains(other));
            acked
        }
    }

    proptest! {
        #[test]
        fn every_finished_tag_is_acknowledged_once_and_no_other(
            order in Just((1..=60_u64).collect::<Vec<_>>()).prop_shuffle(),
            given_back in prop::collection::btree_set(1..=60_u64, 0..20),
            stragglers_every in 1..10_usize,
        ) {
            let mut broker = Model((1..=60).collect());
            let mut window = Window::default();
            let mut finished = BTreeSet::new();
            for (turn, tag) in order.into_iter().enumerate() {
                if given_back.contains(&tag) {
                    window.settle(tag);
                    broker.0.remove(&tag);
                } else {
                    window.finish(tag);
                    finished.insert(tag);
                }
                if let Some((last, multiple)) = window.take_prefix() {
                    let acked = broker.ack(last, multiple);
                    prop_assert!(acked.is_subset(&finished));
                }
                if turn % stragglers_every == 0 {
                    for tag in window.take_stragglers() {
                        let acked = broker.ack(tag, false);
                        prop_assert!(acked.is_subset(&finished));
                    }
                }
            }
            prop_assert!(broker.0.is_empty());
            prop_assert_eq!(window.stragglers, 0);
        }
    }
}
