//! Vectors of x86-64: eight lanes of AVX2 + FMA + F16C, sixteen of AVX-512.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

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

mod avx2;
mod avx512;
pub(super) mod dot;

pub(crate) use avx2::Avx2;
use avx2::has_avx2;
pub(super) use avx2::run_avx2;
pub(crate) use avx512::Avx512;
use avx512::has_avx512;
pub(super) use avx512::{run_avx512, run_avx512_bf16};
