//! All that is known of one job, in order of time, so that what went wrong can be understood.

use std::fmt::Write as _;
use std::time::{Instant, SystemTime};

use super::audit::Evidence;
use super::plan::Job;

/// Lines of logs per process.
const LINES: usize = 40;

/// The story of a job.
#[must_use]
pub fn of(evidence: &Evidence, job: &Job) -> String {
    let (now, today) = (Instant::now(), SystemTime::now());
    let time = |at: Instant| {
        let at = today.checked_sub(now.duration_since(at)).unwrap_or(today);
        jiff::Timestamp::try_from(at).unwrap_or_default()
    };
    let mut events: Vec<(jiff::Timestamp, String)> = Vec::new();
    let number: usize = job.id.trim_start_matches('j').parse().unwrap_or(0);
    if let Some(published) = evidence.published.get(number) {
        let text = format!("published {} times, confirmed", published.times);
        events.extend(published.confirmed.map(|at| (time(at), text)));
    }
    for mail in evidence.mails.get(&job.id).into_iter().flatten() {
        let answered = mail.received.answered.map(time);
        let text = format!(
            "taken by SMTP server {} from {} (session {}) for {:?}, answered {answered:?}, {}",
            mail.server + 1,
            mail.received.helo,
            mail.received.session,
            mail.received.to,
            mail.received.header("Message-ID"),
        );
        events.push((time(mail.received.at), text));
    }
    for refused in evidence
        .refused
        .iter()
        .filter(|refused| refused.to.iter().any(|to| to.contains(&job.id)))
    {
        let text = format!(
            "refused to {} at {:?}: {} {:?}",
            refused.helo, refused.phase, refused.reply, refused.to
        );
        events.push((time(refused.at), text));
    }
    for hook in evidence.hooks.get(&job.id).into_iter().flatten() {
        let at = jiff::Timestamp::try_from(hook.at).unwrap_or_default();
        events.push((
            at,
            format!("webhook {} (taken: {}): {}", hook.event, hook.taken, hook.report),
        ));
    }
    let first = events.iter().map(|(at, _)| *at).min();
    let last = events.iter().map(|(at, _)| *at).max();
    for happened in &evidence.happened {
        let (start, end) = (time(happened.start), time(happened.end));
        if last.is_none_or(|last| start <= last) && first.is_none_or(|first| end >= first) {
            let process = happened.process.clone().unwrap_or_default();
            let name = happened.kind.name();
            events.push((
                start,
                format!("FAULT {name} #{} {process} until {end}", happened.target + 1),
            ));
        }
    }
    events.sort_by_key(|(at, _)| *at);
    let mut story = format!("── {}/{}: {job:?}\n", job.tenant, job.id);
    for (at, text) in events {
        let _ = writeln!(story, "{at:.3} {text}");
    }
    let row = evidence.ledger.get(&job.id).map_or("none", String::as_str);
    let _ = writeln!(story, "ledger: {row}");
    story + &logs(evidence, job)
}

fn logs(evidence: &Evidence, job: &Job) -> String {
    let mut text = String::new();
    let files = std::fs::read_dir(&evidence.folder)
        .into_iter()
        .flatten()
        .flatten();
    let mut files: Vec<_> = files.map(|file| file.path()).collect();
    files.sort();
    for file in files
        .iter()
        .filter(|file| file.extension().is_some_and(|ext| ext == "log"))
    {
        let log = std::fs::read(file).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        for line in log.lines().filter(|line| line.contains(&job.id)).take(LINES) {
            let _ = writeln!(text, "{name}: {line}");
        }
    }
    text
}
