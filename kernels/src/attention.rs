//! softmax(scale * q k^T + mask) v in blocks, with a running maximum and sum: the n x n matrix never exists.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_bytes;
mod codes;
#[cfg(target_arch = "x86_64")]
mod fused;
mod head;
mod integers;
#[cfg(target_arch = "x86_64")]
mod powers;
mod softmax;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod vector;

use std::marker::PhantomData;

use bytemuck::{cast_slice, cast_slice_mut};

use crate::layout::ALIGN;
use crate::par::{SCRATCH_BYTES, Shared};
use crate::simd::dot::{dispatch_dot, has_dot};
use crate::simd::{self, Element, Simd, dispatch};
use crate::view::{Rows, RowsMut};
use crate::{Isa, Workers, bf16};
use codes::{Bytes, Pairs};
use head::{KvHead, QueryHead, Write};

/// How exactly attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Products {
    /// f32 products and sums.
    F32,
    /// bf16 products where the tier is fast at them (AMX), else f32.
    Bf16,
    /// Dot products of bytes on AVX-512-VNNI and AVX-VNNI, AVX2 with 7 bits of some, and AMX for the scores of heads of 33 to
    /// 96, for many keys and without a mask: within 3 % (5 %, 1.5 %) of the greatest output for scores with a deviation of
    /// 1. For fewer keys 16-bit numbers of 11 bits and more, but on AMX. Otherwise as `Bf16`.
    Int8,
}

impl Products {
    /// What calls with a mask get: integer products know none.
    fn of_masked(self) -> Products {
        match self {
            Products::Int8 => Products::Bf16,
            other => other,
        }
    }
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

/// Keys that a task packs, of all heads at hand: a multiple of what packing pads to.
const PACK_KEYS: usize = 32;

/// Bytes of packed keys and values to work on at a time, about: a head at least, and few enough to stay in cache.
const PACKED_BYTES: usize = 4 << 20;

/// Bytes of packed keys and values up to which all heads take turns with a block of queries, whose rows are then in cache
/// for all but the first. Beyond, a head's blocks follow one another.
const TURNS_BYTES: usize = 1 << 20;

/// Keys from which on products of bytes are used. With fewer a key that is unlike all others is too many of a block, as the
/// first of a prompt often is.
const BYTES_KEYS: usize = 256;

/// Which code runs a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// f32 on vectors.
    Vector,
    /// Dot products of bytes on vectors.
    Bytes,
    /// Products of 16-bit numbers on vectors.
    Pairs,
    /// bf16 products on AMX tiles.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// Scores of bytes and sums of bf16 products on AMX tiles.
    #[cfg(target_arch = "x86_64")]
    AmxBytes,
}

/// How a call is cut up.
#[derive(Clone, Copy, Debug)]
struct Plan {
    kind: Kind,
    d: usize,
    /// Bytes of one packed head's K, and of its K and V.
    k_bytes: usize,
    head_bytes: usize,
    /// Heads (of all sequences) packed at a time.
    heads: usize,
    /// Queries in a block.
    queries: usize,
}

impl Plan {
    fn new(shape: &AttentionShape, isa: Isa, products: Products) -> Plan {
        let (kind, queries) = match (isa, products) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Amx, Products::Int8) if amx::available() && amx_bytes::suits(shape.nk, shape.d) => {
                (Kind::AmxBytes, amx_bytes::QUERIES)
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Amx, Products::Bf16 | Products::Int8) if amx::available() => {
                (Kind::Amx, amx::queries(shape.d))
            }
            (_, Products::Int8) if has_dot(isa) && shape.d <= integers::MAX_D => {
                let kind = if shape.nk >= BYTES_KEYS { Kind::Bytes } else { Kind::Pairs };
                (kind, integers::queries(simd::lanes(isa)))
            }
            _ => (Kind::Vector, vector::queries(simd::lanes(isa))),
        };
        let mut plan = Plan { kind, d: shape.d, k_bytes: 0, head_bytes: 0, heads: 1, queries };
        let (k, v) = plan.bytes(shape.nk);
        plan.k_bytes = k.next_multiple_of(ALIGN);
        plan.head_bytes = plan.k_bytes + v.next_multiple_of(ALIGN);
        plan.heads =
            (plan.packed_bytes() / plan.head_bytes.max(1)).clamp(1, (shape.batch * shape.heads).max(1));
        plan
    }

    /// Bytes of packed K and V of so many keys.
    fn bytes(&self, keys: usize) -> (usize, usize) {
        match self.kind {
            Kind::Vector => (4 * vector::k_elements(keys, self.d), 4 * vector::v_elements(keys, self.d)),
            Kind::Bytes => integers::packed_bytes::<Bytes>(keys, self.d),
            Kind::Pairs => integers::packed_bytes::<Pairs>(keys, self.d),
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => (2 * amx::k_elements(keys, self.d), 2 * amx::v_elements(keys, self.d)),
            #[cfg(target_arch = "x86_64")]
            Kind::AmxBytes => (amx_bytes::k_bytes(keys, self.d), 2 * amx_bytes::v_elements(keys, self.d)),
        }
    }

    /// Bytes of packed keys and values to work on at a time, about. Half of [`PACKED_BYTES`] for integer products, which then
    /// never want more than the others.
    fn packed_bytes(&self) -> usize {
        match self.kind {
            Kind::Bytes | Kind::Pairs => PACKED_BYTES / 2,
            #[cfg(target_arch = "x86_64")]
            Kind::AmxBytes => PACKED_BYTES / 2,
            _ => PACKED_BYTES,
        }
    }

    /// Keys that a task packs.
    fn pack_keys(&self) -> usize {
        match self.kind {
            Kind::Bytes | Kind::Pairs => integers::KEYS,
            #[cfg(target_arch = "x86_64")]
            Kind::AmxBytes => amx_bytes::PACK_KEYS,
            _ => PACK_KEYS,
        }
    }

    /// Scratch memory of a task.
    fn scratch_bytes(&self) -> usize {
        match self.kind {
            Kind::Vector => 4 * vector::scratch_elements(self.queries, self.d),
            Kind::Bytes => integers::scratch_bytes::<Bytes>(self.queries, self.d),
            Kind::Pairs => integers::scratch_bytes::<Pairs>(self.queries, self.d),
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => amx::scratch_bytes(self.d),
            #[cfg(target_arch = "x86_64")]
            Kind::AmxBytes => amx_bytes::scratch_bytes(self.d),
        }
    }
}

