//! Attention in integer products on the vectors of the tiers that are faster at them than at f32: of bytes, or of 16-bit
//! numbers ([`Codes`]). As in `vector`, lanes are queries, and what belongs to keys is broadcast.
//!
//! Queries have a scale each. A block of keys has one scale, and the numbers of its values one per column, about the middle
//! of the column. A vector that all keys have in common doesn't change the softmax, so what some keys have on the average is
//! taken away from all. The weights of a block are integers in proportion to the greatest of them, and it is the rounded
//! ones that are added up; blocks are added up in f32.
#![forbid(unsafe_code)]

use std::marker::PhantomData;

use bytemuck::{cast_slice, cast_slice_mut};

use crate::math;
use crate::simd::dot::{Dot, DotOp};
use crate::simd::{Element, MAX_LANES, Simd};
use crate::view::Rows;

use super::AttentionShape;
use super::codes::Codes;
use super::head::{KvHead, LEAST, QueryHead, Write, load_square};
use super::softmax::Softmax;

/// Keys in a block.
pub(super) const KEYS: usize = 128;

/// Keys of a tile of scores, and the multiple to which V's columns are padded.
pub(super) const PANEL: usize = 8;

/// Vectors of queries in a block.
const NV: usize = 3;

/// Keys whose average stands for that of all.
const SAMPLE: usize = 16;

/// The greatest head: sums of products fit into the 22 bits of scores of bytes, and into the 31 bits of others.
pub(super) const MAX_D: usize = 256;

/// Queries in a block on vectors of `lanes`.
pub(super) const fn queries(lanes: usize) -> usize {
    NV * lanes
}

/// Words of codes for so many columns or keys.
const fn words<C: Codes>(n: usize) -> usize {
    n.div_ceil(C::PER)
}

/// Words that pack a block of K: where scores begin `[KEYS]`, codes `[words of d][KEYS]`, the scale and 15 unused.
const fn k_block<C: Codes>(d: usize) -> usize {
    KEYS * (words::<C>(d) + 1) + 16
}

/// Words that pack a block of V: scales `[d]`, middles `[d]`, codes `[words of KEYS][d]`; d padded to 8.
const fn v_block<C: Codes>(d: usize) -> usize {
    (words::<C>(KEYS) + 2) * d.next_multiple_of(PANEL)
}

/// Bytes that pack K and V of so many keys.
pub(super) const fn packed_bytes<C: Codes>(keys: usize, d: usize) -> (usize, usize) {
    let (blocks, word) = (keys.div_ceil(KEYS), size_of::<u32>());
    (word * blocks * k_block::<C>(d), word * blocks * v_block::<C>(d))
}

/// Bytes of scratch memory that a [`Pack`] wants, and a [`Block`] of `n` queries.
pub(super) fn scratch_bytes<C: Codes>(n: usize, d: usize) -> usize {
    size_of::<f32>() * pack_elements::<C>(d).max(block_elements::<C>(n, d))
}

/// Packs a block of keys and values from `first` on.
pub(super) struct Pack<'a, C> {
    pub(super) codes: PhantomData<C>,
    pub(super) head: KvHead<'a>,
    pub(super) first: usize,
    pub(super) k: &'a mut [u32],
    pub(super) v: &'a mut [u32],
    /// [`pack_elements`] of f32.
    pub(super) scratch: &'a mut [f32],
}

/// f32 of scratch memory that a [`Pack`] wants.
const fn pack_elements<C: Codes>(d: usize) -> usize {
    d.next_multiple_of(MAX_LANES) + words::<C>(d) * C::PER * KEYS
}

