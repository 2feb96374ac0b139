//! Vectors of x86-64: eight lanes of AVX2 + FMA + F16C, sixteen of AVX-512.

use std::arch::x86_64::*;

#[inline(always)]
fn prefetch<T>(src: &[T], ahead: usize) {
    // SAFETY: a prefetch has no effect but on caches, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(src.as_ptr().cast::<i8>().wrapping_add(ahead)) }
}

/// An expression of intrinsics of the tier whose token is `self`.
macro_rules! tier {
    ($e:expr) => {{
        // SAFETY: a token exists only where the tier's features were found; pointers come from slices whose length was
        // checked before, or are masked to it.
        unsafe { $e }
    }};
}

/// The sums of all lanes of each.
#[target_feature(enable = "avx2")]
#[inline]
fn sums([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
    let all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    let all = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
    let mut sums = [0.0; 4];
    // SAFETY: four numbers.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), all) };
    sums
}

/// The greatest lane of each.
#[target_feature(enable = "avx2")]
#[inline]
fn max_lanes([a, b]: [__m256; 2]) -> [f32; 2] {
    let both = _mm256_max_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
    let both = _mm256_max_ps(both, _mm256_permute_ps::<0x4e>(both));
    let both = _mm256_max_ps(both, _mm256_permute_ps::<0xb1>(both));
    [_mm256_cvtss_f32(both), _mm_cvtss_f32(_mm256_extractf128_ps::<1>(both))]
}

mod avx2;
mod avx512;
pub(super) mod dot;
mod shorts;

pub(crate) use avx2::Avx2;
use avx2::has_avx2;
pub(super) use avx2::run_avx2;
use avx512::has_avx512;
pub(crate) use avx512::{Avx512, has_bf16};
pub(super) use avx512::{run_avx512, run_avx512_bf16};
