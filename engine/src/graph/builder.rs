//! The words in which a network is described.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use kernels::gemm::{Activation, Filter};
use kernels::layout::Encoding;
use kernels::view::Border;

use super::weight::{OutputOrder, Role, Stored, WeightKind, WeightSpec};

/// How often a value is computed. What depends on the prompt alone is computed once per run, what depends on timesteps but not
/// on latents for many timesteps at a time, ahead of their steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rate {
    /// Once per run.
    Run,
    /// For a number of timesteps at a time, which are its columns of pixels.
    Schedule,
    /// In every step.
    Step,
}

/// `batch` images of `h * w` pixels, or sequences of `h * w` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Images.
    pub batch: usize,
    /// Rows of pixels.
    pub h: usize,
    /// Columns of pixels.
    pub w: usize,
}

impl Dims {
    /// Pixels of all images.
    pub fn pixels(&self) -> usize {
        self.batch * self.h * self.w
    }
}

/// A value `[batch, h, w, c]` in a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tensor(pub(super) usize);

/// What is known of a value.
#[derive(Clone, Debug)]
pub(super) struct Value {
    pub(super) dims: Dims,
    pub(super) c: usize,
    pub(super) rate: Rate,
}

/// How a value is made.
#[derive(Clone, Debug)]
pub(super) enum Node {
    /// Written by the caller before the run or the step, as f32 (`ids`: as u32).
    Input {
        name: String,
        ids: bool,
    },
    /// A linear layer or a convolution.
    Gemm {
        x: Tensor,
        /// By which the channels of `x` are multiplied first.
        factors: Option<usize>,
        weight: usize,
        bias: Option<usize>,
        filter: Filter,
        border: Border,
        image_bias: Option<Tensor>,
        activation: Activation,
        residual: Option<Tensor>,
    },
    GroupNorm {
        x: Tensor,
        gamma: usize,
        beta: usize,
        groups: usize,
        eps: f32,
        activation: Activation,
    },
    LayerNorm {
        x: Tensor,
        gamma: usize,
        beta: usize,
        eps: f32,
    },
    Activate {
        x: Tensor,
        activation: Activation,
    },
    /// Columns of `a`, then columns of `b`; never in memory.
    Concat {
        a: Tensor,
        b: Tensor,
    },
    Attention {
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: usize,
        causal: bool,
    },
    /// `table[ids] + positions`.
    Lookup {
        ids: Tensor,
        table: usize,
        positions: usize,
    },
    /// Of a value of rate [`Rate::Schedule`] the rows of the timestep at hand; the same images over and over, where `dims` has
    /// more.
    AtTimestep {
        x: Tensor,
    },
    /// Nearest neighbour: twice the size, less a last row or column, or the same images over and over, where `dims` says so.
    Resize {
        x: Tensor,
    },
}

impl Node {
    pub(super) fn inputs(&self) -> Vec<Tensor> {
        match *self {
            Node::Input { .. } => vec![],
            Node::Gemm { x, image_bias, residual, .. } => {
                [Some(x), image_bias, residual].into_iter().flatten().collect()
            }
            Node::GroupNorm { x, .. } | Node::LayerNorm { x, .. } => vec![x],
            Node::Activate { x, .. } | Node::Resize { x } | Node::AtTimestep { x } => vec![x],
            Node::Concat { a, b } => vec![a, b],
            Node::Attention { q, k, v, .. } => vec![q, k, v],
            Node::Lookup { ids, .. } => vec![ids],
        }
    }

    pub(super) fn weights(&self) -> Vec<usize> {
        match *self {
            Node::Gemm { factors, weight, bias, .. } => {
                [factors, Some(weight), bias].into_iter().flatten().collect()
            }
            Node::GroupNorm { gamma, beta, .. } | Node::LayerNorm { gamma, beta, .. } => vec![gamma, beta],
            Node::Lookup { table, positions, .. } => vec![table, positions],
            _ => vec![],
        }
    }
}

/// A described network: values and nodes (node `i` makes value `i`), and the weights in the order in which a run meets
/// them: what depends on the prompt alone first, then what depends on timesteps alone.
#[derive(Clone, Debug)]
pub struct Network {
    pub(super) values: Vec<Value>,
    pub(super) nodes: Vec<Node>,
    pub(super) paths: Vec<String>,
    pub(super) outputs: Vec<(String, Tensor)>,
    weights: Vec<WeightSpec>,
}

