//! GGUF's block types: a few numbers that share a scale (ggml's `ggml-quants.c` is their definition).
#![forbid(unsafe_code)]

use half::f16;

/// A block type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
}

/// The values of `IQ4_NL` codes.
const NON_LINEAR: [f32; 16] =
    [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];

impl Block {
    /// By its number in the file.
    pub(super) fn of(kind: u32) -> Option<Block> {
        Some(match kind {
            2 => Block::Q4_0,
            3 => Block::Q4_1,
            6 => Block::Q5_0,
            7 => Block::Q5_1,
            8 => Block::Q8_0,
            10 => Block::Q2K,
            11 => Block::Q3K,
            12 => Block::Q4K,
            13 => Block::Q5K,
            14 => Block::Q6K,
            20 => Block::Iq4Nl,
            _ => return None,
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Block::Q4_0 => "q4_0",
            Block::Q4_1 => "q4_1",
            Block::Q5_0 => "q5_0",
            Block::Q5_1 => "q5_1",
            Block::Q8_0 => "q8_0",
            Block::Q2K => "q2_k",
            Block::Q3K => "q3_k",
            Block::Q4K => "q4_k",
            Block::Q5K => "q5_k",
            Block::Q6K => "q6_k",
            Block::Iq4Nl => "iq4_nl",
        }
    }

    /// Numbers in a block.
    pub(crate) fn len(self) -> usize {
        match self {
            Block::Q2K | Block::Q3K | Block::Q4K | Block::Q5K | Block::Q6K => 256,
            _ => 32,
        }
    }

    /// Bytes of a block.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Block::Q4_0 | Block::Iq4Nl => 18,
            Block::Q4_1 => 20,
            Block::Q5_0 => 22,
            Block::Q5_1 => 24,
            Block::Q8_0 => 34,
            Block::Q2K => 84,
            Block::Q3K => 110,
            Block::Q4K => 144,
            Block::Q5K => 176,
            Block::Q6K => 210,
        }
    }

    /// The values of whole blocks.
    pub(crate) fn to_f32(self, bytes: &[u8], out: &mut [f32]) {
        for (block, out) in bytes.chunks_exact(self.bytes()).zip(out.chunks_exact_mut(self.len())) {
            match self {
                Block::Q4_0 => nibbles(&block[2..], out, |q| (q as f32 - 8.0) * half(block, 0)),
                Block::Iq4Nl => nibbles(&block[2..], out, |q| NON_LINEAR[usize::from(q)] * half(block, 0)),
                Block::Q4_1 => nibbles(&block[4..], out, |q| q as f32 * half(block, 0) + half(block, 2)),
                Block::Q5_0 => {
                    nibbles(&block[6..], out, f32::from);
                    fifth_bits(&block[2..6], out);
                    out.iter_mut().for_each(|v| *v = (*v - 16.0) * half(block, 0));
                }
                Block::Q5_1 => {
                    nibbles(&block[8..], out, f32::from);
                    fifth_bits(&block[4..8], out);
                    out.iter_mut().for_each(|v| *v = *v * half(block, 0) + half(block, 2));
                }
                Block::Q8_0 => {
                    out.iter_mut()
                        .zip(&block[2..])
                        .for_each(|(v, &q)| *v = f32::from(q as i8) * half(block, 0));
                }
                Block::Q2K => q2_k(block, out),
                Block::Q3K => q3_k(block, out),
                Block::Q4K => q4_k(block, out, None, &block[16..]),
                Block::Q5K => q4_k(block, out, Some(&block[16..48]), &block[48..]),
                Block::Q6K => q6_k(block, out),
            }
        }
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Low halves are the first 16 numbers, high halves the others.
fn nibbles(codes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for ((low, high), code) in low.iter_mut().zip(high).zip(codes) {
        (*low, *high) = (value(code & 15), value(code >> 4));
    }
}

fn fifth_bits(bits: &[u8], out: &mut [f32]) {
    for (i, v) in out.iter_mut().enumerate() {
        *v += f32::from(bits[i / 8] >> (i % 8) & 1) * 16.0;
    }
}

/// 16 numbers share a scale and a minimum of 4 bits each.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, min) = (half(block, 80), half(block, 82));
    for (i, v) in out.iter_mut().enumerate() {
        // 128 numbers lie in 32 bytes: bits 0 and 1 are the first 32, and so on.
        let code = codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        let scale = scales[i / 16];
        *v = d * f32::from(scale & 15) * f32::from(code) - min * f32::from(scale >> 4);
    }
}

