//! What blocks are put through.
#![forbid(unsafe_code)]

use crate::gemm::Activation;
use crate::math;
use crate::pass::silu::SiluTable;
use crate::simd::shorts::Shorts;
use crate::simd::{BLOCK_VECTORS, Block, Element, Simd, SimdOp};

use super::{Floats, Keep, Kind, Pairs, Row, shorts};

/// What blocks are put through.
pub(in crate::pass) trait Function: Copy {
    /// Whether operations wait for each other so long that two rows go together even where their vectors are too many for the
    /// registers.
    const SLOW: bool = false;
    /// Of the blocks that come out.
    type Kind: Kind;
    /// Parameters of a block's columns.
    type Columns: Copy;
    /// Those of each whole block of a row, from place `at` on.
    fn columns<S: Simd>(&self, at: usize) -> impl Iterator<Item = Self::Columns>;
    /// What becomes of blocks of the same columns of `rows`, in split order if `split`.
    fn apply<S: Simd, const N: usize>(
        &self,
        s: S,
        x: [Block<S::F>; N],
        rows: [&Row; N],
        columns: Self::Columns,
        split: bool,
    ) -> [<Self::Kind as Kind>::Block<S>; N];
}

/// `x`.
#[derive(Clone, Copy)]
pub(in crate::pass) struct Same;

impl Function for Same {
    type Kind = Floats;
    type Columns = ();

    #[inline(always)]
    fn columns<S: Simd>(&self, _: usize) -> impl Iterator<Item = ()> {
        std::iter::repeat(())
    }

    #[inline(always)]
    fn apply<S: Simd, const N: usize>(
        &self,
        _: S,
        x: [Block<S::F>; N],
        _: [&Row; N],
        (): (),
        _: bool,
    ) -> [Block<S::F>; N] {
        x
    }
}

/// `x * factor[c] + offset[c]`.
#[derive(Clone, Copy)]
pub(in crate::pass) struct Affine<'a> {
    pub(in crate::pass) factor: &'a [f32],
    pub(in crate::pass) offset: &'a [f32],
}

impl<'a> Function for Affine<'a> {
    type Kind = Floats;
    type Columns = (&'a [f32], &'a [f32]);

    #[inline(always)]
    fn columns<S: Simd>(&self, at: usize) -> impl Iterator<Item = Self::Columns> {
        self.factor[at..].chunks_exact(S::BLOCK).zip(self.offset[at..].chunks_exact(S::BLOCK))
    }

    #[inline(always)]
    fn apply<S: Simd, const N: usize>(
        &self,
        s: S,
        mut x: [Block<S::F>; N],
        _: [&Row; N],
        (factor, offset): Self::Columns,
        _: bool,
    ) -> [Block<S::F>; N] {
        let (factor, offset) = (f32::load_block(s, factor), f32::load_block(s, offset));
        for i in 0..BLOCK_VECTORS {
            for x in &mut x {
                x[i] = s.fma(x[i], factor[i], offset[i]);
            }
        }
        x
    }
}

/// `(x - mean) * rstd * factor[c] + offset[c]`.
#[derive(Clone, Copy)]
pub(in crate::pass) struct Standard<'a>(pub(in crate::pass) Affine<'a>);

impl<'a> Function for Standard<'a> {
    type Kind = Floats;
    type Columns = (&'a [f32], &'a [f32]);

    #[inline(always)]
    fn columns<S: Simd>(&self, at: usize) -> impl Iterator<Item = Self::Columns> {
        self.0.columns::<S>(at)
    }

    #[inline(always)]
    fn apply<S: Simd, const N: usize>(
        &self,
        s: S,
        mut x: [Block<S::F>; N],
        rows: [&Row; N],
        columns: Self::Columns,
        split: bool,
    ) -> [Block<S::F>; N] {
        for (x, row) in x.iter_mut().zip(rows) {
            let [rstd, shift] = row.standard;
            for x in x {
                *x = s.fma(*x, s.splat(rstd), s.splat(shift));
            }
        }
        self.0.apply(s, x, rows, columns, split)
    }
}

/// SiLU by a table, of `x * factor[c] + offset[c]` in the table's units.
#[derive(Clone, Copy)]
pub(in crate::pass) struct AffineSilu<'a>(pub(in crate::pass) Affine<'a>, pub(in crate::pass) &'a SiluTable);

impl<'a> Function for AffineSilu<'a> {
    const SLOW: bool = true;
    type Kind = Pairs;
    type Columns = (&'a [f32], &'a [f32]);

    #[inline(always)]
    fn columns<S: Simd>(&self, at: usize) -> impl Iterator<Item = Self::Columns> {
        self.0.columns::<S>(at)
    }

    #[inline(always)]
    fn apply<S: Simd, const N: usize>(
        &self,
        s: S,
        x: [Block<S::F>; N],
        rows: [&Row; N],
        columns: Self::Columns,
        split: bool,
    ) -> [<Pairs as Kind>::Block<S>; N] {
        let x = self.0.apply(s, x, rows, columns, split);
        let mut pairs = [[shorts(s).splat(0); 2]; N];
        for (pair, x) in pairs.iter_mut().zip(x) {
            *pair = shorts(s).round_block(x, split);
        }
        self.1.of(shorts(s), pairs)
    }
}

/// Puts rows that were kept through an activation, as exact as the output, and multiplies them by the columns' factors.
pub(in crate::pass) struct Activate<'a> {
    pub(in crate::pass) rows: Keep<'a>,
    pub(in crate::pass) activation: Activation,
    /// Whether the output has 16 bits or fewer.
    pub(in crate::pass) coarse: bool,
    pub(in crate::pass) factors: Option<&'a [f32]>,
}

impl SimdOp for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Keep { kept, width, most } = self.rows;
        let silu = self.coarse && self.activation == Activation::Silu;
        for (row, most) in kept.chunks_exact_mut(width.max(1)).zip(most) {
            let mut lanes = s.splat(0.0);
            for (i, x) in row.chunks_exact_mut(S::LANES).enumerate() {
                let v = s.load(x);
                let y = if silu { math::silu_coarse(s, v) } else { self.activation.apply(s, v) };
                let y = match self.factors {
                    Some(factors) => s.mul(y, s.load(&factors[i * S::LANES..])),
                    None => y,
                };
                s.store(y, x);
                lanes = s.max_abs(y, lanes);
            }
            *most = s.max_lane(lanes);
        }
    }
}
