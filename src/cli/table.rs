//! Output for people: plain columns, no lines around them; and for programs: JSON.

use std::io::Write;

use comfy_table::{Table, presets};
use serde_json::Value;

use super::CliError;

/// A table with a header.
pub(super) fn columns(out: &mut dyn Write, header: &[&str], rows: Vec<Vec<String>>) -> Result<(), CliError> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    table.add_rows(rows);
    write_trimmed(out, &table)
}

/// Names and values, one pair per line.
pub(super) fn pairs(out: &mut dyn Write, pairs: Vec<(&str, String)>) -> Result<(), CliError> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.add_rows(
        pairs
            .into_iter()
            .map(|(name, value)| vec![name.to_owned(), value]),
    );
    write_trimmed(out, &table)
}

/// Indented JSON.
pub(super) fn json(out: &mut dyn Write, value: &Value) -> Result<(), CliError> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)?;
    Ok(())
}

/// Yes or no.
pub(super) fn yes(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// The value, or a hyphen.
pub(super) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn write_trimmed(out: &mut dyn Write, table: &Table) -> Result<(), CliError> {
    for line in table.lines() {
        writeln!(out, "{}", line.trim())?;
    }
    Ok(())
}
