//! 3 x 3 convolutions of stride 1 by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, "Fast algorithms for convolutional neural
//! networks", 2016): 2 x 2 outputs of a patch of 4 x 4 pixels take 16 products of transformed inputs and weights instead of 36,
//!
//! ```text
//! y = A^T [(G g G^T) * (B^T d B)] A
//! ```
//!
//! each of the 16 **points** a product of matrices, whose inner sides are the inputs.
//!
//! Where the image is read as if each pixel were 2 x 2, lines 1 and 2 of each patch are one line, and so are columns: 7 of the 16
//! points vanish with their differences, and 9 products are left of 36.
//!
//! Of 8-bit codes all of it is whole numbers, 4 times as large, of no more than 16 bits before the products, so the sums are those
//! of the taps. bf16 rows and float weights are transformed in f32 and become whole numbers as in `gemm/shorts.rs`.

mod form;
pub(crate) mod transform;

use std::ops::Range;

use self::form::{Algorithm, Form, MAX_POINTS, Plain, Upsampled};
use self::transform::{Filters, Patch, Patches, Products, Rounding, TILE, Taps, add_floats, add_integers};
use super::call::{Call, Terms};
use super::columns::Columns;
use super::driver::{PAIR, group_pairs};
use super::geometry::RowTile;
use super::steps::{Held, Sums, finish};
use super::table::Types;
use super::tile::{Claim, Next, TILE_COLUMNS, TileArgs};
use super::{Activation, Filter, GemmKernel};
use crate::Workers;
use crate::arch::fence;
use crate::layout::{TILE_K, TILE_N, WeightShape};
use crate::par::SCRATCH_BYTES;
use crate::simd::Simd;
use crate::view::{ImageShape, Operand};

/// Most patches of a block.
const PATCHES: usize = 64;
/// Lines from point to point of what there is of each patch: one more, or the lines of a patch would fall into one set of L1.
const PLANE: usize = PATCHES + 1;
/// Most panel pairs whose sums a task keeps while chunks of inputs go by.
const TOGETHER: usize = 5;
/// Fewest inputs that are worth it.
const LEAST_INPUTS: usize = TILE_K / 2 + 1;
/// Fewest outputs.
const LEAST_OUTPUTS: usize = TILE_N + 1;

/// The weights of a panel at a point, and a line more, for the same reason.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct PanelWeights([i16; TILE], [i16; 32]);

/// Of a pair.
type PairWeights = [PanelWeights; PAIR];

/// Whether `kernel` takes a call so. Neither batch nor height matter, which differ between bands of one picture.
pub(super) fn suits(
    kernel: &GemmKernel,
    operand: &Operand<'_>,
    filter: &Filter,
    shape: WeightShape,
    activation: Activation,
) -> bool {
    kernel.types == Types::S16S16
        && matches!(filter, Filter { kh: 3, kw: 3, stride: 1, .. })
        && matches!(operand, Operand::U8Uniform { .. } | Operand::Bf16(_))
        && activation != Activation::Geglu
        && shape.k >= LEAST_INPUTS
        && shape.n >= LEAST_OUTPUTS
}

/// Patches side by side.
#[derive(Clone, Copy, Debug)]
struct Line {
    image: usize,
    /// Output row of the upper outputs, counted in those that the operand yields; it may be -1 where only the lower ones are
    /// wanted.
    y: isize,
    /// First output column.
    x: usize,
    /// Patches.
    count: usize,
}

/// The patches of a call.
struct Layout {
    input: ImageShape,
    form: Form,
    /// Output rows that are wanted.
    rows: Range<usize>,
    w: usize,
    lines: Vec<Line>,
}

impl Layout {
    fn new(input: ImageShape, form: Form, w: usize, rows: Range<usize>, line: usize) -> Layout {
        let mut lines = vec![];
        let pieces = w.div_ceil(2).div_ceil(PATCHES);
        for image in 0..input.batch {
            let first = rows.start as isize - (line % 2) as isize;
            for y in (first..rows.end as isize).step_by(2) {
                for i in 0..pieces {
                    let cut = |i: usize| w.div_ceil(2) * i / pieces;
                    lines.push(Line { image, y, x: 2 * cut(i), count: cut(i + 1) - cut(i) });
                }
            }
        }
        Layout { input, form, rows, w, lines }
    }

