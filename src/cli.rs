//! The operator's command line.
pub mod dead;
pub mod send;
pub mod topology;