impl Network {
    /// The weights that a checkpoint must supply, in execution order.
    pub fn weights(&self) -> &[WeightSpec] {
        &self.weights
    }

    /// The network for a file that keeps each of its weights as `stored`: vectors of factors are weights too. Then the encodings
    /// of its weights, `None` for vectors and tables.
    ///
    /// # Panics
    /// Where `stored` is not as long as the list of weights.
    pub fn stored(&self, stored: &[Stored]) -> (Network, Vec<Option<Encoding>>) {
        assert_eq!(self.weights.len(), stored.len(), "how each weight is stored");
        let mut network = self.clone();
        let mut encodings: Vec<_> = stored.iter().map(|s| s.encoding).collect();
        let mut places = HashMap::new();
        for node in &mut network.nodes {
            let Node::Gemm { weight, factors, .. } = node else { continue };
            let (Some(name), WeightKind::Matrix { k, .. }) =
                (&stored[*weight].factors, self.weights[*weight].kind)
            else {
                continue;
            };
            let kind = WeightKind::Vector { len: k, order: OutputOrder::Plain };
            *factors = Some(*places.entry(name).or_insert_with(|| {
                network.weights.push(WeightSpec { name: name.clone(), kind, role: Role::Vector });
                encodings.push(None);
                encodings.len() - 1
            }));
        }
        let order = network.sort_weights();
        (network, order.into_iter().map(|i| encodings[i]).collect())
    }

    /// Matrices that read the same value one after another, and what is known of that value's channels.
    pub fn operands(&self) -> Vec<OperandSpec> {
        let mut operands: Vec<(Tensor, OperandSpec)> = vec![];
        for node in &self.nodes {
            let Node::Gemm { x, weight, .. } = *node else { continue };
            match operands.last_mut() {
                Some((last, operand)) if *last == x => operand.matrices.push(weight),
                _ => operands.push((x, OperandSpec { matrices: vec![weight], origin: self.origin(x) })),
            }
        }
        operands.into_iter().map(|(_, operand)| operand).collect()
    }

    fn origin(&self, x: Tensor) -> Origin {
        match self.nodes[x.0] {
            Node::GroupNorm { gamma, beta, activation, .. } => Origin::Norm { gamma, beta, activation },
            Node::LayerNorm { gamma, beta, .. } => Origin::Norm { gamma, beta, activation: Activation::None },
            Node::Gemm { weight, bias, activation, residual: None, .. } => {
                Origin::Matrix { weight, bias, activation }
            }
            Node::Attention { v, .. } => self.origin(v),
            _ => Origin::Other,
        }
    }

    /// Brings weights into the order in which a run meets them; leaves out those that no node has. Returns the place that
    /// each had.
    fn sort_weights(&mut self) -> Vec<usize> {
        let mut rank = vec![usize::MAX; self.weights.len()];
        let mut order = Vec::with_capacity(self.weights.len());
        for i in self.order() {
            for w in self.nodes[i].weights() {
                if rank[w] == usize::MAX {
                    rank[w] = order.len();
                    order.push(w);
                }
            }
        }
        self.weights = order.iter().map(|&w| self.weights[w].clone()).collect();
        for node in &mut self.nodes {
            match node {
                Node::Gemm { factors, weight, bias, .. } => {
                    *weight = rank[*weight];
                    for w in [factors, bias].into_iter().flatten() {
                        *w = rank[*w];
                    }
                }
                Node::GroupNorm { gamma, beta, .. } | Node::LayerNorm { gamma, beta, .. } => {
                    (*gamma, *beta) = (rank[*gamma], rank[*beta]);
                }
                Node::Lookup { table, positions, .. } => {
                    (*table, *positions) = (rank[*table], rank[*positions]);
                }
                _ => {}
            }
        }
        order
    }

    /// Nodes in execution order.
    pub(super) fn order(&self) -> impl Iterator<Item = usize> + '_ {
        let of = |rate| (0..self.nodes.len()).filter(move |&i| self.values[i].rate == rate);
        of(Rate::Run).chain(of(Rate::Schedule)).chain(of(Rate::Step))
    }
}