/// As `q2_k` with a third bit, and signed scales of 6 bits.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (mask, codes, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half(block, 108);
    for (i, v) in out.iter_mut().enumerate() {
        let group = i / 16;
        let low = packed[group % 8] >> (group / 8 * 4) & 15;
        let high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
        let scale = f32::from(low | high << 4) - 32.0;
        let code = codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        let third = mask[i % 32] >> (i / 32) & 1;
        *v = d * scale * (f32::from(code) - if third == 1 { 0.0 } else { 4.0 });
    }
}

/// 32 numbers share a scale and a minimum of 6 bits each; `fifth` holds the fifth bits of `q5_k`.
fn q4_k(block: &[u8], out: &mut [f32], fifth: Option<&[u8]>, codes: &[u8]) {
    let (d, min) = (half(block, 0), half(block, 2));
    let packed = &block[4..16];
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, low) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => (
                packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                packed[group + 4] >> 4 | packed[group] >> 6 << 4,
            ),
        };
        let (scale, low) = (d * f32::from(scale), min * f32::from(low));
        for (i, v) in out.iter_mut().enumerate() {
            let code = codes[group / 2 * 32 + i] >> (group % 2 * 4) & 15;
            let bit = fifth.map_or(0, |bits| bits[i] >> group & 1);
            *v = scale * f32::from(code | bit << 4) - low;
        }
    }
}

/// 16 numbers of 6 bits share a signed scale of 8.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half(block, 208);
    for (i, v) in out.iter_mut().enumerate() {
        let (half, quarter, lane) = (i / 128, i % 128 / 32, i % 32);
        let four = low[half * 64 + quarter % 2 * 32 + lane] >> (quarter / 2 * 4) & 15;
        let two = high[half * 32 + lane] >> (quarter * 2) & 3;
        *v = d * f32::from(scales[i / 16] as i8) * (f32::from(four | two << 4) - 32.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two blocks of every type with known bytes; the sums, plain and weighted by place, are those of ggml's own `gguf`
    /// package (0.19, `gguf.quants.dequantize`).
    #[test]
    fn the_values_of_ggml() {
        for (block, halves, sum, weighted) in [
            (Block::Q4_0, &[0][..], 2.75, -152.5),
            (Block::Q4_1, &[0, 2], 221.75, 8016.0),
            (Block::Q5_0, &[0], -24.0, -863.25),
            (Block::Q5_1, &[0, 2], 421.75, 15685.0),
            (Block::Q8_0, &[0], -67.5, -2319.25),
            (Block::Q2K, &[80, 82], -784.25, -280_974.25),
            (Block::Q3K, &[108], -30.25, 83_298.75),
            (Block::Q4K, &[0, 2], 29529.0, 7_895_823.0),
            (Block::Q5K, &[0, 2], 87091.0, 23_626_458.25),
            (Block::Q6K, &[208], -15043.25, -6_773_249.25),
            (Block::Iq4Nl, &[0], 87.75, -23.75),
        ] {
            let mut state = 12345u32;
            let mut bytes: Vec<u8> = (0..2 * block.bytes())
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) as u8
                })
                .collect();
            for (i, bytes) in bytes.chunks_exact_mut(block.bytes()).enumerate() {
                for (h, &at) in halves.iter().enumerate() {
                    let value = f16::from_f32(0.25 * ((h + 1) * (i + 1)) as f32);
                    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
                }
            }
            let mut out = vec![f32::NAN; 2 * block.len()];
            block.to_f32(&bytes, &mut out);
            let found: f64 = out.iter().map(|&v| f64::from(v)).sum();
            assert_eq!(found, sum, "{}", block.name());
            let found: f64 = (1..).zip(&out).map(|(i, &v)| f64::from(i) * f64::from(v)).sum();
            assert_eq!(found, weighted, "{}", block.name());
        }
    }
}
