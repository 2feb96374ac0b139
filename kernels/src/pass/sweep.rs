//! Walks over some rows, block by block: what a block is put through, and where it goes.
//!
//! Blocks are in the order in which their part of the row is loaded ([`Simd::SPLITS`]), and so are the parameters of columns
//! that meet them ([`arrange`]). The last block of a part is filled up with zeros.
#![forbid(unsafe_code)]

use crate::bf16;
use crate::gemm::Activation;
use crate::math::{self, SiluPieces};
use crate::simd::{BLOCK_VECTORS, Block, Element, MAX_BLOCK, Simd, SimdOp};
use crate::view::Rows;

use super::Source;

/// How many bytes ahead of a sweep memory is asked for: about two pages, which hardware does not look beyond.
pub(super) const AHEAD: usize = 4096;

/// Columns of a part of `columns`, filled up to whole blocks.
#[inline(always)]
pub(super) fn filled<S: Simd>(columns: usize) -> usize {
    columns.next_multiple_of(S::BLOCK)
}

/// Columns of all parts of `source`, filled up to whole blocks.
#[inline(always)]
pub(super) fn width<S: Simd>(source: &Source<'_>) -> usize {
    source.parts.iter().flatten().map(|part| filled::<S>(part.1)).sum()
}

/// Whether blocks of `rows` come in split order.
#[inline(always)]
fn split<S: Simd>(rows: &Rows<'_>) -> bool {
    match rows {
        Rows::F32(_) => S::SPLITS && f32::SPLIT,
        Rows::Bf16(_) => S::SPLITS && bf16::SPLIT,
    }
}

/// Numbers of the columns of `source` in the order of its blocks, zeros behind each part: `from` is `[columns]`, `to` is
/// [`width`] long.
#[inline(always)]
pub(super) fn arrange<S: Simd>(source: &Source<'_>, from: &[f32], to: &mut [f32]) {
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
        for (i, to) in to.chunks_exact_mut(2 * S::LANES).enumerate() {
            let mut pairs = [0.0; MAX_BLOCK / 2];
            let from = &from[from.len().min(2 * i * S::LANES)..from.len().min(2 * (i + 1) * S::LANES)];
            pairs[..from.len()].copy_from_slice(from);
            let (even, odd) = to.split_at_mut(S::LANES);
            for ((even, odd), pair) in even.iter_mut().zip(odd).zip(pairs.as_chunks::<2>().0) {
                [*even, *odd] = *pair;
            }
        }
    }
}

/// The inverse of [`arrange`].
#[inline(always)]
pub(super) fn restore<S: Simd>(s: S, source: &Source<'_>, from: &[f32], to: &mut [f32]) {
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

/// A row of the output.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Row {
    /// Its number.
    pub(super) row: usize,
    /// The row of the source that it is made of.
    pub(super) pixel: usize,
    /// `1 / scale` of its codes.
    pub(super) inverse: f32,
    /// `rstd` and `-mean * rstd`, for layer norm.
    pub(super) standard: [f32; 2],
}

/// What a block is put through.
pub(super) trait Function: Copy {
    /// What becomes of the block at place `at` of `row`.
    fn apply<S: Simd>(&self, s: S, x: Block<S::F>, row: &Row, at: usize) -> Block<S::F>;
}

/// `x`.
#[derive(Clone, Copy)]
pub(super) struct Same;

impl Function for Same {
    #[inline(always)]
    fn apply<S: Simd>(&self, _: S, x: Block<S::F>, _: &Row, _: usize) -> Block<S::F> {
        x
    }
}

/// `x * factor[c] + offset[c]`.
#[derive(Clone, Copy)]
pub(super) struct Affine<'a> {
    pub(super) factor: &'a [f32],
    pub(super) offset: &'a [f32],
}

impl Function for Affine<'_> {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, mut x: Block<S::F>, _: &Row, at: usize) -> Block<S::F> {
        let factor = f32::load_block(s, &self.factor[at..at + S::BLOCK]);
        let offset = f32::load_block(s, &self.offset[at..at + S::BLOCK]);
        for i in 0..BLOCK_VECTORS {
            x[i] = s.fma(x[i], factor[i], offset[i]);
        }
        x
    }
}