/// Bytes of working memory that [`attention`] wants for packed keys and values, for this shape and team.
pub fn workspace_bytes(shape: &AttentionShape, isa: Isa, products: Products, threads: usize) -> usize {
    let _ = threads;
    let plan = Plan::new(shape, isa, products);
    let bytes = plan.heads * plan.head_bytes;
    // With a mask one head at a time is enough.
    bytes.max(Plan::new(shape, isa, products.of_masked()).head_bytes)
}

/// Runs `call`. `workspace` has at least [`workspace_bytes`] bytes, 64-byte aligned.
///
/// # Panics
/// Where shapes don't agree, for a causal mask where `nq` isn't `nk`, and where the machine doesn't have `isa`.
pub fn attention(workers: &Workers, isa: Isa, call: Attention<'_>, workspace: &mut [u8]) {
    let Attention { shape, q, q_stride, k, v, kv_stride, scale, mask, products, out } = call;
    let AttentionShape { batch, nq, nk, heads, d } = shape;
    let columns = heads * d;
    let fits = |len: usize, rows: usize, stride: usize| rows == 0 || len >= (rows - 1) * stride + columns;
    assert!(isa.is_available(), "no {isa:?} here");
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
    let products = if matches!(mask, Mask::None) { products } else { products.of_masked() };
    let mut plan = Plan::new(&shape, isa, products);
    plan.heads = plan.heads.min(workspace.len() / plan.head_bytes).max(1);
    assert!(plan.scratch_bytes() <= SCRATCH_BYTES, "heads of {d}");
    let bytes = plan.heads * plan.head_bytes;
    assert!(workspace.len() >= bytes, "workspace of {} bytes for {bytes}", workspace.len());
    assert_eq!(workspace.as_ptr().align_offset(ALIGN), 0, "workspace is aligned");
    let out = match out {
        RowsMut::F32(out) => Out::F32(Shared::new(out)),
        RowsMut::Bf16(out) => Out::Bf16(Shared::new(out)),
    };

    let blocks = nq.div_ceil(plan.queries);
    let lines = out.heads_of_lines(d);
    let pack_keys = plan.pack_keys();
    let packs = nk.div_ceil(pack_keys);
    for first in (0..batch * heads).step_by(plan.heads) {
        let count = plan.heads.min(batch * heads - first);
        let place = |i: usize| ((first + i) / heads, (first + i) % heads);
        let packed = &mut workspace[..bytes];
        let parts = Shared::new(packed);
        // The heads of a row lie side by side, so they are packed together, unless keys are too few to keep all threads busy.
        let shares = if packs < workers.threads() { workers.threads().min(count) } else { 1 };
        workers.for_each(packs * shares, |task, scratch| {
            let (key, share) = (task / shares * pack_keys, task % shares);
            let (before, here) = (plan.bytes(key), plan.bytes(pack_keys.min(nk - key)));
            for i in count * share / shares..count * (share + 1) / shares {
                let (sequence, head) = place(i);
                let start = sequence * nk * kv_stride + head * d;
                let head = KvHead { k, v, start, stride: kv_stride, nk, d };
                let at = i * plan.head_bytes;
                // SAFETY: each task has its own keys of its own heads.
                let to_k = unsafe { parts.slice(at + before.0, here.0) };
                // SAFETY: as above; V lies behind all of K.
                let to_v = unsafe { parts.slice(at + plan.k_bytes + before.1, here.1) };
                match plan.kind {
                    Kind::Vector => {
                        let (k, v) = (cast_slice_mut(to_k), cast_slice_mut(to_v));
                        dispatch(isa, vector::Pack { head, first: key, k, v });
                    }
                    Kind::Bytes => {
                        let (k, v) = (cast_slice_mut(to_k), cast_slice_mut(to_v));
                        let scratch = cast_slice_mut(&mut *scratch);
                        dispatch_dot(
                            isa,
                            integers::Pack { codes: PhantomData::<Bytes>, head, first: key, k, v, scratch },
                        );
                    }
                    Kind::Pairs => {
                        let (k, v) = (cast_slice_mut(to_k), cast_slice_mut(to_v));
                        let scratch = cast_slice_mut(&mut *scratch);
                        dispatch_dot(
                            isa,
                            integers::Pack { codes: PhantomData::<Pairs>, head, first: key, k, v, scratch },
                        );
                    }
                    #[cfg(target_arch = "x86_64")]
                    Kind::Amx => {
                        let (k, v) = (cast_slice_mut(to_k), cast_slice_mut(to_v));
                        dispatch(isa, amx::Pack { head, first: key, k, v });
                    }
                    #[cfg(target_arch = "x86_64")]
                    Kind::AmxBytes => {
                        dispatch(isa, amx_bytes::Pack { head, first: key, k: to_k, v: cast_slice_mut(to_v) });
                    }
                }
            }
        });
        let packed: &[u8] = packed;
        let turns = count * plan.head_bytes <= TURNS_BYTES;
        // In turns threads write to heads side by side.
        let together = if turns { lines } else { 1 };
        let groups = count.div_ceil(together);
        let block_of = |i: usize, block: usize, scratch: &mut [u8]| {
            let first = block * plan.queries;
            let (sequence, head) = place(i);
            let head = QueryHead { shape, sequence, head, q, stride: q_stride, scale, mask };
            let (k, v) = packed[i * plan.head_bytes..][..plan.head_bytes].split_at(plan.k_bytes);
            let out = &out;
            match plan.kind {
                Kind::Vector => {
                    let (k, v, scratch) = (cast_slice(k), cast_slice(v), cast_slice_mut(scratch));
                    let coarse = products != Products::F32;
                    dispatch(isa, vector::Block { head, first, k, v, coarse, scratch, out });
                }
                Kind::Bytes => {
                    let (k, v, scratch) = (cast_slice(k), cast_slice(v), cast_slice_mut(scratch));
                    dispatch_dot(
                        isa,
                        integers::Block { codes: PhantomData::<Bytes>, head, first, k, v, scratch, out },
                    );
                }
                Kind::Pairs => {
                    let (k, v, scratch) = (cast_slice(k), cast_slice(v), cast_slice_mut(scratch));
                    dispatch_dot(
                        isa,
                        integers::Block { codes: PhantomData::<Pairs>, head, first, k, v, scratch, out },
                    );
                }
                #[cfg(target_arch = "x86_64")]
                Kind::Amx => {
                    // SAFETY: the machine has AMX (checked above) and VBMI (the plan), and tasks do not nest.
                    let tiles = &unsafe { tiles::Tiles::new() };
                    let (k, v) = (cast_slice(k), cast_slice(v));
                    dispatch(isa, amx::Block { head, first, k, v, scratch, out, tiles });
                }
                #[cfg(target_arch = "x86_64")]
                Kind::AmxBytes => {
                    // SAFETY: as above.
                    let tiles = &unsafe { tiles::Tiles::new() };
                    let v = cast_slice(v);
                    dispatch(isa, amx_bytes::Block { head, first, k, v, scratch, out, tiles });
                }
            }
        };
        workers.for_each(groups * blocks, |task, scratch| {
            let (group, block) =
                if turns { (task % groups, task / groups) } else { (task / blocks, task % blocks) };
            for i in group * together..count.min((group + 1) * together) {
                block_of(i, block, scratch);
            }
        });
    }
}

