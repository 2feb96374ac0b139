//! What one task of a pass does: some rows at a time from the source to the output. A row whose scale must be known before it
//! can be written is kept in L1, as f32; others are made in one sweep.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::bf16;
use crate::gemm::Activation;
use crate::math::SiluPieces;
use crate::simd::{Simd, SimdOp};
use crate::view::{Coding, ImageShape, OperandMut, Rows};

use super::stats::stats_len;
use super::sweep::{
    Activate, Affine, AffineSilu, Codes, Elements, Function, Keep, Most, Rounded, Row, Same, Sink, Standard,
    Sums, Sweep, SweepKept, arrange, width,
};
use super::{Norm, Recipe, Source, Walk};

/// Rows of f32, filled up to whole blocks, that fit into a task's scratch memory.
pub(super) const SCRATCH_ROWS: usize = 6;

/// Rows that are made together, so that what waits for a whole row waits for all of them at once.
const ROWS: usize = 16;

/// Elements of the rows that are kept: half of L1.
const KEPT: usize = 6 * 1024;

/// The least magnitude that gets a scale: a row of smaller numbers is a row of zeros.
const LEAST: f32 = 1e-30;

/// SiLU is made of pieces where the numbers that 8 bits span are in a range at least this wide: their error is then less than a
/// ninth of a step.
const PIECES_RANGE: f32 = 2300.0 * SiluPieces::ERROR;

/// Some output rows of a pass.
pub(super) struct Chunk<'a> {
    pub(super) walk: Walk<'a>,
    /// The output row that `out` begins with.
    pub(super) first: usize,
    pub(super) out: OperandMut<'a>,
    /// [`SCRATCH_ROWS`] rows at least.
    pub(super) scratch: &'a mut [f32],
}

/// What is done to a row before the activation, but for what depends on the row.
#[derive(Clone, Copy)]
enum Norming<'a> {
    Same,
    Affine(Affine<'a>),
    Layer { columns: Affine<'a>, eps: f32 },
}

/// How rows are made of pixels of `source`.
#[derive(Clone, Copy)]
struct Maker<'a> {
    source: Source<'a>,
    norming: Norming<'a>,
    activation: Activation,
    /// That are left to be multiplied behind the activation.
    factors: Option<&'a [f32]>,
}

impl SimdOp for Chunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Walk { source, image, recipe: Recipe { norm, activation, factors }, stride } = self.walk;
        let width = width::<S>(&source);
        let (factor, rest) = self.scratch.split_at_mut(width);
        let (offset, rest) = rest.split_at_mut(width);
        let (times, kept) = rest.split_at_mut(width);
        // Where nothing lies between, norm and factors are one.
        let joined = factors.filter(|_| activation == Activation::None);
        let factors = factors.filter(|_| activation != Activation::None).map(|factors| {
            arrange::<S>(&source, factors, times);
            &*times
        });
        let (mut image_of_columns, mut ready) = (usize::MAX, 0);
        let mut waiting = [Row::default(); ROWS];
        let most = (KEPT / width.max(1)).clamp(1, ROWS);
        let rows = self.out.len() / stride.max(1);
        let mut pixels = image.pixels_from(self.first);
        for i in 0..=rows {
            let place = if i < rows { pixels.next().flatten() } else { None };
            let other = place.is_some_and(|(b, _)| b != image_of_columns);
            if ready == most || ready > 0 && (other || i == rows) {
                let columns = Affine { factor, offset };
                let norming = match norm {
                    Norm::None if joined.is_none() => Norming::Same,
                    Norm::None | Norm::Group { .. } => Norming::Affine(columns),
                    Norm::Layer { eps, .. } => Norming::Layer { columns, eps },
                };
                let maker = Maker { source, norming, activation, factors };
                maker.write(s, &mut waiting[..ready], image_of_columns, kept, &mut self.out, stride);
                ready = 0;
            }
            if i == rows {
                break;
            }
            let Some((b, pixel)) = place else {
                self.out.zero_row(i, stride, image.image(self.first + i));
                continue;
            };
            if other {
                set_columns::<S>(&source, norm, joined, b, [factor, offset], kept);
                image_of_columns = b;
            }
            waiting[ready] = Row { row: i, pixel, ..Row::default() };
            ready += 1;
        }
    }
}

