//! The integers that stand for queries, keys, values and weights where attention is made of integer products.
#![forbid(unsafe_code)]

use crate::math;
use crate::simd::Simd;
use crate::simd::dot::Dot;

use super::head::LEAST;
use super::integers::PANEL;

/// The score of 0 in products of bytes: an integer added to its bits is added to the number, so that scores are summed up as i32
/// and read as f32.
const ZERO: f32 = 12_582_912.0; // 1.5 * 2^23

/// Turns codes around 128 into signed bytes.
const SIGNS: u32 = 0x8080_8080;

/// A vector of floats of a tier.
type F<D> = <<D as Dot>::Vectors as Simd>::F;

/// Words of some codes each.
pub(super) trait Codes {
    /// Codes in a word.
    const PER: usize;
    /// The greatest code of values.
    const VALUE: f32;
    /// What is added to signed codes before they are packed, and what turns these words into signed codes again.
    const MIDDLE: f32;
    /// See `MIDDLE`.
    const SIGNS: u32;
    /// The score of a sum of products that is 0.
    const ZERO: f32;
    /// What the sum of a key's products begins with that is there to fill a panel: no query's score is below what comes out.
    const NO_KEY: u32;
    /// The greatest code of keys of `d` columns.
    fn key(d: usize) -> f32;
    /// The greatest code of queries, and what is added to them.
    fn queries<D: Dot>() -> [f32; 2];
    /// Rounds and packs the first `PER` of `x`.
    fn pack<D: Dot>(d: D, x: [F<D>; 4]) -> D::Words;
    /// `sum` plus the products of `a`, of queries or weights, and `b`, of keys or values.
    fn dot<D: Dot>(d: D, sum: D::Words, a: D::Words, b: D::Words) -> D::Words;
    /// What the sums of keys' products begin with, `[keys]`, where their codes are `[words][keys]`.
    fn begin<D: Dot>(d: D, codes: &[u32], start: &mut [u32]);
    /// The score that a sum of products stands for.
    fn score<D: Dot>(d: D, sum: D::Words) -> F<D>;
    /// Turns a vector of queries' scores of `keys` keys, `[keys, n]` and filled up to whole panels, into weights in proportion
    /// to that of the `highest`, and returns their sum. A unit of the scores is `unit` in powers of two.
    #[allow(clippy::too_many_arguments)]
    fn weigh<D: Dot>(
        d: D,
        scores: &[f32],
        keys: usize,
        n: usize,
        at: usize,
        highest: F<D>,
        unit: F<D>,
        weights: &mut [u32],
    ) -> F<D>;
}

/// Bytes, of which those of queries and weights are unsigned.
pub(super) enum Bytes {}

impl Codes for Bytes {
    const PER: usize = 4;
    const VALUE: f32 = 127.0;
    const MIDDLE: f32 = 128.0;
    const SIGNS: u32 = SIGNS;
    const ZERO: f32 = ZERO;
    const NO_KEY: u32 = LEAST.to_bits();

    #[inline(always)]
    fn key(_: usize) -> f32 {
        127.0
    }

    #[inline(always)]
    fn queries<D: Dot>() -> [f32; 2] {
        let reach = f32::from(D::MOST / 2);
        [reach, reach + 1.0]
    }

    #[inline(always)]
    fn pack<D: Dot>(d: D, x: [F<D>; 4]) -> D::Words {
        d.pack(x)
    }

    #[inline(always)]
    fn dot<D: Dot>(d: D, sum: D::Words, a: D::Words, b: D::Words) -> D::Words {
        d.dot(sum, a, b)
    }

    #[inline(always)]
    fn begin<D: Dot>(d: D, codes: &[u32], start: &mut [u32]) {
        let keys = start.len();
        for i in (0..keys).step_by(D::Vectors::LANES) {
            let mut sum = d.splat(0);
            for codes in codes.chunks_exact(keys) {
                sum = d.dot(sum, d.splat(0x0101_0101), d.load(&codes[i..]));
            }
            d.store(sum, &mut start[i..]);
        }
        // Codes of queries are around the middle of the unsigned bytes.
        let [_, middle] = Self::queries::<D>();
        start
            .iter_mut()
            .for_each(|sum| *sum = ZERO.to_bits().wrapping_sub((middle as u32).wrapping_mul(*sum)));
    }

