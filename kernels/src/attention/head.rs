//! One head of an attention call: where its rows lie, how they are read and written, and what its mask hides.
#![forbid(unsafe_code)]

use crate::simd::{Element, MAX_LANES, Simd};
use crate::view::Rows;

use super::{AttentionShape, Mask};

/// Stands for a score of minus infinity: below every score that isn't masked, and where running maxima begin.
pub(super) const LEAST: f32 = -1e30;

/// Keys and values of one head.
#[derive(Clone, Copy)]
pub(super) struct KvHead<'a> {
    pub(super) k: Rows<'a>,
    pub(super) v: Rows<'a>,
    /// Element where key 0 begins.
    pub(super) start: usize,
    /// Elements from one key to the next.
    pub(super) stride: usize,
    pub(super) nk: usize,
    pub(super) d: usize,
}

/// Queries, outputs and mask of one head.
#[derive(Clone, Copy)]
pub(super) struct QueryHead<'a> {
    pub(super) shape: AttentionShape,
    pub(super) sequence: usize,
    pub(super) head: usize,
    pub(super) q: Rows<'a>,
    pub(super) stride: usize,
    pub(super) scale: f32,
    pub(super) mask: Mask<'a>,
}

impl KvHead<'_> {
    /// The element where `key` begins.
    pub(super) fn at(&self, key: usize) -> usize {
        self.start + key * self.stride
    }

    /// Asks for `n` keys and their values from `first` on: a head's parts of rows are too far apart to be foreseen.
    #[inline(always)]
    pub(super) fn prefetch<S: Simd>(&self, s: S, first: usize, n: usize) {
        let n = n.min(self.nk.saturating_sub(first));
        prefetch_rows(s, self.k, self.at(first), self.stride, n, self.d);
        prefetch_rows(s, self.v, self.at(first), self.stride, n, self.d);
    }
}

impl QueryHead<'_> {
    /// Keys that a block of `n` queries from `first` on has to look at.
    #[inline(always)]
    pub(super) fn keys_seen(&self, first: usize, n: usize) -> usize {
        match self.mask {
            Mask::Causal => self.shape.nk.min(first + n),
            _ => self.shape.nk,
        }
    }

    /// Asks for `n` queries from `first` on.
    #[inline(always)]
    pub(super) fn prefetch<S: Simd>(&self, s: S, first: usize, n: usize) {
        let AttentionShape { nq, d, .. } = self.shape;
        let start = (self.sequence * nq + first) * self.stride + self.head * d;
        prefetch_rows(s, self.q, start, self.stride, n.min(nq - first), d);
    }

    /// Writes queries `first .. first + n`, transposed, to `out`, `[d, n]`. Queries past the end are zero.
    #[inline(always)]
    pub(super) fn load_transposed<S: Simd>(&self, s: S, first: usize, n: usize, out: &mut [f32]) {
        for i in (0..n).step_by(S::LANES) {
            for c in (0..self.shape.d).step_by(S::LANES) {
                let square = self.columns(s, first + i, c);
                for (column, row) in square[..S::LANES].iter().zip(out[c * n..].chunks_exact_mut(n)) {
                    s.store(*column, &mut row[i..]);
                }
            }
        }
    }

    /// A vector of queries from `first` on in each of the columns from `column` on: vector `j` is column `column + j`. What
    /// lies outside is zero.
    #[inline(always)]
    pub(super) fn columns<S: Simd>(&self, s: S, first: usize, column: usize) -> [S::F; MAX_LANES] {
        let AttentionShape { nq, d, .. } = self.shape;
        let rows = S::LANES.min(nq.saturating_sub(first));
        let columns = S::LANES.min(d.saturating_sub(column));
        if rows == 0 || columns == 0 {
            return [s.splat(0.0); MAX_LANES];
        }
        let start = (self.sequence * nq + first) * self.stride + self.head * d + column;
        match self.q {
            Rows::F32(q) => load_square(s, &q[start..], self.stride, rows, columns),
            Rows::Bf16(q) => load_square(s, &q[start..], self.stride, rows, columns),
        }
    }

    /// Hides what the mask hides from scores `[keys, n]`; returns the factor that makes their exponentials powers of two.
    #[inline(always)]
    pub(super) fn mask<S: Simd>(
        &self,
        s: S,
        scores: &mut [f32],
        n: usize,
        first: usize,
        first_key: usize,
    ) -> f32 {
        let factor = self.scale * std::f32::consts::LOG2_E;
        match self.mask {
            Mask::None => factor,
            Mask::Causal => {
                let lanes: [f32; MAX_LANES] = std::array::from_fn(|i| i as f32);
                let lanes = s.load(&lanes);
                for (i, row) in scores.chunks_exact_mut(n).enumerate() {
                    let key = first_key + i;
                    if key <= first {
                        continue;
                    }
                    for (v, row) in row.chunks_exact_mut(S::LANES).enumerate() {
                        // Lane l is query first + v * LANES + l.
                        let position = s.splat(key as f32 - (first + v * S::LANES) as f32);
                        let hidden = s.splat(LEAST);
                        s.store(s.select_lt(lanes, position, hidden, s.load(row)), row);
                    }
                }
                factor
            }
            Mask::Bias(bias) => {
                let AttentionShape { nq, nk, .. } = self.shape;
                let keys = scores.len() / n;
                for query in (0..n.min(nq.saturating_sub(first))).step_by(S::LANES) {
                    let at = (self.head * nq + first + query) * nk + first_key;
                    let queries = S::LANES.min(nq - first - query);
                    for key in (0..keys).step_by(S::LANES) {
                        let columns = S::LANES.min(keys - key);
                        let square = load_square(s, &bias[at + key..], nk, queries, columns);
                        for (j, &b) in square[..columns].iter().enumerate() {
                            let row = &mut scores[(key + j) * n + query..];
                            let b = s.mul(s.max(b, s.splat(LEAST)), s.splat(std::f32::consts::LOG2_E));
                            s.store(s.fma(s.load(row), s.splat(factor), b), row);
                        }
                    }
                }
                1.0
            }
        }
    }

    /// Asks for the outputs of `n` queries from `first` on, so that [`QueryHead::finish`] doesn't wait for them.
    #[inline(always)]
    pub(super) fn prefetch_out<S: Simd>(&self, s: S, first: usize, n: usize, write: &impl Write) {
        let AttentionShape { nq, d, .. } = self.shape;
        for query in first..nq.min(first + n) {
            write.prefetch(s, self.out_at(query), d);
        }
    }

    /// The first element of query `query` in the output.
    #[inline(always)]
    pub(super) fn out_at(&self, query: usize) -> usize {
        let AttentionShape { nq, heads, d, .. } = self.shape;
        ((self.sequence * nq + query) * heads + self.head) * d
    }

    /// Hands out the outputs of queries `first .. first + n`: `acc`, `[d, n]`, over `sum`, `[n]`, row by row in vectors.
    /// `write(element, vector, lanes)` stores a vector's first lanes.
    #[inline(always)]
    pub(super) fn finish<S: Simd>(
        &self,
        s: S,
        first: usize,
        n: usize,
        acc: &[f32],
        sum: &[f32],
        write: &mut impl Write,
    ) {
        let AttentionShape { nq, d, .. } = self.shape;
        for query in (0..n.min(nq.saturating_sub(first))).step_by(S::LANES) {
            let inverse = s.div(s.splat(1.0), s.load(&sum[query..]));
            for c in (0..d).step_by(S::LANES) {
                let columns = S::LANES.min(d - c);
                let mut square = [s.splat(0.0); MAX_LANES];
                for (i, out) in square[..columns].iter_mut().enumerate() {
                    *out = s.mul(s.load(&acc[(c + i) * n + query..]), inverse);
                }
                s.transpose(&mut square[..S::LANES]);
                for (i, &row) in square[..S::LANES.min(nq - first - query)].iter().enumerate() {
                    write.write(s, self.out_at(first + query + i) + c, row, columns);
                }
            }
        }
    }
}

