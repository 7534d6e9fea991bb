//! Postroom: the mail room for teams that run `RabbitMQ` and Postgres.
pub mod address;
pub mod bridge;
pub mod config;
pub mod endpoint;
pub mod failure;
pub mod id;
pub mod job;
pub mod level;
pub mod report;
pub mod telemetry;
