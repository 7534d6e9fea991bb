//! Makes a report fit for a webhook: Standard Webhooks asks for bodies below 20 kB. The whole report stays on the
//! reports exchange.

use std::borrow::Cow;

use bytes::Bytes;
use serde_json::{Map, Value};

use crate::report::is_traceparent;

/// Longest body of a webhook, in bytes.
pub(super) const MAX_BODY: usize = 20_000;

/// The lists that may be cut.
const LISTS: [&str; 4] = ["recipients", "errors", "links", "tags"];

/// Checks that a report is a JSON object with `type` and `data`, and cuts it if it is too long: first the lists in `data`,
/// always the one that is longest by then (marked by `data.recipients_truncated`, say), then whole members of `data`, the
/// largest first (marked by `data.truncated`).
///
/// # Errors
/// If it is not such an object, or too long beside its `data`; the text says what is wrong, without repeating any of it.
pub(super) fn fitted(body: &Bytes) -> Result<Bytes, String> {
    let text = std::str::from_utf8(body).map_err(|_| "the report is not UTF-8".to_owned())?;
    let envelope: Envelope<'_> = serde_json::from_str(text).map_err(|error| describe(&error))?;
    if !envelope.data.get().starts_with('{') {
        return Err("`data` is not an object".to_owned());
    }
    if body.len() < MAX_BODY {
        return Ok(body.clone());
    }
    let mut report: Value = serde_json::from_str(text).map_err(|error| describe(&error))?;
    cut(&mut report);
    let fitted = report.to_string();
    if fitted.len() >= MAX_BODY {
        return Err("the report is too long even without its `data`".to_owned());
    }
    Ok(fitted.into())
}

/// The trace context of the job that a report is about, for the header of the same name.
pub(super) fn traceparent(body: &[u8]) -> Option<Cow<'_, str>> {
    #[derive(serde::Deserialize)]
    struct Traced<'a> {
        #[serde(borrow)]
        data: Data<'a>,
    }
    #[derive(serde::Deserialize)]
    struct Data<'a> {
        #[serde(borrow)]
        traceparent: Option<Cow<'a, str>>,
    }
    let report: Traced<'_> = serde_json::from_slice(body).ok()?;
    report.data.traceparent.filter(|text| is_traceparent(text))
}

/// What every report has; borrowed, so that checking an ordinary one copies nothing.
#[derive(serde::Deserialize)]
struct Envelope<'a> {
    #[serde(rename = "type")]
    _kind: Text,
    #[serde(borrow)]
    data: &'a serde_json::value::RawValue,
}

/// Any string, not kept.
struct Text;

impl<'de> serde::Deserialize<'de> for Text {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl serde::de::Visitor<'_> for Any {
            type Value = Text;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E>(self, _: &str) -> Result<Text, E> {
                Ok(Text)
            }
        }
        deserializer.deserialize_str(Any)
    }
}

/// serde's own texts may quote the input, which may hold addresses: only the place and the kind are told.
fn describe(error: &serde_json::Error) -> String {
    let kind = match error.classify() {
        serde_json::error::Category::Data => "has no `type` and `data`, or has them wrong",
        serde_json::error::Category::Eof => "ends too early",
        serde_json::error::Category::Syntax | serde_json::error::Category::Io => "is not JSON",
    };
    format!(
        "the report {kind} (line {}, column {})",
        error.line(),
        error.column()
    )
}

fn cut(report: &mut Value) {
    let excess = (report.to_string().len() + 1).saturating_sub(MAX_BODY);
    if let Some(data) = report.get_mut("data").and_then(Value::as_object_mut) {
        shorten(data, excess);
    }
    while report.to_string().len() >= MAX_BODY {
        let Some(data) = report.get_mut("data").and_then(Value::as_object_mut) else {
            return;
        };
        data.insert("truncated".to_owned(), true.into());
        let largest = data.iter().max_by_key(|(_, value)| value.to_string().len());
        let Some(name) = largest
            .map(|(name, _)| name.clone())
            .filter(|name| name != "truncated")
        else {
            return;
        };
        data.shift_remove(&name);
    }
}

/// Takes entries off the ends of the lists until `excess` bytes and the room for the marks are won, or all are empty.
fn shorten(data: &mut Map<String, Value>, excess: usize) {
    let mut lists: Vec<List> = LISTS
        .into_iter()
        .filter_map(|name| List::of(data, name))
        .collect();
    let mut wanted = excess as i64;
    while wanted > 0
        && let Some(longest) = lists.iter_mut().max_by_key(|list| list.bytes)
        && let Some(won) = longest.pop()
    {
        wanted -= won;
    }
    for list in lists.iter().filter(|list| list.is_cut) {
        if let Some(entries) = data.get_mut(list.name).and_then(Value::as_array_mut) {
            entries.truncate(list.entries.len());
        }
        data.insert(list.mark(), true.into());
    }
}

/// A list that may be cut, by the bytes of its entries.
struct List {
    name: &'static str,
    /// Each with a comma.
    entries: Vec<usize>,
    bytes: usize,
    is_cut: bool,
}

impl List {
    fn of(data: &Map<String, Value>, name: &'static str) -> Option<Self> {
        let entries = data.get(name)?.as_array()?;
        let entries: Vec<usize> = entries.iter().map(|entry| entry.to_string().len() + 1).collect();
        Some(Self {
            name,
            bytes: entries.iter().sum(),
            entries,
            is_cut: false,
        })
    }

    /// Takes off the last entry: what that wins, less than nothing if the mark of the list is longer.
    fn pop(&mut self) -> Option<i64> {
        let won = self.entries.pop()?;
        self.bytes -= won;
        let lost = if std::mem::replace(&mut self.is_cut, true) {
            0
        } else {
            self.mark().len() + r#""":true,"#.len()
        };
        Some(won as i64 - lost as i64)
    }

