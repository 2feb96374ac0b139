//! The words in which a network is described.
#![forbid(unsafe_code)]

use kernels::gemm::{Activation, Filter};
use kernels::view::Border;

use super::network::{Dims, Network, Node, Rate, Tensor, Value};
use super::weight::{OutputOrder, Role, WeightKind, WeightSpec};

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
