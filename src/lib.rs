//! Postroom: the mail room for teams that run `RabbitMQ` and Postgres.
pub mod address;
pub mod broker;
pub mod cli;
pub mod config;
pub mod failure;
pub mod id;
pub mod job;
pub mod level;
pub mod report;
pub mod telemetry;