impl<C: Codes> DotOp for Pack<'_, C> {
    #[inline(always)]
    fn run<D: Dot>(self, d: D) {
        let Pack { codes: _, head, first, k: to_k, v: to_v, scratch } = self;
        head.prefetch(d.vectors(), first, KEYS);
        match head.k {
            Rows::F32(k) => pack_k::<D, C, _>(d, &head, k, first, to_k, scratch),
            Rows::Bf16(k) => pack_k::<D, C, _>(d, &head, k, first, to_k, scratch),
        }
        match head.v {
            Rows::F32(v) => pack_v::<D, C, _>(d, &head, v, first, to_v),
            Rows::Bf16(v) => pack_v::<D, C, _>(d, &head, v, first, to_v),
        }
    }
}

/// Loads `n` elements, at most `LANES`; the lanes beyond are zero.
#[inline(always)]
pub(super) fn load_some<S: Simd, T: Element>(s: S, src: &[T], n: usize) -> S::F {
    if n == S::LANES { T::load(s, src) } else { T::load_partial(s, &src[..n]) }
}

/// Writes the average of some rows of `x` to `mean`.
#[inline(always)]
pub(super) fn sample_mean<S: Simd, T: Element>(s: S, head: &KvHead<'_>, x: &[T], mean: &mut [f32]) {
    let n = head.nk.min(SAMPLE);
    for c in (0..head.d).step_by(S::LANES) {
        let columns = S::LANES.min(head.d - c);
        let mut sum = s.splat(0.0);
        for i in 0..n {
            sum = s.add(sum, load_some(s, &x[head.at(i * head.nk / n) + c..], columns));
        }
        s.store(s.mul(sum, s.splat(1.0 / n as f32)), &mut mean[c..]);
    }
}

/// Codes `x * factor + middle` of a vector of each of the rows of a word, `x`, `[C::PER, n]`.
#[inline(always)]
fn encode<D: Dot, C: Codes>(
    d: D,
    x: &[f32],
    n: usize,
    at: usize,
    factor: <D::Vectors as Simd>::F,
    middle: f32,
) -> D::Words {
    let s = d.vectors();
    let mut codes = [factor; 4];
    for (code, x) in codes.iter_mut().zip(x.chunks_exact(n)) {
        *code = s.fma(s.load(&x[at..]), factor, s.splat(middle));
    }
    C::pack(d, codes)
}

#[inline(always)]
fn pack_k<D: Dot, C: Codes, T: Element>(
    d: D,
    head: &KvHead<'_>,
    k: &[T],
    first: usize,
    out: &mut [u32],
    scratch: &mut [f32],
) {
    let s = d.vectors();
    let lanes = D::Vectors::LANES;
    let (keys, words) = (KEYS.min(head.nk - first), words::<C>(head.d));
    let (mean, rest) = scratch.split_at_mut(head.d.next_multiple_of(MAX_LANES));
    let columns = &mut rest[..words * C::PER * KEYS]; // [d, KEYS]
    columns[head.d * KEYS..].fill(0.0);
    sample_mean(s, head, k, mean);
    let places: [f32; MAX_LANES] = std::array::from_fn(|i| i as f32);
    let mut most = s.splat(0.0);
    for i in (0..KEYS).step_by(lanes) {
        let rows = lanes.min(keys.saturating_sub(i));
        let end = s.splat(rows as f32);
        for c in (0..head.d).step_by(lanes) {
            let n = lanes.min(head.d - c);
            let square = if rows > 0 {
                load_square(s, &k[head.at(first + i) + c..], head.stride, rows, n)
            } else {
                [s.splat(0.0); MAX_LANES]
            };
            for (j, &x) in square[..n].iter().enumerate() {
                let x = s.sub(x, s.splat(mean[c + j]));
                let x = s.select_lt(s.load(&places), end, x, s.splat(0.0));
                s.store(x, &mut columns[(c + j) * KEYS + i..]);
                most = s.max(s.abs(x), most);
            }
        }
    }
    let (most, reach) = (s.max_lane(most).max(f32::MIN_POSITIVE), C::key(head.d));
    let (start, rest) = out.split_at_mut(KEYS);
    let (codes, scale) = rest.split_at_mut(words * KEYS);
    scale.fill((most / reach).to_bits());
    let inverse = s.splat(reach / most);
    for (out, columns) in codes.chunks_exact_mut(KEYS).zip(columns.chunks_exact(C::PER * KEYS)) {
        for i in (0..KEYS).step_by(lanes) {
            d.store(encode::<D, C>(d, columns, KEYS, i, inverse, C::MIDDLE), &mut out[i..]);
        }
        out.iter_mut().for_each(|word| *word ^= C::SIGNS);
    }
    C::begin(d, codes, start);
    // Their codes are zero, so this is their score.
    start[keys..].fill(C::NO_KEY);
}