/// Asks for `n` rows of `d` elements, the first at `start`.
#[inline(always)]
fn prefetch_rows<S: Simd>(s: S, rows: Rows<'_>, start: usize, stride: usize, n: usize, d: usize) {
    #[inline(always)]
    fn rows_of<S: Simd, T>(s: S, x: &[T], start: usize, stride: usize, n: usize, d: usize) {
        let bytes = d * size_of::<T>();
        for i in 0..n {
            let row = &x[start + i * stride..];
            for at in (0..bytes).step_by(64) {
                s.prefetch(row, at);
            }
            s.prefetch(row, bytes - 1);
        }
    }
    match rows {
        Rows::F32(x) => rows_of(s, x, start, stride, n, d),
        Rows::Bf16(x) => rows_of(s, x, start, stride, n, d),
    }
}

/// Where finished outputs go.
pub(super) trait Write {
    /// Stores the first `lanes` lanes of `v` from element `at` on.
    fn write<S: Simd>(&mut self, s: S, at: usize, v: S::F, lanes: usize);
    /// Asks for `n` elements from `at` on.
    fn prefetch<S: Simd>(&self, s: S, at: usize, n: usize);
}

/// Loads a square of up to `LANES` rows and columns, transposed: vector `j` holds column `j`. What lies outside is zero.
#[inline(always)]
pub(super) fn load_square<S: Simd, T: Element>(
    s: S,
    src: &[T],
    stride: usize,
    rows: usize,
    columns: usize,
) -> [S::F; MAX_LANES] {
    let mut square = [s.splat(0.0); MAX_LANES];
    for (i, out) in square[..rows].iter_mut().enumerate() {
        let src = &src[i * stride..];
        *out = if columns == S::LANES { T::load(s, src) } else { T::load_partial(s, &src[..columns]) };
    }
    s.transpose(&mut square[..S::LANES]);
    square
}
