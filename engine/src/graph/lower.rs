//! From a network to steps over one arena: which form each value takes, which passes make it, where it lies.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use kernels::Isa;
use kernels::attention::{self, AttentionShape, Products};
use kernels::gemm::{Activation, Filter};
use kernels::layout::{Encoding, TILE_K};
use kernels::view::{Border, ImageShape};

use super::arena::{Life, Region, place};
use super::builder::{Dims, Network, Node, Rate, Tensor};
use super::weight::{WeightKind, WeightSpec};
use crate::precision::Precision;

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
    fn bytes(self) -> usize {
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

/// Element type of a GEMM's left operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum OperandKind {
    U8,
    Bf16,
    F32,
}

/// Rows of an operand, with border and slack.
#[derive(Clone, Copy, Debug)]
pub(super) struct OperandBuf {
    pub(super) buf: Buf,
    /// Scales of the rows, for `U8`.
    pub(super) scale: Option<Buf>,
    pub(super) kind: OperandKind,
    pub(super) stride: usize,
}

/// One or two tensors side by side.
pub(super) type SourceBufs = [Option<RowsBuf>; 2];

/// How a pass normalizes; numbers are weights.
#[derive(Clone, Copy, Debug)]
pub(super) enum NormSpec {
    None,
    Group { stats: Buf, groups: usize, gamma: usize, beta: usize },
    Layer { gamma: usize, beta: usize, eps: f32 },
}

#[derive(Clone, Copy, Debug)]
pub(super) enum PassOut {
    Operand(OperandBuf),
    Rows(RowsBuf),
}

/// What a step does.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Gemm {
        operand: OperandBuf,
        input: ImageShape,
        filter: Filter,
        weight: usize,
        bias: Option<usize>,
        image_bias: Option<Buf>,
        activation: Activation,
        residual: Option<RowsBuf>,
        out: RowsBuf,
    },
    GroupStats { source: SourceBufs, image: ImageShape, groups: usize, eps: f32, stats: Buf },
    Pass { source: SourceBufs, image: ImageShape, norm: NormSpec, activation: Activation, out: PassOut },
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
    Lookup { ids: Buf, table: usize, positions: usize, out: RowsBuf },
    Resize { x: RowsBuf, from: Dims, to: Dims, out: RowsBuf },
}

/// One operation of a plan.
#[derive(Clone, Debug)]
pub struct Step {
    /// The layer it belongs to.
    pub path: String,
    pub(super) op: Op,
    /// Weights it reads, numbers in [`Plan::weights`].
    pub weights: Vec<usize>,
}

impl Step {
    /// What kind of work it is.
    pub fn kind(&self) -> &'static str {
        match &self.op {
            Op::Gemm { filter, .. } if filter.kh > 1 => "conv",
            Op::Gemm { .. } => "linear",
            Op::GroupStats { .. } => "norm",
            Op::Pass { .. } => "pass",
            Op::Attention { .. } => "attention",
            Op::Lookup { .. } => "lookup",
            Op::Resize { .. } => "resize",
        }
    }

    /// Multiplications and additions of its matrix products.
    pub fn operations(&self, weights: &[WeightSpec]) -> u64 {
        match &self.op {
            Op::Gemm { weight, input, filter, .. } => {
                let (h, w) = filter.output(input);
                let shape = weights[*weight].kind.shape().expect("a GEMM has a matrix");
                2 * (input.batch * h * w) as u64 * (shape.n * shape.taps * shape.k) as u64
            }
            Op::Attention { shape: s, .. } => 4 * (s.batch * s.heads * s.nq * s.nk * s.d) as u64,
            _ => 0,
        }
    }
}

/// A network lowered for a precision and the encodings of a file: steps over one arena.
///
/// The arena begins with `banks` copies of what outlives a step (values of rate [`Rate::Run`] that steps read), so that the
/// two guidance passes can take turns; the rest is shared.
#[derive(Clone, Debug)]
pub struct Plan {
    steps: Vec<Step>,
    /// Steps before this one run once per run and bank.
    prologue: usize,
    weights: Vec<WeightSpec>,
    encodings: Vec<Option<Encoding>>,
    inputs: Vec<(String, RowsBuf)>,
    outputs: Vec<(String, RowsBuf, Tensor)>,
    regions: Vec<Region>,
    persistent: Vec<bool>,
    persistent_bytes: usize,
    transient_bytes: usize,
}

