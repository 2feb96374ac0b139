//! Pixels, taps and products on their way to and from the points: widened, transformed, rounded, added up.
#![forbid(unsafe_code)]

use super::form::{
    Algorithm, Form, MAX_POINTS, MAX_SIDE, Plain, TAPS, Upsampled, Vector, filters, inputs, outputs,
};
use super::{PLANE, PairWeights};
use crate::gemm::shorts::{MAGNITUDE, scale_of};
use crate::gemm::steps::{Unpack, unpack};
use crate::gemm::table::Types;
use crate::gemm::tile::TILE_COLUMNS;
use crate::gemm::unpack::{lanes, opaque};
use crate::layout::{Encoding, Panel, TILE_K, TILE_N};
use crate::simd::{MAX_LANES, Simd};
use crate::{bf16, f16};

/// The greatest whole number that a transformed float weight becomes.
const FILTER_MOST: usize = 4095;
/// The same of an 8-bit weight: the sum of as many taps as there are.
const CODE_MOST: usize = TAPS * 127;
/// Inputs whose even ones come first, then the odd ones, where weights are codes: so these are widened without moving a lane.
const SPLIT: usize = 32;

/// The form of rounded inputs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounding {
    /// The greatest whole number.
    most: f32,
    /// Whether even ones come first of each [`SPLIT`].
    splits: bool,
}

impl Rounding {
    /// That beside weights of `encoding`.
    pub(super) fn beside(encoding: Encoding) -> Rounding {
        let splits = encoding.is_integer();
        let weight = if splits { CODE_MOST } else { FILTER_MOST };
        Rounding { most: (i32::MAX as usize / (weight * TILE_K)).min(i16::MAX as usize) as f32, splits }
    }
}

