//! Operands as a kernel reads them, where they don't lie so: rows widened, weights unpacked, taps of a folded filter added up.

use std::ops::AddAssign;

use super::geometry::FOLDED_TAPS;
use super::shorts::{round_row, round_tiles};
use super::table::Types;
use crate::layout::{Encoding, Panel, Q4_GROUP, TILE_K, TILE_N};
use crate::simd::Simd;
use crate::{bf16, f16};

/// A piece of an operand row to be widened.
#[derive(Debug)]
pub(crate) enum Widen<'a> {
    /// To i16; the code stays what it is.
    U8(&'a [u8]),
    /// To f32.
    Bf16(&'a [bf16]),
    /// To i16, of magnitudes up to this.
    Rounded(&'a [bf16], f32),
}

/// Gives what the numbers are to be multiplied with.
#[inline(always)]
pub(crate) fn widen<S: Simd>(s: S, args: &Widen<'_>, out: &mut [u8]) -> f32 {
    match args {
        Widen::U8(row) => {
            for (out, &x) in bytemuck::cast_slice_mut::<u8, i16>(out).iter_mut().zip(*row) {
                *out = i16::from(x);
            }
        }
        Widen::Bf16(row) => {
            let out: &mut [f32] = bytemuck::cast_slice_mut(out);
            // Pieces of rows are multiples of `TILE_K`.
            for (out, x) in out.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
                s.store(s.load_bf16(x), out);
            }
        }
        Widen::Rounded(row, most) => return round_row(s, row, *most, bytemuck::cast_slice_mut(out)),
    }
    1.0
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

/// Gives what the sums of each output are to be multiplied with, beside the scale of its panel.
#[inline(always)]
pub(crate) fn unpack<S: Simd>(s: S, args: &Unpack<'_>, out: &mut [u8]) -> [f32; TILE_N] {
    if args.types == Types::S16S16 && !args.encoding.is_integer() {
        return round_tiles(s, args, bytemuck::cast_slice_mut(out));
    }
    let out_bytes = args.types.tile_bytes();
    for (i, out) in out.chunks_exact_mut(out_bytes).take(args.tiles).enumerate() {
        match (args.types, args.encoding, args.firsts) {
            (Types::Bf16, Encoding::F16, _) => round_f16(s, args, i, out),
            (types, _, &[first]) => unpack_tile(s, args, first + i, types, out),
            (Types::S16S16, ..) => sum_taps::<S, i16>(s, args, i, out),
            (Types::F32, ..) => sum_taps::<S, f32>(s, args, i, out),
            (types, ..) => unreachable!("{types:?} have no room for sums of taps"),
        }
    }
    [1.0; _]
}

/// The sum of the `i`-th tiles, as a kernel whose weights are `T` reads it.
#[inline(always)]
fn sum_taps<S: Simd, T: bytemuck::Pod + AddAssign>(s: S, args: &Unpack<'_>, i: usize, out: &mut [u8]) {
    let mut sum = [T::zeroed(); TILE_N * TILE_K];
    for &first in args.firsts {
        let mut wide = [T::zeroed(); TILE_N * TILE_K];
        unpack_tile(s, args, first + i, args.types, bytemuck::cast_slice_mut(&mut wide));
        for (sum, x) in sum.iter_mut().zip(wide) {
            *sum += x;
        }
    }
    out.copy_from_slice(bytemuck::cast_slice(&sum));
}

/// Tile `tile` as a kernel of types `types` reads it.
#[inline(always)]
fn unpack_tile<S: Simd>(s: S, args: &Unpack<'_>, tile: usize, types: Types, out: &mut [u8]) {
    let codes = args.tile(tile);
    match (args.encoding, types) {
        (Encoding::Q8, Types::U8S8) => out.copy_from_slice(codes),
        (Encoding::Q4, Types::U8S8) => unpack_q4(codes, args.panel.groups(tile), out),
        (Encoding::Q4, Types::U8S4) => spread_q4(codes, args.panel.groups(tile), out),
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

/// The sum of the `i`-th f16 tiles, rounded to bf16; the order of both is the same.
#[inline(always)]
fn round_f16<S: Simd>(s: S, args: &Unpack<'_>, i: usize, out: &mut [u8]) {
    let out: &mut [bf16] = bytemuck::cast_slice_mut(out);
    let taps = args.firsts.len();
    let mut tiles: [&[f16]; FOLDED_TAPS] = [&[]; _];
    for (tile, first) in tiles.iter_mut().zip(args.firsts) {
        *tile = bytemuck::cast_slice(args.tile(first + i));
    }
    for (at, out) in (0..).step_by(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
        let mut x = s.load_f16(&tiles[0][at..at + S::LANES]);
        for tile in &tiles[1..taps] {
            x = s.add(x, s.load_f16(&tile[at..at + S::LANES]));
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
pub(super) fn opaque<T>(block: &T) -> &T {
    std::hint::black_box(block)
}

/// `[f(0), f(1), ...]`. The functions of the standard library are not always inlined, and then not of the tier.
#[inline(always)]
pub(super) fn lanes<T: Copy + Default, const N: usize>(f: impl Fn(usize) -> T) -> [T; N] {
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

/// A `Q4` tile as blocks of [`Types::U8S4`].
#[inline(always)]
fn spread_q4(codes: &[u8], groups: &[u8], out: &mut [u8]) {
    const BLOCK: usize = 4 * TILE_N;
    let codes = codes.as_chunks::<BLOCK>().0.chunks_exact(Q4_GROUP / 8);
    let out = out.as_chunks_mut::<BLOCK>().0.chunks_exact_mut(Q4_GROUP / 4 + 1);
    for ((codes, group), out) in codes.zip(groups.as_chunks::<TILE_N>().0).zip(out) {
        let (out, scale) = out.split_at_mut(Q4_GROUP / 4);
        for (codes, [low, high]) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
            let codes = opaque(codes);
            *low = lanes(|i| (codes[i] & 0xF).wrapping_sub(8));
            *high = lanes(|i| (codes[i] >> 4).wrapping_sub(8));
        }
        let group: [u16; TILE_N] = lanes(|n| (group[n] as i8 as u16).to_le());
        scale[0] = bytemuck::cast(group.map(|scale| [scale; 2]));
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
        Types::U8S8 | Types::U8S4 => unreachable!("int8 weights are read where they lie"),
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
        let (even, odd) = out.split_at_mut(TILE_N);
        for n in (0..TILE_N).step_by(S::LANES) {
            let codes = &codes[2 * n..][..2 * S::LANES];
            let [x, y] = s.unzip(load(s, &codes[..S::LANES]), load(s, &codes[S::LANES..]));
            s.store(x, &mut even[n..]);
            s.store(y, &mut odd[n..]);
        }
    }
}
