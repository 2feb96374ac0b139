//! What stands around the tiles: operands as the kernel reads them ([`unpack`](super::unpack)), adding up taps, finishing. Written
//! once in plain Rust whose loops of 16 become vectors; [`steps!`] compiles it for a tier.

use super::Activation;
pub(crate) use super::call::Call;
pub(crate) use super::driver::Plan;
pub(crate) use super::strip::Strip;
use super::tile::{Claim, TILE_COLUMNS};
pub(crate) use super::unpack::{Unpack, Widen, unpack, widen};
pub(crate) use super::winograd::Pass;
pub(crate) use super::winograd::transform::{Filters, Patch, Patches, Taps, transform_patch, transform_taps};
use crate::bf16;
use crate::layout::TILE_N;
use crate::par::Shared;
use crate::simd::{Element, Simd};
use crate::view::Rows;

/// The tier's versions of the functions below. Each is unsafe to call where the machine lacks the tier.
#[derive(Debug)]
pub(crate) struct Steps {
    pub(crate) widen: unsafe fn(&Widen<'_>, &mut [u8]) -> f32,
    pub(crate) unpack: unsafe fn(&Unpack<'_>, &mut [u8]) -> [f32; TILE_N],
    pub(crate) strip: unsafe fn(&Plan<'_>, &mut Strip<'_>),
    pub(crate) patch: unsafe fn(&Patch<'_>, usize, &mut Patches<'_>),
    pub(crate) taps: unsafe fn(&Taps<'_>, &mut Filters<'_>),
    pub(crate) pass: unsafe fn(&Call<'_>, &mut Pass<'_>),
}

/// Compiles the steps for a tier: `steps!(#[target_feature(...)] NAME, token)`, where `token` is the tier's
/// [`Simd`], made where the tier's features are.
macro_rules! steps {
    ($(#[$attribute:meta])* $static_name:ident, $token:expr) => {
        pub(crate) static $static_name: $crate::gemm::steps::Steps = {
            use $crate::gemm::steps::*;
            $(#[$attribute])*
            fn widen_rows(args: &Widen<'_>, out: &mut [u8]) -> f32 {
                widen($token, args, out)
            }
            $(#[$attribute])*
            fn unpack_tiles(args: &Unpack<'_>, out: &mut [u8]) -> [f32; $crate::layout::TILE_N] {
                unpack($token, args, out)
            }
            $(#[$attribute])*
            fn run_strip(plan: &Plan<'_>, args: &mut Strip<'_>) {
                plan.strip($token, args)
            }
            $(#[$attribute])*
            fn run_patch(patch: &Patch<'_>, i: usize, out: &mut Patches<'_>) {
                transform_patch($token, patch, i, out)
            }
            $(#[$attribute])*
            fn run_taps(args: &Taps<'_>, out: &mut Filters<'_>) {
                transform_taps($token, args, out)
            }
            $(#[$attribute])*
            fn run_pass(call: &Call<'_>, args: &mut Pass<'_>) {
                call.pass($token, args)
            }
            Steps {
                widen: widen_rows,
                unpack: unpack_tiles,
                strip: run_strip,
                patch: run_patch,
                taps: run_taps,
                pass: run_pass,
            }
        };
    };
}
pub(crate) use steps;

/// One tap of a convolution whose pixels have scales of their own.
#[derive(Debug)]
pub(crate) struct AddTap<'a> {
    /// `[rows]`: products of codes and weights.
    pub(crate) products: &'a [[i32; TILE_COLUMNS]],
    /// 128 times the sum of each output's weights over the tap.
    pub(crate) offset: &'a [i32; TILE_COLUMNS],
    /// Scales of the rows' pixels: of row r at `r * scale_step`.
    pub(crate) scale: &'a [f32],
    /// From row to row.
    pub(crate) scale_step: usize,
    /// Replaces the sums.
    pub(crate) first: bool,
}

/// `sum[r][n] += scale[r] * (products[r][n] - offset[n])`.
#[inline(always)]
pub(crate) fn add_tap<S: Simd>(s: S, args: &AddTap<'_>, sum: &mut [[f32; TILE_COLUMNS]]) {
    for (r, (sum, products)) in sum.iter_mut().zip(args.products).enumerate() {
        let scale = s.splat(args.scale[r * args.scale_step]);
        for n in (0..TILE_COLUMNS).step_by(S::LANES) {
            let x = s.mul(s.difference(&products[n..], &args.offset[n..]), scale);
            let x = if args.first { x } else { s.add(s.load(&sum[n..]), x) };
            s.store(x, &mut sum[n..]);
        }
    }
}

/// A tile's sums over a chunk of rounded inputs.
#[derive(Debug)]
pub(crate) struct AddChunk<'a> {
    /// `[rows]`.
    pub(crate) products: &'a [[i32; TILE_COLUMNS]],
    /// Scales of the rows.
    pub(crate) row: &'a [f32],
    /// Scales of the columns.
    pub(crate) column: &'a [f32; TILE_COLUMNS],
    /// Replaces the sums.
    pub(crate) first: bool,
}

/// `sum[r][n] += products[r][n] * column[n] * row[r]`.
#[inline(always)]
pub(crate) fn add_chunk<S: Simd>(s: S, args: &AddChunk<'_>, sum: &mut [[f32; TILE_COLUMNS]]) {
    let (zeros, column) = ([0; TILE_COLUMNS], columns(s, args.column));
    for (r, (sum, products)) in sum.iter_mut().zip(args.products).enumerate() {
        let row = s.splat(args.row[r]);
        for (v, &column) in column[..TILE_COLUMNS / S::LANES].iter().enumerate() {
            let at = v * S::LANES;
            let x = s.mul(s.difference(&products[at..], &zeros), column);
            let x = if args.first { s.mul(x, row) } else { s.fma(x, row, s.load(&sum[at..])) };
            s.store(x, &mut sum[at..]);
        }
    }
}

/// A tile's sums.
#[derive(Debug)]
pub(crate) enum Sums<'a> {
    /// `(sums - offset) * scale[r * scale_step]`.
    Integer {
        sums: &'a [[i32; TILE_COLUMNS]],
        offset: &'a [i32; TILE_COLUMNS],
        scale: &'a [f32],
        scale_step: usize,
    },
    /// As they are.
    Float(&'a [[f32; TILE_COLUMNS]]),
}

/// Where finished rows go.
#[derive(Debug)]
pub(crate) enum Out<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, bf16>),
}

/// The place of a tile in the output.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    /// `[m, ldo]`.
    pub(crate) out: &'a Out<'a>,
    /// Columns of a row of `out`.
    pub(crate) ldo: usize,
    /// Output row of the tile's row 0.
    pub(crate) row: usize,
    /// From row to row.
    pub(crate) row_step: usize,
    /// First column in `out`.
    pub(crate) column: usize,
    /// Columns to be written.
    pub(crate) columns: usize,
}

impl Target<'_> {
    /// The lines of `rows` rows.
    #[inline(always)]
    pub(crate) fn claim(&self, rows: usize) -> Claim {
        let (row, bytes) = match self.out {
            Out::F32(out) => (out.address(self.at(0)), size_of::<f32>()),
            Out::Bf16(out) => (out.address(self.at(0)), size_of::<bf16>()),
        };
        Claim {
            row,
            stride: self.row_step * self.ldo * bytes,
            last: (self.columns * bytes).saturating_sub(1),
            rows,
        }
    }

    /// First element of row `r`.
    #[inline(always)]
    fn at(&self, r: usize) -> usize {
        (self.row + r * self.row_step) * self.ldo + self.column
    }
}

/// Half rows that wait for their other half: `[rows]`, the first columns of each. A line that goes past the caches must do so at
/// once, and a tile of values and gates makes half of one.
#[derive(Debug)]
pub(crate) enum Held<'a> {
    /// Rows go out as they are.
    No,
    /// Rows wait.
    First(&'a mut [[f32; TILE_COLUMNS]]),
    /// Rows that have waited go out before these.
    Second(&'a [[f32; TILE_COLUMNS]]),
}

/// A tile to be finished.
#[derive(Debug)]
pub(crate) struct Finish<'a> {
    pub(crate) sums: Sums<'a>,
    /// Scale of each column.
    pub(crate) scale: &'a [f32; TILE_COLUMNS],
    /// Added to each column.
    pub(crate) bias: &'a [f32; TILE_COLUMNS],
    pub(crate) activation: Activation,
    pub(crate) residual: Option<Rows<'a>>,
    /// Whether the rows are added to what `out` holds.
    pub(crate) accumulate: bool,
    /// Whether rows go past the caches where they can.
    pub(crate) past: bool,
    pub(crate) held: Held<'a>,
    pub(crate) target: Target<'a>,
}

#[inline(always)]
pub(crate) fn finish<S: Simd>(s: S, args: &mut Finish<'_>) {
    match args.target.out {
        Out::F32(out) => finish_to(s, args, out, false),
        Out::Bf16(out) => finish_to(s, args, out, true),
    }
}

#[inline(always)]
fn finish_to<S: Simd, T: Element>(s: S, args: &mut Finish<'_>, out: &Shared<'_, T>, coarse: bool) {
    let each = |activation| Each { activation, coarse };
    match args.activation {
        Activation::None => finish_rows(s, args, out, Same),
        Activation::Relu => finish_rows(s, args, out, Rectifier),
        Activation::Silu => finish_rows(s, args, out, each(Activation::Silu)),
        Activation::Gelu => finish_rows(s, args, out, each(Activation::Gelu)),
        Activation::GeluTanh => finish_rows(s, args, out, each(Activation::GeluTanh)),
        Activation::QuickGelu => finish_rows(s, args, out, each(Activation::QuickGelu)),
        Activation::Geglu => finish_rows(s, args, out, Gated { coarse }),
    }
}

/// The columns of a row of a tile in vectors, or the first of these places where vectors are long.
type Columns<F> = [F; TILE_COLUMNS / 4];

/// What happens to a row between bias and residual, and behind that. (Closures would not always be inlined, and then not be of
/// the tier.)
trait RowFunction: Copy {
    fn apply<S: Simd>(self, s: S, y: &mut Columns<S::F>);

    #[inline(always)]
    fn last<S: Simd>(self, _: S, _: &mut Columns<S::F>) {}
}

#[derive(Clone, Copy)]
struct Same;

impl RowFunction for Same {
    #[inline(always)]
    fn apply<S: Simd>(self, _: S, _: &mut Columns<S::F>) {}
}

#[derive(Clone, Copy)]
struct Rectifier;

impl RowFunction for Rectifier {
    #[inline(always)]
    fn apply<S: Simd>(self, _: S, _: &mut Columns<S::F>) {}

    #[inline(always)]
    fn last<S: Simd>(self, s: S, y: &mut Columns<S::F>) {
        for y in &mut y[..TILE_COLUMNS / S::LANES] {
            *y = Activation::Relu.apply(s, *y);
        }
    }
}

/// An activation, coarse where the result is rounded to bf16.
#[derive(Clone, Copy)]
struct Each {
    activation: Activation,
    coarse: bool,
}

impl Each {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, y: S::F) -> S::F {
        if self.coarse { self.activation.apply_coarse(s, y) } else { self.activation.apply(s, y) }
    }
}

impl RowFunction for Each {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, y: &mut Columns<S::F>) {
        for y in &mut y[..TILE_COLUMNS / S::LANES] {
            *y = self.of(s, *y);
        }
    }
}

/// Values and their gates.
#[derive(Clone, Copy)]
struct Gated {
    coarse: bool,
}

impl RowFunction for Gated {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, y: &mut Columns<S::F>) {
        let half = TILE_N / S::LANES;
        for i in 0..half {
            let gate = Each { activation: Activation::Gelu, coarse: self.coarse }.of(s, y[half + i]);
            y[i] = s.mul(y[i], gate);
        }
    }
}

