//! Dot products of bytes on AVX2, AVX-VNNI and AVX-512-VNNI.

use std::arch::x86_64::*;

use super::{Avx2, Avx512, has_avx2, has_avx512};
use crate::arch::x86::{avx512vnni, avxvnni};
use crate::math;
use crate::simd::Simd;
use crate::simd::dot::{Dot, DotOp};

/// [`Avx2`], and AVX-VNNI if `VNNI`.
#[derive(Clone, Copy)]
struct Dot8<const VNNI: bool>(Avx2);

/// [`Avx512`], and AVX-512-VNNI.
#[derive(Clone, Copy)]
struct Dot16(Avx512<false>);

/// Runs `op` on AVX2.
pub(in crate::simd) fn run_avx2<O: DotOp>(op: O) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn enter<O: DotOp>(op: O) {
        op.run(Dot8::<false>(Avx2(())));
    }
    assert!(has_avx2(), "no AVX2 here");
    // SAFETY: the features were found.
    unsafe { enter(op) }
}

/// Runs `op` on AVX2 with AVX-VNNI.
pub(in crate::simd) fn run_avxvnni<O: DotOp>(op: O) {
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    fn enter<O: DotOp>(op: O) {
        op.run(Dot8::<true>(Avx2(())));
    }
    assert!(has_avx2() && is_x86_feature_detected!("avxvnni"), "no AVX-VNNI here");
    // SAFETY: the features were found.
    unsafe { enter(op) }
}

/// Runs `op` on AVX-512 with AVX-512-VNNI.
pub(in crate::simd) fn run_avx512vnni<O: DotOp>(op: O) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
    fn enter<O: DotOp>(op: O) {
        op.run(Dot16(Avx512(())));
    }
    assert!(has_avx512() && is_x86_feature_detected!("avx512vnni"), "no AVX-512-VNNI here");
    // SAFETY: the features were found; AVX2 is part of AVX-512.
    unsafe { enter(op) }
}

impl<const VNNI: bool> Dot8<VNNI> {
    /// Joins the low bytes of words whose next bytes are zero.
    #[inline(always)]
    fn join(self, [a, b, c, d]: [__m256i; 4]) -> __m256i {
        tier!({
            let even = _mm256_blend_epi16::<0xaa>(a, _mm256_slli_epi32::<16>(c));
            let odd = _mm256_blend_epi16::<0xaa>(b, _mm256_slli_epi32::<16>(d));
            _mm256_or_si256(even, _mm256_slli_epi16::<8>(odd))
        })
    }

    /// Replaces exponents in units of 2^-12, the least of which stands for 1/2, by their powers, rounded; the least by 0.
    #[inline(always)]
    fn raise(self, e: &mut [__m256i; 4]) {
        // 2^f for f in [0, 1] in units of 2^-14, minimax (within 0.21 %) of those that begin just below 1.
        const Q: [i16; 3] = [16383, 10915, 5402];
        tier!({
            // Twice the power of two of the whole part, less 1.
            let wholes = _mm_setr_epi8(0, 1, 3, 7, 15, 31, 63, 127, -1, -1, -1, -1, -1, -1, -1, -1);
            let wholes = _mm256_broadcastsi128_si256(wholes);
            let (mut whole, mut f, mut q) = (*e, *e, *e);
            for i in 0..4 {
                whole[i] = _mm256_srli_epi16::<12>(e[i]);
                f[i] = _mm256_slli_epi16::<3>(_mm256_and_si256(e[i], _mm256_set1_epi16(0xfff)));
            }
            for i in 0..4 {
                whole[i] = _mm256_shuffle_epi8(wholes, whole[i]);
                q[i] = _mm256_mulhrs_epi16(f[i], _mm256_set1_epi16(Q[2]));
            }
            for i in 0..4 {
                q[i] = _mm256_mulhrs_epi16(f[i], _mm256_add_epi16(q[i], _mm256_set1_epi16(Q[1])));
            }
            for i in 0..4 {
                q[i] = _mm256_add_epi16(q[i], _mm256_set1_epi16(Q[0]));
                e[i] = _mm256_mulhrs_epi16(q[i], _mm256_sub_epi16(whole[i], _mm256_set1_epi16(-1)));
            }
        })
    }
}

impl<const VNNI: bool> Dot for Dot8<VNNI> {
    type Vectors = Avx2;
    type Words = __m256i;
    const MOST: u8 = if VNNI { 255 } else { 127 };

