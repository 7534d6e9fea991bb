//! The bridge against a real Postgres and real HTTP.

mod delivers;
mod disables;
mod hostile;
mod isolates;
mod manages;
mod reads;
mod world;
