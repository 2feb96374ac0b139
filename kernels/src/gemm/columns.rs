//! Scales, biases and offsets of a pair of panels.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::call::Call;
use super::driver::PAIR;
use super::tile::TILE_COLUMNS;
use crate::layout::TILE_N;
use crate::view::Operand;

/// What the tiles of a panel pair have in common.
pub(super) struct Columns {
    pub(super) pair: usize,
    pub(super) panels: usize,
    /// First column.
    pub(super) first: usize,
    /// Columns before the activation.
    pub(super) inputs: usize,
    pub(super) scale: [f32; TILE_COLUMNS],
    pub(super) bias: [f32; TILE_COLUMNS],
    /// The sum of each output's weights over some taps; 128 times as much where that is the code of zero in all rows.
    pub(super) offset: [i32; TILE_COLUMNS],
}

impl Columns {
    /// Those of `pair`, with offsets over `taps`.
    pub(super) fn new(call: &Call<'_>, pair: usize, taps: Range<usize>) -> Columns {
        let shape = call.weight.shape;
        let first = pair * TILE_COLUMNS;
        let inputs = TILE_COLUMNS.min(shape.n - first);
        let panels = PAIR.min(shape.panels() - pair * PAIR);
        let mut columns =
            Columns { pair, panels, first, inputs, scale: [1.0; _], bias: [0.0; _], offset: [0; _] };
        if call.weight.encoding.is_integer() {
            for p in 0..panels {
                let scale = call.weight.panel(pair * PAIR + p).scale();
                columns.scale[p * TILE_N..][..TILE_N].copy_from_slice(&scale);
            }
        }
        if call.kernel.types.is_integer() && !call.rounds {
            columns.offset = columns.offset(call, taps);
        }
        if let Some(bias) = call.epilogue.bias {
            columns.bias[..inputs].copy_from_slice(&bias[first..first + inputs]);
        }
        columns
    }

    /// The sum of each output's weights over `taps`, times the code of zero if all rows have the same.
    fn offset(&self, call: &Call<'_>, taps: Range<usize>) -> [i32; TILE_COLUMNS] {
        let zero = if let Operand::U8Uniform { .. } = call.operand { 1 } else { 128 };
        let mut offset = [0; TILE_COLUMNS];
        for p in 0..self.panels {
            let panel = call.weight.panel(self.pair * PAIR + p);
            for tap in taps.clone() {
                for (offset, sum) in offset[p * TILE_N..].iter_mut().zip(panel.sum(tap)) {
                    *offset += zero * sum;
                }
            }
        }
        offset
    }
}
