//! NEON without dotprod.
//!
//! Two products of int8 fit into 16 bits, as rows less 128 are at least -127: `smull`, `smlal` and a pairwise `sadalp` are 16
//! products in 3 instructions, where widened rows and weights would take 4.

use std::arch::aarch64::*;

use super::by_lane::{self, ByLane};
use super::{C_STRIDE, VECTORS};
use crate::Isa;
use crate::gemm::table::{BLOCK_BYTES, GemmKernel, Peak, Types};
use crate::gemm::tile::TileArgs;

/// Most rows of an integer tile.
const MR: usize = 24;

/// Rows of a piece: each needs 8 registers for its sums.
const ROWS: usize = 2;

/// Bytes of a row in a step.
const ROW_BYTES: usize = 8;

/// Bytes of a block of weights: four of each output.
const BLOCK: usize = 64;

/// The products of eight inputs of a row, four in all lanes of `x[0]` and the next four in `x[1]`, with their weights of four
/// outputs, `w[0]` and `w[1]`. Of each output, `sums` has two: of the first and of the second half of each four inputs.
///
/// # Safety
/// The machine has NEON.
#[inline(always)]
unsafe fn multiply(sums: &mut [int32x4_t; 2], x: [int8x16_t; 2], w: [int8x16_t; 2]) {
    // SAFETY: the caller has NEON.
    unsafe {
        let low = vmull_s8(vget_low_s8(x[0]), vget_low_s8(w[0]));
        let low = vmlal_s8(low, vget_low_s8(x[1]), vget_low_s8(w[1]));
        let high = vmlal_high_s8(vmull_high_s8(x[0], w[0]), x[1], w[1]);
        sums[0] = vpadalq_s16(sums[0], low);
        sums[1] = vpadalq_s16(sums[1], high);
    }
}

/// Rows `first .. first + R` of a tile, sums beginning with `start`.
///
/// # Safety
/// As [`crate::gemm::tile::TileFn`], for `R` rows that the tile has and one panel.
#[inline(always)]
unsafe fn piece<const R: usize>(t: &TileArgs, first: usize, start: &[int32x4_t; VECTORS]) {
    // SAFETY: all offsets stay within what the caller vouches for: R rows from `first` on, 16 columns, k inputs.
    unsafe {
        let mut sums = [[[vdupq_n_s32(0); 2]; VECTORS]; R];
        let (mut a, mut b) = (t.a.add(first * t.a_stride), t.b);
        for _ in 0..t.k / ROW_BYTES {
            let x: [[int8x16_t; 2]; R] = std::array::from_fn(|r| {
                let codes = veor_u8(vld1_u8(a.add(r * t.a_stride)), vdup_n_u8(0x80));
                let codes = vreinterpret_s32_u8(codes);
                [vdupq_lane_s32::<0>(codes), vdupq_lane_s32::<1>(codes)].map(|x| vreinterpretq_s8_s32(x))
            });
            for v in 0..VECTORS {
                let w = [0, BLOCK].map(|block| vld1q_s8(b.add(block + 16 * v).cast()));
                for (sums, &x) in sums.iter_mut().zip(&x) {
                    multiply(&mut sums[v], x, w);
                }
            }
            a = a.wrapping_add(ROW_BYTES);
            b = b.wrapping_add(2 * BLOCK);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, [low, high]) in sums.iter().enumerate() {
                let c = t.c.add((first + r) * C_STRIDE + 16 * v).cast::<i32>();
                let sum = vaddq_s32(vpaddq_s32(*low, *high), start[v]);
                vst1q_s32(c, if t.accumulate { vaddq_s32(sum, vld1q_s32(c)) } else { sum });
            }
        }
    }
}

/// 128 times the sum of each output's weights.
///
/// # Safety
/// The machine has NEON, and there is a panel of `t.k` inputs at `t.b`.
#[inline(always)]
unsafe fn offset(t: &TileArgs) -> [int32x4_t; VECTORS] {
    // SAFETY: a block has four inputs.
    unsafe {
        let mut sums = [vdupq_n_s32(0); VECTORS];
        for block in 0..t.k / 4 {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = vpadalq_s16(*sum, vpaddlq_s8(vld1q_s8(t.b.add(BLOCK * block + 16 * v).cast())));
            }
        }
        sums.map(|sum| vshlq_n_s32::<7>(sum))
    }
}

