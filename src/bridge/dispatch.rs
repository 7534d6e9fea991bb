//! Calls webhooks: leases what is due, endpoints in turn, POSTs it and settles the outcome.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use url::Url;

use super::client::{Answer, Client, Post, Refusal};
use super::queue::{Leased, Outcome, Settled};
use super::{Bridge, body, schedule, traced};
use crate::config;
use crate::fail_point::{self, Point};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::{Recording, Traces};

/// How often to look for work that nothing announced: retries, other bridges' intake.
const IDLE: Duration = Duration::from_millis(500);
/// Waits while the database is away.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// How long what has finished waits for more, while most is still in flight: a statement for each would cost more than it
/// writes.
const PACE: Duration = Duration::from_millis(5);
/// How long a delivery waits for a key that this process does not have.
const NO_KEY_WAIT: f64 = 60.0;
/// Beyond the time limit of a POST: how long shutdown waits for what is in flight.
const DRAIN_MARGIN: Duration = Duration::from_secs(5);

/// The loop's own state. Outcomes stay in `finished` until they are written.
struct Dispatcher<'a> {
    bridge: &'a Bridge,
    attempt: Arc<Attempt>,
    posts: JoinSet<Settled>,
    finished: Vec<Settled>,
    /// Until when what has finished waits for more.
    until: Instant,
    wait: Duration,
}

impl Bridge {
    /// Dispatches until the soft end, then finishes what is in flight, within a bound and until the hard end.
    pub(super) async fn dispatch(&self, soft: &CancellationToken, hard: &CancellationToken) {
        let mut dispatcher = Dispatcher {
            bridge: self,
            attempt: Arc::new(Attempt {
                client: self.client.clone(),
                config: self.config.clone(),
                metrics: Arc::clone(&self.metrics),
                traces: self.traces.clone(),
            }),
            posts: JoinSet::new(),
            finished: Vec::new(),
            until: Instant::now(),
            wait: FIRST_WAIT,
        };
        while !soft.is_cancelled() {
            dispatcher.turn(soft).await;
        }
        dispatcher.drain(hard).await;
    }
}

impl Dispatcher<'_> {
    /// Settles what has finished, leases what there is room for, and waits for something to happen.
    async fn turn(&mut self, shutdown: &CancellationToken) {
        self.gather().await;
        // In this order: settling makes room, and what cannot be settled must not become more.
        let wait = if self.settle().await && (shutdown.is_cancelled() || self.start().await) {
            self.wait = FIRST_WAIT;
            IDLE
        } else {
            let wait = self.wait;
            self.wait = (wait * 2).min(LONGEST_WAIT);
            wait
        };
        let room = self.posts.len() < self.bridge.config.concurrency;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            Some(done) = self.posts.join_next(), if self.finished.is_empty() => self.keep(done),
            () = self.bridge.due.notified(), if room && self.finished.is_empty() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }

    /// Collects what has finished, until that is half of all, or something has waited long enough.
    async fn gather(&mut self) {
        while let Some(done) = self.posts.try_join_next() {
            self.keep(done);
        }
        while !self.finished.is_empty() && self.finished.len() < self.posts.len() {
            tokio::select! {
                biased;
                Some(done) = self.posts.join_next() => self.keep(done),
                () = tokio::time::sleep_until(self.until.into()) => return,
            }
        }
    }

    /// Whether everything that has finished is written.
    async fn settle(&mut self) -> bool {
        if self.finished.is_empty() {
            return true;
        }
        match self.bridge.settle(&self.finished).await {
            Ok(failing) => {
                self.bridge.disable(&self.finished, &failing).await;
                self.finished.clear();
                true
            }
            Err(error) => {
                tracing::warn!(%error, outcomes = self.finished.len(), "cannot record webhook outcomes, will try again");
                false
            }
        }
    }

    /// Whether the database could be asked. Starts what it gives.
    async fn start(&mut self) -> bool {
        let config = &self.bridge.config;
        let room = config.concurrency.saturating_sub(self.posts.len());
        if room == 0 {
            return true;
        }
        // Slow endpoints may take half of the places; the other half is for everybody, one by one.
        let per_endpoint = if room * 2 < config.concurrency {
            1
        } else {
            config.per_endpoint
        };
        match self.bridge.lease(room, per_endpoint).await {
            Ok(leased) => {
                for leased in leased {
                    let attempt = Arc::clone(&self.attempt);
                    self.posts.spawn(async move { attempt.make(leased).await });
                }
                true
            }
            Err(error) => {
                tracing::warn!(%error, "cannot look for due webhooks, will try again");
                false
            }
        }
    }

    fn keep(&mut self, done: Result<Settled, JoinError>) {
        if self.finished.is_empty() {
            self.until = Instant::now() + PACE;
        }
        match done {
            Ok(settled) => self.finished.push(settled),
            // Its lease runs out, and it is made again.
            Err(error) => tracing::error!(%error, "a webhook attempt ended without an outcome"),
        }
    }

    /// What does not finish in time is made again by whoever leases it next, under the same event id.
    async fn drain(mut self, hard: &CancellationToken) {
        let limit = self.bridge.config.timeout + DRAIN_MARGIN;
        let finished = tokio::select! {
            biased;
            () = hard.cancelled() => false,
            finished = tokio::time::timeout(limit, self.finish()) => finished.is_ok(),
        };
        if finished {
            return;
        }
        while let Some(done) = self.posts.try_join_next() {
            self.keep(done);
        }
        self.settle().await;
        tracing::warn!(
            posts = self.posts.len(),
            "webhooks in flight were given up at shutdown; they will be repeated"
        );
    }

    /// Waits for what is in flight. Outcomes are written as they come: the slowest must not take the others along.
    async fn finish(&mut self) {
        let mut wait = FIRST_WAIT;
        while !(self.posts.is_empty() && self.finished.is_empty()) {
            if self.finished.is_empty()
                && let Some(done) = self.posts.join_next().await
            {
                self.keep(done);
            }
            self.gather().await;
            if self.settle().await {
                wait = FIRST_WAIT;
            } else {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        }
    }
}

