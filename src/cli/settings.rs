//! Settings as flags: each command has those of the sections it reads.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use clap::{Arg, ArgMatches, CommandFactory as _};

use super::Cli;
use crate::config::settings::{SETTINGS, Section, Setting};

/// What each command reads, besides the settings of the log, which all have.
pub(super) fn sections(command: &str) -> &'static [Section] {
    use Section::{
        Broker, Database, Egress, Fetch, Http, Job, Keys, Process, Smtp, Storage, Traces, Webhook, Worker,
    };
    match command {
        "worker" => &[
            Broker, Database, Keys, Worker, Smtp, Job, Fetch, Storage, Egress, Process, Http, Traces,
        ],
        "bridge" => &[Broker, Database, Keys, Webhook, Egress, Process, Http, Traces],
        "migrate" | "tenant" | "job" => &[Database],
        "account" | "endpoint" | "key" => &[Database, Keys],
        "topology" | "send" => &[Broker],
        "dead" => &[Broker, Keys],
        "healthcheck" => &[Http],
        _ => &[],
    }
}

/// Examples at the end of a command's help.
pub(super) fn examples(command: &str) -> &'static str {
    match command {
        "worker" => {
            "Examples:\n  postroom worker --concurrency 128\n  POSTROOM_QUEUES=high:mail.jobs.acme postroom worker"
        }
        "bridge" => "Examples:\n  postroom bridge --webhook-timeout 10s",
        "migrate" => {
            "Examples:\n  postroom migrate\n  postroom migrate --grant postroom_app   # and let that role work with it"
        }
        "topology" => "Examples:\n  postroom topology print\n  postroom topology check",
        "key" => "Examples:\n  postroom key generate",
        "tenant" => {
            "Examples:\n  postroom tenant set acme --name 'Acme Inc.' --fallback platform --per-day 50000"
        }
        "account" => {
            "Examples:\n  postroom account set acme main --host smtp.example.com --port 587 --tls starttls \\\n      \
             --username acme --password-stdin --per-minute 60 --default < password"
        }
        "endpoint" => {
            "Examples:\n  postroom endpoint set acme --url https://example.com/mail-events --generate-secret"
        }
        "job" => "Examples:\n  postroom job list --state waiting --json\n  postroom job show acme order-4711",
        "dead" => {
            "Examples:\n  postroom dead list --reason invalid\n  postroom dead replay --tenant acme --id order-4711\n  \
             postroom dead replay --queue unroutable --level low --tenant acme"
        }
        "send" => {
            "Examples:\n  postroom send --level immediate mail.json\n  postroom send --level low - < mail.json"
        }
        "healthcheck" => "Examples:\n  postroom healthcheck --http-addr 127.0.0.1:9090",
        _ => "",
    }
}

/// The whole command line.
pub(super) fn command() -> clap::Command {
    let mut root = Cli::command().after_long_help(environment());
    root = with_flags(root, &[Section::Telemetry]);
    let names: Vec<String> = root
        .get_subcommands()
        .map(|command| command.get_name().to_owned())
        .collect();
    for name in names {
        root = root.mut_subcommand(&name, |command| {
            let command = with_flags(command, sections(&name));
            let examples = examples(&name);
            if examples.is_empty() {
                command
            } else {
                command.after_help(examples)
            }
        });
    }
    root
}

/// Adds the flags of the sections, also to all commands below. `-h` leaves them out, `--help` does not.
fn with_flags(command: clap::Command, sections: &[Section]) -> clap::Command {
    let settings = SETTINGS
        .iter()
        .filter(|setting| setting.sections.iter().any(|section| sections.contains(section)));
    settings.fold(command, |command, setting| {
        let heading = setting
            .sections
            .iter()
            .find(|section| sections.contains(section))
            .map(|section| section.title());
        let arg = Arg::new(setting.name)
            .long(setting.flag())
            .value_name(if setting.secret { "FILE" } else { setting.form })
            .help(flag_help(setting))
            .help_heading(heading)
            .hide_short_help(true)
            .allow_hyphen_values(false)
            .global(true);
        command.arg(arg)
    })
}

fn flag_help(setting: &Setting) -> String {
    let meaning = setting.help.trim_end_matches('.');
    if setting.secret {
        return format!(
            "File with the value of {}: {meaning} [env: {}]",
            setting.name,
            setting.file_variable()
        );
    }
    let default = setting
        .default
        .map(|default| format!(" [default: {default}]"))
        .unwrap_or_default();
    format!("{meaning} [env: {}]{default}", setting.name)
}

/// All settings by section, for the help of the program itself.
fn environment() -> String {
    let mut text = String::from(
        "Settings: each is an environment variable, and a flag of the commands that read it (`postroom worker --help`);\n\
         the flag wins. Those that may hold secrets are no flags: NAME_FILE names a file instead.\n",
    );
    for section in Section::ALL {
        let _ = write!(text, "\n{}:\n", section.title());
        for setting in SETTINGS.iter().filter(|setting| setting.sections[0] == section) {
            let file = if setting.secret {
                format!(" (or {})", setting.file_variable())
            } else {
                String::new()
            };
            let default = setting
                .default
                .map(|default| format!(" [default: {default}]"))
                .unwrap_or_default();
            let _ = writeln!(
                text,
                "  {}={}{file}\n      {}{default}",
                setting.name, setting.form, setting.help
            );
        }
    }
    text.push_str("\nExit codes: 0 done, 1 failed, 2 wrong use.\n");
    text
}

/// Settings given as flags, by variable, from whatever depth of the command line they were given at.
pub(super) fn flags(matches: &ArgMatches) -> BTreeMap<String, String> {
    let mut flags = BTreeMap::new();
    let mut level = Some(matches);
    while let Some(matches) = level {
        for setting in SETTINGS {
            // A command that does not have the flag answers with an error.
            if let Ok(Some(value)) = matches.try_get_one::<String>(setting.name) {
                flags.insert(setting.flag_variable(), value.clone());
            }
        }
        level = matches.subcommand().map(|(_, matches)| matches);
    }
    flags
}
