//! softmax(scale * q k^T + mask) v in blocks, with a running maximum and sum: the n x n matrix never exists.

use crate::view::{Rows, RowsMut};
use crate::{Isa, Workers};

/// How exactly attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Products {
    /// f32 products and sums.
    F32,
    /// bf16 products where the tier is fast at them (AMX), else f32.
    Bf16,
    /// int8 products where they pay and the measured error allows, else as `Bf16`.
    Int8,
}

/// What is added to the scores.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a> {
    /// Nothing.
    None,
    /// A query sees keys up to its own position.
    Causal,
    /// `[heads, nq, nk]`, added to the scaled scores.
    Bias(&'a [f32]),
}

/// Sizes of an attention call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Independent sequences.
    pub batch: usize,
    /// Queries per sequence.
    pub nq: usize,
    /// Keys per sequence.
    pub nk: usize,
    /// Heads.
    pub heads: usize,
    /// Size of a head.
    pub d: usize,
}

/// One call. A row of `q`, `k`, `v` and `out` holds all heads: `heads * d` columns, head by head; row strides are given
/// in elements so that q, k and v may be column ranges of one tensor.
#[derive(Debug)]
pub struct Attention<'a> {
    /// Sizes.
    pub shape: AttentionShape,
    /// `[batch * nq, q_stride]`.
    pub q: Rows<'a>,
    /// Elements from one row of `q` to the next.
    pub q_stride: usize,
    /// `[batch * nk, kv_stride]`.
    pub k: Rows<'a>,
    /// `[batch * nk, kv_stride]`.
    pub v: Rows<'a>,
    /// Elements from one row of `k` and `v` to the next.
    pub kv_stride: usize,
    /// Usually `1 / sqrt(d)`.
    pub scale: f32,
    /// Added to the scores.
    pub mask: Mask<'a>,
    /// How exactly.
    pub products: Products,
    /// `[batch * nq, heads * d]`.
    pub out: RowsMut<'a>,
}

/// Bytes of working memory that [`attention`] wants for packed keys and values, for this shape and team.
pub fn workspace_bytes(shape: &AttentionShape, isa: Isa, products: Products, threads: usize) -> usize {
    let _ = (shape, isa, products, threads);
    unimplemented!()
}

/// Runs `call`. `workspace` has at least [`workspace_bytes`] bytes, 64-byte aligned.
pub fn attention(workers: &Workers, isa: Isa, call: Attention<'_>, workspace: &mut [u8]) {
    let _ = (workers, isa, call, workspace);
    unimplemented!()
}