/// What one attempt needs, shared by all.
struct Attempt {
    client: Client,
    config: config::Webhook,
    metrics: Arc<Metrics>,
    traces: Option<Arc<Traces>>,
}

impl Attempt {
    async fn make(&self, mut leased: Leased) -> Settled {
        let body = std::mem::take(&mut leased.body);
        let (secrets, auth) = match (&leased.secrets, &leased.auth) {
            (Ok(secrets), Ok(auth)) => (secrets, auth),
            (Err(error), _) | (_, Err(error)) => {
                let error = error.to_string();
                tracing::error!(
                    tenant = leased.owner,
                    endpoint = leased.name,
                    error,
                    "cannot open the endpoint's secrets; its webhooks wait"
                );
                return release(&leased, error, NO_KEY_WAIT * self.config.retry_scale);
            }
        };
        let given = body::traceparent(&body).map(Cow::into_owned);
        let trace = traced::begin(self.traces.as_ref(), given.as_deref());
        let traceparent = trace.as_ref().map(Recording::traceparent).or(given);
        let begun = Instant::now();
        let post = Post {
            url: &leased.url,
            event_id: &leased.event_id,
            body,
            secrets,
            auth,
            traceparent: traceparent.as_deref(),
        };
        let answer = self.client.post(post).await;
        let took = begun.elapsed();
        fail_point::hit(Point::WebhookAnswered, [leased.event_id.as_str()]);
        self.metrics.webhook_seconds.observe(took.as_secs_f64());
        let settled = judge(&leased, answer, &self.config);
        let result = self.note(&leased, &settled, took);
        if let Some(trace) = trace {
            traced::end(trace, &leased, &settled, result);
        }
        settled
    }

    /// One line per attempt, and the count; gives the result in a word. The host only: paths of webhooks often hold tokens.
    fn note(&self, leased: &Leased, settled: &Settled, took: Duration) -> &'static str {
        let result = match settled.outcome {
            _ if settled.gone => "gone",
            Outcome::Delivered => "delivered",
            Outcome::Failed => "failed",
            Outcome::Retry(_) | Outcome::Release(_) => "retried",
        };
        self.metrics.webhook_attempts.with_label_values(&[result]).inc();
        let url = Url::parse(&leased.url).ok();
        tracing::info!(
            event = leased.event_id,
            r#type = leased.kind,
            tenant = leased.tenant,
            endpoint = format_args!("{}/{}", leased.owner, leased.name),
            host = url.as_ref().and_then(Url::host_str),
            attempt = leased.attempts + 1,
            result,
            status = settled.status,
            // The receiver's own words may repeat what we sent it.
            error = settled.error.as_deref().filter(|_| settled.status.is_none()),
            duration_ms = took.as_millis() as u64,
            next_in_s = Some(settled.outcome.delay()).filter(|delay| *delay > 0.0),
            "webhook"
        );
        result
    }
}