/// The inputs of the pixels of a patch, [`TILE_K`] of each, as many as there are points.
#[derive(Debug)]
pub(crate) enum Patch<'a> {
    /// Codes, transformed as they are.
    Codes([&'a [u8]; MAX_POINTS]),
    /// Rounded to whole numbers.
    Rounded([&'a [bf16]; MAX_POINTS], Rounding),
}

/// Where the transformed inputs of patches go.
#[derive(Debug)]
pub(crate) struct Patches<'a> {
    pub(crate) inputs: &'a mut [[[i16; TILE_K]; PLANE]; MAX_POINTS],
    /// What the numbers are to be multiplied with.
    pub(crate) scale: &'a mut [[f32; PLANE]; MAX_POINTS],
    pub(crate) form: Form,
    /// A patch before it is rounded.
    pub(crate) wide: &'a mut [[f32; TILE_K]; MAX_POINTS],
}

/// Transforms a patch, which becomes number `i`.
#[inline(always)]
pub(crate) fn transform_patch<S: Simd>(s: S, patch: &Patch<'_>, i: usize, out: &mut Patches<'_>) {
    match (patch, out.form) {
        (Patch::Codes(pixels), Form::Plain) => transform_pixels::<Plain>(pixels, i, out),
        (Patch::Codes(pixels), Form::Upsampled) => transform_pixels::<Upsampled>(pixels, i, out),
        (Patch::Rounded(pixels, rounding), Form::Plain) => {
            round_pixels::<Plain, S>(s, pixels, *rounding, i, out);
        }
        (Patch::Rounded(pixels, rounding), Form::Upsampled) => {
            round_pixels::<Upsampled, S>(s, pixels, *rounding, i, out);
        }
    }
}

#[inline(always)]
fn transform_pixels<A: Algorithm>(pixels: &[&[u8]; MAX_POINTS], i: usize, out: &mut Patches<'_>) {
    const HALF: usize = SPLIT / 2;
    for at in (0..TILE_K).step_by(SPLIT) {
        let mut even = [[0i16; HALF]; MAX_POINTS];
        let mut odd = [[0i16; HALF]; MAX_POINTS];
        for (p, pixel) in pixels[..A::POINTS].iter().enumerate() {
            let pairs = pixel[at..at + SPLIT].as_chunks::<2>().0;
            let pairs: [u16; HALF] = lanes(|i| u16::from_le_bytes(pairs[i]));
            even[p] = lanes(|i| (pairs[i] & 0xFF) as i16);
            odd[p] = lanes(|i| (pairs[i] >> 8) as i16);
        }
        for (at, d) in [(at, even), (at + HALF, odd)] {
            for (out, d) in out.inputs[..A::POINTS].iter_mut().zip(inputs::<A, _>(d)) {
                out[i][at..at + HALF].copy_from_slice(&d);
            }
        }
    }
}

#[inline(always)]
fn round_pixels<A: Algorithm, S: Simd>(
    s: S,
    pixels: &[&[bf16]; MAX_POINTS],
    rounding: Rounding,
    i: usize,
    out: &mut Patches<'_>,
) {
    let wide = &mut out.wide[..A::POINTS];
    for at in (0..TILE_K).step_by(S::LANES) {
        let mut d = [Floats(s, s.splat(0.0)); MAX_POINTS];
        for (d, pixel) in d.iter_mut().zip(&pixels[..A::POINTS]) {
            d.1 = s.load_bf16(&pixel[at..at + S::LANES]);
        }
        for (wide, d) in wide.iter_mut().zip(inputs::<A, _>(d)) {
            s.store(d.1, &mut wide[at..]);
        }
    }
    for (p, wide) in wide.iter().enumerate() {
        // Magnitudes in the order of their bits, not a number last.
        let mut bits = [0u32; MAX_LANES];
        for x in wide.as_chunks::<MAX_LANES>().0 {
            let x = opaque(x);
            bits = lanes(|i| bits[i].max(x[i].to_bits() & 0x7FFF_FFFF));
        }
        let greatest = f32::from_bits(bits.into_iter().fold(0, u32::max));
        let (scale, factor) = scale_of(greatest, rounding.most);
        out.scale[p][i] = scale;
        let factor = s.splat(factor);
        let out = &mut out.inputs[p][i];
        if rounding.splits {
            for (wide, out) in wide.as_chunks::<SPLIT>().0.iter().zip(out.as_chunks_mut::<SPLIT>().0) {
                let (even, odd) = out.split_at_mut(SPLIT / 2);
                for at in (0..SPLIT / 2).step_by(S::LANES) {
                    let pairs = [0, S::LANES].map(|i| s.mul(s.load(&wide[2 * at + i..]), factor));
                    let [a, b] = s.unzip(pairs[0], pairs[1]);
                    s.store_i16(a, &mut even[at..at + S::LANES]);
                    s.store_i16(b, &mut odd[at..at + S::LANES]);
                }
            }
        } else {
            for at in (0..TILE_K).step_by(S::LANES) {
                s.store_i16(s.mul(s.load(&wide[at..]), factor), &mut out[at..at + S::LANES]);
            }
        }
    }
}

/// A tile of a panel for each of the 9 taps.
#[derive(Debug)]
pub(crate) struct Taps<'a> {
    pub(crate) panel: Panel<'a>,
    pub(crate) encoding: Encoding,
    pub(crate) tiles: [usize; TAPS],
}

/// Where the transformed taps of a panel go.
#[derive(Debug)]
pub(crate) struct Filters<'a> {
    /// Those of a panel and point are a tile `[TILE_K / 2][TILE_N][2]`.
    pub(crate) weights: &'a mut [PairWeights; MAX_POINTS],
    /// Which panel of the pair it is.
    pub(crate) panel: usize,
    /// What the sums of each output are to be multiplied with at each point, beside the scale of its panel.
    pub(crate) scale: [[f32; TILE_N]; MAX_POINTS],
    pub(crate) form: Form,
}

/// Numbers of a tile.
pub(super) const TILE: usize = TILE_N * TILE_K;

#[inline(always)]
pub(crate) fn transform_taps<S: Simd>(s: S, args: &Taps<'_>, out: &mut Filters<'_>) {
    match out.form {
        Form::Plain => transform_taps_to::<Plain, S>(s, args, out),
        Form::Upsampled => transform_taps_to::<Upsampled, S>(s, args, out),
    }
}

