//! NEON with i8mm and bf16: `usmmla` and `bfmmla` multiply 8 bytes of each of two rows by 8 bytes of each of two outputs. No
//! stable intrinsics, so inline assembly.
//!
//! A panel has 4 bytes of an output together. A zip of two blocks brings 8 together; it is done for a strip of inputs into a
//! buffer that stays in L1, and serves all rows of a tile. Pairs of rows are joined on registers, once per 8 products.
//!
//! `bfmmla` rounds its sums to odd and takes subnormal numbers for zero, whatever the thread's rounding mode.

use std::arch::aarch64::*;
use std::arch::asm;
use std::mem::MaybeUninit;

use super::C_STRIDE;
use crate::Isa;
use crate::gemm::table::{BLOCK_BYTES, GemmKernel, Peak, Types};
use crate::gemm::tile::TileArgs;
use crate::layout::TILE_N;

/// Most rows of a tile.
const MR: usize = 48;

/// Most rows of a piece: three pairs by 16 columns of sums are 24 registers.
const ROWS: usize = 6;

/// Bytes of a row in a step.
const ROW_BYTES: usize = 8;

/// Bytes of one step of a panel, two blocks.
const STEP_BYTES: usize = TILE_N * ROW_BYTES;

/// Pairs of columns in a panel.
const PAIRS: usize = TILE_N / 2;

/// Steps in a strip.
const STRIP: usize = 64;

/// Weights of a chunk, half of the L1 of a Cortex-X2 or Neoverse V1.
const PAIR_BYTES: usize = 64 * 1024;

/// Zipped weights: `[STRIP][16][8]` bytes.
#[repr(align(64))]
struct Strip([MaybeUninit<u8>; STRIP * STEP_BYTES]);

/// A matrix instruction. Sums are 4 bytes: of row 0 and two columns, of row 1 and the same columns.
///
/// # Safety
/// Of `multiply`: the machine has the instruction.
trait Matrix {
    unsafe fn multiply(acc: uint32x4_t, a: uint8x16_t, b: uint8x16_t) -> uint32x4_t;
}

/// A [`Matrix`] of the instruction `$op` on elements `$arrangement`.
macro_rules! matrix {
    ($name:ident, $op:literal, $arrangement:literal) => {
        struct $name;

        impl Matrix for $name {
            #[inline(always)]
            unsafe fn multiply(mut acc: uint32x4_t, a: uint8x16_t, b: uint8x16_t) -> uint32x4_t {
                // SAFETY: the caller has the instruction; registers only.
                unsafe {
                    asm!(concat!($op, " {acc:v}.4s, {a:v}.", $arrangement, ", {b:v}.", $arrangement), acc = inout(vreg) acc,
                        a = in(vreg) a, b = in(vreg) b, options(pure, nomem, nostack, preserves_flags));
                }
                acc
            }
        }
    };
}

matrix!(U8S8, "usmmla", "16b");
matrix!(Bf16, "bfmmla", "8h");

/// Brings the 8 bytes of each output together in `steps` steps of a panel.
///
/// # Safety
/// The machine has NEON, and there are so many steps at `b`, at most [`STRIP`].
#[inline(always)]
unsafe fn zip(b: *const u8, steps: usize, strip: &mut Strip) {
    let out = strip.0.as_mut_ptr().cast::<u8>();
    for at in (0..steps * STEP_BYTES).step_by(STEP_BYTES) {
        for v in (0..STEP_BYTES / 2).step_by(16) {
            // SAFETY: two blocks make a step, in the panel and in the strip.
            unsafe {
                let low = vreinterpretq_u32_u8(vld1q_u8(b.add(at + v)));
                let high = vreinterpretq_u32_u8(vld1q_u8(b.add(at + STEP_BYTES / 2 + v)));
                vst1q_u8(out.add(at + 2 * v), vreinterpretq_u8_u32(vzip1q_u32(low, high)));
                vst1q_u8(out.add(at + 2 * v + 16), vreinterpretq_u8_u32(vzip2q_u32(low, high)));
            }
        }
    }
}

/// Two rows and four columns: vectors of two by two to vectors of a row, or back.
///
/// # Safety
/// The machine has NEON.
#[inline(always)]
unsafe fn turn(x: [uint32x4_t; 2]) -> [uint32x4_t; 2] {
    // SAFETY: the caller has NEON.
    unsafe {
        let [x, y] = x.map(|x| vreinterpretq_u64_u32(x));
        [vreinterpretq_u32_u64(vzip1q_u64(x, y)), vreinterpretq_u32_u64(vzip2q_u64(x, y))]
    }
}