#[inline(always)]
fn columns<S: Simd>(s: S, x: &[f32; TILE_COLUMNS]) -> Columns<S::F> {
    let mut vectors: Columns<S::F> = [s.splat(0.0); _];
    for v in 0..TILE_COLUMNS / S::LANES {
        vectors[v] = s.load(&x[v * S::LANES..]);
    }
    vectors
}

#[inline(always)]
fn finish_rows<S: Simd, T: Element>(
    s: S,
    args: &mut Finish<'_>,
    out: &Shared<'_, T>,
    function: impl RowFunction,
) {
    let (scale, bias) = (columns(s, args.scale), columns(s, args.bias));
    match args.sums {
        Sums::Integer { sums, offset, scale: row_scale, scale_step } => {
            for (r, sums) in sums.iter().enumerate() {
                let row_scale = s.splat(row_scale[r * scale_step]);
                let mut y: Columns<S::F> = [s.splat(0.0); _];
                for (v, y) in y.iter_mut().enumerate().take(TILE_COLUMNS / S::LANES) {
                    let at = v * S::LANES;
                    *y = s.mul(s.difference(&sums[at..], &offset[at..]), row_scale);
                }
                finish_row(s, args, out, function, r, y, &scale, &bias);
            }
        }
        Sums::Float(sums) => {
            for (r, sums) in sums.iter().enumerate() {
                finish_row(s, args, out, function, r, columns(s, sums), &scale, &bias);
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn finish_row<S: Simd, T: Element>(
    s: S,
    args: &mut Finish<'_>,
    out: &Shared<'_, T>,
    function: impl RowFunction,
    r: usize,
    mut y: Columns<S::F>,
    scale: &Columns<S::F>,
    bias: &Columns<S::F>,
) {
    for v in 0..TILE_COLUMNS / S::LANES {
        y[v] = s.add(s.mul(y[v], scale[v]), bias[v]);
    }
    function.apply(s, &mut y);
    let mut at = args.target.at(r);
    let mut columns = args.target.columns;
    const HALF: usize = TILE_COLUMNS / 2;
    match &mut args.held {
        Held::No => {}
        Held::First(held) => {
            for v in 0..HALF / S::LANES {
                s.store(y[v], &mut held[r][v * S::LANES..]);
            }
            return;
        }
        Held::Second(held) => {
            for v in 0..HALF / S::LANES {
                y[HALF / S::LANES + v] = y[v];
                y[v] = s.load(&held[r][v * S::LANES..]);
            }
            (at, columns) = (at - HALF, 2 * columns);
        }
    }
    match args.residual {
        Some(Rows::F32(rows)) => add_row(s, &mut y, &rows[at..at + columns]),
        Some(Rows::Bf16(rows)) => add_row(s, &mut y, &rows[at..at + columns]),
        None => {}
    }
    // SAFETY: this task alone finishes these rows and columns, one row at a time.
    let out = unsafe { out.slice(at, columns) };
    if args.accumulate {
        add_row(s, &mut y, out);
    }
    function.last(s, &mut y);
    for v in (0..TILE_COLUMNS / S::LANES).step_by(2) {
        let rest = &mut out[(v * S::LANES).min(columns)..];
        if rest.len() >= 2 * S::LANES {
            T::store_two(s, [y[v], y[v + 1]], &mut rest[..2 * S::LANES], args.past);
        } else {
            for (&y, rest) in y[v..v + 2].iter().zip(rest.chunks_mut(S::LANES)) {
                if rest.len() == S::LANES {
                    T::store(s, y, rest);
                } else {
                    T::store_partial(s, y, rest);
                }
            }
        }
    }
}

#[inline(always)]
fn add_row<S: Simd, T: Element>(s: S, y: &mut Columns<S::F>, x: &[T]) {
    for (v, y) in y.iter_mut().enumerate().take(TILE_COLUMNS / S::LANES) {
        let at = v * S::LANES;
        if at + S::LANES <= x.len() {
            *y = s.add(*y, T::load(s, &x[at..at + S::LANES]));
        } else if at < x.len() {
            *y = s.add(*y, T::load_partial(s, &x[at..]));
        }
    }
}
