//! Values as people write them. Every function is pure, and its error says what is allowed.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;
use tracing_subscriber::filter::{LevelFilter, Targets};
use url::Url;

use super::Dsn;
use super::amqp_uri;
use crate::level::Level;

/// What a parser gives: the value, or what is allowed.
pub(super) type Parsed<T> = Result<T, String>;

const UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

/// `45s`, `10m`, `2h`, `30d`, `500ms`, and sums such as `1h30m`.
pub(super) fn duration(text: &str, range: RangeInclusive<Duration>) -> Parsed<Duration> {
    let allowed = || {
        let (from, to) = (show_duration(*range.start()), show_duration(*range.end()));
        format!("give a duration such as 45s, 10m, 2h or 30d, from {from} to {to}")
    };
    let millis = sum_of_units(text).ok_or_else(allowed)?;
    let duration = Duration::from_millis(millis);
    if range.contains(&duration) {
        Ok(duration)
    } else {
        Err(allowed())
    }
}

fn sum_of_units(text: &str) -> Option<u64> {
    let (mut rest, mut total) = (text, None);
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?);
        let (unit, after) = after.split_at(after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len()));
        let factor = UNITS.iter().find(|(name, _)| *name == unit)?.1;
        let part = number.parse::<u64>().ok()?.checked_mul(factor)?;
        total = Some(total.unwrap_or(0_u64).checked_add(part)?);
        rest = after;
    }
    total
}

/// A duration in its largest whole unit.
pub(super) fn show_duration(duration: Duration) -> String {
    let millis = duration.as_millis() as u64;
    let whole = |(_, factor): &&(&str, u64)| millis.is_multiple_of(*factor) && millis >= *factor;
    UNITS.iter().rev().find(whole).map_or_else(
        || "0s".into(),
        |(unit, factor)| format!("{}{unit}", millis / factor),
    )
}

/// `8MiB`, `512KiB`, `10MB`, or a number of bytes.
pub(super) fn size(text: &str, range: RangeInclusive<u64>) -> Parsed<u64> {
    let allowed = || {
        let (from, to) = (show_size(*range.start()), show_size(*range.end()));
        format!("give a size such as 512KiB or 8MiB, or a number of bytes, from {from} to {to}")
    };
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let factor: u64 = match unit.trim_start() {
        "" | "B" => 1,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(allowed()),
    };
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(allowed)?;
    if range.contains(&bytes) {
        Ok(bytes)
    } else {
        Err(allowed())
    }
}

fn show_size(bytes: u64) -> String {
    for (unit, factor) in [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes >= factor && bytes.is_multiple_of(factor) {
            return format!("{}{unit}", bytes / factor);
        }
    }
    format!("{bytes}B")
}

/// A whole number.
pub(super) fn number(text: &str, range: RangeInclusive<u64>) -> Parsed<u64> {
    let allowed = || format!("give a whole number from {} to {}", range.start(), range.end());
    let number = text.parse().map_err(|_| allowed())?;
    if range.contains(&number) {
        Ok(number)
    } else {
        Err(allowed())
    }
}

/// A positive factor.
pub(super) fn factor(text: &str) -> Parsed<f64> {
    match text.parse::<f64>() {
        Ok(factor) if factor > 0.0 && factor <= 1000.0 => Ok(factor),
        _ => Err("give a number above 0, at most 1000".into()),
    }
}

/// One word of several.
pub(super) fn one_of<T: Copy>(text: &str, words: &[(&str, T)]) -> Parsed<T> {
    words
        .iter()
        .find(|(word, _)| *word == text)
        .map(|(_, value)| *value)
        .ok_or_else(|| {
            let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            format!("give one of {}", words.join(", "))
        })
}

/// Name of the schema: an identifier that needs no quotes.
pub(super) fn schema(text: &str) -> Parsed<String> {
    let first = |c: char| c.is_ascii_lowercase() || c == '_';
    let fine = text.starts_with(first)
        && text.chars().all(|c| first(c) || c.is_ascii_digit())
        && text.len() <= 63
        && !text.starts_with("pg_");
    if fine {
        Ok(text.into())
    } else {
        Err(
            "give 1 to 63 lower-case letters, digits and underscores, beginning with a letter, not with pg_"
                .into(),
        )
    }
}

/// First part of exchange and queue names.
pub(super) fn prefix(text: &str) -> Parsed<String> {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let fine = text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(inner)
        && text.len() <= 64
        && text != "amq"
        && !text.starts_with("amq.");
    if fine {
        Ok(text.into())
    } else {
        Err("give 1 to 64 letters, digits, dots, dashes and underscores, beginning and ending with a letter or \
             digit; `amq.` is the broker's own"
            .into())
    }
}

