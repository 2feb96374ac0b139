//! One call from its operand to its finished rows: tasks of row blocks by panel groups, each walking over chunks of `k`.
//!
//! Nothing here depends on the number of threads, and each sum is added up in the order of its inputs wherever its row
//! lies, so a row's result is the same in any batch.

use std::ops::Range;

use super::call::Call;
use super::chunks::{Chunk, WidenedRows, chunks, rows_bytes};
use super::columns::Columns;
use super::geometry::{FOLDED_TAPS, Geometry, Places, RowTile, folded};
use super::shorts::row_most;
use super::steps::{Unpack, Widen};
use super::strip::{Ahead, Blocks, Half, Strip};
use super::table::{GemmKernel, Types};
use super::tile::TILE_COLUMNS;
use super::{Activation, Filter, Gemm, winograd};
use crate::Workers;
use crate::arch::fence;
use crate::layout::{ALIGN, Encoding, TILE_K, TILE_N, Weight};
use crate::par::SCRATCH_BYTES;
use crate::view::Operand;

/// Panels under a tile.
pub(super) const PAIR: usize = TILE_COLUMNS / TILE_N;
/// Most rows of a block.
const BLOCK_ROWS: usize = 512;
/// The same where weights are unpacked, which is done again for each block, if so many rows stay where the kernel wants them.
const UNPACKED_BLOCK_ROWS: usize = 1024;
/// Most rows of a block of 16-bit rows, where scratch memory has room for their sums: weights are unpacked again for each block.
const WIDENED_BLOCK_ROWS: usize = 256;
/// Most rows of a block that is widened, or whose sums over taps had better stay in L1.
pub(super) const SMALL_BLOCK_ROWS: usize = 128;
/// How many times larger a block is whose weights are unpacked: that is done again for each, which costs more than to fetch rows
/// from beyond L2.
const UNPACKED_BLOCKS: usize = 4;
/// Weights of so many bytes stay in L2 from block to block, so that blocks may be small.
const RESIDENT_WEIGHT: usize = 1024 * 1024;
/// Most panel pairs whose sums a task keeps while chunks go by.
const GROUP_PAIRS: usize = 10;
/// Fewest tasks a call is cut into, where its panels allow.
const TASKS: usize = 16;

/// A call, prepared for one kernel.
pub(crate) struct Plan<'a> {
    pub(super) call: Call<'a>,
    pub(super) geometry: Geometry,
    chunks: Vec<Chunk>,
    /// Rows must be widened for the kernel, so many at a time.
    pub(super) widened: Option<WidenedRows>,
    /// Weights must be unpacked for the kernel.
    unpacks: bool,
    /// Taps that meet one pixel of an upsampled image are added up first: a block has the taps of one phase.
    folds: bool,
    /// Taps are added up in f32, as each meets pixels of other scales.
    pub(super) by_tap: bool,
    /// Accumulators wait in memory between chunks.
    pub(super) keeps: bool,
    /// Two pairs of panels make a line.
    halves: bool,
    /// Panel pairs whose sums a task keeps while chunks go by.
    together: usize,
    /// Most rows of a block.
    block_rows: usize,
}

/// A worker's scratch memory, cut up. Lengths in comments, for the block at hand.
struct Buffers<'s> {
    /// `[rows][chunk]` of the kernel's row elements, those of [`WidenedRows`].
    rows: &'s mut [u8],
    /// Scales of the rows, where they are rounded.
    row_scale: &'s mut [f32],
    /// `[PAIR][chunk][16]` of the kernel's weights, where they are unpacked.
    weights: &'s mut [u8],
    /// `[together][block_rows]`, or a tile.
    products: &'s mut [[i32; TILE_COLUMNS]],
    /// `[together][block_rows]`, where taps are added up or half rows wait.
    sums: &'s mut [[f32; TILE_COLUMNS]],
}