fn release(leased: &Leased, error: String, wait: f64) -> Settled {
    Settled {
        event: leased.event,
        endpoint: leased.endpoint,
        version: leased.version,
        lease: leased.lease,
        outcome: Outcome::Release(wait),
        status: None,
        error: Some(error),
        blame: false,
        pause: wait,
        gone: false,
    }
}

/// The next state of a delivery, from the answer to its latest attempt.
fn judge(leased: &Leased, answer: Answer, config: &config::Webhook) -> Settled {
    let gone = answer == Answer::Gone;
    let refusal = match answer {
        Answer::Taken(status) => {
            return Settled {
                outcome: Outcome::Delivered,
                status: Some(status),
                error: None,
                pause: 0.0,
                ..release(leased, String::new(), 0.0)
            };
        }
        Answer::Gone => Refusal {
            status: Some(410),
            error: "HTTP 410: the endpoint is gone".to_owned(),
            retry_after: None,
            blame: true,
        },
        Answer::Refused(refusal) => refusal,
    };
    let next = schedule::next_wait(
        leased.attempts + 1,
        refusal.retry_after,
        config.retry_scale,
        rand::random(),
    );
    Settled {
        // A disabled endpoint keeps what it has not got, in case it comes back.
        outcome: match next {
            Some(wait) => Outcome::Retry(wait.as_secs_f64()),
            None if gone => Outcome::Release(0.0),
            None => Outcome::Failed,
        },
        status: refusal.status,
        error: Some(refusal.error),
        blame: refusal.blame,
        pause: refusal.retry_after.unwrap_or_default().as_secs_f64(),
        gone,
        ..release(leased, String::new(), 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::Auth;

    fn leased(attempts: u32) -> Leased {
        Leased {
            event: 1,
            endpoint: 2,
            lease: 3,
            attempts,
            event_id: "evt_1".into(),
            tenant: "acme".into(),
            kind: "mail.sent".into(),
            body: b"{}".to_vec(),
            owner: "acme".into(),
            name: "default".into(),
            url: "https://example.com/hook".into(),
            secrets: Ok(Vec::new()),
            auth: Ok(Auth::None),
            version: 1,
        }
    }

    fn refused(retry_after: Option<u64>) -> Answer {
        Answer::Refused(Refusal {
            status: Some(503),
            error: "HTTP 503".into(),
            retry_after: retry_after.map(Duration::from_secs),
            blame: true,
        })
    }

    fn config() -> config::Webhook {
        config::Webhook {
            timeout: Duration::from_secs(15),
            concurrency: 4,
            per_endpoint: 2,
            disable_after: Duration::from_hours(120),
            retention: Duration::from_hours(720),
            retry_scale: 1.0,
        }
    }

    #[test]
    fn a_2xx_delivers() {
        let settled = judge(&leased(9), Answer::Taken(204), &config());
        assert_eq!((settled.outcome, settled.status), (Outcome::Delivered, Some(204)));
        assert_eq!((settled.error, settled.blame, settled.pause), (None, false, 0.0));
    }

    #[test]
    fn the_tenth_refusal_is_the_last() {
        let outcome = judge(&leased(8), refused(None), &config()).outcome;
        assert!(
            matches!(outcome, Outcome::Retry(wait) if wait > 60_000.0),
            "{outcome:?}"
        );
        assert_eq!(
            judge(&leased(9), refused(None), &config()).outcome,
            Outcome::Failed
        );
    }

    #[test]
    fn retry_after_delays_the_event_and_pauses_the_endpoint() {
        let settled = judge(&leased(0), refused(Some(900)), &config());
        assert_eq!(settled.outcome, Outcome::Retry(900.0));
        assert!((settled.pause - 900.0).abs() < 0.1);
    }

    #[test]
    fn what_a_gone_endpoint_has_not_got_is_kept() {
        for attempts in [0, 9, 20] {
            let settled = judge(&leased(attempts), Answer::Gone, &config());
            assert!(settled.gone);
            assert!(matches!(settled.outcome, Outcome::Retry(_) | Outcome::Release(_)));
        }
    }
}