#[target_feature(enable = "neon")]
unsafe fn gemm_u8s8_24x16_neon(t: &TileArgs) {
    // SAFETY: the caller vouches for what the arguments describe.
    unsafe {
        let start = offset(t);
        for first in (0..t.rows).step_by(ROWS) {
            if t.rows - first >= ROWS {
                piece::<ROWS>(t, first, &start);
            } else {
                piece::<1>(t, first, &start);
            }
        }
    }
}

/// Four f32 sums.
struct F32;

impl ByLane for F32 {
    type Acc = float32x4_t;
    type Vector = float32x4_t;
    const K: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        // SAFETY: every AArch64 machine has NEON.
        unsafe { vdupq_n_f32(0.0) }
    }
    #[inline(always)]
    unsafe fn load_acc(c: *const u8) -> float32x4_t {
        // SAFETY: the caller vouches for the 16 bytes.
        unsafe { vld1q_f32(c.cast()) }
    }
    #[inline(always)]
    unsafe fn store_acc(c: *mut u8, acc: float32x4_t) {
        // SAFETY: the caller vouches for the 16 bytes.
        unsafe { vst1q_f32(c.cast(), acc) }
    }
    #[inline(always)]
    unsafe fn add(x: float32x4_t, y: float32x4_t) -> float32x4_t {
        // SAFETY: every AArch64 machine has NEON.
        unsafe { vaddq_f32(x, y) }
    }
    #[inline(always)]
    unsafe fn load_a<const R: usize>(a: [*const u8; R]) -> [float32x4_t; R] {
        // SAFETY: the caller vouches for 16 bytes each.
        a.map(|a| unsafe { vld1q_f32(a.cast()) })
    }
    #[inline(always)]
    unsafe fn load_b(b: *const u8) -> float32x4_t {
        // SAFETY: the caller vouches for the 16 bytes.
        unsafe { vld1q_f32(b.cast()) }
    }
    #[inline(always)]
    unsafe fn multiply<const LANE: i32>(acc: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: every AArch64 machine has NEON.
        unsafe { vfmaq_laneq_f32::<LANE>(acc, b, a) }
    }
}

#[target_feature(enable = "neon")]
unsafe fn gemm_f32_6x16_neon(t: &TileArgs) {
    // SAFETY: the caller vouches for what the arguments describe.
    unsafe { by_lane::piece::<F32>(t, 0, t.rows, &[F32::zero(); VECTORS]) }
}

#[target_feature(enable = "neon")]
unsafe fn peak_u8s8(rounds: usize) {
    let bytes = std::hint::black_box([1i8; 16]);
    // SAFETY: every AArch64 machine has NEON; the array has 16 bytes.
    unsafe {
        let x = [vld1q_s8(bytes.as_ptr()); 2];
        let mut sums = [[[vdupq_n_s32(0); 2]; VECTORS]; ROWS];
        for _ in 0..rounds {
            for sums in sums.as_flattened_mut() {
                // Numbers that the optimizer doesn't know, or it would compute the products once.
                let w = [vld1q_s8(std::hint::black_box(&bytes).as_ptr()); 2];
                multiply(sums, x, w);
            }
        }
        std::hint::black_box(sums);
    }
}

#[target_feature(enable = "neon")]
unsafe fn peak_f32(rounds: usize) {
    // SAFETY: the caller has NEON.
    unsafe { by_lane::peak::<F32>(rounds) }
}

pub(crate) static GEMM_U8S8: GemmKernel = GemmKernel {
    name: "gemm_u8s8_24x16_neon",
    isa: Isa::Neon,
    types: Types::U8S8,
    mr: MR,
    nr: 16,
    kr: ROW_BYTES,
    // A panel of 1024 inputs, half of the L1 of a Cortex-A72.
    pair_bytes: 32 * 1024,
    block_bytes: BLOCK_BYTES,
    tile: gemm_u8s8_24x16_neon,
    peak: Peak { run: peak_u8s8, ops: 2 * ROWS * VECTORS * 32 },
    steps: || &super::STEPS,
    taps: 1,
    claims: false,
    fetches: false,
    leave: || (),
};

pub(crate) static GEMM_F32: GemmKernel = GemmKernel {
    name: "gemm_f32_6x16_neon",
    isa: Isa::Neon,
    types: Types::F32,
    mr: by_lane::ROWS,
    nr: 16,
    kr: 4,
    pair_bytes: Types::F32.broadcast_pair_bytes(),
    block_bytes: BLOCK_BYTES,
    tile: gemm_f32_6x16_neon,
    peak: Peak { run: peak_f32, ops: by_lane::peak_ops::<F32>() },
    steps: || &super::STEPS,
    taps: 1,
    claims: false,
    fetches: false,
    leave: || (),
};
