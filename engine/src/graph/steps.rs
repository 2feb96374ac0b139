//! What a plan is made of: buffers by number, and steps that read and write them.
#![forbid(unsafe_code)]

use kernels::attention::{AttentionShape, Products};
use kernels::gemm::Activation;
use kernels::view::ImageShape;

use super::bands::{BandOp, Bands};
use super::network::Dims;
use super::weight::WeightSpec;

/// A buffer of the plan, by number.
pub(super) type Buf = usize;

/// Element type of plain rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowsKind {
    F32,
    Bf16,
    /// Token ids.
    U32,
}

impl RowsKind {
    pub(super) fn bytes(self) -> usize {
        match self {
            RowsKind::F32 | RowsKind::U32 => 4,
            RowsKind::Bf16 => 2,
        }
    }
}

/// Plain rows `[pixels, c]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowsBuf {
    pub(super) buf: Buf,
    pub(super) kind: RowsKind,
    pub(super) c: usize,
}

impl RowsBuf {
    /// Bytes of so many of its rows.
    pub(super) fn bytes(&self, pixels: usize) -> u64 {
        (pixels * self.c * self.kind.bytes()) as u64
    }
}

/// Element type of a GEMM's left operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum OperandKind {
    U8,
    Bf16,
    F32,
}

impl OperandKind {
    pub(super) fn bytes(self) -> usize {
        match self {
            OperandKind::U8 => 1,
            OperandKind::Bf16 => 2,
            OperandKind::F32 => 4,
        }
    }
}

/// Rows of an operand, with border and slack, for one band.
#[derive(Clone, Copy, Debug)]
pub(super) struct OperandBuf {
    pub(super) buf: Buf,
    /// For `U8`: scales of the rows, or codings of the images.
    pub(super) scale: Option<Buf>,
    /// Whether there is a coding for each image, from statistics: then the products of all taps are
    /// summed as integers.
    pub(super) uniform: bool,
    pub(super) kind: OperandKind,
    pub(super) stride: usize,
}

/// One or two tensors side by side.
pub(super) type SourceBufs = [Option<RowsBuf>; 2];

/// How a pass normalizes; numbers are weights.
#[derive(Clone, Copy, Debug)]
pub(super) enum NormSpec {
    None,
    /// Not at all, but the range of the numbers is known: statistics of a single group.
    Range {
        stats: Buf,
    },
    Group {
        stats: Buf,
        groups: usize,
        gamma: usize,
        beta: usize,
    },
    Layer {
        gamma: usize,
        beta: usize,
        eps: f32,
    },
}

/// Where the residual of a GEMM comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum ResidualSpec {
    None,
    Rows(RowsBuf),
    /// From where the result goes.
    InPlace,
}

/// What a step does.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Bands(Bands),
    GroupStats {
        source: SourceBufs,
        image: ImageShape,
        groups: usize,
        eps: f32,
        sums: Buf,
        stats: Buf,
    },
    /// Statistics from the partial sums of bands.
    GroupFinish {
        sums: Buf,
        image: ImageShape,
        channels: usize,
        groups: usize,
        eps: f32,
        stats: Buf,
    },
    /// A value in the form of plain rows.
    Rows {
        source: SourceBufs,
        image: ImageShape,
        norm: NormSpec,
        activation: Activation,
        out: RowsBuf,
    },
    Attention {
        shape: AttentionShape,
        q: RowsBuf,
        k: RowsBuf,
        v: RowsBuf,
        causal: bool,
        products: Products,
        workspace: Buf,
        out: RowsBuf,
    },
    Lookup {
        ids: Buf,
        table: usize,
        positions: usize,
        out: RowsBuf,
    },
    Resize {
        x: RowsBuf,
        from: Dims,
        to: Dims,
        out: RowsBuf,
    },
    /// `batch` rows of f32, of the timestep at hand, from `from`, whose columns of pixels are timesteps.
    AtTimestep {
        x: RowsBuf,
        from: Dims,
        batch: usize,
        out: RowsBuf,
    },
}

/// One operation of a plan.
#[derive(Clone, Debug)]
pub struct Step {
    /// The layer it belongs to.
    pub path: String,
    pub(super) op: Op,
    /// Weights it reads, numbers in [`super::Plan::weights`].
    pub weights: Vec<usize>,
}