    fn blocks(&self) -> Vec<Range<usize>> {
        let mut blocks: Vec<Range<usize>> = vec![];
        let mut filled = PATCHES;
        for (i, line) in self.lines.iter().enumerate() {
            filled += line.count;
            match blocks.last_mut() {
                Some(block) if filled <= PATCHES => block.end = i + 1,
                _ => {
                    blocks.push(i..i + 1);
                    filled = line.count;
                }
            }
        }
        blocks
    }

    /// The operand rows of patch `i` of `line`. Where outputs aren't wanted a patch may reach beyond the image: any pixel will do.
    fn pixels(&self, line: &Line, i: usize) -> [usize; MAX_POINTS] {
        let (full_h, full_w) = (self.input.full_h(), self.input.full_w());
        let (side, x) = (self.form.side(), (line.x + 2 * i) as isize);
        let (top, left) = match self.form {
            Form::Plain => (line.y, x),
            Form::Upsampled => (line.y / 2, x / 2),
        };
        let inside = |at: isize, end: usize| at.clamp(0, end as isize - 1) as usize;
        std::array::from_fn(|p| {
            let y = inside(top + (p / side) as isize, full_h);
            (line.image * full_h + y) * full_w + inside(left + (p % side) as isize, full_w)
        })
    }

    /// The first output row of the call and how many follow it, of `line`'s upper (0) or lower (1) outputs.
    fn outputs(&self, line: &Line, lower: usize) -> Option<(usize, usize)> {
        let y = usize::try_from(line.y + lower as isize).ok().filter(|y| self.rows.contains(y))?;
        let row = (line.image * self.rows.len() + y - self.rows.start) * self.w + line.x;
        Some((row, (2 * line.count).min(self.w - line.x)))
    }
}

/// A worker's scratch memory.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Buffers {
    inputs: [[[i16; TILE_K]; PLANE]; MAX_POINTS],
    input_scale: [[f32; PLANE]; MAX_POINTS],
    wide: [[f32; TILE_K]; MAX_POINTS],
    weights: [PairWeights; MAX_POINTS],
    products: [[[i32; TILE_COLUMNS]; PLANE]; MAX_POINTS],
    /// Of each panel pair upper outputs, then lower ones; i32 or f32.
    sums: [[[i32; TILE_COLUMNS]; 4 * PATCHES]; TOGETHER],
}

impl Buffers {
    fn of(scratch: &mut [u8]) -> &mut Buffers {
        const { assert!(size_of::<Buffers>() <= SCRATCH_BYTES) };
        bytemuck::from_bytes_mut(&mut scratch[..size_of::<Buffers>()])
    }
}

/// One pair of panels, a tile of inputs and the patches of a block.
pub(crate) struct Pass<'s> {
    layout: &'s Layout,
    lines: &'s [Line],
    columns: &'s Columns,
    patches: &'s Patches<'s>,
    weights: &'s [PairWeights; MAX_POINTS],
    /// What the sums of each column are to be multiplied with at each point, beside the scale of its panel.
    column_scale: &'s [[f32; TILE_COLUMNS]; MAX_POINTS],
    /// At each point, of each patch.
    products: &'s mut [[[i32; TILE_COLUMNS]; PLANE]; MAX_POINTS],
    /// Upper outputs, then lower ones; i32 or f32.
    sums: &'s mut [[i32; TILE_COLUMNS]; 4 * PATCHES],
    /// No tile came before.
    first: bool,
    /// None comes after.
    finishes: bool,
}

