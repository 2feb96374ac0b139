//! One call from its operand to its finished rows: tasks of row blocks by panel groups, each walking over chunks of `k`.
//!
//! Nothing here depends on the number of threads, and each sum is added up in the order of its inputs wherever its row
//! lies, so a row's result is the same in any batch.

use std::ops::Range;

use super::chunks::{Chunk, chunks, rows_bytes};
use super::columns::Columns;
use super::geometry::{FOLDED_TAPS, Geometry, RowTile, folded};
use super::steps::{AddTap, Finish, Out, Sums, Target, Unpack, Widen};
use super::table::{GemmKernel, Types};
use super::tile::{MAX_TAPS, TILE_COLUMNS, TileArgs};
use super::{Epilogue, Gemm};
use crate::Workers;
use crate::arch::prefetch;
use crate::layout::{ALIGN, Encoding, TILE_K, TILE_N, Weight};
use crate::par::Shared;
use crate::view::{Operand, RowsMut};

/// Panels under a tile.
pub(super) const PAIR: usize = TILE_COLUMNS / TILE_N;
/// Most rows of a block.
const BLOCK_ROWS: usize = 512;
/// Most rows of a block that is widened, or whose sums over taps had better stay in L1.
pub(super) const SMALL_BLOCK_ROWS: usize = 128;
/// How many times larger a block is whose weights are unpacked: that is done again for each, which costs more than to fetch rows
/// from beyond L2.
const UNPACKED_BLOCKS: usize = 4;
/// Weights of so many bytes stay in L2 from block to block, so that blocks may be small.
const RESIDENT_WEIGHT: usize = 1024 * 1024;
/// Most panel pairs whose sums a task keeps while chunks go by.
const GROUP_PAIRS: usize = 8;
/// Fewest tasks a call is cut into, where its panels allow.
const TASKS: usize = 16;

/// A call, prepared for one kernel.
pub(super) struct Plan<'a> {
    pub(super) kernel: &'static GemmKernel,
    pub(super) operand: Operand<'a>,
    pub(super) weight: Weight<'a>,
    pub(super) epilogue: Epilogue<'a>,
    out: Out<'a>,
    geometry: Geometry,
    chunks: Vec<Chunk>,
    /// Rows must be widened for the kernel.
    widens: bool,
    /// Weights must be unpacked for the kernel.
    unpacks: bool,
    /// Taps that meet one pixel of an upsampled image are added up first: a block has the taps of one phase.
    folds: bool,
    /// Taps are added up in f32, as each meets pixels of other scales.
    pub(super) by_tap: bool,
    /// Accumulators wait in memory between chunks.
    keeps: bool,
    /// Most rows of a block.
    block_rows: usize,
}

/// A worker's scratch memory, cut up. Lengths in comments, for the block at hand.
struct Buffers<'s> {
    /// `[block_rows][chunk]` of the kernel's row elements, where rows are widened.
    rows: &'s mut [u8],
    /// `[PAIR][chunk][16]` of the kernel's weights, where they are unpacked.
    weights: &'s mut [u8],
    /// `[GROUP_PAIRS][block_rows]`, or a tile.
    products: &'s mut [[i32; TILE_COLUMNS]],
    /// `[GROUP_PAIRS][block_rows]`, where taps are added up.
    sums: &'s mut [[f32; TILE_COLUMNS]],
}

