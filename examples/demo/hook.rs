//! Reports as the webhooks brought them.

use postroom_testkit::webhook::Received;
use serde_json::Value;

use crate::plan::Outcome;
use crate::setup::World;

/// A report out of a webhook.
pub(crate) struct Hook {
    pub(crate) request: Received,
    pub(crate) json: Value,
}

impl Hook {
    fn new(request: Received) -> Self {
        Self {
            json: request.json(),
            request,
        }
    }

    pub(crate) fn kind(&self) -> &str {
        self.json["type"].as_str().unwrap_or_default()
    }

    pub(crate) fn data(&self, field: &str) -> &Value {
        &self.json["data"][field]
    }

    pub(crate) fn text(&self, field: &str) -> &str {
        self.data(field).as_str().unwrap_or_default()
    }

    pub(crate) fn is_final(&self) -> bool {
        self.data("final") == true
    }

    /// How it counts in the sum.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        Some(match self.kind() {
            "mail.sent" if self.data("partial") == true => Outcome::Partial,
            "mail.sent" => Outcome::Sent,
            "mail.failed" => Outcome::Failed,
            "mail.expired" => Outcome::Expired,
            "mail.rejected" => Outcome::Rejected,
            _ => return None,
        })
    }
}

/// All webhooks so far.
pub(crate) fn hooks(world: &World) -> Vec<Hook> {
    world.hooks.received().into_iter().map(Hook::new).collect()
}
