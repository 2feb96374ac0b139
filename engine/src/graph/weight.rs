//! What a network's description says of a weight: its name, its shape and the part it plays.
#![forbid(unsafe_code)]

use kernels::layout::{Encoding, WeightShape};
use serde::{Deserialize, Serialize};

/// One tensor that a checkpoint must supply. Names are canonical: the part (`unet`, `vae`, `text_encoder`,
/// `text_encoder_2`), then the key that diffusers uses inside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSpec {
    /// For example `unet.down_blocks.0.resnets.0.conv1.weight`.
    pub name: String,
    /// What it is and how large.
    pub kind: WeightKind,
    /// The part it plays: what the precision policy decides by.
    pub role: Role,
}

impl WeightSpec {
    /// Whether it belongs to the VAE, which may come from a file of its own.
    pub fn is_of_vae(&self) -> bool {
        self.name.starts_with("vae.")
    }
}

/// How a file keeps a weight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// How a matrix is encoded; `None` for vectors and tables, which have one way only.
    pub encoding: Option<Encoding>,
    /// The vector `[k]`, by name, that holds for each input of a matrix what its weights were divided by. Inputs are
    /// multiplied by it.
    pub factors: Option<String>,
}

impl From<Encoding> for Stored {
    fn from(encoding: Encoding) -> Self {
        Stored { encoding: Some(encoding), factors: None }
    }
}

/// The kinds of tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightKind {
    /// A matrix `[n, kh * kw * k]` in panels. The checkpoint has `[n, k]` or `[n, k, kh, kw]`.
    Matrix {
        /// Outputs.
        n: usize,
        /// Filter height, 1 for a linear layer.
        kh: usize,
        /// Filter width, 1 for a linear layer.
        kw: usize,
        /// Inputs per tap.
        k: usize,
        /// The order in which outputs lie in the panels.
        order: OutputOrder,
    },
    /// f32 numbers, kept exactly: norms, biases and factors. `order` as of the matrix that a bias belongs to.
    Vector {
        /// Numbers.
        len: usize,
        /// The order in which they lie.
        order: OutputOrder,
    },
    /// Rows to be looked up `[rows, cols]`, row-major f16.
    Table {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
}

/// The order of a matrix's outputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputOrder {
    /// As in the checkpoint.
    #[default]
    Plain,
    /// Of `2h` outputs the first half are values and the second half their gates: 16 values, then their 16 gates, and so
    /// on (`h` is padded to a multiple of 16 on its own).
    Geglu,
}

impl OutputOrder {
    /// Outputs as stored: `Geglu` pads each half to whole panels.
    pub const fn stored(self, n: usize) -> usize {
        match self {
            OutputOrder::Plain => n,
            OutputOrder::Geglu => 2 * (n / 2).next_multiple_of(kernels::layout::TILE_N),
        }
    }

    /// Which output of the checkpoint stands at place `i` of the stored order; `None` is padding (zero).
    pub fn source(self, n: usize, i: usize) -> Option<usize> {
        match self {
            OutputOrder::Plain => (i < n).then_some(i),
            OutputOrder::Geglu => {
                let tile = kernels::layout::TILE_N;
                let (pair, lane) = (i / (2 * tile), i % (2 * tile));
                let h = pair * tile + lane % tile;
                (h < n / 2).then_some(if lane < tile { h } else { n / 2 + h })
            }
        }
    }
}

impl WeightKind {
    /// The encoding of what isn't a matrix.
    pub const fn fixed_encoding(&self) -> Option<Encoding> {
        match self {
            WeightKind::Matrix { .. } => None,
            WeightKind::Vector { .. } => Some(Encoding::F32),
            WeightKind::Table { .. } => Some(Encoding::F16),
        }
    }

    /// The shape of a matrix as stored.
    pub fn shape(&self) -> Option<WeightShape> {
        match *self {
            WeightKind::Matrix { n, kh, kw, k, order } => {
                Some(WeightShape { n: order.stored(n), taps: kh * kw, k })
            }
            _ => None,
        }
    }
}

/// The part a weight plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The first convolution of a network.
    ConvIn,
    /// The last convolution of a network.
    ConvOut,
    /// A 3 x 3 convolution of a residual block, or of a change of resolution.
    Conv,
    /// The 1 x 1 convolution past a residual block.
    Shortcut,
    /// Time, label and size embeddings.
    Embedding,
    /// The projection of an embedding into a residual block.
    TimeShift,
    /// Queries, keys and values of self attention.
    SelfQkv,
    /// Queries of cross attention.
    CrossQ,
    /// Keys and values of cross attention.
    CrossKv,
    /// What follows attention.
    AttentionOut,
    /// First layer of an MLP.
    MlpIn,
    /// Second layer of an MLP.
    MlpOut,
    /// Into and out of a stack of transformer layers.
    Projection,
    /// The 1 x 1 convolutions around latents.
    QuantConv,
    /// Projection of a pooled embedding.
    Pooled,
    /// Norms, biases and factors.
    Vector,
    /// Token and position tables.
    Table,
}