    fn mark(&self) -> String {
        format!("{}_truncated", self.name)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn report(recipients: usize, metadata: &str) -> Bytes {
        let recipients: Vec<Value> = (0..recipients)
            .map(|n| json!({"address": format!("user{n}@example.com"), "status": "accepted", "text": "x".repeat(n % 300)}))
            .collect();
        json!({"type": "mail.sent", "timestamp": "2026-01-01T00:00:00Z",
               "data": {"job": "1", "tenant": "acme", "recipients": recipients, "final": true, "metadata": {"m": metadata}}})
        .to_string()
        .into()
    }

    #[test]
    fn only_what_has_the_form_of_a_trace_context_becomes_a_header() {
        let of = |text: &str| {
            let body = json!({"type": "mail.sent", "data": {"job": "1", "traceparent": text}}).to_string();
            traceparent(body.as_bytes()).map(Cow::into_owned)
        };
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(of(good).as_deref(), Some(good));
        for bad in [
            "",
            "00-1",
            &good.to_uppercase(),
            &format!("{good}\r\nx: y"),
            &"0".repeat(129),
        ] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(
            traceparent(br#"{"type": "mail.sent", "data": {"traceparent": 1}}"#),
            None
        );
        assert_eq!(traceparent(b"{}"), None);
    }

    #[test]
    fn a_short_report_is_passed_on_byte_by_byte() {
        let body = Bytes::from_static(b"{ \"type\":\"mail.sent\",\n \"data\": {\"recipients\": [] } }");
        assert_eq!(fitted(&body).unwrap(), body);
    }

    #[test]
    fn the_recipients_of_a_long_report_are_cut_and_marked() {
        let body = report(400, "m");
        let fitted = fitted(&body).unwrap();
        assert!(
            fitted.len() < MAX_BODY && fitted.len() > MAX_BODY - 1000,
            "{}",
            fitted.len()
        );
        let (cut, whole): (Value, Value) = (
            serde_json::from_slice(&fitted).unwrap(),
            serde_json::from_slice(&body).unwrap(),
        );
        let kept = cut["data"]["recipients"].as_array().unwrap();
        assert_eq!(
            kept[..],
            whole["data"]["recipients"].as_array().unwrap()[..kept.len()]
        );
        assert_eq!(cut["data"]["recipients_truncated"], true);
        assert_eq!(cut["data"]["metadata"], whole["data"]["metadata"]);
        assert_eq!(cut["data"]["final"], true);
    }

    #[test]
    fn of_the_lists_of_a_long_report_the_longest_is_cut_and_only_what_was_cut_is_marked() {
        let list = |bytes: usize| -> Value {
            (0..bytes / 250)
                .map(|n| format!("{n}{}", "x".repeat(245)))
                .collect()
        };
        let short = json!(["ann@example.org"]);
        let table = [
            (json!([]), list(25_000), json!([]), &["errors"][..]),
            (short.clone(), json!([]), list(25_000), &["links"]),
            (list(25_000), json!([]), short, &["recipients"]),
            (list(13_000), list(3_000), list(14_000), &["recipients", "links"]),
        ];
        for (recipients, errors, links, expected) in table {
            let data = json!({"job": "1", "recipients": recipients, "errors": errors, "links": links});
            let body = json!({"type": "mail.sent", "data": data}).to_string();
            let fitted = fitted(&body.into()).unwrap();
            assert!(
                (MAX_BODY - 1000..MAX_BODY).contains(&fitted.len()),
                "{expected:?}"
            );
            let cut: Value = serde_json::from_slice(&fitted).unwrap();
            let cut = cut["data"].as_object().unwrap();
            for name in ["recipients", "errors", "links"] {
                let marked = cut.contains_key(&format!("{name}_truncated"));
                assert_eq!(marked, expected.contains(&name), "{name}: {expected:?}");
                assert_eq!(marked, cut[name] != data[name], "{name}: {expected:?}");
                assert!(!marked || cut[name] != json!([]), "{name}: {expected:?}");
            }
        }
    }

    #[test]
    fn what_is_no_report_is_refused_without_quoting_it() {
        for body in [
            "",
            "x",
            "[]",
            "null",
            "7",
            "{}",
            r#"{"type":1,"data":{}}"#,
            r#"{"type":"a"}"#,
            r#"{"type":"a","data":[]}"#,
            r#"{"type":"a","data":{}} x"#,
            "{\"type\":\"a\",\"data\":{\"a\":\"\u{0}\"}}",
        ] {
            let error = fitted(&Bytes::from(body)).unwrap_err();
            assert!(!error.contains('\u{0}') && error.len() < 120, "{body}: {error}");
        }
        for body in [
            &b"{\"type\":\"\xff\",\"data\":{}}"[..],
            b"{\"type\":\"a\",\"data\":{},\"x\":\"\xff\"}",
        ] {
            assert!(fitted(&Bytes::from_static(body)).is_err());
        }
    }

    #[test]
    fn a_report_that_is_long_beside_its_data_is_refused() {
        let body = json!({"type": "t".repeat(MAX_BODY), "data": {}}).to_string();
        let error = fitted(&body.into()).unwrap_err();
        assert!(error.contains("too long"), "{error}");
    }

    proptest! {
        #[test]
        fn whatever_is_long_in_a_report_it_fits_in_the_end(recipients in 0_usize..600, length in 0_usize..40_000) {
            let fitted = fitted(&report(recipients, &"ü".repeat(length))).unwrap();
            prop_assert!(fitted.len() < MAX_BODY);
            let value: Value = serde_json::from_slice(&fitted).unwrap();
            prop_assert_eq!(&value["data"]["job"], "1");
        }
    }
}
