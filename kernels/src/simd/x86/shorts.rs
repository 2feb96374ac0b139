//! 16-bit numbers of AVX2 and of AVX-512.

use std::arch::x86_64::*;

use super::{Avx2, Avx512};
use crate::simd::Block;
use crate::simd::shorts::{Pair, Shorts, Table};

/// Nothing, but not to be passed by another of its kind.
#[target_feature(enable = "avx2")]
#[inline]
fn in_turn256(mut v: __m256i) -> __m256i {
    // SAFETY: there is no instruction.
    unsafe { std::arch::asm!("/* {} */", inout(ymm_reg) v, options(nomem, nostack, preserves_flags)) };
    v
}

/// Nothing, but not to be passed by another of its kind.
#[target_feature(enable = "avx512f")]
#[inline]
fn in_turn512(mut v: __m512i) -> __m512i {
    // SAFETY: there is no instruction.
    unsafe { std::arch::asm!("/* {} */", inout(zmm_reg) v, options(nomem, nostack, preserves_flags)) };
    v
}

impl Shorts for Avx2 {
    const PIECES: usize = 16;
    type F = __m256;
    type V = __m256i;
    /// Bytes of the first vector and of the second in turn, eight each.
    type Index = __m256i;

    #[inline(always)]
    fn in_turn(self, v: __m256i) -> __m256i {
        tier!(in_turn256(v))
    }
    #[inline(always)]
    fn round_block(self, [a, b, c, d]: Block<__m256>, split: bool) -> Pair<__m256i> {
        tier!({
            let (a, b) = (_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
            let (c, d) = (_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
            if split {
                [_mm256_packs_epi32(a, c), _mm256_packs_epi32(b, d)]
            } else {
                [_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)]
            }
        })
    }
    #[inline(always)]
    fn splat(self, x: i16) -> __m256i {
        tier!(_mm256_set1_epi16(x))
    }
    #[inline(always)]
    fn load(self, src: &[i16]) -> __m256i {
        let src = &src[..16];
        tier!(_mm256_loadu_si256(src.as_ptr().cast()))
    }
    #[inline(always)]
    fn store(self, v: __m256i, dst: &mut [i16]) {
        let dst = &mut dst[..16];
        tier!(_mm256_storeu_si256(dst.as_mut_ptr().cast(), v))
    }
    #[inline(always)]
    fn index(self, [a, b]: Pair<__m256i>) -> __m256i {
        tier!({
            let upper = _mm256_set1_epi16(8);
            let pieces = _mm256_packs_epi16(_mm256_mulhrs_epi16(a, upper), _mm256_mulhrs_epi16(b, upper));
            _mm256_and_si256(pieces, _mm256_set1_epi8(15))
        })
    }
    #[inline(always)]
    fn place(self, v: __m256i) -> __m256i {
        tier!(_mm256_slli_epi16::<4>(v))
    }
    #[inline(always)]
    fn lookup(self, table: &Table, index: __m256i) -> Pair<__m256i> {
        tier!({
            let [lows, highs] = &table.bytes;
            let lows = _mm256_broadcastsi128_si256(_mm_loadu_si128(lows.as_ptr().cast()));
            let highs = _mm256_broadcastsi128_si256(_mm_loadu_si128(highs.as_ptr().cast()));
            let (low, high) = (_mm256_shuffle_epi8(lows, index), _mm256_shuffle_epi8(highs, index));
            [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]
        })
    }
    #[inline(always)]
    fn mul(self, a: __m256i, b: __m256i) -> __m256i {
        tier!(_mm256_mulhrs_epi16(a, b))
    }
    #[inline(always)]
    fn add(self, a: __m256i, b: __m256i) -> __m256i {
        tier!(_mm256_add_epi16(a, b))
    }
    #[inline(always)]
    fn add_saturating(self, a: __m256i, b: __m256i) -> __m256i {
        tier!(_mm256_adds_epi16(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m256i, b: __m256i) -> __m256i {
        tier!(_mm256_max_epi16(a, b))
    }
    #[inline(always)]
    fn max_lane(self, v: __m256i) -> u16 {
        tier!({
            let v = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            // The least of what is left to 2^16 - 1.
            !_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(v, _mm_set1_epi8(-1)))) as u16
        })
    }
    #[inline(always)]
    fn store_codes_high(self, [a, b]: Pair<__m256i>, split: bool, dst: &mut [u8]) {
        let dst = &mut dst[..32];
        tier!({
            let signed = if split {
                let odd = _mm256_and_si256(b, _mm256_set1_epi16(0xff00u16 as i16));
                _mm256_permute4x64_epi64::<0xd8>(_mm256_or_si256(odd, _mm256_srli_epi16::<8>(a)))
            } else {
                let bytes = _mm256_packs_epi16(_mm256_srai_epi16::<8>(a), _mm256_srai_epi16::<8>(b));
                _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
            };
            let codes =
                _mm256_xor_si256(_mm256_max_epi8(signed, _mm256_set1_epi8(-127)), _mm256_set1_epi8(-128));
            _mm256_storeu_si256(dst.as_mut_ptr().cast(), codes)
        })
    }
    #[inline(always)]
    fn store_codes_low(self, [a, b]: Pair<__m256i>, split: bool, dst: &mut [u8]) {
        let dst = &mut dst[..32];
        tier!({
            let signed = if split {
                let even = _mm256_and_si256(a, _mm256_set1_epi16(0xff));
                _mm256_permute4x64_epi64::<0xd8>(_mm256_or_si256(even, _mm256_slli_epi16::<8>(b)))
            } else {
                let bytes = _mm256_packs_epi16(a, b);
                _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
            };
            _mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm256_xor_si256(signed, _mm256_set1_epi8(-128)))
        })
    }
}

