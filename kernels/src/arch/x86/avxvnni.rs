//! AVX2 with 256-bit VNNI in VEX encoding.

use std::arch::x86_64::*;

use super::{avx2, moves};
use crate::gemm::tile::{Lanes, broadcast_kernel};

/// 8 i32 sums of u8 by i8.
struct U8S8;

impl Lanes for U8S8 {
    type Acc = __m256i;
    type B = __m256i;
    type A = __m256i;
    const COLUMNS: usize = 8;
    const K: usize = 4;
    const A_BYTES: usize = 4;
    moves!(__m256i, _mm256_setzero_si256, _mm256_loadu_si256, _mm256_storeu_si256);

    #[inline(always)]
    unsafe fn splat_a(a: *const u8) -> __m256i {
        // SAFETY: the caller has AVX2 and vouches for the 4 bytes.
        unsafe { _mm256_set1_epi32(a.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the caller has AVX-VNNI.
        unsafe { _mm256_dpbusd_avx_epi32(acc, a, b) }
    }
}

/// 8 i32 sums of i16 by i16.
struct S16S16;

impl Lanes for S16S16 {
    type Acc = __m256i;
    type B = __m256i;
    type A = __m256i;
    const COLUMNS: usize = 8;
    const K: usize = 2;
    const A_BYTES: usize = 4;
    moves!(__m256i, _mm256_setzero_si256, _mm256_loadu_si256, _mm256_storeu_si256);

    #[inline(always)]
    unsafe fn splat_a(a: *const u8) -> __m256i {
        // SAFETY: the caller has AVX2 and vouches for the 4 bytes.
        unsafe { _mm256_set1_epi32(a.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply(acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the caller has AVX-VNNI.
        unsafe { _mm256_dpwssd_avx_epi32(acc, a, b) }
    }
}

broadcast_kernel!(
    #[target_feature(enable = "avx2,fma,avxvnni")]
    GEMM_U8S8 = gemm_u8s8_6x16_avxvnni: U8S8, AvxVnni, U8S8, 6 x 16, rows [1 2 3 4 5 6], panels [1: 2], &avx2::STEPS
);
broadcast_kernel!(
    #[target_feature(enable = "avx2,fma,avxvnni")]
    GEMM_S16S16 = gemm_s16s16_6x16_avxvnni: S16S16, AvxVnni, S16S16, 6 x 16, rows [1 2 3 4 5 6], panels [1: 2], &avx2::STEPS
);
