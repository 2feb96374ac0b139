//! From a network to steps: which form each value takes, which passes make it, what is done band by band together.
#![forbid(unsafe_code)]

mod joins;

use std::collections::HashMap;

use kernels::Isa;
use kernels::attention::{self, AttentionShape, Products};
use kernels::gemm::{Activation, Filter};
use kernels::layout::{Encoding, TILE_K, WeightShape};
use kernels::pass::{stats_len, sums_len, sums_rows};
use kernels::view::{Border, ImageShape};

use super::analysis::{last_uses, stream_values};
use super::bands::{BandOp, Bands};
use super::network::{Dims, Network, Node, Rate, Tensor};
use super::steps::{
    Buf, NormSpec, Op, OperandBuf, OperandKind, ResidualSpec, RowsBuf, RowsKind, SourceBufs, Step,
};
use crate::precision::Precision;
use joins::Join;

/// What the lowering depends on beside the network.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How activations are held.
    pub precision: Precision,
    /// Instruction sets.
    pub isa: Isa,
    /// Size of the team.
    pub threads: usize,
    /// Bytes that the operands and inner values of a band may take, where its weights are few.
    pub band_bytes: usize,
    /// As `band_bytes`, at most, where weights are many: every band reads them all again.
    pub heavy_band_bytes: usize,
    /// Bytes of weights that a step may read, unless it is a single layer that has more.
    pub step_weight_bytes: usize,
    /// Whether the residual stream is bf16 too: half the memory, an error of its own.
    pub narrow_stream: bool,
    /// As `band_bytes`, for steps that make values again which are not kept as a whole: there a band holds several.
    pub chain_bytes: usize,
    /// Rows that a band of such a step has at least.
    pub chain_rows: usize,
}

impl Options {
    /// Bands that stay in the caches that cores share: what a short band saves in traffic it loses in every call's ends. Steps of
    /// no more weights than the largest layer of SD 1.5.
    pub fn new(precision: Precision, isa: Isa, threads: usize) -> Self {
        Options {
            precision,
            isa,
            threads,
            band_bytes: 4 << 20,
            heavy_band_bytes: 40 << 20,
            step_weight_bytes: 32 << 20,
            narrow_stream: false,
            chain_bytes: 4 << 20,
            chain_rows: 4,
        }
    }

    /// The same with bands that stay in a core's second-level cache, whatever they read.
    pub fn small_bands(self) -> Self {
        Options { band_bytes: 1 << 20, heavy_band_bytes: 1 << 20, ..self }
    }
}

/// The steps of a network and the sizes of their buffers.
#[derive(Debug)]
pub(super) struct Lowered {
    pub(super) steps: Vec<Step>,
    /// Steps before the first depend on inputs of rate `Run` alone, steps before the second also on those of rate `Schedule`.
    pub(super) ends: [usize; 2],
    /// Sizes of the buffers.
    pub(super) bytes: Vec<usize>,
    pub(super) inputs: Vec<(String, RowsBuf, Rate)>,
    pub(super) outputs: Vec<(String, RowsBuf)>,
    /// Values that are in memory as a whole, at some time.
    pub(super) rows: Vec<(Tensor, RowsBuf)>,
}