impl Step {
    /// What kind of work it is.
    pub fn kind(&self) -> &'static str {
        match &self.op {
            Op::Bands(b) => {
                let conv = |op: &BandOp| matches!(op, BandOp::Pass { filter, .. } if filter.kh > 1);
                if b.ops.iter().any(conv) { "conv" } else { "linear" }
            }
            Op::GroupStats { .. } | Op::GroupFinish { .. } => "norm",
            Op::Rows { .. } => "pass",
            Op::Attention { .. } => "attention",
            Op::Lookup { .. } => "lookup",
            Op::Resize { .. } | Op::AtTimestep { .. } => "resize",
        }
    }

    /// Bands it is cut into.
    pub fn tiles(&self) -> usize {
        match &self.op {
            Op::Bands(b) => b.count(),
            _ => 1,
        }
    }

    /// Multiplications and additions of its matrix products.
    pub fn operations(&self, weights: &[WeightSpec]) -> u64 {
        match &self.op {
            Op::Bands(b) => b.operations(weights),
            Op::Attention { shape: s, .. } => 4 * (s.batch * s.heads * s.nq * s.nk * s.d) as u64,
            _ => 0,
        }
    }
}

impl Op {
    /// Bytes that a step reads and writes, each counted once; of what runs band by band, [`Bands::work`] knows.
    pub(super) fn bytes(&self) -> u64 {
        let source = |s: &SourceBufs, pixels: usize| s.iter().flatten().map(|r| r.bytes(pixels)).sum::<u64>();
        match self {
            Op::Bands(_) | Op::GroupFinish { .. } | Op::Lookup { .. } => 0,
            Op::GroupStats { source: s, image, .. } => source(s, image.pixels()),
            Op::Rows { source: s, image, out, .. } => source(s, image.pixels()) + out.bytes(image.pixels()),
            Op::Attention { shape, q, k, v, out, .. } => {
                let (queries, keys) = (shape.batch * shape.nq, shape.batch * shape.nk);
                q.bytes(queries) + out.bytes(queries) + k.bytes(keys) + v.bytes(keys)
            }
            Op::Resize { x, from, to, out } => {
                x.bytes(from.batch * from.h * from.w) + out.bytes(to.batch * to.h * to.w)
            }
            Op::AtTimestep { batch, out, .. } => 2 * out.bytes(*batch),
        }
    }

    /// Buffers read, buffers written (a workspace counts as written).
    pub(super) fn buffers(&self) -> (Vec<Buf>, Vec<Buf>) {
        let source = |s: &SourceBufs| s.iter().flatten().map(|r| r.buf).collect::<Vec<_>>();
        let norm = |n: &NormSpec| match n {
            NormSpec::Group { stats, .. } | NormSpec::Range { stats } => Some(*stats),
            _ => None,
        };
        let (mut reads, mut writes) = (vec![], vec![]);
        match self {
            Op::Bands(b) => {
                for op in &b.ops {
                    match op {
                        BandOp::Pass { source: s, norm: n, out, .. } => {
                            reads.extend(source(s));
                            reads.extend(norm(n));
                            writes.push(out.buf);
                            writes.extend(out.scale);
                        }
                        BandOp::Gemm { image_bias, residual, out, .. } => {
                            reads.extend(*image_bias);
                            if let ResidualSpec::Rows(r) = residual {
                                reads.push(r.buf);
                            }
                            writes.push(out.buf);
                        }
                        BandOp::Sums { source: s, sums, .. } => {
                            reads.extend(source(s));
                            writes.push(*sums);
                        }
                    }
                }
            }
            Op::GroupFinish { sums, stats, .. } => {
                reads.push(*sums);
                writes.push(*stats);
            }
            Op::GroupStats { source: s, sums, stats, .. } => {
                reads = source(s);
                writes.extend([*sums, *stats]);
            }
            Op::Rows { source: s, norm: n, out, .. } => {
                reads = source(s);
                reads.extend(norm(n));
                writes.push(out.buf);
            }
            Op::Attention { q, k, v, workspace, out, .. } => {
                reads.extend([q.buf, k.buf, v.buf]);
                writes.extend([*workspace, out.buf]);
            }
            Op::Lookup { ids, out, .. } => {
                reads.push(*ids);
                writes.push(out.buf);
            }
            Op::Resize { x, out, .. } | Op::AtTimestep { x, out, .. } => {
                reads.push(x.buf);
                writes.push(out.buf);
            }
        }
        (reads, writes)
    }
}
