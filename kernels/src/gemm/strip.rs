//! A pair of panels passes by the row tiles of a block, in one chunk of inputs: products, sums over taps, finished rows.
//! [`steps!`](super::steps::steps) compiles it for a tier, so that all but the tile function is one function.

use super::call::Terms;
use super::chunks::Chunk;
use super::columns::Columns;
use super::driver::{PAIR, Plan};
use super::geometry::RowTile;
use super::steps::{AddChunk, AddTap, Held, Sums, add_chunk, add_tap, finish};
use super::tile::{Claim, MAX_TAPS, Next, TILE_COLUMNS, TileArgs, UNROLLED};
use crate::arch::prefetch;
use crate::layout::{ALIGN, TILE_N};
use crate::simd::Simd;
use crate::view::Operand;

/// One pair of panels, one chunk and the tiles of a block.
pub(crate) struct Strip<'s> {
    pub(super) columns: &'s Columns,
    pub(super) chunk: &'s Chunk,
    pub(super) blocks: Blocks<'s>,
    pub(super) tiles: &'s [RowTile],
    /// The operand's rows in bytes; where they are widened, those of the tiles in the chunk, one after another.
    pub(super) rows: &'s [u8],
    /// Of all rows of the tiles, where they are rounded.
    pub(super) row_scale: &'s [f32],
    /// Of all rows of the tiles where they wait for the next chunk, else of a tile.
    pub(super) products: &'s mut [[i32; TILE_COLUMNS]],
    /// Of all rows of the tiles, where taps are added up.
    pub(super) sums: &'s mut [[f32; TILE_COLUMNS]],
    /// Of all rows of the tiles, where half rows wait.
    pub(super) held: &'s mut [[f32; TILE_COLUMNS]],
    pub(super) ahead: Ahead<'s>,
    /// No chunk comes after this one.
    pub(super) finishes: bool,
    /// Whether finished rows wait for those of the next pair, or those of the last pair wait for these.
    pub(super) holds: Option<Half>,
}

/// Which half of a line a pair makes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Half {
    First,
    Second,
}

/// Weights as a kernel reads them.
pub(super) struct Blocks<'b> {
    pub(super) bytes: &'b [u8],
    /// Bytes from panel to panel.
    pub(super) stride: usize,
    /// Bytes from tap to tap.
    pub(super) tap: usize,
    /// What the sums of each column are to be multiplied with, beside the scale of its panel.
    pub(super) scale: [f32; TILE_COLUMNS],
}

/// Weights that will be wanted soon. The loads of wide tiles wait for memory one after another, so it is asked early.
pub(super) struct Ahead<'a> {
    /// What is still to be fetched of each panel.
    pub(super) panels: [&'a [u8]; PAIR],
    /// Bytes of a panel to be fetched in a step.
    pub(super) step: usize,
}

impl Ahead<'_> {
    #[inline(always)]
    fn prefetch(&mut self) {
        for panel in &mut self.panels {
            let (now, later) = panel.split_at(self.step.min(panel.len()));
            for line in now.chunks(ALIGN) {
                prefetch(line.as_ptr());
            }
            *panel = later;
        }
    }

    /// What a tile of `steps` steps asks for.
    fn next(&self, steps: usize) -> Next {
        let rounds = (steps / UNROLLED).max(1);
        Next { panels: self.panels.map(<[u8]>::as_ptr), step: self.step.div_ceil(rounds) }
    }
}

/// Where the tiles of a phase find the operand rows of a chunk.
struct Reach {
    phase: Option<usize>,
    /// Bytes from a tile's base to the row that its row 0 meets at the chunk's first tap.
    first: usize,
    /// Bytes from there to the row it meets at each tap.
    taps: [usize; MAX_TAPS],
    /// The greatest of them.
    last: usize,
}

