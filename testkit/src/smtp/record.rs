//! What a test server saw.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::Notify;

use super::script::Phase;

/// A mail the server took.
#[derive(Debug, Clone)]
pub struct Received {
    /// Number of the mail, from 0.
    pub id: usize,
    /// When MAIL came.
    pub mail_at: Instant,
    /// When its final dot was there.
    pub at: Instant,
    /// The same by the calendar.
    pub time: SystemTime,
    /// Address of MAIL, without brackets; empty for the null sender.
    pub from: String,
    /// What followed the address in MAIL, such as `SIZE=120 BODY=8BITMIME`.
    pub params: String,
    /// Addresses accepted in RCPT.
    pub to: Vec<String>,
    /// The mail, dots unstuffed; empty if the server was told not to keep it.
    pub data: Vec<u8>,
    /// Number of the connection, from 0.
    pub session: u64,
    /// Whether the connection was encrypted.
    pub tls: bool,
    /// Who had logged in.
    pub user: Option<String>,
    /// The name given in EHLO.
    pub helo: String,
    /// SHA-256 of the mail, in hexadecimal digits.
    pub digest: String,
    /// When the 250 was handed to the network; none as long as it was not, and if it never was.
    pub answered: Option<Instant>,
}

impl Received {
    /// The value of a header, unfolded; empty if it is missing.
    #[must_use]
    pub fn header(&self, name: &str) -> String {
        let mut value: Option<String> = None;
        for line in self.data.split(|b| *b == b'\n') {
            let line = String::from_utf8_lossy(line);
            let line = line.trim_end();
            match &mut value {
                Some(value) if line.starts_with([' ', '\t']) => value.push_str(line),
                Some(_) => break,
                None if line.is_empty() => break,
                None => {
                    value = line
                        .split_once(':')
                        .filter(|(header, _)| header.eq_ignore_ascii_case(name))
                        .map(|(_, value)| value.to_owned());
                }
            }
        }
        value.unwrap_or_default().trim().to_owned()
    }

    /// The record as a JSON object: everything but the mail itself.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        let time = jiff::Timestamp::try_from(self.time).unwrap_or_default();
        serde_json::json!({
            "mail": self.id,
            "time": format!("{time:.6}"),
            "session": self.session,
            "helo": self.helo,
            "tls": self.tls,
            "user": self.user,
            "from": self.from,
            "params": self.params,
            "to": self.to,
            "bytes": self.data.len(),
            "sha256": self.digest,
            "message_id": self.header("Message-ID"),
            "job": self.header("X-Postroom-ID"),
            "subject": self.header("Subject"),
            "answered": self.answered.is_some(),
        })
    }
}

/// A reply of 4xx or 5xx to MAIL, RCPT, DATA or the final dot.
#[derive(Debug, Clone)]
pub struct Refused {
    /// When.
    pub at: Instant,
    /// Which command was refused.
    pub phase: Phase,
    /// The reply.
    pub reply: String,
    /// Recipients of the mail so far, the refused one last.
    pub to: Vec<String>,
    /// The name given in EHLO.
    pub helo: String,
}

/// Counts since the server started.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Connections accepted.
    pub connections: u64,
    /// Open now.
    pub open: u64,
    /// Most open at once.
    pub max_open: u64,
    /// Most logged in at once, by user.
    pub max_open_by_user: HashMap<String, u64>,
    /// Commands by verb, in upper case.
    pub commands: HashMap<String, u64>,
    /// Times that replies went out, several at once counted once: round trips of a client that waits for them.
    pub turns: u64,
    /// AUTH that succeeded.
    pub auth_ok: u64,
    /// AUTH that failed.
    pub auth_failed: u64,
    open_by_user: HashMap<String, u64>,
}

impl Counters {
    /// How often a command was seen.
    #[must_use]
    pub fn command(&self, verb: &str) -> u64 {
        self.commands.get(verb).copied().unwrap_or(0)
    }
}

#[derive(Debug, Default)]
pub(super) struct Record {
    received: Mutex<Vec<Received>>,
    refused: Mutex<Vec<Refused>>,
    counters: Mutex<Counters>,
    trace: Mutex<Vec<Vec<String>>>,
    changed: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Record {
    pub(super) fn received(&self) -> Vec<Received> {
        lock(&self.received).clone()
    }

    pub(super) fn received_count(&self) -> usize {
        lock(&self.received).len()
    }

    pub(super) fn counters(&self) -> Counters {
        lock(&self.counters).clone()
    }

    pub(super) fn trace(&self) -> Vec<Vec<String>> {
        lock(&self.trace).clone()
    }

    /// The mails from number `first` on.
    pub(super) fn received_from(&self, first: usize) -> Vec<Received> {
        lock(&self.received).get(first..).unwrap_or_default().to_vec()
    }

    pub(super) fn refused(&self) -> Vec<Refused> {
        lock(&self.refused).clone()
    }

    pub(super) fn refuse(&self, refused: Refused) {
        lock(&self.refused).push(refused);
    }

    /// Keeps the mail and gives its number.
    pub(super) fn take(&self, mail: Received) -> usize {
        let mut received = lock(&self.received);
        let id = received.len();
        received.push(Received { id, ..mail });
        drop(received);
        self.changed.notify_waiters();
        id
    }

    pub(super) fn answered(&self, id: usize) {
        if let Some(mail) = lock(&self.received).get_mut(id) {
            mail.answered = Some(Instant::now());
        }
    }

    pub(super) fn batch(&self, verbs: Vec<String>) {
        lock(&self.trace).push(verbs);
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut lock(&self.counters));
    }

    pub(super) fn command(&self, verb: &str) {
        self.count(|counters| {
            if let Some(n) = counters.commands.get_mut(verb) {
                *n += 1;
            } else {
                counters.commands.insert(verb.to_owned(), 1);
            }
        });
    }

    pub(super) fn opened(&self) {
        self.count(|counters| {
            counters.connections += 1;
            counters.open += 1;
            counters.max_open = counters.max_open.max(counters.open);
        });
    }

    pub(super) fn logged_in(&self, user: &str) {
        self.count(|counters| {
            counters.auth_ok += 1;
            let now = counters.open_by_user.entry(user.to_owned()).or_default();
            *now += 1;
            let now = *now;
            let most = counters.max_open_by_user.entry(user.to_owned()).or_default();
            *most = now.max(*most);
        });
    }

    pub(super) fn closed(&self, user: Option<&str>) {
        self.count(|counters| {
            counters.open -= 1;
            if let Some(now) = user.and_then(|user| counters.open_by_user.get_mut(user)) {
                *now -= 1;
            }
        });
        self.changed.notify_waiters();
    }

    pub(super) async fn wait_until(&self, reached: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if reached(self) {
                return;
            }
            changed.await;
        }
    }
}
