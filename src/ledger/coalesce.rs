//! Makes one statement out of many concurrent calls. Batches form by load: while a statement runs, the calls that come
//! in meanwhile become the next one, and statements that hold up no mail keep a distance from each other in which more calls
//! come together. A lone call never waits for company.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Bounds of one batch.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Most calls in one batch.
    pub rows: usize,
    /// Most weight (bytes) in one batch; a single heavier call still goes, alone.
    pub weight: usize,
    /// Batches in flight at once.
    pub parallel: usize,
    /// Calls that a batch must have to go beside another, or right after it: fewer wait until that is answered, and its
    /// `pace` is over.
    pub crowd: usize,
    /// From the beginning of one batch to that of the next, unless it is a crowd. A call that comes after a quiet time goes
    /// at once. Nothing for calls that an open SMTP transaction waits for.
    pub pace: Duration,
}

/// Sends calls to a task that answers them in batches. Cheap to clone.
pub struct Coalescer<I, O> {
    calls: mpsc::Sender<Call<I, O>>,
}

struct Call<I, O> {
    item: I,
    weight: usize,
    answer: oneshot::Sender<O>,
}

impl<I, O> Clone for Coalescer<I, O> {
    fn clone(&self) -> Self {
        Self {
            calls: self.calls.clone(),
        }
    }
}

impl<I, O> fmt::Debug for Coalescer<I, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coalescer")
            .field("room", &self.calls.capacity())
            .finish()
    }
}

impl<I: Send + 'static, O: Send + 'static> Coalescer<I, O> {
    /// Starts the task. `run` answers a batch in order, one answer per call; a missing answer leaves its caller
    /// with `None`.
    pub fn spawn<F, Fut>(bounds: Bounds, run: F) -> Self
    where
        F: Fn(Vec<I>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Vec<O>> + Send + 'static,
    {
        let (calls, incoming) = mpsc::channel(4096);
        tokio::spawn(serve(incoming, bounds, Arc::new(run)));
        Self { calls }
    }

    /// Puts one call into the next batch and waits for its answer. `None` if the task is gone.
    pub async fn call(&self, item: I, weight: usize) -> Option<O> {
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call { item, weight, answer }).await.ok()?;
        answered.await.ok()
    }
}