/// `level:queue,level:queue`.
pub(super) fn queues(text: &str) -> Parsed<Vec<(Level, String)>> {
    let mut queues: Vec<(Level, String)> = Vec::new();
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let allowed = |why: &str| {
            Err(format!(
                "{why}; give level:queue pairs such as high:mail.jobs.acme, with commas"
            ))
        };
        let Some((level, queue)) = item.split_once(':') else {
            return allowed(&format!("`{item}` has no level"));
        };
        let Ok(level) = level.parse::<Level>() else {
            return allowed(&format!("`{level}` is no level (immediate, high, medium, low)"));
        };
        if queue.is_empty()
            || queue.len() > 255
            || queue.chars().any(char::is_control)
            || queue.starts_with("amq.")
        {
            return allowed(&format!("`{queue}` is no name for a queue"));
        }
        if queues.iter().any(|(_, known)| known == queue) {
            return allowed(&format!("`{queue}` is named twice"));
        }
        queues.push((level, queue.into()));
    }
    Ok(queues)
}

/// Whether Postroom makes this queue itself: consumed as a dedicated one too, its jobs would come at a level by chance, and
/// its dead letters or reports as jobs.
pub(super) fn is_own_queue(prefix: &str, queue: &str) -> bool {
    let Some(rest) = queue.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.')) else {
        return false;
    };
    match rest.strip_prefix("jobs.") {
        Some(name) => name == "dead" || name.parse::<Level>().is_ok(),
        None => matches!(rest, "unroutable" | "reports.bridge" | "reports.dead"),
    }
}

/// Networks in CIDR form; an address alone is a network of one.
pub(super) fn networks(text: &str) -> Parsed<Vec<IpNet>> {
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    items
        .map(|item| {
            let network = item.parse::<IpNet>().ok().or_else(|| item.parse::<IpAddr>().ok().map(IpNet::from));
            let network = network.ok_or_else(|| {
                format!("`{item}` is no network; give networks in CIDR form such as 10.0.0.0/8 or fd00::/8, with commas")
            })?;
            Ok(network.trunc())
        })
        .collect()
}

/// Where to listen, or `off`.
pub(super) fn http_addr(text: &str) -> Parsed<Option<SocketAddr>> {
    if text == "off" {
        return Ok(None);
    }
    let full = if text.starts_with(':') {
        format!("0.0.0.0{text}")
    } else {
        text.into()
    };
    let address = full
        .parse()
        .map_err(|_| "give address:port such as 0.0.0.0:9090 or [::]:9090, or off")?;
    Ok(Some(address))
}

/// `amqp://` or `amqps://`.
pub(super) fn amqp_url(text: &str) -> Parsed<()> {
    match amqp_uri(text) {
        Some(_) => Ok(()),
        None => Err(
            "give amqp://user:password@host:port/vhost, or amqps:// for TLS, what is special encoded (%2f)"
                .into(),
        ),
    }
}

/// Whether a broker's URL is one without TLS.
pub(super) fn is_plain_amqp(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| url.scheme() == "amqp")
}

/// `postgres://`.
pub(super) fn database_url(text: &str) -> Parsed<()> {
    let read = Dsn::parse(text).and_then(|dsn| dsn.for_driver());
    read.map(drop)
        .map_err(|why| format!("{why}; give postgres://user:password@host:port/database"))
}

/// Where large attachments go.
pub(super) fn storage_url(text: &str) -> Parsed<Url> {
    let allowed = "give s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///folder, \
                   without credentials (those are in AWS_* and the like)";
    match Url::parse(text) {
        Ok(url) if !url.username().is_empty() || url.password().is_some() => Err(allowed.into()),
        Ok(url) if matches!(url.scheme(), "s3" | "gs" | "az") && url.has_host() => Ok(url),
        Ok(url) if url.scheme() == "file" && url.path().len() > 1 && url.to_file_path().is_ok() => Ok(url),
        _ => Err(allowed.into()),
    }
}

/// Base of links.
pub(super) fn public_url(text: &str) -> Parsed<String> {
    match Url::parse(text) {
        Ok(url)
            if matches!(url.scheme(), "http" | "https") && url.has_host() && url.username().is_empty() =>
        {
            Ok(text.trim_end_matches('/').into())
        }
        _ => Err("give a URL that begins with https:// or http://".into()),
    }
}

/// A host's name or an address literal (RFC 5321 §4.1.1.1).
pub(super) fn ehlo_name(text: &str) -> Parsed<String> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    let literal = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|inner| {
            inner
                .strip_prefix("IPv6:")
                .unwrap_or(inner)
                .parse::<IpAddr>()
                .is_ok()
        });
    if literal || (text.len() <= 253 && text.split('.').all(label)) {
        Ok(text.into())
    } else {
        Err("give a host name such as mail.example.com, or an address such as [192.0.2.1]".into())
    }
}

/// Levels per target. A word alone must be a level: as a target, which it could be too, it would silence the rest.
pub(super) fn log_filter(text: &str) -> Parsed<String> {
    let fine = |directive: &str| match directive.rsplit_once('=') {
        Some((target, level)) => !target.is_empty() && level.parse::<LevelFilter>().is_ok(),
        None => directive.parse::<LevelFilter>().is_ok(),
    };
    if text.split(',').all(|directive| fine(directive.trim())) && text.parse::<Targets>().is_ok() {
        Ok(text.into())
    } else {
        Err(
            "give a level (off, error, warn, info, debug, trace), also per target: info,postroom::smtp=debug"
                .into(),
        )
    }
}