/// Runs a call, of rows `rows` of the output, the first of which is row `line` of its image: which rows share a patch is part of the
/// result.
pub(super) fn run(
    workers: &Workers,
    call: &Call<'_>,
    input: ImageShape,
    filter: &Filter,
    rows: Option<Range<usize>>,
    line: usize,
) {
    let (h, w) = filter.output(&input);
    let form = if filter.upsample { Form::Upsampled } else { Form::Plain };
    let rows = rows.unwrap_or(0..h);
    // Of an upsampled image the operand tells which rows are of one pixel.
    let line = if filter.upsample { rows.start } else { line };
    let layout = Layout::new(input, form, w, rows, line);
    let blocks = layout.blocks();
    let pairs = call.weight.shape.panels().div_ceil(PAIR);
    let group = group_pairs(blocks.len(), pairs, 1);
    let groups = pairs.div_ceil(group);
    workers.for_each(blocks.len() * groups, |task, scratch| {
        let lines = &layout.lines[blocks[task / groups].clone()];
        let buffers = Buffers::of(scratch);
        let all = task % groups * group..pairs.min((task % groups + 1) * group);
        let parts = all.len().div_ceil(TOGETHER);
        for i in 0..parts {
            let cut = |i: usize| all.start + all.len() * i / parts;
            call.run_patches(buffers, &layout, lines, cut(i)..cut(i + 1));
        }
        if call.past {
            fence();
        }
    });
}

