//! The table at the end, and where to look when everything is kept.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;

use comfy_table::{Cell, CellAlignment, Color, ContentLineStyle, LineStyle, Table, TableStyle};

use crate::account::Audit;
use crate::plan::{Outcome, TOTAL};
use crate::screen::{Screen, line};
use crate::setup::World;

/// Differences printed; the rest is counted.
const MOST_PROBLEMS: usize = 40;

/// Prints table, checks and figures; whether everything adds up.
pub(crate) fn print(screen: &Screen, audit: &Audit) -> bool {
    screen.heading("Accounted for");
    table(screen, audit);
    let parts: Vec<String> = Outcome::ALL
        .iter()
        .map(|outcome| {
            let count = audit.outcomes.get(outcome).copied().unwrap_or(0);
            format!("{count} {}", outcome.name())
        })
        .collect();
    let total: usize = audit.outcomes.values().sum();
    let equals = if total == TOTAL { "=" } else { "≠" };
    line(format_args!(
        "\n  {TOTAL} published {equals} {}\n  {} mails at the SMTP servers, {} final reports",
        parts.join(" + "),
        audit.mails,
        audit.finals
    ));
    line("");
    for (good, text) in &audit.checks {
        screen.check(*good, text);
    }
    screen.heading("Speed on this machine (for information)");
    let width = audit
        .figures
        .iter()
        .map(|(name, _)| name.len())
        .max()
        .unwrap_or(0);
    for (name, value) in &audit.figures {
        line(format_args!("  {name:width$}  {value}"));
    }
    let good = audit.is_good() && total == TOTAL;
    if good {
        screen.verdict(
            true,
            &format!("Everything adds up: {TOTAL} of {TOTAL} jobs accounted for."),
        );
        return true;
    }
    screen.verdict(false, "It does not add up:");
    let all = || audit.problems.iter().chain(&audit.differences);
    for problem in all().take(MOST_PROBLEMS) {
        screen.check(false, problem);
    }
    let more = all().count().saturating_sub(MOST_PROBLEMS);
    if more > 0 {
        line(format_args!("  … and {more} more"));
    }
    false
}

/// A row per kind.
fn table(screen: &Screen, audit: &Audit) {
    let mut table = Table::new();
    if !screen.colour() {
        table.force_no_tty();
    }
    table.load_style(
        TableStyle::new()
            .header_lines(ContentLineStyle::none())
            .header_separator(LineStyle::none().fill('─'))
            .content_lines(ContentLineStyle::none()),
    );
    table.set_header(["", "WHAT", "JOBS", "OUTCOME", "MAILS", "FINAL REPORTS"]);
    for row in &audit.rows {
        table.add_row([
            if row.good {
                Cell::new("✓").fg(Color::Green)
            } else {
                Cell::new("✗").fg(Color::Red)
            },
            Cell::new(row.kind.share().label),
            Cell::new(row.published),
            Cell::new(row.outcome.name()),
            Cell::new(row.mails),
            Cell::new(row.finals),
        ]);
    }
    for column in [2, 4, 5] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    line(table);
}

/// Where to look, as long as everything runs.
pub(crate) fn invite(screen: &Screen, world: &World) -> Result<(), String> {
    let variables = world.folder.join("env");
    write_variables(world, &variables).map_err(|error| format!("{}: {error}", variables.display()))?;
    let program = world.postroom.program.display();
    let variables = variables.display();
    let database = world.scratch.database_url();
    let management = world.scratch.servers().management_url();
    let login = if world.scratch.amqp_url().contains("//guest:guest@") {
        "; user guest, password guest"
    } else {
        ""
    };
    screen.heading("Left running until Ctrl-C");
    let mut places = vec![
        (
            "RabbitMQ",
            format!("{management}#/queues  (vhost {}{login})", world.scratch.name()),
        ),
        (
            "Postgres",
            format!("psql '{database}' -c 'SELECT * FROM postroom.job LIMIT 10'"),
        ),
        (
            "SMTP server",
            format!("127.0.0.1:{} (STARTTLS, AUTH)", world.smtp.port()),
        ),
        ("webhooks go to", world.hooks.url("/hooks/…")),
        ("S3", world.s3.endpoint()),
    ];
    for process in world.workers.iter().chain(&world.bridge) {
        places.push((
            "metrics",
            format!("{}  ({})", process.url("/metrics"), process.name),
        ));
    }
    for process in world.workers.iter().chain(&world.bridge) {
        places.push(("log", process.log.display().to_string()));
    }
    places.push(("jobs", format!("(. {variables}; {program} job list --limit 10)")));
    places.push(("dead letters", format!("(. {variables}; {program} dead list)")));
    places.push((
        "one more mail",
        format!("(. {variables}; {program} send --level high examples/jobs/transactional.json)"),
    ));
    for (name, place) in places {
        line(format_args!("  {name:<14} {place}"));
    }
    Ok(())
}

/// The variables of the installation, for the user's shell alone: there are keys among them.
fn write_variables(world: &World, path: &std::path::Path) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    for (name, value) in &world.postroom.variables {
        writeln!(file, "export {name}='{}'", value.replace('\'', "'\\''"))?;
    }
    Ok(())
}

/// Logs stay if something went wrong.
pub(crate) fn tidy(world: &World, good: bool) {
    if good {
        let _ = std::fs::remove_dir_all(&world.folder);
    } else {
        line(format_args!(
            "\nLogs of workers and bridge: {}",
            world.folder.display()
        ));
    }
}
