//! The tiles of instructions that take one of their factors from a lane of a vector: a vector holds 16 bytes of a row, its
//! four lanes meet four steps of weights, and nothing is broadcast. 6 rows by 16 columns of sums are 24 registers, the rows
//! 6 more, and 2 are left for weights.

use super::{C_STRIDE, VECTORS};
use crate::gemm::tile::TileArgs;

/// Most rows of a piece.
pub(super) const ROWS: usize = 6;

/// Bytes of a row that a vector holds.
pub(super) const ROW_BYTES: usize = 16;

/// Bytes of one step of a panel: 4 bytes of each output.
pub(super) const STEP_BYTES: usize = 64;

/// One instruction set's way to multiply.
///
/// # Safety
/// Of all functions: the machine has the instruction set, and pointers are good for 16 bytes.
pub(super) trait ByLane {
    /// Four sums.
    type Acc: Copy;
    /// Weights of four outputs, or inputs of a row: four lanes of 4 bytes.
    type Vector: Copy;
    /// Inputs in a lane.
    const K: usize;

    unsafe fn zero() -> Self::Acc;
    unsafe fn load_acc(c: *const u8) -> Self::Acc;
    unsafe fn store_acc(c: *mut u8, acc: Self::Acc);
    unsafe fn add(x: Self::Acc, y: Self::Acc) -> Self::Acc;
    unsafe fn load_a<const R: usize>(a: [*const u8; R]) -> [Self::Vector; R];
    unsafe fn load_b(b: *const u8) -> Self::Vector;
    /// `acc` and the products of each output's weights with lane `LANE` of `a`.
    unsafe fn multiply<const LANE: i32>(acc: Self::Acc, a: Self::Vector, b: Self::Vector) -> Self::Acc;
}

/// Rows `first .. first + rows` of a tile, sums beginning with `start`.
///
/// # Safety
/// As [`crate::gemm::tile::TileFn`], for at most [`ROWS`] rows that the tile has and one panel.
#[inline(always)]
pub(super) unsafe fn piece<L: ByLane>(t: &TileArgs, first: usize, rows: usize, start: &[L::Acc; VECTORS]) {
    // SAFETY: the caller vouches for it; the match picks the instance of the rows.
    unsafe {
        match rows {
            1 => rows_by_panel::<L, 1>(t, first, start),
            2 => rows_by_panel::<L, 2>(t, first, start),
            3 => rows_by_panel::<L, 3>(t, first, start),
            4 => rows_by_panel::<L, 4>(t, first, start),
            5 => rows_by_panel::<L, 5>(t, first, start),
            6 => rows_by_panel::<L, 6>(t, first, start),
            rows => unreachable!("{rows} rows"),
        }
    }
}

/// # Safety
/// As [`piece`].
#[inline(always)]
unsafe fn rows_by_panel<L: ByLane, const R: usize>(t: &TileArgs, first: usize, start: &[L::Acc; VECTORS]) {
    // SAFETY: all offsets stay within what the caller vouches for: R rows from `first` on, 16 columns, k inputs.
    unsafe {
        let mut acc = [*start; R];
        let c = t.c.add(first * C_STRIDE);
        if t.accumulate {
            for (r, row) in acc.iter_mut().enumerate() {
                for (v, acc) in row.iter_mut().enumerate() {
                    *acc = L::add(*acc, L::load_acc(c.add(r * C_STRIDE + 16 * v)));
                }
            }
        }
        let (mut a, mut b) = (t.a.add(first * t.a_stride), t.b);
        for _ in 0..t.k / (4 * L::K) {
            let x: [L::Vector; R] = L::load_a(std::array::from_fn(|r| a.add(r * t.a_stride)));
            step::<L, R, 0>(&mut acc, &x, b);
            step::<L, R, 1>(&mut acc, &x, b.add(STEP_BYTES));
            step::<L, R, 2>(&mut acc, &x, b.add(2 * STEP_BYTES));
            step::<L, R, 3>(&mut acc, &x, b.add(3 * STEP_BYTES));
            a = a.wrapping_add(ROW_BYTES);
            b = b.wrapping_add(4 * STEP_BYTES);
        }
        for (r, row) in acc.iter().enumerate() {
            for (v, &acc) in row.iter().enumerate() {
                L::store_acc(c.add(r * C_STRIDE + 16 * v), acc);
            }
        }
    }
}

/// # Safety
/// As [`ByLane`], for the 64 bytes at `b`.
#[inline(always)]
unsafe fn step<L: ByLane, const R: usize, const LANE: i32>(
    acc: &mut [[L::Acc; VECTORS]; R],
    x: &[L::Vector; R],
    b: *const u8,
) {
    for v in 0..VECTORS {
        // SAFETY: the caller vouches for the 64 bytes.
        unsafe {
            let w = L::load_b(b.add(16 * v));
            for (acc, &x) in acc.iter_mut().zip(x) {
                acc[v] = L::multiply::<LANE>(acc[v], x, w);
            }
        }
    }
}

/// Accumulators of [`peak`].
const CHAINS: usize = ROWS * VECTORS;

/// Operations of a round of [`peak`].
pub(super) const fn peak_ops<L: ByLane>() -> usize {
    2 * CHAINS * 4 * L::K
}

/// Multiplies registers `rounds` times.
///
/// # Safety
/// The machine has the instruction set.
#[inline(always)]
pub(super) unsafe fn peak<L: ByLane>(rounds: usize) {
    let bytes = std::hint::black_box([1u8; ROW_BYTES]);
    // SAFETY: the arrays have 16 bytes.
    unsafe {
        let (x, w) = (L::load_a([bytes.as_ptr(); ROWS]), L::load_b(bytes.as_ptr()));
        let mut acc = [[L::zero(); VECTORS]; ROWS];
        for _ in 0..rounds {
            for (acc, &x) in acc.iter_mut().zip(&x) {
                acc[0] = L::multiply::<0>(acc[0], x, w);
                acc[1] = L::multiply::<1>(acc[1], x, w);
                acc[2] = L::multiply::<2>(acc[2], x, w);
                acc[3] = L::multiply::<3>(acc[3], x, w);
            }
        }
        std::hint::black_box(acc);
    }
}
