//! Servers that the tests, the demo and the benchmarks of postroom talk to.

pub mod webhook;
