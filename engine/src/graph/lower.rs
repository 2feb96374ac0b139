//! From a network to steps: which form each value takes, which passes make it, what is done band by band together.
#![forbid(unsafe_code)]

use kernels::Isa;
use kernels::attention::{self, AttentionShape, Products};
use kernels::gemm::{Activation, Filter};
use kernels::layout::{Encoding, TILE_K, WeightShape};
use kernels::view::{Border, ImageShape};

use super::builder::{Dims, Network, Node, Rate, Tensor};
use super::steps::{
    BandOp, Bands, Buf, NormSpec, Op, OperandBuf, OperandKind, ResidualSpec, RowsBuf, RowsKind, SourceBufs,
    Step,
};
use crate::precision::Precision;

/// What the lowering depends on beside the network.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How activations are held.
    pub precision: Precision,
    /// Instruction sets.
    pub isa: Isa,
    /// Size of the team.
    pub threads: usize,
    /// Bytes that the operands and inner values of a band may take.
    pub band_bytes: usize,
    /// Bytes of weights that a step may read, unless it is a single layer that has more.
    pub step_weight_bytes: usize,
}

impl Options {
    /// Bands that stay in a core's second-level cache, steps of no more weights than the largest layer of SD 1.5.
    pub fn new(precision: Precision, isa: Isa, threads: usize) -> Self {
        Options { precision, isa, threads, band_bytes: 1 << 20, step_weight_bytes: 32 << 20 }
    }
}

/// The steps of a network and the sizes of their buffers.
#[derive(Debug)]
pub(super) struct Lowered {
    pub(super) steps: Vec<Step>,
    /// Steps before this one depend on inputs of rate `Run` alone.
    pub(super) prologue: usize,
    /// Sizes of the buffers.
    pub(super) bytes: Vec<usize>,
    pub(super) inputs: Vec<(String, RowsBuf, Rate)>,
    pub(super) outputs: Vec<(String, RowsBuf)>,
}

/// Lowers `network`; `encodings` as in [`super::Plan::new`].
pub(super) fn lower(network: &Network, encodings: &[Option<Encoding>], options: Options) -> Lowered {
    let mut l = Lowering {
        network,
        encodings,
        options,
        stream: stream_values(network),
        last_use: last_uses(network),
        rows: vec![None; network.values.len()],
        bytes: vec![],
        steps: vec![],
        inputs: vec![],
    };
    let mut prologue = 0;
    for (at, i) in network.order().enumerate() {
        l.node(i, at);
        if network.values[i].rate == Rate::Run {
            prologue = l.steps.len();
        }
    }
    let outputs: Vec<_> = network.outputs.iter().map(|(name, t)| (name.clone(), l.rows_of(*t))).collect();
    if network.values.iter().all(|v| v.rate == Rate::Run) {
        prologue = l.steps.len(); // an output's own pass included
    }
    let Lowering { mut bytes, mut steps, inputs, .. } = l;
    for step in &mut steps {
        if let Op::Bands(b) = &mut step.op {
            size_bands(b, options.band_bytes, &mut bytes);
        }
    }
    Lowered { steps, prologue, bytes, inputs, outputs }
}

/// Values of the residual stream, which stay f32 in every precision: sums that go on through many layers, what is added to
/// them, and what the caller writes and reads.
fn stream_values(network: &Network) -> Vec<bool> {
    let mut stream = vec![false; network.values.len()];
    for (i, node) in network.nodes.iter().enumerate() {
        match *node {
            Node::Input { .. } | Node::Lookup { .. } => stream[i] = true,
            Node::Gemm { residual, image_bias, .. } => {
                for t in [residual, image_bias].into_iter().flatten() {
                    stream[t.0] = true;
                }
                stream[i] |= residual.is_some();
            }
            _ => {}
        }
    }
    for (_, t) in &network.outputs {
        stream[t.0] = true;
    }
    stream
}

