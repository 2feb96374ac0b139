//! f32 matrices to encoded panels and back.
#![forbid(unsafe_code)]

use crate::layout::{Encoding, Q4_GROUP, TILE_K, TILE_N, Weight, WeightShape};
use crate::{bf16, f16};

/// The largest magnitude of an int8 weight.
const Q8_MAX: f32 = 127.0;
/// The largest group scale: the widest code, 7, times it stays within int8.
const Q4_SCALE_MAX: i32 = 18;

/// Encodes `src`, `[n, taps * k]` row-major f32 (taps outermost), into `out` of `shape.bytes(encoding)` bytes.
///
/// # Panics
/// Where a length isn't that of the shape.
pub fn encode(encoding: Encoding, shape: WeightShape, src: &[f32], out: &mut [u8]) {
    let row = shape.taps * shape.k;
    assert_eq!(src.len(), shape.n * row, "source of {shape:?}");
    assert_eq!(out.len(), shape.bytes(encoding), "{encoding:?} weight {shape:?}");
    out.fill(0);
    let panel_bytes = shape.panel_bytes(encoding);
    // [taps * k_padded]: one output with its padding
    let mut padded = vec![0.0f32; shape.tiles() * TILE_K];
    for (n, src) in src.chunks_exact(row.max(1)).enumerate() {
        for (padded, src) in
            padded.chunks_exact_mut(shape.k_padded().max(1)).zip(src.chunks_exact(shape.k.max(1)))
        {
            padded[..shape.k].copy_from_slice(src);
        }
        let panel = &mut out[n / TILE_N * panel_bytes..][..panel_bytes];
        let (header, tiles) = panel.split_at_mut(encoding.header_bytes(shape));
        let n = n % TILE_N;
        match encoding {
            Encoding::Q8 => encode_q8(shape, &padded, n, header, tiles),
            Encoding::Q4 => encode_q4(shape, &padded, n, header, tiles),
            Encoding::F16 => encode_half(&padded, n, tiles, |x| f16::from_f32(x).to_bits()),
            Encoding::Bf16 => encode_half(&padded, n, tiles, |x| bf16::from_f32(x).to_bits()),
            Encoding::F32 => encode_f32(&padded, n, tiles),
        }
    }
}

/// Byte of weight `k` (padded, over all taps) of output `n` among the codes of a [`Encoding::Q8`] panel.
pub(crate) const fn q8_at(k: usize, n: usize) -> usize {
    (k / 4 * TILE_N + n) * 4 + k % 4
}

/// Element of weight `k` (padded, over all taps) of output `n` among the elements of a 16-bit float panel.
pub(crate) const fn half_at(k: usize, n: usize) -> usize {
    (k / 2 * TILE_N + n) * 2 + k % 2
}

/// Element of weight `k` (padded, over all taps) of output `n` among the elements of an f32 panel.
pub(crate) const fn f32_at(k: usize, n: usize) -> usize {
    k * TILE_N + n
}

/// Byte of weight `k` of output `n` among the codes of a [`Encoding::Q4`] panel, and how far its code is shifted.
pub(crate) const fn q4_at(k: usize, n: usize) -> (usize, u32) {
    ((k / 8 * TILE_N + n) * 4 + k % 4, (k as u32 / 4 % 2) * 4)
}

fn encode_half(padded: &[f32], n: usize, tiles: &mut [u8], code: impl Fn(f32) -> u16) {
    for (k, &x) in padded.iter().enumerate() {
        tiles[2 * half_at(k, n)..][..2].copy_from_slice(&code(x).to_le_bytes());
    }
}

fn encode_f32(padded: &[f32], n: usize, tiles: &mut [u8]) {
    for (k, &x) in padded.iter().enumerate() {
        tiles[4 * f32_at(k, n)..][..4].copy_from_slice(&x.to_le_bytes());
    }
}

