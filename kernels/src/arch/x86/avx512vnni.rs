//! AVX-512 with VNNI.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{avx512, integer_lanes};
use crate::gemm::steps::Steps;
use crate::gemm::tile::broadcast_kernel;
use crate::simd::x86::has_bf16;

integer_lanes!(
    /// 16 i32 sums of u8 by i8.
    U8S8: 512, 4 inputs, |acc, a, b| _mm512_dpbusd_epi32(acc, a, b)
);

integer_lanes!(
    /// 16 i32 sums of i16 by i16.
    S16S16: 512, 2 inputs, |acc, a, b| dpwssd(acc, a, b)
);

/// `_mm512_dpwssd_epi32`, which the compiler would make two instructions of, where many follow one another.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
pub(crate) fn dpwssd(mut acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: of the function's features, on registers only.
    unsafe {
        asm!("vpdpwssd {acc}, {a}, {b}", acc = inout(zmm_reg) acc, a = in(zmm_reg) a, b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// What stands around the tiles, with the instruction that rounds to bf16 where the machine has it.
fn steps() -> &'static Steps {
    if has_bf16() { &avx512::STEPS_BF16 } else { &avx512::STEPS }
}

broadcast_kernel!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    GEMM_U8S8 = gemm_u8s8_12x32_avx512vnni: U8S8, Avx512Vnni, U8S8, 12 x 32, rows [1 2 3 4 5 6 7 8 9 10 11 12],
    panels [1: 1, 2: 2], steps()
);
broadcast_kernel!(
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    GEMM_S16S16 = gemm_s16s16_12x32_avx512vnni: S16S16, Avx512Vnni, S16S16, 12 x 32,
    rows [1 2 3 4 5 6 7 8 9 10 11 12], panels [1: 1, 2: 2], steps()
);