impl Plan {
    /// Lowers `network`. `encodings` gives each of its weights' encoding (`None` for vectors and tables), `threads` the size
    /// of the team, which attention's workspace depends on.
    ///
    /// # Panics
    /// Where `encodings` is not as long as the list of weights, or a matrix has none.
    pub fn new(
        network: &Network,
        encodings: &[Option<Encoding>],
        precision: Precision,
        isa: Isa,
        threads: usize,
    ) -> Plan {
        assert_eq!(network.weights().len(), encodings.len(), "an encoding for each weight");
        let mut l = Lowering {
            network,
            encodings,
            precision,
            isa,
            threads,
            stream: stream_values(network),
            rows: vec![None; network.values.len()],
            operands: HashMap::new(),
            bytes: vec![],
            steps: vec![],
        };
        let mut prologue = 0;
        let mut inputs = vec![];
        for i in network.order() {
            if network.values[i].rate == Rate::Run {
                l.node(i, &mut inputs);
                prologue = l.steps.len();
            } else {
                l.node(i, &mut inputs);
            }
        }
        let outputs: Vec<_> =
            network.outputs.iter().map(|(name, t)| (name.clone(), l.rows_of(*t), *t)).collect();
        let Lowering { bytes, steps, .. } = l;
        finish(network, encodings, bytes, steps, prologue, inputs, outputs)
    }

    /// Steps that run once per run and bank, then the steps of every pass.
    pub fn steps(&self) -> (&[Step], &[Step]) {
        self.steps.split_at(self.prologue)
    }

    /// The weights, in the order in which steps first meet them.
    pub fn weights(&self) -> &[WeightSpec] {
        &self.weights
    }

    /// The encodings the plan was made for.
    pub fn encodings(&self) -> &[Option<Encoding>] {
        &self.encodings
    }

    /// Bytes of the arena with `banks` copies of what outlives a step.
    pub fn arena_bytes(&self, banks: usize) -> usize {
        banks * self.persistent_bytes + self.transient_bytes
    }

    pub(super) fn region(&self, buf: Buf, bank: usize, banks: usize) -> Region {
        let r = self.regions[buf];
        let base =
            if self.persistent[buf] { bank * self.persistent_bytes } else { banks * self.persistent_bytes };
        Region { offset: base + r.offset, bytes: r.bytes }
    }

    pub(super) fn input(&self, name: &str) -> Option<RowsBuf> {
        self.inputs.iter().find(|(n, _)| n == name).map(|(_, r)| *r)
    }

    pub(super) fn output(&self, name: &str) -> Option<RowsBuf> {
        self.outputs.iter().find(|(n, ..)| n == name).map(|(_, r, _)| *r)
    }

    /// Bytes of the weights as stored.
    pub fn weight_bytes(&self) -> usize {
        (0..self.weights.len()).map(|i| self.stored_bytes(i)).sum()
    }

    /// Bytes of weight `i` as stored.
    pub fn stored_bytes(&self, i: usize) -> usize {
        match self.weights[i].kind {
            WeightKind::Vector { len, order } => order.stored(len) * 4,
            WeightKind::Table { rows, cols } => rows * cols * 2,
            kind @ WeightKind::Matrix { .. } => {
                let shape = kind.shape().expect("a matrix has a shape");
                shape.bytes(self.encodings[i].expect("a matrix has an encoding"))
            }
        }
    }
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

struct Lowering<'a> {
    network: &'a Network,
    encodings: &'a [Option<Encoding>],
    precision: Precision,
    isa: Isa,
    threads: usize,
    stream: Vec<bool>,
    /// Values in memory as plain rows.
    rows: Vec<Option<RowsBuf>>,
    /// Values in memory as operands.
    operands: HashMap<(Tensor, OperandKind, Border), OperandBuf>,
    /// Sizes of the buffers.
    bytes: Vec<usize>,
    steps: Vec<Step>,
}