/// The numbers that columns of image `b` are multiplied by and that are added to them; `scratch` has a row.
#[inline(always)]
fn set_columns<S: Simd>(
    source: &Source<'_>,
    norm: Norm<'_>,
    factors: Option<&[f32]>,
    b: usize,
    [factor, offset]: [&mut [f32]; 2],
    scratch: &mut [f32],
) {
    let columns = source.columns();
    let natural = &mut scratch[..columns];
    match norm {
        Norm::None if factors.is_none() => {}
        Norm::None => {
            natural.fill(1.0);
            set::<S>(source, factors, natural, factor);
            natural.fill(0.0);
            set::<S>(source, factors, natural, offset);
        }
        Norm::Group { stats, groups, gamma, beta } => {
            let stats = &stats[b * stats_len(groups, columns)..][..2 * groups];
            let size = columns / groups;
            let parts = || natural_groups(stats, size);
            for (range, [_, rstd]) in parts() {
                for (x, gamma) in natural[range.clone()].iter_mut().zip(&gamma[range]) {
                    *x = rstd * gamma;
                }
            }
            set::<S>(source, factors, natural, factor);
            for (range, [mean, rstd]) in parts() {
                let columns = gamma[range.clone()].iter().zip(&beta[range.clone()]);
                for (x, (gamma, beta)) in natural[range].iter_mut().zip(columns) {
                    *x = beta - mean * (rstd * gamma);
                }
            }
            set::<S>(source, factors, natural, offset);
        }
        Norm::Layer { gamma, beta, .. } => {
            natural.copy_from_slice(gamma);
            set::<S>(source, factors, natural, factor);
            natural.copy_from_slice(beta);
            set::<S>(source, factors, natural, offset);
        }
    }
}

/// Arranges `natural`, multiplied by `factors`.
#[inline(always)]
fn set<S: Simd>(source: &Source<'_>, factors: Option<&[f32]>, natural: &mut [f32], to: &mut [f32]) {
    if let Some(factors) = factors {
        natural.iter_mut().zip(factors).for_each(|(x, f)| *x *= f);
    }
    arrange::<S>(source, natural, to);
}

/// The channels of each group of `size`, with its mean and reciprocal standard deviation.
fn natural_groups(stats: &[f32], size: usize) -> impl Iterator<Item = (Range<usize>, [f32; 2])> {
    stats.as_chunks().0.iter().enumerate().map(move |(g, &stats)| (g * size..(g + 1) * size, stats))
}

