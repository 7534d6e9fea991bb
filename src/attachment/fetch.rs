//! Getting a file from an http(s) URL given by a tenant.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Response, StatusCode};
use url::Url;

use super::buffer::{Buffer, Wanted};
use super::coding::{Coding, PIECE, Unpacker};
use super::memory::{Budget, Held};
use super::slots::Slots;
use super::too_large;
use crate::config;
use crate::egress::{self, EgressError, EgressGuard};
use crate::failure::{Class, Failure, Fault, Stage};
use crate::id::TenantId;

/// Redirects followed, each checked like the first URL.
const MAX_REDIRECTS: usize = 3;

/// Time limit of one connection attempt, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_hours(24);

/// Fetches for the whole process.
#[derive(Debug)]
pub(super) struct Fetcher {
    client: reqwest::Client,
    guard: Arc<EgressGuard>,
    limits: config::Fetch,
    slots: Slots,
}

impl Fetcher {
    pub(super) fn new(limits: config::Fetch, guard: Arc<EgressGuard>) -> Result<Self, reqwest::Error> {
        let connect = CONNECT_TIMEOUT.min(limits.timeout);
        let client = egress::http_client(Arc::clone(&guard), connect, limits.timeout)?;
        let slots = Slots::new(limits.concurrency);
        Ok(Self {
            client,
            guard,
            limits,
            slots,
        })
    }

    /// Gets the tenant's file, of at most the bytes that are wanted and the configured bounds.
    pub(super) async fn fetch(
        &self,
        tenant: &TenantId,
        url: &Url,
        wanted: Wanted<'_>,
        budget: &Budget<'_>,
    ) -> Result<(Bytes, Held), Failure> {
        let Some(_slot) = self.slots.take(tenant).await else {
            return Err(passing(url, "is not fetched while the worker stops"));
        };
        let wanted = Wanted {
            cap: wanted.cap.min(self.limits.max_bytes).min(budget.total()),
            ..wanted
        };
        let fetching = async {
            let response = self.open(url).await?;
            read(response, wanted, budget).await
        };
        match tokio::time::timeout(self.limits.timeout, fetching).await {
            Ok(result) => result,
            Err(_) => Err(passing(url, "did not give the file in time")),
        }
    }

    /// The response that holds the file, after redirects.
    async fn open(&self, start: &Url) -> Result<Response, Failure> {
        let mut url = start.clone();
        for _ in 0..=MAX_REDIRECTS {
            self.guard.check_url(&url).map_err(|error| refused(&error))?;
            // Compressed content has another length and digest. Not all who are asked for none give none.
            let request = self.client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
            let response = request.send().await.map_err(|error| unreachable(&url, &error))?;
            match response.status() {
                StatusCode::OK => return Ok(response),
                status if is_redirect(status) => url = target(&url, &response)?,
                status => return Err(not_given(&url, status, response.headers())),
            }
        }
        Err(gone(&url, "redirects too often"))
    }
}

async fn read(response: Response, wanted: Wanted<'_>, budget: &Budget<'_>) -> Result<(Bytes, Held), Failure> {
    match Coding::of(response.headers(), wanted.filename) {
        Ok(Coding::Identity) => read_plain(response, wanted, budget).await,
        Ok(Coding::Gzip) => read_packed(response, wanted, budget).await,
        Err(other) => {
            let what = format!("gives it only as `{other}`; of all codings of content, gzip is understood");
            Err(gone(response.url(), &what))
        }
    }
}

async fn read_plain(
    mut response: Response,
    wanted: Wanted<'_>,
    budget: &Budget<'_>,
) -> Result<(Bytes, Held), Failure> {
    let url = response.url().clone();
    let mut buffer = Buffer::new(wanted, response.content_length(), budget).await?;
    while let Some(chunk) = next_chunk(&mut response, &url).await? {
        buffer.append(&chunk).await?;
    }
    Ok(buffer.finish())
}

/// The file behind a compressed one: all bounds are those of the file.
async fn read_packed(
    mut response: Response,
    wanted: Wanted<'_>,
    budget: &Budget<'_>,
) -> Result<(Bytes, Held), Failure> {
    let url = response.url().clone();
    let mut buffer = Buffer::new(wanted, None, budget).await?;
    let mut unpacker = Unpacker::default();
    // What cannot be compressed becomes a little larger; what becomes nothing must end as well.
    let mut left = wanted.cap.saturating_add(wanted.cap / 1024 + (64 << 10));
    while let Some(chunk) = next_chunk(&mut response, &url).await? {
        left = left
            .checked_sub(chunk.len() as u64)
            .ok_or_else(|| too_large(wanted.filename, wanted.cap))?;
        for piece in chunk.chunks(PIECE) {
            let plain = unpacker.unpack(piece);
            let plain = plain.map_err(|_| gone(&url, "says that it is gzip, and it is not"))?;
            buffer.append(&plain).await?;
            tokio::task::consume_budget().await;
        }
    }
    let rest = unpacker.finish();
    let rest = rest.map_err(|_| passing(&url, "broke off in the middle of its gzip data"))?;
    buffer.append(&rest).await?;
    Ok(buffer.finish())
}