/// For each value, the place in execution order of the last node that reads it, and whether only that one does. Norms,
/// activations and concatenations read when their readers do. Outputs are read at the end.
fn last_uses(network: &Network) -> Vec<(usize, usize)> {
    let mut uses = vec![(0, 0); network.values.len()]; // (last, readers)
    let mut visit = |t: Tensor, at: usize| {
        let mut open = vec![t];
        while let Some(t) = open.pop() {
            let (last, readers) = uses[t.0];
            uses[t.0] = (last.max(at), readers + 1);
            if matches!(
                network.nodes[t.0],
                Node::GroupNorm { .. } | Node::LayerNorm { .. } | Node::Activate { .. } | Node::Concat { .. }
            ) {
                open.extend(network.nodes[t.0].inputs());
            }
        }
    };
    for (at, i) in network.order().enumerate() {
        match &network.nodes[i] {
            Node::GroupNorm { .. } | Node::LayerNorm { .. } | Node::Activate { .. } | Node::Concat { .. } => {
            }
            node => node.inputs().into_iter().for_each(|t| visit(t, at)),
        }
    }
    for (_, t) in &network.outputs {
        visit(*t, usize::MAX);
    }
    uses
}

struct Lowering<'a> {
    network: &'a Network,
    encodings: &'a [Option<Encoding>],
    options: Options,
    stream: Vec<bool>,
    last_use: Vec<(usize, usize)>,
    /// Values in memory as plain rows.
    rows: Vec<Option<RowsBuf>>,
    bytes: Vec<usize>,
    steps: Vec<Step>,
    inputs: Vec<(String, RowsBuf, Rate)>,
}