/// `(x - mean) * rstd * factor[c] + offset[c]`.
#[derive(Clone, Copy)]
pub(super) struct Standard<'a>(pub(super) Affine<'a>);

impl Function for Standard<'_> {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, mut x: Block<S::F>, row: &Row, at: usize) -> Block<S::F> {
        let [rstd, shift] = row.standard;
        for x in &mut x {
            *x = s.fma(*x, s.splat(rstd), s.splat(shift));
        }
        self.0.apply(s, x, row, at)
    }
}

/// SiLU of `x * factor[c] + offset[c]`, from pieces.
#[derive(Clone, Copy)]
pub(super) struct AffineSilu<'a>(pub(super) Affine<'a>, pub(super) &'a SiluPieces);

impl Function for AffineSilu<'_> {
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, x: Block<S::F>, row: &Row, at: usize) -> Block<S::F> {
        self.1.of(s, self.0.apply(s, x, row, at))
    }
}

/// Where the blocks of some rows go.
pub(super) trait Sink {
    /// What is known of a part of a row.
    type State<S: Simd>: Copy;
    /// Before the first block.
    fn begin<S: Simd>(&self, s: S) -> Self::State<S>;
    /// Takes `len` numbers for column `column` on, at place `at` of row `i` of those; in split order if `split`.
    fn put<S: Simd>(&mut self, s: S, state: &mut Self::State<S>, y: Block<S::F>, split: bool, to: Place<'_>);
    /// After the last block of a part of row `i`.
    fn end<S: Simd>(&mut self, s: S, state: Self::State<S>, i: usize);
}

/// Where a block belongs.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    row: &'a Row,
    /// Of the rows that are made together.
    i: usize,
    /// Of the row, filled up to whole blocks.
    at: usize,
    /// Of the row in the output.
    column: usize,
    /// Numbers.
    len: usize,
}

/// `round(y * inverse + shift) + 128` in rows of `stride`.
pub(super) struct Codes<'a> {
    pub(super) codes: &'a mut [u8],
    pub(super) stride: usize,
    pub(super) shift: f32,
}

impl Sink for Codes<'_> {
    type State<S: Simd> = ();

    #[inline(always)]
    fn begin<S: Simd>(&self, _: S) {}

    #[inline(always)]
    fn put<S: Simd>(&mut self, s: S, (): &mut (), mut y: Block<S::F>, split: bool, to: Place<'_>) {
        for y in &mut y {
            *y = s.fma(*y, s.splat(to.row.inverse), s.splat(self.shift));
        }
        Rounded { codes: &mut *self.codes, stride: self.stride }.put(s, &mut (), y, split, to);
    }

    #[inline(always)]
    fn end<S: Simd>(&mut self, _: S, (): (), _: usize) {}
}

/// `round(y) + 128` in rows of `stride`.
pub(super) struct Rounded<'a> {
    pub(super) codes: &'a mut [u8],
    pub(super) stride: usize,
}

impl Sink for Rounded<'_> {
    type State<S: Simd> = ();

    #[inline(always)]
    fn begin<S: Simd>(&self, _: S) {}

    #[inline(always)]
    fn put<S: Simd>(&mut self, s: S, (): &mut (), y: Block<S::F>, split: bool, to: Place<'_>) {
        let codes = &mut self.codes[to.row.row * self.stride + to.column..][..to.len];
        if to.len == S::BLOCK {
            s.store_codes_block(y, split, codes);
        } else {
            let mut all = [0; MAX_BLOCK];
            s.store_codes_block(y, split, &mut all);
            codes.copy_from_slice(&all[..to.len]);
        }
    }

    #[inline(always)]
    fn end<S: Simd>(&mut self, _: S, (): (), _: usize) {}
}

/// `y` as elements of a tensor in rows of `stride`.
pub(super) struct Elements<'a, T> {
    pub(super) out: &'a mut [T],
    pub(super) stride: usize,
}

