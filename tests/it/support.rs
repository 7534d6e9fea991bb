//! What scenarios are made of: a [`World`] of one's own, the real binary in it, and waiting on conditions.
//!
//! ```ignore
//! let world = World::ready().await;                       // empty vhost and database, migrated, topology declared
//! world.postroom(&["tenant", "set", "acme"]).await.success();
//! let mut reports = world.reports().await;                // before anything is published
//! let worker = world.start_worker().await;                // a process; returns when /readyz says yes
//! world.publish(Level::High, "acme", &json!({"id": "1", "tenant": "acme", …})).await;
//! reports.until(|all| all.iter().any(|r| r.is_final())).await;
//! worker.term().await;
//! ```
//!
//! Never sleep for luck: use [`eventually`], or what waits by itself.

#![allow(
    dead_code,
    unused_imports,
    clippy::allow_attributes,
    reason = "scenarios come and go, the vocabulary stays; an expectation would break with every new scenario"
)]

mod amqp;
mod clients;
mod mail;
mod network;
mod private;
mod process;
mod reports;
mod wait;
mod world;

pub(crate) use amqp::{Amqp, producers_names};
pub(crate) use clients::{Clients, Program};
pub(crate) use mail::{header, mail, mails, most_within, taken, times};
pub(crate) use network::proxied;
pub(crate) use private::{POSTGRES, Private, RABBITMQ};
pub(crate) use process::{Finished, Process};
pub(crate) use reports::{Received, Reports};
pub(crate) use wait::{eventually, eventually_some};
pub(crate) use world::{World, new_key};
