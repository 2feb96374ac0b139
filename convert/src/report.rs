//! What a conversion made of each tensor and of the whole.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use engine::format::Layout;
use engine::graph::weight::{Role, WeightKind};
use serde::Serialize;

use crate::family::Subject;

/// A conversion that is done.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The file written.
    pub output: PathBuf,
    /// Its length.
    pub file_bytes: u64,
    /// Bytes of the tensors that went into it, as the checkpoint has them.
    pub source_bytes: u64,
    /// What it is.
    pub card: Subject,
    /// What to tell: conclusions drawn, things left out.
    pub notes: Vec<String>,
    /// Totals of each network, in the order of the file.
    pub parts: Vec<Total>,
    /// Totals of each encoding of matrices; vectors and tables are `f32` and `f16`.
    pub encodings: Vec<Total>,
    /// Bits per number of the UNet, over all that it has in the file.
    pub unet_bits_per_weight: f64,
    /// Every tensor, in the order of the file.
    pub tensors: Vec<TensorReport>,
}

/// A sum over tensors.
#[derive(Clone, Debug, Serialize)]
pub struct Total {
    /// Of what.
    pub name: String,
    /// Tensors.
    pub tensors: usize,
    /// Numbers.
    pub parameters: u64,
    /// Bytes in the file.
    pub bytes: u64,
}

/// One tensor of the file.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// Canonical name.
    pub name: String,
    /// Name in the checkpoint.
    pub source: String,
    /// Network that it belongs to.
    pub part: String,
    /// The part it plays.
    pub role: Role,
    /// `[n, k]`, `[n, k, kh, kw]` or `[len]`.
    pub shape: Vec<usize>,
    /// How it was stored.
    pub from: String,
    /// How it is stored.
    pub encoding: String,
    /// Bytes in the file.
    pub bytes: u64,
    /// Relative error of the matrix (root mean square), where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
    /// Largest magnitude.
    pub largest: f32,
    /// By what its inputs are multiplied, where a few of them had weights much wider than the rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factors: Option<FactorsReport>,
}

/// The factors of a matrix, which others may share.
#[derive(Clone, Debug, Serialize)]
pub struct FactorsReport {
    /// The vector that holds them.
    pub name: String,
    /// Inputs whose factor isn't 1.
    pub inputs: usize,
    /// The least.
    pub least: f32,
    /// The greatest.
    pub most: f32,
}

impl FactorsReport {
    pub(crate) fn new(name: String, factors: &[f32]) -> FactorsReport {
        FactorsReport {
            name,
            inputs: factors.iter().filter(|&&f| f != 1.0).count(),
            least: factors.iter().copied().fold(f32::INFINITY, f32::min),
            most: factors.iter().copied().fold(0.0, f32::max),
        }
    }
}

impl TensorReport {
    fn parameters(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// The shape in the order of the checkpoint.
pub(crate) fn shape_of(kind: &WeightKind) -> Vec<usize> {
    match *kind {
        WeightKind::Matrix { n, kh: 1, kw: 1, k, .. } => vec![n, k],
        WeightKind::Matrix { n, kh, kw, k, .. } => vec![n, k, kh, kw],
        WeightKind::Vector { len, .. } => vec![len],
        WeightKind::Table { rows, cols } => vec![rows, cols],
    }
}

/// Sums by a name, in the order in which the names come first.
pub(crate) fn totals<'a>(
    tensors: &'a [TensorReport],
    name: impl Fn(&'a TensorReport) -> &'a str,
) -> Vec<Total> {
    let mut totals: Vec<Total> = Vec::new();
    for tensor in tensors {
        let name = name(tensor);
        if totals.iter().all(|t| t.name != name) {
            totals.push(Total { name: name.to_owned(), tensors: 0, parameters: 0, bytes: 0 });
        }
        let total = totals.iter_mut().find(|t| t.name == name).expect("just pushed");
        total.tensors += 1;
        total.parameters += tensor.parameters();
        total.bytes += tensor.bytes;
    }
    totals
}

/// Bits per number of the UNet: matrices with their scales, padding and factors, norms and biases.
pub(crate) fn unet_bits(tensors: &[TensorReport], layout: &Layout) -> f64 {
    let numbers: u64 = tensors.iter().filter(|t| t.part == "unet").map(TensorReport::parameters).sum();
    let unet = layout.parts().iter().find(|part| part.name == "unet");
    let bytes: u64 =
        unet.map_or(0, |part| layout.tensors()[part.tensors.clone()].iter().map(|t| t.len).sum());
    8.0 * bytes as f64 / (numbers as f64).max(1.0)
}