#[inline(always)]
fn transform_taps_to<A: Algorithm, S: Simd>(s: S, args: &Taps<'_>, out: &mut Filters<'_>) {
    let Taps { panel, encoding, .. } = *args;
    let mut tiles: [&[u8]; TAPS] = [&[]; _];
    match encoding {
        Encoding::Q8 => {
            for (to, tile) in tiles.iter_mut().zip(args.tiles) {
                *to = &panel.tiles[tile * TILE..][..TILE];
            }
            transform_bytes::<A>(&tiles, out);
        }
        Encoding::Q4 => {
            let mut codes = [[0u8; TILE]; TAPS];
            for ((codes, tile), to) in codes.iter_mut().zip(args.tiles).zip(&mut tiles) {
                unpack(s, &Unpack { panel, encoding, types: Types::U8S8, firsts: &[tile], tiles: 1 }, codes);
                *to = codes;
            }
            transform_bytes::<A>(&tiles, out);
        }
        Encoding::F16 => round_taps::<A, S, f16>(s, args, out, f16::to_f32, Simd::load_f16),
        Encoding::Bf16 => round_taps::<A, S, bf16>(s, args, out, bf16::to_f32, Simd::load_bf16),
        Encoding::F32 => unreachable!("f32 weights are not rounded"),
    }
}

/// Tiles `[TILE_K / 4][TILE_N][4]` of int8. Two inputs of an output lie side by side in each 16-bit lane: even ones in the low halves,
/// odd ones in the high ones.
#[inline(always)]
fn transform_bytes<A: Algorithm>(tiles: &[&[u8]; TAPS], out: &mut Filters<'_>) {
    /// Numbers at a time.
    const STEP: usize = 16;
    const BLOCK: usize = 2 * TILE_N;
    /// Numbers from the even inputs of a split to the odd ones.
    const ODD: usize = SPLIT / 4 * BLOCK;
    let tiles = tiles.map(|tile| tile.as_chunks::<{ 2 * STEP }>().0);
    out.scale = [[1.0 / (1 << A::SHIFT) as f32; TILE_N]; MAX_POINTS];
    let panel = out.panel;
    for i in 0..TILE / 2 / STEP {
        let mut even = [[0i16; STEP]; TAPS];
        let mut odd = [[0i16; STEP]; TAPS];
        for (tap, tile) in tiles.iter().enumerate() {
            let pairs = tile[i].as_chunks::<2>().0;
            let pairs: [i16; STEP] = lanes(|i| i16::from_le_bytes(pairs[i]));
            even[tap] = lanes(|i| pairs[i] << 8 >> 8);
            odd[tap] = lanes(|i| pairs[i] >> 8);
        }
        let at = i * STEP;
        let at = at / ODD * 2 * ODD + at % ODD;
        for (at, g) in [(at, even), (at + ODD, odd)] {
            for (out, g) in out.weights[..A::POINTS].iter_mut().zip(filters::<A, _>(g)) {
                out[panel].0[at..at + STEP].copy_from_slice(&g);
            }
        }
    }
}

#[inline(always)]
fn round_taps<A: Algorithm, S: Simd, T: bytemuck::Pod + Default>(
    s: S,
    args: &Taps<'_>,
    out: &mut Filters<'_>,
    widen: impl Fn(T) -> f32,
    load: impl Fn(S, &[T]) -> S::F,
) {
    const PAIRS: usize = 2 * TILE_N;
    let panel = out.panel;
    let tile_bytes = args.encoding.tile_bytes();
    let mut taps: [&[T]; TAPS] = [&[]; _];
    let mut bits = [0u16; PAIRS];
    for (tap, tile) in taps.iter_mut().zip(args.tiles) {
        let bytes = &args.panel.tiles[tile * tile_bytes..][..tile_bytes];
        *tap = bytemuck::cast_slice(bytes);
        for pairs in bytemuck::cast_slice::<u8, u16>(bytes).as_chunks::<PAIRS>().0 {
            let pairs = opaque(pairs);
            bits = lanes(|i| bits[i].max(pairs[i] & MAGNITUDE));
        }
    }
    let mut factors = [[0.0; PAIRS]; MAX_POINTS];
    for n in 0..TILE_N {
        let greatest = widen(bytemuck::cast(bits[2 * n].max(bits[2 * n + 1])));
        let (scale, factor) = scale_of(greatest, FILTER_MOST as f32);
        for (p, factors) in factors[..A::POINTS].iter_mut().enumerate() {
            let most = (A::MOST[p / A::SIDE] * A::MOST[p % A::SIDE]) as f32;
            out.scale[p][n] = scale * most / (1 << A::SHIFT) as f32;
            factors[2 * n..][..2].fill(factor / most);
        }
    }
    const { assert!(PAIRS.is_multiple_of(MAX_LANES)) };
    for at in (0..TILE).step_by(S::LANES) {
        let lane = at % PAIRS;
        let mut g = [Floats(s, s.splat(0.0)); TAPS];
        for (g, tap) in g.iter_mut().zip(&taps) {
            g.1 = load(s, &tap[at..at + S::LANES]);
        }
        let points = out.weights[..A::POINTS].iter_mut().zip(filters::<A, _>(g));
        for ((out, g), factors) in points.zip(&factors) {
            s.store_i16(s.mul(g.1, s.load(&factors[lane..])), &mut out[panel].0[at..at + S::LANES]);
        }
    }
}

