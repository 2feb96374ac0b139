//! Sixteen lanes of AVX-512.

use std::arch::x86_64::*;

use super::{max_lanes, prefetch, sums};
use crate::layout::ALIGN;
use crate::simd::{Block, CODE_ZERO, Simd, SimdOp};
use crate::{bf16, f16};

/// Sixteen lanes. A value proves AVX-512 F, BW, VL, DQ and AVX2, FMA, and AVX-512-BF16 if `BF16`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const BF16: bool>(pub(super) ());

impl<const BF16: bool> Avx512<BF16> {
    /// # Safety
    /// The machine has what a value proves.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Avx512(())
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
#[inline(never)]
fn enter_avx512<O: SimdOp>(op: O) -> O::Output {
    op.run(Avx512::<false>(()))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
#[inline(never)]
fn enter_avx512_bf16<O: SimdOp>(op: O) -> O::Output {
    op.run(Avx512::<true>(()))
}

/// What every [`Avx512`] proves.
pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("fma")
}

/// Whether the machine rounds to bf16 in one instruction.
pub(crate) fn has_bf16() -> bool {
    is_x86_feature_detected!("avx512bf16")
}

/// Runs `op` on AVX-512.
pub(in crate::simd) fn run_avx512<O: SimdOp>(op: O) -> O::Output {
    assert!(has_avx512(), "no AVX-512 here");
    // SAFETY: the features were found; AVX2 is part of AVX-512.
    unsafe { enter_avx512(op) }
}

/// Runs `op` on AVX-512 with AVX-512-BF16.
pub(in crate::simd) fn run_avx512_bf16<O: SimdOp>(op: O) -> O::Output {
    assert!(has_avx512() && has_bf16(), "no AVX-512-BF16 here");
    // SAFETY: the features were found; AVX2 is part of AVX-512.
    unsafe { enter_avx512_bf16(op) }
}

impl<const BF16: bool> Avx512<BF16> {
    #[inline(always)]
    fn mask(self, len: usize) -> __mmask16 {
        assert!(len <= 16);
        ((1u32 << len) - 1) as __mmask16
    }

