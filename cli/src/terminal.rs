//! The two streams: results on stdout, everything else on stderr. A reader that has gone away is no fault.

use std::io::{IsTerminal, Write, stderr, stdout};

/// A result, on stdout.
pub(crate) fn print(text: &str) {
    let mut out = stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// A message, on stderr.
pub(crate) fn note(text: &str) {
    let _ = writeln!(stderr().lock(), "{text}");
}

/// Whether a person watches stderr.
pub(crate) fn is_watched() -> bool {
    stderr().is_terminal()
}
