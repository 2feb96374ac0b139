//! Number types of checkpoints, and their values as f32.
#![forbid(unsafe_code)]

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::source::gguf_blocks::Block;

/// How numbers lie in a checkpoint, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    /// IEEE double.
    F64,
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of a single.
    Bf16,
    /// 4 bits of exponent, 3 of mantissa, no infinities.
    F8E4M3,
    /// 5 bits of exponent, 2 of mantissa.
    F8E5M2,
    /// GGUF blocks.
    Block(Block),
    /// Anything that isn't a weight: its name and the bytes of one number.
    Other(&'static str, usize),
}

impl Dtype {
    /// The name people see.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "f64",
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::F8E4M3 => "f8_e4m3",
            Dtype::F8E5M2 => "f8_e5m2",
            Dtype::Block(block) => block.name(),
            Dtype::Other(name, _) => name,
        }
    }

    /// Whether the numbers can be weights.
    pub(crate) fn is_float(self) -> bool {
        !matches!(self, Dtype::Other(..))
    }

    /// Numbers that can only be read together, and their bytes.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Dtype::F64 => (1, 8),
            Dtype::F32 => (1, 4),
            Dtype::F16 | Dtype::Bf16 => (1, 2),
            Dtype::F8E4M3 | Dtype::F8E5M2 => (1, 1),
            Dtype::Block(block) => (block.len(), block.bytes()),
            Dtype::Other(_, bytes) => (1, bytes),
        }
    }

    /// Bytes of `count` numbers; `None` where that is no whole number of blocks or too many.
    pub(crate) fn bytes(self, count: usize) -> Option<u64> {
        let (len, bytes) = self.block();
        if !count.is_multiple_of(len) {
            return None;
        }
        (count as u64 / len as u64).checked_mul(bytes as u64)
    }

    /// The values of `bytes` (as many as `out` holds).
    ///
    /// # Panics
    /// Where the lengths don't fit, or the numbers aren't weights.
    pub(crate) fn to_f32(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(self.bytes(out.len()), Some(bytes.len() as u64), "{} {}s", out.len(), self.name());
        match self {
            Dtype::F64 => {
                let words = bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32);
                out.iter_mut().zip(words).for_each(|(o, w)| *o = w);
            }
            Dtype::F32 => {
                let words = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
                out.iter_mut().zip(words).for_each(|(o, w)| *o = w);
            }
            Dtype::F16 => {
                let mut words = [f16::ZERO; 64];
                for (out, bytes) in out.chunks_mut(64).zip(bytes.chunks(128)) {
                    let words = &mut words[..out.len()];
                    let halves = bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b));
                    words.iter_mut().zip(halves).for_each(|(o, w)| *o = w);
                    words.convert_to_f32_slice(out);
                }
            }
            Dtype::Bf16 => {
                let words = bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32());
                out.iter_mut().zip(words).for_each(|(o, w)| *o = w);
            }
            Dtype::F8E4M3 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = f8e4m3(b)),
            Dtype::F8E5M2 => {
                // An e5m2 number is the upper byte of a half.
                out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = f16::from_bits(u16::from(b) << 8).to_f32());
            }
            Dtype::Block(block) => block.to_f32(bytes, out),
            Dtype::Other(name, _) => unreachable!("{name} numbers are turned away before they are read"),
        }
    }
}

/// e4m3fn (Micikevicius et al. 2022): bias 7, no infinities, NaN where all other bits are set.
fn f8e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 != 0 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    sign * match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(dtype: Dtype, bytes: &[u8]) -> f32 {
        let mut out = [0.0];
        dtype.to_f32(bytes, &mut out);
        out[0]
    }

    #[test]
    fn values() {
        assert_eq!(one(Dtype::F64, &(-1.5f64).to_le_bytes()), -1.5);
        assert_eq!(one(Dtype::F32, &3.25f32.to_le_bytes()), 3.25);
        assert_eq!(one(Dtype::F16, &f16::from_f32(0.1).to_le_bytes()), f16::from_f32(0.1).to_f32());
        assert_eq!(one(Dtype::Bf16, &bf16::from_f32(0.1).to_le_bytes()), bf16::from_f32(0.1).to_f32());
        for (byte, value) in
            [(0x38, 1.0), (0xB8, -1.0), (0x7E, 448.0), (0x01, 1.0 / 512.0), (0x08, 1.0 / 64.0)]
        {
            assert_eq!(one(Dtype::F8E4M3, &[byte]), value, "{byte:#x}");
        }
        assert!(one(Dtype::F8E4M3, &[0x7F]).is_nan());
        for (byte, value) in [(0x3C, 1.0), (0xBC, -1.0), (0x7B, 57344.0), (0x01, 1.0 / 65536.0)] {
            assert_eq!(one(Dtype::F8E5M2, &[byte]), value, "{byte:#x}");
        }
        assert!(one(Dtype::F8E5M2, &[0x7C]).is_infinite());
    }
}
