//! Vectors of 16-bit fixed-point numbers: twice the lanes of f32, for what ends as 8 bits.

#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::marker::PhantomData;

use super::{Block, Simd};

/// The most pieces of a [`Table`].
pub const MAX_PIECES: usize = 32;

/// Two vectors of i16 made of a block.
pub type Pair<V> = [V; 2];

/// An i16 for each piece of the range of i16, which is cut into [`Shorts::PIECES`] of equal length: piece `i` lies around
/// `i * 2^16 / PIECES`, modulo 2^16.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only tiers of x86 have `Shorts`"))]
pub struct Table {
    /// The numbers.
    pub(super) numbers: [i16; MAX_PIECES],
    /// Of the first 16, the low and the high bytes.
    pub(super) bytes: [[u8; 16]; 2],
}

impl Table {
    /// Numbers beyond the tier's pieces mean nothing.
    pub fn new(numbers: [i16; MAX_PIECES]) -> Self {
        let bytes = |high: usize| std::array::from_fn(|i| numbers[i].to_le_bytes()[high]);
        Table { numbers, bytes: [bytes(0), bytes(1)] }
    }
}

/// Operations on `2 * Simd::LANES` i16 at a time, for the tiers that look up numbers fast ([`Simd::shorts`]).
///
/// A pair holds a block in an order of its own, which depends on whether the block was in split order; storing codes
/// restores the order of memory. Loads and stores panic on a slice of another length.
pub trait Shorts: Copy + Send + Sync + 'static {
    /// Pieces of a table, a power of two.
    const PIECES: usize;
    /// The tier's vector of f32.
    type F: Copy;
    /// The vector.
    type V: Copy;
    /// Pieces of the numbers of a pair.
    type Index: Copy;

    /// `v`; what later calls give waits for it, so that a compiler keeps the order in which operations are written.
    fn in_turn(self, v: Self::V) -> Self::V;
    /// A block of magnitudes below 2^31, rounded to nearest even and saturated; in split order if `split`.
    fn round_block(self, block: Block<Self::F>, split: bool) -> Pair<Self::V>;
    /// All lanes `x`.
    fn splat(self, x: i16) -> Self::V;
    /// Loads a vector.
    fn load(self, src: &[i16]) -> Self::V;
    /// Stores a vector.
    fn store(self, v: Self::V, dst: &mut [i16]);
    /// The pieces that numbers lie in.
    fn index(self, pair: Pair<Self::V>) -> Self::Index;
    /// Where in their pieces numbers lie: `-2^15` at the lower end, 0 in the middle.
    fn place(self, v: Self::V) -> Self::V;
    /// The numbers of pieces.
    fn lookup(self, table: &Table, index: Self::Index) -> Pair<Self::V>;
    /// `a * b / 2^15`, rounded to nearest; not for -2^15 twice.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a + b` modulo 2^16.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a + b`, saturated.
    fn add_saturating(self, a: Self::V, b: Self::V) -> Self::V;
    /// The greater.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The greatest lane of numbers that are not negative.
    fn max_lane(self, v: Self::V) -> u16;
    /// Stores a block of the codes `floor(v / 256) + 128`, at least 1.
    fn store_codes_high(self, pair: Pair<Self::V>, split: bool, dst: &mut [u8]);
    /// Stores a block of the codes `v + 128` of magnitudes up to 127.
    fn store_codes_low(self, pair: Pair<Self::V>, split: bool, dst: &mut [u8]);
}

/// No [`Shorts`]: never made.
#[derive(Debug)]
pub struct Never<S>(Infallible, PhantomData<fn() -> S>);

impl<S> Clone for Never<S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Never<S> {}

impl<S: Simd> Shorts for Never<S> {
    const PIECES: usize = MAX_PIECES;
    type F = S::F;
    type V = ();
    type Index = ();

