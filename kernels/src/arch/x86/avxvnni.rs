//! AVX2 with 256-bit VNNI in VEX encoding.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{avx2, integer_lanes};
use crate::gemm::tile::broadcast_kernel;

integer_lanes!(
    /// 8 i32 sums of u8 by i8.
    U8S8: 256, 4 inputs, |acc, a, b| _mm256_dpbusd_avx_epi32(acc, a, b)
);

integer_lanes!(
    /// 8 i32 sums of i16 by i16.
    S16S16: 256, 2 inputs, |acc, a, b| dpwssd(acc, a, b)
);

/// `_mm256_dpwssd_avx_epi32`, which the compiler would make two instructions of, where many follow one another.
#[target_feature(enable = "avx2,avxvnni")]
#[inline]
pub(crate) fn dpwssd(mut acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: of the function's features, on registers only.
    unsafe {
        asm!("{{vex}} vpdpwssd {acc}, {a}, {b}", acc = inout(ymm_reg) acc, a = in(ymm_reg) a, b = in(ymm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

broadcast_kernel!(
    #[target_feature(enable = "avx2,fma,avxvnni")]
    GEMM_U8S8 = gemm_u8s8_6x16_avxvnni: U8S8, AvxVnni, U8S8, 6 x 16, rows [1 2 3 4 5 6], panels [1: 2], &avx2::STEPS
);
broadcast_kernel!(
    #[target_feature(enable = "avx2,fma,avxvnni")]
    GEMM_S16S16 = gemm_s16s16_6x16_avxvnni: S16S16, AvxVnni, S16S16, 6 x 16, rows [1 2 3 4 5 6], panels [1: 2], &avx2::STEPS
);
