//! f32 matrices to encoded panels and back.
#![forbid(unsafe_code)]

mod feedback;

use crate::layout::{Encoding, Q4_GROUP, TILE_K, TILE_N, Weight, WeightShape};
use crate::{Isa, bf16, f16};
pub use feedback::{Feedback, Line, Moments};
use half::slice::HalfFloatSliceExt;

/// The largest magnitude of an int8 weight.
const Q8_MAX: f32 = 127.0;
/// The largest magnitude of a group scale: the code 7 times it stays within int8.
const Q4_SCALE_MAX: i8 = 18;
/// What the widest weight of a `Q4` output becomes.
const Q4_WIDEST: f32 = 7.0 * Q4_SCALE_MAX as f32;

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
    // [taps * k_padded]: one output with its padding, and its codes
    let mut padded = vec![0.0f32; shape.tiles() * TILE_K];
    let mut codes = vec![0i8; if encoding.is_integer() { padded.len() } else { 0 }];
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
            Encoding::Q8 => encode_q8(shape, &padded, &mut codes, n, header, tiles),
            Encoding::Q4 => encode_q4(shape, &padded, &mut codes, n, header, tiles),
            Encoding::F16 => halves(&padded, n, tiles, |x, out: &mut [f16]| out.convert_from_f32_slice(x)),
            Encoding::Bf16 => halves(&padded, n, tiles, |x, out: &mut [bf16]| out.convert_from_f32_slice(x)),
            Encoding::F32 => scatter::<4>(bytemuck::cast_slice(&padded), n, tiles),
        }
    }
}

/// As [`encode`] for an integer encoding, with the errors of rounding fed back to other inputs.
///
/// # Panics
/// As [`encode`], and where `feedback` is for another number of inputs or the encoding isn't an integer one.
pub fn encode_with(
    encoding: Encoding,
    shape: WeightShape,
    src: &[f32],
    feedback: &Feedback,
    isa: Isa,
    out: &mut [u8],
) {
    let row = shape.taps * shape.k;
    assert!(encoding.is_integer(), "{encoding:?} needs no feedback");
    assert_eq!(feedback.inputs(), shape.k, "feedback for {shape:?}");
    assert_eq!(src.len(), shape.n * row, "source of {shape:?}");
    assert_eq!(out.len(), shape.bytes(encoding), "{encoding:?} weight {shape:?}");
    out.fill(0);
    let mut codes = vec![0i8; shape.tiles() * TILE_K];
    let panels = out.chunks_exact_mut(shape.panel_bytes(encoding));
    for (src, panel) in src.chunks((TILE_N * row).max(1)).zip(panels) {
        let rounded = Rounded::new(encoding, shape, src, feedback, isa);
        let (header, tiles) = panel.split_at_mut(encoding.header_bytes(shape));
        for n in 0..rounded.scale.len() {
            rounded.weights_of(n, shape, &mut codes);
            write_header(shape, rounded.scale[n], &codes, n, header);
            if encoding == Encoding::Q8 {
                scatter::<4>(bytemuck::cast_slice(&codes), n, tiles);
                continue;
            }
            for (g, weights) in codes.as_chunks::<Q4_GROUP>().0.iter().enumerate() {
                let s = rounded.group_of(n, shape, g);
                header[(1 + shape.taps) * TILE_N * 4 + g * TILE_N + n] = s as u8;
                write_nibbles(&weights.map(|w| (w / s + 8) as u8), g, n, tiles);
            }
        }
    }
}

/// The int8 weights of a panel, rounded with feedback. A lane is one output at one tap.
struct Rounded {
    /// Of each output.
    scale: Vec<f32>,
    lanes: usize,
    /// `[k][lanes]`.
    weights: Vec<i8>,
    /// `[k / Q4_GROUP][lanes]`; 1 for [`Encoding::Q8`].
    groups: Vec<i8>,
}

