//! Vectors of f32 in the width of the machine.
//!
//! Element-wise code is written once, as a [`SimdOp`] over any [`Simd`], and entered through [`dispatch`]. A value of a
//! tier's type is a proof that the machine has its instructions, so the operations are safe; loads and stores take slices
//! and check them. Everything on the way is `#[inline(always)]`, so that it ends up compiled for the tier.

pub mod dot;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;
pub mod shorts;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

use crate::{Isa, bf16, f16};
use shorts::Shorts;

/// The most lanes that any tier has.
pub const MAX_LANES: usize = 16;

/// Vectors of a block: what the loads and stores named so move.
pub const BLOCK_VECTORS: usize = 4;

/// Elements of the longest block.
pub const MAX_BLOCK: usize = BLOCK_VECTORS * MAX_LANES;

/// `1.5 * 2^23 + 128`: what is added to it is rounded to an integer, and the low byte is the code of that.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "other tiers convert"))]
const CODE_ZERO: f32 = 12_583_040.0;

/// [`BLOCK_VECTORS`] vectors.
pub type Block<F> = [F; BLOCK_VECTORS];

/// Operations on `LANES` f32 numbers at a time.
///
/// "Partial" loads and stores move `slice.len() < LANES` elements; the lanes beyond are zero. The others move `LANES`
/// elements and panic on a shorter slice.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a vector, at most [`MAX_LANES`].
    const LANES: usize;
    /// Vectors that fit in the registers.
    const REGISTERS: usize;
    /// Elements of a block.
    const BLOCK: usize = BLOCK_VECTORS * Self::LANES;
    /// Whether blocks of bf16 are loaded in **split order**: each two vectors hold the even elements of `2 * LANES`, then the
    /// odd ones, which takes an instruction each. Where it is false, split order is the order in memory.
    const SPLITS: bool = false;
    /// `LANES` f32.
    type F: Copy;
    /// The tier's fixed-point numbers.
    type Shorts: Shorts<F = Self::F>;

    /// Where the tier has them.
    #[inline(always)]
    fn shorts(self) -> Option<Self::Shorts> {
        None
    }
    /// Runs `op` as a function of its own, which keeps its registers to itself.
    fn outline<O: SimdOp>(self, op: O) -> O::Output;
    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// Loads `LANES` elements.
    fn load(self, src: &[f32]) -> Self::F;
    /// Loads all of `src`, fewer than `LANES` elements.
    fn load_partial(self, src: &[f32]) -> Self::F;
    /// Subtracts the first `LANES` integers of `b` from those of `a`, and converts the differences.
    fn difference(self, a: &[i32], b: &[i32]) -> Self::F;
    /// Loads and widens `LANES` elements.
    fn load_bf16(self, src: &[bf16]) -> Self::F;
    /// Loads and widens all of `src`, fewer than `LANES` elements.
    fn load_bf16_partial(self, src: &[bf16]) -> Self::F;
    /// Loads and widens `LANES` elements.
    #[inline(always)]
    fn load_f16(self, src: &[f16]) -> Self::F {
        let mut wide = [0.0; MAX_LANES];
        for (wide, x) in wide[..Self::LANES].iter_mut().zip(&src[..Self::LANES]) {
            *wide = f16_to_f32(u32::from(x.to_bits()));
        }
        self.load(&wide)
    }
    /// Asks for the cache line `ahead` bytes behind the beginning of `src`, which may lie outside.
    fn prefetch<T>(self, src: &[T], ahead: usize);
    /// Stores `LANES` elements.
    fn store(self, v: Self::F, dst: &mut [f32]);
    /// Stores the first `dst.len() < LANES` lanes.
    fn store_partial(self, v: Self::F, dst: &mut [f32]);
    /// Rounds to nearest even and stores `LANES` elements. What is below 2^-126 may become 0.
    fn store_bf16(self, v: Self::F, dst: &mut [bf16]);
    /// As [`Simd::store_bf16`], the first `dst.len() < LANES` lanes.
    fn store_bf16_partial(self, v: Self::F, dst: &mut [bf16]);
    /// Rounds to nearest (ties away from zero) and stores `a[0], b[0], a[1], b[1], ...`, `2 * LANES` elements, none NaN.
    fn store_bf16_pairs(self, a: Self::F, b: Self::F, dst: &mut [bf16]);
    /// Rounds to nearest even and stores `LANES` integers, of magnitudes up to 32767; NaN becomes any.
    #[inline(always)]
    fn store_i16(self, v: Self::F, dst: &mut [i16]) {
        let mut wide = [0.0; MAX_LANES];
        self.store(self.round(v), &mut wide);
        for (dst, x) in dst[..Self::LANES].iter_mut().zip(wide) {
            *dst = x as i16;
        }
    }
    /// Stores two vectors side by side; with `past` they may go past the caches, so a fence is due (`arch::fence`).
    #[inline(always)]
    fn store_two(self, a: Self::F, b: Self::F, dst: &mut [f32], past: bool) {
        let _ = past;
        self.store(a, &mut dst[..Self::LANES]);
        self.store(b, &mut dst[Self::LANES..]);
    }
    /// As [`Simd::store_two`], rounded as by [`Simd::store_bf16`].
    #[inline(always)]
    fn store_bf16_two(self, a: Self::F, b: Self::F, dst: &mut [bf16], past: bool) {
        let _ = past;
        self.store_bf16(a, &mut dst[..Self::LANES]);
        self.store_bf16(b, &mut dst[Self::LANES..]);
    }
    /// Stores `LANES` codes of an operand: `round(v) + 128`, saturated to 1 ..= 255.
    fn store_codes(self, v: Self::F, dst: &mut [u8]);
    /// Stores the first `dst.len() < LANES` codes of an operand.
    fn store_codes_partial(self, v: Self::F, dst: &mut [u8]);
    /// Loads and widens half a block, in split order.
    #[inline(always)]
    fn load_bf16_pair(self, src: &[bf16]) -> [Self::F; 2] {
        [self.load_bf16(&src[..Self::LANES]), self.load_bf16(&src[Self::LANES..])]
    }
    /// A block in the order of memory from one in split order.
    #[inline(always)]
    fn join(self, block: Block<Self::F>) -> Block<Self::F> {
        block
    }
    /// As [`Simd::store_codes`] for a block of magnitudes below 2^31, which is in split order if `split`.
    #[inline(always)]
    fn store_codes_block(self, block: Block<Self::F>, split: bool, dst: &mut [u8]) {
        let dst = &mut dst[..Self::BLOCK];
        let block = if split { self.join(block) } else { block };
        for (v, dst) in block.into_iter().zip(dst.chunks_exact_mut(Self::LANES)) {
            self.store_codes(v, dst);
        }
    }
    /// Stores a block of codes `round(v * factor) + 128`, which is in split order if `split`; for products of magnitudes up to
    /// 127, not rounded first where the tier fuses. NaN becomes any code.
    #[inline(always)]
    fn store_scaled_codes(self, mut block: Block<Self::F>, factor: Self::F, split: bool, dst: &mut [u8]) {
        for v in &mut block {
            *v = self.mul(*v, factor);
        }
        self.store_codes_block(block, split, dst);
    }

    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `1 / a` within a relative error of 1e-4, for a normal `a` below 2^126.
    fn recip_coarse(self, a: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the tier fuses.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The lesser; where `a` is NaN, `b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// The greater; where `a` is NaN, `b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Magnitudes.
    fn abs(self, a: Self::F) -> Self::F;
    /// The magnitude of `a` or `most`, which has none below 0, whichever is greater; where `a` is NaN, `most`.
    #[inline(always)]
    fn max_abs(self, a: Self::F, most: Self::F) -> Self::F {
        self.max(self.abs(a), most)
    }
    /// The nearest integer, ties to even, for magnitudes up to 2^22.
    fn round(self, a: Self::F) -> Self::F;
    /// `a * 2^n` for `a` in `[0.5, 2)` and an integer `n` where the result is a normal number.
    fn mul_pow2(self, a: Self::F, n: Self::F) -> Self::F;
    /// `a - floor(a)`, in `[0, 1]`; for a finite `a`.
    fn fraction(self, a: Self::F) -> Self::F;
    /// `a * 2^floor(n)` for `a` in `[1, 2.1)` and a finite `n` below 126; where `n < -126`, at most 2^-125.
    fn mul_pow2_floor(self, a: Self::F, n: Self::F) -> Self::F;
    /// The elements of `a` and then `b` at even places, and those at odd ones.
    #[inline(always)]
    fn unzip(self, a: Self::F, b: Self::F) -> [Self::F; 2] {
        let (mut zipped, mut places) = ([0.0; 2 * MAX_LANES], [[0.0; MAX_LANES]; 2]);
        self.store(a, &mut zipped);
        self.store(b, &mut zipped[Self::LANES..]);
        for (i, &x) in zipped[..2 * Self::LANES].iter().enumerate() {
            places[i % 2][i / 2] = x;
        }
        places.map(|x| self.load(&x))
    }
    /// Lane by lane `a < b ? x : y`.
    fn select_lt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// Whether `a < b` in any lane.
    fn any_lt(self, a: Self::F, b: Self::F) -> bool;
    /// The sum of all lanes, in a fixed order.
    fn sum(self, a: Self::F) -> f32;
    /// The greatest lane.
    fn max_lane(self, a: Self::F) -> f32;
    /// The sums of all lanes of each, in an order of their own.
    #[inline(always)]
    fn sums(self, [a, b, c, d]: [Self::F; 4]) -> [f32; 4] {
        [self.sum(a), self.sum(b), self.sum(c), self.sum(d)]
    }
    /// The greatest lane of each.
    #[inline(always)]
    fn max_lanes(self, [a, b]: [Self::F; 2]) -> [f32; 2] {
        [self.max_lane(a), self.max_lane(b)]
    }
    /// Transposes `LANES` vectors: `rows[i][j]` becomes `rows[j][i]`.
    fn transpose(self, rows: &mut [Self::F]);
}

