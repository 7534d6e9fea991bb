//! The ledger against a real server: `POSTROOM_TEST_DATABASE_URL`. Every test has a schema of its own.

mod admission;
mod breaker;
mod crashes;
mod leases;
mod limits;
mod model;
mod odd;
mod parking;
mod reading;
mod releasing;
mod room;
mod runnable;
mod settling;
mod stress;
mod world;
