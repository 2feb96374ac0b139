//! AVX2 with FMA.
//!
//! `vpmaddubsw` would saturate (255 * 127 twice is beyond 16 bits), so rows and 8-bit weights are widened to i16 once per block
//! of rows and met with `vpmaddwd`. Of 4-bit codes it has room for 16 products.

use std::arch::x86_64::*;

use super::{integer_lanes, moves};
use crate::gemm::steps::steps;
use crate::gemm::tile::{Grouped, Lanes, broadcast_kernel};
use crate::layout::Q4_GROUP;

steps!(
    #[target_feature(enable = "avx2,fma,f16c")]
    STEPS,
    // SAFETY: the features of the functions around it.
    unsafe { crate::simd::x86::Avx2::new() }
);

integer_lanes!(
    /// 8 i32 sums of i16 by i16.
    S16S16: 256, 2 inputs, |acc, a, b| _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
);

integer_lanes!(
    /// 2 i16 sums for each of 8 columns, of u8 by 4-bit codes: a product of either sign is at most 8 * 255, and a group makes 16
    /// of them in a sum.
    U8S4: 256, 4 inputs, |acc, a, b| _mm256_add_epi16(acc, _mm256_maddubs_epi16(a, b))
);

impl Grouped for U8S4 {
    #[inline(always)]
    unsafe fn fold(c: *mut u8, acc: __m256i, scale: *const u8) {
        // SAFETY: the caller has AVX2 and vouches for a vector's bytes of both.
        unsafe {
            let sum = _mm256_madd_epi16(acc, Self::load_b(scale));
            Self::store_acc(c, _mm256_add_epi32(Self::load_acc(c), sum));
        }
    }
}

/// 8 f32 sums.
struct F32;

impl Lanes for F32 {
    type Acc = __m256;
    type B = __m256;
    type A = __m256;
    const COLUMNS: usize = 8;
    const K: usize = 1;
    const A_BYTES: usize = 4;
    moves!(__m256, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_storeu_ps);

    #[inline(always)]
    unsafe fn splat_a(a: *const u8) -> __m256 {
        // SAFETY: the caller has AVX2 and vouches for the 4 bytes.
        unsafe { _mm256_set1_ps(a.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(acc: __m256, a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller has FMA.
        unsafe { _mm256_fmadd_ps(a, b, acc) }
    }
}

broadcast_kernel!(
    #[target_feature(enable = "avx2,fma")]
    GEMM_S16S16 = gemm_s16s16_6x16_avx2: S16S16, Avx2, S16S16, 6 x 16, rows [1 2 3 4 5 6], panels [1: 2], &STEPS
);
broadcast_kernel!(
    #[target_feature(enable = "avx2,fma")]
    GEMM_U8S4 = gemm_u8s4_6x16_avx2: U8S4, Avx2, U8S4, 6 x 16, rows [1 2 3 4 5 6], panels [1: 2], &STEPS,
    grouped_tile, Q4_GROUP
);
broadcast_kernel!(
    #[target_feature(enable = "avx2,fma")]
    GEMM_F32 = gemm_f32_6x16_avx2: F32, Avx2, F32, 6 x 16, rows [1 2 3 4 5 6], panels [1: 2], &STEPS
);
