//! Servers and instruments for the tests, the demo and the benchmarks of postroom.
pub mod scratch;
pub mod tunnel;
