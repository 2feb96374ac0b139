//! One walk over a tensor: read one or two sources, normalize, activate, write it as rows or as the operand of a GEMM.

mod columns;
mod rows;
mod silu;
mod stats;
mod sweep;

use bytemuck::cast_slice_mut;

use crate::gemm::Activation;
use crate::par::{SCRATCH_BYTES, Shared};
use crate::simd::{MAX_BLOCK, dispatch};
use crate::view::{ImageShape, OperandMut, Rows, RowsMut};
use crate::{Isa, Workers};
use columns::{Prepare, Scales};
use rows::Chunk;
pub use stats::{
    group_codings, group_finish, group_stats, group_sums, range_codings, stats_len, sums_len, sums_rows,
};

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
        /// `[batch, stats_len]`, from [`group_stats`].
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

/// What a pass makes of each row `x`: `activation(norm(x)) * factors`.
#[derive(Clone, Copy, Debug)]
pub struct Recipe<'a> {
    /// First.
    pub norm: Norm<'a>,
    /// Then.
    pub activation: Activation,
    /// `[c]`, greater than 0: the numbers by which the columns of the weight that is to meet the rows were divided.
    pub factors: Option<&'a [f32]>,
}

impl<'a> Recipe<'a> {
    /// Without factors.
    pub const fn new(norm: Norm<'a>, activation: Activation) -> Self {
        Recipe { norm, activation, factors: None }
    }
}

/// The most columns a pass takes: it keeps a few rows of f32 in a worker's scratch memory.
pub const MAX_COLUMNS: usize = SCRATCH_BYTES / 4 / rows::SCRATCH_ROWS - 2 * MAX_BLOCK;

/// Elements that one task of a pass handles, about: enough to hide the cost of starting it.
const TASK_ELEMENTS: usize = 32 * 1024;

/// Writes what `recipe` makes of `source` as the operand rows of a GEMM, `stride` elements each, with the border of `image`
/// and the slack of each row zero. `U8` rows get a scale each, the row's largest magnitude / 127; `U8Uniform` rows have the
/// coding of their image.
///
/// # Panics
/// Where shapes don't agree, or for [`Activation::Geglu`].
pub fn operand_pass(
    workers: &Workers,
    isa: Isa,
    source: Source<'_>,
    image: ImageShape,
    recipe: Recipe<'_>,
    out: OperandMut<'_>,
    stride: usize,
) {
    assert!(stride.is_multiple_of(64), "operand rows of {stride} elements");
    let walk = Walk { source, image, recipe, stride };
    walk.run(workers, isa, out);
}

/// Writes what `recipe` makes of `source` as plain rows `[pixels, columns]`.
///
/// # Panics
/// Where shapes don't agree, or for [`Activation::Geglu`].
pub fn rows_pass(
    workers: &Workers,
    isa: Isa,
    source: Source<'_>,
    image: ImageShape,
    recipe: Recipe<'_>,
    out: RowsMut<'_>,
) {
    let image = ImageShape { border: Default::default(), ..image };
    let walk = Walk { source, image, recipe, stride: source.columns() };
    walk.run(
        workers,
        isa,
        match out {
            RowsMut::F32(rows) => OperandMut::F32(rows),
            RowsMut::Bf16(rows) => OperandMut::Bf16(rows),
        },
    );
}

impl<'a> Source<'a> {
    /// Asserts that each part has `rows` rows.
    fn check(&self, rows: usize) {
        assert!(self.columns() <= MAX_COLUMNS, "{} columns", self.columns());
        for &(part, c) in self.parts.iter().flatten() {
            assert_eq!(part.len(), rows * c, "source of {rows} x {c}");
        }
    }

    /// The parts of row `r`, each with the column where it begins.
    #[inline(always)]
    fn row(&self, r: usize) -> impl Iterator<Item = (usize, Rows<'a>)> {
        let mut column = 0;
        self.parts.into_iter().flatten().map(move |(part, c)| {
            column += c;
            (column - c, part.slice(r * c..(r + 1) * c))
        })
    }
}

/// A pass, checked and cut into tasks by [`Walk::run`].
#[derive(Clone, Copy)]
struct Walk<'a> {
    source: Source<'a>,
    image: ImageShape,
    recipe: Recipe<'a>,
    /// Elements from one output row to the next.
    stride: usize,
}

