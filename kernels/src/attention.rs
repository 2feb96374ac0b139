//! softmax(scale * q k^T + mask) v in blocks, with a running maximum and sum: the n x n matrix never exists.

mod head;
mod vector;

use bytemuck::cast_slice_mut;

use crate::par::{SCRATCH_BYTES, Shared};
use crate::simd::{self, Element, Simd, dispatch};
use crate::view::{Rows, RowsMut};
use crate::{Isa, Workers, bf16};
use head::{KvHead, QueryHead, Write};

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
    /// A query sees keys up to its own position: `nq` is `nk`.
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

/// Keys that go through the running softmax at once.
const KEYS: usize = 128;

/// Bytes of packed keys and values to work on at a time, about: a head at least, and few enough to stay in cache.
const PACKED_BYTES: usize = 4 << 20;

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// Bytes of one packed head, a multiple of 64.
    head_bytes: usize,
    /// Heads (of all sequences) packed at a time.
    heads: usize,
    /// Queries in a block.
    queries: usize,
}

impl Plan {
    fn new(shape: &AttentionShape, isa: Isa) -> Plan {
        let head_bytes = (vector::head_elements(shape.nk, shape.d) * 4).next_multiple_of(64);
        let heads = (PACKED_BYTES / head_bytes.max(1)).clamp(1, (shape.batch * shape.heads).max(1));
        Plan { head_bytes, heads, queries: vector::queries(simd::lanes(isa)) }
    }
}

/// Bytes of working memory that [`attention`] wants for packed keys and values, for this shape and team.
pub fn workspace_bytes(shape: &AttentionShape, isa: Isa, products: Products, threads: usize) -> usize {
    let _ = (products, threads);
    let plan = Plan::new(shape, isa);
    plan.heads * plan.head_bytes
}

/// Runs `call`. `workspace` has at least [`workspace_bytes`] bytes, 64-byte aligned.
///
/// # Panics
/// Where shapes don't agree, and for a causal mask where `nq` isn't `nk`.
pub fn attention(workers: &Workers, isa: Isa, call: Attention<'_>, workspace: &mut [u8]) {
    let Attention { shape, q, q_stride, k, v, kv_stride, scale, mask, products, out } = call;
    let AttentionShape { batch, nq, nk, heads, d } = shape;
    let columns = heads * d;
    let fits = |len: usize, rows: usize, stride: usize| rows == 0 || len >= (rows - 1) * stride + columns;
    assert!(
        fits(q.len(), batch * nq, q_stride) && q_stride >= columns,
        "q of {} for {shape:?} by {q_stride}",
        q.len()
    );
    assert!(
        fits(k.len(), batch * nk, kv_stride) && kv_stride >= columns,
        "k of {} for {shape:?} by {kv_stride}",
        k.len()
    );
    assert!(fits(v.len(), batch * nk, kv_stride), "v of {} for {shape:?} by {kv_stride}", v.len());
    assert_eq!(out.len(), batch * nq * columns, "output of {shape:?}");
    assert!(nk > 0 && d > 0, "no keys: {shape:?}");
    assert!(scale > 0.0 && scale.is_finite(), "a scale of {scale}");
    match mask {
        Mask::None => {}
        Mask::Causal => assert_eq!(nq, nk, "a causal mask"),
        Mask::Bias(bias) => assert_eq!(bias.len(), heads * nq * nk, "bias of {shape:?}"),
    }
    let plan = Plan::new(&shape, isa);
    assert!(vector::scratch_elements(plan.queries, d) * 4 <= SCRATCH_BYTES, "heads of {d}");
    let bytes = plan.heads * plan.head_bytes;
    assert!(workspace.len() >= bytes, "workspace of {} bytes for {bytes}", workspace.len());
    let out = match out {
        RowsMut::F32(out) => Out::F32(Shared::new(out)),
        RowsMut::Bf16(out) => Out::Bf16(Shared::new(out)),
    };

    let blocks = nq.div_ceil(plan.queries);
    let packs = nk.div_ceil(KEYS);
    let (kd, vd) = (d, d.next_multiple_of(vector::PANEL));
    let padded = nk.next_multiple_of(vector::PANEL);
    for first in (0..batch * heads).step_by(plan.heads) {
        let count = plan.heads.min(batch * heads - first);
        let packed: &mut [f32] = cast_slice_mut(&mut workspace[..bytes]);
        let head_elements = plan.head_bytes / 4;
        let parts = Shared::new(packed);
        workers.for_each(count * packs, |task, _| {
            let (i, key) = (task / packs, task % packs * KEYS);
            let (sequence, head) = ((first + i) / heads, (first + i) % heads);
            let start = sequence * nk * kv_stride + head * d;
            let keys = KEYS.min(padded - key);
            // SAFETY: each task has its own keys of its own head.
            let to_k = unsafe { parts.slice(i * head_elements + key * kd, keys * kd) };
            // SAFETY: as above; V lies behind all of K.
            let to_v = unsafe { parts.slice(i * head_elements + padded * kd + key * vd, keys * vd) };
            let head = KvHead { k, v, start, stride: kv_stride, nk, d };
            dispatch(isa, vector::Pack { head, first: key, k: to_k, v: to_v });
        });
        let packed: &[f32] = packed;
        workers.for_each(count * blocks, |task, scratch| {
            let (i, block) = (task / blocks, task % blocks);
            let (sequence, head) = ((first + i) / heads, (first + i) % heads);
            let packed = &packed[i * head_elements..][..padded * (kd + vd)];
            let (k, v) = packed.split_at(padded * kd);
            let head = QueryHead { shape, sequence, head, q, stride: q_stride, scale, mask };
            let scratch = cast_slice_mut(scratch);
            let coarse = products != Products::F32;
            dispatch(
                isa,
                vector::Block { head, first: block * plan.queries, k, v, coarse, scratch, out: &out },
            );
        });
    }
}

/// The output, whose rows tasks write parts of.
enum Out<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, bf16>),
}

impl Write for &Out<'_> {
    #[inline(always)]
    fn write<S: Simd>(&mut self, s: S, at: usize, v: S::F, lanes: usize) {
        #[inline(always)]
        fn store<S: Simd, T: Element>(s: S, v: S::F, out: &Shared<'_, T>, at: usize, lanes: usize) {
            // SAFETY: the columns of a head in the rows of a block of queries belong to one task.
            let out = unsafe { out.slice(at, lanes) };
            if lanes == S::LANES { T::store(s, v, out) } else { T::store_partial(s, v, out) }
        }
        match self {
            Out::F32(out) => store(s, v, out, at, lanes),
            Out::Bf16(out) => store(s, v, out, at, lanes),
        }
    }
}

#[cfg(test)]
mod tests;