    #[inline(always)]
    fn score<D: Dot>(d: D, sum: D::Words) -> F<D> {
        d.as_f32(sum)
    }

    #[inline(always)]
    fn weigh<D: Dot>(
        d: D,
        scores: &[f32],
        _: usize,
        n: usize,
        at: usize,
        highest: F<D>,
        unit: F<D>,
        weights: &mut [u32],
    ) -> F<D> {
        let s = d.vectors();
        let mut sum = d.splat(0);
        for (scores, weights) in scores.chunks_exact(PANEL * n).zip(weights.chunks_exact_mut(PANEL / 4 * n)) {
            let mut panel = [highest; PANEL];
            for i in 0..PANEL {
                panel[i] = s.load(&scores[i * n + at..]);
            }
            let [low, high] = d.powers(panel, highest, unit);
            sum = d.dot(d.dot(sum, low, d.splat(0x0101_0101)), high, d.splat(0x0101_0101));
            d.store(low, &mut weights[at..]);
            d.store(high, &mut weights[n + at..]);
        }
        d.to_f32(sum)
    }
}

/// 16-bit numbers, which are so great that the products of a head's columns, and of a block's keys, add up to an i32. What is left
/// beside queries, which have a scale each, is the keys': they share one, with keys that are unlike all others.
pub(super) enum Pairs {}

/// The greatest code of queries.
const QUERY: i32 = 2047;

/// The logarithm of the greatest weight.
const LOG2_16383: f32 = 13.999_912;

impl Codes for Pairs {
    const PER: usize = 2;
    const VALUE: f32 = 1023.0;
    const MIDDLE: f32 = 0.0;
    const SIGNS: u32 = 0;
    const ZERO: f32 = 0.0;
    const NO_KEY: u32 = i32::MIN.cast_unsigned();

    #[inline(always)]
    fn key(d: usize) -> f32 {
        (i32::MAX / (QUERY * d as i32)).min(32_767) as f32
    }

    #[inline(always)]
    fn queries<D: Dot>() -> [f32; 2] {
        [QUERY as f32, 0.0]
    }

    #[inline(always)]
    fn pack<D: Dot>(d: D, [a, b, ..]: [F<D>; 4]) -> D::Words {
        d.pack_pairs([a, b])
    }

    #[inline(always)]
    fn dot<D: Dot>(d: D, sum: D::Words, a: D::Words, b: D::Words) -> D::Words {
        d.dot_pairs(sum, a, b)
    }

    #[inline(always)]
    fn begin<D: Dot>(_: D, _: &[u32], start: &mut [u32]) {
        start.fill(0);
    }

    #[inline(always)]
    fn score<D: Dot>(d: D, sum: D::Words) -> F<D> {
        d.to_f32(sum)
    }

    #[inline(always)]
    fn weigh<D: Dot>(
        d: D,
        scores: &[f32],
        keys: usize,
        n: usize,
        at: usize,
        highest: F<D>,
        unit: F<D>,
        weights: &mut [u32],
    ) -> F<D> {
        let s = d.vectors();
        let mut sum = d.splat(0);
        let pairs = scores.chunks_exact(2 * n).zip(weights.chunks_exact_mut(n));
        for (i, (scores, weights)) in pairs.enumerate() {
            let mut pair = [s.splat(0.0); 2];
            for (j, power) in pair.iter_mut().enumerate().take(keys.saturating_sub(2 * i)) {
                let below = s.sub(s.load(&scores[j * n + at..]), highest);
                *power = math::exp2_coarse(s, s.fma(below, unit, s.splat(LOG2_16383)));
            }
            let pair = d.pack_pairs(pair);
            sum = d.dot_pairs(sum, pair, d.splat(0x0001_0001));
            d.store(pair, &mut weights[at..]);
        }
        d.to_f32(sum)
    }
}
