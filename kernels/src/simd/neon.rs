//! Four lanes of NEON.

use std::arch::aarch64::*;

use super::shorts::Never;
use super::{Simd, SimdOp};
use crate::bf16;

/// Four lanes. A value proves NEON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// # Safety
    /// The machine has NEON.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Neon(())
    }
}

#[target_feature(enable = "neon")]
#[inline(never)]
fn enter<O: SimdOp>(op: O) -> O::Output {
    op.run(Neon(()))
}

/// Runs `op` on NEON.
pub(super) fn run_neon<O: SimdOp>(op: O) -> O::Output {
    assert!(std::arch::is_aarch64_feature_detected!("neon"), "no NEON here");
    // SAFETY: the feature was found.
    unsafe { enter(op) }
}

/// An expression of intrinsics of the tier whose token is `self`.
macro_rules! tier {
    ($e:expr) => {{
        // SAFETY: a token exists only where NEON was found; pointers come from slices whose length was checked before.
        #[allow(unused_unsafe)]
        unsafe {
            $e
        }
    }};
}

impl Neon {
    #[inline(always)]
    fn narrow_bf16(self, v: float32x4_t) -> uint16x4_t {
        tier!({
            let bits = vreinterpretq_u32_f32(v);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
            let quiet = vorrq_u32(bits, vdupq_n_u32(0x40_0000));
            vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(v, v), up, quiet))
        })
    }

    /// Four codes in the low four bytes.
    #[inline(always)]
    fn codes(self, v: float32x4_t) -> u32 {
        tier!({
            let v = vminnmq_f32(vmaxnmq_f32(v, vdupq_n_f32(-127.0)), vdupq_n_f32(127.0));
            let i = vaddq_s32(vcvtnq_s32_f32(v), vdupq_n_s32(128));
            let words = vmovn_s32(i);
            let bytes = vmovn_u16(vreinterpretq_u16_s16(vcombine_s16(words, words)));
            vget_lane_u32::<0>(vreinterpret_u32_u8(bytes))
        })
    }
}

impl Simd for Neon {
    const LANES: usize = 4;
    const REGISTERS: usize = 32;
    type F = float32x4_t;
    type Shorts = Never<Self>;

