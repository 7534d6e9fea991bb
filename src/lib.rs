//! Postroom: the mail room for teams that run `RabbitMQ` and Postgres.
//!
//! Producers publish jobs; workers send them through each tenant's own SMTP account, within rolling limits that all
//! workers share, and publish every outcome; a bridge calls webhooks with it.
//!
//! ```text
//! RabbitMQ ─▶ arrival ─▶ admission ─▶ pipeline ─▶ settlement ─▶ ack ─▶ report ─▶ RabbitMQ ─▶ bridge ─▶ webhook
//!                            │ park                   │ park
//!                            ▼                        ▼
//!                        waiting room (Postgres) ─▶ dispatcher ─▶ pipeline …
//!
//! pipeline: resolve ─▶ fetch ─▶ compose ─▶ connect ─▶ slot ─▶ send
//! ```
//!
//! | layer | modules |
//! |---|---|
//! | processes and commands | [`cli`], [`worker`], [`bridge`] |
//! | an attempt and its consequences | [`pipeline`], [`settlement`] |
//! | stages | [`ledger`], [`directory`], [`attachment`], [`compose`], [`smtp`], [`egress`], [`endpoint`], [`broker`] |
//! | frame of a process | [`secret`], [`db`], [`health`], [`shutdown`], [`telemetry`] |
//! | settings and contract | [`config`], [`job`] |
//! | vocabulary | [`report`], [`fail_point`], [`failure`], [`retry`], [`id`], [`level`], [`address`], [`memory`] |
//!
//! A module uses its own layer and those below. `docs/architecture.md` follows a job through them.

// Alphabetical; the layers are above.
pub mod address;
pub mod attachment;
pub mod bridge;
pub mod broker;
pub mod cli;
pub mod compose;
pub mod config;
pub mod db;
pub mod directory;
pub mod egress;
pub mod endpoint;
pub mod fail_point;
pub mod failure;
pub mod health;
pub mod id;
pub mod job;
pub mod ledger;
pub mod level;
pub mod memory;
pub mod pipeline;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod properties;
pub mod report;
pub mod retry;
pub mod secret;
pub mod settlement;
pub mod shutdown;
pub mod smtp;
pub mod telemetry;
pub mod worker;
