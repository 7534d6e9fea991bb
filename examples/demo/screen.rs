//! What the user sees: commands, live bars, tables. Without a terminal, plain lines.

use std::fmt::Display;
use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Commands are cut to this many characters.
const WIDTH: usize = 116;
/// Between two plain lines of progress.
const PLAIN_EVERY: Duration = Duration::from_secs(2);

/// A line of standard output. A closed pipe is no reason to stop.
pub(crate) fn line(text: impl Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Standard output with its looks.
pub(crate) struct Screen {
    terminal: bool,
    colour: bool,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let terminal = std::io::stdout().is_terminal();
        let colour = terminal && std::env::var_os("NO_COLOR").is_none();
        Self { terminal, colour }
    }

    fn style(&self, code: &str, text: impl Display) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_string()
        }
    }

    /// Whether colours are welcome.
    pub(crate) fn colour(&self) -> bool {
        self.colour
    }

    pub(crate) fn heading(&self, text: &str) {
        line(format_args!("\n{}", self.style("1", text)));
    }

    /// A command as a user would type it, shortened.
    pub(crate) fn command(&self, text: &str) {
        let mut shown: String = text.chars().take(WIDTH).collect();
        if shown.len() < text.len() {
            shown.push('…');
        }
        line(format_args!("  {} {shown}", self.style("2", "$")));
    }

    /// A check and how it went.
    pub(crate) fn check(&self, good: bool, text: &str) {
        line(format_args!("  {} {text}", self.mark(good)));
    }

    fn mark(&self, good: bool) -> String {
        if good {
            self.style("32", "✓")
        } else {
            self.style("31", "✗")
        }
    }

    pub(crate) fn verdict(&self, good: bool, text: &str) {
        let colour = if good { "1;32" } else { "1;31" };
        line(format_args!("\n{}", self.style(colour, text)));
    }

    /// Bars with these names and lengths.
    pub(crate) fn progress(&self, bars: &[(&'static str, u64)]) -> Progress {
        if !self.terminal {
            return Progress::Lines(Mutex::new(Lines {
                start: Instant::now(),
                last: None,
            }));
        }
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout_with_hz(15));
        let bar = "  {prefix:>10} {bar:40.green/black.bright} {pos:>4}/{len:<4} {msg}";
        let style = ProgressStyle::with_template(bar).unwrap_or_else(|_| ProgressStyle::default_bar());
        let style = style.progress_chars("━╸━");
        let bars = bars
            .iter()
            .map(|&(name, len)| all.add(ProgressBar::new(len).with_prefix(name).with_style(style.clone())))
            .collect();
        let note = ProgressStyle::with_template("  {prefix:>10} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let note = all.add(ProgressBar::no_length().with_prefix("waiting").with_style(note));
        Progress::Bars { all, bars, note }
    }
}

/// Live progress.
pub(crate) enum Progress {
    /// On a terminal.
    Bars {
        all: MultiProgress,
        bars: Vec<ProgressBar>,
        note: ProgressBar,
    },
    /// Elsewhere.
    Lines(Mutex<Lines>),
}

pub(crate) struct Lines {
    start: Instant,
    last: Option<Instant>,
}

impl Progress {
    /// Shows how far each bar is, and what waits.
    pub(crate) fn update(&self, counts: &[(&'static str, u64)], waiting: &str) {
        match self {
            Self::Bars { bars, note, .. } => {
                for (bar, (_, count)) in bars.iter().zip(counts) {
                    bar.set_position(*count);
                }
                note.set_message(waiting.to_owned());
            }
            Self::Lines(lines) => {
                let Ok(mut lines) = lines.lock() else { return };
                if lines.last.is_some_and(|last| last.elapsed() < PLAIN_EVERY) {
                    return;
                }
                lines.last = Some(Instant::now());
                lines.print(counts, waiting);
            }
        }
    }

    /// The last state stays on the screen.
    pub(crate) fn finish(&self, counts: &[(&'static str, u64)]) {
        match self {
            Self::Bars { bars, note, all } => {
                for (bar, (_, count)) in bars.iter().zip(counts) {
                    bar.set_position(*count);
                    bar.abandon();
                }
                note.finish_and_clear();
                all.remove(note);
            }
            Self::Lines(lines) => {
                if let Ok(lines) = lines.lock() {
                    lines.print(counts, "nothing");
                }
            }
        }
    }
}

impl Lines {
    fn print(&self, counts: &[(&'static str, u64)], waiting: &str) {
        let counts: Vec<String> = counts.iter().map(|(name, n)| format!("{n} {name}")).collect();
        let _ = writeln!(
            std::io::stdout(),
            "  {:>5.1} s  {}; waiting: {waiting}",
            self.start.elapsed().as_secs_f64(),
            counts.join(", ")
        );
    }
}
