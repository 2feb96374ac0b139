//! Attention with the n x n matrix, in f64.
#![forbid(unsafe_code)]

use crate::attention::{Attention, AttentionShape, Mask};
use crate::view::Rows;

fn get(rows: &Rows<'_>, i: usize) -> f64 {
    match rows {
        Rows::F32(x) => f64::from(x[i]),
        Rows::Bf16(x) => f64::from(x[i].to_f32()),
    }
}

/// `softmax(scale * q k^T + mask) v`, `[batch * nq, heads * d]`. `call.out` is not touched.
pub fn attention(call: &Attention<'_>) -> Vec<f64> {
    let AttentionShape { batch, nq, nk, heads, d } = call.shape;
    let mut out = vec![0.0; batch * nq * heads * d];
    for (b, h, i) in (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..nq).map(move |i| (b, h, i)))) {
        let q = (b * nq + i) * call.q_stride + h * d;
        let key = |j: usize| (b * nk + j) * call.kv_stride + h * d;
        let score = |j: usize| {
            let product: f64 = (0..d).map(|c| get(&call.q, q + c) * get(&call.k, key(j) + c)).sum();
            let masked = match call.mask {
                Mask::None => 0.0,
                Mask::Causal if j <= i => 0.0,
                Mask::Causal => f64::NEG_INFINITY,
                Mask::Bias(bias) => f64::from(bias[(h * nq + i) * nk + j]),
            };
            product * f64::from(call.scale) + masked
        };
        let scores: Vec<f64> = (0..nk).map(score).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let row = &mut out[((b * nq + i) * heads + h) * d..][..d];
        for (c, out) in row.iter_mut().enumerate() {
            *out = weights.iter().enumerate().map(|(j, w)| w * get(&call.v, key(j) + c)).sum::<f64>() / sum;
        }
    }
    out
}