    #[inline(always)]
    fn narrow_bf16(self, v: __m512) -> __m256i {
        if BF16 {
            // SAFETY: a `__m256bh` is a `__m256i`; the token proves the instruction.
            return tier!(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v)));
        }
        tier!({
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let r = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x40_0000));
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(r))
        })
    }

    /// `a`, then `b`.
    #[inline(always)]
    fn narrow_bf16_two(self, a: __m512, b: __m512) -> __m512i {
        if BF16 {
            // SAFETY: a `__m512bh` is a `__m512i`; the token proves the instruction.
            return tier!(std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)));
        }
        let (a, b) = (self.narrow_bf16(a), self.narrow_bf16(b));
        tier!(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b))
    }

    #[inline(always)]
    fn codes(self, v: __m512) -> __m128i {
        tier!({
            let signed = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_min_ps(v, _mm512_set1_ps(127.0))));
            _mm_xor_si128(_mm_max_epi8(signed, _mm_set1_epi8(-127)), _mm_set1_epi8(-128))
        })
    }
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const SPLITS: bool = true;
    type F = __m512;
    type Shorts = Self;

    #[inline(always)]
    fn shorts(self) -> Option<Self> {
        Some(self)
    }

    #[inline(always)]
    fn outline<O: SimdOp>(self, op: O) -> O::Output {
        if BF16 { tier!(enter_avx512_bf16(op)) } else { tier!(enter_avx512(op)) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        tier!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> __m512 {
        let src = &src[..16];
        tier!(_mm512_loadu_ps(src.as_ptr()))
    }
    #[inline(always)]
    fn load_partial(self, src: &[f32]) -> __m512 {
        let mask = self.mask(src.len());
        tier!(_mm512_maskz_loadu_ps(mask, src.as_ptr()))
    }
    #[inline(always)]
    fn difference(self, a: &[i32], b: &[i32]) -> __m512 {
        let (a, b) = (&a[..16], &b[..16]);
        tier!({
            let (a, b) = (_mm512_loadu_si512(a.as_ptr().cast()), _mm512_loadu_si512(b.as_ptr().cast()));
            _mm512_cvtepi32_ps(_mm512_sub_epi32(a, b))
        })
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> __m512 {
        let src = &src[..16];
        tier!({
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(src.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        })
    }
    #[inline(always)]
    fn load_bf16_partial(self, src: &[bf16]) -> __m512 {
        let mask = self.mask(src.len());
        tier!({
            let words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, src.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        })
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16]) -> __m512 {
        let src = &src[..16];
        tier!(_mm512_cvtph_ps(_mm256_loadu_si256(src.as_ptr().cast())))
    }
    #[inline(always)]
    fn prefetch<T>(self, src: &[T], ahead: usize) {
        prefetch(src, ahead);
    }
    #[inline(always)]
    fn store(self, v: __m512, dst: &mut [f32]) {
        let dst = &mut dst[..16];
        tier!(_mm512_storeu_ps(dst.as_mut_ptr(), v))
    }
    #[inline(always)]
    fn store_partial(self, v: __m512, dst: &mut [f32]) {
        let mask = self.mask(dst.len());
        tier!(_mm512_mask_storeu_ps(dst.as_mut_ptr(), mask, v))
    }
    #[inline(always)]
    fn store_bf16(self, v: __m512, dst: &mut [bf16]) {
        let dst = &mut dst[..16];
        let half = self.narrow_bf16(v);
        tier!(_mm256_storeu_si256(dst.as_mut_ptr().cast(), half))
    }
    #[inline(always)]
    fn store_two(self, a: __m512, b: __m512, dst: &mut [f32], past: bool) {
        let dst = &mut dst[..32];
        if past && dst.as_ptr().addr().is_multiple_of(ALIGN) {
            tier!({
                _mm512_stream_ps(dst.as_mut_ptr(), a);
                _mm512_stream_ps(dst.as_mut_ptr().add(16), b);
            })
        } else {
            Simd::store(self, a, &mut dst[..16]);
            Simd::store(self, b, &mut dst[16..]);
        }
    }
    #[inline(always)]
    fn store_bf16_two(self, a: __m512, b: __m512, dst: &mut [bf16], past: bool) {
        let dst = &mut dst[..32];
        let both = self.narrow_bf16_two(a, b);
        tier!({
            if past && dst.as_ptr().addr().is_multiple_of(ALIGN) {
                _mm512_stream_si512(dst.as_mut_ptr().cast(), both);
            } else {
                _mm512_storeu_si512(dst.as_mut_ptr().cast(), both);
            }
        })
    }
    #[inline(always)]
    fn store_bf16_partial(self, v: __m512, dst: &mut [bf16]) {
        let (mask, half) = (self.mask(dst.len()), self.narrow_bf16(v));
        tier!(_mm256_mask_storeu_epi16(dst.as_mut_ptr().cast(), mask, half))
    }
    #[inline(always)]
    fn store_bf16_pairs(self, a: __m512, b: __m512, dst: &mut [bf16]) {
        let dst = &mut dst[..32];
        tier!({
            let half = _mm512_set1_epi32(0x8000);
            let low = _mm512_srli_epi32::<16>(_mm512_add_epi32(_mm512_castps_si512(a), half));
            let high = _mm512_add_epi32(_mm512_castps_si512(b), half);
            let mask = _mm512_set1_epi32(0xffff_0000u32 as i32);
            // high & mask | low
            _mm512_storeu_si512(dst.as_mut_ptr().cast(), _mm512_ternarylogic_epi32::<0xea>(high, mask, low))
        })
    }
    #[inline(always)]
    fn store_i16(self, v: __m512, dst: &mut [i16]) {
        let dst = &mut dst[..16];
        tier!(_mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v))))
    }
    #[inline(always)]
    fn store_codes(self, v: __m512, dst: &mut [u8]) {
        let dst = &mut dst[..16];
        let codes = self.codes(v);
        tier!(_mm_storeu_si128(dst.as_mut_ptr().cast(), codes))
    }
    #[inline(always)]
    fn store_codes_partial(self, v: __m512, dst: &mut [u8]) {
        let (mask, codes) = (self.mask(dst.len()), self.codes(v));
        tier!(_mm_mask_storeu_epi8(dst.as_mut_ptr().cast(), mask, codes))
    }
    #[inline(always)]
    fn load_bf16_pair(self, src: &[bf16]) -> [__m512; 2] {
        let src = &src[..32];
        tier!({
            let both = _mm512_loadu_si512(src.as_ptr().cast());
            let odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff_0000u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)), _mm512_castsi512_ps(odd)]
        })
    }
    #[inline(always)]
    fn join(self, block: Block<__m512>) -> Block<__m512> {
        let [a, b, c, d] = block;
        tier!({
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            [
                _mm512_permutex2var_ps(a, low, b),
                _mm512_permutex2var_ps(a, high, b),
                _mm512_permutex2var_ps(c, low, d),
                _mm512_permutex2var_ps(c, high, d),
            ]
        })
    }
    #[inline(always)]
    fn store_codes_block(self, block: Block<__m512>, split: bool, dst: &mut [u8]) {
        let dst = &mut dst[..Self::BLOCK];
        let [a, b, c, d] = block;
        tier!({
            let (a, b) = (_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            let (c, d) = (_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
            let signed = if split {
                let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
                // odd << 16 where `high`, else even
                let ab = _mm512_ternarylogic_epi32::<0xca>(high, _mm512_slli_epi32::<16>(b), a);
                let cd = _mm512_ternarylogic_epi32::<0xca>(high, _mm512_slli_epi32::<16>(d), c);
                let order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
                _mm512_permutexvar_epi64(order, _mm512_packs_epi16(ab, cd))
            } else {
                let bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
                // Within 128 bits, four elements of each vector.
                let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                _mm512_permutexvar_epi32(order, bytes)
            };
            let codes =
                _mm512_xor_si512(_mm512_max_epi8(signed, _mm512_set1_epi8(-127)), _mm512_set1_epi8(-128));
            _mm512_storeu_si512(dst.as_mut_ptr().cast(), codes)
        })
    }
    #[inline(always)]
    fn store_scaled_codes(self, mut block: Block<__m512>, factor: __m512, split: bool, dst: &mut [u8]) {
        let dst = &mut dst[..Self::BLOCK];
        for v in &mut block {
            *v = self.fma(*v, factor, Simd::splat(self, CODE_ZERO));
        }
        let [a, b, c, d] = block;
        tier!({
            let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
            let (c, d) = (_mm512_castps_si512(c), _mm512_castps_si512(d));
            let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
            // second << 16 where `high`, else first
            let ab = _mm512_ternarylogic_epi32::<0xca>(high, _mm512_slli_epi32::<16>(b), a);
            let cd = _mm512_ternarylogic_epi32::<0xca>(high, _mm512_slli_epi32::<16>(d), c);
            let bytes = _mm512_packus_epi16(ab, cd);
            let codes = if split {
                self.order_split(bytes)
            } else {
                let apart = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
                self.order_packed(_mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(apart)))
            };
            _mm512_storeu_si512(dst.as_mut_ptr().cast(), codes)
        })
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        tier!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        tier!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        tier!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        tier!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn recip_coarse(self, a: __m512) -> __m512 {
        tier!(_mm512_rcp14_ps(a))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        tier!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        tier!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        tier!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        tier!(_mm512_abs_ps(a))
    }
    #[inline(always)]
    fn max_abs(self, a: __m512, most: __m512) -> __m512 {
        // The greater magnitude, without its sign.
        tier!(_mm512_range_ps::<0b1011>(a, most))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        tier!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn mul_pow2(self, a: __m512, n: __m512) -> __m512 {
        tier!(_mm512_scalef_ps(a, n))
    }
    #[inline(always)]
    fn fraction(self, a: __m512) -> __m512 {
        tier!(_mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn mul_pow2_floor(self, a: __m512, n: __m512) -> __m512 {
        tier!(_mm512_scalef_ps(a, n))
    }
    #[inline(always)]
    fn unzip(self, a: __m512, b: __m512) -> [__m512; 2] {
        tier!({
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            [_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)]
        })
    }
    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        tier!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
    }
    #[inline(always)]
    fn any_lt(self, a: __m512, b: __m512) -> bool {
        tier!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) != 0)
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        tier!(_mm512_reduce_add_ps(a))
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        tier!(_mm512_reduce_max_ps(a))
    }
    #[inline(always)]
    fn sums(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        tier!({
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let b = _mm256_add_ps(_mm512_castps512_ps256(b), _mm512_extractf32x8_ps::<1>(b));
            let c = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps::<1>(c));
            let d = _mm256_add_ps(_mm512_castps512_ps256(d), _mm512_extractf32x8_ps::<1>(d));
            sums([a, b, c, d])
        })
    }
    #[inline(always)]
    fn max_lanes(self, [a, b]: [__m512; 2]) -> [f32; 2] {
        tier!({
            let a = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let b = _mm256_max_ps(_mm512_castps512_ps256(b), _mm512_extractf32x8_ps::<1>(b));
            max_lanes([a, b])
        })
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [__m512]) {
        let r: &mut [__m512; 16] = rows.first_chunk_mut().expect("a square of lanes");
        tier!({
            let mut t = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            // u[4q + j] holds, in its 128-bit part p, the elements 4p + j of rows 4q to 4q + 3.
            let mut u = [_mm512_setzero_ps(); 16];
            for q in 0..4 {
                let (a, b, c, d) = (t[4 * q], t[4 * q + 1], t[4 * q + 2], t[4 * q + 3]);
                u[4 * q] = _mm512_shuffle_ps::<0x44>(a, c);
                u[4 * q + 1] = _mm512_shuffle_ps::<0xee>(a, c);
                u[4 * q + 2] = _mm512_shuffle_ps::<0x44>(b, d);
                u[4 * q + 3] = _mm512_shuffle_ps::<0xee>(b, d);
            }
            for j in 0..4 {
                let (a, b, c, d) = (u[j], u[4 + j], u[8 + j], u[12 + j]);
                let (lo, hi) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
                r[j] = _mm512_shuffle_f32x4::<0x88>(lo, hi);
                r[8 + j] = _mm512_shuffle_f32x4::<0xdd>(lo, hi);
                let (lo, hi) = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
                r[4 + j] = _mm512_shuffle_f32x4::<0x88>(lo, hi);
                r[12 + j] = _mm512_shuffle_f32x4::<0xdd>(lo, hi);
            }
        })
    }
}

impl<const BF16: bool> Avx512<BF16> {
    /// A block of bytes from two vectors, each with eight elements in its 128 bits: four of 64 from 0 on, four from 32 on.
    #[inline(always)]
    pub(super) fn order_split(self, bytes: __m512i) -> __m512i {
        tier!(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), bytes))
    }

    /// A block of bytes from four elements of each vector within 128 bits.
    #[inline(always)]
    pub(super) fn order_packed(self, bytes: __m512i) -> __m512i {
        tier!({
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_permutexvar_epi32(order, bytes)
        })
    }
}
