//! What stands around the tiles: widening rows, unpacking weights, adding up taps, finishing. Written once in plain Rust
//! whose loops of 16 become vectors; [`steps!`] compiles it for a tier.

use super::Activation;
use super::activate;
use super::table::Types;
use super::tile::TILE_COLUMNS;
use crate::bf16;
use crate::layout::{Encoding, Panel, Q4_GROUP, TILE_K, TILE_N};
use crate::par::Shared;
use crate::view::Rows;

/// The tier's versions of the functions below. Each is unsafe to call where the machine lacks the tier.
#[derive(Debug)]
pub(crate) struct Steps {
    pub(crate) widen: unsafe fn(&Widen<'_>, &mut [u8]),
    pub(crate) unpack: unsafe fn(&Unpack<'_>, &mut [u8]),
    pub(crate) add_tap: unsafe fn(&AddTap<'_>, &mut [[f32; TILE_COLUMNS]]),
    pub(crate) finish: unsafe fn(&Finish<'_>),
}

/// Compiles the steps for a tier: `steps!(#[target_feature(...)] NAME)`.
macro_rules! steps {
    ($(#[$attribute:meta])* $static_name:ident) => {
        pub(crate) static $static_name: $crate::gemm::steps::Steps = {
            use $crate::gemm::steps::*;
            $(#[$attribute])*
            fn widen_rows(args: &Widen<'_>, out: &mut [u8]) {
                widen(args, out)
            }
            $(#[$attribute])*
            fn unpack_tiles(args: &Unpack<'_>, out: &mut [u8]) {
                unpack(args, out)
            }
            $(#[$attribute])*
            fn add_one_tap(args: &AddTap<'_>, sum: &mut [[f32; $crate::gemm::tile::TILE_COLUMNS]]) {
                add_tap(args, sum)
            }
            $(#[$attribute])*
            fn finish_tile(args: &Finish<'_>) {
                finish(args)
            }
            Steps { widen: widen_rows, unpack: unpack_tiles, add_tap: add_one_tap, finish: finish_tile }
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
    /// First tile.
    pub(crate) first: usize,
    /// Tiles.
    pub(crate) tiles: usize,
}

#[inline(always)]
pub(crate) fn unpack(args: &Unpack<'_>, out: &mut [u8]) {
    let tile_bytes = args.encoding.tile_bytes();
    let out_bytes = TILE_N * TILE_K * args.types.weight_bytes();
    for (i, out) in out.chunks_exact_mut(out_bytes).take(args.tiles).enumerate() {
        let codes = &args.panel.tiles[(args.first + i) * tile_bytes..][..tile_bytes];
        match args.encoding {
            Encoding::Q8 => spread_q8(codes, args.types, out),
            Encoding::Q4 if args.types == Types::U8S8 => {
                unpack_q4(codes, args.panel.groups(args.first + i), out)
            }
            Encoding::Q4 => {
                let mut wide = [0; TILE_N * TILE_K];
                unpack_q4(codes, args.panel.groups(args.first + i), &mut wide);
                spread_q8(&wide, args.types, out);
            }
            Encoding::F16 => spread_float(codes, args.types, out, |x| f16_to_f32(u16::from_le_bytes(x))),
            Encoding::Bf16 => {
                spread_float(codes, args.types, out, |x| from_bf16(bf16::from_bits(u16::from_le_bytes(x))))
            }
            Encoding::F32 => spread_float(codes, args.types, out, f32::from_le_bytes),
        }
    }
}

/// A `Q4` tile to a `Q8` tile. Two weights of one output lie side by side in each 16-bit lane, and a product modulo 2^16
/// holds a product modulo 2^8 of either half.
#[inline(always)]
fn unpack_q4(codes: &[u8], groups: &[u8], out: &mut [u8]) {
    const BLOCK: usize = TILE_N * 4;
    for (i, (codes, out)) in codes.chunks_exact(BLOCK).zip(out.chunks_exact_mut(2 * BLOCK)).enumerate() {
        let groups = &groups[i * 8 / Q4_GROUP * TILE_N..][..TILE_N];
        let mut scale = [0u16; BLOCK / 2];
        for (n, s) in scale.chunks_exact_mut(2).enumerate() {
            s.fill(u16::from(groups[n]));
        }
        let (low, high) = out.split_at_mut(BLOCK);
        for (i, scale) in scale.iter().enumerate() {
            let pair = u16::from_le_bytes([codes[2 * i], codes[2 * i + 1]]);
            let times = |codes: u16| {
                let even = (codes & 0xFF).wrapping_sub(8).wrapping_mul(*scale);
                let odd = (codes & 0xFF00).wrapping_sub(0x0800).wrapping_mul(*scale);
                (even & 0xFF | odd & 0xFF00).to_le_bytes()
            };
            low[2 * i..2 * i + 2].copy_from_slice(&times(pair & 0x0F0F));
            high[2 * i..2 * i + 2].copy_from_slice(&times(pair >> 4 & 0x0F0F));
        }
    }
}

/// An int8 tile `[k/4][16][4]` as i16, bf16 `[k/2][16][2]` or f32 `[k][16]`.
#[inline(always)]
fn spread_q8(codes: &[u8], types: Types, out: &mut [u8]) {
    for (codes, out) in
        codes.chunks_exact(4 * TILE_N).zip(out.chunks_exact_mut(4 * TILE_N * types.weight_bytes()))
    {
        match types {
            Types::U8S8 => out.copy_from_slice(codes),
            Types::S16S16 => {
                let (low, high) = bytemuck::cast_slice_mut::<u8, i16>(out).split_at_mut(2 * TILE_N);
                for n in 0..TILE_N {
                    let w = |j: usize| i16::from(codes[4 * n + j] as i8);
                    (low[2 * n], low[2 * n + 1]) = (w(0), w(1));
                    (high[2 * n], high[2 * n + 1]) = (w(2), w(3));
                }
            }
            Types::Bf16 => {
                let (low, high) = bytemuck::cast_slice_mut::<u8, u16>(out).split_at_mut(2 * TILE_N);
                for n in 0..TILE_N {
                    // An int8 has no more bits than a bfloat16's significand.
                    let w = |j: usize| (f32::from(codes[4 * n + j] as i8).to_bits() >> 16) as u16;
                    (low[2 * n], low[2 * n + 1]) = (w(0), w(1));
                    (high[2 * n], high[2 * n + 1]) = (w(2), w(3));
                }
            }
            Types::F32 => {
                for (j, out) in bytemuck::cast_slice_mut::<u8, f32>(out).chunks_exact_mut(TILE_N).enumerate()
                {
                    for (n, out) in out.iter_mut().enumerate() {
                        *out = f32::from(codes[4 * n + j] as i8);
                    }
                }
            }
        }
    }
}

/// A float tile `[k/2][16][2]` as bf16 `[k/2][16][2]` or f32 `[k][16]`.
#[inline(always)]
fn spread_float<const B: usize>(codes: &[u8], types: Types, out: &mut [u8], value: impl Fn([u8; B]) -> f32) {
    let at = |block: &[u8], i: usize| value(block[i * B..][..B].try_into().expect("B bytes"));
    let blocks =
        codes.chunks_exact(2 * TILE_N * B).zip(out.chunks_exact_mut(2 * TILE_N * types.weight_bytes()));
    for (codes, out) in blocks {
        if types == Types::Bf16 {
            for (i, out) in bytemuck::cast_slice_mut::<u8, u16>(out).iter_mut().enumerate() {
                *out = to_bf16(at(codes, i)).to_bits();
            }
        } else {
            let (even, odd) = bytemuck::cast_slice_mut::<u8, f32>(out).split_at_mut(TILE_N);
            for n in 0..TILE_N {
                (even[n], odd[n]) = (at(codes, 2 * n), at(codes, 2 * n + 1));
            }
        }
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
pub(crate) fn add_tap(args: &AddTap<'_>, sum: &mut [[f32; TILE_COLUMNS]]) {
    for (r, (sum, products)) in sum.iter_mut().zip(args.products).enumerate() {
        let scale = args.scale[r * args.scale_step];
        for n in 0..TILE_COLUMNS {
            let x = (products[n] - args.offset[n]) as f32 * scale;
            sum[n] = if args.first { x } else { sum[n] + x };
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

#[inline(always)]
pub(crate) fn finish(args: &Finish<'_>) {
    match args.activation {
        Activation::None => finish_rows(args, |y| y),
        Activation::Silu => finish_rows(args, |y| y.map(activate::silu)),
        Activation::Gelu => finish_rows(args, |y| y.map(activate::gelu)),
        Activation::GeluTanh => finish_rows(args, |y| y.map(activate::gelu_tanh)),
        Activation::QuickGelu => finish_rows(args, |y| y.map(activate::quick_gelu)),
        Activation::Geglu => finish_rows(args, |mut y| {
            let (value, gate) = y.split_at_mut(TILE_N);
            for (value, gate) in value.iter_mut().zip(gate) {
                *value *= activate::gelu(*gate);
            }
            y
        }),
    }
}

#[inline(always)]
fn finish_rows(args: &Finish<'_>, activation: impl Fn([f32; TILE_COLUMNS]) -> [f32; TILE_COLUMNS]) {
    let rows = match args.sums {
        Sums::Integer { sums, .. } => sums.len(),
        Sums::Float(sums) => sums.len(),
    };
    for r in 0..rows {
        let mut y = match args.sums {
            Sums::Integer { sums, offset, scale, scale_step } => {
                let scale = scale[r * scale_step];
                std::array::from_fn(|n| (sums[r][n] - offset[n]) as f32 * scale)
            }
            Sums::Float(sums) => sums[r],
        };
        for ((y, scale), bias) in y.iter_mut().zip(args.scale).zip(args.bias) {
            *y = *y * scale + bias;
        }
        let mut y = activation(y);
        let at = (args.row + r * args.row_step) * args.ldo + args.column;
        match args.residual {
            Some(Rows::F32(rows)) => {
                for (y, &x) in y.iter_mut().zip(&rows[at..at + args.columns]) {
                    *y += x;
                }
            }
            Some(Rows::Bf16(rows)) => {
                for (y, &x) in y.iter_mut().zip(&rows[at..at + args.columns]) {
                    *y += from_bf16(x);
                }
            }
            None => {}
        }
        match args.out {
            Out::F32(out) => {
                // SAFETY: this task alone finishes these rows and columns, one row at a time.
                let out = unsafe { out.slice(at, args.columns) };
                if args.accumulate {
                    y.iter_mut().zip(&*out).for_each(|(y, x)| *y += x);
                }
                match <&mut [f32; TILE_COLUMNS]>::try_from(&mut *out) {
                    Ok(out) => *out = y,
                    Err(_) => out.copy_from_slice(&y[..args.columns]),
                }
            }
            Out::Bf16(out) => {
                // SAFETY: as above.
                let out = unsafe { out.slice(at, args.columns) };
                if args.accumulate {
                    y.iter_mut().zip(&*out).for_each(|(y, &x)| *y += from_bf16(x));
                }
                let y = y.map(to_bf16);
                match <&mut [bf16; TILE_COLUMNS]>::try_from(&mut *out) {
                    Ok(out) => *out = y,
                    Err(_) => out.copy_from_slice(&y[..args.columns]),
                }
            }
        }
    }
}

#[inline(always)]
fn from_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Rounds to nearest, ties to even. NaN stays NaN.
#[inline(always)]
fn to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if x.is_nan() { (bits >> 16 | 0x40) as u16 } else { rounded as u16 })
}

/// Exact, without a table or a branch: the bits are moved into place and the exponent corrected by a product with 2^112,
/// which also normalizes subnormals. Infinity and NaN are completed by hand.
#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7FFF);
    let finite = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    let special = f32::from_bits(0x7F80_0000 | magnitude << 13);
    let x = if magnitude >= 0x7C00 { special } else { finite };
    f32::from_bits(x.to_bits() | u32::from(bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::f16;

    #[test]
    fn conversions_agree_with_the_half_crate() {
        for bits in 0..=u16::MAX {
            let (a, b) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{bits:04x}: {a} {b}");
            let x = f32::from_bits(u32::from(bits) << 16 | u32::from(bits.rotate_left(3)));
            assert!(to_bf16(x) == bf16::from_f32(x) || x.is_nan() && to_bf16(x).is_nan(), "{x}");
        }
    }
}
