//! What stands around the tiles: widening rows, unpacking weights, adding up taps, finishing. Written once in plain Rust
//! whose loops of 16 become vectors; [`steps!`] compiles it for a tier.

use super::Activation;
use super::geometry::FOLDED_TAPS;
use super::table::Types;
use super::tile::TILE_COLUMNS;
use crate::bf16;
use crate::layout::{Encoding, Panel, Q4_GROUP, TILE_K, TILE_N};
use crate::par::Shared;
use crate::simd::{Element, Simd};
use crate::view::Rows;

/// The tier's versions of the functions below. Each is unsafe to call where the machine lacks the tier.
#[derive(Debug)]
pub(crate) struct Steps {
    pub(crate) widen: unsafe fn(&Widen<'_>, &mut [u8]),
    pub(crate) unpack: unsafe fn(&Unpack<'_>, &mut [u8]),
    pub(crate) add_tap: unsafe fn(&AddTap<'_>, &mut [[f32; TILE_COLUMNS]]),
    pub(crate) finish: unsafe fn(&Finish<'_>),
    pub(crate) claim: unsafe fn(&Target<'_>, usize),
}

/// Compiles the steps for a tier: `steps!(#[target_feature(...)] NAME, token)`, where `token` is the tier's
/// [`Simd`](crate::simd::Simd), made where the tier's features are.
macro_rules! steps {
    ($(#[$attribute:meta])* $static_name:ident, $token:expr) => {
        pub(crate) static $static_name: $crate::gemm::steps::Steps = {
            use $crate::gemm::steps::*;
            $(#[$attribute])*
            fn widen_rows(args: &Widen<'_>, out: &mut [u8]) {
                widen(args, out)
            }
            $(#[$attribute])*
            fn unpack_tiles(args: &Unpack<'_>, out: &mut [u8]) {
                unpack($token, args, out)
            }
            $(#[$attribute])*
            fn add_one_tap(args: &AddTap<'_>, sum: &mut [[f32; $crate::gemm::tile::TILE_COLUMNS]]) {
                add_tap($token, args, sum)
            }
            $(#[$attribute])*
            fn finish_tile(args: &Finish<'_>) {
                finish($token, args)
            }
            $(#[$attribute])*
            fn claim_rows(target: &Target<'_>, rows: usize) {
                claim(target, rows)
            }
            Steps { widen: widen_rows, unpack: unpack_tiles, add_tap: add_one_tap, finish: finish_tile, claim: claim_rows }
        };
    };
}
pub(crate) use steps;

/// A piece of an operand row to be widened.
#[derive(Debug)]
pub(crate) enum Widen<'a> {
    /// To i16; the code stays what it is.
    U8(&'a [u8]),
    /// To f32.
    Bf16(&'a [bf16]),
}

#[inline(always)]
pub(crate) fn widen(args: &Widen<'_>, out: &mut [u8]) {
    match args {
        Widen::U8(row) => {
            for (out, &x) in bytemuck::cast_slice_mut::<u8, i16>(out).iter_mut().zip(*row) {
                *out = i16::from(x);
            }
        }
        Widen::Bf16(row) => {
            for (out, &x) in bytemuck::cast_slice_mut::<u8, f32>(out).iter_mut().zip(*row) {
                *out = from_bf16(x);
            }
        }
    }
}

/// Tiles of a panel to be written as a kernel reads them.
#[derive(Debug)]
pub(crate) struct Unpack<'a> {
    pub(crate) panel: Panel<'a>,
    pub(crate) encoding: Encoding,
    pub(crate) types: Types,
    /// The first tile of each tap, one or the [`folded`](super::geometry::folded) ones, which are added up.
    pub(crate) firsts: &'a [usize],
    /// Tiles.
    pub(crate) tiles: usize,
}

#[inline(always)]
pub(crate) fn unpack<S: Simd>(s: S, args: &Unpack<'_>, out: &mut [u8]) {
    let out_bytes = TILE_N * TILE_K * args.types.weight_bytes();
    for (i, out) in out.chunks_exact_mut(out_bytes).take(args.tiles).enumerate() {
        match (args.types, args.encoding, args.firsts) {
            (Types::Bf16, Encoding::F16, firsts) => round_half(s, args, firsts, i, out, Simd::load_f16),
            (Types::Bf16, Encoding::Bf16, firsts) => round_half(s, args, firsts, i, out, Simd::load_bf16),
            (types, _, &[first]) => unpack_tile(s, args, first + i, types, out),
            (types, ..) => {
                let mut sum = [0.0; TILE_N * TILE_K];
                for &first in args.firsts {
                    let mut wide = [0.0; TILE_N * TILE_K];
                    unpack_tile(s, args, first + i, Types::F32, bytemuck::bytes_of_mut(&mut wide));
                    for (sum, x) in sum.iter_mut().zip(wide) {
                        *sum += x;
                    }
                }
                match types {
                    Types::F32 => out.copy_from_slice(bytemuck::bytes_of(&sum)),
                    Types::Bf16 => pair_rows(&sum, out),
                    types => unreachable!("sums of taps in {types:?}"),
                }
            }
        }
    }
}

/// Tile `tile` as a kernel of types `types` reads it.
#[inline(always)]
fn unpack_tile<S: Simd>(s: S, args: &Unpack<'_>, tile: usize, types: Types, out: &mut [u8]) {
    let codes = args.tile(tile);
    match (args.encoding, types) {
        (Encoding::Q8, Types::U8S8) => out.copy_from_slice(codes),
        (Encoding::Q4, Types::U8S8) => unpack_q4(codes, args.panel.groups(tile), out),
        (Encoding::Q8, types) => spread_q8(codes, types, out),
        (Encoding::Q4, types) => {
            let mut wide = [0; TILE_N * TILE_K];
            unpack_q4(codes, args.panel.groups(tile), &mut wide);
            spread_q8(&wide, types, out);
        }
        (Encoding::F16, Types::F32) => spread_half(s, codes, out, Simd::load_f16),
        (Encoding::Bf16, Types::F32) => spread_half(s, codes, out, Simd::load_bf16),
        (Encoding::F32, Types::F32) => out.copy_from_slice(codes),
        (encoding, types) => unreachable!("{encoding:?} weights in {types:?}"),
    }
}

impl Unpack<'_> {
    #[inline(always)]
    fn tile(&self, tile: usize) -> &[u8] {
        let bytes = self.encoding.tile_bytes();
        &self.panel.tiles[tile * bytes..][..bytes]
    }
}

/// f32 rows `[k][16]` as bf16 `[k/2][16][2]`.
#[inline(always)]
fn pair_rows(rows: &[f32; TILE_N * TILE_K], out: &mut [u8]) {
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    for (rows, out) in rows.as_chunks::<{ 2 * TILE_N }>().0.iter().zip(out.as_chunks_mut::<TILE_N>().0) {
        let rows = opaque(rows);
        *out = lanes(|n| bf16_bits(rows[n]) | bf16_bits(rows[TILE_N + n]) << 16);
    }
}

/// The sum of tiles of 16-bit floats, rounded to bf16. Their order is that of bf16 tiles.
#[inline(always)]
fn round_half<S: Simd, T: bytemuck::Pod>(
    s: S,
    args: &Unpack<'_>,
    firsts: &[usize],
    i: usize,
    out: &mut [u8],
    load: impl Fn(S, &[T]) -> S::F,
) {
    let out: &mut [bf16] = bytemuck::cast_slice_mut(out);
    let (&first, others) = firsts.split_first().expect("a tap at least");
    let codes: &[T] = bytemuck::cast_slice(args.tile(first + i));
    let mut more: [&[T]; FOLDED_TAPS - 1] = [&[]; _];
    for (more, first) in more.iter_mut().zip(others) {
        *more = bytemuck::cast_slice(args.tile(first + i));
    }
    for (at, out) in (0..).step_by(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
        let mut x = load(s, &codes[at..at + S::LANES]);
        for more in &more[..others.len()] {
            x = s.add(x, load(s, &more[at..at + S::LANES]));
        }
        s.store_bf16(x, out);
    }
}

/// A word of each output, from a block of 64 bytes.
#[inline(always)]
fn words(block: &[u8; 4 * TILE_N]) -> [u32; TILE_N] {
    lanes(|n| u32::from_le_bytes([block[4 * n], block[4 * n + 1], block[4 * n + 2], block[4 * n + 3]]))
}

/// A reference that the optimizer knows nothing of. Loops over blocks have one each round, or they would be turned inside
/// out: a vector made of one lane of many blocks.
#[inline(always)]
fn opaque<T>(block: &T) -> &T {
    std::hint::black_box(block)
}

/// `[f(0), f(1), ...]`. The functions of the standard library are not always inlined, and then not of the tier.
#[inline(always)]
fn lanes<T: Copy + Default, const N: usize>(f: impl Fn(usize) -> T) -> [T; N] {
    let mut out = [T::default(); N];
    for (n, out) in out.iter_mut().enumerate() {
        *out = f(n);
    }
    out
}

/// A `Q4` tile to a `Q8` tile. Two weights of one output lie side by side in each 16-bit lane, and a product modulo 2^16
/// holds a product modulo 2^8 of either half.
#[inline(always)]
fn unpack_q4(codes: &[u8], groups: &[u8], out: &mut [u8]) {
    const LANES: usize = 2 * TILE_N;
    const BLOCK: usize = 4 * TILE_N;
    let (groups, _) = groups.as_chunks::<TILE_N>();
    let (out, _) = out.as_chunks_mut::<BLOCK>();
    let (out, _) = out.as_chunks_mut::<2>();
    for (i, (codes, [low, high])) in codes.as_chunks::<BLOCK>().0.iter().zip(out).enumerate() {
        let codes = opaque(codes);
        let group = &groups[i * 8 / Q4_GROUP];
        let scale: [u16; LANES] = lanes(|lane| u16::from(group[lane / 2]));
        let codes: [u16; LANES] = bytemuck::cast(*codes);
        let codes: [u16; LANES] = lanes(|lane| u16::from_le(codes[lane]));
        for (shift, out) in [(0, low), (4, high)] {
            let mut weights = [0u16; LANES];
            for lane in 0..LANES {
                let codes = codes[lane] >> shift & 0x0F0F;
                let even = (codes & 0xFF).wrapping_sub(8).wrapping_mul(scale[lane]);
                let odd = (codes & 0xFF00).wrapping_sub(0x0800).wrapping_mul(scale[lane]);
                weights[lane] = even & 0xFF | odd & 0xFF00;
            }
            for (out, weights) in out.as_chunks_mut::<2>().0.iter_mut().zip(weights) {
                *out = weights.to_le_bytes();
            }
        }
    }
}

/// An int8 tile `[k/4][16][4]` as i16 or bf16 `[k/2][16][2]`, or as f32 `[k][16]`.
#[inline(always)]
fn spread_q8(codes: &[u8], types: Types, out: &mut [u8]) {
    let (codes, _) = codes.as_chunks::<{ 4 * TILE_N }>();
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    let out = out.as_chunks_mut::<TILE_N>().0;
    /// Weight `j` of each output.
    #[inline(always)]
    fn weights(words: &[u32; TILE_N], j: u32) -> [i32; TILE_N] {
        lanes(|n| (words[n] << (24 - 8 * j)) as i32 >> 24)
    }
    #[inline(always)]
    fn pairs(low: [u32; TILE_N], high: [u32; TILE_N]) -> [u32; TILE_N] {
        lanes(|n| low[n] & 0xFFFF | high[n] << 16)
    }
    match types {
        Types::U8S8 => unreachable!("int8 weights are read where they lie"),
        Types::S16S16 => {
            for (codes, [low, high]) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
                let words = words(opaque(codes));
                let w = |j| {
                    let w = weights(&words, j);
                    lanes(|n| w[n] as u32)
                };
                *low = pairs(w(0), w(1));
                *high = pairs(w(2), w(3));
            }
        }
        Types::Bf16 => {
            for (codes, [low, high]) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
                let words = words(opaque(codes));
                // An int8 has no more bits than a bfloat16's significand: the low half of the f32 is zero.
                let w = |j| {
                    let w = weights(&words, j);
                    lanes(|n| (w[n] as f32).to_bits() >> 16)
                };
                *low = pairs(w(0), w(1));
                *high = pairs(w(2), w(3));
            }
        }
        Types::F32 => {
            for (codes, out) in codes.iter().zip(out.as_chunks_mut::<4>().0) {
                let words = words(opaque(codes));
                let w = |j| {
                    let w = weights(&words, j);
                    lanes(|n| (w[n] as f32).to_bits())
                };
                *out = [w(0), w(1), w(2), w(3)];
            }
        }
    }
}

/// A 16-bit float tile `[k/2][16][2]` as f32 `[k][16]`.
#[inline(always)]
fn spread_half<S: Simd, T: bytemuck::Pod>(
    s: S,
    codes: &[u8],
    out: &mut [u8],
    load: impl Fn(S, &[T]) -> S::F,
) {
    let codes: &[T] = bytemuck::cast_slice(codes);
    let out: &mut [f32] = bytemuck::cast_slice_mut(out);
    let pairs = out.as_chunks_mut::<{ 2 * TILE_N }>().0;
    for (codes, out) in codes.chunks_exact(2 * TILE_N).zip(pairs) {
        let mut wide = [0.0; 2 * TILE_N];
        for (codes, wide) in codes.chunks_exact(S::LANES).zip(wide.chunks_exact_mut(S::LANES)) {
            s.store(load(s, codes), wide);
        }
        let wide = opaque(&wide);
        *out = lanes(|i| wide[i % TILE_N * 2 + i / TILE_N]);
    }
}

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
    /// First element of row `r`.
    #[inline(always)]
    fn at(&self, r: usize) -> usize {
        (self.row + r * self.row_step) * self.ldo + self.column
    }
}

/// Asks for the cache lines that a tile of `rows` rows will be written to.
#[inline(always)]
pub(crate) fn claim(target: &Target<'_>, rows: usize) {
    for r in 0..rows {
        match target.out {
            Out::F32(out) => out.claim(target.at(r), target.columns),
            Out::Bf16(out) => out.claim(target.at(r), target.columns),
        }
    }
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
    pub(crate) target: Target<'a>,
}

#[inline(always)]
pub(crate) fn finish<S: Simd>(s: S, args: &Finish<'_>) {
    match args.target.out {
        Out::F32(out) => finish_to(s, args, out, false),
        Out::Bf16(out) => finish_to(s, args, out, true),
    }
}

#[inline(always)]
fn finish_to<S: Simd, T: Element>(s: S, args: &Finish<'_>, out: &Shared<'_, T>, coarse: bool) {
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
    args: &Finish<'_>,
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
    args: &Finish<'_>,
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
    let at = args.target.at(r);
    let columns = args.target.columns;
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
    for (v, &y) in y.iter().enumerate().take(TILE_COLUMNS / S::LANES) {
        let at = v * S::LANES;
        if at + S::LANES <= out.len() {
            T::store(s, y, &mut out[at..at + S::LANES]);
        } else if at < out.len() {
            T::store_partial(s, y, &mut out[at..]);
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

#[inline(always)]
fn from_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Rounds to nearest, ties to even. NaN stays NaN.
#[inline(always)]
fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_agree_with_the_half_crate() {
        for bits in 0..=u16::MAX {
            let x = f32::from_bits(u32::from(bits) << 16 | u32::from(bits.rotate_left(3)));
            let rounded = bf16::from_bits(bf16_bits(x) as u16);
            assert!(rounded == bf16::from_f32(x) || x.is_nan() && rounded.is_nan(), "{x}");
        }
    }
}