async fn next_chunk(response: &mut Response, url: &Url) -> Result<Option<Bytes>, Failure> {
    let chunk = response.chunk().await;
    chunk.map_err(|error| unreachable(url, &error))
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Where a redirect leads; never from https to http.
fn target(url: &Url, response: &Response) -> Result<Url, Failure> {
    let next = response
        .headers()
        .get(LOCATION)
        .and_then(|location| location.to_str().ok())
        .and_then(|location| url.join(location).ok())
        .ok_or_else(|| gone(url, "redirects to nowhere"))?;
    if url.scheme() == "https" && next.scheme() != "https" {
        return Err(gone(url, "redirects from https to another scheme"));
    }
    Ok(next)
}

fn not_given(url: &Url, status: StatusCode, headers: &HeaderMap) -> Failure {
    let passes = status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429);
    let what = format!("answered {}", status.as_u16());
    if !passes {
        return gone(url, &what);
    }
    let mut failure = passing(url, &what);
    failure.retry_after = retry_after(headers, Timestamp::now());
    failure
}

/// The Retry-After header (RFC 9110 §10.2.3), seconds or a date.
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if let Ok(seconds) = text.parse() {
        Duration::from_secs(seconds)
    } else {
        let date = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
        Duration::try_from(date.duration_since(now)).unwrap_or_default()
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

fn unreachable(url: &Url, error: &reqwest::Error) -> Failure {
    match EgressError::find(error) {
        Some(refusal) => refused(refusal),
        None if error.is_timeout() => passing(url, "did not answer in time"),
        None if error.is_connect() => passing(url, "cannot be connected to"),
        None => passing(url, "broke off"),
    }
}

fn refused(error: &EgressError) -> Failure {
    if error.is_transient() {
        let (class, stage) = (Class::Infrastructure, Stage::Fetch);
        return Failure::transient(
            class,
            Fault::Sender,
            stage,
            "attachment_unreachable",
            error.to_string(),
        );
    }
    if let EgressError::Refused { host, address } = error {
        tracing::warn!(%host, %address, "attachment refused: add its network to POSTROOM_EGRESS_ALLOW to allow it");
    }
    Failure::permanent(
        Class::Content,
        Fault::Sender,
        Stage::Fetch,
        "egress_refused",
        error.to_string(),
    )
}

fn passing(url: &Url, what: &str) -> Failure {
    Failure::transient(
        Class::Infrastructure,
        Fault::Sender,
        Stage::Fetch,
        "attachment_unreachable",
        format!(
            "the host `{}` of an attachment {what}",
            url.host_str().unwrap_or("")
        ),
    )
}

fn gone(url: &Url, what: &str) -> Failure {
    Failure::permanent(
        Class::Content,
        Fault::Sender,
        Stage::Fetch,
        "attachment_unavailable",
        format!(
            "the host `{}` of an attachment {what}",
            url.host_str().unwrap_or("")
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_as_seconds_or_as_a_date_and_bounded() {
        let now: Timestamp = "2026-10-21T07:28:00Z".parse().unwrap();
        for (text, seconds) in [
            ("120", Some(120)),
            ("Wed, 21 Oct 2026 07:29:30 GMT", Some(90)),
            ("Wed, 21 Oct 2020 07:28:00 GMT", Some(0)),
            ("9999999", Some(86_400)),
            ("soon", None),
            ("-1", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            assert_eq!(
                retry_after(&headers, now),
                seconds.map(Duration::from_secs),
                "{text}"
            );
        }
    }

    #[test]
    fn a_redirect_leads_anywhere_but_from_https_to_what_is_none() {
        let led = |from: &str, location: &str| {
            let response = axum::http::Response::builder().status(302);
            let response = response.header(LOCATION, location).body("").unwrap();
            let led = target(&from.parse().unwrap(), &response.into());
            led.map(String::from).map_err(|failure| failure.message)
        };
        let (clear, secure) = ("http://a.example/x", "https://a.example/x");
        for (from, location, to) in [
            (secure, "https://b.example/", "https://b.example/"),
            (secure, "/y", "https://a.example/y"),
            (secure, "//b.example/", "https://b.example/"),
            (clear, "https://b.example/", "https://b.example/"),
            (clear, "http://b.example/", "http://b.example/"),
        ] {
            assert_eq!(led(from, location).as_deref(), Ok(to), "{from} {location}");
        }
        for location in ["http://a.example/x", "http://b.example/", "ftp://b.example/"] {
            let refused = led(secure, location).unwrap_err();
            assert!(refused.contains("from https to another scheme"), "{refused}");
        }
        assert!(led(secure, "https://[").unwrap_err().contains("to nowhere"));
    }
}