impl Rounded {
    /// Rounds `src`, up to 16 rows `[taps, k]`.
    fn new(encoding: Encoding, shape: WeightShape, src: &[f32], feedback: &Feedback, isa: Isa) -> Rounded {
        let (taps, k) = (shape.taps, shape.k);
        let limit = if encoding == Encoding::Q8 { Q8_MAX } else { Q4_WIDEST };
        let scale: Vec<f32> = src.chunks_exact(taps * k).map(|row| amax(row) / limit).collect();
        let lanes = scale.len() * taps;
        let mut wanted = vec![0.0f32; k * lanes]; // in units of the scales
        for (lane, row) in src.chunks_exact(k).enumerate() {
            let scale = scale[lane / taps];
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            row.iter().enumerate().for_each(|(i, x)| wanted[i * lanes + lane] = x * inverse);
        }
        // Wanted, with the errors of later inputs made up for.
        let mut adjusted = wanted.clone();
        let mut weights = vec![0i8; k * lanes];
        let mut groups = vec![1i8; k.div_ceil(Q4_GROUP) * lanes];
        let mut errors = vec![0.0f32; lanes];
        for g in (0..k.div_ceil(Q4_GROUP)).rev() {
            let inputs = g * Q4_GROUP..((g + 1) * Q4_GROUP).min(k);
            let groups = &mut groups[g * lanes..][..lanes];
            if encoding == Encoding::Q4 {
                let mut cost = [0.0f32; Q4_GROUP];
                cost[..inputs.len()].copy_from_slice(&feedback.cost()[inputs.clone()]);
                for (lane, group) in groups.iter_mut().enumerate() {
                    let at = |i: usize| if i < k { adjusted[i * lanes + lane] } else { 0.0 };
                    *group = q4_group_scale(&std::array::from_fn(|i| at(inputs.start + i)), &cost);
                }
            }
            for i in inputs.rev() {
                let at = i * lanes..(i + 1) * lanes;
                for (lane, error) in errors.iter_mut().enumerate() {
                    let (x, group) = (adjusted[at.start + lane], groups[lane]);
                    let weight = match encoding {
                        Encoding::Q8 => (x.clamp(-Q8_MAX, Q8_MAX) + NEAREST) - NEAREST,
                        _ => q4_code(x, group) * f32::from(group),
                    };
                    weights[at.start + lane] = weight as i8;
                    *error = wanted[at.start + lane] - weight;
                }
                feedback.feed(isa, i, &errors, &mut adjusted[..at.start]);
            }
        }
        Rounded { scale, lanes, weights, groups }
    }

    /// The weights of output `n` `[taps * k_padded]`.
    fn weights_of(&self, n: usize, shape: WeightShape, out: &mut [i8]) {
        for (tap, out) in out.chunks_exact_mut(shape.k_padded()).enumerate() {
            let lane = n * shape.taps + tap;
            out[..shape.k].iter_mut().enumerate().for_each(|(i, w)| *w = self.weights[i * self.lanes + lane]);
        }
    }