/// Exact, of selections only: a normal number's bits are moved into place and its exponent corrected; a subnormal's
/// significand is an integer times 2^-24.
#[inline(always)]
fn f16_to_f32(bits: u32) -> f32 {
    const REBIAS: u32 = (127 - 15) << 23;
    let magnitude = bits & 0x7FFF;
    let normal = (magnitude << 13) + if magnitude >= 0x7C00 { 2 * REBIAS } else { REBIAS };
    let subnormal = (magnitude as i32 as f32 * (1.0 / (1 << 24) as f32)).to_bits();
    let x = if magnitude < 0x400 { subnormal } else { normal };
    f32::from_bits(x | (bits & 0x8000) << 16)
}

/// The types that tensors have in memory.
pub trait Element: Copy + Send + Sync + 'static {
    /// 0.
    const ZERO: Self;
    /// Whether blocks are loaded in split order.
    const SPLIT: bool;
    /// Loads half a block.
    fn load_pair<S: Simd>(s: S, src: &[Self]) -> [S::F; 2];
    /// Loads a block.
    #[inline(always)]
    fn load_block<S: Simd>(s: S, src: &[Self]) -> Block<S::F> {
        let (a, b) = src.split_at(2 * S::LANES);
        let ([a, b], [c, d]) = (Self::load_pair(s, a), Self::load_pair(s, b));
        [a, b, c, d]
    }
    /// Loads `S::LANES` elements.
    fn load<S: Simd>(s: S, src: &[Self]) -> S::F;
    /// Loads all of `src`, fewer than `S::LANES` elements.
    fn load_partial<S: Simd>(s: S, src: &[Self]) -> S::F;
    /// Stores `S::LANES` elements.
    fn store<S: Simd>(s: S, v: S::F, dst: &mut [Self]);
    /// Stores the first `dst.len() < S::LANES` lanes.
    fn store_partial<S: Simd>(s: S, v: S::F, dst: &mut [Self]);
    /// See [`Simd::store_two`].
    fn store_two<S: Simd>(s: S, v: [S::F; 2], dst: &mut [Self], past: bool);
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    const SPLIT: bool = false;
    #[inline(always)]
    fn load_pair<S: Simd>(s: S, src: &[f32]) -> [S::F; 2] {
        [s.load(src), s.load(&src[S::LANES..])]
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, src: &[f32]) -> S::F {
        s.load(src)
    }
    #[inline(always)]
    fn load_partial<S: Simd>(s: S, src: &[f32]) -> S::F {
        s.load_partial(src)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F, dst: &mut [f32]) {
        s.store(v, dst);
    }
    #[inline(always)]
    fn store_partial<S: Simd>(s: S, v: S::F, dst: &mut [f32]) {
        s.store_partial(v, dst);
    }
    #[inline(always)]
    fn store_two<S: Simd>(s: S, [a, b]: [S::F; 2], dst: &mut [f32], past: bool) {
        s.store_two(a, b, dst, past);
    }
}

