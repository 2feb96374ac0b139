//! One walk over a tensor: read one or two sources, normalize, activate, write it as rows or as the operand of a GEMM.

use crate::gemm::Activation;
use crate::view::{ImageShape, OperandMut, Rows, RowsMut};
use crate::{Isa, Workers};

/// What a pass reads: the columns of up to two tensors side by side (a concatenation that is never materialized).
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// `[rows, c]` each, row stride `c`; the second may be absent.
    pub parts: [Option<(Rows<'a>, usize)>; 2],
}

impl<'a> Source<'a> {
    /// One tensor `[rows, c]`.
    pub fn one(rows: Rows<'a>, c: usize) -> Self {
        Source { parts: [Some((rows, c)), None] }
    }

    /// Two tensors side by side: `[rows, c0 + c1]`.
    pub fn two(a: (Rows<'a>, usize), b: (Rows<'a>, usize)) -> Self {
        Source { parts: [Some(a), Some(b)] }
    }

    /// Columns of all parts.
    pub fn columns(&self) -> usize {
        self.parts.iter().flatten().map(|p| p.1).sum()
    }
}

/// How a pass normalizes.
#[derive(Clone, Copy, Debug)]
pub enum Norm<'a> {
    /// Not at all.
    None,
    /// `(x - mean[b, g]) * rstd[b, g] * gamma[c] + beta[c]`.
    Group {
        /// `[batch, groups, 2]`: mean and reciprocal standard deviation, from [`group_stats`].
        stats: &'a [f32],
        /// Number of groups.
        groups: usize,
        /// `[c]`.
        gamma: &'a [f32],
        /// `[c]`.
        beta: &'a [f32],
    },
    /// Over the columns of a row.
    Layer {
        /// `[c]`.
        gamma: &'a [f32],
        /// `[c]`.
        beta: &'a [f32],
        /// Added to the variance.
        eps: f32,
    },
}

/// Mean and reciprocal standard deviation of each group of channels over each image: `stats` is `[batch, groups, 2]`.
/// The biased variance, as PyTorch's `group_norm`.
pub fn group_stats(
    workers: &Workers,
    isa: Isa,
    source: Source<'_>,
    image: ImageShape,
    groups: usize,
    eps: f32,
    stats: &mut [f32],
) {
    let _ = (workers, isa, source, image, groups, eps, stats);
    unimplemented!()
}

/// Writes `activation(norm(source))` as the operand rows of a GEMM, `stride` elements each, with the border of `image`
/// and the slack of each row zero. `U8` rows get a scale each: the row's largest magnitude / 127.
#[expect(clippy::too_many_arguments)]
pub fn operand_pass(
    workers: &Workers,
    isa: Isa,
    source: Source<'_>,
    image: ImageShape,
    norm: Norm<'_>,
    activation: Activation,
    out: OperandMut<'_>,
    stride: usize,
) {
    let _ = (workers, isa, source, image, norm, activation, out, stride);
    unimplemented!()
}

/// Writes `activation(norm(source))` as plain rows `[pixels, columns]`.
pub fn rows_pass(
    workers: &Workers,
    isa: Isa,
    source: Source<'_>,
    image: ImageShape,
    norm: Norm<'_>,
    activation: Activation,
    out: RowsMut<'_>,
) {
    let _ = (workers, isa, source, image, norm, activation, out);
    unimplemented!()
}
