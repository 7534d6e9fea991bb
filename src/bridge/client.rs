//! One POST to a webhook: signed, bounded in time and size, never redirected, only where the egress guard lets it.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Response, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use super::schedule;
use super::signature::{self, SigningKey};
use crate::egress::{self, EgressError, EgressGuard};
use crate::endpoint::Auth;

/// How much of a response is read, in bytes.
const MAX_RESPONSE: usize = 20_000;
/// How much of it is kept, in bytes: enough to see what is wrong.
const MAX_KEPT: usize = 1_000;
/// How long the rest of a good answer is waited for, so that its connection can be used again.
const DRAIN: Duration = Duration::from_secs(1);

/// What a webhook answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// 2xx.
    Taken(u16),
    /// 410: never come back.
    Gone,
    /// Anything else, or no answer at all.
    Refused(Refusal),
}

/// Why a POST did not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: Option<u16>,
    /// What the receiver said or what happened, cleaned for storage.
    pub(super) error: String,
    /// How long the receiver wants to be left alone.
    pub(super) retry_after: Option<Duration>,
    /// Other events would fare no better now.
    pub(super) blame: bool,
}

impl Refusal {
    fn local(error: impl std::fmt::Display) -> Self {
        Self {
            status: None,
            error: error.to_string(),
            retry_after: None,
            blame: true,
        }
    }
}

/// What is sent.
#[derive(Debug)]
pub(super) struct Post<'a> {
    pub(super) url: &'a str,
    pub(super) event_id: &'a str,
    pub(super) body: Vec<u8>,
    pub(super) secrets: &'a [SecretString],
    pub(super) auth: &'a Auth,
    /// The trace context that the receiver is to go on with.
    pub(super) traceparent: Option<&'a str>,
}

/// Makes POSTs over shared connections.
#[derive(Debug, Clone)]
pub(super) struct Client {
    http: reqwest::Client,
    guard: Arc<EgressGuard>,
}

impl Client {
    pub(super) fn new(guard: Arc<EgressGuard>, timeout: Duration) -> Result<Self, reqwest::Error> {
        let http = egress::http_client(Arc::clone(&guard), timeout, timeout)?;
        Ok(Self { http, guard })
    }

    /// Never takes longer than the time limit, and [`DRAIN`].
    pub(super) async fn post(&self, post: Post<'_>) -> Answer {
        let prepared = Url::parse(post.url).map_err(Refusal::local).and_then(|url| {
            self.guard.check_url(&url).map_err(Refusal::local)?;
            Ok((headers(&post)?, url))
        });
        let (headers, url) = match prepared {
            Ok(prepared) => prepared,
            Err(refusal) => return Answer::Refused(refusal),
        };
        match self.http.post(url).headers(headers).body(post.body).send().await {
            Ok(response) => answer(response).await,
            Err(error) => Answer::Refused(Refusal::local(describe(error))),
        }
    }
}

fn headers(post: &Post<'_>) -> Result<HeaderMap, Refusal> {
    let timestamp = Timestamp::now().as_second();
    let keys = post
        .secrets
        .iter()
        .map(SigningKey::parse)
        .collect::<Result<Vec<_>, _>>()
        .map_err(Refusal::local)?;
    let mut headers = HeaderMap::with_capacity(8);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("webhook-id", value(post.event_id)?);
    headers.insert("webhook-timestamp", HeaderValue::from(timestamp));
    if let Some(traceparent) = post.traceparent {
        headers.insert("traceparent", value(traceparent)?);
    }
    if !keys.is_empty() {
        let signatures = signature::header(&keys, post.event_id, timestamp, &post.body);
        headers.insert("webhook-signature", value(&signatures)?);
    }
    if let Some(authorization) = authorization(post.auth)? {
        headers.insert(AUTHORIZATION, authorization);
    }
    Ok(headers)
}

fn authorization(auth: &Auth) -> Result<Option<HeaderValue>, Refusal> {
    let text = match auth {
        Auth::None => return Ok(None),
        Auth::Bearer(token) => format!("Bearer {}", token.expose_secret()),
        Auth::Basic { username, password } => {
            use base64::Engine as _;
            let pair = format!("{username}:{}", password.expose_secret());
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
        }
    };
    let mut value = value(&text)?;
    value.set_sensitive(true);
    Ok(Some(value))
}

fn value(text: &str) -> Result<HeaderValue, Refusal> {
    HeaderValue::from_str(text)
        .map_err(|_| Refusal::local("a credential has characters that no header may have"))
}

async fn answer(response: Response) -> Answer {
    let status = response.status();
    if status.is_success() {
        // Its head was the answer; whether the rest arrives is of no interest.
        let _ = tokio::time::timeout(DRAIN, read(response)).await;
        return Answer::Taken(status.as_u16());
    }
    if status == StatusCode::GONE {
        return Answer::Gone;
    }
    let retry_after = response
        .headers()
        .get(RETRY_AFTER)
        .filter(|_| is_throttled(status))
        .and_then(|value| schedule::retry_after(value.to_str().ok()?, Timestamp::now()));
    let mut error = format!("HTTP {}", status.as_u16());
    if status.is_redirection() {
        error.push_str(": redirects are not followed; set the final URL");
    } else {
        let said = cleaned(&read(response).await);
        if !said.is_empty() {
            error = format!("{error}: {said}");
        }
    }
    Answer::Refused(Refusal {
        status: Some(status.as_u16()),
        error,
        retry_after,
        // Most of 4xx is about what was sent: other events may well pass.
        blame: !status.is_client_error() || is_throttled(status) || concerns_all(status),
    })
}

/// Statuses that mean "later" (Standard Webhooks 1.0), whose Retry-After is heeded.
fn is_throttled(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 502..=504)
}

/// Client errors that say something about the endpoint: its credentials, its address, its time.
fn concerns_all(status: StatusCode) -> bool {
    matches!(status.as_u16(), 401 | 403 | 404 | 405 | 408)
}

/// The beginning of the body.
async fn read(mut response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        let room = MAX_RESPONSE - body.len();
        body.extend_from_slice(chunk.get(..room).unwrap_or(&chunk));
        if body.len() >= MAX_RESPONSE {
            break;
        }
    }
    body
}

/// Foreign bytes made fit for a text column and a terminal.
fn cleaned(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes.get(..MAX_KEPT).unwrap_or(bytes));
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    text.trim().to_owned()
}

/// What happened, without the URL, whose path may hold a token of the receiver's.
fn describe(error: reqwest::Error) -> String {
    if let Some(refused) = EgressError::find(&error) {
        return refused.to_string();
    }
    if error.is_timeout() {
        return "no answer in time".to_owned();
    }
    let error = error.without_url();
    let mut root: &dyn std::error::Error = &error;
    while let Some(source) = root.source() {
        root = source;
    }
    let what = if error.is_connect() {
        "cannot connect"
    } else {
        "the request failed"
    };
    cleaned(format!("{what}: {root}").as_bytes())
}
