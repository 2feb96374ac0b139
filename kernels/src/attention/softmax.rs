//! The running maximum, sum and output of a block of queries (Milakov and Gimelshein 2018; Dao et al. 2022).
#![forbid(unsafe_code)]

use crate::math;
use crate::simd::Simd;

use super::head::LEAST;

/// How far (in powers of two) a score may lie above the running maximum before the maximum moves. Exponentials stay far
/// from overflow, and what was added up so far is rescaled rarely.
pub(super) const HEADROOM: f32 = 8.0;

/// The state of `n` queries.
pub(super) struct Softmax<'a> {
    /// `[n]`: of the scores, as powers of two.
    pub(super) most: &'a mut [f32],
    /// `[n]`: of `2^(score - most)`.
    pub(super) sum: &'a mut [f32],
    /// `[rows, n]`: of `2^(score - most)` times the values.
    pub(super) acc: &'a mut [f32],
    pub(super) n: usize,
}

impl<'a> Softmax<'a> {
    /// Before the first key.
    pub(super) fn new(most: &'a mut [f32], sum: &'a mut [f32], acc: &'a mut [f32], n: usize) -> Self {
        most.fill(LEAST);
        sum.fill(0.0);
        acc.fill(0.0);
        Softmax { most, sum, acc, n }
    }

    /// Makes room for the scores of a block of keys, `[keys, n]`, in the vector of queries at `at`; `factor` makes them
    /// powers of two.
    #[inline(always)]
    pub(super) fn raise<S: Simd>(&mut self, s: S, scores: &[f32], factor: f32, at: usize) {
        let n = self.n;
        let mut chains = [s.splat(LEAST); 4];
        let mut blocks = scores.chunks_exact(4 * n);
        for block in &mut blocks {
            for (most, row) in chains.iter_mut().zip(block.chunks_exact(n)) {
                *most = s.max(s.load(&row[at..]), *most);
            }
        }
        for row in blocks.remainder().chunks_exact(n) {
            chains[0] = s.max(s.load(&row[at..]), chains[0]);
        }
        let block_most = s.max(s.max(chains[0], chains[1]), s.max(chains[2], chains[3]));
        self.lift(s, s.mul(block_most, s.splat(factor)), at);
    }

    /// Makes room for a block of keys whose greatest scores, as powers of two, are `block_most`.
    #[inline(always)]
    pub(super) fn lift<S: Simd>(&mut self, s: S, block_most: S::F, at: usize) {
        let n = self.n;
        let most = s.load(&self.most[at..]);
        if s.any_lt(s.add(most, s.splat(HEADROOM)), block_most) {
            let higher = s.max(block_most, most);
            let shrink = math::exp2(s, s.sub(most, higher));
            s.store(higher, &mut self.most[at..]);
            s.store(s.mul(s.load(&self.sum[at..]), shrink), &mut self.sum[at..]);
            for row in self.acc.chunks_exact_mut(n) {
                s.store(s.mul(s.load(&row[at..]), shrink), &mut row[at..]);
            }
        }
    }
}
