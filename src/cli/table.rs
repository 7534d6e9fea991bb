//! Output for people: plain columns, no lines around them; and for programs: JSON. Much of it comes from producers and SMTP
//! servers: nothing in it reaches the terminal that moves the cursor, begins a line, or turns the direction of writing.

use std::fmt::Write as _;
use std::io::{self, Write};

use comfy_table::{Table, presets};
use serde::Serialize;

/// A table with a header.
pub(super) fn columns(out: &mut dyn Write, header: &[&str], rows: Vec<Vec<String>>) -> io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    table.add_rows(
        rows.into_iter()
            .map(|row| row.iter().map(|cell| safe(cell)).collect::<Vec<_>>()),
    );
    write_trimmed(out, &table)
}

/// Names and values, one pair per line.
pub(super) fn pairs(out: &mut dyn Write, pairs: Vec<(&str, String)>) -> io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.add_rows(
        pairs
            .into_iter()
            .map(|(name, value)| vec![name.to_owned(), safe(&value)]),
    );
    write_trimmed(out, &table)
}

/// Indented JSON.
pub(super) fn json<T: Serialize>(out: &mut dyn Write, value: &T) -> io::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    writeln!(out, "{}", safe_json(&text))
}

/// Text of others for one line.
pub(super) fn safe(text: &str) -> String {
    let shown = |c| {
        if is_safe(c) {
            c
        } else {
            char::REPLACEMENT_CHARACTER
        }
    };
    text.chars().map(shown).collect()
}

/// The same for a text of several lines of our own.
pub(super) fn safe_lines(text: &str) -> String {
    let lines: Vec<_> = text.split('\n').map(safe).collect();
    lines.join("\n")
}

/// The same JSON: escapes say what stands in its strings.
pub(super) fn safe_json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        // Outside of strings JSON has line breaks only, inside of them none.
        if is_safe(c) || c == '\n' {
            shown.push(c);
        } else {
            // Writing to a string does not fail.
            let _ = write!(shown, "\\u{:04x}", u32::from(c));
        }
    }
    shown
}

/// Neither a control character, nor a separator of lines, nor one that turns the direction of writing (UAX #9).
fn is_safe(c: char) -> bool {
    let turns =
        matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !c.is_control() && !turns
}

/// Yes or no.
pub(super) fn yes(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// The value, or a hyphen.
pub(super) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn write_trimmed(out: &mut dyn Write, table: &Table) -> io::Result<()> {
    for line in table.lines() {
        writeln!(out, "{}", line.trim())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const HOSTILE: &str = "a\u{1b}[2K\r\nforged\u{9b}1m\u{202e}\u{2028}z";

    #[test]
    fn text_of_others_stays_in_its_cell_and_does_nothing_to_the_terminal() {
        let mut out = Vec::new();
        columns(&mut out, &["ID"], vec![vec![HOSTILE.to_owned()]]).unwrap();
        pairs(&mut out, vec![("id", HOSTILE.to_owned())]).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out.lines().count(), 3, "{out:?}");
        assert!(out.chars().all(|c| c == '\n' || is_safe(c)), "{out:?}");
        assert_eq!(safe_lines("one\ntwo\u{1b}"), "one\ntwo\u{fffd}");
    }

    #[test]
    fn json_says_the_same_without_doing_anything_to_the_terminal() {
        let value = json!({"id": HOSTILE, "of": [HOSTILE]});
        let mut out = Vec::new();
        json(&mut out, &value).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(out.chars().all(|c| c == '\n' || is_safe(c)), "{out:?}");
        assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), value);
        assert_eq!(out.lines().count(), 6, "{out:?}");
    }
}
