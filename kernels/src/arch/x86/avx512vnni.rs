//! AVX-512 with VNNI.

use std::arch::x86_64::*;

use super::{avx512, moves};
use crate::gemm::tile::{Lanes, broadcast_kernel};

/// 16 i32 sums of u8 by i8.
struct U8S8;

impl Lanes for U8S8 {
    type Acc = __m512i;
    type B = __m512i;
    type A = __m512i;
    const COLUMNS: usize = 16;
    const K: usize = 4;
    const A_BYTES: usize = 4;
    moves!(__m512i, _mm512_setzero_si512, _mm512_loadu_si512, _mm512_storeu_si512);

    #[inline(always)]
    unsafe fn splat_a(a: *const u8) -> __m512i {
        // SAFETY: the caller has AVX-512 and vouches for the 4 bytes.
        unsafe { _mm512_set1_epi32(a.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller has AVX-512 VNNI.
        unsafe { _mm512_dpbusd_epi32(acc, a, b) }
    }
}

/// 16 i32 sums of i16 by i16.
struct S16S16;

impl Lanes for S16S16 {
    type Acc = __m512i;
    type B = __m512i;
    type A = __m512i;
    const COLUMNS: usize = 16;
    const K: usize = 2;
    const A_BYTES: usize = 4;
    moves!(__m512i, _mm512_setzero_si512, _mm512_loadu_si512, _mm512_storeu_si512);

    #[inline(always)]
    unsafe fn splat_a(a: *const u8) -> __m512i {
        // SAFETY: the caller has AVX-512 and vouches for the 4 bytes.
        unsafe { _mm512_set1_epi32(a.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller has AVX-512 VNNI.
        unsafe { _mm512_dpwssd_epi32(acc, a, b) }
    }
}

broadcast_kernel!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    GEMM_U8S8 = gemm_u8s8_12x32_avx512vnni: U8S8, Avx512Vnni, U8S8, 12 x 32, rows [1 2 3 4 5 6 7 8 9 10 11 12],
    panels [1: 1, 2: 2], &avx512::STEPS
);
broadcast_kernel!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    GEMM_S16S16 = gemm_s16s16_12x32_avx512vnni: S16S16, Avx512Vnni, S16S16, 12 x 32,
    rows [1 2 3 4 5 6 7 8 9 10 11 12], panels [1: 1, 2: 2], &avx512::STEPS
);