/// Lowers `network`; `encodings` are those of its weights, `None` for vectors and tables. Values of `remade` ([`super::analysis::can_be_remade`]) are never in memory as a
/// whole: whoever reads them makes them again, band by band.
pub(super) fn lower(
    network: &Network,
    encodings: &[Option<Encoding>],
    options: Options,
    remade: &[Tensor],
) -> Lowered {
    let mut l = Lowering {
        network,
        remade,
        encodings,
        options,
        stream: stream_values(network, options.narrow_stream),
        last_use: last_uses(network, remade),
        stats: HashMap::new(),
        rows: vec![None; network.values.len()],
        bytes: vec![],
        steps: vec![],
        inputs: vec![],
    };
    let mut ends = [0; 2];
    for (at, i) in network.order().enumerate() {
        l.node(i, at);
        // What is made of a rate's values as late as a reader wants it is of that reader's rate.
        for (end, rate) in ends.iter_mut().zip([Rate::Run, Rate::Schedule]) {
            if network.values[i].rate <= rate {
                *end = l.steps.len();
            }
        }
    }
    let outputs: Vec<_> = network.outputs.iter().map(|(name, t)| (name.clone(), l.rows_of(*t))).collect();
    if network.values.iter().all(|v| v.rate == Rate::Run) {
        ends = [l.steps.len(); 2]; // an output's own pass included
    }
    let weights: Vec<usize> = l.steps.iter().map(|step| l.weight_bytes(&step.weights)).collect();
    let Lowering { mut bytes, mut steps, inputs, rows, .. } = l;
    for (step, weights) in steps.iter_mut().zip(weights) {
        if let Op::Bands(b) = &mut step.op {
            cut_bands(b, options, weights);
            b.sizes(|buf, size| bytes[buf] = bytes[buf].max(size));
        }
    }
    let rows = rows.into_iter().enumerate().filter_map(|(i, r)| Some((Tensor(i), r?))).collect();
    Lowered { steps, ends, bytes, inputs, outputs, rows }
}