/// The output, whose rows tasks write parts of.
enum Out<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, bf16>),
}

impl Out<'_> {
    /// The fewest heads of `d` numbers that fill whole lines of the cache. Two threads that write to one line at a time would take
    /// it from each other again and again.
    fn heads_of_lines(&self, d: usize) -> usize {
        let bytes = match self {
            Out::F32(_) => d * size_of::<f32>(),
            Out::Bf16(_) => d * size_of::<bf16>(),
        };
        ALIGN >> bytes.trailing_zeros().min(ALIGN.trailing_zeros())
    }
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

    #[inline(always)]
    fn prefetch<S: Simd>(&self, s: S, at: usize, n: usize) {
        #[inline(always)]
        fn prefetch<S: Simd, T: Element>(s: S, out: &Shared<'_, T>, at: usize, n: usize) {
            // SAFETY: as in `write`.
            let out = unsafe { out.slice(at, n) };
            for ahead in (0..size_of_val(out)).step_by(64) {
                s.prefetch(out, ahead);
            }
            s.prefetch(out, size_of_val(out) - 1);
        }
        match self {
            Out::F32(out) => prefetch(s, out, at, n),
            Out::Bf16(out) => prefetch(s, out, at, n),
        }
    }
}

#[cfg(test)]
mod tests;
