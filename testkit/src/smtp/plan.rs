//! A script as a JSON file, for those who drive the server from outside.

use std::time::Duration;

use serde::Deserialize;

use super::script::{Action, Phase, RcptRule, Script};

/// What a script file says; see `docs/testing.md` for its form.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Of the dice behind `chance`.
    #[serde(default)]
    seed: u64,
    /// What to do at which command.
    #[serde(default)]
    rules: Vec<RuleLine>,
    /// What to answer to whom.
    #[serde(default)]
    recipients: Vec<RecipientLine>,
    /// Pause in milliseconds between the bytes of replies.
    drip_ms: Option<u64>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleLine {
    at: Phase,
    #[serde(rename = "do")]
    act: ActionName,
    /// Only after so many occurrences.
    #[serde(default)]
    after: u64,
    /// At most so many times.
    times: Option<u64>,
    /// With this probability.
    chance: Option<f64>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ActionName {
    Reply(String),
    ReplyThenClose(String),
    Close,
    Silence,
    DelayMs(u64),
    TakeThenClose,
    TakeThenSilence,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecipientLine {
    /// Local part of the address.
    local: Option<String>,
    /// Position among the recipients of a mail, from 1.
    nth: Option<usize>,
    reply: String,
    /// Only the first so many times.
    times: Option<u64>,
}

impl Plan {
    /// Reads a script file.
    ///
    /// # Errors
    /// If it is not JSON of that form, saying where.
    pub fn parse(json: &str) -> Result<Self, String> {
        let plan: Self = serde_json::from_str(json).map_err(|error| error.to_string())?;
        let lost = plan
            .recipients
            .iter()
            .find(|line| line.local.is_some() == line.nth.is_some());
        match lost {
            Some(line) => Err(format!(
                "recipients: `{}` needs either `local` or `nth`",
                line.reply
            )),
            None => Ok(plan),
        }
    }

    /// The script it describes.
    #[must_use]
    pub fn script(&self) -> Script {
        let mut script = Script::new().seed(self.seed);
        for line in &self.rules {
            let times = line.times.unwrap_or(u64::MAX);
            script = script.rule(line.at, line.after, times, action(&line.act));
            script.last_chance(line.chance.unwrap_or(1.0));
        }
        for line in &self.recipients {
            script = match (&line.local, line.nth) {
                (Some(local), _) => script.recipient(local, rule(line)),
                (None, Some(nth)) => script.nth_recipient(nth, &line.reply),
                (None, None) => script,
            };
        }
        match self.drip_ms {
            Some(pause) => script.drip(Duration::from_millis(pause)),
            None => script,
        }
    }
}

fn rule(line: &RecipientLine) -> RcptRule {
    match line.times {
        Some(times) => RcptRule::defer_first(times, &line.reply),
        None => RcptRule::refuse(&line.reply),
    }
}

fn action(name: &ActionName) -> Action {
    match name {
        ActionName::Reply(reply) => Action::Reply(reply.clone()),
        ActionName::ReplyThenClose(reply) => Action::ReplyThenClose(reply.clone()),
        ActionName::Close => Action::Close,
        ActionName::Silence => Action::Silence,
        ActionName::DelayMs(millis) => Action::Delay(Duration::from_millis(*millis)),
        ActionName::TakeThenClose => Action::TakeThenClose,
        ActionName::TakeThenSilence => Action::TakeThenSilence,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_file_says_what_happens_when() {
        let plan = Plan::parse(
            r#"{"rules": [{"at": "mail", "do": {"reply": "451 4.3.0 Later"}, "after": 1, "times": 1},
                          {"at": "final_dot", "do": "take_then_close"}],
                "recipients": [{"local": "nobody", "reply": "550 5.1.1 Unknown"},
                               {"nth": 2, "reply": "452 4.5.3 Too many"}]}"#,
        )
        .expect("it is a script");
        let script = plan.script();
        let at_mail: Vec<_> = (0..3).map(|_| script.decide(Phase::Mail).cloned()).collect();
        assert_eq!(at_mail, [None, Some(Action::reply("451 4.3.0 Later")), None]);
        assert_eq!(script.decide(Phase::FinalDot), Some(&Action::TakeThenClose));
        assert_eq!(
            script.refusal("nobody@x.example", 1).as_deref(),
            Some("550 5.1.1 Unknown")
        );
        assert_eq!(
            script.refusal("ann@x.example", 2).as_deref(),
            Some("452 4.5.3 Too many")
        );
        assert_eq!(script.refusal("ann@x.example", 1), None);
    }

    #[test]
    fn a_script_file_with_a_misspelt_word_is_refused_with_what_is_allowed() {
        let error = Plan::parse(r#"{"rules": [{"at": "dot", "do": "close"}]}"#).err();
        assert!(
            error.as_deref().is_some_and(|text| text.contains("final_dot")),
            "{error:?}"
        );
        let error = Plan::parse(r#"{"recipients": [{"reply": "550 no"}]}"#).err();
        assert!(error.is_some());
    }
}
