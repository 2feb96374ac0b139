//! The transforms of F(2 x 2, 3 x 3): 4 x 4 pixels, 3 x 3 taps and 16 sums of products, each along both sides of its square.
#![forbid(unsafe_code)]

use super::{PLANE, POINTS, PairWeights};
use crate::gemm::shorts::{MAGNITUDE, scale_of};
use crate::gemm::steps::{Unpack, unpack};
use crate::gemm::table::Types;
use crate::gemm::tile::TILE_COLUMNS;
use crate::gemm::unpack::{lanes, opaque};
use crate::layout::{Encoding, Panel, TILE_K, TILE_N};
use crate::simd::{MAX_LANES, Simd};
use crate::{bf16, f16};

/// Pixels of a side of a patch.
pub(super) const SIDE: usize = 4;
/// Taps of the filter.
const TAPS: usize = 9;
/// The greatest whole number that a transformed float weight becomes.
const FILTER_MOST: usize = 4095;
/// The same of an 8-bit weight: 9 times its own, as the transform here is 4 times the usual one.
const CODE_MOST: usize = 9 * 127;
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

/// The inputs of a patch of 4 x 4 pixels, [`TILE_K`] of each.
#[derive(Debug)]
pub(crate) enum Patch<'a> {
    /// Codes, transformed as they are.
    Codes([&'a [u8]; POINTS]),
    /// Rounded to whole numbers.
    Rounded([&'a [bf16]; POINTS], Rounding),
}

/// Where the transformed inputs of patches go.
#[derive(Debug)]
pub(crate) struct Patches<'a> {
    pub(crate) inputs: &'a mut [[[i16; TILE_K]; PLANE]; POINTS],
    /// What the numbers are to be multiplied with.
    pub(crate) scale: &'a mut [[f32; PLANE]; POINTS],
    /// A patch before it is rounded.
    pub(crate) wide: &'a mut [[f32; TILE_K]; POINTS],
}

/// Transforms a patch, which becomes number `i`.
#[inline(always)]
pub(crate) fn transform_patch<S: Simd>(s: S, patch: &Patch<'_>, i: usize, out: &mut Patches<'_>) {
    match patch {
        Patch::Codes(pixels) => transform_pixels(pixels, i, out),
        Patch::Rounded(pixels, rounding) => round_pixels(s, pixels, *rounding, i, out),
    }
}

#[inline(always)]
fn transform_pixels(pixels: &[&[u8]; POINTS], i: usize, out: &mut Patches<'_>) {
    const HALF: usize = SPLIT / 2;
    for at in (0..TILE_K).step_by(SPLIT) {
        let mut even = [[0i16; HALF]; POINTS];
        let mut odd = [[0i16; HALF]; POINTS];
        for (p, pixel) in pixels.iter().enumerate() {
            let pairs = pixel[at..at + SPLIT].as_chunks::<2>().0;
            let pairs: [u16; HALF] = lanes(|i| u16::from_le_bytes(pairs[i]));
            even[p] = lanes(|i| (pairs[i] & 0xFF) as i16);
            odd[p] = lanes(|i| (pairs[i] >> 8) as i16);
        }
        for (at, d) in [(at, even), (at + HALF, odd)] {
            for (out, d) in out.inputs.iter_mut().zip(inputs(d)) {
                out[i][at..at + HALF].copy_from_slice(&d);
            }
        }
    }
}

#[inline(always)]
fn round_pixels<S: Simd>(
    s: S,
    pixels: &[&[bf16]; POINTS],
    rounding: Rounding,
    i: usize,
    out: &mut Patches<'_>,
) {
    let wide = &mut *out.wide;
    for at in (0..TILE_K).step_by(S::LANES) {
        let mut d = [Floats(s, s.splat(0.0)); POINTS];
        for (d, pixel) in d.iter_mut().zip(pixels) {
            d.1 = s.load_bf16(&pixel[at..at + S::LANES]);
        }
        for (wide, d) in wide.iter_mut().zip(inputs(d)) {
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
    pub(crate) weights: &'a mut [PairWeights; POINTS],
    /// Which panel of the pair it is.
    pub(crate) panel: usize,
    /// What the sums of each output are to be multiplied with at each point, beside the scale of its panel.
    pub(crate) scale: [[f32; TILE_N]; POINTS],
}

/// Numbers of a tile.
pub(super) const TILE: usize = TILE_N * TILE_K;

#[inline(always)]
pub(crate) fn transform_taps<S: Simd>(s: S, args: &Taps<'_>, out: &mut Filters<'_>) {
    match args.encoding {
        Encoding::Q8 | Encoding::Q4 => {
            out.scale = [[0.25; TILE_N]; POINTS];
            transform_codes(s, args, out);
        }
        Encoding::F16 => round_taps::<S, f16>(s, args, out, f16::to_f32, Simd::load_f16),
        Encoding::Bf16 => round_taps::<S, bf16>(s, args, out, bf16::to_f32, Simd::load_bf16),
        Encoding::F32 => unreachable!("f32 weights are not rounded"),
    }
}

#[inline(always)]
fn transform_codes<S: Simd>(s: S, args: &Taps<'_>, out: &mut Filters<'_>) {
    let Taps { panel, encoding, .. } = *args;
    if encoding == Encoding::Q8 {
        let mut tiles: [&[u8]; TAPS] = [&[]; _];
        for (to, tile) in tiles.iter_mut().zip(args.tiles) {
            *to = &panel.tiles[tile * TILE..][..TILE];
        }
        return transform_bytes(&tiles, out);
    }
    let mut codes = [[0u8; TILE]; TAPS];
    let mut tiles: [&[u8]; TAPS] = [&[]; _];
    for ((codes, tile), to) in codes.iter_mut().zip(args.tiles).zip(&mut tiles) {
        unpack(s, &Unpack { panel, encoding, types: Types::U8S8, firsts: &[tile], tiles: 1 }, codes);
        *to = codes;
    }
    transform_bytes(&tiles, out);
}

/// Tiles `[TILE_K / 4][TILE_N][4]` of int8. Two inputs of an output lie side by side in each 16-bit lane: even ones in the low halves,
/// odd ones in the high ones.
#[inline(always)]
fn transform_bytes(tiles: &[&[u8]; TAPS], out: &mut Filters<'_>) {
    /// Numbers at a time.
    const STEP: usize = 16;
    const BLOCK: usize = 2 * TILE_N;
    /// Numbers from the even inputs of a split to the odd ones.
    const ODD: usize = SPLIT / 4 * BLOCK;
    let (tiles, panel) = (tiles.map(|tile| tile.as_chunks::<{ 2 * STEP }>().0), out.panel);
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
            for (out, g) in out.weights.iter_mut().zip(filters(g)) {
                out[panel].0[at..at + STEP].copy_from_slice(&g);
            }
        }
    }
}

#[inline(always)]
fn round_taps<S: Simd, T: bytemuck::Pod + Default>(
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
    // What a weight becomes at most at a point.
    const MOST: [f32; SIDE] = [2.0, 3.0, 3.0, 2.0];
    let mut factors = [[0.0; PAIRS]; POINTS];
    for n in 0..TILE_N {
        let greatest = widen(bytemuck::cast(bits[2 * n].max(bits[2 * n + 1])));
        let (scale, factor) = scale_of(greatest, FILTER_MOST as f32);
        for p in 0..POINTS {
            let most = MOST[p / SIDE] * MOST[p % SIDE];
            out.scale[p][n] = scale * (0.25 * most);
            factors[p][2 * n..][..2].fill(factor / most);
        }
    }
    const { assert!(PAIRS.is_multiple_of(MAX_LANES)) };
    for at in (0..TILE).step_by(S::LANES) {
        let lane = at % PAIRS;
        let mut g = [Floats(s, s.splat(0.0)); TAPS];
        for (g, tap) in g.iter_mut().zip(&taps) {
            g.1 = load(s, &tap[at..at + S::LANES]);
        }
        for ((out, g), factors) in out.weights.iter_mut().zip(filters(g)).zip(&factors) {
            s.store_i16(s.mul(g.1, s.load(&factors[lane..])), &mut out[panel].0[at..at + S::LANES]);
        }
    }
}

/// Sums of products of a pair of panels.
#[derive(Debug)]
pub(crate) struct Products<'a> {
    pub(crate) products: &'a [[[i32; TILE_COLUMNS]; PLANE]; POINTS],
    /// Scales of the patches.
    pub(crate) patch: &'a [[f32; PLANE]; POINTS],
    /// Scales of the columns.
    pub(crate) column: &'a [[f32; TILE_COLUMNS]; POINTS],
    /// Replaces the sums.
    pub(crate) first: bool,
}

/// Adds the 2 x 2 outputs of patch `i` to `sums[y][x]`, whole numbers modulo 2^32.
#[inline(always)]
pub(crate) fn add_integers(args: &Products<'_>, i: usize, sums: [&mut [[i32; TILE_COLUMNS]]; 2]) {
    let mut rows = [[[0i32; TILE_COLUMNS]; SIDE]; 2];
    let [upper, lower] = &mut rows;
    for x in 0..SIDE {
        let (m0, m1) = (&args.products[x][i], &args.products[SIDE + x][i]);
        let (m2, m3) = (&args.products[2 * SIDE + x][i], &args.products[3 * SIDE + x][i]);
        for n in 0..TILE_COLUMNS {
            [upper[x][n], lower[x][n]] = output([m0[n], m1[n], m2[n], m3[n]]);
        }
    }
    for ([m0, m1, m2, m3], sums) in rows.iter().zip(sums) {
        let [left, right] = sums.first_chunk_mut().expect("two outputs of a line");
        for n in 0..TILE_COLUMNS {
            let [x, y] = output([m0[n], m1[n], m2[n], m3[n]]);
            left[n] = if args.first { x >> 2 } else { left[n].wrapping_add(x >> 2) };
            right[n] = if args.first { y >> 2 } else { right[n].wrapping_add(y >> 2) };
        }
    }
}

/// The same of rounded inputs.
#[inline(always)]
pub(crate) fn add_floats<S: Simd>(
    s: S,
    args: &Products<'_>,
    i: usize,
    sums: [&mut [[f32; TILE_COLUMNS]]; 2],
) {
    let (zeros, [upper, lower]) = ([0; TILE_COLUMNS], sums);
    for n in (0..TILE_COLUMNS).step_by(S::LANES) {
        let mut m = [Floats(s, s.splat(0.0)); POINTS];
        for (p, m) in m.iter_mut().enumerate() {
            let x = s.mul(s.difference(&args.products[p][i][n..], &zeros), s.load(&args.column[p][n..]));
            m.1 = s.mul(x, s.splat(args.patch[p][i]));
        }
        for (sums, row) in [&mut *upper, &mut *lower].into_iter().zip(outputs(m)) {
            for (sum, y) in sums.iter_mut().zip(row) {
                let sum = &mut sum[n..];
                s.store(if args.first { y.1 } else { s.add(s.load(sum), y.1) }, sum);
            }
        }
    }
}

/// A number, or some side by side. Whole ones wrap around.
trait Vector: Copy {
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
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

impl<const N: usize> Vector for [i16; N] {
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        lanes(|i| self[i].wrapping_add(other[i]))
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        lanes(|i| self[i].wrapping_sub(other[i]))
    }
}

impl Vector for i32 {
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        self.wrapping_sub(other)
    }
}