/// Runs `call` with `kernel`. The caller has checked the shapes.
pub(super) fn run(
    workers: &Workers,
    kernel: &'static GemmKernel,
    call: Gemm<'_>,
    rows: Option<Range<usize>>,
) {
    let Gemm { operand, input, filter, weight, epilogue, out } = call;
    let widens = !matches!(
        (operand, kernel.types),
        (Operand::U8 { .. } | Operand::U8Uniform { .. }, Types::U8S8)
            | (Operand::Bf16(_), Types::Bf16)
            | (Operand::F32(_), Types::F32)
    );
    // Where the kernel has room for sums of weights, or rounds weights anyway.
    let folds = filter.upsample
        && match kernel.types {
            Types::F32 => true,
            Types::Bf16 => weight.encoding == Encoding::F16,
            Types::U8S8 | Types::S16S16 => false,
        };
    let unpacks = folds
        || !matches!(
            (weight.encoding, kernel.types),
            (Encoding::Q8, Types::U8S8) | (Encoding::Bf16, Types::Bf16) | (Encoding::F32, Types::F32)
        );
    let taps = if folds { FOLDED_TAPS } else { weight.shape.taps };
    let by_tap = matches!(operand, Operand::U8 { .. }) && taps > 1;
    let chunks = chunks(taps, weight.shape.k_padded(), kernel, widens, by_tap);
    let keeps = !chunks.iter().all(|chunk| chunk.first && chunk.last);
    let by_image = matches!(operand, Operand::U8Uniform { .. }) || epilogue.image_bias.is_some();
    let row_bytes = (weight.shape.k_padded() * kernel.types.row_bytes()).max(1);
    let block_rows = if widens || by_tap && weight.bytes.len() <= RESIDENT_WEIGHT {
        SMALL_BLOCK_ROWS
    } else {
        let blocks = if unpacks { UNPACKED_BLOCKS } else { 1 };
        (blocks * kernel.block_bytes / row_bytes).min(BLOCK_ROWS).max(kernel.mr)
    };
    let geometry = Geometry::new(&input, &filter, kernel.mr, by_image, rows, folds.then_some(block_rows));
    let out = match out {
        RowsMut::F32(out) => Out::F32(Shared::new(out)),
        RowsMut::Bf16(out) => Out::Bf16(Shared::new(out)),
    };
    let plan = Plan {
        kernel,
        operand,
        weight,
        epilogue,
        out,
        geometry,
        chunks,
        widens,
        unpacks,
        folds,
        by_tap,
        keeps,
        block_rows,
    };

    let blocks = plan.geometry.blocks(block_rows, folds);
    let pairs = weight.shape.panels().div_ceil(PAIR);
    let mut group = pairs;
    while blocks.len() * pairs.div_ceil(group.max(1)) < TASKS && group > 1 {
        group = group.div_ceil(2);
    }
    let groups = pairs.div_ceil(group.max(1));
    workers.for_each(blocks.len() * groups, |task, scratch| {
        let tiles = blocks[task / groups].clone();
        let first = task % groups * group;
        let mut buffers = plan.cut(scratch);
        let step = if widens { GROUP_PAIRS } else { 1 };
        for first in (first..pairs.min(first + group)).step_by(step) {
            let end = pairs.min(task % groups * group + group).min(first + step);
            plan.run_group(&mut buffers, tiles.clone(), first..end);
        }
        (kernel.leave)();
    });
}

