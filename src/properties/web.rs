//! URLs that tenants give, and reports on their way to webhooks.

use std::net::IpAddr;

use bytes::Bytes;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use url::{Host, Url};

use super::{Input, is_one_line};
use crate::bridge::intake::IncomingReport;
use crate::config::{Egress, JobLimits};
use crate::egress::EgressGuard;
use crate::endpoint;
use crate::job::Source;
use crate::job::decode::{Incoming, decode};

/// A URL of a webhook or an attachment.
pub fn url(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match endpoint::parse_url(&text) {
        Ok(url) => {
            assert!(text.len() <= 2048 && is_one_line(url.as_str()));
            assert!(url.fragment().is_none());
            check_url(&url);
        }
        Err(message) => assert!(is_one_line(&message), "{message:?}"),
    }
    let job = json!({"id": "1", "tenant": "acme", "to": "a@b.example", "subject": "s", "text": "t",
                     "attachments": [{"filename": "f", "url": text}]});
    let body = job.to_string();
    let incoming = Incoming {
        body: body.as_bytes(),
        ..Incoming::default()
    };
    if let Ok(job) = decode(&incoming, &JobLimits::default()) {
        for attachment in &job.attachments {
            if let Source::Url(url) = &attachment.source {
                check_url(url);
            }
        }
    }
}

fn check_url(url: &Url) {
    assert!(matches!(url.scheme(), "http" | "https"));
    assert!(url.username().is_empty() && url.password().is_none());
    assert_eq!(Url::parse(url.as_str()).as_ref(), Ok(url), "normal form");
    let guard = EgressGuard::new(Egress { allow: Vec::new() });
    if guard.check_url(url).is_ok() {
        let address: Option<IpAddr> = match url.host() {
            Some(Host::Ipv4(v4)) => Some(v4.into()),
            Some(Host::Ipv6(v6)) => Some(v6.into()),
            Some(Host::Domain(name)) => {
                assert!(name.parse::<IpAddr>().is_err(), "{name} is an address after all");
                None
            }
            None => panic!("a URL without a host"),
        };
        assert!(address.is_none_or(is_outside), "{address:?}");
    }
}

/// The standard library's view, apart from that of the guard.
fn is_outside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_unspecified()
                || v4.is_broadcast()
                || v4.is_multicast()
                || v4.is_documentation())
        }
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or_else(
            || {
                !(v6.is_loopback()
                    || v6.is_unspecified()
                    || v6.is_unique_local()
                    || v6.is_unicast_link_local()
                    || v6.is_multicast())
            },
            |v4| is_outside(v4.into()),
        ),
    }
}

/// A message in the queue of reports: event id, routing key, body.
pub fn report(data: &[u8]) {
    let mut input = Input::new(data);
    let (id, key) = (input.text(), input.text());
    let body = Bytes::copy_from_slice(input.bytes());
    match IncomingReport::read(Some(&id), &key, &body) {
        Ok(report) => {
            assert!(report.body.len() < 20_000);
            let text = std::str::from_utf8(&report.body).expect("a webhook gets UTF-8");
            serde_json::from_str::<IgnoredAny>(text).expect("a webhook gets JSON");
            // What has the form of JSON may still be no value: nested deeply, or with half a surrogate pair.
            if let Ok(value) = serde_json::from_str::<Value>(text) {
                assert!(value["data"].is_object() && value["type"].is_string());
            }
            assert!(key.starts_with(&format!("report.{}.", report.tenant)));
            assert!(!report.event_id.contains('.') && is_one_line(&report.event_id));
        }
        Err(problem) => assert!(problem.detail.len() <= 200 && is_one_line(&problem.detail)),
    }
}
