//! The SMTP client (RFC 5321): pooled connections, pipelined envelopes, one result per recipient.
//!
//! ```text
//! Pools::checkout → Lease::open (MAIL, RCPT…, DATA) → Transaction::finish (the mail) → Outcome
//!                 → Lease::deliver_at_once (MAIL, RCPT…, BDAT and the mail)         → Outcome
//! ```
//!
//! A [`Lease`] is a connection logged in and ready for MAIL. [`Lease::open`] announces the mail; it gives a
//! [`Transaction`] as soon as one recipient was accepted. Only [`Transaction::finish`] can end in a mail sent, so that
//! the last check whether we may still send stands between the two. Where the server offers CHUNKING and PIPELINING,
//! [`Lease::deliver_at_once`] needs one round trip for all; that check stands before it. Every refusal is classified where it is read
//! ([`classify`]) and carried to the end unchanged.
//!
//! lettre's low-level connection reads the replies. The socket (`wire`), the pool and the conversation are our own:
//! lettre's give up at the first refused recipient, wait for delayed acknowledgements, and bound only idle connections.

mod auth;
mod caps;
pub mod classify;
mod connection;
mod dial;
mod envelope;
mod extensions;
mod flight;
mod open;
mod pool;
mod probe;
mod reply;
mod server;
mod stuffing;
mod tls;
mod transaction;
mod trouble;
mod wire;

#[cfg(test)]
mod tests;

pub use caps::{CapsError, ConnectionCaps};
pub use envelope::{Envelope, RcptResult, Results, needs_utf8};
pub use extensions::Extensions;
pub use open::{Mail, OpenError};
pub use pool::{Capacity, CheckoutError, Lease, NotBegun, Pools};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use reply::ReplyText;
pub use server::{Credentials, Refusal, Resolver, Server, Submission};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use stuffing::Blocks;
pub use tls::TlsSetupError;
pub use transaction::{Outcome, Transaction};
