//! What people see of a running process: logs, metrics and spans.

pub mod metrics;
pub mod traces;

use std::io::IsTerminal;
use std::panic::PanicHookInfo;

use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::config;

/// This program's own targets begin with this.
const OWN: &str = "postroom";

/// Sends logs to standard error, in the form and from the level configured, and panics with them. `RUST_LOG` means
/// nothing here: a shell that has it set for something else must not change what production logs.
///
/// # Errors
/// If the process has a subscriber already.
pub fn init(config: &config::Telemetry) -> Result<(), TryInitError> {
    let ansi = std::io::stderr().is_terminal();
    subscriber(config, ansi, std::io::stderr).try_init()?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

fn subscriber<W>(config: &config::Telemetry, ansi: bool, writer: W) -> impl Subscriber + Send + Sync + 'static
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // A log that cannot be written must not end the process: reporting that on standard error, the default, would.
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .log_internal_errors(false);
    let layer = if config.json {
        layer
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .boxed()
    } else {
        layer.with_ansi(ansi).boxed()
    };
    tracing_subscriber::registry()
        .with(layer)
        .with(filter(&config.log))
}

/// The filter for a text that [`config`] has found good.
///
/// Libraries log warnings only, unless the text names them, and never below info: at debug and trace several of them
/// print what they send and receive, passwords included (AMQP's `start-ok`, SQL parameters, HTTP headers).
///
/// lapin logs every closed channel as an error, those that a look for a missing queue or an orderly end closes too, and of a
/// refused login that it will not try again. What is worth telling about a channel or a connection reaches us as the error of
/// a call.
fn filter(text: &str) -> Targets {
    let given: Targets = text.parse().unwrap_or_default();
    let default = given.default_level().unwrap_or(LevelFilter::INFO);
    let base = Targets::new()
        .with_default(default.min(LevelFilter::WARN))
        .with_target("lapin::channel", LevelFilter::OFF)
        .with_target("lapin::io_loop", LevelFilter::OFF)
        .with_target(OWN, default);
    given
        .into_iter()
        .filter(|(target, _)| !target.is_empty())
        .fold(base, |targets, (target, level)| {
            let cap = if is_own(&target) {
                LevelFilter::TRACE
            } else {
                LevelFilter::INFO
            };
            targets.with_target(target, level.min(cap))
        })
}

fn is_own(target: &str) -> bool {
    target
        .strip_prefix(OWN)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Logs where, and as much of the message as cannot hold data.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current();
    let backtrace = std::backtrace::Backtrace::capture();
    let backtrace = match backtrace.status() {
        std::backtrace::BacktraceStatus::Captured => backtrace.to_string(),
        _ => String::new(),
    };
    let payload = panic.payload();
    let message = match (
        payload.downcast_ref::<&'static str>(),
        payload.downcast_ref::<String>(),
    ) {
        (Some(literal), _) => literal,
        (None, Some(formatted)) => without_data(formatted),
        (None, None) => "(no message)",
    };
    tracing::error!(location, thread = thread.name(), message, backtrace, "panicked");
}