/// Writes the scale of output `n` and the sums of its int8 weights over each tap.
fn write_header(shape: WeightShape, scale: f32, codes: &[i8], n: usize, header: &mut [u8]) {
    header[4 * n..][..4].copy_from_slice(&scale.to_le_bytes());
    for tap in 0..shape.taps {
        let sum: i32 =
            codes[tap * shape.k_padded()..][..shape.k_padded()].iter().map(|&w| i32::from(w)).sum();
        header[4 * ((1 + tap) * TILE_N + n)..][..4].copy_from_slice(&sum.to_le_bytes());
    }
}

fn amax(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |a, x| a.max(x.abs()))
}

fn encode_q8(shape: WeightShape, padded: &[f32], n: usize, header: &mut [u8], tiles: &mut [u8]) {
    let scale = amax(padded) / Q8_MAX;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let codes: Vec<i8> =
        padded.iter().map(|x| (x * inverse).round_ties_even().clamp(-Q8_MAX, Q8_MAX) as i8).collect();
    write_header(shape, scale, &codes, n, header);
    for (k, &w) in codes.iter().enumerate() {
        tiles[q8_at(k, n)] = w as u8;
    }
}

/// The output's scale makes [`Q4_SCALE_MAX`] the group scale of its widest group; each group takes the integer scale that
/// leaves the smallest squared error among those around its own width.
fn encode_q4(shape: WeightShape, padded: &[f32], n: usize, header: &mut [u8], tiles: &mut [u8]) {
    let scale = amax(padded) / (7.0 * Q4_SCALE_MAX as f32);
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let groups_at = (1 + shape.taps) * TILE_N * 4;
    let mut codes = vec![0i8; padded.len()];
    for (g, (group, codes)) in padded.chunks_exact(Q4_GROUP).zip(codes.chunks_exact_mut(Q4_GROUP)).enumerate()
    {
        let widest = (amax(group) * inverse / 7.0).round() as i32;
        let quantize = |x: f32, s: i32| {
            let low = if 8 * s > 127 { -7.0 } else { -8.0 };
            (x * inverse / s as f32).round_ties_even().clamp(low, 7.0) as i32
        };
        let error = |s: i32| -> f32 {
            group.iter().map(|&x| (x * inverse - (quantize(x, s) * s) as f32).powi(2)).sum()
        };
        let candidates = (widest - 2).clamp(1, Q4_SCALE_MAX)..=(widest + 1).clamp(1, Q4_SCALE_MAX);
        let s = candidates.min_by(|&a, &b| error(a).total_cmp(&error(b))).expect("at least one candidate");
        header[groups_at + g * TILE_N + n] = s as u8;
        for (i, (&x, w)) in group.iter().zip(codes).enumerate() {
            let code = quantize(x, s);
            *w = (code * s) as i8;
            let (at, shift) = q4_at(g * Q4_GROUP + i, n);
            tiles[at] |= ((code + 8) as u8) << shift;
        }
    }
    write_header(shape, scale, &codes, n, header);
}

/// The int8 weights of an integer encoding, `[n, taps * k]` row-major.
///
/// # Panics
/// Where the encoding isn't an integer one or the length isn't that of the shape.
pub fn decode_codes(weight: Weight<'_>) -> Vec<i8> {
    assert!(weight.encoding.is_integer(), "{:?}", weight.encoding);
    gather(weight.shape, |n, k| {
        let panel = weight.panel(n / TILE_N);
        let n = n % TILE_N;
        if weight.encoding == Encoding::Q8 {
            return panel.tiles[q8_at(k, n)] as i8;
        }
        let (at, shift) = q4_at(k, n);
        let code = (panel.tiles[at] >> shift & 15) as i8 - 8;
        let group = panel.groups(k / TILE_K)[k % TILE_K / Q4_GROUP * TILE_N + n];
        code.wrapping_mul(group as i8)
    })
}

