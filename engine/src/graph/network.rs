//! What a network is: values, the nodes that make them, and the weights in the order in which a run meets them.
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
    pub(super) weights: Vec<WeightSpec>,
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
    pub(super) fn sort_weights(&mut self) -> Vec<usize> {
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