impl<const BF16: bool> Shorts for Avx512<BF16> {
    const PIECES: usize = 32;
    type F = __m512;
    type V = __m512i;
    type Index = Pair<__m512i>;

    #[inline(always)]
    fn in_turn(self, v: __m512i) -> __m512i {
        tier!(in_turn512(v))
    }
    #[inline(always)]
    fn round_block(self, [a, b, c, d]: Block<__m512>, split: bool) -> Pair<__m512i> {
        tier!({
            let (a, b) = (_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            let (c, d) = (_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
            if split {
                [_mm512_packs_epi32(a, c), _mm512_packs_epi32(b, d)]
            } else {
                [_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)]
            }
        })
    }
    #[inline(always)]
    fn splat(self, x: i16) -> __m512i {
        tier!(_mm512_set1_epi16(x))
    }
    #[inline(always)]
    fn load(self, src: &[i16]) -> __m512i {
        let src = &src[..32];
        tier!(_mm512_loadu_si512(src.as_ptr().cast()))
    }
    #[inline(always)]
    fn store(self, v: __m512i, dst: &mut [i16]) {
        let dst = &mut dst[..32];
        tier!(_mm512_storeu_si512(dst.as_mut_ptr().cast(), v))
    }
    #[inline(always)]
    fn index(self, [a, b]: Pair<__m512i>) -> Pair<__m512i> {
        tier!({
            let upper = _mm512_set1_epi16(16);
            [_mm512_mulhrs_epi16(a, upper), _mm512_mulhrs_epi16(b, upper)]
        })
    }
    #[inline(always)]
    fn place(self, v: __m512i) -> __m512i {
        tier!(_mm512_slli_epi16::<5>(v))
    }
    #[inline(always)]
    fn lookup(self, table: &Table, [a, b]: Pair<__m512i>) -> Pair<__m512i> {
        tier!({
            let table = _mm512_loadu_si512(table.numbers.as_ptr().cast());
            [_mm512_permutexvar_epi16(a, table), _mm512_permutexvar_epi16(b, table)]
        })
    }
    #[inline(always)]
    fn mul(self, a: __m512i, b: __m512i) -> __m512i {
        tier!(_mm512_mulhrs_epi16(a, b))
    }
    #[inline(always)]
    fn add(self, a: __m512i, b: __m512i) -> __m512i {
        tier!(_mm512_add_epi16(a, b))
    }
    #[inline(always)]
    fn add_saturating(self, a: __m512i, b: __m512i) -> __m512i {
        tier!(_mm512_adds_epi16(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512i, b: __m512i) -> __m512i {
        tier!(_mm512_max_epi16(a, b))
    }
    #[inline(always)]
    fn max_lane(self, v: __m512i) -> u16 {
        tier!({
            let v = _mm256_max_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
            let v = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            // The least of what is left to 2^16 - 1.
            !_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(v, _mm_set1_epi8(-1)))) as u16
        })
    }
    #[inline(always)]
    fn store_codes_high(self, [a, b]: Pair<__m512i>, split: bool, dst: &mut [u8]) {
        let dst = &mut dst[..64];
        tier!({
            let signed = if split {
                let high = _mm512_set1_epi16(0xff00u16 as i16);
                // odd where `high`, else even >> 8
                self.order_split(_mm512_ternarylogic_epi32::<0xca>(high, b, _mm512_srli_epi16::<8>(a)))
            } else {
                let bytes = _mm512_packs_epi16(_mm512_srai_epi16::<8>(a), _mm512_srai_epi16::<8>(b));
                self.order_packed(bytes)
            };
            let codes =
                _mm512_xor_si512(_mm512_max_epi8(signed, _mm512_set1_epi8(-127)), _mm512_set1_epi8(-128));
            _mm512_storeu_si512(dst.as_mut_ptr().cast(), codes)
        })
    }
    #[inline(always)]
    fn store_codes_low(self, [a, b]: Pair<__m512i>, split: bool, dst: &mut [u8]) {
        let dst = &mut dst[..64];
        tier!({
            let signed = if split {
                let high = _mm512_set1_epi16(0xff00u16 as i16);
                // odd << 8 where `high`, else even
                self.order_split(_mm512_ternarylogic_epi32::<0xca>(high, _mm512_slli_epi16::<8>(b), a))
            } else {
                self.order_packed(_mm512_packs_epi16(a, b))
            };
            _mm512_storeu_si512(dst.as_mut_ptr().cast(), _mm512_xor_si512(signed, _mm512_set1_epi8(-128)))
        })
    }
}
