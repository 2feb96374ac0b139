//! The kernels of each instruction set.

use crate::gemm::GemmKernel;

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;

/// The table of [`crate::gemm::kernels`].
#[cfg(target_arch = "x86_64")]
pub(crate) static KERNELS: &[&GemmKernel] = &[
    &scalar::GEMM_U8S8,
    &scalar::GEMM_F32,
    &x86::avx2::GEMM_F32,
    &x86::avx2::GEMM_S16S16,
    &x86::avx2::GEMM_U8S4,
    &x86::avxvnni::GEMM_S16S16,
    &x86::avxvnni::GEMM_U8S8,
    &x86::avx512::GEMM_F32,
    &x86::avx512::GEMM_S16S16,
    &x86::avx512::GEMM_U8S4,
    &x86::avx512vnni::GEMM_S16S16,
    &x86::avx512vnni::GEMM_U8S8,
    &x86::amx::GEMM_U8S8,
    &x86::amx::GEMM_BF16,
];

/// The table of [`crate::gemm::kernels`].
#[cfg(target_arch = "aarch64")]
pub(crate) static KERNELS: &[&GemmKernel] = &[
    &scalar::GEMM_U8S8,
    &scalar::GEMM_F32,
    &aarch64::neon::GEMM_U8S8,
    &aarch64::neon::GEMM_F32,
    &aarch64::dotprod::GEMM_U8S8,
    &aarch64::i8mm::GEMM_U8S8,
    &aarch64::i8mm::GEMM_BF16,
];

/// The table of [`crate::gemm::kernels`].
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) static KERNELS: &[&GemmKernel] = &[&scalar::GEMM_U8S8, &scalar::GEMM_F32];

/// Asks for the cache line at `at`, into L2.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch has no effect but on caches, whatever the address.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{}]", in(reg) at, options(nostack, readonly, preserves_flags));
    }
    let _ = at;
}

/// Asks for the cache line at `line`, which is about to be written.
#[inline(always)]
pub(crate) fn claim(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and never faults; where the instruction isn't known it does nothing.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, preserves_flags, readonly));
    }
    let _ = line;
}

/// Lets what this thread has stored past the caches be seen before what it stores from now on.
pub(crate) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: all x86-64 processors have the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