impl Lowering<'_> {
    fn buffer(&mut self, bytes: usize) -> Buf {
        self.bytes.push(bytes);
        self.bytes.len() - 1
    }

    fn rows_kind(&self, t: Tensor) -> RowsKind {
        let exact = self.options.precision == Precision::Exact;
        if exact || self.stream[t.0] { RowsKind::F32 } else { RowsKind::Bf16 }
    }

    fn new_rows(&mut self, t: Tensor, kind: RowsKind) -> RowsBuf {
        let v = &self.network.values[t.0];
        let (pixels, c) = (v.dims.pixels(), v.c);
        let rows = RowsBuf { buf: self.buffer(pixels * c * kind.bytes()), kind, c };
        self.rows[t.0] = Some(rows);
        rows
    }

    fn step(&mut self, t: Tensor, op: Op, weights: Vec<usize>) {
        self.steps.push(Step { path: self.network.paths[t.0].clone(), op, weights });
    }

    fn image(&self, t: Tensor) -> ImageShape {
        let Dims { batch, h, w } = self.network.values[t.0].dims;
        ImageShape { batch, h, w, border: Border::default() }
    }

    /// The tensors whose columns make up `t`.
    fn source(&mut self, t: Tensor) -> SourceBufs {
        match self.network.nodes[t.0] {
            Node::Concat { a, b } => [Some(self.rows_of(a)), Some(self.rows_of(b))],
            _ => [Some(self.rows_of(t)), None],
        }
    }

    /// `t` as plain rows, made now if nothing made them before.
    fn rows_of(&mut self, t: Tensor) -> RowsBuf {
        if let Some(rows) = self.rows[t.0] {
            return rows;
        }
        let (source, norm, activation, weights) = self.pass_into(t);
        let kind = self.rows_kind(t);
        let out = self.new_rows(t, kind);
        let image = self.image(t);
        self.step(t, Op::Rows { source, image, norm, activation, out }, weights);
        out
    }

    /// What a pass that makes `t` reads and does. Statistics that it needs are a step of their own.
    fn pass_into(&mut self, t: Tensor) -> (SourceBufs, NormSpec, Activation, Vec<usize>) {
        match self.network.nodes[t.0] {
            Node::GroupNorm { x, gamma, beta, groups, eps, activation } => {
                let source = self.source(x);
                let image = self.image(x);
                let stats = self.buffer(image.batch * groups * 2 * 4);
                self.step(t, Op::GroupStats { source, image, groups, eps, stats }, vec![]);
                (source, NormSpec::Group { stats, groups, gamma, beta }, activation, vec![gamma, beta])
            }
            Node::LayerNorm { x, gamma, beta, eps } => {
                (self.source(x), NormSpec::Layer { gamma, beta, eps }, Activation::None, vec![gamma, beta])
            }
            Node::Activate { x, activation } => (self.source(x), NormSpec::None, activation, vec![]),
            _ => (self.source(t), NormSpec::None, Activation::None, vec![]),
        }
    }

    fn operand_kind(&self, weight: usize) -> OperandKind {
        let encoding = self.encodings[weight].expect("a matrix has an encoding");
        match self.options.precision {
            Precision::Exact => OperandKind::F32,
            Precision::Fast if encoding.is_integer() => OperandKind::U8,
            _ => OperandKind::Bf16,
        }
    }

    fn weight_shape(&self, weight: usize) -> WeightShape {
        self.network.weights()[weight].kind.shape().expect("a GEMM has a matrix")
    }

    fn weight_bytes(&self, weights: &[usize]) -> usize {
        let bytes = |&w: &usize| self.encodings[w].map_or(0, |e| self.weight_shape(w).bytes(e));
        weights.iter().map(bytes).sum()
    }

    fn new_operand(&mut self, kind: OperandKind, c: usize) -> OperandBuf {
        let scale = (kind == OperandKind::U8).then(|| self.buffer(0));
        OperandBuf { buf: self.buffer(0), scale, kind, stride: c.next_multiple_of(TILE_K) }
    }

    /// Node `i`, at place `at` of the execution order.
    fn node(&mut self, i: usize, at: usize) {
        let t = Tensor(i);
        match self.network.nodes[i].clone() {
            Node::Input { name, ids } => {
                let kind = if ids { RowsKind::U32 } else { RowsKind::F32 };
                let rows = self.new_rows(t, kind);
                self.inputs.push((name, rows, self.network.values[i].rate));
            }
            // Made by the pass of whoever reads them.
            Node::GroupNorm { .. } | Node::LayerNorm { .. } | Node::Activate { .. } | Node::Concat { .. } => {
            }
            Node::Gemm { .. } => self.gemm(t, at),
            Node::Attention { q, k, v, heads, causal } => {
                let (qd, kd) = (self.network.values[q.0].dims, self.network.values[k.0].dims);
                let shape = AttentionShape {
                    batch: qd.batch,
                    nq: qd.h * qd.w,
                    nk: kd.h * kd.w,
                    heads,
                    d: self.network.values[q.0].c / heads,
                };
                let products = match self.options.precision {
                    Precision::Exact => Products::F32,
                    Precision::High => Products::Bf16,
                    Precision::Fast => Products::Int8,
                };
                let [q, k, v] = [q, k, v].map(|t| self.rows_of(t));
                let Options { isa, threads, .. } = self.options;
                let workspace = self.buffer(attention::workspace_bytes(&shape, isa, products, threads));
                let out = self.new_rows(t, self.rows_kind(t));
                self.step(t, Op::Attention { shape, q, k, v, causal, products, workspace, out }, vec![]);
            }
            Node::Lookup { ids, table, positions } => {
                let ids = self.rows_of(ids).buf;
                let out = self.new_rows(t, RowsKind::F32);
                self.step(t, Op::Lookup { ids, table, positions, out }, vec![table, positions]);
            }
            Node::Resize { x } => {
                let (from, to) = (self.network.values[x.0].dims, self.network.values[i].dims);
                let x = self.rows_of(x);
                let out = self.new_rows(t, x.kind);
                self.step(t, Op::Resize { x, from, to, out }, vec![]);
            }
        }
    }

    fn gemm(&mut self, t: Tensor, at: usize) {
        let Node::Gemm { x, weight, bias, filter, border, image_bias, activation, residual } =
            self.network.nodes[t.0].clone()
        else {
            unreachable!("called for GEMM nodes")
        };
        let kind = self.operand_kind(weight);
        let image_bias = image_bias.map(|t| self.rows_of(t).buf);
        let residual_rows = residual.map(|t| self.rows_of(t));
        let joins = self.joins(t, x, weight, kind, filter, border);
        let mut ops = vec![];
        let mut weights = vec![];
        let operand = match joins {
            Some(Join::Operand(operand)) => operand,
            Some(Join::Inner) => {
                let source = [self.rows[x.0], None];
                let out = self.new_operand(kind, self.network.values[x.0].c);
                ops.push(BandOp::Pass { source, norm: NormSpec::None, activation: Activation::None, out });
                out
            }
            None => {
                let (source, norm, activation, w) = self.pass_into(x);
                weights = w;
                let out = self.new_operand(kind, self.network.values[x.0].c);
                ops.push(BandOp::Pass { source, norm, activation, out });
                out
            }
        };
        weights.push(weight);
        weights.extend(bias);

        let out_kind = self.rows_kind(t);
        let residual_dies = |l: &Self, r: Tensor| {
            let same_rate = l.network.values[r.0].rate == l.network.values[t.0].rate;
            let input = matches!(l.network.nodes[r.0], Node::Input { .. });
            same_rate && !input && l.last_use[r.0].0 == at
        };
        let (residual, out) = match (residual, residual_rows) {
            // A filter that reaches beyond its pixel could meet what the band before has already overwritten.
            (Some(r), Some(rows))
                if rows.kind == out_kind
                    && residual_dies(self, r)
                    && (filter == Filter::POINT || !self.reads(x, r)) =>
            {
                self.rows[t.0] = Some(rows);
                (ResidualSpec::InPlace, rows)
            }
            (_, Some(rows)) => (ResidualSpec::Rows(rows), self.new_rows(t, out_kind)),
            _ => (ResidualSpec::None, self.new_rows(t, out_kind)),
        };
        ops.push(BandOp::Gemm { operand, weight, bias, image_bias, activation, residual, out });

        match joins {
            None => {
                let (input, output) = (self.network.values[x.0].dims, self.network.values[t.0].dims);
                let flat = |d: Dims| Dims { batch: d.batch, h: d.h * d.w, w: 1 };
                let (input, output) =
                    if filter == Filter::POINT { (flat(input), flat(output)) } else { (input, output) };
                let bands =
                    Bands { input, filter, border, output, rows: 0, ops, local: operand_buffers(operand) };
                self.step(t, Op::Bands(bands), weights);
            }
            Some(join) => {
                let inner = self.rows[x.0].map(|r| r.buf);
                let step = self.steps.last_mut().expect("there is a step to join");
                step.weights.extend(weights);
                let Op::Bands(bands) = &mut step.op else { unreachable!("only bands are joined") };
                bands.ops.extend(ops);
                if matches!(join, Join::Inner) {
                    bands.local.extend(inner);
                    bands.local.extend(operand_buffers(operand));
                }
            }
        }
    }

    /// Whether the value `x` is made from `r`.
    fn reads(&self, x: Tensor, r: Tensor) -> bool {
        x == r
            || match &self.network.nodes[x.0] {
                node @ (Node::GroupNorm { .. }
                | Node::LayerNorm { .. }
                | Node::Activate { .. }
                | Node::Concat { .. }) => node.inputs().into_iter().any(|t| self.reads(t, r)),
                _ => false,
            }
    }

    /// Whether the GEMM `t` of `x` can go on where the last step is: because that step has made the operand already, or
    /// because it makes `x` itself, for nobody else.
    fn joins(
        &self,
        t: Tensor,
        x: Tensor,
        weight: usize,
        kind: OperandKind,
        filter: Filter,
        border: Border,
    ) -> Option<Join> {
        let step = self.steps.last()?;
        let Op::Bands(bands) = &step.op else { return None };
        let rate = |t: Tensor| self.network.values[t.0].rate;
        let total = self.weight_bytes(&step.weights) + self.weight_bytes(&[weight]);
        let made_by = |t: Tensor| {
            let rows = self.rows[t.0]?.buf;
            // A sum that goes where its residual was is whole: it can't be local.
            bands.ops.iter().find(|op| match op {
                BandOp::Gemm { out, residual, .. } => {
                    out.buf == rows && !matches!(residual, ResidualSpec::InPlace)
                }
                BandOp::Pass { .. } => false,
            })
        };
        if total > self.options.step_weight_bytes {
            return None;
        }
        // The step's own rate: that of its GEMMs.
        let last = Tensor(*self.step_nodes().last()?);
        if rate(last) != rate(t) {
            return None;
        }
        if filter == Filter::POINT
            && bands.filter == Filter::POINT
            && self.last_use[x.0].1 == 1
            && made_by(x).is_some()
        {
            return Some(Join::Inner);
        }
        let Node::Gemm { x: last_x, filter: last_filter, border: last_border, .. } =
            self.network.nodes[last.0]
        else {
            return None;
        };
        let same = last_x == x && last_filter == filter && last_border == border;
        let operand = bands.ops.iter().rev().find_map(|op| match op {
            BandOp::Pass { out, .. } => Some(*out),
            BandOp::Gemm { .. } => None,
        })?;
        (same && operand.kind == kind).then_some(Join::Operand(operand))
    }

    /// The GEMM nodes of the last step, by the buffers they write.
    fn step_nodes(&self) -> Vec<usize> {
        let Some(Step { op: Op::Bands(bands), .. }) = self.steps.last() else { return vec![] };
        let outs = bands.ops.iter().filter_map(|op| match op {
            BandOp::Gemm { weight, .. } => Some(*weight),
            BandOp::Pass { .. } => None,
        });
        let node = |w: usize| {
            self.network.nodes.iter().position(|n| matches!(n, Node::Gemm { weight, .. } if *weight == w))
        };
        outs.filter_map(node).collect()
    }
}