/// `B^T d B`; along a side `[d0 - d2, d1 + d2, d2 - d1, d1 - d3]`.
#[inline(always)]
fn inputs<V: Vector>(mut d: [V; POINTS]) -> [V; POINTS] {
    #[inline(always)]
    fn along<V: Vector>([d0, d1, d2, d3]: [V; SIDE]) -> [V; SIDE] {
        [d0.minus(d2), d1.plus(d2), d2.minus(d1), d1.minus(d3)]
    }
    for x in 0..SIDE {
        let column = along([d[x], d[SIDE + x], d[2 * SIDE + x], d[3 * SIDE + x]]);
        for (y, t) in column.into_iter().enumerate() {
            d[SIDE * y + x] = t;
        }
    }
    for row in d.as_chunks_mut().0 {
        *row = along(*row);
    }
    d
}

/// `4 G g G^T`; along a side `[2 g0, g0 + g1 + g2, g0 - g1 + g2, 2 g2]`.
#[inline(always)]
fn filters<V: Vector>(g: [V; TAPS]) -> [V; POINTS] {
    #[inline(always)]
    fn along<V: Vector>([g0, g1, g2]: [V; 3]) -> [V; SIDE] {
        let ends = g0.plus(g2);
        [g0.plus(g0), ends.plus(g1), ends.minus(g1), g2.plus(g2)]
    }
    let mut rows = [[g[0]; 3]; SIDE];
    for x in 0..3 {
        for (row, t) in rows.iter_mut().zip(along([g[x], g[3 + x], g[6 + x]])) {
            row[x] = t;
        }
    }
    let mut u = [g[0]; POINTS];
    for (u, row) in u.as_chunks_mut().0.iter_mut().zip(rows) {
        *u = along(row);
    }
    u
}

/// `A^T m A`.
#[inline(always)]
fn outputs<V: Vector>(m: [V; POINTS]) -> [[V; 2]; 2] {
    let mut rows = [[m[0]; SIDE]; 2];
    for x in 0..SIDE {
        let column = output([m[x], m[SIDE + x], m[2 * SIDE + x], m[3 * SIDE + x]]);
        for (row, t) in rows.iter_mut().zip(column) {
            row[x] = t;
        }
    }
    let [upper, lower] = rows;
    [output(upper), output(lower)]
}

/// Along a side of that: `[m0 + m1 + m2, m1 - m2 - m3]`.
#[inline(always)]
fn output<V: Vector>([m0, m1, m2, m3]: [V; SIDE]) -> [V; 2] {
    [m0.plus(m1).plus(m2), m1.minus(m2).minus(m3)]
}
