//! Four lanes of plain Rust.
#![forbid(unsafe_code)]

use super::shorts::Never;
use super::{Simd, SimdOp};
use crate::bf16;

const N: usize = 4;

/// The tier that every machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

#[inline(always)]
fn map(a: [f32; N], f: impl Fn(f32) -> f32) -> [f32; N] {
    [f(a[0]), f(a[1]), f(a[2]), f(a[3])]
}

#[inline(always)]
fn zip(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

/// `1.5 * 2^23`: adding it leaves no bits for a fraction.
const ROUND: f32 = 12_582_912.0;

/// `x.floor()` without a call.
#[inline(always)]
fn floor(x: f32) -> f32 {
    let whole = if x.abs() < 4_194_304.0 { (x + ROUND) - ROUND } else { x };
    if whole > x { whole - 1.0 } else { whole }
}

#[inline(always)]
fn code(x: f32) -> u8 {
    (((x.clamp(-127.0, 127.0) + ROUND).to_bits() as i32 - ROUND.to_bits() as i32) + 128).clamp(1, 255) as u8
}

impl Simd for Scalar {
    const LANES: usize = N;
    const REGISTERS: usize = 16;
    type F = [f32; N];
    type Shorts = Never<Self>;

    #[inline(never)]
    fn outline<O: SimdOp>(self, op: O) -> O::Output {
        op.run(self)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; N] {
        [x; N]
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> [f32; N] {
        *src.first_chunk().expect("a whole vector")
    }
    #[inline(always)]
    fn load_partial(self, src: &[f32]) -> [f32; N] {
        let mut v = [0.0; N];
        v[..src.len()].copy_from_slice(src);
        v
    }
    #[inline(always)]
    fn difference(self, a: &[i32], b: &[i32]) -> [f32; N] {
        let (a, b) = (&a[..N], &b[..N]);
        [(a[0] - b[0]) as f32, (a[1] - b[1]) as f32, (a[2] - b[2]) as f32, (a[3] - b[3]) as f32]
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> [f32; N] {
        src.first_chunk::<N>().expect("a whole vector").map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }
    #[inline(always)]
    fn load_bf16_partial(self, src: &[bf16]) -> [f32; N] {
        let mut v = [bf16::ZERO; N];
        v[..src.len()].copy_from_slice(src);
        self.load_bf16(&v)
    }
    #[inline(always)]
    fn prefetch<T>(self, _: &[T], _: usize) {}
    #[inline(always)]
    fn store(self, v: [f32; N], dst: &mut [f32]) {
        dst[..N].copy_from_slice(&v);
    }
    #[inline(always)]
    fn store_partial(self, v: [f32; N], dst: &mut [f32]) {
        let len = dst.len();
        dst.copy_from_slice(&v[..len]);
    }
    #[inline(always)]
    fn store_bf16(self, v: [f32; N], dst: &mut [bf16]) {
        dst[..N].copy_from_slice(&v.map(bf16::from_f32));
    }
    #[inline(always)]
    fn store_bf16_partial(self, v: [f32; N], dst: &mut [bf16]) {
        let len = dst.len();
        dst.copy_from_slice(&v.map(bf16::from_f32)[..len]);
    }
    #[inline(always)]
    fn store_bf16_pairs(self, a: [f32; N], b: [f32; N], dst: &mut [bf16]) {
        for (i, pair) in dst[..2 * N].chunks_exact_mut(2).enumerate() {
            pair.copy_from_slice(
                &[a[i], b[i]].map(|x| bf16::from_bits(((x.to_bits() + 0x8000) >> 16) as u16)),
            );
        }
    }
    #[inline(always)]
    fn store_codes(self, v: [f32; N], dst: &mut [u8]) {
        dst[..N].copy_from_slice(&v.map(code));
    }
    #[inline(always)]
    fn store_codes_partial(self, v: [f32; N], dst: &mut [u8]) {
        let len = dst.len();
        dst.copy_from_slice(&v.map(code)[..len]);
    }
    #[inline(always)]
    fn add(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn recip_coarse(self, a: [f32; N]) -> [f32; N] {
        map(a, |x| 1.0 / x)
    }
    #[inline(always)]
    fn fma(self, a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn min(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: [f32; N]) -> [f32; N] {
        map(a, f32::abs)
    }
    #[inline(always)]
    fn round(self, a: [f32; N]) -> [f32; N] {
        map(a, |x| (x + ROUND) - ROUND)
    }
    #[inline(always)]
    fn mul_pow2(self, a: [f32; N], n: [f32; N]) -> [f32; N] {
        zip(a, n, |a, n| f32::from_bits(a.to_bits().wrapping_add((n + ROUND).to_bits() << 23)))
    }
    #[inline(always)]
    fn fraction(self, a: [f32; N]) -> [f32; N] {
        map(a, |x| x - floor(x))
    }
    #[inline(always)]
    fn mul_pow2_floor(self, a: [f32; N], n: [f32; N]) -> [f32; N] {
        self.mul_pow2(a, map(n, |n| floor(if n > -126.0 { n } else { -126.0 })))
    }
    #[inline(always)]
    fn select_lt(self, a: [f32; N], b: [f32; N], x: [f32; N], y: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn any_lt(self, a: [f32; N], b: [f32; N]) -> bool {
        (0..N).any(|i| a[i] < b[i])
    }
    #[inline(always)]
    fn sum(self, a: [f32; N]) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn max_lane(self, a: [f32; N]) -> f32 {
        a[0].max(a[2]).max(a[1].max(a[3]))
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [[f32; N]]) {
        let r: &mut [[f32; N]; N] = rows.first_chunk_mut().expect("a square of lanes");
        *r = std::array::from_fn(|j| std::array::from_fn(|i| r[i][j]));
    }
}