    #[inline(always)]
    fn outline<O: SimdOp>(self, op: O) -> O::Output {
        tier!(enter(op))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        tier!(vdupq_n_f32(x))
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> float32x4_t {
        let src = &src[..4];
        tier!(vld1q_f32(src.as_ptr()))
    }
    #[inline(always)]
    fn load_partial(self, src: &[f32]) -> float32x4_t {
        let mut all = [0.0; 4];
        all[..src.len()].copy_from_slice(src);
        self.load(&all)
    }
    #[inline(always)]
    fn difference(self, a: &[i32], b: &[i32]) -> float32x4_t {
        let (a, b) = (&a[..4], &b[..4]);
        tier!(vcvtq_f32_s32(vsubq_s32(vld1q_s32(a.as_ptr()), vld1q_s32(b.as_ptr()))))
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> float32x4_t {
        let src = &src[..4];
        tier!(vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(src.as_ptr().cast()))))
    }
    #[inline(always)]
    fn load_bf16_partial(self, src: &[bf16]) -> float32x4_t {
        let mut all = [bf16::ZERO; 4];
        all[..src.len()].copy_from_slice(src);
        self.load_bf16(&all)
    }
    #[inline(always)]
    fn prefetch<T>(self, src: &[T], ahead: usize) {
        let at = src.as_ptr().cast::<u8>().wrapping_add(ahead);
        // SAFETY: a prefetch has no effect but on caches, whatever the address.
        unsafe {
            std::arch::asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, readonly, preserves_flags))
        }
    }
    #[inline(always)]
    fn store(self, v: float32x4_t, dst: &mut [f32]) {
        let dst = &mut dst[..4];
        tier!(vst1q_f32(dst.as_mut_ptr(), v))
    }
    #[inline(always)]
    fn store_partial(self, v: float32x4_t, dst: &mut [f32]) {
        let mut all = [0.0; 4];
        self.store(v, &mut all);
        let len = dst.len();
        dst.copy_from_slice(&all[..len]);
    }
    #[inline(always)]
    fn store_bf16(self, v: float32x4_t, dst: &mut [bf16]) {
        let dst = &mut dst[..4];
        let half = self.narrow_bf16(v);
        tier!(vst1_u16(dst.as_mut_ptr().cast(), half))
    }
    #[inline(always)]
    fn store_bf16_partial(self, v: float32x4_t, dst: &mut [bf16]) {
        let mut all = [bf16::ZERO; 4];
        self.store_bf16(v, &mut all);
        let len = dst.len();
        dst.copy_from_slice(&all[..len]);
    }
    #[inline(always)]
    fn store_bf16_pairs(self, a: float32x4_t, b: float32x4_t, dst: &mut [bf16]) {
        let dst = &mut dst[..8];
        tier!({
            let half = vdupq_n_u32(0x8000);
            let low = vshrq_n_u32::<16>(vaddq_u32(vreinterpretq_u32_f32(a), half));
            let pairs = vsriq_n_u32::<16>(vaddq_u32(vreinterpretq_u32_f32(b), half), vshlq_n_u32::<16>(low));
            vst1q_u32(dst.as_mut_ptr().cast(), pairs)
        })
    }
    #[inline(always)]
    fn store_codes(self, v: float32x4_t, dst: &mut [u8]) {
        dst[..4].copy_from_slice(&self.codes(v).to_le_bytes());
    }
    #[inline(always)]
    fn store_codes_partial(self, v: float32x4_t, dst: &mut [u8]) {
        let len = dst.len();
        dst.copy_from_slice(&self.codes(v).to_le_bytes()[..len]);
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        tier!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        tier!(vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        tier!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        tier!(vdivq_f32(a, b))
    }
    #[inline(always)]
    fn recip_coarse(self, a: float32x4_t) -> float32x4_t {
        tier!({
            let r = vrecpeq_f32(a);
            vmulq_f32(r, vrecpsq_f32(a, r))
        })
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        tier!(vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        tier!(vbslq_f32(vcltq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        tier!(vbslq_f32(vcgtq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn abs(self, a: float32x4_t) -> float32x4_t {
        tier!(vabsq_f32(a))
    }
    #[inline(always)]
    fn round(self, a: float32x4_t) -> float32x4_t {
        tier!(vrndnq_f32(a))
    }
    #[inline(always)]
    fn mul_pow2(self, a: float32x4_t, n: float32x4_t) -> float32x4_t {
        tier!({
            let exponent = vshlq_n_s32::<23>(vcvtnq_s32_f32(n));
            vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), exponent))
        })
    }
    #[inline(always)]
    fn fraction(self, a: float32x4_t) -> float32x4_t {
        tier!(vsubq_f32(a, vrndmq_f32(a)))
    }
    #[inline(always)]
    fn mul_pow2_floor(self, a: float32x4_t, n: float32x4_t) -> float32x4_t {
        tier!(self.mul_pow2(a, vrndmq_f32(vmaxq_f32(n, vdupq_n_f32(-126.0)))))
    }
    #[inline(always)]
    fn select_lt(self, a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t) -> float32x4_t {
        tier!(vbslq_f32(vcltq_f32(a, b), x, y))
    }
    #[inline(always)]
    fn any_lt(self, a: float32x4_t, b: float32x4_t) -> bool {
        tier!(vmaxvq_u32(vcltq_f32(a, b)) != 0)
    }
    #[inline(always)]
    fn sum(self, a: float32x4_t) -> f32 {
        tier!(vaddvq_f32(a))
    }
    #[inline(always)]
    fn max_lane(self, a: float32x4_t) -> f32 {
        tier!(vmaxvq_f32(a))
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [float32x4_t]) {
        let r: &mut [float32x4_t; 4] = rows.first_chunk_mut().expect("a square of lanes");
        tier!({
            let (a, b) = (vtrnq_f32(r[0], r[1]), vtrnq_f32(r[2], r[3]));
            r[0] = vcombine_f32(vget_low_f32(a.0), vget_low_f32(b.0));
            r[1] = vcombine_f32(vget_low_f32(a.1), vget_low_f32(b.1));
            r[2] = vcombine_f32(vget_high_f32(a.0), vget_high_f32(b.0));
            r[3] = vcombine_f32(vget_high_f32(a.1), vget_high_f32(b.1));
        })
    }
}
