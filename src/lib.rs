//! Postroom: the mail room for teams that run `RabbitMQ` and Postgres.
pub mod address;
pub mod attachment;
pub mod compose;
pub mod cli;
pub mod config;
pub mod db;
pub mod egress;
pub mod failure;
pub mod health;
pub mod id;
pub mod job;
pub mod ledger;
pub mod level;
pub mod report;
pub mod shutdown;
pub mod telemetry;
