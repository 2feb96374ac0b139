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

    /// Writes queries `first .. first + n`, transposed, to `out`, `[d, n]`. Queries past the end are zero.
    #[inline(always)]
    pub(super) fn load_transposed<S: Simd>(&self, s: S, first: usize, n: usize, out: &mut [f32]) {
        let start = (self.sequence * self.shape.nq + first) * self.stride + self.head * self.shape.d;
        let valid = n.min(self.shape.nq - first);
        match self.q {
            Rows::F32(q) => transpose_into(s, &q[start..], self.stride, valid, self.shape.d, n, out),
            Rows::Bf16(q) => transpose_into(s, &q[start..], self.stride, valid, self.shape.d, n, out),
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
                for query in (0..n.min(nq - first)).step_by(S::LANES) {
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

    /// The first element of query `query` in the output.
    #[inline(always)]
    fn out_at(&self, query: usize) -> usize {
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
        for query in (0..n.min(nq - first)).step_by(S::LANES) {
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

/// Where finished outputs go.
pub(super) trait Write {
    /// Stores the first `lanes` lanes of `v` from element `at` on.
    fn write<S: Simd>(&mut self, s: S, at: usize, v: S::F, lanes: usize);
}

/// `out[c, i] = src[i, c]`: `[d, n]` from `valid` rows of `d` columns, zeros where `i >= valid`.
#[inline(always)]
fn transpose_into<S: Simd, T: Element>(
    s: S,
    src: &[T],
    stride: usize,
    valid: usize,
    d: usize,
    n: usize,
    out: &mut [f32],
) {
    for i in (0..n).step_by(S::LANES) {
        for c in (0..d).step_by(S::LANES) {
            let columns = S::LANES.min(d - c);
            let rows = S::LANES.min(valid.saturating_sub(i));
            let square = if rows > 0 {
                load_square(s, &src[i * stride + c..], stride, rows, columns)
            } else {
                [s.splat(0.0); MAX_LANES]
            };
            for (j, &column) in square[..columns].iter().enumerate() {
                s.store(column, &mut out[(c + j) * n + i..]);
            }
        }
    }
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