impl Plan<'_> {
    #[inline(always)]
    pub(crate) fn strip<S: Simd>(&self, s: S, strip: &mut Strip<'_>) {
        let &mut Strip { columns, chunk, tiles, finishes, .. } = strip;
        let call = &self.call;
        let element = call.kernel.types.row_bytes();
        let widens = self.widened.is_some();
        let row_bytes = if widens { chunk.len } else { call.weight.shape.k_padded() } * element;
        let a_stride = if widens { row_bytes } else { row_bytes * self.geometry.operand_step };
        // The slack of rows and panels is zero, so only the steps that hold inputs are taken.
        let k = (call.weight.shape.k - chunk.k).min(chunk.len).next_multiple_of(call.kernel.kr);
        let mut reach = Reach { phase: None, first: 0, taps: [0; MAX_TAPS], last: 0 };
        let mut terms = Terms::new(columns);
        let mut row = 0;
        let mut places = self.places();
        let mut next =
            if call.kernel.fetches { strip.ahead.next(chunk.taps * k / call.kernel.kr) } else { Next::NONE };
        for tile in tiles {
            if !call.kernel.fetches {
                strip.ahead.prefetch();
            }
            let mut claim = if finishes && !call.past {
                call.target(columns, tile).claim(tile.rows)
            } else {
                Claim::NONE
            };
            if !call.kernel.claims {
                claim.ask();
                claim = Claim::NONE;
            }
            let widened = places.place(tile).0 + chunk.shift;
            let at = if widens {
                widened * row_bytes
            } else {
                self.reach(&mut reach, tile, chunk, row_bytes);
                tile.base * row_bytes + reach.first + chunk.k * element
            };
            let rows = &strip.rows[at..];
            assert!(
                k <= chunk.len && rows.len() >= reach.last + (tile.rows - 1) * a_stride + k * element,
                "{tile:?} {chunk:?}"
            );
            let kept = if self.keeps { row } else { 0 };
            let products = &mut strip.products[kept..kept + tile.rows];
            let args = TileArgs {
                a: rows.as_ptr(),
                tap_at: reach.taps.as_ptr(),
                taps: chunk.taps,
                a_stride,
                rows: tile.rows,
                b: strip.blocks.bytes.as_ptr(),
                b_stride: strip.blocks.stride,
                b_tap: strip.blocks.tap,
                panels: columns.panels,
                k,
                c: products.as_mut_ptr().cast(),
                accumulate: !chunk.first,
                claim,
                next,
            };
            self.multiply(args, products, &strip.blocks);
            next.panels = next.panels.map(|panel| panel.wrapping_add(strip.ahead.step));
            // At once: the loads would wait for the stores of a tile multiplied meanwhile, a multiple of 4 KiB away.
            let mut sums = None;
            if chunk.last && self.by_tap {
                let (scale, scale_step) = self.row_scale(tile, chunk.tap);
                let offset = &columns.offset;
                let tap = AddTap { products, offset, scale, scale_step, first: chunk.tap == 0 };
                let added = &mut strip.sums[row..row + tile.rows];
                add_tap(s, &tap, added);
                sums = Some(&*added);
            }
            if call.rounds {
                let first = chunk.tap == 0 && chunk.k == 0;
                let row_scale = &strip.row_scale[widened..widened + tile.rows];
                let chunk = AddChunk { products, row: row_scale, column: &strip.blocks.scale, first };
                let added = &mut strip.sums[row..row + tile.rows];
                add_chunk(s, &chunk, added);
                sums = Some(&*added);
            }
            if finishes {
                call.update(columns, tile.image, &mut terms);
                let sums = match sums {
                    Some(sums) => Sums::Float(sums),
                    None if call.kernel.types.is_integer() => {
                        let (scale, scale_step) = self.row_scale(tile, 0);
                        Sums::Integer { sums: products, offset: &terms.offset, scale, scale_step }
                    }
                    None => Sums::Float(bytemuck::cast_slice(products)),
                };
                let held = match strip.holds {
                    None => Held::No,
                    Some(Half::First) => Held::First(&mut strip.held[row..row + tile.rows]),
                    Some(Half::Second) => Held::Second(&strip.held[row..row + tile.rows]),
                };
                let mut finishing = call.finishing(columns, tile, &terms, sums, held);
                finish(s, &mut finishing);
            }
            row += tile.rows;
        }
    }

    /// Finds the taps of `tile` in `chunk`.
    #[inline(always)]
    fn reach(&self, reach: &mut Reach, tile: &RowTile, chunk: &Chunk, row_bytes: usize) {
        if reach.phase != Some(tile.phase) {
            reach.first = self.geometry.offset(tile.phase, chunk.tap) * row_bytes;
            reach.last = 0;
            for (tap, at) in reach.taps[..chunk.taps].iter_mut().enumerate() {
                *at = self.geometry.offset(tile.phase, chunk.tap + tap) * row_bytes - reach.first;
                reach.last = reach.last.max(*at);
            }
            reach.phase = Some(tile.phase);
        }
    }

    /// The products of a tile, by the kernel: as many panels of `args` at a time as it takes, from `blocks` to `products`.
    #[inline(always)]
    fn multiply(&self, args: TileArgs, products: &mut [[i32; TILE_COLUMNS]], blocks: &Blocks<'_>) {
        let kernel = self.call.kernel;
        assert!(args.rows == products.len() && args.rows <= kernel.mr);
        if args.k == 0 {
            products.fill([0; TILE_COLUMNS]);
            return;
        }
        let at_once = kernel.nr / TILE_N;
        let mut p = 0;
        while p < args.panels {
            let args = TileArgs {
                b: blocks.bytes[p * blocks.stride..].as_ptr(),
                panels: at_once.min(args.panels - p),
                next: Next { panels: [args.next.panels[p], args.next.panels[PAIR - 1]], ..args.next },
                c: products.as_mut_ptr().cast::<u8>().wrapping_add(p * TILE_N * 4),
                ..args
            };
            // SAFETY: the kernel was picked for this machine; each tap's a reaches rows * k elements (`strip` asserts it), b
            // holds the blocks of chunk.len >= k inputs of each tap and panel, c is `products`, borrowed here alone.
            unsafe { (kernel.tile)(&args) };
            p += at_once;
        }
    }

    /// The scale of the operand row that row 0 of `tile` meets at `tap`, and from there to the next row's.
    #[inline(always)]
    fn row_scale(&self, tile: &RowTile, tap: usize) -> (&[f32], usize) {
        match self.call.operand {
            Operand::U8 { scale, .. } => {
                (&scale[tile.base + self.geometry.offset(tile.phase, tap)..], self.geometry.operand_step)
            }
            Operand::U8Uniform { images, .. } => (std::slice::from_ref(&images[tile.image].scale), 0),
            Operand::Bf16(_) | Operand::F32(_) => (&[1.0], 0),
        }
    }
}
