//! Walks over some rows, block by block: what a block is put through, and where it goes.
#![forbid(unsafe_code)]

mod function;
mod order;
mod sink;

use std::ops::Range;

use crate::arch::claim;
use crate::simd::shorts::{Pair, Shorts};
use crate::simd::{BLOCK_VECTORS, Block, Element, MAX_BLOCK, Simd, SimdOp};
use crate::view::Rows;

use super::Source;
pub(super) use function::{Activate, Affine, AffineSilu, Function, Same, Standard};
pub(super) use order::{arrange, filled, restore, width};
use sink::Part;
pub(super) use sink::{Codes, Elements, HighCodes, Keep, KeepPairs, LowCodes, Most, ScaledCodes, Sink, Sums};

/// How many bytes ahead of a sweep memory is asked for, at least: about two pages, which hardware does not look beyond.
pub(super) const AHEAD: usize = 4096;

/// What a sweep asks of memory beforehand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ahead<'a> {
    /// Of the source.
    pub(super) source: Distance,
    /// Rows of as many codes as the number says, of which those of the sweep's rows are to be written soon.
    pub(super) claim: Option<(&'a [u8], usize)>,
}

/// How far before a row of the source is needed it is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Distance {
    /// It is there.
    None,
    /// By [`AHEAD`] bytes.
    Bytes,
    /// By as many rows.
    Rows(usize),
}

impl Ahead<'_> {
    /// Nothing.
    pub(super) const NONE: Self = Ahead { source: Distance::None, claim: None };
    /// For rows that have not been read.
    pub(super) const SOURCE: Self = Ahead { source: Distance::Bytes, claim: None };
}

/// A row of the output.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Row {
    /// Its number.
    pub(super) row: usize,
    /// The row of the source that it is made of.
    pub(super) pixel: usize,
    /// `1 / scale` of its codes.
    pub(super) inverse: f32,
    /// The same for 16-bit numbers, times 2^15.
    pub(super) times: i16,
    /// `rstd` and `-mean * rstd`, for layer norm.
    pub(super) standard: [f32; 2],
}

impl Row {
    /// Where its part lies among rows of `stride`.
    #[inline(always)]
    fn columns(&self, stride: usize, part: Part) -> Range<usize> {
        let start = self.row * stride + part.column;
        start..start + part.columns
    }
}

impl Part {
    /// Where it lies in row `i` of rows of `width`.
    #[inline(always)]
    fn of_kept(self, i: usize, width: usize) -> Range<usize> {
        let start = i * width + self.at;
        start..start + self.filled
    }
}

/// What blocks consist of.
pub(super) trait Kind {
    /// A block.
    type Block<S: Simd>: Copy;
}

/// f32.
pub(super) struct Floats;

impl Kind for Floats {
    type Block<S: Simd> = Block<S::F>;
}

/// i16, on tiers that have [`Shorts`].
pub(super) struct Pairs;

impl Kind for Pairs {
    type Block<S: Simd> = Pair<<S::Shorts as Shorts>::V>;
}

/// The 16-bit numbers of a tier that is known to have them.
#[inline(always)]
fn shorts<S: Simd>(s: S) -> S::Shorts {
    s.shorts().expect("rows of 16-bit numbers are made by tiers that have them")
}

/// Makes `rows` of `source` and hands them to `sink`.
pub(super) struct Sweep<'a, F, K> {
    pub(super) source: &'a Source<'a>,
    pub(super) rows: &'a [Row],
    pub(super) ahead: Ahead<'a>,
    pub(super) function: F,
    pub(super) sink: K,
}

impl<F: Function, K: Sink<Kind = F::Kind>> SimdOp for Sweep<'_, F, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for (rows, part) in parts::<S>(self.source) {
            match rows {
                Rows::F32(data) => self.part(s, data, part),
                Rows::Bf16(data) => self.part(s, data, part),
            }
        }
    }
}