/// Most operand rows that are copied for a block of `rows` rows whose taps share them.
const fn copied_rows(rows: usize) -> usize {
    rows + rows / 4
}

/// Bytes of the scales of `rows` rows, whole lines.
const fn scales_bytes(rows: usize) -> usize {
    (rows * size_of::<f32>()).next_multiple_of(ALIGN)
}

/// Runs `gemm` with `kernel`, of each image rows `rows`, the first of which is row `line` of a picture. The caller has checked the
/// shapes.
pub(super) fn run(
    workers: &Workers,
    kernel: &'static GemmKernel,
    gemm: Gemm<'_>,
    rows: Option<Range<usize>>,
    line: usize,
) {
    let Gemm { operand, input, filter, weight, epilogue, out } = gemm;
    let winograd = winograd::suits(kernel, &operand, &filter, weight.shape, epilogue.activation);
    // Phases of an upsampled image take turns.
    let row_step = if filter.upsample && !winograd { 2 } else { 1 };
    let call = Call::new(kernel, operand, weight, epilogue, out, row_step);
    if winograd {
        return winograd::run(workers, &call, input, &filter, rows, line);
    }
    let widens = !matches!(
        (operand, kernel.types),
        (Operand::U8 { .. } | Operand::U8Uniform { .. }, Types::U8S8 | Types::U8S4)
            | (Operand::Bf16(_), Types::Bf16)
            | (Operand::F32(_), Types::F32)
    );
    let rounds = call.rounds;
    // Where the kernel has room for sums of weights, or rounds weights anyway. Codes of all pixels have to mean the same.
    let folds = filter.upsample
        && match kernel.types {
            Types::F32 => true,
            Types::Bf16 => weight.encoding == Encoding::F16,
            Types::S16S16 => rounds || matches!(operand, Operand::U8Uniform { .. }),
            Types::U8S8 | Types::U8S4 => false,
        };
    let unpacks = folds
        || !matches!(
            (weight.encoding, kernel.types),
            (Encoding::Q8, Types::U8S8) | (Encoding::Bf16, Types::Bf16) | (Encoding::F32, Types::F32)
        );
    let taps = if folds { FOLDED_TAPS } else { weight.shape.taps };
    let by_tap = matches!(operand, Operand::U8 { .. }) && taps > 1;
    let row_bytes = (weight.shape.k_padded() * kernel.types.row_bytes()).max(1);
    let halves = call.past && !by_tap && epilogue.activation == Activation::Geglu;
    // Where taps are added up or half lines wait, scratch memory has two blocks of sums, and has room for small ones only. Of
    // rounded rows one waits.
    let large = rounds || kernel.types == Types::S16S16 && !by_tap && !halves;
    let fits = kernel.block_bytes / row_bytes;
    let block_rows = if widens {
        if large { WIDENED_BLOCK_ROWS } else { SMALL_BLOCK_ROWS }
    } else if by_tap && weight.bytes.len() <= RESIDENT_WEIGHT {
        SMALL_BLOCK_ROWS
    } else if unpacks && !halves {
        (UNPACKED_BLOCKS * fits).min(BLOCK_ROWS).max(fits.min(UNPACKED_BLOCK_ROWS)).max(kernel.mr)
    } else {
        fits.min(BLOCK_ROWS).max(kernel.mr)
    };
    let geometry =
        Geometry::new(&input, &filter, kernel.mr, call.by_image, rows, folds.then_some(block_rows));
    // Taps whose operand rows lie side by side. Sums of a tap are finished before those of the next begin.
    let line = match filter {
        _ if by_tap || !widens => 1,
        _ if folds => FOLDED_TAPS.isqrt(),
        Filter { stride: 1, upsample: false, kw, .. } => kw,
        _ => 1,
    };
    // At the ends of a line of pixels taps meet rows that no other row of the output meets.
    let copied = if line > 1 { copied_rows(block_rows) } else { block_rows };
    let blocks = geometry.blocks(block_rows, line, copied, folds);
    let widened = widens.then_some(WidenedRows { rows: copied, line });
    let chunks = chunks(taps, weight.shape.k_padded(), kernel, widened, by_tap, rounds);
    let keeps = !chunks.iter().all(|chunk| chunk.first && chunk.last);
    let plan = Plan {
        call,
        geometry,
        chunks,
        widened,
        unpacks,
        folds,
        by_tap,
        keeps,
        halves,
        together: if widens {
            GROUP_PAIRS
        } else if halves {
            2
        } else {
            1
        },
        block_rows,
    };

    let pairs = weight.shape.panels().div_ceil(PAIR);
    // Widened rows are worth more than a pair.
    let group = group_pairs(blocks.len(), pairs, if halves || widens { 2 } else { 1 });
    let groups = pairs.div_ceil(group);
    workers.for_each(blocks.len() * groups, |task, scratch| {
        let tiles = blocks[task / groups].clone();
        let first = task % groups * group;
        let mut buffers = plan.cut(scratch);
        for first in (first..pairs.min(first + group)).step_by(plan.together) {
            let end = pairs.min(task % groups * group + group).min(first + plan.together);
            plan.run_group(&mut buffers, tiles.clone(), first..end);
        }
        (kernel.leave)();
        if plan.call.past {
            fence();
        }
    });
}