struct Lowering<'a> {
    network: &'a Network,
    /// Values that are never in memory as a whole.
    remade: &'a [Tensor],
    encodings: &'a [Option<Encoding>],
    options: Options,
    stream: Vec<bool>,
    last_use: Vec<(usize, usize)>,
    /// Statistics of group norms.
    stats: HashMap<Tensor, Buf>,
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
        let (x, norm, activation, weights) = self.pass_of(t);
        (self.source(x), norm, activation, weights)
    }

    /// What is known of the numbers of `x`, which a pass with `norm` and `activation` writes as an operand for `filter`: the
    /// range too, where a large convolution of 8-bit rows would not get a common scale otherwise.
    fn with_range(
        &mut self,
        x: Tensor,
        norm: NormSpec,
        activation: Activation,
        kind: OperandKind,
        filter: Filter,
    ) -> NormSpec {
        let bare = matches!(norm, NormSpec::None) && activation == Activation::None;
        if bare && kind == OperandKind::U8 && filter.upsample {
            NormSpec::Range { stats: self.group_stats(x, x, 1, 1.0) }
        } else {
            norm
        }
    }

    /// As `pass_into`, with the value that the pass reads in place of its rows.
    fn pass_of(&mut self, t: Tensor) -> (Tensor, NormSpec, Activation, Vec<usize>) {
        match self.network.nodes[t.0] {
            Node::GroupNorm { x, gamma, beta, groups, eps, activation } => {
                let stats = self.group_stats(t, x, groups, eps);
                (x, NormSpec::Group { stats, groups, gamma, beta }, activation, vec![gamma, beta])
            }
            Node::LayerNorm { x, gamma, beta, eps } => {
                (x, NormSpec::Layer { gamma, beta, eps }, Activation::None, vec![gamma, beta])
            }
            Node::Activate { x, activation } => (x, NormSpec::None, activation, vec![]),
            _ => (t, NormSpec::None, Activation::None, vec![]),
        }
    }

    /// Steps that make the statistics of `x` for the norm `t`.
    fn group_stats(&mut self, t: Tensor, x: Tensor, groups: usize, eps: f32) -> Buf {
        if let Some(&stats) = self.stats.get(&t) {
            return stats;
        }
        let image = self.image(x);
        let channels = self.network.values[x.0].c;
        let stats = self.buffer(image.batch * stats_len(groups, channels) * 4);
        let sums = self.buffer(sums_len(&image, groups, channels) * 8);
        if self.parts(x).iter().any(|p| self.remade.contains(p)) {
            let dims = self.network.values[x.0].dims;
            let mut chain = Chain::new(dims, false);
            let source = self.chain_source(&mut chain, x, dims);
            chain.ops.push(BandOp::Sums { source, groups, sums });
            self.chain_step(t, chain);
            let channels = self.network.values[x.0].c;
            self.step(t, Op::GroupFinish { sums, image, channels, groups, eps, stats }, vec![]);
        } else {
            let source = self.source(x);
            self.step(t, Op::GroupStats { source, image, groups, eps, sums, stats }, vec![]);
        }
        self.stats.insert(t, stats);
        stats
    }

    /// The tensors whose columns make up `t`.
    fn parts(&self, t: Tensor) -> Vec<Tensor> {
        match self.network.nodes[t.0] {
            Node::Concat { a, b } => vec![a, b],
            _ => vec![t],
        }
    }

    /// Rows of the parts of `x` for an operation of `chain`; parts that are not kept are made by it first.
    fn chain_source(&mut self, chain: &mut Chain, x: Tensor, dims: Dims) -> SourceBufs {
        let mut source = [None, None];
        for (rows, part) in source.iter_mut().zip(self.parts(x)) {
            *rows = Some(self.chain_rows(chain, part, dims));
        }
        source
    }

    /// Rows of `t`, which has images `dims`, for an operation of `chain`.
    fn chain_rows(&mut self, chain: &mut Chain, t: Tensor, dims: Dims) -> RowsBuf {
        if !self.remade.contains(&t) {
            return self.rows_of(t);
        }
        if let Some((_, rows)) = chain.made.iter().find(|(made, _)| *made == t) {
            return *rows;
        }
        let v = &self.network.values[t.0];
        let out = RowsBuf { buf: self.buffer(0), kind: self.rows_kind(t), c: v.c };
        chain.made.push((t, out));
        chain.local.push((out, dims));
        let residual = match self.network.nodes[t.0] {
            Node::Gemm { residual: Some(r), .. } => ResidualSpec::Rows(self.chain_rows(chain, r, dims)),
            _ => ResidualSpec::None,
        };
        self.chain_gemm(chain, t, out, residual, None);
        out
    }

    /// Appends the GEMM that makes `t` in `out`, and the pass that makes its operand, unless that is there already.
    fn chain_gemm(
        &mut self,
        chain: &mut Chain,
        t: Tensor,
        out: RowsBuf,
        residual: ResidualSpec,
        join: Option<Join>,
    ) {
        let Node::Gemm { x, factors, weight, bias, filter, border, image_bias, activation, .. } =
            self.network.nodes[t.0].clone()
        else {
            unreachable!("GEMMs alone are made so")
        };
        let operand = if let Some(Join::Operand(operand)) = join {
            operand
        } else {
            let kind = self.operand_kind(weight);
            let input =
                if chain.flat { flat(self.network.values[x.0].dims) } else { self.network.values[x.0].dims };
            let (source, norm, pass_activation) = if let Some(Join::Inner(rows)) = join {
                ([Some(rows), None], NormSpec::None, Activation::None)
            } else {
                let (from, norm, activation, weights) = self.pass_of(x);
                let norm = self.with_range(x, norm, activation, kind, filter);
                chain.weights.extend(weights);
                (self.chain_source(chain, from, input), norm, activation)
            };
            let out = self.new_operand(kind, self.network.values[x.0].c, filter, norm);
            chain.ops.push(BandOp::Pass {
                source,
                input,
                filter,
                border,
                norm,
                activation: pass_activation,
                factors,
                out,
            });
            chain.weights.extend(factors);
            out
        };
        let image_bias = image_bias.map(|t| self.rows_of(t).buf);
        chain.ops.push(BandOp::Gemm { operand, weight, bias, image_bias, activation, residual, out });
        chain.weights.push(weight);
        chain.weights.extend(bias);
    }

    fn chain_step(&mut self, t: Tensor, chain: Chain) {
        let Chain { output, ops, local, weights, .. } = chain;
        self.step(t, Op::Bands(Bands::new(output, ops, local)), weights);
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

    /// An operand of `c` columns for `filter`, from a pass with `norm`.
    fn new_operand(&mut self, kind: OperandKind, c: usize, filter: Filter, norm: NormSpec) -> OperandBuf {
        let scale = (kind == OperandKind::U8).then(|| self.buffer(0));
        let uniform = scale.is_some()
            && filter != Filter::POINT
            && matches!(norm, NormSpec::Group { .. } | NormSpec::Range { .. });
        OperandBuf { buf: self.buffer(0), scale, uniform, kind, stride: c.next_multiple_of(TILE_K) }
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
            Node::AtTimestep { x } => {
                let (from, batch) = (self.network.values[x.0].dims, self.network.values[i].dims.batch);
                let x = self.rows_of(x);
                let out = self.new_rows(t, x.kind);
                self.step(t, Op::AtTimestep { x, from, batch, out }, vec![]);
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
        if self.remade.contains(&t) {
            return; // made by whoever reads it
        }
        let Node::Gemm { x, weight, filter, image_bias, residual, .. } = self.network.nodes[t.0].clone()
        else {
            unreachable!("called for GEMM nodes")
        };
        let in_place = residual.and_then(|r| self.in_place(t, r, at));
        if in_place.is_some() {
            self.rows[t.0] = in_place;
        }
        let read = match self.network.nodes[x.0] {
            Node::GroupNorm { x, .. } | Node::LayerNorm { x, .. } | Node::Activate { x, .. } => x,
            _ => x,
        };
        let remakes = self.parts(read).into_iter().chain(residual).any(|part| self.remade.contains(&part));
        let dims = self.network.values[t.0].dims;
        let mut chain = match filter == Filter::POINT && !remakes {
            true => Chain::new(flat(dims), true),
            false => Chain::new(dims, false),
        };
        // Rows that nothing has made yet become steps before the last one is looked at.
        image_bias.into_iter().for_each(|t| _ = self.rows_of(t));
        let residual = match (in_place, residual) {
            (Some(_), _) => ResidualSpec::InPlace,
            (None, Some(r)) => ResidualSpec::Rows(self.chain_rows(&mut chain, r, dims)),
            (None, None) => ResidualSpec::None,
        };
        let join = match remakes {
            true => None,
            false => self.joins(t, self.operand_kind(weight)),
        };
        let out = self.rows[t.0].unwrap_or_else(|| self.new_rows(t, self.rows_kind(t)));
        self.chain_gemm(&mut chain, t, out, residual, join);
        let Some(join) = join else { return self.chain_step(t, chain) };
        let step = self.steps.last_mut().expect("there is a step to join");
        step.weights.extend(chain.weights);
        let Op::Bands(bands) = &mut step.op else { unreachable!("only bands are joined") };
        bands.ops.extend(chain.ops);
        if let Join::Inner(inner) = join {
            bands.local.push((inner, flat(self.network.values[x.0].dims)));
            self.bytes[inner.buf] = 0; // a band of it is enough
        }
    }
}

/// Operations that make values which are not kept, and then what reads them.
#[derive(Debug)]
struct Chain {
    output: Dims,
    /// Whether rows are single pixels.
    flat: bool,
    ops: Vec<BandOp>,
    local: Vec<(RowsBuf, Dims)>,
    made: Vec<(Tensor, RowsBuf)>,
    weights: Vec<usize>,
}

impl Chain {
    fn new(output: Dims, flat: bool) -> Self {
        Chain { output, flat, ops: vec![], local: vec![], made: vec![], weights: vec![] }
    }
}

/// Rows of single pixels.
fn flat(dims: Dims) -> Dims {
    Dims { h: dims.h * dims.w, w: 1, ..dims }
}

/// Cuts `b`, which reads `weights` bytes of weights, into the largest bands whose own buffers fit.
fn cut_bands(b: &mut Bands, options: Options, weights: usize) {
    let image = ImageShape { batch: b.output.batch, h: b.output.h, w: b.output.w, border: Border::default() };
    let sums = b.ops.iter().any(|op| matches!(op, BandOp::Sums { .. }));
    b.unit = if sums { sums_rows(&image) } else { 1 };
    let passes =
        b.ops.iter().filter(|op| matches!(op, BandOp::Pass { filter, .. } if *filter != Filter::POINT));
    let (target, least) = match passes.count() > 1 || sums {
        true => (options.chain_bytes, options.chain_rows),
        // Reading weights again costs more than writing and reading what a band holds.
        false => ((8 * weights).min(options.heavy_band_bytes).max(options.band_bytes), 1),
    };
    // Halving finds the size soon enough: bands need not be as large as can be.
    while b.rows > least && b.local_bytes() > target {
        b.rows = (b.rows / 2).max(least);
    }
}