/// The part of a formatted panic message that comes from the standard library: the rest may quote anything.
fn without_data(message: &str) -> &str {
    const KNOWN: [&str; 8] = [
        "called `Result::unwrap()` on an `Err` value",
        "index out of bounds",
        "range start index",
        "range end index",
        "slice index starts at",
        "byte index",
        "assertion `left == right` failed",
        "there is no reactor running",
    ];
    let known = KNOWN.iter().find(|known| message.starts_with(*known));
    known.copied().unwrap_or("(withheld: it may hold data)")
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use tracing::Level;

    use super::*;

    /// Collects what is logged.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(filter: &str, json: bool, log: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let config = config::Telemetry {
            log: filter.into(),
            json,
            http_addr: None,
        };
        tracing::subscriber::with_default(subscriber(&config, false, move || writer.clone()), log);
        String::from_utf8(sink.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn libraries_are_quiet_and_never_below_info() {
        for (text, target, level, shown) in [
            ("info", "postroom::smtp", Level::INFO, true),
            ("info", "postroom::smtp", Level::DEBUG, false),
            ("info", "lapin", Level::WARN, true),
            ("info", "lapin", Level::INFO, false),
            ("info", "lapin::channels", Level::ERROR, false),
            ("info", "lapin::io_loop", Level::ERROR, false),
            ("info,lapin::channel=error", "lapin::channel", Level::ERROR, true),
            ("trace", "postroom", Level::TRACE, true),
            ("trace", "lapin::frames", Level::INFO, false),
            ("trace", "tokio_postgres::connect_raw", Level::DEBUG, false),
            ("info,lapin=trace", "lapin::frames", Level::INFO, true),
            ("info,lapin=trace", "lapin::frames", Level::DEBUG, false),
            (
                "warn,amq_protocol::frame=trace",
                "amq_protocol::frame",
                Level::TRACE,
                false,
            ),
            (
                "trace,a=trace,t=trace,h=trace,r=trace",
                "tokio_postgres",
                Level::DEBUG,
                false,
            ),
            ("trace,p=info", "postroom::db", Level::TRACE, true),
            (
                "info,postroom::smtp=debug",
                "postroom::smtp::pool",
                Level::DEBUG,
                true,
            ),
            ("info,postroom::smtp=debug", "postroom::db", Level::DEBUG, false),
            ("info,postroom_other=trace", "postroom_other", Level::DEBUG, false),
            ("error", "lapin", Level::WARN, false),
            ("off", "postroom", Level::ERROR, false),
        ] {
            assert_eq!(
                filter(text).would_enable(target, &level),
                shown,
                "{text}: {target} {level}"
            );
        }
    }

    #[test]
    fn a_json_line_is_one_object_with_its_fields_on_top() {
        let text = logged("info", true, || tracing::info!(job = "j1", "sent"));
        let line: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!(
            (line["message"].as_str(), line["job"].as_str()),
            (Some("sent"), Some("j1"))
        );
        assert_eq!(line["level"], "INFO");
    }

    #[test]
    fn human_lines_have_no_colours_outside_terminals() {
        let text = logged("info", false, || tracing::info!("sent"));
        assert!(
            text.contains("INFO") && text.contains("sent") && !text.contains('\x1b'),
            "{text:?}"
        );
    }

    #[test]
    fn panic_messages_keep_what_cannot_hold_data() {
        assert_eq!(
            without_data("index out of bounds: the len is 1"),
            "index out of bounds"
        );
        let unwrapped = without_data("called `Result::unwrap()` on an `Err` value: Auth(\"hunter2\")");
        assert_eq!(unwrapped, "called `Result::unwrap()` on an `Err` value");
        assert_eq!(without_data("hunter2"), "(withheld: it may hold data)");
    }

    /// Run by the test below in a process of its own, since the hook is for the whole process.
    #[test]
    fn what_a_panic_says_of_a_secret() {
        if std::env::var_os("POSTROOM_TEST_PANIC").is_none() {
            return;
        }
        init(&config::Telemetry {
            log: "trace".into(),
            json: true,
            http_addr: None,
        })
        .unwrap();
        let secret = secrecy::SecretString::from("Kanarienvogel");
        let text = secrecy::ExposeSecret::expose_secret(&secret);
        let refused = text.parse::<u8>().map_err(|_| text.to_owned());
        let _ = std::panic::catch_unwind(|| refused.unwrap());
        let _ = std::panic::catch_unwind(|| panic!("could not log in with {text}"));
        let _ = std::panic::catch_unwind(|| assert_eq!(text, "else", "{text}"));
        let _ = std::panic::catch_unwind(|| text[..50].to_owned());
        let _ = std::panic::catch_unwind(|| std::panic::panic_any(text.to_owned()));
    }

    #[test]
    fn a_panic_with_a_secret_in_its_message_is_logged_without_it() {
        let this = std::env::current_exe().unwrap();
        let output = std::process::Command::new(this)
            .args([
                "--exact",
                "telemetry::tests::what_a_panic_says_of_a_secret",
                "--nocapture",
            ])
            .env("POSTROOM_TEST_PANIC", "yes")
            .env("RUST_BACKTRACE", "full")
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert_eq!(said.matches(r#""message":"panicked""#).count(), 5, "{said}");
        assert!(!said.contains("Kanarienvogel"), "{said}");
    }
}