/// Panel pairs of a task, a multiple of `least` unless all: so few that `blocks` make enough tasks.
pub(super) fn group_pairs(blocks: usize, pairs: usize, least: usize) -> usize {
    let mut group = pairs.max(1);
    while blocks * pairs.div_ceil(group) < TASKS && group > least {
        group = group.div_ceil(2).next_multiple_of(least);
    }
    group
}

impl<'a> Plan<'a> {
    fn cut<'s>(&self, scratch: &'s mut [u8]) -> Buffers<'s> {
        // The most that is cut: 16-bit rows, with scales, and the sums of a group's pairs.
        const WANTED: usize = rows_bytes()
            + scales_bytes(copied_rows(WIDENED_BLOCK_ROWS))
            + Types::S16S16.broadcast_pair_bytes()
            + (GROUP_PAIRS * WIDENED_BLOCK_ROWS + TILE_COLUMNS) * TILE_COLUMNS * 4;
        const { assert!(WANTED <= SCRATCH_BYTES) };
        let (widened, scales) = match self.widened {
            Some(WidenedRows { rows, .. }) if self.call.rounds => (rows_bytes(), scales_bytes(rows)),
            Some(_) => (rows_bytes(), 0),
            None => (0, 0),
        };
        let (rows, scratch) = scratch.split_at_mut(widened);
        let (row_scale, scratch) = scratch.split_at_mut(scales);
        let (weights, scratch) =
            scratch.split_at_mut(if self.unpacks { self.call.kernel.pair_bytes } else { 0 });
        let kept = self.together * self.block_rows;
        let products = if self.keeps { kept } else { self.call.kernel.mr };
        let sums = if self.by_tap || self.call.rounds || self.halves { kept } else { 0 };
        let (products, scratch) = scratch.split_at_mut(products * TILE_COLUMNS * 4);
        let sums = &mut scratch[..sums * TILE_COLUMNS * 4];
        Buffers {
            rows,
            row_scale: bytemuck::cast_slice_mut(row_scale),
            weights,
            products: bytemuck::cast_slice_mut(products),
            sums: bytemuck::cast_slice_mut(sums),
        }
    }

    /// Rows of tiles `tiles`, columns of panel pairs `pairs`.
    fn run_group(&self, buffers: &mut Buffers<'_>, tiles: Range<usize>, pairs: Range<usize>) {
        let tiles = &self.geometry.tiles[tiles];
        for (c, chunk) in self.chunks.iter().enumerate() {
            if chunk.len == 0 {
                // No inputs: the sums are zero, whatever the last task left here.
                buffers.row_scale.fill(0.0);
            } else if self.widened.is_some() && chunk.shift == 0 {
                self.widen(buffers, tiles, chunk);
            }
            for (i, pair) in pairs.clone().enumerate() {
                let kept = i * self.block_rows;
                let taps =
                    if self.by_tap { chunk.tap..chunk.tap + 1 } else { 0..self.call.weight.shape.taps };
                let columns = Columns::new(&self.call, pair, taps);
                let adds = self.by_tap || self.call.rounds;
                let (sums, held) = buffers.sums.split_at_mut(if adds { buffers.sums.len() } else { 0 });
                let mut strip = Strip {
                    chunk,
                    blocks: self.weights(buffers.weights, pair, columns.panels, chunk, tiles[0].phase),
                    tiles,
                    rows: if self.widened.is_some() { buffers.rows } else { self.rows() },
                    row_scale: buffers.row_scale,
                    products: &mut buffers.products[if self.keeps { kept } else { 0 }..],
                    sums: if adds { &mut sums[kept..] } else { sums },
                    held,
                    ahead: self.ahead(c, pair, &pairs, tiles),
                    finishes: c + 1 == self.chunks.len(),
                    holds: self.holds(pair, &pairs),
                    columns: &columns,
                };
                // SAFETY: the kernel was picked for this machine, and so are its steps.
                unsafe { (self.call.steps.strip)(self, &mut strip) };
            }
        }
    }

    /// Which half of lines `pair` of `pairs` makes, where lines of two pairs go past the caches.
    fn holds(&self, pair: usize, pairs: &Range<usize>) -> Option<Half> {
        let other = pair ^ 1;
        let both = self.halves && pairs.contains(&other);
        both.then_some(if pair < other { Half::First } else { Half::Second })
    }

    /// The operand's rows in bytes.
    fn rows(&self) -> &[u8] {
        match self.call.operand {
            Operand::U8 { codes, .. } | Operand::U8Uniform { codes, .. } => codes,
            Operand::Bf16(rows) => bytemuck::cast_slice(rows),
            Operand::F32(rows) => bytemuck::cast_slice(rows),
        }
    }

    /// The weights that come after those of `pair` in chunk `c` (of several taps, those of the first), to be fetched while
    /// `tiles` are multiplied.
    fn ahead(&self, c: usize, pair: usize, pairs: &Range<usize>, tiles: &[RowTile]) -> Ahead<'a> {
        let (c, pair) = if pair + 1 < pairs.end {
            (c, pair + 1)
        } else if c + 1 < self.chunks.len() {
            (c + 1, pairs.start)
        } else {
            (0, pairs.end)
        };
        let chunk = &self.chunks[c];
        let tile_bytes = self.call.weight.encoding.tile_bytes();
        let tap = if self.folds { folded(tiles[0].phase, chunk.tap).next().unwrap_or(0) } else { chunk.tap };
        let first = (tap * self.call.weight.shape.k_padded() + chunk.k) / TILE_K * tile_bytes;
        let panels = [0, 1].map(|p| match pair * PAIR + p {
            panel if panel < self.call.weight.shape.panels() => {
                &self.call.weight.panel(panel).tiles[first..first + chunk.len / TILE_K * tile_bytes]
            }
            _ => &[],
        });
        let step = panels[0].len().div_ceil(tiles.len().max(1)).next_multiple_of(ALIGN);
        Ahead { panels, step }
    }

    /// The places of widened rows.
    #[inline(always)]
    pub(super) fn places(&self) -> Places {
        Places::new(self.widened.map_or(1, |widened| widened.line))
    }

    /// Writes the rows that `tiles` meet in `chunk`, and in those that follow it for other taps of the line, as the kernel reads
    /// them: `[rows][chunk.len]`.
    fn widen(&self, buffers: &mut Buffers<'_>, tiles: &[RowTile], chunk: &Chunk) {
        let stride = self.call.weight.shape.k_padded();
        let mut out = buffers.rows.chunks_exact_mut(chunk.len * self.call.kernel.types.row_bytes());
        let mut scales = buffers.row_scale.iter_mut();
        let most = row_most(self.call.weight.encoding, chunk.len, self.folds);
        let mut places = self.places();
        for tile in tiles {
            let (at, copied) = places.place(tile);
            let first = tile.base + self.geometry.offset(tile.phase, chunk.tap);
            for r in copied..places.rows() - at {
                let row = first + r * self.geometry.operand_step;
                let piece = row * stride + chunk.k..row * stride + chunk.k + chunk.len;
                let widen = match self.call.operand {
                    Operand::U8 { codes, .. } | Operand::U8Uniform { codes, .. } => Widen::U8(&codes[piece]),
                    Operand::Bf16(rows) if self.call.rounds => Widen::Rounded(&rows[piece], most),
                    Operand::Bf16(rows) => Widen::Bf16(&rows[piece]),
                    Operand::F32(_) => unreachable!("f32 rows are read where they lie"),
                };
                let out = out.next().expect("the buffer has room for a block");
                // SAFETY: the kernel was picked for this machine, and so are its steps.
                let scale = unsafe { (self.call.steps.widen)(&widen, out) };
                if let Some(of_row) = scales.next() {
                    *of_row = scale;
                }
            }
        }
    }

    /// The blocks of `pair` in `chunk` as the kernel reads them, for tiles of phase `phase`.
    fn weights<'b>(
        &self,
        out: &'b mut [u8],
        pair: usize,
        panels: usize,
        chunk: &Chunk,
        phase: usize,
    ) -> Blocks<'b>
    where
        'a: 'b,
    {
        let Weight { encoding, shape, bytes } = self.call.weight;
        if chunk.len == 0 {
            return Blocks { bytes: &[], stride: 0, tap: 0, scale: [1.0; _] };
        }
        let padded = shape.k_padded();
        let first = |tap: usize| (tap * padded + chunk.k) / TILE_K;
        let tiles = chunk.len / TILE_K;
        if !self.unpacks {
            let stride = shape.panel_bytes(encoding);
            let tap = padded / TILE_K * encoding.tile_bytes();
            let header = pair * PAIR * stride + encoding.header_bytes(shape);
            let start = header + first(chunk.tap) * encoding.tile_bytes();
            let len = (panels - 1) * stride + (chunk.taps - 1) * tap + tiles * encoding.tile_bytes();
            return Blocks { bytes: &bytes[start..start + len], stride, tap, scale: [1.0; _] };
        }
        let tap = tiles * self.call.kernel.types.tile_bytes();
        let stride = chunk.taps * tap;
        let mut scale = [1.0; TILE_COLUMNS];
        for (p, out) in out.chunks_exact_mut(stride).take(panels).enumerate() {
            let panel = self.call.weight.panel(pair * PAIR + p);
            for (i, out) in out.chunks_exact_mut(tap).enumerate() {
                let mut firsts = [0; FOLDED_TAPS];
                let mut summed = 0;
                if self.folds {
                    for tap in folded(phase, chunk.tap + i) {
                        firsts[summed] = first(tap);
                        summed += 1;
                    }
                } else {
                    firsts[0] = first(chunk.tap + i);
                    summed = 1;
                }
                let firsts = &firsts[..summed];
                let unpack = Unpack { panel, encoding, types: self.call.kernel.types, firsts, tiles };
                // SAFETY: the kernel was picked for this machine, and so are its steps.
                let of_panel = unsafe { (self.call.steps.unpack)(&unpack, out) };
                scale[p * TILE_N..][..TILE_N].copy_from_slice(&of_panel);
            }
        }
        Blocks { bytes: &out[..panels * stride], stride, tap, scale }
    }
}