impl<T: Element> Sink for Elements<'_, T> {
    type State<S: Simd> = ();

    #[inline(always)]
    fn begin<S: Simd>(&self, _: S) {}

    #[inline(always)]
    fn put<S: Simd>(&mut self, s: S, (): &mut (), y: Block<S::F>, split: bool, to: Place<'_>) {
        let y = if split { s.join(y) } else { y };
        let out = &mut self.out[to.row.row * self.stride + to.column..][..to.len];
        if to.len == S::BLOCK {
            for (y, out) in y.into_iter().zip(out.chunks_exact_mut(S::LANES)) {
                T::store(s, y, out);
            }
        } else {
            let mut all = [T::ZERO; MAX_BLOCK];
            for (y, all) in y.into_iter().zip(all.chunks_exact_mut(S::LANES)) {
                T::store(s, y, all);
            }
            out.copy_from_slice(&all[..to.len]);
        }
    }

    #[inline(always)]
    fn end<S: Simd>(&mut self, _: S, (): (), _: usize) {}
}

/// Keeps the rows, `width` each, in the order of blocks, and their greatest magnitudes.
pub(super) struct Keep<'a> {
    pub(super) kept: &'a mut [f32],
    pub(super) width: usize,
    pub(super) most: &'a mut [f32],
}

impl Sink for Keep<'_> {
    type State<S: Simd> = Block<S::F>;

    #[inline(always)]
    fn begin<S: Simd>(&self, s: S) -> Block<S::F> {
        [s.splat(0.0); BLOCK_VECTORS]
    }

    #[inline(always)]
    fn put<S: Simd>(&mut self, s: S, most: &mut Block<S::F>, y: Block<S::F>, _: bool, to: Place<'_>) {
        let kept = &mut self.kept[to.i * self.width + to.at..][..S::BLOCK];
        for (i, kept) in kept.chunks_exact_mut(S::LANES).enumerate() {
            s.store(y[i], kept);
            most[i] = s.max_abs(y[i], most[i]);
        }
    }

    #[inline(always)]
    fn end<S: Simd>(&mut self, s: S, [a, b, c, d]: Block<S::F>, i: usize) {
        self.most[i] = s.max_lane(s.max(s.max(a, b), s.max(c, d))).max(self.most[i]);
    }
}

/// The greatest magnitudes of rows.
pub(super) struct Most<'a>(pub(super) &'a mut [f32]);

impl Sink for Most<'_> {
    type State<S: Simd> = Block<S::F>;

    #[inline(always)]
    fn begin<S: Simd>(&self, s: S) -> Block<S::F> {
        [s.splat(0.0); BLOCK_VECTORS]
    }

    #[inline(always)]
    fn put<S: Simd>(&mut self, s: S, most: &mut Block<S::F>, y: Block<S::F>, _: bool, _: Place<'_>) {
        for (y, most) in y.into_iter().zip(most) {
            *most = s.max_abs(y, *most);
        }
    }

    #[inline(always)]
    fn end<S: Simd>(&mut self, s: S, [a, b, c, d]: Block<S::F>, i: usize) {
        self.0[i] = s.max_lane(s.max(s.max(a, b), s.max(c, d))).max(self.0[i]);
    }
}

/// Sums of rows, and sums of squares.
pub(super) struct Sums<'a>(pub(super) &'a mut [[f32; 2]]);

impl Sink for Sums<'_> {
    type State<S: Simd> = [Block<S::F>; 2];

    #[inline(always)]
    fn begin<S: Simd>(&self, s: S) -> Self::State<S> {
        [[s.splat(0.0); BLOCK_VECTORS]; 2]
    }

    #[inline(always)]
    fn put<S: Simd>(&mut self, s: S, sums: &mut Self::State<S>, y: Block<S::F>, _: bool, _: Place<'_>) {
        for i in 0..BLOCK_VECTORS {
            sums[0][i] = s.add(y[i], sums[0][i]);
            sums[1][i] = s.fma(y[i], y[i], sums[1][i]);
        }
    }

    #[inline(always)]
    fn end<S: Simd>(&mut self, s: S, sums: Self::State<S>, i: usize) {
        for (to, [a, b, c, d]) in self.0[i].iter_mut().zip(sums) {
            *to += s.sum(s.add(s.add(a, b), s.add(c, d)));
        }
    }
}

/// Makes `rows` of `source` and hands them to `sink`.
pub(super) struct Sweep<'a, F, K> {
    pub(super) source: &'a Source<'a>,
    pub(super) rows: &'a [Row],
    pub(super) function: F,
    pub(super) sink: K,
}