impl Element for bf16 {
    const ZERO: Self = bf16::ZERO;
    const SPLIT: bool = true;
    #[inline(always)]
    fn load_pair<S: Simd>(s: S, src: &[bf16]) -> [S::F; 2] {
        s.load_bf16_pair(src)
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, src: &[bf16]) -> S::F {
        s.load_bf16(src)
    }
    #[inline(always)]
    fn load_partial<S: Simd>(s: S, src: &[bf16]) -> S::F {
        s.load_bf16_partial(src)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F, dst: &mut [bf16]) {
        s.store_bf16(v, dst);
    }
    #[inline(always)]
    fn store_partial<S: Simd>(s: S, v: S::F, dst: &mut [bf16]) {
        s.store_bf16_partial(v, dst);
    }
    #[inline(always)]
    fn store_two<S: Simd>(s: S, [a, b]: [S::F; 2], dst: &mut [bf16], past: bool) {
        s.store_bf16_two(a, b, dst, past);
    }
}

/// A computation written over [`Simd`]. `run` and what it calls should be `#[inline(always)]`.
pub trait SimdOp {
    /// What comes out.
    type Output;
    /// Runs on the tier of `s`.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs `op` compiled for the vectors of `isa`.
///
/// # Panics
/// Where the machine does not have `isa`.
pub fn dispatch<O: SimdOp>(isa: Isa, op: O) -> O::Output {
    match isa {
        Isa::Scalar => op.run(scalar::Scalar),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => x86::run_avx2(op),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni if x86::has_bf16() => x86::run_avx512_bf16(op),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Vnni => x86::run_avx512(op),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => x86::run_avx512_bf16(op),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::Dotprod | Isa::I8mm => neon::run_neon(op),
        _ => panic!("{isa:?} is not a tier of this architecture"),
    }
}

/// Lanes of the vectors that [`dispatch`] uses on `isa`.
pub const fn lanes(isa: Isa) -> usize {
    match isa {
        Isa::Avx2 | Isa::AvxVnni => 8,
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => 16,
        _ => 4,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Tiers of this machine that have every kind of vector that it runs, AVX-512 with an instruction that rounds to bf16 among
    /// them.
    pub(crate) fn tiers() -> Vec<Isa> {
        let kinds = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Neon];
        kinds.into_iter().filter(|isa| isa.is_available()).collect()
    }

    struct Contract;

    impl SimdOp for Contract {
        type Output = ();
        fn run<S: Simd>(self, s: S) {
            let n = S::LANES;
            let src: Vec<f32> = (0..n).map(|i| (i as f32 - 3.3) * 1.7).collect();
            let get = |v: S::F| {
                let mut out = vec![0.0; n];
                s.store(v, &mut out);
                out
            };
            let v = s.load(&src);
            assert_eq!(get(v), src);
            let (a, b): (Vec<i32>, Vec<i32>) = (0..n as i32).map(|i| (1 << 30, (1 << 30) - i)).unzip();
            assert_eq!(get(s.difference(&a, &b)), (0..n).map(|i| i as f32).collect::<Vec<_>>());
            let each = |got: S::F, f: &dyn Fn(f32) -> f32| {
                assert_eq!(get(got), src.iter().map(|&x| f(x)).collect::<Vec<_>>());
            };
            each(s.abs(v), &|x| x.abs());
            each(s.round(v), &|x| x.round_ties_even());
            each(s.min(v, s.splat(1.0)), &|x| x.min(1.0));
            each(s.max(v, s.splat(1.0)), &|x| x.max(1.0));
            each(s.div(v, s.splat(3.0)), &|x| x / 3.0);
            each(s.sub(s.add(v, v), s.mul(v, v)), &|x| (x + x) - x * x);
            each(s.select_lt(v, s.splat(1.0), s.splat(5.0), v), &|x| if x < 1.0 { 5.0 } else { x });
            each(s.fraction(v), &|x| x - x.floor());
            for e in [-126.0, -5.5, -0.1, 0.0, 7.9, 125.0] {
                let want = vec![2.0625 * 2f32.powi(f32::floor(e) as i32); n];
                assert_eq!(get(s.mul_pow2_floor(s.splat(2.0625), s.splat(e))), want);
            }
            for e in [-127.0, -1000.0, -1e9, -1e30] {
                assert!(
                    (0.0..=2f32.powi(-125)).contains(&get(s.mul_pow2_floor(s.splat(1.5), s.splat(e)))[0]),
                    "{e}"
                );
            }
            for x in [1.0, 1.3, 1.999, 77.7, 1e-30, 1e37] {
                assert!((get(s.recip_coarse(s.splat(x)))[0] * x - 1.0).abs() < 1e-4, "1 / {x}");
            }
            each(s.max_abs(v, s.splat(5.0)), &|x| x.abs().max(5.0));
            assert_eq!(get(s.max_abs(s.splat(f32::NAN), s.splat(5.0))), vec![5.0; n]);
            block_contract(s);
            if let Some(shorts) = s.shorts() {
                shorts::tests::contract(s, shorts);
            }
            let numbers: Vec<f32> = (0..2 * n).map(|i| i as f32).collect();
            for (got, first) in s.unzip(s.load(&numbers), s.load(&numbers[n..])).into_iter().zip([0, 1]) {
                assert_eq!(get(got), numbers[first..].iter().copied().step_by(2).collect::<Vec<_>>());
            }
            assert!(s.any_lt(v, s.splat(src[0] + 0.1)) && !s.any_lt(v, s.splat(src[0])));
            for e in [-126.0, -5.0, 0.0, 7.0, 127.0] {
                assert_eq!(get(s.mul_pow2(s.splat(1.25), s.splat(e))), vec![1.25 * 2f32.powi(e as i32); n]);
            }
            assert_eq!(get(s.mul_pow2(s.splat(0.75), s.splat(128.0))), vec![0.75 * 2.0 * 2f32.powi(127); n]);
            assert!((s.sum(v) - src.iter().sum::<f32>()).abs() < 1e-4);
            let w = s.mul(v, v);
            let one = s.splat(1.0);
            for (got, v) in s.sums([v, w, s.add(v, one), one]).into_iter().zip([v, w, s.add(v, one), one]) {
                assert!((got - get(v).iter().sum::<f32>()).abs() < 1e-4 * get(w).iter().sum::<f32>());
            }
            assert_eq!(s.max_lanes([v, w]), [s.max_lane(v), s.max_lane(w)]);
            assert_eq!(s.max_lane(v), src[n - 1]);
            assert_eq!(s.max_lane(s.sub(s.splat(0.0), v)), -src[0]);
            let mut pairs = vec![bf16::ZERO; 2 * n];
            s.store_bf16_pairs(v, s.mul(v, v), &mut pairs);
            let each_pair = src.iter().flat_map(|&x| [bf16::from_f32(x), bf16::from_f32(x * x)]);
            assert_eq!(pairs, each_pair.collect::<Vec<_>>());
            let shorts = [0.5, 1.5, -0.5, -2.5, 32767.0, -32767.0, 7.49, -7.51, 0.0, 1e-30];
            let shorts: Vec<f32> = shorts.into_iter().cycle().take(n).collect();
            let mut rounded = vec![0i16; n];
            s.store_i16(s.load(&shorts), &mut rounded);
            assert_eq!(rounded, shorts.iter().map(|x| x.round_ties_even() as i16).collect::<Vec<_>>());
            for first in (0..=u16::MAX).step_by(n) {
                let halves: Vec<f16> = (first..=first + (n as u16 - 1)).map(f16::from_bits).collect();
                for (got, want) in get(s.load_f16(&halves)).iter().zip(halves.iter().map(|x| x.to_f32())) {
                    assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{want}");
                }
            }
            for len in 0..n {
                let mut want = src[..len].to_vec();
                want.resize(n, 0.0);
                assert_eq!(get(s.load_partial(&src[..len])), want);
                let mut out = vec![9.0; n];
                s.store_partial(v, &mut out[..len]);
                assert_eq!(out[..len], src[..len]);
                assert!(out[len..].iter().all(|&x| x == 9.0));
            }
            let mut rows: Vec<S::F> =
                (0..n).map(|i| s.load(&(0..n).map(|j| (i * n + j) as f32).collect::<Vec<_>>())).collect();
            s.transpose(&mut rows);
            for (j, &r) in rows.iter().enumerate() {
                assert_eq!(get(r), (0..n).map(|i| (i * n + j) as f32).collect::<Vec<_>>());
            }
        }
    }

    /// Loads and stores of blocks, in both orders.
    fn block_contract<S: Simd>(s: S) {
        let wide: Vec<f32> = (0..S::BLOCK).map(|i| (i as f32 - 20.0) * 4.5).collect();
        let half: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
        let code = |x: f32| (x.round_ties_even().clamp(-127.0, 127.0) + 128.0) as u8;
        let (a, b) = (f32::load_block(s, &wide), bf16::load_block(s, &half));
        let mut joined = vec![0.0; S::BLOCK];
        for (v, to) in s.join(b).into_iter().zip(joined.chunks_exact_mut(S::LANES)) {
            s.store(v, to);
        }
        assert_eq!(joined, half.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
        let (mut codes, mut half_codes) = (vec![0u8; S::BLOCK], vec![0u8; S::BLOCK]);
        s.store_codes_block(a, f32::SPLIT, &mut codes);
        s.store_codes_block(b, bf16::SPLIT, &mut half_codes);
        assert_eq!(codes, wide.iter().map(|&x| code(x)).collect::<Vec<_>>());
        assert_eq!(half_codes, joined.iter().map(|&x| code(x)).collect::<Vec<_>>());
        let factor = s.splat(0.1234);
        let code = |x: f32| code(x * 0.1234);
        s.store_scaled_codes(a, factor, f32::SPLIT, &mut codes);
        s.store_scaled_codes(b, factor, bf16::SPLIT, &mut half_codes);
        assert_eq!(codes, wide.iter().map(|&x| code(x)).collect::<Vec<_>>());
        assert_eq!(half_codes, joined.iter().map(|&x| code(x)).collect::<Vec<_>>());
    }

    #[test]
    fn every_tier_keeps_the_contract() {
        for isa in tiers() {
            dispatch(isa, Contract);
            struct Lanes;
            impl SimdOp for Lanes {
                type Output = usize;
                fn run<S: Simd>(self, _: S) -> usize {
                    S::LANES
                }
            }
            assert_eq!(dispatch(isa, Lanes), lanes(isa));
        }
    }

    struct Narrow<'a>(&'a [f32]);

    impl SimdOp for Narrow<'_> {
        type Output = ();
        fn run<S: Simd>(self, s: S) {
            let n = S::LANES;
            let rounded = |got: bf16, x: f32| {
                let small = x.abs() < f32::MIN_POSITIVE && got == bf16::ZERO;
                got == bf16::from_f32(x) || small || x.is_nan() && got.is_nan()
            };
            for src in self.0.chunks_exact(2 * n) {
                let (a, b) = src.split_at(n);
                let mut out = vec![bf16::ONE; 2 * n];
                s.store_bf16_two(s.load(a), s.load(b), &mut out, false);
                for (&got, &x) in out.iter().zip(src) {
                    assert!(rounded(got, x), "{x} -> {got}");
                }
            }
            for src in self.0.chunks(n) {
                let len = src.len();
                let v = if len == n { s.load(src) } else { s.load_partial(src) };
                let half: Vec<bf16> = src.iter().map(|&x| bf16::from_f32(x)).collect();
                let mut out = vec![bf16::ONE; len];
                let mut codes = vec![7u8; len];
                let mut wide = vec![1.0; len];
                if len == n {
                    s.store_bf16(v, &mut out);
                    s.store_codes(v, &mut codes);
                    s.store(s.load_bf16(&half), &mut wide);
                } else {
                    s.store_bf16_partial(v, &mut out);
                    s.store_codes_partial(v, &mut codes);
                    s.store_partial(s.load_bf16_partial(&half), &mut wide);
                }
                for i in 0..len {
                    assert!(rounded(out[i], src[i]), "{} -> {}", src[i], out[i]);
                    assert!(wide[i] == half[i].to_f32() || src[i].is_nan() && wide[i].is_nan());
                    let code = src[i].round_ties_even().clamp(-127.0, 127.0) as i32 + 128;
                    assert!(
                        src[i].is_nan() && codes[i] > 0 || i32::from(codes[i]) == code,
                        "{} -> {}",
                        src[i],
                        codes[i]
                    );
                }
            }
        }
    }

    #[test]
    fn narrow_types_round_to_nearest_even() {
        let mut src = vec![
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::MAX,
            1e-40,
            0.5,
            1.5,
            2.5,
            126.5,
            -126.5,
        ];
        src.extend([127.49, 127.5, -127.5, -128.0, 1e9, -1e9, 4e9, -4e9]);
        src.extend((0..4000u32).map(|i| f32::from_bits(0x3f80_0000 + i * 0x1357)));
        src.extend((0..4001u32).map(|i| (i as f32 - 2000.0) * 0.0678));
        for isa in tiers() {
            dispatch(isa, Narrow(&src));
        }
    }
}
