//! How long each operation of a run took, and what it moved and multiplied.
#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One kernel call.
#[derive(Clone, Debug)]
pub struct Span {
    /// The layer it belongs to.
    pub path: String,
    /// What kind of work it is: `conv`, `linear`, `quantize`, `attention`, ...
    pub kind: &'static str,
    /// From the beginning of the profile.
    pub start: Duration,
    /// How long it took.
    pub time: Duration,
    /// Multiplications and additions of its matrix products.
    pub operations: u64,
    /// Bytes that it reads and writes, each counted once.
    pub bytes: u64,
}

/// The operations of a run in the order in which they ran.
#[derive(Debug)]
pub struct Profile {
    start: Instant,
    spans: Mutex<Vec<Span>>,
}

impl Default for Profile {
    fn default() -> Self {
        Profile { start: Instant::now(), spans: Mutex::default() }
    }
}

impl Profile {
    /// An operation that began at `since` and ended now. Of a call with no matrix product, `operations` are 0.
    pub(super) fn add(&self, path: &str, kind: &'static str, since: Instant, operations: u64, bytes: u64) {
        let (start, time) = (since - self.start, since.elapsed());
        let span = Span { path: path.into(), kind, start, time, operations, bytes };
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).push(span);
    }

    /// How many operations there are so far.
    pub fn len(&self) -> usize {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether nothing has run.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All operations so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
