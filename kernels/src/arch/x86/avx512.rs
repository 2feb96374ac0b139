//! AVX-512 F, BW, VL, DQ.

use std::arch::x86_64::*;

use super::{integer_lanes, moves};
use crate::gemm::steps::steps;
use crate::gemm::tile::{Grouped, Lanes, broadcast_kernel};
use crate::layout::Q4_GROUP;

steps!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    STEPS,
    // SAFETY: the features of the functions around it.
    unsafe { crate::simd::x86::Avx512::<false>::new() }
);

steps!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")]
    STEPS_BF16,
    // SAFETY: the features of the functions around it.
    unsafe { crate::simd::x86::Avx512::<true>::new() }
);

integer_lanes!(
    /// 16 i32 sums of i16 by i16.
    S16S16: 512, 2 inputs, |acc, a, b| _mm512_add_epi32(acc, _mm512_madd_epi16(a, b))
);

integer_lanes!(
    /// 2 i16 sums for each of 16 columns, of u8 by 4-bit codes: a product of either sign is at most 8 * 255, and a group makes 16
    /// of them in a sum.
    U8S4: 512, 4 inputs, |acc, a, b| _mm512_add_epi16(acc, _mm512_maddubs_epi16(a, b))
);

impl Grouped for U8S4 {
    #[inline(always)]
    unsafe fn fold(c: *mut u8, acc: __m512i, scale: *const u8) {
        // SAFETY: the caller has AVX-512 and vouches for a vector's bytes of both.
        unsafe {
            let sum = _mm512_madd_epi16(acc, Self::load_b(scale));
            Self::store_acc(c, _mm512_add_epi32(Self::load_acc(c), sum));
        }
    }
}

/// 16 f32 sums.
struct F32;

impl Lanes for F32 {
    type Acc = __m512;
    type B = __m512;
    type A = __m512;
    const COLUMNS: usize = 16;
    const K: usize = 1;
    const A_BYTES: usize = 4;
    moves!(__m512, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps);

    #[inline(always)]
    unsafe fn splat_a(a: *const u8) -> __m512 {
        // SAFETY: the caller has AVX-512 and vouches for the 4 bytes.
        unsafe { _mm512_set1_ps(a.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(acc: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_fmadd_ps(a, b, acc) }
    }
}

broadcast_kernel!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    GEMM_S16S16 = gemm_s16s16_12x32_avx512: S16S16, Avx512, S16S16, 12 x 32, rows [1 2 3 4 5 6 7 8 9 10 11 12],
    panels [1: 1, 2: 2], &STEPS
);
broadcast_kernel!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    GEMM_U8S4 = gemm_u8s4_12x32_avx512: U8S4, Avx512, U8S4, 12 x 32, rows [1 2 3 4 5 6 7 8 9 10 11 12],
    panels [1: 1, 2: 2], &STEPS, grouped_tile, Q4_GROUP
);
broadcast_kernel!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    GEMM_F32 = gemm_f32_12x32_avx512: F32, Avx512, F32, 12 x 32, rows [1 2 3 4 5 6 7 8 9 10 11 12],
    panels [1: 1, 2: 2], &STEPS
);