impl<'a> Plan<'a> {
    fn cut<'s>(&self, scratch: &'s mut [u8]) -> Buffers<'s> {
        let (rows, scratch) = scratch.split_at_mut(if self.widens { rows_bytes() } else { 0 });
        let (weights, scratch) = scratch.split_at_mut(if self.unpacks { self.kernel.pair_bytes } else { 0 });
        let pairs = if self.widens { GROUP_PAIRS } else { 1 };
        let kept = pairs * self.block_rows;
        let products = if self.keeps { kept } else { self.kernel.mr };
        let sums = if self.by_tap { kept } else { 0 };
        let (products, scratch) = scratch.split_at_mut(products * TILE_COLUMNS * 4);
        let sums = &mut scratch[..sums * TILE_COLUMNS * 4];
        Buffers {
            rows,
            weights,
            products: bytemuck::cast_slice_mut(products),
            sums: bytemuck::cast_slice_mut(sums),
        }
    }

    /// Rows of tiles `tiles`, columns of panel pairs `pairs`.
    fn run_group(&self, buffers: &mut Buffers<'_>, tiles: Range<usize>, pairs: Range<usize>) {
        let tiles = &self.geometry.tiles[tiles];
        if self.chunks.is_empty() {
            buffers.products[..self.kernel.mr].fill([0; TILE_COLUMNS]);
            for pair in pairs {
                let columns = Columns::new(self, pair, None);
                for tile in tiles {
                    self.finish(&columns, tile, &buffers.products[..tile.rows], None);
                }
            }
            return;
        }
        for (c, chunk) in self.chunks.iter().enumerate() {
            if self.widens {
                self.widen(buffers.rows, tiles, chunk);
            }
            let finishes = c + 1 == self.chunks.len();
            for (i, pair) in pairs.clone().enumerate() {
                let columns = Columns::new(self, pair, Some(chunk));
                let blocks = self.weights(buffers.weights, pair, columns.panels, chunk, tiles[0].phase);
                let mut ahead = self.ahead(c, pair, &pairs, tiles);
                let mut row = 0;
                for tile in tiles {
                    ahead.prefetch();
                    if finishes {
                        // SAFETY: the kernel was picked for this machine, and its steps are of its tier.
                        unsafe { (self.kernel.steps.claim)(&self.target(&columns, tile), tile.rows) };
                    }
                    let kept = i * self.block_rows + row;
                    let at = if self.keeps { kept } else { 0 };
                    let products = &mut buffers.products[at..at + tile.rows];
                    let widened = match self.widens {
                        true => &buffers.rows[row * chunk.len * self.kernel.types.row_bytes()..],
                        false => &[],
                    };
                    self.multiply(products, widened, tile, &blocks, columns.panels, chunk);
                    if chunk.last {
                        let sums =
                            if self.by_tap { &mut buffers.sums[kept..kept + tile.rows] } else { &mut [] };
                        self.settle(&columns, tile, chunk.tap, products, sums, finishes);
                    }
                    row += tile.rows;
                }
            }
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
        let tile_bytes = self.weight.encoding.tile_bytes();
        let tap = if self.folds { folded(tiles[0].phase, chunk.tap).next().unwrap_or(0) } else { chunk.tap };
        let first = (tap * self.weight.shape.k_padded() + chunk.k) / TILE_K * tile_bytes;
        let panels = [0, 1].map(|p| match pair * PAIR + p {
            panel if panel < self.weight.shape.panels() => {
                &self.weight.panel(panel).tiles[first..first + chunk.len / TILE_K * tile_bytes]
            }
            _ => &[],
        });
        let step = panels[0].len().div_ceil(tiles.len().max(1)).next_multiple_of(ALIGN);
        Ahead { panels, step }
    }

    /// Adds the products of a tile to the sums over its taps, and finishes it after the last chunk. (At once: the loads would
    /// wait for the stores of a tile multiplied meanwhile, a multiple of 4 KiB away.)
    fn settle(
        &self,
        columns: &Columns,
        tile: &RowTile,
        tap: usize,
        products: &[[i32; TILE_COLUMNS]],
        sums: &mut [[f32; TILE_COLUMNS]],
        finishes: bool,
    ) {
        if self.by_tap {
            let (scale, scale_step) = self.row_scale(tile, tap);
            let tap = AddTap { products, offset: &columns.offset, scale, scale_step, first: tap == 0 };
            // SAFETY: the kernel was picked for this machine, and its steps are of its tier.
            unsafe { (self.kernel.steps.add_tap)(&tap, sums) };
        }
        if finishes {
            self.finish(columns, tile, products, self.by_tap.then_some(&*sums));
        }
    }

    /// Writes the rows that `tiles` meet in `chunk` as the kernel reads them: `[rows][chunk.len]`.
    fn widen(&self, out: &mut [u8], tiles: &[RowTile], chunk: &Chunk) {
        let stride = self.weight.shape.k_padded();
        let mut out = out.chunks_exact_mut(chunk.len * self.kernel.types.row_bytes());
        for tile in tiles {
            for r in 0..tile.rows {
                let row = self.geometry.operand_row(tile, chunk.tap) + r * self.geometry.operand_step;
                let piece = row * stride + chunk.k..row * stride + chunk.k + chunk.len;
                let widen = match self.operand {
                    Operand::U8 { codes, .. } | Operand::U8Uniform { codes, .. } => Widen::U8(&codes[piece]),
                    Operand::Bf16(rows) => Widen::Bf16(&rows[piece]),
                    Operand::F32(_) => unreachable!("f32 rows are read where they lie"),
                };
                let out = out.next().expect("a block has at most SMALL_BLOCK_ROWS rows");
                // SAFETY: the kernel was picked for this machine, and its steps are of its tier.
                unsafe { (self.kernel.steps.widen)(&widen, out) };
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
        let Weight { encoding, shape, bytes } = self.weight;
        let padded = shape.k_padded();
        let first = |tap: usize| (tap * padded + chunk.k) / TILE_K;
        let tiles = chunk.len / TILE_K;
        if !self.unpacks {
            let stride = shape.panel_bytes(encoding);
            let tap = padded / TILE_K * encoding.tile_bytes();
            let header = pair * PAIR * stride + encoding.header_bytes(shape);
            let start = header + first(chunk.tap) * encoding.tile_bytes();
            let len = (panels - 1) * stride + (chunk.taps - 1) * tap + tiles * encoding.tile_bytes();
            return Blocks { bytes: &bytes[start..start + len], stride, tap };
        }
        let tap = chunk.len * TILE_N * self.kernel.types.weight_bytes();
        let stride = chunk.taps * tap;
        for (p, out) in out.chunks_exact_mut(stride).take(panels).enumerate() {
            let panel = self.weight.panel(pair * PAIR + p);
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
                let unpack = Unpack { panel, encoding, types: self.kernel.types, firsts, tiles };
                // SAFETY: the kernel was picked for this machine, and its steps are of its tier.
                unsafe { (self.kernel.steps.unpack)(&unpack, out) };
            }
        }
        Blocks { bytes: &out[..panels * stride], stride, tap }
    }

    /// The scale of the operand row that row 0 of `tile` meets at `tap`, and from there to the next row's.
    fn row_scale(&self, tile: &RowTile, tap: usize) -> (&'a [f32], usize) {
        match self.operand {
            Operand::U8 { scale, .. } => {
                (&scale[self.geometry.operand_row(tile, tap)..], self.geometry.operand_step)
            }
            Operand::U8Uniform { images, .. } => (std::slice::from_ref(&images[tile.image].scale), 0),
            Operand::Bf16(_) | Operand::F32(_) => (&[1.0], 0),
        }
    }

    /// The products of `tile` in `chunk`, by the kernel. Row 0 of widened rows is `widened`.
    fn multiply(
        &self,
        products: &mut [[i32; TILE_COLUMNS]],
        widened: &[u8],
        tile: &RowTile,
        blocks: &Blocks<'_>,
        panels: usize,
        chunk: &Chunk,
    ) {
        let kernel = self.kernel;
        // The slack of rows and panels is zero, so only the steps that hold inputs are taken.
        let k = (self.weight.shape.k - chunk.k).min(chunk.len).next_multiple_of(kernel.kr);
        let element = kernel.types.row_bytes();
        let padded = self.weight.shape.k_padded();
        let (rows, a_stride): (&[u8], usize) = match self.operand {
            _ if self.widens => (widened, chunk.len * element),
            Operand::U8 { codes, .. } | Operand::U8Uniform { codes, .. } => {
                (codes, padded * self.geometry.operand_step)
            }
            Operand::Bf16(rows) => {
                (bytemuck::cast_slice(rows), padded * self.geometry.operand_step * element)
            }
            Operand::F32(rows) => (bytemuck::cast_slice(rows), padded * self.geometry.operand_step * element),
        };
        let mut a = [std::ptr::null(); MAX_TAPS];
        for (tap, a) in a[..chunk.taps].iter_mut().enumerate() {
            let at = match self.widens {
                true => 0,
                false => (self.geometry.operand_row(tile, chunk.tap + tap) * padded + chunk.k) * element,
            };
            let rows = &rows[at..];
            assert!(rows.len() >= (tile.rows - 1) * a_stride + k * element, "{tile:?} {chunk:?}");
            *a = rows.as_ptr();
        }
        assert!(products.len() == tile.rows && tile.rows <= kernel.mr && k <= chunk.len);
        let at_once = kernel.nr / TILE_N;
        for p in (0..panels).step_by(at_once) {
            let args = TileArgs {
                a,
                taps: chunk.taps,
                a_stride,
                rows: tile.rows,
                b: blocks.bytes[p * blocks.stride..].as_ptr(),
                b_stride: blocks.stride,
                b_tap: blocks.tap,
                panels: at_once.min(panels - p),
                k,
                c: products.as_mut_ptr().cast::<u8>().wrapping_add(p * TILE_N * 4),
                accumulate: !chunk.first,
            };
            // SAFETY: the kernel was picked for this machine; each tap's a reaches rows * k elements (asserted), b holds the
            // blocks of chunk.len >= k inputs of each tap and panel, c is `products`, borrowed here alone.
            unsafe { (kernel.tile)(&args) };
        }
    }

    /// Where `tile` goes.
    fn target(&self, columns: &Columns, tile: &RowTile) -> Target<'_> {
        let activation = self.epilogue.activation;
        Target {
            out: &self.out,
            ldo: activation.columns(self.weight.shape.n),
            row: tile.row,
            row_step: self.geometry.row_step,
            column: activation.columns(columns.first),
            columns: activation.columns(columns.inputs),
        }
    }

    /// Finishes `tile` from its products, or from the sums over its taps.
    fn finish(
        &self,
        columns: &Columns,
        tile: &RowTile,
        products: &[[i32; TILE_COLUMNS]],
        sums: Option<&[[f32; TILE_COLUMNS]]>,
    ) {
        let (scale, scale_step) = self.row_scale(tile, 0);
        let mut offset = columns.offset;
        if let Operand::U8Uniform { images, .. } = self.operand {
            offset = offset.map(|sum| sum * images[tile.image].zero);
        }
        let sums = match sums {
            Some(sums) => Sums::Float(sums),
            None if self.kernel.types.is_integer() => {
                Sums::Integer { sums: products, offset: &offset, scale, scale_step }
            }
            None => Sums::Float(bytemuck::cast_slice(products)),
        };
        let mut bias = columns.bias;
        let n = self.weight.shape.n;
        if let Some(image_bias) = self.epilogue.image_bias {
            let image_bias = &image_bias[tile.image * n + columns.first..][..columns.inputs];
            for (bias, x) in bias.iter_mut().zip(image_bias) {
                *bias += x;
            }
        }
        let activation = self.epilogue.activation;
        let finish = Finish {
            sums,
            scale: &columns.scale,
            bias: &bias,
            activation,
            residual: self.epilogue.residual,
            accumulate: self.epilogue.accumulate,
            target: self.target(columns, tile),
        };
        // SAFETY: the kernel was picked for this machine, and its steps are of its tier.
        unsafe { (self.kernel.steps.finish)(&finish) };
    }
}

/// Weights that will be wanted soon. The loads of wide tiles wait for memory one after another, so it is asked early.
struct Ahead<'a> {
    /// What is still to be fetched of each panel.
    panels: [&'a [u8]; PAIR],
    /// Bytes of a panel to be fetched in a step.
    step: usize,
}

impl Ahead<'_> {
    fn prefetch(&mut self) {
        for panel in &mut self.panels {
            let (now, later) = panel.split_at(self.step.min(panel.len()));
            for line in now.chunks(ALIGN) {
                prefetch(line);
            }
            *panel = later;
        }
    }
}

/// Weights as a kernel reads them.
struct Blocks<'b> {
    bytes: &'b [u8],
    /// Bytes from panel to panel.
    stride: usize,
    /// Bytes from tap to tap.
    tap: usize,
}