/// A value that matrices read. Numbers are places in [`Network::weights`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperandSpec {
    /// The matrices, in execution order.
    pub matrices: Vec<usize>,
    /// Where the value comes from.
    pub origin: Origin,
}

/// What the scale of a value's channels depends on. Numbers are places in [`Network::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `activation(norm)`.
    Norm {
        /// `[c]`.
        gamma: usize,
        /// `[c]`.
        beta: usize,
        /// Behind the norm.
        activation: Activation,
    },
    /// `activation(weight x + bias)`, or what attention makes of such values.
    Matrix {
        /// Its outputs are the channels.
        weight: usize,
        /// Of the same matrix.
        bias: Option<usize>,
        /// Behind the sum.
        activation: Activation,
    },
    /// Anything else: sums of many layers, inputs.
    Other,
}

/// Records a network.
#[derive(Debug)]
pub struct Builder {
    values: Vec<Value>,
    nodes: Vec<Node>,
    paths: Vec<String>,
    weights: Vec<WeightSpec>,
    outputs: Vec<(String, Tensor)>,
    path: Vec<String>,
}

impl Builder {
    /// A network whose weights' names begin with `part`.
    pub fn new(part: &str) -> Self {
        Builder {
            values: vec![],
            nodes: vec![],
            paths: vec![],
            weights: vec![],
            outputs: vec![],
            path: vec![part.to_owned()],
        }
    }

    /// Describes a piece whose weights' names go on with `name`.
    pub fn within<T>(&mut self, name: impl Into<String>, f: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(name.into());
        let out = f(self);
        self.path.pop();
        out
    }

    /// `batch`, `h`, `w` of a value.
    pub fn dims(&self, x: Tensor) -> Dims {
        self.values[x.0].dims
    }

    /// Channels of a value.
    pub fn channels(&self, x: Tensor) -> usize {
        self.values[x.0].c
    }

    fn name(&self, leaf: &str) -> String {
        let mut name = self.path.join(".");
        if !leaf.is_empty() {
            name.push('.');
            name.push_str(leaf);
        }
        name
    }

    fn weight(&mut self, leaf: &str, kind: WeightKind, role: Role) -> usize {
        self.weights.push(WeightSpec { name: self.name(leaf), kind, role });
        self.weights.len() - 1
    }

    fn vector(&mut self, leaf: &str, len: usize, order: OutputOrder) -> usize {
        self.weight(leaf, WeightKind::Vector { len, order }, Role::Vector)
    }

    fn push(&mut self, node: Node, dims: Dims, c: usize, path: String) -> Tensor {
        let rate = node.inputs().iter().map(|t| self.values[t.0].rate).max().unwrap_or(Rate::Run);
        self.values.push(Value { dims, c, rate });
        self.nodes.push(node);
        self.paths.push(path);
        Tensor(self.nodes.len() - 1)
    }

    /// A value that the caller supplies, f32 `[batch * h * w, c]`.
    pub fn input(&mut self, name: &str, dims: Dims, c: usize, rate: Rate) -> Tensor {
        let t = self.push(Node::Input { name: name.to_owned(), ids: false }, dims, c, name.to_owned());
        self.values[t.0].rate = rate;
        t
    }

    /// Token ids that the caller supplies, u32 `[batch * tokens]`.
    pub fn ids(&mut self, name: &str, dims: Dims, rate: Rate) -> Tensor {
        let t = self.push(Node::Input { name: name.to_owned(), ids: true }, dims, 1, name.to_owned());
        self.values[t.0].rate = rate;
        t
    }

    /// A value that the caller reads, f32.
    pub fn output(&mut self, name: &str, x: Tensor) {
        self.outputs.push((name.to_owned(), x));
    }

