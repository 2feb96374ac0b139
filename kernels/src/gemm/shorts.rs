//! Floats as whole numbers of 16 bits, for processors that multiply those faster than floats: each operand row and each output's
//! weights get a scale of their own in each chunk of inputs, by the greatest of them there. Sums are exact: a row has as many bits as an
//! i32 leaves it beside the weights, sign included 12.6 and more by float weights of 12, 16 by 8-bit ones, 15 by sums of those.
#![forbid(unsafe_code)]

use super::geometry::FOLDED_TAPS;
use super::unpack::{Unpack, lanes, opaque};
use crate::layout::{Encoding, TILE_K, TILE_N};
use crate::simd::{MAX_LANES, Simd};
use crate::{bf16, f16};

/// The greatest whole number that a float weight becomes: as many bits as the significand of an f16 has.
const WEIGHT_MOST: usize = 2047;
/// Magnitudes below this are 0.
const LEAST: f32 = 1e-30;
/// The bits of an f16 or bf16 without its sign: in the order of magnitudes, not a number last.
pub(super) const MAGNITUDE: u16 = 0x7FFF;

/// The greatest whole number that an input may become where `inputs` of them meet weights of `encoding`, `folds` if some are sums
/// of several taps.
pub(super) fn row_most(encoding: Encoding, inputs: usize, folds: bool) -> f32 {
    let weight = match encoding {
        Encoding::Q8 | Encoding::Q4 if folds => 127 * FOLDED_TAPS,
        Encoding::Q8 | Encoding::Q4 => 127,
        Encoding::F16 | Encoding::Bf16 | Encoding::F32 => WEIGHT_MOST,
    };
    (i32::MAX as usize / (weight * inputs.max(1))).min(i16::MAX as usize) as f32
}

/// `(scale, factor)`: `x * factor` has a magnitude of at most `most` where `x` has one of at most `greatest`, and times `scale`
/// gives `x` again. A scale that is not a number tells of a `greatest` that is none or infinite.
#[inline(always)]
pub(super) fn scale_of(greatest: f32, most: f32) -> (f32, f32) {
    if !greatest.is_finite() {
        (f32::NAN, 0.0)
    } else if greatest < LEAST {
        (0.0, 0.0)
    } else {
        (greatest / most, most / greatest)
    }
}

/// Rounds a piece of a row, whole tiles long, to whole numbers up to `most`, and gives their scale.
#[inline(always)]
pub(super) fn round_row<S: Simd>(s: S, row: &[bf16], most: f32, out: &mut [i16]) -> f32 {
    let bits: &[u16] = bytemuck::cast_slice(row);
    let mut greatest = [0u16; TILE_K / 2];
    for bits in bits.as_chunks::<{ TILE_K / 2 }>().0 {
        let bits = opaque(bits);
        greatest = lanes(|i| greatest[i].max(bits[i] & MAGNITUDE));
    }
    let greatest = greatest.into_iter().fold(0, u16::max);
    let (scale, factor) = scale_of(f32::from_bits(u32::from(greatest) << 16), most);
    let factor = s.splat(factor);
    for (out, x) in out.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
        s.store_i16(s.mul(s.load_bf16(x), factor), out);
    }
    scale
}

/// Rounds 16-bit float tiles `[k/2][16][2]`, or the sums of those of several taps, and gives each output's scale.
#[inline(always)]
pub(super) fn round_tiles<S: Simd>(s: S, args: &Unpack<'_>, out: &mut [i16]) -> [f32; TILE_N] {
    match args.encoding {
        Encoding::F16 => round::<S, f16>(s, args, out, f16::to_f32, Simd::load_f16),
        Encoding::Bf16 => round::<S, bf16>(s, args, out, bf16::to_f32, Simd::load_bf16),
        encoding => unreachable!("{encoding:?} weights to be rounded"),
    }
}

#[inline(always)]
fn round<S: Simd, T: bytemuck::Pod + Default>(
    s: S,
    args: &Unpack<'_>,
    out: &mut [i16],
    widen: impl Fn(T) -> f32,
    load: impl Fn(S, &[T]) -> S::F,
) -> [f32; TILE_N] {
    const PAIRS: usize = 2 * TILE_N;
    let tile_bytes = args.encoding.tile_bytes();
    let tiles = |first: usize| -> &[T] {
        bytemuck::cast_slice(&args.panel.tiles[first * tile_bytes..][..args.tiles * tile_bytes])
    };
    let mut greatest = [0.0f32; TILE_N];
    for &first in args.firsts {
        let mut bits = [0u16; PAIRS];
        for pairs in bytemuck::cast_slice::<T, u16>(tiles(first)).as_chunks::<PAIRS>().0 {
            let pairs = opaque(pairs);
            bits = lanes(|i| bits[i].max(pairs[i] & MAGNITUDE));
        }
        for (n, greatest) in greatest.iter_mut().enumerate() {
            *greatest += widen(bytemuck::cast(bits[2 * n].max(bits[2 * n + 1])));
        }
    }
    let scales = greatest.map(|x| scale_of(x, WEIGHT_MOST as f32));
    let factors: [f32; PAIRS] = std::array::from_fn(|i| scales[i / 2].1);
    let mut taps: [&[T]; FOLDED_TAPS] = [&[]; _];
    for (tap, &first) in taps.iter_mut().zip(args.firsts) {
        *tap = tiles(first);
    }
    let taps = &taps[..args.firsts.len()];
    const { assert!(PAIRS.is_multiple_of(MAX_LANES)) };
    for (i, out) in out.chunks_exact_mut(PAIRS).take(args.tiles * TILE_K / 2).enumerate() {
        for lane in (0..PAIRS).step_by(S::LANES) {
            let at = i * PAIRS + lane;
            let mut x = load(s, &taps[0][at..at + S::LANES]);
            for tap in &taps[1..] {
                x = s.add(x, load(s, &tap[at..at + S::LANES]));
            }
            s.store_i16(s.mul(x, s.load(&factors[lane..])), &mut out[lane..]);
        }
    }
    scales.map(|(scale, _)| scale)
}
