//! The ledger against a real server: `POSTROOM_TEST_DATABASE_URL`. Every test has a schema of its own.

mod admission;
mod leases;
mod limits;
mod odd;
mod releasing;
mod settling;
mod world;