impl<F: Function, K: Sink> SimdOp for Sweep<'_, F, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (mut at, mut column) = (0, 0);
        for &(part, c) in self.source.parts.iter().flatten() {
            match part {
                Rows::F32(part) => self.part(s, part, c, at, column),
                Rows::Bf16(part) => self.part(s, part, c, at, column),
            }
            at += filled::<S>(c);
            column += c;
        }
    }
}

impl<F: Function, K: Sink> Sweep<'_, F, K> {
    /// The part of `c` columns from `column` on, at place `at`.
    #[inline(always)]
    fn part<S: Simd, T: Element>(&mut self, s: S, src: &[T], c: usize, at: usize, column: usize) {
        let split = S::SPLITS && T::SPLIT;
        let whole = c - c % S::BLOCK;
        for (i, row) in self.rows.iter().enumerate() {
            let src = &src[row.pixel * c..(row.pixel + 1) * c];
            let mut state = self.sink.begin(s);
            for j in (0..whole).step_by(S::BLOCK) {
                let block = &src[j..j + S::BLOCK];
                for line in block.chunks_exact(64 / size_of::<T>()) {
                    s.prefetch(line, AHEAD);
                }
                let y = self.function.apply(s, T::load_block(s, block), row, at + j);
                let to = Place { row, i, at: at + j, column: column + j, len: S::BLOCK };
                self.sink.put(s, &mut state, y, split, to);
            }
            if whole < c {
                let mut block = [T::ZERO; MAX_BLOCK];
                block[..c - whole].copy_from_slice(&src[whole..]);
                let y = T::load_block(s, &block[..S::BLOCK]);
                let y = self.function.apply(s, y, row, at + whole);
                let to = Place { row, i, at: at + whole, column: column + whole, len: c - whole };
                self.sink.put(s, &mut state, y, split, to);
            }
            self.sink.end(s, state, i);
        }
    }
}

/// Puts rows that were kept through an activation, as exact as the output, and multiplies them by the columns' factors.
pub(super) struct Activate<'a> {
    pub(super) rows: Keep<'a>,
    pub(super) activation: Activation,
    /// Whether the output has 16 bits or fewer.
    pub(super) coarse: bool,
    pub(super) factors: Option<&'a [f32]>,
}

impl SimdOp for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Keep { kept, width, most } = self.rows;
        let silu = self.coarse && self.activation == Activation::Silu;
        for (row, most) in kept.chunks_exact_mut(width.max(1)).zip(most) {
            let mut lanes = s.splat(0.0);
            for (i, x) in row.chunks_exact_mut(S::LANES).enumerate() {
                let v = s.load(x);
                let y = if silu { math::silu_coarse(s, v) } else { self.activation.apply(s, v) };
                let y = match self.factors {
                    Some(factors) => s.mul(y, s.load(&factors[i * S::LANES..])),
                    None => y,
                };
                s.store(y, x);
                lanes = s.max_abs(y, lanes);
            }
            *most = s.max_lane(lanes);
        }
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

impl<K: Sink> SimdOp for SweepKept<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (mut at, mut column) = (0, 0);
        for &(part, c) in self.source.parts.iter().flatten() {
            if split::<S>(&part) {
                self.part(s, c, at, column, true);
            } else {
                self.part(s, c, at, column, false);
            }
            at += filled::<S>(c);
            column += c;
        }
    }
}

impl<K: Sink> SweepKept<'_, K> {
    #[inline(always)]
    fn part<S: Simd>(&mut self, s: S, c: usize, at: usize, column: usize, split: bool) {
        for (i, row) in self.rows.iter().enumerate() {
            let kept = &self.kept[i * self.width + at..][..filled::<S>(c)];
            let mut state = self.sink.begin(s);
            for (j, block) in kept.chunks_exact(S::BLOCK).enumerate() {
                let j = j * S::BLOCK;
                let to = Place { row, i, at: at + j, column: column + j, len: S::BLOCK.min(c - j) };
                self.sink.put(s, &mut state, f32::load_block(s, block), split, to);
            }
            self.sink.end(s, state, i);
        }
    }
}
