//! Dot products of bytes, four to a lane, for the tiers that are faster at them than at f32.

#![forbid(unsafe_code)]

use super::Simd;
#[cfg(target_arch = "x86_64")]
use super::x86;
use crate::Isa;

/// Operations on vectors of [`Simd::LANES`] words, each an i32 or four bytes, beside the f32 of [`Dot::Vectors`].
///
/// Loads and stores move `LANES` words and panic on a shorter slice.
pub trait Dot: Copy + Send + Sync + 'static {
    /// The same number of f32 lanes.
    type Vectors: Simd;
    /// `LANES` words.
    type Words: Copy;
    /// The greatest unsigned byte that [`Dot::dot`] takes: 255, or 127 where pairs of products go through 16 bits.
    const MOST: u8;

    /// The tier's f32 vectors.
    fn vectors(self) -> Self::Vectors;
    /// All words `x`.
    fn splat(self, x: u32) -> Self::Words;
    /// Loads `LANES` words.
    fn load(self, src: &[u32]) -> Self::Words;
    /// Stores `LANES` words.
    fn store(self, v: Self::Words, dst: &mut [u32]);
    /// Word by word `sum` plus the four products of the bytes of `a`, unsigned and at most [`Dot::MOST`], and those of `b`,
    /// signed and not -128. Sums wrap around.
    fn dot(self, sum: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Converts i32.
    fn to_f32(self, v: Self::Words) -> <Self::Vectors as Simd>::F;
    /// The f32 whose bits the words are.
    fn as_f32(self, v: Self::Words) -> <Self::Vectors as Simd>::F;
    /// Rounds to nearest even, and joins byte by byte numbers that round to 0 ..= 255.
    fn pack(self, x: [<Self::Vectors as Simd>::F; 4]) -> Self::Words;
    /// Word by word `sum` plus the two products of the signed 16-bit numbers of `a` and of `b`.
    fn dot_pairs(self, sum: Self::Words, a: Self::Words, b: Self::Words) -> Self::Words;
    /// Rounds to nearest even, and joins as 16-bit numbers those that round to -32768 ..= 32767; NaN and infinity become 0.
    fn pack_pairs(self, x: [<Self::Vectors as Simd>::F; 2]) -> Self::Words;
    /// `MOST * 2^((x - top) * factor)` for `x` up to `top` and a positive `factor`, within 0.4 % and a fiftieth (16-bit lanes
    /// have no more), and then each four as [`Dot::pack`]; 0 where the power is far below 1. `top * factor` is rounded to 24
    /// bits. Eight at a time, step by step: a chain of dependent instructions for each is more than a processor looks ahead.
    fn powers(
        self,
        x: [<Self::Vectors as Simd>::F; 8],
        top: <Self::Vectors as Simd>::F,
        factor: <Self::Vectors as Simd>::F,
    ) -> [Self::Words; 2];
}

/// A computation written over [`Dot`]. `run` and what it calls should be `#[inline(always)]`.
pub trait DotOp {
    /// Runs on the tier of `d`.
    fn run<D: Dot>(self, d: D);
}

/// Whether `isa` has a [`Dot`]. AMX has better.
pub const fn has_dot(isa: Isa) -> bool {
    matches!(isa, Isa::Avx2 | Isa::AvxVnni | Isa::Avx512Vnni)
}

