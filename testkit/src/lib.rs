//! Servers the tests, the demo and the benchmarks of postroom talk to.
pub mod files;
pub mod s3;
