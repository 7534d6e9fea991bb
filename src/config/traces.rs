//! Where spans go, and which there are: variables as the OpenTelemetry specification names and writes them.

use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use super::load::{FromSettings, Reader};
use super::parse::{self, Parsed};
use super::{Sampler, Traces};

impl FromSettings for Option<Traces> {
    fn read(r: &mut Reader<'_>) -> Option<Self> {
        let disabled = r.get("OTEL_SDK_DISABLED", |text| {
            let words = [("true", true), ("false", false)];
            parse::one_of(&text.to_ascii_lowercase(), &words)
        })?;
        // What is not used may be meant for other programs, whose endpoints need not be HTTP.
        if disabled {
            return Some(None);
        }
        let endpoint = if r.is_given("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") {
            r.optional("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector_url)
        } else {
            r.optional("OTEL_EXPORTER_OTLP_ENDPOINT", collector_url)
                .map(traces_of)
        };
        let Some(endpoint) = endpoint else {
            return Some(None);
        };
        let given = r.optional_secret("OTEL_EXPORTER_OTLP_HEADERS", |text| headers(text).map(drop));
        let protocol = r.get("OTEL_EXPORTER_OTLP_PROTOCOL", |text| {
            parse::one_of(text, &[("http/protobuf", ())])
        });
        let timeout = r.get("OTEL_EXPORTER_OTLP_TIMEOUT", |text| {
            parse::number(text, 1..=60_000)
        });
        let service_name = r.optional("OTEL_SERVICE_NAME", |text| Ok(text.to_owned()));
        let attributes = r.optional("OTEL_RESOURCE_ATTRIBUTES", pairs);
        let sampler = sampler(r);
        protocol?;
        Some(Some(Traces {
            endpoint: String::from(endpoint).into(),
            headers: header_values(given),
            timeout: Duration::from_millis(timeout?),
            service_name,
            attributes: attributes.unwrap_or_default(),
            sampler: sampler?,
        }))
    }
}

fn header_values(text: Option<SecretString>) -> Vec<(String, SecretString)> {
    let text = text.unwrap_or_default();
    // Checked when it was read.
    let headers = headers(text.expose_secret()).unwrap_or_default();
    headers
        .into_iter()
        .map(|(name, value)| (name, value.into()))
        .collect()
}

fn sampler(r: &mut Reader<'_>) -> Option<Sampler> {
    let ratio = r.get("OTEL_TRACES_SAMPLER_ARG", ratio);
    let kind = r.get("OTEL_TRACES_SAMPLER", |text| {
        let words = [
            ("always_on", (false, Some(1.0))),
            ("always_off", (false, Some(0.0))),
            ("traceidratio", (false, None)),
            ("parentbased_always_on", (true, Some(1.0))),
            ("parentbased_always_off", (true, Some(0.0))),
            ("parentbased_traceidratio", (true, None)),
        ];
        parse::one_of(text, &words)
    });
    let (ratio, (parent_based, fixed)) = (ratio?, kind?);
    Some(Sampler {
        parent_based,
        ratio: fixed.unwrap_or(ratio),
    })
}

/// Where a collector listens. Its credentials, if it wants any, are headers.
pub(super) fn collector_url(text: &str) -> Parsed<Url> {
    match Url::parse(text) {
        Ok(url)
            if matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.username().is_empty()
                && url.password().is_none() =>
        {
            Ok(url)
        }
        _ => Err(
            "give http://host:port or https://host:port, credentials as OTEL_EXPORTER_OTLP_HEADERS".into(),
        ),
    }
}

/// Where a collector takes spans, below the URL for all signals (OTLP 1.x, "Endpoint URLs for OTLP/HTTP").
fn traces_of(mut base: Url) -> Url {
    let path = format!("{}/v1/traces", base.path().trim_end_matches('/'));
    base.set_path(&path);
    base
}

/// `name=value,name=value`, values percent-encoded (W3C Baggage without properties).
pub(super) fn pairs(text: &str) -> Parsed<Vec<(String, String)>> {
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    items
        .map(|item| {
            let pair = item
                .split_once('=')
                .map(|(name, value)| (name.trim(), value.trim()));
            let decoded = pair
                .filter(|(name, _)| !name.is_empty())
                .and_then(|(name, value)| {
                    let value = percent_encoding::percent_decode_str(value).decode_utf8().ok()?;
                    Some((name.to_owned(), value.into_owned()))
                });
            decoded.ok_or_else(|| "give name=value pairs with commas, values percent-encoded".to_owned())
        })
        .collect()
}

/// Headers for the collector. An error does not repeat them.
pub(super) fn headers(text: &str) -> Parsed<Vec<(String, String)>> {
    use reqwest::header::{HeaderName, HeaderValue};
    let pairs = pairs(text)?;
    for (name, value) in &pairs {
        if name.parse::<HeaderName>().is_err() || HeaderValue::from_str(value).is_err() {
            return Err(
                "give names and values that HTTP headers may have, as name=value pairs with commas".into(),
            );
        }
    }
    Ok(pairs)
}

/// A share.
fn ratio(text: &str) -> Parsed<f64> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err("give a number from 0 to 1".into()),
    }
}