    /// A linear layer over the channels of `x`; `leaf` (may be empty) is where its weights are.
    pub fn linear(&mut self, x: Tensor, leaf: &str, n: usize, role: Role) -> GemmBuilder<'_> {
        GemmBuilder {
            x,
            leaf: leaf.to_owned(),
            n,
            role,
            filter: Filter::POINT,
            border: Border::default(),
            bias: true,
            image_bias: None,
            activation: Activation::None,
            residual: None,
            b: self,
        }
    }

    /// A 3 x 3 convolution of stride 1 with a border of zeros around the image.
    pub fn conv3x3(&mut self, x: Tensor, leaf: &str, n: usize, role: Role) -> GemmBuilder<'_> {
        let mut g = self.linear(x, leaf, n, role);
        g.filter = Filter { kh: 3, kw: 3, stride: 1, upsample: false };
        g.border = Border { top: 1, left: 1, bottom: 1, right: 1 };
        g
    }

    /// Group normalization over each image, then `activation`.
    pub fn group_norm(
        &mut self,
        x: Tensor,
        leaf: &str,
        groups: usize,
        eps: f32,
        activation: Activation,
    ) -> Tensor {
        let c = self.channels(x);
        let (gamma, beta) = self.affine(leaf, c);
        let path = self.name(leaf);
        self.push(Node::GroupNorm { x, gamma, beta, groups, eps, activation }, self.dims(x), c, path)
    }

    /// Layer normalization over the channels.
    pub fn layer_norm(&mut self, x: Tensor, leaf: &str, eps: f32) -> Tensor {
        let c = self.channels(x);
        let (gamma, beta) = self.affine(leaf, c);
        let path = self.name(leaf);
        self.push(Node::LayerNorm { x, gamma, beta, eps }, self.dims(x), c, path)
    }

    fn affine(&mut self, leaf: &str, c: usize) -> (usize, usize) {
        let gamma = self.vector(&format!("{leaf}.weight"), c, OutputOrder::Plain);
        let beta = self.vector(&format!("{leaf}.bias"), c, OutputOrder::Plain);
        (gamma, beta)
    }

    /// An activation function on its own.
    pub fn activate(&mut self, x: Tensor, activation: Activation) -> Tensor {
        let path = self.name("act");
        self.push(Node::Activate { x, activation }, self.dims(x), self.channels(x), path)
    }

    /// The channels of `a`, then those of `b`.
    ///
    /// # Panics
    /// Where the images differ in size.
    pub fn concat(&mut self, a: Tensor, b: Tensor) -> Tensor {
        assert_eq!(self.dims(a), self.dims(b), "concatenation in {}", self.name(""));
        let c = self.channels(a) + self.channels(b);
        let path = self.name("concat");
        self.push(Node::Concat { a, b }, self.dims(a), c, path)
    }

    /// Attention of the tokens of `q` to those of `k` and `v`, image by image; scores are scaled by `1 / sqrt(d)`.
    ///
    /// # Panics
    /// Where the shapes don't fit.
    pub fn attention(&mut self, q: Tensor, k: Tensor, v: Tensor, heads: usize, causal: bool) -> Tensor {
        let (c, dims) = (self.channels(q), self.dims(q));
        assert!(c.is_multiple_of(heads), "{c} channels, {heads} heads in {}", self.name(""));
        assert_eq!(
            (self.dims(k), self.channels(k)),
            (self.dims(v), c),
            "keys and values in {}",
            self.name("")
        );
        assert_eq!(self.dims(k).batch, dims.batch, "sequences in {}", self.name(""));
        let path = self.name("attention");
        self.push(Node::Attention { q, k, v, heads, causal }, dims, c, path)
    }

    /// `table[ids] + positions`: rows of width `c`.
    pub fn lookup(
        &mut self,
        ids: Tensor,
        table: (&str, usize),
        positions: (&str, usize),
        c: usize,
    ) -> Tensor {
        let kind = |rows| WeightKind::Table { rows, cols: c };
        let t = self.weight(table.0, kind(table.1), Role::Table);
        let p = self.weight(positions.0, kind(positions.1), Role::Table);
        let path = self.name("lookup");
        self.push(Node::Lookup { ids, table: t, positions: p }, self.dims(ids), c, path)
    }

    /// `x` for each of `batch` sequences: its images over and over, or `x` itself where it has as many.
    ///
    /// # Panics
    /// Where `batch` is no multiple of the images.
    pub fn repeat(&mut self, x: Tensor, batch: usize) -> Tensor {
        let dims = self.dims(x);
        assert!(batch.is_multiple_of(dims.batch), "{} images for {batch} in {}", dims.batch, self.name(""));
        if batch == dims.batch {
            return x;
        }
        let path = self.name("repeat");
        self.push(Node::Resize { x }, Dims { batch, ..dims }, self.channels(x), path)
    }

    /// The rows `[batch, c]` of the timestep at hand, of `x` `[images, timesteps, c]`; the same images over and over.
    ///
    /// # Panics
    /// Where `x` is computed in every step anyway, or `batch` is no multiple of the images.
    pub fn at_timestep(&mut self, x: Tensor, batch: usize) -> Tensor {
        let (dims, path) = (self.dims(x), self.name("at_timestep"));
        assert!(batch.is_multiple_of(dims.batch), "{} images for {batch} in {path}", dims.batch);
        assert!(self.values[x.0].rate < Rate::Step && dims.h == 1, "{dims:?} for timesteps in {path}");
        let t = self.push(Node::AtTimestep { x }, Dims { batch, h: 1, w: 1 }, self.channels(x), path);
        self.values[t.0].rate = Rate::Step;
        t
    }

    /// The finished network.
    pub fn finish(self) -> Network {
        let Builder { values, nodes, paths, weights, outputs, .. } = self;
        let mut network = Network { values, nodes, paths, outputs, weights };
        network.sort_weights();
        network
    }
}