    #[inline(always)]
    fn vectors(self) -> Avx2 {
        self.0
    }
    #[inline(always)]
    fn splat(self, x: u32) -> __m256i {
        tier!(_mm256_set1_epi32(x as i32))
    }
    #[inline(always)]
    fn load(self, src: &[u32]) -> __m256i {
        let src = &src[..8];
        tier!(_mm256_loadu_si256(src.as_ptr().cast()))
    }
    #[inline(always)]
    fn store(self, v: __m256i, dst: &mut [u32]) {
        let dst = &mut dst[..8];
        tier!(_mm256_storeu_si256(dst.as_mut_ptr().cast(), v))
    }
    #[inline(always)]
    fn dot(self, sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        if VNNI {
            return tier!(_mm256_dpbusd_avx_epi32(sum, a, b));
        }
        // Two products of 127 * 127 fit into 16 bits.
        tier!({
            let pairs = _mm256_maddubs_epi16(a, b);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        })
    }
    #[inline(always)]
    fn to_f32(self, v: __m256i) -> __m256 {
        tier!(_mm256_cvtepi32_ps(v))
    }
    #[inline(always)]
    fn as_f32(self, v: __m256i) -> __m256 {
        tier!(_mm256_castsi256_ps(v))
    }
    #[inline(always)]
    fn pack(self, x: [__m256; 4]) -> __m256i {
        let [a, b, c, d] = x;
        self.join(tier!([
            _mm256_cvtps_epi32(a),
            _mm256_cvtps_epi32(b),
            _mm256_cvtps_epi32(c),
            _mm256_cvtps_epi32(d)
        ]))
    }
    #[inline(always)]
    fn dot_pairs(self, sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        if VNNI {
            return tier!(avxvnni::dpwssd(sum, a, b));
        }
        tier!(_mm256_add_epi32(sum, _mm256_madd_epi16(a, b)))
    }
    #[inline(always)]
    fn pack_pairs(self, [a, b]: [__m256; 2]) -> __m256i {
        tier!({
            let b = _mm256_slli_epi32::<16>(_mm256_cvtps_epi32(b));
            _mm256_blend_epi16::<0xaa>(_mm256_cvtps_epi32(a), b)
        })
    }
    #[inline(always)]
    fn powers(self, x: [__m256; 8], top: __m256, factor: __m256) -> [__m256i; 2] {
        const UNIT: f32 = 4096.0;
        // Of the exponent of `MOST`.
        let most = UNIT * if VNNI { 1.0 + math::LOG2_255 } else { 1.0 + math::LOG2_127 };
        let s = self.0;
        let factor = s.mul(factor, s.splat(UNIT));
        let offset = s.sub(s.splat(most), s.mul(top, factor));
        tier!({
            let mut e = [_mm256_setzero_si256(); 4];
            for i in 0..4 {
                let (a, b) = (s.fma(x[2 * i], factor, offset), s.fma(x[2 * i + 1], factor, offset));
                // What is below 0 saturates to 0.
                e[i] = _mm256_packus_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
            }
            self.raise(&mut e);
            // In each half four bytes of each of four vectors.
            let order = _mm_setr_epi32(0x0c08_0400, 0x0d09_0501, 0x0e0a_0602, 0x0f0b_0703);
            let mut words = [_mm256_packus_epi16(e[0], e[1]), _mm256_packus_epi16(e[2], e[3])];
            for words in &mut words {
                // Of a product that saturates, neither factor may be 128.
                let bytes = if VNNI { *words } else { _mm256_min_epu8(*words, _mm256_set1_epi8(127)) };
                *words = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
            }
            words
        })
    }
}

impl Dot for Dot16 {
    type Vectors = Avx512<false>;
    type Words = __m512i;
    const MOST: u8 = 255;