impl Call<'_> {
    /// The patches of `lines`, columns of panel pairs `pairs`, at most [`TOGETHER`].
    fn run_patches(&self, buffers: &mut Buffers, layout: &Layout, lines: &[Line], pairs: Range<usize>) {
        assert!(pairs.len() <= TOGETHER, "{} pairs of panels together", pairs.len());
        let shape = self.weight.shape;
        let tiles = shape.k_padded() / TILE_K;
        let rounding = Rounding::beside(self.weight.encoding);
        let Buffers { inputs, input_scale: scale, wide, weights, products, sums } = buffers;
        let form = layout.form;
        let mut patches = Patches { inputs, scale, form, wide };
        for tile in 0..tiles {
            let piece = |row: usize| {
                row * shape.k_padded() + tile * TILE_K..row * shape.k_padded() + (tile + 1) * TILE_K
            };
            let mut at = 0;
            for line in lines {
                for i in 0..line.count {
                    let pixels = layout.pixels(line, i);
                    let patch = match self.operand {
                        Operand::U8Uniform { codes, .. } => {
                            Patch::Codes(pixels.map(|row| &codes[piece(row)]))
                        }
                        Operand::Bf16(rows) => Patch::Rounded(pixels.map(|row| &rows[piece(row)]), rounding),
                        Operand::U8 { .. } | Operand::F32(_) => unreachable!("such rows don't suit"),
                    };
                    // SAFETY: the kernel was picked for this machine, and so are its steps.
                    unsafe { (self.steps.patch)(&patch, at, &mut patches) };
                    at += 1;
                }
            }
            for (sums, pair) in sums.iter_mut().zip(pairs.clone()) {
                let columns = Columns::new(self, pair, 0..shape.taps);
                let mut column_scale = [[0.0; TILE_COLUMNS]; MAX_POINTS];
                for p in 0..columns.panels {
                    let mut filters =
                        Filters { weights: &mut *weights, panel: p, scale: [[0.0; _]; _], form };
                    let taps = Taps {
                        panel: self.weight.panel(pair * PAIR + p),
                        encoding: self.weight.encoding,
                        tiles: std::array::from_fn(|tap| tap * tiles + tile),
                    };
                    // SAFETY: as above.
                    unsafe { (self.steps.taps)(&taps, &mut filters) };
                    for (to, scale) in column_scale.iter_mut().zip(filters.scale) {
                        to[p * TILE_N..][..TILE_N].copy_from_slice(&scale);
                    }
                }
                let mut pass = Pass {
                    layout,
                    lines,
                    columns: &columns,
                    patches: &patches,
                    weights,
                    column_scale: &column_scale,
                    products,
                    sums,
                    first: tile == 0,
                    finishes: tile + 1 == tiles,
                };
                // SAFETY: as above.
                unsafe { (self.steps.pass)(self, &mut pass) };
            }
        }
    }

    /// The products of all points, and what comes from them. [`steps!`](super::steps::steps) compiles it for a tier.
    #[inline(always)]
    pub(crate) fn pass<S: Simd>(&self, s: S, pass: &mut Pass<'_>) {
        let columns = pass.columns;
        let patches: usize = pass.lines.iter().map(|line| line.count).sum();
        let kernel = self.kernel;
        // Tiles of nearly equal size.
        let pieces = patches.div_ceil(kernel.mr);
        let mut ends = [0; PATCHES];
        for (i, end) in ends[..pieces].iter_mut().enumerate() {
            *end = patches * (i + 1) / pieces;
        }
        let at_once = kernel.nr / TILE_N;
        let mut args = TileArgs {
            a: std::ptr::null(),
            tap_at: [0].as_ptr(),
            taps: 1,
            a_stride: size_of::<[i16; TILE_K]>(),
            rows: 0,
            b: std::ptr::null(),
            b_stride: size_of::<PanelWeights>(),
            b_tap: 0,
            panels: 0,
            k: TILE_K,
            c: std::ptr::null_mut(),
            accumulate: false,
            claim: Claim::NONE,
            next: Next::NONE,
        };
        for p in 0..pass.layout.form.points() {
            let mut panel = 0;
            while panel < columns.panels {
                args.panels = at_once.min(columns.panels - panel);
                args.b = pass.weights[p][panel..panel + args.panels].as_ptr().cast();
                let mut first = 0;
                for &end in &ends[..pieces] {
                    let rows = &pass.patches.inputs[p][first..end];
                    let products = &mut pass.products[p][first..end];
                    args.rows = rows.len();
                    args.a = rows.as_ptr().cast();
                    args.c = products.as_mut_ptr().cast::<u8>().wrapping_add(panel * TILE_N * 4);
                    // SAFETY: the kernel was picked for this machine; a is `rows`, rows of TILE_K numbers, b as many panels of
                    // as many, each after room that the stride names, c the columns of these in `products`, borrowed here alone.
                    unsafe { (kernel.tile)(&args) };
                    first = end;
                }
                panel += at_once;
            }
        }
        match pass.layout.form {
            Form::Plain => self.add_patches::<Plain, S>(s, pass),
            Form::Upsampled => self.add_patches::<Upsampled, S>(s, pass),
        }
    }

    /// Adds up what comes from the products, and finishes the sums where these were the last.
    #[inline(always)]
    fn add_patches<A: Algorithm, S: Simd>(&self, s: S, pass: &mut Pass<'_>) {
        let columns = pass.columns;
        let products = Products {
            products: pass.products,
            patch: pass.patches.scale,
            column: pass.column_scale,
            first: pass.first,
        };
        let (upper, lower) = pass.sums.split_at_mut(2 * PATCHES);
        let mut terms = Terms::new(columns);
        let mut at = 0;
        for line in pass.lines {
            for i in at..at + line.count {
                let sums = [&mut upper[2 * i..2 * i + 2], &mut lower[2 * i..2 * i + 2]];
                if self.rounds {
                    add_floats::<A, S>(s, &products, i, sums.map(bytemuck::cast_slice_mut));
                } else {
                    add_integers::<A>(&products, i, sums);
                }
            }
            if pass.finishes {
                self.update(columns, line.image, &mut terms);
                for (side, sums) in [&*upper, &*lower].into_iter().enumerate() {
                    let Some((row, rows)) = pass.layout.outputs(line, side) else { continue };
                    let tile = RowTile { row, rows, image: line.image, base: 0, phase: 0 };
                    let sums = &sums[2 * at..][..rows];
                    let sums = match self.operand {
                        Operand::U8Uniform { images, .. } => Sums::Integer {
                            sums,
                            offset: &terms.offset,
                            scale: std::slice::from_ref(&images[line.image].scale),
                            scale_step: 0,
                        },
                        _ => Sums::Float(bytemuck::cast_slice(sums)),
                    };
                    let mut finishing = self.finishing(columns, &tile, &terms, sums, Held::No);
                    finish(s, &mut finishing);
                }
            }
            at += line.count;
        }
    }
}
