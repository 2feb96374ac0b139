//! NEON with dotprod: `sdot` adds the products of four bytes to each lane. No stable intrinsics, so inline assembly.

use std::arch::aarch64::*;
use std::arch::asm;

use super::VECTORS;
use super::by_lane::{self, ByLane};
use crate::Isa;
use crate::gemm::table::{BLOCK_BYTES, GemmKernel, Peak, Types};
use crate::gemm::tile::TileArgs;

/// Sums of rows less 128 by i8.
struct S8S8;

impl ByLane for S8S8 {
    type Acc = int32x4_t;
    type Vector = int8x16_t;
    const K: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> int32x4_t {
        // SAFETY: every AArch64 machine has NEON.
        unsafe { vdupq_n_s32(0) }
    }
    #[inline(always)]
    unsafe fn load_acc(c: *const u8) -> int32x4_t {
        // SAFETY: the caller vouches for the 16 bytes.
        unsafe { vld1q_s32(c.cast()) }
    }
    #[inline(always)]
    unsafe fn store_acc(c: *mut u8, acc: int32x4_t) {
        // SAFETY: the caller vouches for the 16 bytes.
        unsafe { vst1q_s32(c.cast(), acc) }
    }
    #[inline(always)]
    unsafe fn add(x: int32x4_t, y: int32x4_t) -> int32x4_t {
        // SAFETY: every AArch64 machine has NEON.
        unsafe { vaddq_s32(x, y) }
    }
    #[inline(always)]
    unsafe fn load_a<const R: usize>(a: [*const u8; R]) -> [int8x16_t; R] {
        // Sums, rows and weights want all 32 registers. So the constant is made anew each time (a volatile block stays in
        // the loop), and no more than one row waits to be flipped.
        let flip: uint8x16_t;
        // SAFETY: sets a register.
        unsafe { asm!("movi {0:v}.16b, 0x80", out(vreg) flip, options(nomem, nostack, preserves_flags)) }
        a.map(|a| {
            let x: int8x16_t;
            // SAFETY: the caller vouches for the 16 bytes.
            unsafe {
                asm!("ldr {x:q}, [{a}]", "eor {x:v}.16b, {x:v}.16b, {flip:v}.16b", x = out(vreg) x,
                    flip = in(vreg) flip, a = in(reg) a, options(readonly, nostack, preserves_flags));
            }
            x
        })
    }
    #[inline(always)]
    unsafe fn load_b(b: *const u8) -> int8x16_t {
        // SAFETY: the caller vouches for the 16 bytes.
        unsafe { vld1q_s8(b.cast()) }
    }
    #[inline(always)]
    unsafe fn multiply<const LANE: i32>(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        // SAFETY: the caller has dotprod; registers only.
        unsafe {
            asm!("sdot {acc:v}.4s, {b:v}.16b, {a:v}.4b[{lane}]", acc = inout(vreg) acc, a = in(vreg) a, b = in(vreg) b,
                lane = const LANE, options(pure, nomem, nostack, preserves_flags));
        }
        acc
    }
}

/// Most rows of a tile.
const MR: usize = 48;

/// 128 times the sum of each output's weights.
///
/// # Safety
/// The machine has dotprod, and there is a panel of `t.k` inputs at `t.b`.
#[inline(always)]
unsafe fn offset(t: &TileArgs) -> [int32x4_t; VECTORS] {
    // SAFETY: a step has four inputs.
    unsafe {
        let one = vdupq_n_s8(1);
        let mut sums = [S8S8::zero(); VECTORS];
        for step in 0..t.k / S8S8::K {
            for (v, sum) in sums.iter_mut().enumerate() {
                let b = S8S8::load_b(t.b.add(step * by_lane::STEP_BYTES + 16 * v));
                *sum = S8S8::multiply::<0>(*sum, one, b);
            }
        }
        sums.map(|sum| vshlq_n_s32::<7>(sum))
    }
}

#[target_feature(enable = "neon,dotprod")]
unsafe fn gemm_u8s8_48x16_dotprod(t: &TileArgs) {
    // SAFETY: the caller vouches for dotprod and for what the arguments describe.
    unsafe {
        let start = offset(t);
        for first in (0..t.rows).step_by(by_lane::ROWS) {
            by_lane::piece::<S8S8>(t, first, by_lane::ROWS.min(t.rows - first), &start);
        }
    }
}

#[target_feature(enable = "neon,dotprod")]
unsafe fn peak(rounds: usize) {
    // SAFETY: the caller has dotprod.
    unsafe { by_lane::peak::<S8S8>(rounds) }
}

pub(crate) static GEMM_U8S8: GemmKernel = GemmKernel {
    name: "gemm_u8s8_48x16_dotprod",
    isa: Isa::Dotprod,
    types: Types::U8S8,
    mr: MR,
    nr: 16,
    kr: by_lane::ROW_BYTES,
    // A panel of 2048 inputs, half of the L1 of a Cortex-A76.
    pair_bytes: 64 * 1024,
    block_bytes: BLOCK_BYTES,
    tile: gemm_u8s8_48x16_dotprod,
    peak: Peak { run: peak, ops: by_lane::peak_ops::<S8S8>() },
    steps: || &super::STEPS,
    taps: 1,
    claims: false,
    fetches: false,
    leave: || (),
};