impl<F: Function, K: Sink<Kind = F::Kind>> Sweep<'_, F, K> {
    #[inline(always)]
    fn part<S: Simd, T: Element>(&mut self, s: S, data: &[T], part: Part) {
        let data = |_, row: &Row| &data[row.pixel * part.columns..(row.pixel + 1) * part.columns];
        let split = S::SPLITS && T::SPLIT;
        sweep(s, self.rows, data, part, split, self.ahead, self.function, &mut self.sink);
    }
}

/// Hands rows that were kept, `width` each, to `sink`.
pub(super) struct SweepKept<'a, K> {
    pub(super) source: &'a Source<'a>,
    pub(super) rows: &'a [Row],
    pub(super) kept: &'a [f32],
    pub(super) width: usize,
    pub(super) sink: K,
}

impl<K: Sink<Kind = Floats>> SimdOp for SweepKept<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for (rows, part) in parts::<S>(self.source) {
            let data = |i, _: &Row| &self.kept[part.of_kept(i, self.width)];
            if order::split::<S>(&rows) {
                sweep(s, self.rows, data, part, true, Ahead::NONE, Same, &mut self.sink);
            } else {
                sweep(s, self.rows, data, part, false, Ahead::NONE, Same, &mut self.sink);
            }
        }
    }
}

/// Hands rows of 16-bit numbers that were kept, `width` each, to `sink`.
pub(super) struct SweepPairs<'a, K> {
    pub(super) source: &'a Source<'a>,
    pub(super) rows: &'a [Row],
    pub(super) kept: &'a [i16],
    pub(super) width: usize,
    pub(super) sink: K,
}

impl<K: Sink<Kind = Pairs>> SimdOp for SweepPairs<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for (rows, part) in parts::<S>(self.source) {
            if order::split::<S>(&rows) {
                self.part(s, part, true);
            } else {
                self.part(s, part, false);
            }
        }
    }
}

impl<K: Sink<Kind = Pairs>> SweepPairs<'_, K> {
    #[inline(always)]
    fn part<S: Simd>(&mut self, s: S, part: Part, split: bool) {
        for (i, row) in self.rows.iter().enumerate() {
            let kept = &self.kept[part.of_kept(i, self.width)];
            let mut state = self.sink.begin(s, row);
            let [slot] = self.sink.slots([(i, row)], part);
            let (full, rest) = slot.split_at_mut(part.columns - part.columns % S::BLOCK);
            let (blocks, last) = kept.split_at(full.len());
            for (block, slot) in blocks.chunks_exact(S::BLOCK).zip(full.chunks_exact_mut(S::BLOCK)) {
                K::put(s, &mut state, load_pair(s, block), split, slot);
            }
            if !rest.is_empty() {
                K::put(s, &mut state, load_pair(s, last), split, rest);
            }
            self.sink.end(s, [state], [i]);
        }
    }
}

#[inline(always)]
fn load_pair<S: Simd>(s: S, block: &[i16]) -> <Pairs as Kind>::Block<S> {
    let (a, b) = block.split_at(2 * S::LANES);
    [shorts(s).load(a), shorts(s).load(b)]
}

/// The parts of `source`, which is not copied: a copy is read again before it has left the store buffer.
#[inline(always)]
fn parts<'s, 'a, S: Simd>(source: &'s Source<'a>) -> impl Iterator<Item = (Rows<'a>, Part)> + use<'s, 'a, S> {
    let (mut at, mut column) = (0, 0);
    source.parts.iter().flatten().map(move |&(rows, columns)| {
        let part = Part { column, columns, at, filled: filled::<S>(columns) };
        at += part.filled;
        column += columns;
        (rows, part)
    })
}