    #[inline(always)]
    fn vectors(self) -> Avx512<false> {
        self.0
    }
    #[inline(always)]
    fn splat(self, x: u32) -> __m512i {
        tier!(_mm512_set1_epi32(x as i32))
    }
    #[inline(always)]
    fn load(self, src: &[u32]) -> __m512i {
        let src = &src[..16];
        tier!(_mm512_loadu_si512(src.as_ptr().cast()))
    }
    #[inline(always)]
    fn store(self, v: __m512i, dst: &mut [u32]) {
        let dst = &mut dst[..16];
        tier!(_mm512_storeu_si512(dst.as_mut_ptr().cast(), v))
    }
    #[inline(always)]
    fn dot(self, sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        tier!(_mm512_dpbusd_epi32(sum, a, b))
    }
    #[inline(always)]
    fn to_f32(self, v: __m512i) -> __m512 {
        tier!(_mm512_cvtepi32_ps(v))
    }
    #[inline(always)]
    fn as_f32(self, v: __m512i) -> __m512 {
        tier!(_mm512_castsi512_ps(v))
    }
    #[inline(always)]
    fn pack(self, x: [__m512; 4]) -> __m512i {
        tier!({
            let [a, b, c, d] = x;
            let ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            let cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
            self.order(_mm512_packus_epi16(ab, cd))
        })
    }
    #[inline(always)]
    fn dot_pairs(self, sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        tier!(avx512vnni::dpwssd(sum, a, b))
    }
    #[inline(always)]
    fn pack_pairs(self, [a, b]: [__m512; 2]) -> __m512i {
        tier!({
            let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
            let b = _mm512_slli_epi32::<16>(_mm512_cvtps_epi32(b));
            // b where `high`, else a
            _mm512_ternarylogic_epi32::<0xca>(high, b, _mm512_cvtps_epi32(a))
        })
    }
    #[inline(always)]
    fn powers(self, x: [__m512; 8], top: __m512, factor: __m512) -> [__m512i; 2] {
        let s = self.0;
        let factor = s.mul(factor, s.splat(UNIT));
        let offset = s.sub(s.splat(MOST_EXPONENT), s.mul(top, factor));
        tier!({
            let mut e = [_mm512_setzero_si512(); 4];
            for i in 0..4 {
                let (a, b) = (s.fma(x[2 * i], factor, offset), s.fma(x[2 * i + 1], factor, offset));
                // What is below 0 saturates to 0.
                e[i] = _mm512_packus_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            }
            self.raise(&mut e);
            [self.order(_mm512_packus_epi16(e[0], e[1])), self.order(_mm512_packus_epi16(e[2], e[3]))]
        })
    }
}

/// Exponents in a piece of [`PIECES`], from whose beginning to its end powers grow by a quarter, as if on a line: within 0.32 %.
const PIECE: usize = 2048;

/// Units of an exponent in a power of two: [`PIECE`] over the logarithm of 5/4.
const UNIT: f32 = 6361.669;

/// Where on the line of the last piece powers are neither too great nor too small.
const EXACT: f64 = 0.845;

/// The exponent of 255.
const MOST_EXPONENT: f32 = PIECE as f32 * (31.0 + EXACT as f32);

/// 128 times the powers at the beginning of each piece.
static PIECES: [u16; 32] = pieces();

const fn pieces() -> [u16; 32] {
    let (mut pieces, mut i, mut power) = ([0; 32], 32, 255.0 / (1.0 + EXACT / 4.0));
    while i > 0 {
        i -= 1;
        pieces[i] = (128.0 * power + 0.5) as u16;
        power *= 0.8;
    }
    pieces
}

impl Dot16 {
    /// Replaces exponents by their powers, rounded.
    #[inline(always)]
    fn raise(self, e: &mut [__m512i; 4]) {
        tier!({
            let pieces = _mm512_loadu_si512(PIECES.as_ptr().cast());
            let (mask, one) = (_mm512_set1_epi16(0x1fff), _mm512_set1_epi16(0x8000u16 as i16));
            let (mut begin, mut grown) = (*e, *e);
            for i in 0..4 {
                begin[i] = _mm512_permutexvar_epi16(_mm512_srli_epi16::<11>(e[i]), pieces);
                // 2^15 and a quarter of that for a whole piece: e << 2 where the mask is, else the highest bit.
                grown[i] = _mm512_ternarylogic_epi32::<0xca>(mask, _mm512_slli_epi16::<2>(e[i]), one);
            }
            for i in 0..4 {
                e[i] = _mm512_mulhi_epu16(grown[i], begin[i]);
            }
            for e in e {
                // 64 times the power, and back.
                *e = _mm512_mulhrs_epi16(*e, _mm512_set1_epi16(512));
            }
        })
    }

    /// Words of a byte of a, b, c and d each, from quarters of four bytes of a, of b, of c and of d.
    #[inline(always)]
    fn order(self, bytes: __m512i) -> __m512i {
        tier!({
            let order = _mm512_set4_epi32(0x0f0b_0703, 0x0e0a_0602, 0x0d09_0501, 0x0c08_0400);
            _mm512_shuffle_epi8(bytes, order)
        })
    }
}
