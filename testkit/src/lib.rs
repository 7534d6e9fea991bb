//! Servers and instruments for the tests, the demo and the benchmarks of postroom.
pub mod chaos;
pub mod collector;
pub mod files;
pub mod private;
pub mod proxy;
pub mod s3;
pub mod scratch;
pub mod smtp;
pub mod tls;
pub mod webhook;