/// A linear layer or a convolution on its way into the network.
#[derive(Debug)]
pub struct GemmBuilder<'b> {
    b: &'b mut Builder,
    x: Tensor,
    leaf: String,
    n: usize,
    role: Role,
    filter: Filter,
    border: Border,
    bias: bool,
    image_bias: Option<Tensor>,
    activation: Activation,
    residual: Option<Tensor>,
}

impl GemmBuilder<'_> {
    /// There is no bias.
    pub fn no_bias(mut self) -> Self {
        self.bias = false;
        self
    }

    /// Every second pixel; `border` is what stands around the image.
    pub fn stride2(mut self, border: Border) -> Self {
        self.filter.stride = 2;
        self.border = border;
        self
    }

    /// The input is read at twice its size (nearest neighbour), cropped to `h * w`.
    pub fn upsampled(mut self, h: usize, w: usize) -> Self {
        let dims = self.b.dims(self.x);
        if (2 * dims.h, 2 * dims.w) == (h, w) {
            self.filter.upsample = true;
        } else {
            let path = self.b.name("resize");
            let c = self.b.channels(self.x);
            self.x = self.b.push(Node::Resize { x: self.x }, Dims { h, w, ..dims }, c, path);
        }
        self
    }

    /// Applied to the sum; the rectifier to the sum with the residual.
    pub fn activation(mut self, activation: Activation) -> Self {
        self.activation = activation;
        self
    }

    /// `[batch, n]`, added to every pixel of its image.
    pub fn image_bias(mut self, t: Tensor) -> Self {
        self.image_bias = Some(t);
        self
    }

    /// Added to the result.
    pub fn residual(mut self, t: Tensor) -> Self {
        self.residual = Some(t);
        self
    }

    /// Into the network.
    pub fn build(self) -> Tensor {
        let GemmBuilder { b, x, leaf, n, role, filter, border, bias, image_bias, activation, residual } =
            self;
        let dims = b.dims(x);
        let input = kernels::view::ImageShape { batch: dims.batch, h: dims.h, w: dims.w, border };
        let (h, w) = filter.output(&input);
        let order = if activation == Activation::Geglu { OutputOrder::Geglu } else { OutputOrder::Plain };
        let kind = WeightKind::Matrix { n, kh: filter.kh, kw: filter.kw, k: b.channels(x), order };
        let dot = if leaf.is_empty() { "" } else { "." };
        let weight = b.weight(&format!("{leaf}{dot}weight"), kind, role);
        let bias = bias.then(|| b.vector(&format!("{leaf}{dot}bias"), n, order));
        let out = Dims { batch: dims.batch, h, w };
        let c = activation.columns(n);
        if let Some(r) = residual {
            assert_eq!((b.dims(r), b.channels(r)), (out, c), "residual of {}", b.name(&leaf));
        }
        let path = b.name(&leaf);
        let factors = None;
        let node = Node::Gemm { x, factors, weight, bias, filter, border, image_bias, activation, residual };
        b.push(node, out, c, path)
    }
}