/// Sums of products of a pair of panels.
#[derive(Debug)]
pub(crate) struct Products<'a> {
    pub(crate) products: &'a [[[i32; TILE_COLUMNS]; PLANE]; MAX_POINTS],
    /// Scales of the patches.
    pub(crate) patch: &'a [[f32; PLANE]; MAX_POINTS],
    /// Scales of the columns.
    pub(crate) column: &'a [[f32; TILE_COLUMNS]; MAX_POINTS],
    /// Replaces the sums.
    pub(crate) first: bool,
}

/// Adds the 2 x 2 outputs of patch `i` to `sums[y][x]`, whole numbers.
#[inline(always)]
pub(super) fn add_integers<A: Algorithm>(
    args: &Products<'_>,
    i: usize,
    sums: [&mut [[i32; TILE_COLUMNS]]; 2],
) {
    let mut rows = [[[0i32; TILE_COLUMNS]; MAX_SIDE]; 2];
    let [upper, lower] = &mut rows;
    for x in 0..A::SIDE {
        let mut m = [&args.products[x][i]; MAX_SIDE];
        for (m, products) in m.iter_mut().zip(args.products[x..].iter().step_by(A::SIDE)) {
            *m = &products[i];
        }
        for n in 0..TILE_COLUMNS {
            [upper[x][n], lower[x][n]] = A::output([m[0][n], m[1][n], m[2][n], m[3][n]]);
        }
    }
    for ([m0, m1, m2, m3], sums) in rows.iter().zip(sums) {
        let [left, right] = sums.first_chunk_mut().expect("two outputs of a line");
        for n in 0..TILE_COLUMNS {
            let [x, y] = A::output([m0[n], m1[n], m2[n], m3[n]]);
            let [x, y] = [x >> A::SHIFT, y >> A::SHIFT];
            left[n] = if args.first { x } else { left[n].wrapping_add(x) };
            right[n] = if args.first { y } else { right[n].wrapping_add(y) };
        }
    }
}

/// The same of rounded inputs.
#[inline(always)]
pub(super) fn add_floats<A: Algorithm, S: Simd>(
    s: S,
    args: &Products<'_>,
    i: usize,
    sums: [&mut [[f32; TILE_COLUMNS]]; 2],
) {
    let (zeros, [upper, lower]) = ([0; TILE_COLUMNS], sums);
    for n in (0..TILE_COLUMNS).step_by(S::LANES) {
        let mut m = [Floats(s, s.splat(0.0)); MAX_POINTS];
        for (p, m) in m[..A::POINTS].iter_mut().enumerate() {
            let x = s.mul(s.difference(&args.products[p][i][n..], &zeros), s.load(&args.column[p][n..]));
            m.1 = s.mul(x, s.splat(args.patch[p][i]));
        }
        for (sums, row) in [&mut *upper, &mut *lower].into_iter().zip(outputs::<A, _>(m)) {
            for (sum, y) in sums.iter_mut().zip(row) {
                let sum = &mut sum[n..];
                s.store(if args.first { y.1 } else { s.add(s.load(sum), y.1) }, sum);
            }
        }
    }
}

/// Floats of a tier.
#[derive(Clone, Copy)]
struct Floats<S: Simd>(S, S::F);

impl<S: Simd> Vector for Floats<S> {
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        Floats(self.0, self.0.add(self.1, other.1))
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        Floats(self.0, self.0.sub(self.1, other.1))
    }
}
