//! Attention in f32 on the vectors of any tier: lanes are queries, so that scores, maxima and sums of a block of queries
//! are element-wise, and every number of K and V is broadcast to a whole block.
#![forbid(unsafe_code)]

use crate::math;
use crate::simd::{Element, MAX_LANES, Simd, SimdOp};
use crate::view::Rows;

use super::AttentionShape;
use super::head::{KvHead, QueryHead, Write, load_square};
use super::softmax::Softmax;

/// Keys in a panel of K, and the multiple to which V's columns are padded.
const PANEL: usize = 8;

/// Keys that go through the running softmax at once.
const KEYS: usize = 128;

/// Vectors of queries in a block.
const NV: usize = 3;

/// Queries in a block on vectors of `lanes`.
pub(super) const fn queries(lanes: usize) -> usize {
    NV * lanes
}

/// f32 numbers that pack K: panels `[keys / 8][d][8]`, keys padded to 8.
pub(super) const fn k_elements(keys: usize, d: usize) -> usize {
    keys.next_multiple_of(PANEL) * d
}

/// f32 numbers that pack V: `[keys][d padded to 8]`.
pub(super) const fn v_elements(keys: usize, d: usize) -> usize {
    keys * d.next_multiple_of(PANEL)
}

/// Packs keys and values from `first` on: as many as `k` and `v` have room for.
pub(super) struct Pack<'a> {
    pub(super) head: KvHead<'a>,
    pub(super) first: usize,
    /// K's panels from key `first` on.
    pub(super) k: &'a mut [f32],
    /// V's rows from key `first` on.
    pub(super) v: &'a mut [f32],
}

impl SimdOp for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.head.prefetch(s, self.first, self.v.len() / self.head.d.next_multiple_of(PANEL));
        match (self.head.k, self.head.v) {
            (Rows::F32(k), Rows::F32(v)) => self.pack(s, k, v),
            (Rows::F32(k), Rows::Bf16(v)) => self.pack(s, k, v),
            (Rows::Bf16(k), Rows::F32(v)) => self.pack(s, k, v),
            (Rows::Bf16(k), Rows::Bf16(v)) => self.pack(s, k, v),
        }
    }
}

impl Pack<'_> {
    #[inline(always)]
    fn pack<S: Simd, K: Element, V: Element>(self, s: S, k: &[K], v: &[V]) {
        let KvHead { d, nk, .. } = self.head;
        let dv = d.next_multiple_of(PANEL);
        let mut column = [0.0; MAX_LANES];
        let panels = self.k.len() / (PANEL * d);
        for p in (0..panels).step_by(S::LANES.div_ceil(PANEL)) {
            for part in (0..PANEL).step_by(S::LANES) {
                let key = self.first + p * PANEL + part;
                let rows = S::LANES.min(nk.saturating_sub(key));
                for c in (0..d).step_by(S::LANES) {
                    let columns = S::LANES.min(d - c);
                    let square = if rows > 0 {
                        load_square(s, &k[self.head.at(key) + c..], self.head.stride, rows, columns)
                    } else {
                        [s.splat(0.0); MAX_LANES]
                    };
                    for (j, &keys) in square[..columns].iter().enumerate() {
                        s.store(keys, &mut column);
                        // A vector is a part of a panel's row, or the rows of two panels.
                        for (i, keys) in column[..S::LANES].chunks(PANEL).enumerate().take(panels - p) {
                            let at = ((p + i) * d + c + j) * PANEL + part;
                            self.k[at..at + keys.len()].copy_from_slice(keys);
                        }
                    }
                }
            }
        }
        for (i, out) in self.v.chunks_exact_mut(dv).enumerate() {
            out.fill(0.0);
            if self.first + i < nk {
                let at = self.head.at(self.first + i);
                widen(s, &v[at..at + d], &mut out[..d]);
            }
        }
    }
}

#[inline(always)]
fn widen<S: Simd, T: Element>(s: S, src: &[T], dst: &mut [f32]) {
    let (body, tail) = dst.split_at_mut(src.len() / S::LANES * S::LANES);
    let mut from = src.chunks_exact(S::LANES);
    for (x, y) in (&mut from).zip(body.chunks_exact_mut(S::LANES)) {
        s.store(T::load(s, x), y);
    }
    if !tail.is_empty() {
        s.store_partial(T::load_partial(s, from.remainder()), tail);
    }
}

/// Attention of one block of queries over all keys of a packed head.
pub(super) struct Block<'a, W> {
    pub(super) head: QueryHead<'a>,
    /// The block's first query.
    pub(super) first: usize,
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    /// Whether the exponential may be coarse.
    pub(super) coarse: bool,
    pub(super) scratch: &'a mut [f32],
    pub(super) out: W,
}

/// f32 of scratch memory that a [`Block`] of `n` queries wants.
pub(super) const fn scratch_elements(n: usize, d: usize) -> usize {
    (d + d.next_multiple_of(PANEL) + KEYS + 2) * n
}

