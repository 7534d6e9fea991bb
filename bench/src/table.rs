//! The table of a load: ratios first.

use comfy_table::{CellAlignment, Table, presets};

use crate::figures::{Measured, Row, median};

/// Draws it in Markdown.
pub(crate) fn draw(letter: char, title: &str, rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let idle = rows
        .iter()
        .any(|row| row.runs.iter().any(|run| run.idle.is_some()));
    let parking = rows
        .iter()
        .any(|row| row.runs.iter().any(|run| run.parking.is_some()));
    let mut header = vec!["contestant"];
    if idle {
        header.extend(["p50 ms", "p99 ms", "own CPU µs", "peak MiB"]);
    } else {
        header.extend([
            "× rate",
            "× own CPU",
            "mails/s",
            "own CPU µs",
            "broker",
            "database",
            "sink",
            "peak MiB",
        ]);
    }
    if parking {
        header.push("parked/s");
    }
    let columns = header.len();
    table.set_header(header);
    for row in rows {
        let mut cells = vec![row.name()];
        cells.extend(if idle {
            idle_cells(row)
        } else {
            rate_cells(row, rows.first())
        });
        if parking {
            cells.push(number(
                median(row.runs.iter().filter_map(|run| run.parking).collect()),
                0,
            ));
        }
        table.add_row(cells);
    }
    for column in 1..columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let trouble = rows
        .iter()
        .filter_map(|row| Some(format!("\n{}: {}", row.name(), row.trouble.as_ref()?)));
    format!("\n({letter}) {title}\n\n{table}{}\n", trouble.collect::<String>())
}

fn rate_cells(row: &Row, base: Option<&Row>) -> Vec<String> {
    let ratio = |figure: fn(&Measured) -> f64| number(base.and_then(|base| row.ratio(base, figure)), 2);
    vec![
        ratio(|run| run.rate),
        ratio(|run| run.own_us),
        number(row.median(|run| run.rate), 0),
        number(row.median(|run| run.own_us), 0),
        number(row.median(|run| run.broker_us), 0),
        number(row.median(|run| run.database_us), 0),
        number(row.median(|run| run.sink_us), 0),
        number(row.median(|run| run.peak_mib), 0),
    ]
}

fn idle_cells(row: &Row) -> Vec<String> {
    let of = |figure: fn(&Measured) -> Option<f64>| median(row.runs.iter().filter_map(figure).collect());
    vec![
        number(of(|run| Some(run.idle?.p50)), 1),
        number(of(|run| Some(run.idle?.p99)), 1),
        number(row.median(|run| run.own_us), 0),
        number(row.median(|run| run.peak_mib), 0),
    ]
}

fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.decimals$}"))
}