    fn in_turn(self, (): ()) {
        match self.0 {}
    }
    fn round_block(self, _: Block<S::F>, _: bool) -> Pair<()> {
        match self.0 {}
    }
    fn splat(self, _: i16) {
        match self.0 {}
    }
    fn load(self, _: &[i16]) {
        match self.0 {}
    }
    fn store(self, (): (), _: &mut [i16]) {
        match self.0 {}
    }
    fn index(self, _: Pair<()>) {
        match self.0 {}
    }
    fn place(self, (): ()) {
        match self.0 {}
    }
    fn lookup(self, _: &Table, (): ()) -> Pair<()> {
        match self.0 {}
    }
    fn mul(self, (): (), (): ()) {
        match self.0 {}
    }
    fn add(self, (): (), (): ()) {
        match self.0 {}
    }
    fn add_saturating(self, (): (), (): ()) {
        match self.0 {}
    }
    fn max(self, (): (), (): ()) {
        match self.0 {}
    }
    fn max_lane(self, (): ()) -> u16 {
        match self.0 {}
    }
    fn store_codes_high(self, _: Pair<()>, _: bool, _: &mut [u8]) {
        match self.0 {}
    }
    fn store_codes_low(self, _: Pair<()>, _: bool, _: &mut [u8]) {
        match self.0 {}
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bf16;
    use crate::simd::Element;

    /// Numbers of 16 bits, and codes of both kinds, in both orders.
    pub(in crate::simd) fn contract<S: Simd>(s: S, h: S::Shorts) {
        let n = 2 * S::LANES;
        let get = |v: <S::Shorts as Shorts>::V| {
            let mut out = vec![0i16; n];
            h.store(v, &mut out);
            out
        };
        let src: Vec<i16> = (0..n as i32).map(|i| (i * 65_535 / (n as i32 - 1) - 32_768) as i16).collect();
        let v = h.load(&src);
        let each = |got: <S::Shorts as Shorts>::V, f: &dyn Fn(i32) -> i32| {
            assert_eq!(get(got), src.iter().map(|&x| f(i32::from(x)) as i16).collect::<Vec<_>>());
        };
        let pieces = S::Shorts::PIECES as i32;
        let table: [i16; MAX_PIECES] = std::array::from_fn(|i| 1009 * i as i16 - 17_000);
        let piece = |x: i32| i32::from(table[(((x * pieces + (1 << 15)) >> 16) & (pieces - 1)) as usize]);
        let back = h.add(v, h.splat(16_000));
        let [first, second] = h.lookup(&Table::new(table), h.index([v, back]));
        each(first, &piece);
        each(second, &|x| piece(i32::from((x + 16_000) as i16)));
        each(h.place(v), &|x| x * pieces);
        each(h.mul(v, h.splat(-777)), &|x| (x * -777 + (1 << 14)) >> 15);
        each(h.add(v, h.splat(777)), &|x| x + 777);
        each(h.add_saturating(v, h.splat(777)), &|x| (x + 777).min(32_767));
        each(h.max(v, h.splat(777)), &|x| x.max(777));
        assert_eq!(h.max_lane(h.max(v, h.splat(0))), 32_767);
        assert_eq!(h.max_lane(h.splat(5)), 5);
        let wide: Vec<f32> = (0..S::BLOCK).map(|i| (i as f32 - 15.0) * 2300.0).collect();
        let half: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
        for split in [false, true] {
            let block = if split { bf16::load_block(s, &half) } else { f32::load_block(s, &wide) };
            let want: Vec<f32> = if split { half.iter().map(|x| x.to_f32()).collect() } else { wide.clone() };
            let pair = h.round_block(block, split);
            let mut codes = vec![0u8; S::BLOCK];
            h.store_codes_high(pair, split, &mut codes);
            let code =
                |x: &f32| ((x.round_ties_even().clamp(-32_768.0, 32_767.0) / 256.0).floor() + 128.0).max(1.0);
            assert_eq!(codes, want.iter().map(|x| code(x) as u8).collect::<Vec<_>>());
            let pair = pair.map(|v| h.mul(v, h.splat(127)));
            h.store_codes_low(pair, split, &mut codes);
            let scaled =
                |x: &f32| (x.round_ties_even().clamp(-32_768.0, 32_767.0) * 127.0 / 32_768.0 + 0.5).floor();
            assert_eq!(codes, want.iter().map(|x| (scaled(x) + 128.0) as u8).collect::<Vec<_>>());
        }
    }
}
