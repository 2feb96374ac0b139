//! The order of columns in blocks.
//!
//! Blocks are in the order in which their part of the row is loaded ([`Simd::SPLITS`]), and so are the parameters of columns
//! that meet them ([`arrange`]). The last block of a part is filled up with zeros.
#![forbid(unsafe_code)]

use crate::bf16;
use crate::pass::Source;
use crate::simd::{Element, MAX_BLOCK, Simd};
use crate::view::Rows;

/// Columns of a part of `columns`, filled up to whole blocks.
#[inline(always)]
pub(in crate::pass) fn filled<S: Simd>(columns: usize) -> usize {
    columns.next_multiple_of(S::BLOCK)
}

/// Columns of all parts of `source`, filled up to whole blocks.
#[inline(always)]
pub(in crate::pass) fn width<S: Simd>(source: &Source<'_>) -> usize {
    source.parts.iter().flatten().map(|part| filled::<S>(part.1)).sum()
}

/// Whether blocks of `rows` come in split order.
#[inline(always)]
pub(super) fn split<S: Simd>(rows: &Rows<'_>) -> bool {
    match rows {
        Rows::F32(_) => S::SPLITS && f32::SPLIT,
        Rows::Bf16(_) => S::SPLITS && bf16::SPLIT,
    }
}

/// Numbers of the columns of `source` in the order of its blocks, zeros behind each part: `from` is `[columns]`, `to` is
/// [`width`] long.
#[inline(always)]
pub(in crate::pass) fn arrange<S: Simd>(source: &Source<'_>, from: &[f32], to: &mut [f32]) {
    let (mut start, mut at) = (0, 0);
    for (rows, columns) in source.parts.iter().flatten() {
        let from = &from[start..start + columns];
        let to = &mut to[at..at + filled::<S>(*columns)];
        start += columns;
        at += to.len();
        if !split::<S>(rows) {
            to[..from.len()].copy_from_slice(from);
            to[from.len()..].fill(0.0);
            continue;
        }
        let mut pairs = from.chunks_exact(2 * S::LANES);
        let mut places = to.chunks_exact_mut(2 * S::LANES);
        for (from, to) in (&mut pairs).zip(&mut places) {
            deal::<S>(from, to);
        }
        let mut last = [0.0; MAX_BLOCK / 2];
        last[..pairs.remainder().len()].copy_from_slice(pairs.remainder());
        for to in places {
            deal::<S>(&last, to);
            last.fill(0.0);
        }
    }
}

/// Half a block in split order: the even ones of `from`, then the odd ones.
#[inline(always)]
fn deal<S: Simd>(from: &[f32], to: &mut [f32]) {
    let from = &from[..2 * S::LANES];
    let (even, odd) = to[..2 * S::LANES].split_at_mut(S::LANES);
    for i in 0..S::LANES {
        (even[i], odd[i]) = (from[2 * i], from[2 * i + 1]);
    }
}

/// The inverse of [`arrange`].
#[inline(always)]
pub(in crate::pass) fn restore<S: Simd>(s: S, source: &Source<'_>, from: &[f32], to: &mut [f32]) {
    let (mut start, mut at) = (0, 0);
    for (rows, columns) in source.parts.iter().flatten() {
        let to = &mut to[start..start + columns];
        let from = &from[at..at + filled::<S>(*columns)];
        start += columns;
        at += from.len();
        if !split::<S>(rows) {
            to.copy_from_slice(&from[..to.len()]);
            continue;
        }
        for (to, from) in to.chunks_mut(S::BLOCK).zip(from.chunks_exact(S::BLOCK)) {
            let (block, mut all) = (s.join(f32::load_block(s, from)), [0.0; MAX_BLOCK]);
            for (v, all) in block.into_iter().zip(all.chunks_exact_mut(S::LANES)) {
                s.store(v, all);
            }
            to.copy_from_slice(&all[..to.len()]);
        }
    }
}