/// Runs `op` compiled for the dot products of `isa`.
///
/// # Panics
/// Where the machine does not have `isa`, or [`has_dot`] says no.
pub fn dispatch_dot<O: DotOp>(isa: Isa, op: O) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::dot::run_avx2(op),
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => x86::dot::run_avxvnni(op),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => x86::dot::run_avx512vnni(op),
        _ => {
            drop(op);
            panic!("{isa:?} has no dot products of bytes")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Contract;

    impl DotOp for Contract {
        fn run<D: Dot>(self, d: D) {
            let s = d.vectors();
            let n = D::Vectors::LANES;
            let words = |v: D::Words| {
                let mut out = vec![0; n];
                d.store(v, &mut out);
                out
            };
            let floats = |v: <D::Vectors as Simd>::F| {
                let mut out = vec![0.0; n];
                s.store(v, &mut out);
                out
            };
            // Bytes of all sizes, with the extremes among them.
            let most = i32::from(D::MOST);
            for round in 0..500usize {
                let byte = |i: usize, low: i32, high: i32| match (round + i) % 3 {
                    0 => low,
                    1 => high,
                    _ => low + ((i * 7919 + round * 104_729) >> 3) as i32 % (high - low + 1),
                };
                let a: Vec<[i32; 4]> =
                    (0..n).map(|i| std::array::from_fn(|j| byte(4 * i + j, 0, most))).collect();
                let b: Vec<[i32; 4]> =
                    (0..n).map(|i| std::array::from_fn(|j| byte(5 * i + 3 * j + 1, -127, 127))).collect();
                let join = |x: &[[i32; 4]]| -> Vec<u32> {
                    x.iter().map(|x| u32::from_le_bytes(x.map(|x| x as u8))).collect()
                };
                let want: Vec<u32> = (a.iter().zip(&b))
                    .map(|(a, b)| {
                        (0..4).map(|j| a[j] * b[j]).sum::<i32>().wrapping_add(round as i32 - 9) as u32
                    })
                    .collect();
                let got = d.dot(d.splat((round as i32 - 9) as u32), d.load(&join(&a)), d.load(&join(&b)));
                assert_eq!(words(got), want);
                let columns: [_; 4] =
                    std::array::from_fn(|j| s.load(&a.iter().map(|a| a[j] as f32 + 0.4).collect::<Vec<_>>()));
                assert_eq!(words(d.pack(columns)), join(&a));
            }
            for round in 0..500usize {
                let pair = |i: usize| match (round + i) % 3 {
                    0 => [-32_768i16, 32_767],
                    1 => [-32_768, -32_768],
                    _ => [(i * 7919 + round * 104_729) as i16, (i * 104_729 + round * 7919) as i16],
                };
                let a: Vec<[i16; 2]> = (0..n).map(|i| pair(i + 1)).collect();
                let b: Vec<[i16; 2]> = (0..n).map(|i| pair(2 * i)).collect();
                let join = |x: &[[i16; 2]]| -> Vec<u32> {
                    x.iter().map(|x| u32::from(x[0] as u16) | u32::from(x[1] as u16) << 16).collect()
                };
                let want: Vec<u32> = (a.iter().zip(&b))
                    .map(|(a, b)| (0..2).map(|j| i64::from(a[j]) * i64::from(b[j])).sum::<i64>() as u32)
                    .map(|dot| dot.wrapping_add(round as u32).wrapping_sub(9))
                    .collect();
                let sum = d.splat((round as u32).wrapping_sub(9));
                assert_eq!(words(d.dot_pairs(sum, d.load(&join(&a)), d.load(&join(&b)))), want);
                let columns: [_; 2] = std::array::from_fn(|j| {
                    s.load(&a.iter().map(|a| f32::from(a[j]) + 0.4).collect::<Vec<_>>())
                });
                assert_eq!(words(d.pack_pairs(columns)), join(&a));
            }
            for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert_eq!(words(d.pack_pairs([s.splat(x); 2])), vec![0; n], "{x}");
            }
            let numbers: Vec<u32> = (0..n as u32).map(|i| i.wrapping_sub(3).wrapping_mul(1 << 20)).collect();
            let want: Vec<f32> = numbers.iter().map(|&x| x as i32 as f32).collect();
            assert_eq!(floats(d.to_f32(d.load(&numbers))), want);
            let bits: Vec<u32> = want.iter().map(|x| x.to_bits()).collect();
            assert_eq!(floats(d.as_f32(d.load(&bits))), want);
            // From the greatest power down to what rounds to 0.
            for top in [0.0, -123.0, 12_345_678.0] {
                for i in 0..40_000 {
                    let x: [f32; 8] = std::array::from_fn(|j| -(i as f32 + j as f32 * 0.25).floor());
                    let factor = 10.0 / 40_000.0;
                    let got = d.powers(x.map(|x| s.splat(top + x)), s.splat(top), s.splat(factor));
                    for (x, got) in x.chunks(4).zip(got) {
                        for bytes in words(got) {
                            for (x, got) in x.iter().zip(bytes.to_le_bytes()) {
                                let want = f64::from(D::MOST) * f64::from(x * factor).exp2();
                                assert!(
                                    (f64::from(got) - want).abs() <= 0.52 + 4e-3 * want,
                                    "{x} below {top}: {got} for {want}"
                                );
                            }
                        }
                    }
                }
            }
            for x in [-300.0, -1e5, -1e30] {
                let got = d.powers([s.splat(x); 8], s.splat(0.0), s.splat(1.0));
                assert_eq!(got.map(words), [vec![0; n], vec![0; n]], "{x}");
            }
            for top in [0.0, 12_582_912.0] {
                let got = d.powers([s.splat(top); 8], s.splat(top), s.splat(3e-4));
                let most = vec![u32::from_le_bytes([D::MOST; 4]); n];
                assert_eq!(got.map(words), [most.clone(), most]);
            }
        }
    }

    #[test]
    fn every_tier_keeps_the_contract() {
        for &isa in Isa::available().iter().filter(|&&isa| has_dot(isa)) {
            dispatch_dot(isa, Contract);
        }
    }
}
