//! AArch64: NEON to i8mm.
//!
//! Operand rows are u8, and before i8mm no instruction multiplies these by int8. Tiles subtract 128 on registers, by
//! flipping the highest bit, and begin with 128 times the sum of each output's weights. To pay for these sums once per many
//! rows, a tile of `mr` rows is made of pieces of a few, the most whose sums the 32 registers hold.

use crate::gemm::steps::steps;

mod by_lane;
pub(crate) mod dotprod;
pub(crate) mod i8mm;
pub(crate) mod neon;

steps!(
    #[target_feature(enable = "neon")]
    STEPS,
    // SAFETY: the features of the functions around it.
    unsafe { crate::simd::neon::Neon::new() }
);

/// Vectors of 4 columns in a panel.
const VECTORS: usize = crate::layout::TILE_N / 4;

/// Bytes from row to row of the sums.
const C_STRIDE: usize = crate::gemm::tile::TILE_COLUMNS * 4;
