//! Dot products of bytes on AVX2, AVX-VNNI and AVX-512-VNNI.

use std::arch::x86_64::*;

use super::{Avx2, Avx512, has_avx2, has_avx512};
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

    /// One vector of [`Dot::powers`], in words whose next byte is zero.
    #[inline(always)]
    fn power(self, x: __m256, factor: __m256) -> __m256i {
        // Adding it leaves 8 bits for a fraction; the exponent of an f32 begins above them.
        const STEP: f32 = 49152.0 + 127.0;
        // 2^(m - 1) for m in [1, 2], minimax.
        const Q: [f32; 3] = [0.681_277_9, -0.016_742_57, 0.337_189_45];
        // Adding it to a number below 2^22 leaves no bits for a fraction.
        const ROUND: f32 = 8_388_608.0;
        let s = self.0;
        let most = f32::from(Self::MOST);
        let e = s.max(s.fma(x, factor, s.splat(STEP)), s.splat(STEP - 100.0));
        tier!({
            let bits = _mm256_slli_epi32::<15>(_mm256_castps_si256(e));
            let fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f_ffff));
            let m = _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f80_0000)));
            let power = _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_set1_epi32(0x7f_ffff), bits));
            let q = s.fma(s.fma(m, s.splat(Q[2] * most), s.splat(Q[1] * most)), m, s.splat(Q[0] * most));
            _mm256_castps_si256(s.fma(q, power, s.splat(ROUND)))
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
    fn powers(self, x: [__m256; 4], factor: __m256) -> __m256i {
        let [a, b, c, d] = x;
        self.join([
            self.power(a, factor),
            self.power(b, factor),
            self.power(c, factor),
            self.power(d, factor),
        ])
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
            let bytes = _mm512_packus_epi16(ab, cd);
            // In each quarter four bytes of a, of b, of c and of d.
            let order = _mm512_set4_epi32(0x0f0b_0703, 0x0e0a_0602, 0x0d09_0501, 0x0c08_0400);
            _mm512_shuffle_epi8(bytes, order)
        })
    }
    #[inline(always)]
    fn powers(self, x: [__m512; 4], factor: __m512) -> __m512i {
        let [a, b, c, d] = x;
        self.pack([
            self.power(a, factor),
            self.power(b, factor),
            self.power(c, factor),
            self.power(d, factor),
        ])
    }
}

impl Dot16 {
    /// One vector of [`Dot::powers`], not yet rounded.
    #[inline(always)]
    fn power(self, x: __m512, factor: __m512) -> __m512 {
        let s = self.0;
        math::exp2_rough(s, s.fma(x, factor, s.splat(math::LOG2_255)))
    }
}
