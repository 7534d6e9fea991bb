//! A file while it is read: its memory grows with it, and is cut to its size at the end.

use bytes::Bytes;

use super::memory::{Budget, Held};
use super::too_large;
use crate::failure::Failure;

/// Memory taken at first for a file of unknown length, in bytes; then as much again as it has, up to [`LARGEST_PIECE`].
const FIRST_PIECE: u64 = 64 << 10;

/// Most memory taken at a time beyond what a file is known to need, in bytes.
const LARGEST_PIECE: u64 = 1 << 20;

/// Which file it is, for the failure, and how large it may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// Name shown to the reader.
    pub(super) filename: &'a str,
    /// Most bytes it may have.
    pub(super) cap: u64,
}

/// What there is of a file.
#[derive(Debug)]
pub(super) struct Buffer<'a> {
    wanted: Wanted<'a>,
    budget: &'a Budget<'a>,
    bytes: Vec<u8>,
    held: Held,
    /// Bytes for which the job's budget was asked.
    counted: u64,
}

impl<'a> Buffer<'a> {
    /// For a file of this length, if it is known.
    pub(super) async fn new(
        wanted: Wanted<'a>,
        length: Option<u64>,
        budget: &'a Budget<'a>,
    ) -> Result<Self, Failure> {
        let counted = length.unwrap_or(0);
        if counted > wanted.cap {
            return Err(too_large(wanted.filename, wanted.cap));
        }
        budget.count(counted)?;
        let held = budget.hold(counted).await?;
        Ok(Self {
            bytes: Vec::with_capacity(counted as usize),
            wanted,
            budget,
            held,
            counted,
        })
    }

    /// Adds what came next.
    pub(super) async fn append(&mut self, more: &[u8]) -> Result<(), Failure> {
        let length = (self.bytes.len() + more.len()) as u64;
        if length > self.wanted.cap {
            return Err(too_large(self.wanted.filename, self.wanted.cap));
        }
        if length > self.counted {
            self.budget.count(length - self.counted)?;
            self.counted = length;
        }
        if length > self.held.bytes() {
            self.grow(length).await?;
        }
        self.bytes.extend_from_slice(more);
        Ok(())
    }

    /// The file, in no more memory than it needs. What is cached and counted by its length takes no more either.
    pub(super) fn finish(mut self) -> (Bytes, Held) {
        let length = self.bytes.len() as u64;
        let bytes = Bytes::from(self.bytes.into_boxed_slice());
        self.held.shrink(length);
        (bytes, self.held)
    }

    async fn grow(&mut self, length: u64) -> Result<(), Failure> {
        let has = self.held.bytes();
        let wanted = length
            .max(has + has.clamp(FIRST_PIECE, LARGEST_PIECE))
            .min(self.wanted.cap);
        self.budget.grow(&mut self.held, length, wanted).await?;
        let room = self.held.bytes() as usize - self.bytes.len();
        self.bytes.reserve_exact(room);
        // Others have their turn, however fast it comes or is unpacked.
        tokio::task::yield_now().await;
        Ok(())
    }
}