    /// The scale of group `g` (padded, over all taps) of output `n`.
    fn group_of(&self, n: usize, shape: WeightShape, g: usize) -> i8 {
        let per_tap = shape.k_padded() / Q4_GROUP;
        let lane = n * shape.taps + g / per_tap;
        // The last group of a tap may be padding.
        self.groups.get(g % per_tap * self.lanes + lane).copied().unwrap_or(1)
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

/// Spreads the units of `B` bytes that output `n` has in each block of a tile.
fn scatter<const B: usize>(row: &[u8], n: usize, tiles: &mut [u8]) {
    for (unit, block) in row.as_chunks::<B>().0.iter().zip(tiles.chunks_exact_mut(TILE_N * B)) {
        block[n * B..][..B].copy_from_slice(unit);
    }
}

fn halves<T: bytemuck::Pod>(padded: &[f32], n: usize, tiles: &mut [u8], convert: impl Fn(&[f32], &mut [T])) {
    let mut codes = [T::zeroed(); TILE_K];
    for (padded, tile) in padded.chunks_exact(TILE_K).zip(tiles.chunks_exact_mut(2 * TILE_K * TILE_N)) {
        convert(padded, &mut codes);
        scatter::<4>(bytemuck::cast_slice(&codes), n, tile);
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
    let larger = |a: f32, x: f32| if x.abs() > a { x.abs() } else { a };
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [0.0f32; 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(a, &x)| *a = larger(*a, x));
    }
    lanes.iter().chain(rest).fold(0.0, |a, &x| larger(a, x))
}

/// Added to a number below 2^22, it leaves that number's nearest whole one (ties to even) in the last bits.
const NEAREST: f32 = 12_582_912.0; // 1.5 * 2^23

fn encode_q8(
    shape: WeightShape,
    padded: &[f32],
    codes: &mut [i8],
    n: usize,
    header: &mut [u8],
    tiles: &mut [u8],
) {
    let scale = amax(padded) / Q8_MAX;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (code, x) in codes.iter_mut().zip(padded) {
        *code = ((x * inverse).clamp(-Q8_MAX, Q8_MAX) + NEAREST).to_bits() as i8;
    }
    write_header(shape, scale, codes, n, header);
    scatter::<4>(bytemuck::cast_slice(codes), n, tiles);
}

/// The output's scale makes [`Q4_SCALE_MAX`] the group scale of its widest group.
fn encode_q4(
    shape: WeightShape,
    padded: &[f32],
    codes: &mut [i8],
    n: usize,
    header: &mut [u8],
    tiles: &mut [u8],
) {
    let scale = amax(padded) / Q4_WIDEST;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let groups_at = (1 + shape.taps) * TILE_N * 4;
    let groups = padded.as_chunks::<Q4_GROUP>().0;
    for (g, (group, weights)) in groups.iter().zip(codes.as_chunks_mut::<Q4_GROUP>().0).enumerate() {
        let scaled = group.map(|x| x * inverse);
        let s = q4_group_scale(&scaled, &[1.0; Q4_GROUP]);
        header[groups_at + g * TILE_N + n] = s as u8;
        let mut nibbles = [0u8; Q4_GROUP];
        for ((&x, weight), nibble) in scaled.iter().zip(weights).zip(&mut nibbles) {
            let code = q4_code(x, s);
            *weight = (code * f32::from(s)) as i8;
            *nibble = (code + 8.0) as u8;
        }
        write_nibbles(&nibbles, g, n, tiles);
    }
    write_header(shape, scale, codes, n, header);
}

/// Writes the codes of group `g` of output `n`.
fn write_nibbles(nibbles: &[u8; Q4_GROUP], g: usize, n: usize, tiles: &mut [u8]) {
    for (i, eight) in nibbles.as_chunks::<8>().0.iter().enumerate() {
        let (at, _) = q4_at(g * Q4_GROUP + 8 * i, n);
        for (j, byte) in tiles[at..][..4].iter_mut().enumerate() {
            *byte = eight[j] | eight[4 + j] << 4;
        }
    }
}

/// The group scale of weights in units of the output's scale: of those around the group's width, the one that leaves the
/// smallest squared error, where an error of each input costs `cost`. Codes reach from -8 to 7, so its sign lets the widest weight have the larger side.
fn q4_group_scale(scaled: &[f32; Q4_GROUP], cost: &[f32; Q4_GROUP]) -> i8 {
    let (low, high) = scaled.iter().fold((0.0f32, 0.0f32), |(l, h), &x| (l.min(x), h.max(x)));
    let (sign, narrow, wide) = if -low >= high { (1, high, -low) } else { (-1, -low, high) };
    let width = (wide / 8.0).max(narrow / 7.0).round() as i8;
    let (mut s, mut smallest) = (0, f32::INFINITY);
    for candidate in (width - 2).clamp(1, Q4_SCALE_MAX)..=(width + 1).clamp(1, Q4_SCALE_MAX) {
        let error = q4_error(scaled, cost, sign * candidate);
        if error < smallest || s == 0 {
            (s, smallest) = (sign * candidate, error);
        }
    }
    s
}

/// The code, less 8, of a weight in units of the output's scale.
fn q4_code(x: f32, s: i8) -> f32 {
    let low = if 8 * i32::from(s).abs() > 127 { -7.0 } else { -8.0 };
    ((x / f32::from(s) + NEAREST) - NEAREST).clamp(low, 7.0)
}

/// Squared error of a group under group scale `s`.
fn q4_error(scaled: &[f32; Q4_GROUP], cost: &[f32; Q4_GROUP], s: i8) -> f32 {
    let mut lanes = [0.0f32; 8];
    for (chunk, cost) in scaled.as_chunks::<8>().0.iter().zip(cost.as_chunks::<8>().0) {
        for ((lane, &x), cost) in lanes.iter_mut().zip(chunk).zip(cost) {
            let error = x - q4_code(x, s) * f32::from(s);
            *lane += cost * error * error;
        }
    }
    lanes.iter().sum()
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

    /// Rows of inputs that vary together, and how far the outputs of two matrices are apart for them.
    fn inputs(k: usize) -> Vec<f32> {
        let noise = source(WeightShape::linear(8 * k, k));
        let mix = |row: &[f32]| (0..k).map(|i| 0.5 + row[i] + 2.0 * row[i / 8 * 8]).collect::<Vec<f32>>();
        noise.chunks_exact(k).flat_map(mix).collect()
    }

    fn output_error(inputs: &[f32], k: usize, a: &[f32], b: &[f32]) -> f64 {
        let outputs = inputs.chunks_exact(k).flat_map(|x| {
            let rows = a.chunks_exact(k).zip(b.chunks_exact(k));
            rows.map(|(a, b)| x.iter().zip(a).zip(b).map(|((x, a), b)| f64::from(x * (a - b))).sum::<f64>())
        });
        outputs.map(|y| y * y).sum::<f64>().sqrt()
    }

    #[test]
    fn feedback_spares_the_outputs() {
        for (encoding, gain) in [(Encoding::Q8, 0.7), (Encoding::Q4, 0.7)] {
            for (n, taps, k) in [(16, 1, 64), (19, 3, 70), (2, 9, 33), (5, 1, 130)] {
                let shape = WeightShape { n, taps, k };
                let (src, x) = (source(shape), inputs(k));
                let mut moments = Moments::new(k);
                moments.add(Isa::detect(), &x, |lines, line| lines.into_iter().for_each(line));
                let feedback = Feedback::new(Isa::detect(), moments).expect("enough rows");
                let (mut plain, mut fed) =
                    (vec![0; shape.bytes(encoding)], vec![0xAA; shape.bytes(encoding)]);
                encode(encoding, shape, &src, &mut plain);
                encode_with(encoding, shape, &src, &feedback, Isa::detect(), &mut fed);
                let [plain, fed] =
                    [plain, fed].map(|bytes| output_error(&x, k, &src, &decode(encoding, shape, &bytes)));
                assert!(fed < gain * plain, "{encoding:?} {shape:?}: {plain} became {fed}");
            }
        }
    }

    fn relative_error(encoding: Encoding, shape: WeightShape, src: &[f32]) -> f64 {
        let mut bytes = vec![0; shape.bytes(encoding)];
        encode(encoding, shape, src, &mut bytes);
        let square = |x: f32| f64::from(x).powi(2);
        let error: f64 = src.iter().zip(decode(encoding, shape, &bytes)).map(|(a, b)| square(a - b)).sum();
        (error / src.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
    }

    #[test]
    fn wide_outputs_cost_the_others_nothing() {
        let shape = WeightShape::linear(320, 320);
        let plain = source(shape);
        let mut planted = plain.clone();
        for n in [3, 70, 150, 299] {
            planted[n * shape.k..][..shape.k].iter_mut().for_each(|x| *x *= 30.0);
        }
        for encoding in [Encoding::Q8, Encoding::Q4] {
            let [plain, planted] = [&plain, &planted].map(|src| relative_error(encoding, shape, src));
            assert!(planted < 1.1 * plain, "{encoding:?}: {plain} became {planted}");
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
