//! Plain Rust: any machine.

use crate::gemm::steps::steps;
use crate::gemm::tile::{Lanes, broadcast_kernel};

steps!(STEPS, crate::simd::scalar::Scalar);

/// 16 i32 sums of u8 by i8.
struct U8S8;

impl Lanes for U8S8 {
    type Acc = [i32; 16];
    type B = [[i8; 4]; 16];
    type A = [u8; 4];
    const COLUMNS: usize = 16;
    const K: usize = 4;
    const A_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self::Acc {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn load_acc(c: *const u8) -> Self::Acc {
        // SAFETY: the caller vouches for the 64 bytes.
        unsafe { c.cast::<Self::Acc>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_acc(c: *mut u8, acc: Self::Acc) {
        // SAFETY: the caller vouches for the 64 bytes.
        unsafe { c.cast::<Self::Acc>().write_unaligned(acc) }
    }
    #[inline(always)]
    unsafe fn load_b(b: *const u8) -> Self::B {
        // SAFETY: the caller vouches for the 64 bytes.
        unsafe { b.cast::<Self::B>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_a(a: *const u8) -> Self::A {
        // SAFETY: the caller vouches for the 4 bytes.
        unsafe { a.cast::<Self::A>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn multiply(acc: Self::Acc, a: Self::A, b: Self::B) -> Self::Acc {
        std::array::from_fn(|n| acc[n] + (0..4).map(|j| i32::from(a[j]) * i32::from(b[n][j])).sum::<i32>())
    }
}

/// 16 f32 sums.
struct F32;

impl Lanes for F32 {
    type Acc = [f32; 16];
    type B = [f32; 16];
    type A = f32;
    const COLUMNS: usize = 16;
    const K: usize = 1;
    const A_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self::Acc {
        [0.0; 16]
    }
    #[inline(always)]
    unsafe fn load_acc(c: *const u8) -> Self::Acc {
        // SAFETY: the caller vouches for the 64 bytes.
        unsafe { c.cast::<Self::Acc>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_acc(c: *mut u8, acc: Self::Acc) {
        // SAFETY: the caller vouches for the 64 bytes.
        unsafe { c.cast::<Self::Acc>().write_unaligned(acc) }
    }
    #[inline(always)]
    unsafe fn load_b(b: *const u8) -> Self::B {
        // SAFETY: the caller vouches for the 64 bytes.
        unsafe { b.cast::<Self::B>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_a(a: *const u8) -> Self::A {
        // SAFETY: the caller vouches for the 4 bytes.
        unsafe { a.cast::<f32>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn multiply(acc: Self::Acc, a: Self::A, b: Self::B) -> Self::Acc {
        std::array::from_fn(|n| acc[n] + a * b[n])
    }
}

broadcast_kernel!(GEMM_U8S8 = gemm_u8s8_4x16_scalar: U8S8, Scalar, U8S8, 4 x 16, rows [1 2 3 4], panels [1: 1], &STEPS);
broadcast_kernel!(GEMM_F32 = gemm_f32_4x16_scalar: F32, Scalar, F32, 4 x 16, rows [1 2 3 4], panels [1: 1], &STEPS);