#[inline(always)]
fn pack_v<D: Dot, C: Codes, T: Element>(d: D, head: &KvHead<'_>, v: &[T], first: usize, out: &mut [u32]) {
    let s = d.vectors();
    let lanes = D::Vectors::LANES;
    let keys = KEYS.min(head.nk - first);
    let dv = head.d.next_multiple_of(PANEL);
    let (scales, rest) = out.split_at_mut(dv);
    let (middles, codes) = rest.split_at_mut(dv);
    for c in (0..dv).step_by(lanes) {
        let (columns, padded) = (lanes.min(head.d - c), lanes.min(dv - c));
        let rows = &v[head.at(first) + c..];
        let mut low = load_some(s, rows, columns);
        let mut high = low;
        for key in 1..keys {
            let x = load_some(s, &rows[key * head.stride..], columns);
            (low, high) = (s.min(x, low), s.max(x, high));
        }
        let half = s.splat(0.5);
        let middle = s.mul(s.add(low, high), half);
        let reach = s.max(s.mul(s.sub(high, low), half), s.splat(f32::MIN_POSITIVE));
        let inverse = s.div(s.splat(C::VALUE), reach);
        let (mut x, mut words) = ([0.0; MAX_LANES], [0; MAX_LANES]);
        s.store(s.mul(reach, s.splat(1.0 / C::VALUE)), &mut x);
        scales[c..][..padded].copy_from_slice(&cast_slice(&x)[..padded]);
        s.store(middle, &mut x);
        middles[c..][..padded].copy_from_slice(&cast_slice(&x)[..padded]);
        for (i, out) in codes.chunks_exact_mut(dv).enumerate() {
            let mut word = [s.splat(C::MIDDLE); 4];
            for (key, code) in (C::PER * i..keys).zip(&mut word[..C::PER]) {
                let x = s.sub(load_some(s, &rows[key * head.stride..], columns), middle);
                *code = s.fma(x, inverse, *code);
            }
            d.store(C::pack(d, word), &mut words);
            for (out, word) in out[c..][..padded].iter_mut().zip(words) {
                *out = word ^ C::SIGNS;
            }
        }
    }
}

/// Attention of one block of queries over all keys of a packed head, without a mask.
pub(super) struct Block<'a, C, W> {
    pub(super) codes: PhantomData<C>,
    pub(super) head: QueryHead<'a>,
    /// The block's first query.
    pub(super) first: usize,
    pub(super) k: &'a [u32],
    pub(super) v: &'a [u32],
    pub(super) scratch: &'a mut [f32],
    pub(super) out: W,
}

/// f32 of scratch memory that a [`Block`] of `n` queries wants.
const fn block_elements<C: Codes>(n: usize, d: usize) -> usize {
    (words::<C>(d) + d.next_multiple_of(PANEL) + KEYS + words::<C>(KEYS) + 5) * n
}

impl<C: Codes, W: Write> DotOp for Block<'_, C, W> {
    #[inline(always)]
    fn run<D: Dot>(self, d: D) {
        // A tile has as many rows as the registers hold sums of.
        if D::Vectors::REGISTERS >= 32 { self.attend::<D, 8>(d) } else { self.attend::<D, 4>(d) }
    }
}