/// Puts a part of `rows`, which `data` finds, filled up or not, through `function`: two rows at a time where their vectors have room in the
/// registers, for these share the parameters of columns, and the operations of one fill the time that the other waits for its own.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn sweep<'a, S: Simd, T: Element, F: Function, K: Sink<Kind = F::Kind>>(
    s: S,
    rows: &[Row],
    data: impl Fn(usize, &Row) -> &'a [T],
    part: Part,
    split: bool,
    ahead: Ahead<'_>,
    function: F,
    sink: &mut K,
) {
    let together = if S::REGISTERS >= 32 || F::SLOW { rows.len() / 2 } else { 0 };
    for i in (0..2 * together).step_by(2) {
        sweep_rows(s, [(i, &rows[i]), (i + 1, &rows[i + 1])], &data, part, split, ahead, function, sink);
    }
    for (i, row) in rows.iter().enumerate().skip(2 * together) {
        sweep_rows(s, [(i, row)], &data, part, split, ahead, function, sink);
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn sweep_rows<'a, S: Simd, T: Element, F: Function, K: Sink<Kind = F::Kind>, const N: usize>(
    s: S,
    rows: [(usize, &Row); N],
    data: impl Fn(usize, &Row) -> &'a [T],
    part: Part,
    split: bool,
    ahead: Ahead<'_>,
    function: F,
    sink: &mut K,
) {
    // Loops instead of closures for what consists of vectors: only what ends up in this function is compiled for the tier.
    let whole = part.columns - part.columns % S::BLOCK;
    let src = rows.map(|(i, row)| data(i, row));
    let places = rows.map(|(_, row)| row);
    let mut states = [sink.begin(s, places[0]); N];
    for (state, row) in states.iter_mut().zip(places) {
        *state = sink.begin(s, row);
    }
    let zeros = [[s.splat(0.0); BLOCK_VECTORS]; N];
    let mut slots = sink.slots(rows, part);
    // Whole rows, and as many as go together: each of these asks for what its successor needs.
    let bytes = part.columns.max(1) * size_of::<T>();
    let distance = match ahead.source {
        Distance::None => None,
        Distance::Bytes => Some(AHEAD.next_multiple_of(N * bytes)),
        Distance::Rows(n) => Some(n * bytes),
    };
    let claims = ahead.claim.map(|(codes, stride)| places.map(|row| &codes[row.columns(stride, part)]));
    let mut blocks = src.map(|src| src[..whole].chunks_exact(S::BLOCK));
    let mut outs = slots.each_mut().map(|slot| slot[..whole].chunks_exact_mut(S::BLOCK));
    for (i, columns) in function.columns::<S>(part.at).take(whole / S::BLOCK).enumerate() {
        let mut x = zeros;
        for (x, blocks) in x.iter_mut().zip(&mut blocks) {
            let block = blocks.next().expect("as many blocks in each row");
            if let Some(distance) = distance {
                for line in block.chunks_exact(64 / size_of::<T>()) {
                    s.prefetch(line, distance);
                }
            }
            *x = T::load_block(s, block);
        }
        if let Some(claims) = claims {
            for codes in claims {
                claim(codes.as_ptr().wrapping_add(i * S::BLOCK));
            }
        }
        let y = function.apply(s, x, places, columns, split);
        for ((y, state), out) in y.into_iter().zip(&mut states).zip(&mut outs) {
            K::put(s, state, y, split, out.next().expect("as many blocks in each row"));
        }
    }
    if whole < part.columns {
        let mut x = zeros;
        for (x, src) in x.iter_mut().zip(src) {
            let mut block = [T::ZERO; MAX_BLOCK];
            block[..src.len() - whole].copy_from_slice(&src[whole..]);
            *x = T::load_block(s, &block[..S::BLOCK]);
        }
        let columns = function.columns::<S>(part.at + whole).next();
        let columns = columns.expect("parameters of columns are filled up to whole blocks");
        let y = function.apply(s, x, places, columns, split);
        for ((y, state), slot) in y.into_iter().zip(&mut states).zip(slots) {
            K::put(s, state, y, split, &mut slot[whole..]);
        }
    }
    sink.end(s, states, rows.map(|(i, _)| i));
}
