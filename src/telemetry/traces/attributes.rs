//! Attributes of spans and resources.

use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};

/// Names with values, to be put together in one expression.
#[derive(Debug, Clone, Default)]
pub struct Attributes(Vec<KeyValue>);

impl Attributes {
    /// One more, a text.
    #[must_use]
    pub fn text(self, name: &str, value: impl Into<String>) -> Self {
        self.with(name, Value::StringValue(value.into()))
    }

    /// The same, if there is a value.
    #[must_use]
    pub fn text_if(self, name: &str, value: Option<impl Into<String>>) -> Self {
        match value {
            Some(value) => self.text(name, value),
            None => self,
        }
    }

    /// One more, a number.
    #[must_use]
    pub fn number(self, name: &str, value: impl Into<i64>) -> Self {
        self.with(name, Value::IntValue(value.into()))
    }

    /// A server's name and port.
    #[must_use]
    pub fn server(self, host: impl Into<String>, port: u16) -> Self {
        self.text("server.address", host).number("server.port", port)
    }

    pub(super) fn into_proto(self) -> Vec<KeyValue> {
        self.0
    }

    fn with(mut self, name: &str, value: Value) -> Self {
        self.0.push(KeyValue {
            key: name.to_owned(),
            value: Some(AnyValue { value: Some(value) }),
            ..KeyValue::default()
        });
        self
    }
}