impl Walk<'_> {
    fn run(self, workers: &Workers, isa: Isa, out: OperandMut<'_>) {
        let (image, columns, rows) = (self.image, self.source.columns(), self.image.operand_rows());
        self.source.check(image.pixels());
        assert!(columns <= self.stride, "{columns} columns in rows of {}", self.stride);
        let Recipe { norm, activation, factors } = self.recipe;
        assert!(activation != Activation::Geglu, "GEGLU joins columns: only in an epilogue");
        if let Some(factors) = factors {
            assert_eq!(factors.len(), columns, "factors of {columns} channels");
        }
        match norm {
            Norm::None => {}
            Norm::Group { stats, groups, gamma, beta } => {
                assert!(
                    groups > 0 && columns.is_multiple_of(groups),
                    "{columns} channels in {groups} groups"
                );
                assert_eq!(
                    stats.len(),
                    image.batch * stats_len(groups, columns),
                    "statistics of {} x {groups}",
                    image.batch
                );
                assert_eq!(
                    (gamma.len(), beta.len()),
                    (columns, columns),
                    "gamma and beta of {columns} channels"
                );
            }
            Norm::Layer { gamma, beta, .. } => {
                assert_eq!(
                    (gamma.len(), beta.len()),
                    (columns, columns),
                    "gamma and beta of {columns} channels"
                );
            }
        }
        let elements = match &out {
            OperandMut::U8 { codes, scale } => {
                assert_eq!(scale.len(), rows, "scales of {rows} rows");
                codes.len()
            }
            OperandMut::U8Uniform { codes, images } => {
                assert_eq!(images.len(), image.batch, "codings of {} images", image.batch);
                codes.len()
            }
            OperandMut::Bf16(out) => out.len(),
            OperandMut::F32(out) => out.len(),
        };
        assert_eq!(elements, rows * self.stride, "operand of {rows} x {}", self.stride);

        let scales = match &out {
            OperandMut::U8 { .. } => Some(Scales::Rows),
            OperandMut::U8Uniform { images, .. } => Some(Scales::Images(images)),
            _ => None,
        };
        let prepared = dispatch(isa, Prepare { source: self.source, recipe: self.recipe, scales });
        let chunk = (TASK_ELEMENTS / columns.max(1)).clamp(8, 512);
        let tasks = rows.div_ceil(chunk);
        let part = |task: usize| (task * chunk, chunk.min(rows - task * chunk));
        let task = |task: usize, scratch: &mut [u8], out: OperandMut<'_>| {
            dispatch(
                isa,
                Chunk {
                    walk: self,
                    columns: &prepared,
                    first: part(task).0,
                    out,
                    scratch: cast_slice_mut(scratch),
                },
            );
        };
        match out {
            OperandMut::U8 { codes, scale } => {
                let (codes, scale) = (Shared::new(codes), Shared::new(scale));
                workers.for_each(tasks, |t, scratch| {
                    let (first, n) = part(t);
                    // SAFETY: each task has its own rows.
                    let codes = unsafe { codes.slice(first * self.stride, n * self.stride) };
                    // SAFETY: as above.
                    let scale = unsafe { scale.slice(first, n) };
                    task(t, scratch, OperandMut::U8 { codes, scale });
                });
            }
            OperandMut::U8Uniform { codes, images } => {
                let codes = Shared::new(codes);
                workers.for_each(tasks, |t, scratch| {
                    let (first, n) = part(t);
                    // SAFETY: each task has its own rows.
                    let codes = unsafe { codes.slice(first * self.stride, n * self.stride) };
                    task(t, scratch, OperandMut::U8Uniform { codes, images });
                });
            }
            OperandMut::Bf16(out) => {
                let out = Shared::new(out);
                workers.for_each(tasks, |t, scratch| {
                    let (first, n) = part(t);
                    // SAFETY: each task has its own rows.
                    task(
                        t,
                        scratch,
                        OperandMut::Bf16(unsafe { out.slice(first * self.stride, n * self.stride) }),
                    );
                });
            }
            OperandMut::F32(out) => {
                let out = Shared::new(out);
                workers.for_each(tasks, |t, scratch| {
                    let (first, n) = part(t);
                    // SAFETY: each task has its own rows.
                    task(
                        t,
                        scratch,
                        OperandMut::F32(unsafe { out.slice(first * self.stride, n * self.stride) }),
                    );
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