impl<W: Write> SimdOp for Block<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let n = queries(S::LANES);
        let AttentionShape { d, nk, .. } = self.head.shape;
        let dv = d.next_multiple_of(PANEL);
        let (q, rest) = self.scratch.split_at_mut(d * n); // [d, n]
        let (acc, rest) = rest.split_at_mut(dv * n); // [dv, n]
        let (scores, rest) = rest.split_at_mut(KEYS * n); // [keys, n]
        let (most, rest) = rest.split_at_mut(n);
        let sum = &mut rest[..n];
        self.head.prefetch(s, self.first, n);
        self.head.prefetch_out(s, self.first, n, &self.out);
        self.head.load_transposed(s, self.first, n, q);
        let mut softmax = Softmax::new(most, sum, acc, n);
        for first in (0..self.head.keys_seen(self.first, n)).step_by(KEYS) {
            let keys = KEYS.min(nk - first);
            let padded = keys.next_multiple_of(PANEL);
            let scores = &mut scores[..padded * n];
            products(s, &self.k[first * d..], PANEL * d, PANEL, padded, d, q, scores, false);
            let scores = &mut scores[..keys * n];
            let factor = self.head.mask(s, scores, n, self.first, first);
            for at in (0..n).step_by(S::LANES) {
                softmax.raise(s, scores, factor, at);
                if self.coarse {
                    exponentials::<S, true>(s, &mut softmax, scores, factor, at);
                } else {
                    exponentials::<S, false>(s, &mut softmax, scores, factor, at);
                }
            }
            products(s, &self.v[first * dv..], PANEL, dv, dv, keys, scores, softmax.acc, true);
        }
        self.head.finish(s, self.first, n, softmax.acc, softmax.sum, &mut self.out);
    }
}

/// Turns column `at` of the scores, `[keys, n]`, into exponentials and adds them up.
#[inline(always)]
fn exponentials<S: Simd, const COARSE: bool>(
    s: S,
    softmax: &mut Softmax<'_>,
    scores: &mut [f32],
    factor: f32,
    at: usize,
) {
    let (factor, minus) = (s.splat(factor), s.sub(s.splat(0.0), s.load(&softmax.most[at..])));
    let mut sum = s.load(&softmax.sum[at..]);
    for row in scores.chunks_exact_mut(softmax.n) {
        let x = s.fma(s.load(&row[at..]), factor, minus);
        let p = if COARSE { math::exp2_coarse(s, x) } else { math::exp2(s, x) };
        sum = s.add(sum, p);
        s.store(p, &mut row[at..]);
    }
    s.store(sum, &mut softmax.sum[at..]);
}

/// `c[i, :] (+)= sum over j < k of a[i / 8 * panel + j * step + i % 8] * b[j, :]` for `m` rows, a multiple of 8; rows of `b`
/// and `c` are three vectors.
#[inline(always)]
#[expect(clippy::too_many_arguments)]
fn products<S: Simd>(
    s: S,
    a: &[f32],
    panel: usize,
    step: usize,
    m: usize,
    k: usize,
    b: &[f32],
    c: &mut [f32],
    add: bool,
) {
    let n = queries(S::LANES);
    for (p, c) in c[..m * n].chunks_exact_mut(PANEL * n).enumerate() {
        let a = &a[p * panel..];
        if S::REGISTERS >= 32 {
            tile::<S, 8>(s, a, step, k, b, c, add);
        } else {
            let (low, high) = c.split_at_mut(PANEL / 2 * n);
            tile::<S, 4>(s, a, step, k, b, low, add);
            tile::<S, 4>(s, &a[4..], step, k, b, high, add);
        }
    }
}

/// `c[i, :] (+)= sum over j < k of a[j * step + i] * b[j, :]` for `MR` rows.
#[inline(always)]
fn tile<S: Simd, const MR: usize>(
    s: S,
    a: &[f32],
    step: usize,
    k: usize,
    b: &[f32],
    c: &mut [f32],
    add: bool,
) {
    let n = queries(S::LANES);
    let mut acc = [[s.splat(0.0); NV]; MR];
    for (j, b) in b[..k * n].chunks_exact(n).enumerate() {
        let a = &a[j * step..][..MR];
        let b: [S::F; NV] = [s.load(b), s.load(&b[S::LANES..]), s.load(&b[2 * S::LANES..])];
        for i in 0..MR {
            let x = s.splat(a[i]);
            for v in 0..NV {
                acc[i][v] = s.fma(x, b[v], acc[i][v]);
            }
        }
    }
    for (i, row) in c.chunks_exact_mut(n).enumerate() {
        for (v, out) in row.chunks_exact_mut(S::LANES).enumerate() {
            let sum = if add { s.add(acc[i][v], s.load(out)) } else { acc[i][v] };
            s.store(sum, out);
        }
    }
}