/// `rows` rows, `2 * P` or one less, by the steps of a strip.
///
/// # Safety
/// The machine has the instruction; `rows` rows of `steps * 8` bytes at `a`, `steps` steps at `b`, and rows of sums at `c`.
#[inline(always)]
unsafe fn piece<M: Matrix, const P: usize>(
    a: *const u8,
    a_stride: usize,
    rows: usize,
    b: *const u8,
    steps: usize,
    c: *mut u8,
    accumulate: bool,
) {
    // A last row without a partner is its own.
    let [row, other] = [0, 1].map(|r| -> [usize; P] { std::array::from_fn(|p| (2 * p + r).min(rows - 1)) });
    // SAFETY: all offsets stay within what the caller vouches for: rows < `rows`, 16 columns, `steps` steps.
    unsafe {
        let mut acc = [[vdupq_n_u32(0); PAIRS]; P];
        if accumulate {
            for (p, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    *acc = turn([row[p], other[p]].map(|r| vld1q_u32(c.add(r * C_STRIDE + 16 * v).cast())));
                }
            }
        }
        let (mut a, mut b) = (a, b);
        for _ in 0..steps {
            let x: [uint8x16_t; P] = std::array::from_fn(|p| {
                vcombine_u8(vld1_u8(a.add(row[p] * a_stride)), vld1_u8(a.add(other[p] * a_stride)))
            });
            for v in 0..PAIRS {
                let w = vld1q_u8(b.add(16 * v));
                for (acc, &x) in acc.iter_mut().zip(&x) {
                    acc[v] = M::multiply(acc[v], x, w);
                }
            }
            a = a.wrapping_add(ROW_BYTES);
            b = b.wrapping_add(STEP_BYTES);
        }
        for (p, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.as_chunks::<2>().0.iter().enumerate() {
                let [sums, of_other] = turn(acc);
                vst1q_u32(c.add(other[p] * C_STRIDE + 16 * v).cast(), of_other);
                vst1q_u32(c.add(row[p] * C_STRIDE + 16 * v).cast(), sums);
            }
        }
    }
}

/// A tile, whose inputs are `steps` times 8 bytes of a row.
///
/// # Safety
/// As [`crate::gemm::tile::TileFn`], for one panel.
#[inline(always)]
unsafe fn tile<M: Matrix>(t: &TileArgs, steps: usize) {
    let mut strip = Strip([MaybeUninit::uninit(); _]);
    let mut done = 0;
    loop {
        let now = STRIP.min(steps - done);
        // SAFETY: the caller vouches for the steps of the panel and the rows.
        unsafe {
            zip(t.b.add(done * STEP_BYTES), now, &mut strip);
            let (b, accumulate) = (strip.0.as_ptr().cast::<u8>(), t.accumulate || done > 0);
            for first in (0..t.rows).step_by(ROWS) {
                let rows = ROWS.min(t.rows - first);
                let a = t.a.add(first * t.a_stride + done * ROW_BYTES);
                let c = t.c.add(first * C_STRIDE);
                match rows.div_ceil(2) {
                    1 => piece::<M, 1>(a, t.a_stride, rows, b, now, c, accumulate),
                    2 => piece::<M, 2>(a, t.a_stride, rows, b, now, c, accumulate),
                    _ => piece::<M, 3>(a, t.a_stride, rows, b, now, c, accumulate),
                }
            }
        }
        done += now;
        if done == steps {
            break;
        }
    }
}

/// Multiplies registers `rounds` times.
///
/// # Safety
/// The machine has the instruction.
#[inline(always)]
unsafe fn peak<M: Matrix>(rounds: usize) {
    let bytes = std::hint::black_box([1u8; 16]);
    // SAFETY: the caller has the instruction; the array has 16 bytes.
    unsafe {
        let (x, w) = (vld1q_u8(bytes.as_ptr()), vld1q_u8(bytes.as_ptr()));
        let mut acc = [vdupq_n_u32(0); ROWS / 2 * PAIRS];
        for _ in 0..rounds {
            for acc in &mut acc {
                *acc = M::multiply(*acc, x, w);
            }
        }
        std::hint::black_box(acc);
    }
}

/// Operations of a round of [`peak`] on elements of `bytes`.
const fn peak_ops(bytes: usize) -> usize {
    2 * (ROWS / 2 * PAIRS) * 4 * ROW_BYTES / bytes
}

#[target_feature(enable = "neon,i8mm")]
unsafe fn gemm_u8s8_48x16_i8mm(t: &TileArgs) {
    // SAFETY: the caller vouches for i8mm and for what the arguments describe.
    unsafe { tile::<U8S8>(t, t.k / ROW_BYTES) }
}

#[target_feature(enable = "neon,bf16")]
unsafe fn gemm_bf16_48x16_i8mm(t: &TileArgs) {
    // SAFETY: the caller vouches for bf16 and for what the arguments describe.
    unsafe { tile::<Bf16>(t, 2 * t.k / ROW_BYTES) }
}

#[target_feature(enable = "neon,i8mm")]
unsafe fn peak_u8s8(rounds: usize) {
    // SAFETY: the caller has i8mm.
    unsafe { peak::<U8S8>(rounds) }
}

#[target_feature(enable = "neon,bf16")]
unsafe fn peak_bf16(rounds: usize) {
    // SAFETY: the caller has bf16.
    unsafe { peak::<Bf16>(rounds) }
}

pub(crate) static GEMM_U8S8: GemmKernel = GemmKernel {
    name: "gemm_u8s8_48x16_i8mm",
    isa: Isa::I8mm,
    types: Types::U8S8,
    mr: MR,
    nr: 16,
    kr: ROW_BYTES,
    pair_bytes: PAIR_BYTES,
    block_bytes: BLOCK_BYTES,
    tile: gemm_u8s8_48x16_i8mm,
    peak: Peak { run: peak_u8s8, ops: peak_ops(1) },
    steps: || &super::STEPS,
    taps: 1,
    claims: false,
    fetches: false,
    leave: || (),
};

pub(crate) static GEMM_BF16: GemmKernel = GemmKernel {
    name: "gemm_bf16_48x16_i8mm",
    isa: Isa::I8mm,
    types: Types::Bf16,
    mr: MR,
    nr: 16,
    kr: ROW_BYTES / 2,
    pair_bytes: PAIR_BYTES,
    block_bytes: BLOCK_BYTES,
    tile: gemm_bf16_48x16_i8mm,
    peak: Peak { run: peak_bf16, ops: peak_ops(2) },
    steps: || &super::STEPS,
    taps: 1,
    claims: false,
    fetches: false,
    leave: || (),
};
