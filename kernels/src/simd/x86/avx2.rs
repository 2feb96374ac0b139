//! Eight lanes of AVX2 + FMA + F16C.

use std::arch::x86_64::*;

use super::{max_lanes, prefetch, sums};
use crate::layout::ALIGN;
use crate::simd::{Block, CODE_ZERO, Simd, SimdOp};
use crate::{bf16, f16};

/// Eight lanes. A value proves AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(pub(super) ());

impl Avx2 {
    /// # Safety
    /// The machine has what a value proves.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Avx2(())
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn enter_avx2<O: SimdOp>(op: O) -> O::Output {
    op.run(Avx2(()))
}

/// Runs `op` on AVX2.
pub(in crate::simd) fn run_avx2<O: SimdOp>(op: O) -> O::Output {
    assert!(has_avx2(), "no AVX2 here");
    // SAFETY: the features were found.
    unsafe { enter_avx2(op) }
}

/// What an [`Avx2`] proves.
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Eight lanes of ones and eight of zeros: a window of eight that starts at `8 - len` enables the first `len`.
static MASK8: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

impl Avx2 {
    #[inline(always)]
    fn mask(self, len: usize) -> __m256i {
        assert!(len <= 8);
        tier!(_mm256_loadu_si256(MASK8.as_ptr().add(8 - len).cast()))
    }

    /// bf16 in the low halves of eight 32-bit lanes.
    #[inline(always)]
    fn round_bf16(self, v: __m256) -> __m256i {
        tier!({
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            _mm256_srli_epi32::<16>(_mm256_blendv_epi8(up, quiet, nan))
        })
    }

    #[inline(always)]
    fn narrow_bf16(self, v: __m256) -> __m128i {
        let r = self.round_bf16(v);
        tier!(_mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256::<1>(r)))
    }