/// How a GEMM goes on in a step.
#[derive(Clone, Copy, Debug)]
enum Join {
    /// Its operand is there.
    Operand(OperandBuf),
    /// What it reads is made there, and stays inside.
    Inner,
}

fn operand_buffers(o: OperandBuf) -> Vec<Buf> {
    std::iter::once(o.buf).chain(o.scale).collect()
}

/// Chooses the rows of a band so that what is local to it takes `target` bytes, and sizes those buffers.
fn size_bands(bands: &mut Bands, target: usize, bytes: &mut [usize]) {
    // Bytes per output row and image, about: inner values, and operands over the input rows behind an output row.
    let row = |b: &Bands| {
        let mut sum = 0;
        for (i, op) in b.ops.iter().enumerate() {
            match op {
                BandOp::Pass { out, .. } => {
                    let (w, per) = if i == 0 {
                        let border = b.border.left + b.border.right;
                        (b.input.w + border, b.input.h.div_ceil(b.output.h))
                    } else {
                        (b.output.w, 1)
                    };
                    sum += w * per * out.stride * out.kind.bytes();
                }
                BandOp::Gemm { out, .. } if b.local.contains(&out.buf) => {
                    sum += b.output.w * out.c * out.kind.bytes();
                }
                BandOp::Gemm { .. } => {}
            }
        }
        sum.max(1)
    };
    let all = bands.output.batch * bands.output.h;
    let mut rows = (target / row(bands)).clamp(1, all);
    if bands.filter.upsample {
        rows = rows.next_multiple_of(2); // bands begin at even rows
    }
    bands.rows = rows;
    let (mut operand_rows, mut pixels) = (0, 0);
    for band in bands.bands() {
        operand_rows = operand_rows.max(bands.window(band).shape.operand_rows());
        pixels = pixels.max(band.images * band.rows * bands.output.w);
    }
    for (i, op) in bands.ops.iter().enumerate() {
        match op {
            BandOp::Pass { out, .. } => {
                let rows = if i == 0 { operand_rows } else { pixels };
                bytes[out.buf] = rows * out.stride * out.kind.bytes();
                if let Some(scale) = out.scale {
                    bytes[scale] = rows * 4;
                }
            }
            BandOp::Gemm { out, .. } if bands.local.contains(&out.buf) => {
                bytes[out.buf] = pixels * out.c * out.kind.bytes();
            }
            BandOp::Gemm { .. } => {}
        }
    }
}