async fn serve<I, O, F, Fut>(mut incoming: mpsc::Receiver<Call<I, O>>, bounds: Bounds, run: Arc<F>)
where
    I: Send + 'static,
    O: Send + 'static,
    F: Fn(Vec<I>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Vec<O>> + Send + 'static,
{
    let mut waiting: VecDeque<Call<I, O>> = VecDeque::new();
    let mut running = JoinSet::new();
    let mut room = Vec::with_capacity(bounds.rows);
    let mut closed = false;
    let mut next = Instant::now();
    while !(closed && waiting.is_empty()) {
        let now = Instant::now();
        let is_alone = running.is_empty() && (now >= next || closed);
        let enough = if is_alone { 1 } else { bounds.crowd };
        if waiting.len() >= enough && running.len() < bounds.parallel {
            next = now + bounds.pace;
            let batch = next_batch(&mut waiting, bounds);
            let run = Arc::clone(&run);
            running.spawn(async move { answer(batch, run.as_ref()).await });
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep_until(next), if running.is_empty() && !waiting.is_empty() => {}
            taken = incoming.recv_many(&mut room, bounds.rows), if !closed && waiting.len() < bounds.rows => {
                closed = taken == 0;
                waiting.extend(room.drain(..));
            }
            _ = running.join_next(), if !running.is_empty() => {}
        }
    }
    running.detach_all();
}

/// The first of those that wait, as many as may go together.
fn next_batch<I, O>(waiting: &mut VecDeque<Call<I, O>>, bounds: Bounds) -> Vec<Call<I, O>> {
    let mut weight = 0;
    let fits = |call: &&Call<I, O>| {
        weight += call.weight;
        weight <= bounds.weight
    };
    let count = waiting.iter().take(bounds.rows).take_while(fits).count();
    waiting.drain(..count.max(1)).collect()
}

async fn answer<I, O, F, Fut>(batch: Vec<Call<I, O>>, run: &F)
where
    F: Fn(Vec<I>) -> Fut,
    Fut: Future<Output = Vec<O>>,
{
    let (items, answers): (Vec<_>, Vec<_>) = batch.into_iter().map(|call| (call.item, call.answer)).unzip();
    for (answer, result) in answers.into_iter().zip(run(items).await) {
        // A caller that went away needs no answer.
        let _ = answer.send(result);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn calls_that_come_while_a_batch_runs_become_the_next_batch() {
        let batches = Arc::new(AtomicUsize::new(0));
        let (seen, gate) = (Arc::clone(&batches), Arc::new(Notify::new()));
        let open = Arc::clone(&gate);
        let coalescer = Coalescer::spawn(
            Bounds {
                rows: 100,
                weight: 1000,
                parallel: 1,
                crowd: 1,
                pace: Duration::ZERO,
            },
            move |items: Vec<u32>| {
                let (seen, gate) = (Arc::clone(&seen), Arc::clone(&gate));
                async move {
                    if seen.fetch_add(1, Ordering::SeqCst) == 0 {
                        gate.notified().await;
                    }
                    items.into_iter().map(|n| n * 2).collect()
                }
            },
        );
        let call = |n| {
            let coalescer = coalescer.clone();
            tokio::spawn(async move { coalescer.call(n, 1).await })
        };
        let mut calls = vec![call(0)];
        while batches.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        calls.extend((1..50).map(call));
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
        open.notify_one();
        for (n, call) in calls.into_iter().enumerate() {
            assert_eq!(call.await.unwrap(), Some(n as u32 * 2));
        }
        assert_eq!(batches.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_second_batch_goes_beside_the_first_only_when_it_is_a_crowd() {
        let running = Arc::new(AtomicUsize::new(0));
        let (seen, gate) = (Arc::clone(&running), Arc::new(tokio::sync::Semaphore::new(0)));
        let open = Arc::clone(&gate);
        let bounds = Bounds {
            rows: 100,
            weight: 1000,
            parallel: 2,
            crowd: 10,
            pace: Duration::ZERO,
        };
        let coalescer = Coalescer::spawn(bounds, move |items: Vec<u32>| {
            let (seen, gate) = (Arc::clone(&seen), Arc::clone(&gate));
            async move {
                seen.fetch_add(1, Ordering::SeqCst);
                let _pass = gate.acquire().await;
                items
            }
        });
        let call = |n| {
            let coalescer = coalescer.clone();
            tokio::spawn(async move { coalescer.call(n, 1).await })
        };
        let settle = async || {
            for _ in 0..200 {
                tokio::task::yield_now().await;
            }
            running.load(Ordering::SeqCst)
        };
        let mut calls = vec![call(0)];
        assert_eq!(settle().await, 1);
        calls.extend((1..10).map(call));
        assert_eq!(settle().await, 1, "nine are no crowd");
        calls.push(call(10));
        assert_eq!(settle().await, 2);
        open.add_permits(3);
        for (n, call) in calls.into_iter().enumerate() {
            assert_eq!(call.await.unwrap(), Some(n as u32));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn batches_keep_their_pace_but_neither_a_lone_call_nor_a_crowd_waits() {
        let bounds = Bounds {
            rows: 100,
            weight: 1000,
            parallel: 1,
            crowd: 4,
            pace: Duration::from_millis(20),
        };
        let coalescer = Coalescer::spawn(
            bounds,
            |items: Vec<u32>| async move { vec![items.len(); items.len()] },
        );
        let begin = Instant::now();
        let call = |after: u64| {
            let coalescer = coalescer.clone();
            async move {
                tokio::time::sleep(Duration::from_millis(after)).await;
                let together = coalescer.call(0, 1).await.unwrap();
                (after, together, begin.elapsed().as_millis())
            }
        };
        let calls = [0, 5, 15, 100, 105, 106, 107, 108, 200].map(call);
        let answers = futures_util::future::join_all(calls).await;
        let expected = [
            (0, 1, 0),
            (5, 2, 20),
            (15, 2, 20),
            (100, 1, 100),
            (105, 4, 108),
            (106, 4, 108),
            (107, 4, 108),
            (108, 4, 108),
            (200, 1, 200),
        ];
        assert_eq!(answers, expected);
    }

    #[tokio::test]
    async fn a_batch_stays_below_its_weight_unless_one_call_alone_is_heavier() {
        let coalescer = Coalescer::spawn(
            Bounds {
                rows: 100,
                weight: 10,
                parallel: 1,
                crowd: 1,
                pace: Duration::ZERO,
            },
            |items: Vec<usize>| async move {
                let total: usize = items.iter().sum();
                items.iter().map(|_| (total, items.len())).collect()
            },
        );
        let answers = futures_util::future::join_all([4, 4, 4, 50, 4].map(|n| coalescer.call(n, n))).await;
        for (total, count) in answers.into_iter().flatten() {
            assert!(total <= 10 || count == 1, "{count} calls weigh {total}");
        }
    }
}