impl Maker<'_> {
    /// Writes `rows` of image `b`, with zeros up to `stride`.
    #[inline(always)]
    fn write<S: Simd>(
        &self,
        s: S,
        rows: &mut [Row],
        b: usize,
        kept: &mut [f32],
        out: &mut OperandMut<'_>,
        stride: usize,
    ) {
        if let Norming::Layer { eps, .. } = self.norming {
            self.standardize(s, rows, eps);
        }
        let columns = self.source.columns();
        match out {
            OperandMut::U8 { codes, scale } => {
                fill_slack(codes, rows, columns..stride, 128);
                self.write_scaled(s, rows, kept, codes, scale, stride);
            }
            OperandMut::U8Uniform { codes, images } => {
                fill_slack(codes, rows, columns..stride, 128);
                let Coding { scale, zero } = images[b];
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                let shift = (zero - 128) as f32;
                if 254.0 * scale >= PIECES_RANGE
                    && let Some((affine, pieces)) = self.pieces::<S>()
                {
                    // They make codes at once.
                    let pieces = pieces.scaled(inverse, shift);
                    let sink = Rounded { codes, stride };
                    self.sweep(s, rows, AffineSilu(affine, &pieces), sink);
                } else {
                    rows.iter_mut().for_each(|row| row.inverse = inverse);
                    self.make(s, rows, true, kept, Codes { codes, stride, shift });
                }
            }
            OperandMut::Bf16(out) => {
                fill_slack(out, rows, columns..stride, bf16::ZERO);
                self.make(s, rows, true, kept, Elements { out, stride });
            }
            OperandMut::F32(out) => {
                fill_slack(out, rows, columns..stride, 0.0);
                self.make(s, rows, false, kept, Elements { out, stride });
            }
        }
    }

    /// Writes `rows` with a scale each.
    #[inline(always)]
    fn write_scaled<S: Simd>(
        &self,
        s: S,
        rows: &mut [Row],
        kept: &mut [f32],
        codes: &mut [u8],
        scale: &mut [f32],
        stride: usize,
    ) {
        let width = width::<S>(&self.source);
        let mut most = [0.0; ROWS];
        let most = &mut most[..rows.len()];
        // Where nothing is done to rows, they are read twice instead of kept.
        let bare = matches!(self.norming, Norming::Same) && self.activation == Activation::None;
        if bare {
            self.sweep(s, rows, Same, Most(most));
        } else {
            if let Some((columns, pieces)) = self.pieces::<S>() {
                let sink = Keep { kept: &mut *kept, width, most: &mut *most };
                self.sweep(s, rows, AffineSilu(columns, pieces), sink);
            }
            if most.iter().any(|&most| most < PIECES_RANGE) {
                most.fill(0.0);
                self.keep(s, rows, true, Keep { kept: &mut *kept, width, most: &mut *most });
            }
        }
        for (row, &mut most) in rows.iter_mut().zip(most) {
            (row.inverse, scale[row.row]) =
                if most < LEAST { (0.0, 0.0) } else { (127.0 / most, most / 127.0) };
        }
        let sink = Codes { codes, stride, shift: 0.0 };
        if bare {
            self.sweep(s, rows, Same, sink);
        } else {
            s.outline(SweepKept { source: &self.source, rows, kept, width, sink });
        }
    }

    /// The norm and SiLU of pieces, where these are what rows of 8 bits are made of.
    #[inline(always)]
    fn pieces<S: Simd>(&self) -> Option<(Affine<'_>, &'static SiluPieces)> {
        match self.norming {
            Norming::Affine(columns)
                if S::LOOKS_UP && self.factors.is_none() && self.activation == Activation::Silu =>
            {
                Some((columns, SiluPieces::get()))
            }
            _ => None,
        }
    }

    /// Hands `rows` to `sink`, whose output is `coarse`; by way of `kept` where there is an activation.
    #[inline(always)]
    fn make<S: Simd>(&self, s: S, rows: &[Row], coarse: bool, kept: &mut [f32], sink: impl Sink) {
        if self.activation == Activation::None {
            return self.normalize(s, rows, sink);
        }
        let width = width::<S>(&self.source);
        let mut most = [0.0; ROWS];
        self.keep(s, rows, coarse, Keep { kept: &mut *kept, width, most: &mut most[..rows.len()] });
        s.outline(SweepKept { source: &self.source, rows, kept, width, sink });
    }

    /// Keeps `rows` for an output that is `coarse`.
    #[inline(always)]
    fn keep<S: Simd>(&self, s: S, rows: &[Row], coarse: bool, to: Keep<'_>) {
        let Keep { kept, width, most } = to;
        self.normalize(s, rows, Keep { kept: &mut *kept, width, most: &mut *most });
        let &Maker { activation, factors, .. } = self;
        if activation != Activation::None {
            s.outline(Activate { rows: Keep { kept, width, most }, activation, coarse, factors });
        }
    }

    /// Hands `rows` to `sink` as they are before the activation.
    #[inline(always)]
    fn normalize<S: Simd>(&self, s: S, rows: &[Row], sink: impl Sink) {
        match self.norming {
            Norming::Same => self.sweep(s, rows, Same, sink),
            Norming::Affine(columns) => self.sweep(s, rows, columns, sink),
            Norming::Layer { columns, .. } => self.sweep(s, rows, Standard(columns), sink),
        }
    }

    #[inline(always)]
    fn sweep<S: Simd>(&self, s: S, rows: &[Row], function: impl Function, sink: impl Sink) {
        s.outline(Sweep { source: &self.source, rows, function, sink });
    }

    /// Means and deviations of `rows`.
    #[inline(always)]
    fn standardize<S: Simd>(&self, s: S, rows: &mut [Row], eps: f32) {
        /// Where the mean square is this many times the variance, it is too inexact to be made from the sums.
        const FAR: f32 = 4.0;
        let mut sums = [[0.0; 2]; ROWS];
        self.sweep(s, rows, Same, Sums(&mut sums[..rows.len()]));
        let n = self.source.columns() as f32;
        for (row, [sum, squares]) in rows.iter_mut().zip(sums) {
            let (mean, square) = (sum / n, squares / n);
            let mut variance = square - mean * mean;
            if square > FAR * variance {
                variance = self.squares(row.pixel, mean) / n;
            }
            let rstd = 1.0 / (variance + eps).sqrt();
            row.standard = [rstd, -mean * rstd];
        }
    }

    /// The sum of `(x - mean)^2` over a row of the source.
    fn squares(&self, pixel: usize, mean: f32) -> f32 {
        let square = |x: f32| f64::from(x - mean) * f64::from(x - mean);
        let parts = self.source.row(pixel).map(|(_, part)| match part {
            Rows::F32(part) => part.iter().map(|&x| square(x)).sum::<f64>(),
            Rows::Bf16(part) => part.iter().map(|x| square(x.to_f32())).sum(),
        });
        parts.sum::<f64>() as f32
    }
}