/// The numbers that `bytes` stand for, `[n, taps * k]` row-major.
///
/// # Panics
/// Where the length isn't that of the shape.
pub fn decode(encoding: Encoding, shape: WeightShape, bytes: &[u8]) -> Vec<f32> {
    let weight = Weight::new(encoding, shape, bytes);
    let half = |n: usize, k: usize| {
        let at = 2 * half_at(k, n % TILE_N);
        let tiles = weight.panel(n / TILE_N).tiles;
        u16::from_le_bytes([tiles[at], tiles[at + 1]])
    };
    match encoding {
        Encoding::Q8 | Encoding::Q4 => {
            let codes = decode_codes(weight);
            let row = (shape.taps * shape.k).max(1);
            let scale = |i: usize| weight.panel(i / row / TILE_N).scale()[i / row % TILE_N];
            codes.iter().enumerate().map(|(i, &w)| f32::from(w) * scale(i)).collect()
        }
        Encoding::F16 => gather(shape, |n, k| f16::from_bits(half(n, k)).to_f32()),
        Encoding::Bf16 => gather(shape, |n, k| bf16::from_bits(half(n, k)).to_f32()),
        Encoding::F32 => gather(shape, |n, k| {
            let at = 4 * f32_at(k, n % TILE_N);
            let bytes = &weight.panel(n / TILE_N).tiles[at..at + 4];
            f32::from_le_bytes(bytes.try_into().expect("four bytes"))
        }),
    }
}

/// `[n, taps * k]` of `at(n, k)`, where `k` counts the padded inputs of all taps.
fn gather<T>(shape: WeightShape, at: impl Fn(usize, usize) -> T) -> Vec<T> {
    let mut out = Vec::with_capacity(shape.n * shape.taps * shape.k);
    for n in 0..shape.n {
        for tap in 0..shape.taps {
            out.extend((0..shape.k).map(|k| at(n, tap * shape.k_padded() + k)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(shape: WeightShape) -> Vec<f32> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..shape.n * shape.taps * shape.k).map(|_| next()).collect()
    }

    /// Largest error of an encoding, relative to the largest weight of the output.
    fn budget(encoding: Encoding) -> f32 {
        match encoding {
            Encoding::Q8 => 0.5 / 127.0 + 1e-6,
            // A group two scales narrower than the nearest cuts off 3.5 * (1 + 2 * 2) of 126 steps.
            Encoding::Q4 => 17.5 / 126.0,
            Encoding::F16 => 1.0 / 2048.0,
            Encoding::Bf16 => 1.0 / 256.0,
            Encoding::F32 => 0.0,
        }
    }

    #[test]
    fn decoding_gives_the_matrix_back() {
        for encoding in Encoding::ALL {
            for (n, taps, k) in [(1, 1, 1), (16, 1, 64), (17, 9, 4), (40, 4, 65), (3, 1, 130), (5, 1, 0)] {
                let shape = WeightShape { n, taps, k };
                let src = source(shape);
                let mut bytes = vec![0xAA; shape.bytes(encoding)];
                encode(encoding, shape, &src, &mut bytes);
                let back = decode(encoding, shape, &bytes);
                for (i, (a, b)) in src.iter().zip(&back).enumerate() {
                    assert!(
                        (a - b).abs() <= budget(encoding),
                        "{encoding:?} {shape:?} [{i}]: {a} became {b}"
                    );
                }
            }
        }
    }

    #[test]
    fn sums_are_those_of_the_codes() {
        for encoding in [Encoding::Q8, Encoding::Q4] {
            let shape = WeightShape { n: 19, taps: 3, k: 70 };
            let mut bytes = vec![0; shape.bytes(encoding)];
            encode(encoding, shape, &source(shape), &mut bytes);
            let weight = Weight::new(encoding, shape, &bytes);
            let codes = decode_codes(weight);
            for n in 0..shape.n {
                for tap in 0..shape.taps {
                    let codes = &codes[(n * shape.taps + tap) * shape.k..][..shape.k];
                    let sum: i32 = codes.iter().map(|&w| i32::from(w)).sum();
                    assert_eq!(
                        weight.panel(n / TILE_N).sum(tap)[n % TILE_N],
                        sum,
                        "{encoding:?} n {n} tap {tap}"
                    );
                    assert!(codes.iter().all(|&w| w > i8::MIN));
                }
            }
        }
    }
}