impl<C: Codes, W: Write> Block<'_, C, W> {
    #[inline(always)]
    fn attend<D: Dot, const MR: usize>(mut self, d: D) {
        let s = d.vectors();
        let n = queries(D::Vectors::LANES);
        let AttentionShape { d: size, nk, .. } = self.head.shape;
        let dv = size.next_multiple_of(PANEL);
        let (q, rest) = self.scratch.split_at_mut(words::<C>(size) * n); // [words of d, n]
        let (acc, rest) = rest.split_at_mut(dv * n); // [dv, n]
        let (scores, rest) = rest.split_at_mut(KEYS * n); // [KEYS, n]
        let (weights, rest) = rest.split_at_mut(words::<C>(KEYS) * n); // [words of KEYS, n]
        let (most, rest) = rest.split_at_mut(n);
        let (sum, rest) = rest.split_at_mut(n);
        let (scale, rest) = rest.split_at_mut(n);
        let (share, rest) = rest.split_at_mut(n);
        let total = &mut rest[..n];
        let (q, weights): (&mut [u32], &mut [u32]) = (cast_slice_mut(q), cast_slice_mut(weights));
        self.head.prefetch(s, self.first, n);
        self.head.prefetch_out(s, self.first, n, &self.out);
        self.head.load_transposed(s, self.first, n, acc);
        acc[size * n..].fill(0.0);
        let factor = self.head.scale * std::f32::consts::LOG2_E;
        encode_queries::<D, C>(d, &acc[..words::<C>(size) * C::PER * n], factor, q, scale);
        let mut softmax = Softmax::new(most, sum, acc, n);
        let blocks = self.k.chunks_exact(k_block::<C>(size)).zip(self.v.chunks_exact(v_block::<C>(size)));
        for (first, (k, v)) in (0..nk).step_by(KEYS).zip(blocks) {
            let keys = KEYS.min(nk - first);
            let padded = keys.next_multiple_of(PANEL);
            let k_scale = f32::from_bits(k[k_block::<C>(size) - 1]);
            let scores = &mut scores[..padded * n];
            multiply_keys::<D, C, MR>(d, k, q, scores, total);
            for at in (0..n).step_by(D::Vectors::LANES) {
                // Never 0: the score of what lies behind the last key has to stay far below.
                let factor = s.max(s.mul(s.load(&scale[at..]), s.splat(k_scale)), s.splat(1e-20));
                let highest = s.load(&total[at..]);
                let level = s.mul(s.sub(highest, s.splat(C::ZERO)), factor);
                softmax.lift(s, level, at);
                let factor_here = math::exp2(s, s.sub(level, s.load(&softmax.most[at..])));
                let sum = C::weigh(d, scores, keys, n, at, highest, factor, weights);
                s.store(factor_here, &mut share[at..]);
                let part = s.mul(sum, factor_here);
                s.store(part, &mut total[at..]);
                s.store(s.add(s.load(&softmax.sum[at..]), part), &mut softmax.sum[at..]);
            }
            let weights = &weights[..words::<C>(padded) * n];
            multiply_values::<D, C, MR>(d, v, dv, weights, share, total, softmax.acc);
        }
        self.head.finish(s, self.first, n, softmax.acc, softmax.sum, &mut self.out);
    }
}

/// Codes of queries `[d, n]`, filled up to whole words, whose scales times `factor` go to `scales`.
#[inline(always)]
fn encode_queries<D: Dot, C: Codes>(d: D, x: &[f32], factor: f32, out: &mut [u32], scales: &mut [f32]) {
    let s = d.vectors();
    let n = scales.len();
    let [reach, middle] = C::queries::<D>();
    for at in (0..n).step_by(D::Vectors::LANES) {
        let mut most = s.splat(f32::MIN_POSITIVE);
        for row in x.chunks_exact(n) {
            most = s.max(s.abs(s.load(&row[at..])), most);
        }
        s.store(s.mul(most, s.splat(factor / reach)), &mut scales[at..]);
        let inverse = s.div(s.splat(reach), most);
        for (out, x) in out.chunks_exact_mut(n).zip(x.chunks_exact(C::PER * n)) {
            d.store(encode::<D, C>(d, x, n, at, inverse, middle), &mut out[at..]);
        }
    }
}

