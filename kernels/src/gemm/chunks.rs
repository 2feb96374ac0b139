//! How the inputs of a call are cut along `k`.
#![forbid(unsafe_code)]

use super::driver::PAIR;
use super::table::GemmKernel;
use crate::layout::TILE_K;
use crate::par::SCRATCH_BYTES;

/// Part of the inputs of some taps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    /// First tap.
    pub(super) tap: usize,
    /// Taps: more than one only where the kernel sums them at once.
    pub(super) taps: usize,
    /// First input, a multiple of [`TILE_K`].
    pub(super) k: usize,
    /// Inputs, padded to [`TILE_K`].
    pub(super) len: usize,
    /// Taps from the first of those that meet the same widened rows.
    pub(super) shift: usize,
    /// Whether it begins and ends the inputs that one accumulator sums.
    pub(super) first: bool,
    pub(super) last: bool,
}

/// Rows that are widened.
#[derive(Clone, Copy, Debug)]
pub(super) struct WidenedRows {
    /// Most of them at a time. Chunks are as long as so many allow, whichever rows a call has: where a chunk is rounded by itself,
    /// its length is part of the result.
    pub(super) rows: usize,
    /// Taps side by side that meet them.
    pub(super) line: usize,
}

/// Cuts the inputs so that a pair's weights stay where the kernel wants them, and the rows of a block fit their buffer, where
/// they are `widened`. Sums are of a tap if `by_tap`, of each chunk alone if `alone`.
pub(super) fn chunks(
    all_taps: usize,
    padded: usize,
    kernel: &GemmKernel,
    widened: Option<WidenedRows>,
    by_tap: bool,
    alone: bool,
) -> Vec<Chunk> {
    let mut most = (kernel.pair_bytes / (PAIR * kernel.types.tile_bytes()) * TILE_K).max(TILE_K);
    if let Some(WidenedRows { rows, .. }) = widened {
        most = most.min(rows_bytes() / (rows * kernel.types.row_bytes()));
    }
    // All taps of a filter at once where they fit, or a line of it: rows of pixels side by side are met again while they are
    // in the nearest cache.
    let line = all_taps.isqrt();
    // What comes from L2 for each tile costs vector kernels more than to keep the sums of a block between taps.
    let line_most = if kernel.fetches { most / 2 } else { most };
    let taps = match all_taps {
        _ if by_tap || widened.is_some() || kernel.taps < all_taps => 1,
        all if all * padded <= most => all,
        all if line * line == all && line * padded <= line_most => line,
        _ => 1,
    };
    most = (most / taps / TILE_K * TILE_K).max(TILE_K).min(padded);
    let pieces = padded.div_ceil(most.max(1)).max(1);
    let len = (padded / TILE_K).div_ceil(pieces) * TILE_K;
    let shifts = widened.map_or(1, |widened| widened.line);
    let mut chunks = vec![];
    for tap in (0..all_taps).step_by(taps * shifts) {
        for k in (0..padded.max(1)).step_by(len.max(1)) {
            let first = alone || by_tap && k == 0;
            for shift in 0..shifts {
                let tap = tap + shift;
                chunks.push(Chunk { tap, taps, k, len: len.min(padded - k), shift, first, last: false });
            }
        }
    }
    if let Some(first) = chunks.first_mut() {
        first.first = true;
    }
    for i in 0..chunks.len() {
        chunks[i].last = chunks.get(i + 1).is_none_or(|next| next.first);
    }
    chunks
}

/// Bytes of scratch memory for widened rows.
pub(super) const fn rows_bytes() -> usize {
    SCRATCH_BYTES / 16 * 5
}