impl Lowering<'_> {
    fn buffer(&mut self, bytes: usize) -> Buf {
        self.bytes.push(bytes);
        self.bytes.len() - 1
    }

    fn rows_kind(&self, t: Tensor) -> RowsKind {
        if self.precision == Precision::Exact || self.stream[t.0] { RowsKind::F32 } else { RowsKind::Bf16 }
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

    fn image(&self, t: Tensor, border: Border) -> ImageShape {
        let Dims { batch, h, w } = self.network.values[t.0].dims;
        ImageShape { batch, h, w, border }
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
        let image = self.image(t, Border::default());
        self.step(t, Op::Pass { source, image, norm, activation, out: PassOut::Rows(out) }, weights);
        out
    }

    /// What a pass that makes `t` reads and does. Statistics that it needs are a step of their own.
    fn pass_into(&mut self, t: Tensor) -> (SourceBufs, NormSpec, Activation, Vec<usize>) {
        match self.network.nodes[t.0] {
            Node::GroupNorm { x, gamma, beta, groups, eps, activation } => {
                let source = self.source(x);
                let image = self.image(x, Border::default());
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

    /// `t` as the operand of a GEMM.
    fn operand_of(&mut self, t: Tensor, kind: OperandKind, border: Border) -> OperandBuf {
        if let Some(&o) = self.operands.get(&(t, kind, border)) {
            return o;
        }
        let (source, norm, activation, weights) = self.pass_into(t);
        let image = self.image(t, border);
        let stride = self.network.values[t.0].c.next_multiple_of(TILE_K);
        let rows = image.operand_rows();
        let out = match kind {
            OperandKind::U8 => OperandBuf {
                buf: self.buffer(rows * stride),
                scale: Some(self.buffer(rows * 4)),
                kind,
                stride,
            },
            OperandKind::Bf16 => OperandBuf { buf: self.buffer(rows * stride * 2), scale: None, kind, stride },
            OperandKind::F32 => OperandBuf { buf: self.buffer(rows * stride * 4), scale: None, kind, stride },
        };
        self.step(t, Op::Pass { source, image, norm, activation, out: PassOut::Operand(out) }, weights);
        self.operands.insert((t, kind, border), out);
        out
    }

    fn operand_kind(&self, weight: usize) -> OperandKind {
        let encoding = self.encodings[weight].expect("a matrix has an encoding");
        match self.precision {
            Precision::Exact => OperandKind::F32,
            Precision::Fast if encoding.is_integer() => OperandKind::U8,
            _ => OperandKind::Bf16,
        }
    }

    fn node(&mut self, i: usize, inputs: &mut Vec<(String, RowsBuf)>) {
        let t = Tensor(i);
        match self.network.nodes[i].clone() {
            Node::Input { name, ids } => {
                let kind = if ids { RowsKind::U32 } else { RowsKind::F32 };
                let rows = self.new_rows(t, kind);
                inputs.push((name, rows));
            }
            // Made by the pass of whoever reads them.
            Node::GroupNorm { .. }
            | Node::LayerNorm { .. }
            | Node::Activate { .. }
            | Node::Concat { .. } => {}
            Node::Gemm { x, weight, bias, filter, border, image_bias, activation, residual } => {
                let operand = self.operand_of(x, self.operand_kind(weight), border);
                let image_bias = image_bias.map(|t| self.rows_of(t).buf);
                let residual = residual.map(|t| self.rows_of(t));
                let out = self.new_rows(t, self.rows_kind(t));
                let input = self.image(x, border);
                let op = Op::Gemm {
                    operand, input, filter, weight, bias, image_bias, activation, residual, out,
                };
                let weights = [Some(weight), bias].into_iter().flatten().collect();
                self.step(t, op, weights);
            }
            Node::Attention { q, k, v, heads, causal } => {
                let (qd, kd) = (self.network.values[q.0].dims, self.network.values[k.0].dims);
                let shape = AttentionShape {
                    batch: qd.batch,
                    nq: qd.h * qd.w,
                    nk: kd.h * kd.w,
                    heads,
                    d: self.network.values[q.0].c / heads,
                };
                let products = match self.precision {
                    Precision::Exact => Products::F32,
                    Precision::High => Products::Bf16,
                    Precision::Fast => Products::Int8,
                };
                let [q, k, v] = [q, k, v].map(|t| self.rows_of(t));
                let workspace =
                    self.buffer(attention::workspace_bytes(&shape, self.isa, products, self.threads));
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
}

impl Op {
    /// Buffers read, buffers written (a workspace counts as written).
    fn buffers(&self) -> (Vec<Buf>, Vec<Buf>) {
        let source = |s: &SourceBufs| s.iter().flatten().map(|r| r.buf).collect::<Vec<_>>();
        let of_operand = |o: &OperandBuf| std::iter::once(o.buf).chain(o.scale).collect::<Vec<_>>();
        match self {
            Op::Gemm { operand, image_bias, residual, out, .. } => {
                let mut reads = of_operand(operand);
                reads.extend(*image_bias);
                reads.extend(residual.map(|r| r.buf));
                (reads, vec![out.buf])
            }
            Op::GroupStats { source: s, stats, .. } => (source(s), vec![*stats]),
            Op::Pass { source: s, norm, out, .. } => {
                let mut reads = source(s);
                if let NormSpec::Group { stats, .. } = norm {
                    reads.push(*stats);
                }
                let writes = match out {
                    PassOut::Operand(o) => of_operand(o),
                    PassOut::Rows(r) => vec![r.buf],
                };
                (reads, writes)
            }
            Op::Attention { q, k, v, workspace, out, .. } => {
                (vec![q.buf, k.buf, v.buf], vec![*workspace, out.buf])
            }
            Op::Lookup { ids, out, .. } => (vec![*ids], vec![out.buf]),
            Op::Resize { x, out, .. } => (vec![x.buf], vec![out.buf]),
        }
    }
}

/// Lives and places of the buffers.
fn finish(
    network: &Network,
    encodings: &[Option<Encoding>],
    bytes: Vec<usize>,
    steps: Vec<Step>,
    prologue: usize,
    inputs: Vec<(String, RowsBuf)>,
    outputs: Vec<(String, RowsBuf, Tensor)>,
) -> Plan {
    let end = steps.len();
    let mut lives: Vec<Life> =
        bytes.into_iter().map(|bytes| Life { bytes, first: usize::MAX, last: 0 }).collect();
    let touch = |lives: &mut Vec<Life>, buf: Buf, at: usize| {
        lives[buf].first = lives[buf].first.min(at);
        lives[buf].last = lives[buf].last.max(at);
    };
    for (i, step) in steps.iter().enumerate() {
        let (reads, writes) = step.op.buffers();
        for buf in reads.into_iter().chain(writes) {
            touch(&mut lives, buf, i);
        }
    }
    // Inputs are written before the first step of their rate, outputs are read after the last step.
    for (name, rows) in &inputs {
        let i = network.nodes.iter().position(|n| matches!(n, Node::Input { name: m, .. } if m == name));
        let rate = network.values[i.expect("an input is a node")].rate;
        touch(&mut lives, rows.buf, if rate == Rate::Run { 0 } else { prologue });
    }
    for (_, rows, _) in &outputs {
        touch(&mut lives, rows.buf, end);
    }
    // What the prologue leaves for the steps outlives them all, in a part of the arena of its own.
    let persistent: Vec<bool> = lives.iter().map(|l| l.first < prologue && l.last >= prologue).collect();
    let split = |keep: bool| -> (Vec<usize>, Vec<Life>) {
        (0..lives.len()).filter(|&i| persistent[i] == keep).map(|i| (i, lives[i].clone())).unzip()
    };
    let mut regions = vec![Region::default(); lives.len()];
    let mut sizes = [0; 2];
    for keep in [false, true] {
        let (ids, mut chosen) = split(keep);
        if keep {
            for life in &mut chosen {
                (life.first, life.last) = (0, end);
            }
        }
        let (places, total) = place(&chosen);
        for (i, r) in ids.into_iter().zip(places) {
            regions[i] = r;
        }
        sizes[keep as usize] = total;
    }
    Plan {
        steps,
        prologue,
        weights: network.weights().to_vec(),
        encodings: encodings.to_vec(),
        inputs,
        outputs,
        regions,
        persistent,
        persistent_bytes: sizes[1].next_multiple_of(4096),
        transient_bytes: sizes[0],
    }
}
