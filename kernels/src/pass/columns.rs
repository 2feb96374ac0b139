//! What the columns of each image are multiplied by and what is added to them, once a pass.
#![forbid(unsafe_code)]

use crate::gemm::Activation;
use crate::simd::shorts::Shorts;
use crate::simd::{Simd, SimdOp};
use crate::view::Coding;

use super::silu::SiluTable;
use super::stats::stats_len;
use super::sweep::{Affine, AffineSilu, arrange, width};
use super::{Norm, Recipe, Source};

/// What 8 bits of an output mean.
#[derive(Clone, Copy)]
pub(super) enum Scales<'a> {
    /// Each row has a scale.
    Rows,
    /// Each image has a coding.
    Images(&'a [Coding]),
}

/// The parameters of columns, in the order of blocks.
#[derive(Default)]
pub(super) struct Columns {
    /// Of a row that is filled up to whole blocks.
    width: usize,
    /// `[images, 2, width]`: factors and offsets, where there is a norm or what can be joined with one. One image stands for
    /// all where these don't depend on it.
    norms: Vec<f32>,
    /// `[images, 2, width]`: the same in units of `silu`, where the norm and SiLU are taken in 16 bits.
    units: Vec<f32>,
    /// `[images]`, none where 16 bits are not enough.
    silu: Vec<Option<SiluTable>>,
    /// `[width]`: factors that are left to be multiplied behind the activation.
    times: Vec<f32>,
}

impl Columns {
    /// Of image `b`, where a row is not just what it is in the source.
    pub(super) fn norm(&self, b: usize) -> Option<Affine<'_>> {
        self.of(&self.norms, b)
    }

    /// The norm and SiLU of image `b` in 16 bits, where the rows are made of these and the output has 8 bits.
    pub(super) fn silu(&self, b: usize) -> Option<AffineSilu<'_>> {
        let table = self.silu.get(b)?.as_ref()?;
        Some(AffineSilu(self.of(&self.units, b)?, table))
    }

    /// See the field.
    pub(super) fn times(&self) -> Option<&[f32]> {
        (!self.times.is_empty()).then_some(&self.times)
    }

    fn of<'a>(&self, all: &'a [f32], b: usize) -> Option<Affine<'a>> {
        let images = all.len() / (2 * self.width).max(1);
        let at = 2 * self.width * b.min(images.checked_sub(1)?);
        let (factor, offset) = all[at..at + 2 * self.width].split_at(self.width);
        Some(Affine { factor, offset })
    }
}

/// Makes [`Columns`].
pub(super) struct Prepare<'a> {
    pub(super) source: Source<'a>,
    pub(super) recipe: Recipe<'a>,
    /// Of an output of 8 bits.
    pub(super) scales: Option<Scales<'a>>,
}

impl SimdOp for Prepare<'_> {
    type Output = Columns;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Columns {
        let Prepare { source, recipe: Recipe { norm, activation, factors }, scales } = self;
        let (columns, width) = (source.columns(), width::<S>(&source));
        let mut all = Columns { width, ..Columns::default() };
        // Where nothing lies between, norm and factors are one.
        let joined = if activation == Activation::None {
            factors
        } else {
            if let Some(factors) = factors {
                all.times.resize(width, 0.0);
                arrange::<S>(&source, factors, &mut all.times);
            }
            None
        };
        let (mut factor, mut offset) = (vec![1.0; columns], vec![0.0; columns]);
        let mut put = |factor: &mut [f32], offset: &mut [f32]| {
            for (i, x) in joined.into_iter().flatten().enumerate() {
                factor[i] *= x;
                offset[i] *= x;
            }
            let at = all.norms.len();
            all.norms.resize(at + 2 * width, 0.0);
            let (to_factor, to_offset) = all.norms[at..].split_at_mut(width);
            arrange::<S>(&source, factor, to_factor);
            arrange::<S>(&source, offset, to_offset);
        };
        match norm {
            Norm::None if joined.is_none() => {}
            Norm::None => put(&mut factor, &mut offset),
            Norm::Layer { gamma, beta, .. } => {
                factor.copy_from_slice(gamma);
                offset.copy_from_slice(beta);
                put(&mut factor, &mut offset);
            }
            Norm::Group { stats, groups, gamma, beta } => {
                let silu = factors.is_none() && activation == Activation::Silu && s.shorts().is_some();
                for (b, stats) in stats.chunks_exact(stats_len(groups, columns)).enumerate() {
                    let (moments, ranges) = stats.split_at(2 * groups);
                    for (g, &[mean, rstd]) in moments.as_chunks().0.iter().enumerate() {
                        for c in g * (columns / groups)..(g + 1) * (columns / groups) {
                            factor[c] = rstd * gamma[c];
                            offset[c] = beta[c] - mean * factor[c];
                        }
                    }
                    if let Some(scales) = scales.filter(|_| silu) {
                        let range = range(ranges.as_chunks().0, &factor, &offset);
                        all.silu.push(match scales {
                            Scales::Rows => SiluTable::rows(S::Shorts::PIECES, range),
                            Scales::Images(codings) => SiluTable::codes(S::Shorts::PIECES, range, codings[b]),
                        });
                    }
                    put(&mut factor, &mut offset);
                }
            }
        }
        all.units.resize(if all.silu.is_empty() { 0 } else { all.norms.len() }, 0.0);
        let tables = all.silu.iter().zip(all.norms.chunks_exact(2 * width));
        for ((table, norm), unit) in tables.zip(all.units.chunks_exact_mut(2 * width)) {
            let Some(table) = table else { continue };
            for (i, (unit, norm)) in unit.iter_mut().zip(norm).enumerate() {
                *unit = norm * table.factor + if i < width { 0.0 } else { table.offset };
            }
        }
        all
    }
}

/// Zero and the least and the greatest number that factors and offsets make of the least and the greatest of each channel.
#[inline(always)]
fn range(ranges: &[[f32; 2]], factor: &[f32], offset: &[f32]) -> [f32; 2] {
    let (mut low, mut high) = (0f32, 0f32);
    for ((&[least, most], factor), offset) in ranges.iter().zip(factor).zip(offset) {
        let (a, b) = (least * factor + offset, most * factor + offset);
        low = if a < b { a.min(low) } else { b.min(low) };
        high = if a < b { b.max(high) } else { a.max(high) };
    }
    [low, high]
}
