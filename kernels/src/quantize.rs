//! f32 matrices to encoded panels and back.

use crate::layout::{Encoding, WeightShape};

/// Encodes `src`, `[n, taps * k]` row-major f32 (taps outermost), into `out` of `shape.bytes(encoding)` bytes.
pub fn encode(encoding: Encoding, shape: WeightShape, src: &[f32], out: &mut [u8]) {
    let _ = (encoding, shape, src, out);
    unimplemented!()
}

/// The numbers that `bytes` stand for, `[n, taps * k]` row-major.
pub fn decode(encoding: Encoding, shape: WeightShape, bytes: &[u8]) -> Vec<f32> {
    let _ = (encoding, shape, bytes);
    unimplemented!()
}