/// Fills columns `slack` of `rows`, whose stride is where they end.
fn fill_slack<T: Copy>(out: &mut [T], rows: &[Row], slack: Range<usize>, x: T) {
    if !slack.is_empty() {
        for row in rows {
            out[row.row * slack.end..][slack.clone()].fill(x);
        }
    }
}

impl ImageShape {
    /// The image of operand row `row`.
    #[inline(always)]
    fn image(&self, row: usize) -> usize {
        row / (self.full_h() * self.full_w())
    }

    /// The images and the source pixels that the operand rows from `first` on hold, none on the border.
    #[inline(always)]
    fn pixels_from(self, first: usize) -> impl Iterator<Item = Option<(usize, usize)>> {
        let (full_h, full_w) = (self.full_h(), self.full_w());
        let (line, mut x) = (first / full_w, first % full_w);
        let (mut b, mut y) = (line / full_h, line % full_h);
        std::iter::repeat_with(move || {
            let (row, column) = (y.wrapping_sub(self.border.top), x.wrapping_sub(self.border.left));
            let pixel = (row < self.h && column < self.w).then(|| (b, (b * self.h + row) * self.w + column));
            x += 1;
            if x == full_w {
                (x, y) = (0, y + 1);
            }
            if y == full_h {
                (y, b) = (0, b + 1);
            }
            pixel
        })
    }
}

impl OperandMut<'_> {
    /// Elements, slack included.
    fn len(&self) -> usize {
        match self {
            OperandMut::U8 { codes, .. } | OperandMut::U8Uniform { codes, .. } => codes.len(),
            OperandMut::Bf16(out) => out.len(),
            OperandMut::F32(out) => out.len(),
        }
    }

    fn zero_row(&mut self, i: usize, stride: usize, image: usize) {
        match self {
            OperandMut::U8 { codes, scale } => {
                codes[i * stride..(i + 1) * stride].fill(128);
                scale[i] = 0.0;
            }
            OperandMut::U8Uniform { codes, images } => {
                codes[i * stride..(i + 1) * stride].fill(images[image].zero as u8);
            }
            OperandMut::Bf16(out) => out[i * stride..(i + 1) * stride].fill(bf16::ZERO),
            OperandMut::F32(out) => out[i * stride..(i + 1) * stride].fill(0.0),
        }
    }
}