    /// Eight codes in the low eight bytes.
    #[inline(always)]
    fn codes(self, v: __m256) -> __m128i {
        tier!({
            let v = _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(-127.0)), _mm256_set1_ps(127.0));
            let i = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(128));
            let words = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256::<1>(i));
            _mm_packus_epi16(words, words)
        })
    }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const SPLITS: bool = true;
    type F = __m256;
    type Shorts = Self;

    #[inline(always)]
    fn shorts(self) -> Option<Self> {
        Some(self)
    }

    #[inline(always)]
    fn outline<O: SimdOp>(self, op: O) -> O::Output {
        tier!(enter_avx2(op))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        tier!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> __m256 {
        let src = &src[..8];
        tier!(_mm256_loadu_ps(src.as_ptr()))
    }
    #[inline(always)]
    fn load_partial(self, src: &[f32]) -> __m256 {
        let mask = self.mask(src.len());
        tier!(_mm256_maskload_ps(src.as_ptr(), mask))
    }
    #[inline(always)]
    fn difference(self, a: &[i32], b: &[i32]) -> __m256 {
        let (a, b) = (&a[..8], &b[..8]);
        tier!({
            let (a, b) = (_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(b.as_ptr().cast()));
            _mm256_cvtepi32_ps(_mm256_sub_epi32(a, b))
        })
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> __m256 {
        let src = &src[..8];
        tier!({
            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(src.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
        })
    }
    #[inline(always)]
    fn load_bf16_partial(self, src: &[bf16]) -> __m256 {
        let mut all = [bf16::ZERO; 8];
        all[..src.len()].copy_from_slice(src);
        self.load_bf16(&all)
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16]) -> __m256 {
        let src = &src[..8];
        tier!(_mm256_cvtph_ps(_mm_loadu_si128(src.as_ptr().cast())))
    }
    #[inline(always)]
    fn prefetch<T>(self, src: &[T], ahead: usize) {
        prefetch(src, ahead);
    }
    #[inline(always)]
    fn store(self, v: __m256, dst: &mut [f32]) {
        let dst = &mut dst[..8];
        tier!(_mm256_storeu_ps(dst.as_mut_ptr(), v))
    }
    #[inline(always)]
    fn store_partial(self, v: __m256, dst: &mut [f32]) {
        let mask = self.mask(dst.len());
        tier!(_mm256_maskstore_ps(dst.as_mut_ptr(), mask, v))
    }
    #[inline(always)]
    fn store_bf16(self, v: __m256, dst: &mut [bf16]) {
        let dst = &mut dst[..8];
        let half = self.narrow_bf16(v);
        tier!(_mm_storeu_si128(dst.as_mut_ptr().cast(), half))
    }
    #[inline(always)]
    fn store_two(self, a: __m256, b: __m256, dst: &mut [f32], past: bool) {
        let dst = &mut dst[..16];
        if past && dst.as_ptr().addr().is_multiple_of(ALIGN) {
            tier!({
                _mm256_stream_ps(dst.as_mut_ptr(), a);
                _mm256_stream_ps(dst.as_mut_ptr().add(8), b);
            })
        } else {
            Simd::store(self, a, &mut dst[..8]);
            Simd::store(self, b, &mut dst[8..]);
        }
    }
    #[inline(always)]
    fn store_bf16_two(self, a: __m256, b: __m256, dst: &mut [bf16], past: bool) {
        let dst = &mut dst[..16];
        let (a, b) = (self.narrow_bf16(a), self.narrow_bf16(b));
        tier!({
            let both = _mm256_set_m128i(b, a);
            // Half a line: the other half comes at once.
            if past && dst.as_ptr().addr().is_multiple_of(ALIGN / 2) {
                _mm256_stream_si256(dst.as_mut_ptr().cast(), both);
            } else {
                _mm256_storeu_si256(dst.as_mut_ptr().cast(), both);
            }
        })
    }
    #[inline(always)]
    fn store_bf16_partial(self, v: __m256, dst: &mut [bf16]) {
        let mut all = [bf16::ZERO; 8];
        self.store_bf16(v, &mut all);
        let len = dst.len();
        dst.copy_from_slice(&all[..len]);
    }
    #[inline(always)]
    fn store_bf16_pairs(self, a: __m256, b: __m256, dst: &mut [bf16]) {
        let dst = &mut dst[..16];
        tier!({
            let half = _mm256_set1_epi32(0x8000);
            let low = _mm256_srli_epi32::<16>(_mm256_add_epi32(_mm256_castps_si256(a), half));
            let high = _mm256_add_epi32(_mm256_castps_si256(b), half);
            _mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm256_blend_epi16::<0xaa>(low, high))
        })
    }
    #[inline(always)]
    fn store_i16(self, v: __m256, dst: &mut [i16]) {
        let dst = &mut dst[..8];
        tier!({
            let wide = _mm256_cvtps_epi32(v);
            let shorts = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide));
            _mm_storeu_si128(dst.as_mut_ptr().cast(), shorts)
        })
    }
    #[inline(always)]
    fn store_codes(self, v: __m256, dst: &mut [u8]) {
        let dst = &mut dst[..8];
        let codes = self.codes(v);
        tier!(_mm_storel_epi64(dst.as_mut_ptr().cast(), codes))
    }
    #[inline(always)]
    fn store_codes_partial(self, v: __m256, dst: &mut [u8]) {
        let mut all = [0; 8];
        self.store_codes(v, &mut all);
        let len = dst.len();
        dst.copy_from_slice(&all[..len]);
    }
    #[inline(always)]
    fn load_bf16_pair(self, src: &[bf16]) -> [__m256; 2] {
        let src = &src[..16];
        tier!({
            let both = _mm256_loadu_si256(src.as_ptr().cast());
            let odd = _mm256_and_si256(both, _mm256_set1_epi32(0xffff_0000u32 as i32));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(both)), _mm256_castsi256_ps(odd)]
        })
    }
    #[inline(always)]
    fn join(self, block: Block<__m256>) -> Block<__m256> {
        let [a, b, c, d] = block;
        tier!({
            let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (lower, higher) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            [
                _mm256_permute2f128_ps::<0x20>(low, high),
                _mm256_permute2f128_ps::<0x31>(low, high),
                _mm256_permute2f128_ps::<0x20>(lower, higher),
                _mm256_permute2f128_ps::<0x31>(lower, higher),
            ]
        })
    }
    #[inline(always)]
    fn store_codes_block(self, block: Block<__m256>, split: bool, dst: &mut [u8]) {
        let dst = &mut dst[..Self::BLOCK];
        let [a, b, c, d] = block;
        tier!({
            let (a, b) = (_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
            let (c, d) = (_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
            let signed = if split {
                let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
                // Within 64 bits, four even elements and then four odd ones.
                let bytes = _mm256_permute4x64_epi64::<0xd8>(bytes);
                let pairs = _mm256_setr_epi8(
                    0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15, 0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9,
                    13, 10, 14, 11, 15,
                );
                _mm256_shuffle_epi8(bytes, pairs)
            } else {
                let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
                _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
            };
            let codes =
                _mm256_xor_si256(_mm256_max_epi8(signed, _mm256_set1_epi8(-127)), _mm256_set1_epi8(-128));
            _mm256_storeu_si256(dst.as_mut_ptr().cast(), codes)
        })
    }
    #[inline(always)]
    fn store_scaled_codes(self, mut block: Block<__m256>, factor: __m256, split: bool, dst: &mut [u8]) {
        let dst = &mut dst[..Self::BLOCK];
        for v in &mut block {
            *v = self.fma(*v, factor, Simd::splat(self, CODE_ZERO));
        }
        let [a, b, c, d] = block;
        tier!({
            let (a, b) = (_mm256_castps_si256(a), _mm256_castps_si256(b));
            let (c, d) = (_mm256_castps_si256(c), _mm256_castps_si256(d));
            let ab = _mm256_blend_epi16::<0xaa>(a, _mm256_slli_epi32::<16>(b));
            let cd = _mm256_blend_epi16::<0xaa>(c, _mm256_slli_epi32::<16>(d));
            let bytes = _mm256_packus_epi16(ab, cd);
            let codes = if split {
                _mm256_permute4x64_epi64::<0xd8>(bytes)
            } else {
                let apart = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
                let bytes = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(apart));
                _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
            };
            _mm256_storeu_si256(dst.as_mut_ptr().cast(), codes)
        })
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        tier!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        tier!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        tier!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        tier!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn recip_coarse(self, a: __m256) -> __m256 {
        tier!({
            let r = _mm256_rcp_ps(a);
            _mm256_mul_ps(r, _mm256_fnmadd_ps(a, r, _mm256_set1_ps(2.0)))
        })
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        tier!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        tier!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        tier!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        tier!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a))
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        tier!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn mul_pow2(self, a: __m256, n: __m256) -> __m256 {
        tier!({
            let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent))
        })
    }
    #[inline(always)]
    fn fraction(self, a: __m256) -> __m256 {
        tier!(_mm256_sub_ps(a, _mm256_floor_ps(a)))
    }
    #[inline(always)]
    fn mul_pow2_floor(self, a: __m256, n: __m256) -> __m256 {
        tier!(self.mul_pow2(a, _mm256_max_ps(_mm256_floor_ps(n), _mm256_set1_ps(-126.0))))
    }
    #[inline(always)]
    fn unzip(self, a: __m256, b: __m256) -> [__m256; 2] {
        tier!({
            let (low, high) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            [_mm256_shuffle_ps::<0x88>(low, high), _mm256_shuffle_ps::<0xdd>(low, high)]
        })
    }
    #[inline(always)]
    fn select_lt(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        tier!(_mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)))
    }
    #[inline(always)]
    fn any_lt(self, a: __m256, b: __m256) -> bool {
        tier!(_mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) != 0)
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        tier!({
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        tier!({
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        })
    }
    #[inline(always)]
    fn sums(self, v: [__m256; 4]) -> [f32; 4] {
        tier!(sums(v))
    }
    #[inline(always)]
    fn max_lanes(self, v: [__m256; 2]) -> [f32; 2] {
        tier!(max_lanes(v))
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [__m256]) {
        let r: &mut [__m256; 8] = rows.first_chunk_mut().expect("a square of lanes");
        tier!({
            let mut t = [_mm256_setzero_ps(); 8];
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            let mut u = [_mm256_setzero_ps(); 8];
            for h in 0..2 {
                let (a, b, c, d) = (t[4 * h], t[4 * h + 1], t[4 * h + 2], t[4 * h + 3]);
                u[4 * h] = _mm256_shuffle_ps::<0x44>(a, c);
                u[4 * h + 1] = _mm256_shuffle_ps::<0xee>(a, c);
                u[4 * h + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                u[4 * h + 3] = _mm256_shuffle_ps::<0xee>(b, d);
            }
            for i in 0..4 {
                r[i] = _mm256_permute2f128_ps::<0x20>(u[i], u[i + 4]);
                r[i + 4] = _mm256_permute2f128_ps::<0x31>(u[i], u[i + 4]);
            }
        })
    }
}
