//! Postroom: the mail room for teams that run `RabbitMQ` and Postgres.
pub mod address;
pub mod attachment;
pub mod compose;
pub mod config;
pub mod db;
pub mod directory;
pub mod egress;
pub mod failure;
pub mod id;
pub mod job;
pub mod level;
pub mod report;
pub mod retry;
pub mod secret;
pub mod smtp;
pub mod telemetry;
