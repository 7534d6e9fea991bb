//! Fail points that act.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use super::Point;

const VARIABLE: &str = "POSTROOM_FAIL_POINTS";

static PLAN: OnceLock<Vec<Rule>> = OnceLock::new();

/// What `POSTROOM_FAIL_POINTS` should not have said.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{VARIABLE}: {0}")]
pub struct ArmError(String);

#[derive(Debug)]
struct Rule {
    point: Point,
    name: &'static str,
    action: Action,
    /// Only this occurrence, counted from 1.
    nth: Option<u64>,
    job: Option<String>,
    seen: AtomicU64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Kill,
    Stop,
    Pause(Duration),
    Panic,
    Error,
}

/// Reads the plan from the environment, once, at the start of the process.
///
/// # Errors
/// If it cannot be read.
pub fn arm() -> Result<(), ArmError> {
    let text = std::env::var(VARIABLE).unwrap_or_default();
    let plan = parse(&text)?;
    // Armed already: then it was read from the same variable.
    let _ = PLAN.set(plan);
    Ok(())
}

/// A point is reached on behalf of these jobs (none, where nobody knows them).
pub fn hit<'a>(point: Point, jobs: impl IntoIterator<Item = &'a str>) {
    let lost = loses(point, jobs);
    debug_assert!(!lost, "{point:?} asks for no answer");
}

/// The same where an answer has come in: whether it is to be treated as lost.
#[must_use]
pub fn loses<'a>(point: Point, jobs: impl IntoIterator<Item = &'a str>) -> bool {
    let rules = PLAN.get().map_or(&[][..], Vec::as_slice);
    if rules.iter().all(|rule| rule.point != point) {
        return false;
    }
    let jobs: Vec<&str> = jobs.into_iter().collect();
    let mut lost = false;
    for rule in rules.iter().filter(|rule| rule.point == point) {
        if rule.applies(&jobs) {
            tracing::warn!(action = ?rule.action, ?jobs, "fail point {}", rule.name);
            lost |= rule.action.act();
        }
    }
    lost
}

/// Whether an environment variable is that of the fail points.
#[must_use]
pub fn is_variable(name: &str) -> bool {
    name == VARIABLE
}

impl Rule {
    fn applies(&self, jobs: &[&str]) -> bool {
        if self.job.as_deref().is_some_and(|job| !jobs.contains(&job)) {
            return false;
        }
        let nth = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
        self.nth.is_none_or(|wanted| wanted == nth)
    }
}

impl Action {
    /// Whether the answer is lost.
    fn act(self) -> bool {
        match self {
            Self::Kill => loop {
                let _ = kill_process(getpid(), Signal::KILL);
                std::thread::sleep(Duration::from_millis(10));
            },
            Self::Stop => {
                let _ = kill_process(getpid(), Signal::STOP);
                // The signal may reach another thread first: this one must not go on before it has.
                std::thread::sleep(Duration::from_millis(50));
            }
            Self::Pause(time) => tokio::task::block_in_place(|| std::thread::sleep(time)),
            #[expect(clippy::panic, reason = "asked for")]
            Self::Panic => panic!("a fail point asked for this panic"),
            Self::Error => return true,
        }
        false
    }
}

fn parse(text: &str) -> Result<Vec<Rule>, ArmError> {
    let rules = text.split(';').map(str::trim).filter(|rule| !rule.is_empty());
    rules
        .map(|rule| parse_rule(rule).map_err(|problem| ArmError(format!("`{rule}`: {problem}"))))
        .collect()
}

fn parse_rule(text: &str) -> Result<Rule, String> {
    let (wanted, rest) = text.split_once('=').ok_or("expected point=action")?;
    let (point, name, answers) = Point::ALL
        .iter()
        .find(|(_, name, _)| *name == wanted.trim())
        .ok_or("there is no such point")?;
    let mut parts = rest.split('@').map(str::trim);
    let action = parse_action(parts.next().unwrap_or_default())?;
    if action == Action::Error && !answers {
        return Err("no answer is waited for at this point".to_owned());
    }
    let (mut nth, mut job) = (None, None);
    for part in parts {
        match part.strip_prefix("job=") {
            Some(id) => job = Some(id.to_owned()),
            None => nth = Some(part.parse().map_err(|_| format!("`@{part}` is no number"))?),
        }
    }
    Ok(Rule {
        point: *point,
        name,
        action,
        nth,
        job,
        seen: AtomicU64::new(0),
    })
}

fn parse_action(text: &str) -> Result<Action, String> {
    if let Some(time) = text.strip_prefix("pause(").and_then(|t| t.strip_suffix(')')) {
        let unit = time.trim_start_matches(|c: char| c.is_ascii_digit());
        let number = time.trim_end_matches(unit).parse();
        return match (number, unit) {
            (Ok(number), "ms") => Ok(Action::Pause(Duration::from_millis(number))),
            (Ok(number), "s") => Ok(Action::Pause(Duration::from_secs(number))),
            _ => Err(format!("`{time}` is no time such as 300ms or 8s")),
        };
    }
    match text {
        "kill" => Ok(Action::Kill),
        "stop" => Ok(Action::Stop),
        "panic" => Ok(Action::Panic),
        "error" => Ok(Action::Error),
        _ => Err(format!("`{text}` is no action")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_a_list_of_points_actions_occurrences_and_jobs() {
        let plan = parse("settled=error@1; leased = panic@job=a:b@2;acked=pause(300ms);acked=kill;").unwrap();
        let read: Vec<_> = plan
            .iter()
            .map(|rule| (rule.point, rule.action, rule.nth, rule.job.as_deref()))
            .collect();
        assert_eq!(
            read,
            [
                (Point::Settled, Action::Error, Some(1), None),
                (Point::Leased, Action::Panic, Some(2), Some("a:b")),
                (
                    Point::Acked,
                    Action::Pause(Duration::from_millis(300)),
                    None,
                    None
                ),
                (Point::Acked, Action::Kill, None, None),
            ]
        );
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_told_and_not_skipped() {
        for (text, told) in [
            ("setled=kill", "there is no such point"),
            ("settled", "expected point=action"),
            ("settled=die", "`die` is no action"),
            ("settled=kill@first", "`@first` is no number"),
            ("acked=pause(3m)", "`3m` is no time"),
            ("leased=error", "no answer is waited for"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(told) && error.contains(VARIABLE), "{error}");
        }
    }

    #[test]
    fn a_rule_counts_only_what_it_is_about() {
        let plan = parse("settled=error@2@job=mine").unwrap();
        assert!(!plan[0].applies(&["other"]));
        assert!(!plan[0].applies(&["mine"]));
        assert!(!plan[0].applies(&[]));
        assert!(plan[0].applies(&["other", "mine"]));
        assert!(!plan[0].applies(&["mine"]));
    }
}
