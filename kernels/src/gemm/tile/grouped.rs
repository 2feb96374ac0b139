//! Tiles whose weights are 4-bit codes: products of bytes are summed in 16 bits over a group, which has room for just that, and
//! sums of groups, times the group's scale, in 32.

use super::{Lanes, Position, ROW_GROUP, ROW_GROUPS, TILE_COLUMNS, TileArgs, UNROLLED};
use crate::layout::{Q4_GROUP, TILE_N};

/// One instruction set's way to add up groups. An `Acc` of its [`Lanes`] has two i16 sums for each column.
///
/// # Safety
/// As [`Lanes`].
pub(crate) trait Grouped: Lanes {
    /// `c[column] += acc[column][0] * scale[column] + acc[column][1] * scale[column]`, where a scale stands twice.
    unsafe fn fold(c: *mut u8, acc: Self::Acc, scale: *const u8);
}

/// Bytes of the scales behind the codes of a group.
const SCALE_BYTES: usize = 4 * TILE_N;
/// Steps of a group.
const STEPS: usize = Q4_GROUP / 4;

/// `R` rows by `V` vectors, of weights as [`Types::U8S4`](crate::gemm::Types::U8S4) has them.
///
/// # Safety
/// As [`TileFn`](super::TileFn), for `R` rows and `V` vectors.
#[inline(always)]
pub(crate) unsafe fn grouped_tile<L: Grouped, const R: usize, const V: usize>(t: &TileArgs) {
    const { assert!(R <= ROW_GROUP * ROW_GROUPS && L::K * STEPS == Q4_GROUP) };
    let c_at = |r: usize, v: usize| (r * TILE_COLUMNS + v * L::COLUMNS) * 4;
    // SAFETY: all offsets below stay within what the caller vouches for: rows < R, columns of V vectors, k inputs.
    unsafe {
        if !t.accumulate {
            for r in 0..R {
                for v in 0..V {
                    L::store_acc(t.c.add(c_at(r, v)), L::zero());
                }
            }
        }
        let mut at = Position::new(t);
        for tap in 0..t.taps {
            at.start(t, tap);
            for group in 0..t.k / Q4_GROUP {
                let mut acc = [[L::zero(); V]; R];
                at.multiply::<L, R, V, STEPS>(&mut acc);
                for (r, row) in acc.iter().enumerate() {
                    for (v, &acc) in row.iter().enumerate() {
                        let column = v * L::COLUMNS;
                        let scale = column / TILE_N * t.b_stride + column % TILE_N * 4;
                        L::fold(t.c.add(c_at(r, v)), acc, at.b.add(scale));
                    }
                }
                at.b = at.b.wrapping_add(SCALE_BYTES);
                if group % UNROLLED == UNROLLED - 1 {
                    at.fetch(V * L::COLUMNS);
                }
            }
        }
    }
}