/// A tile of sums: rows by vectors of queries.
type Tile<W, const MR: usize> = [[W; NV]; MR];

/// `sums[i] += sum over j of a[j * step + i] . b[j]`, `b` being `[k][n]` words.
#[inline(always)]
fn multiply<D: Dot, C: Codes, const MR: usize>(
    d: D,
    a: &[u32],
    step: usize,
    b: &[u32],
    mut sums: Tile<D::Words, MR>,
) -> Tile<D::Words, MR> {
    let lanes = D::Vectors::LANES;
    for (j, b) in b.chunks_exact(queries(lanes)).enumerate() {
        let a = &a[j * step..][..MR];
        let b: [D::Words; NV] = [d.load(b), d.load(&b[lanes..]), d.load(&b[2 * lanes..])];
        for i in 0..MR {
            let x = d.splat(a[i]);
            for v in 0..NV {
                sums[i][v] = C::dot(d, sums[i][v], b[v], x);
            }
        }
    }
    sums
}

/// Scores `[keys, n]` of a block of K, and the highest of each query.
#[inline(always)]
fn multiply_keys<D: Dot, C: Codes, const MR: usize>(
    d: D,
    k: &[u32],
    q: &[u32],
    scores: &mut [f32],
    highest: &mut [f32],
) {
    let (s, lanes) = (d.vectors(), D::Vectors::LANES);
    highest.fill(LEAST);
    for (i, scores) in scores.chunks_exact_mut(MR * queries(lanes)).enumerate() {
        let (first, codes) = (&k[i * MR..][..MR], &k[KEYS + i * MR..]);
        let mut start = [[d.splat(0); NV]; MR];
        for i in 0..MR {
            start[i] = [d.splat(first[i]); NV];
        }
        let sums = multiply::<D, C, MR>(d, codes, KEYS, q, start);
        for v in 0..NV {
            let mut most = s.load(&highest[v * lanes..]);
            for i in 0..MR {
                let score = C::score(d, sums[i][v]);
                s.store(score, &mut scores[(i * NV + v) * lanes..]);
                most = s.max(score, most);
            }
            s.store(most, &mut highest[v * lanes..]);
        }
    }
}

/// Adds a block's weights times values to `acc`, `[dv, n]`: `share` is what a unit of the weights counts, `total` that
/// times their sum.
#[inline(always)]
fn multiply_values<D: Dot, C: Codes, const MR: usize>(
    d: D,
    v: &[u32],
    dv: usize,
    weights: &[u32],
    share: &[f32],
    total: &[f32],
    acc: &mut [f32],
) {
    let (s, lanes) = (d.vectors(), D::Vectors::LANES);
    for (i, acc) in acc.chunks_exact_mut(MR * queries(lanes)).enumerate() {
        let (scales, middles) = (&v[i * MR..][..MR], &v[dv + i * MR..][..MR]);
        let codes = &v[2 * dv + i * MR..];
        let sums = multiply::<D, C, MR>(d, codes, dv, weights, [[d.splat(0); NV]; MR]);
        for i in 0..MR {
            let (scale, middle) = (s.splat(f32::from_bits(scales[i])), s.splat(f32::from_bits(middles[i])));
            for v in 0..NV {
                let acc = &mut acc[(i * NV + v) * lanes..];
                let sum = s.mul(d.to_f32(sums[i][v]), scale);
                let so_far = s.fma(middle, s.load(&total[v * lanes..]), s.load(acc));
                s.store(s.fma(sum, s.load(&share[v * lanes..]), so_far), acc);
            }
        }
    }
}
