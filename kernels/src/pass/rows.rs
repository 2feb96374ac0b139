//! What one task of a pass does: some rows at a time from the source to the output. A row whose scale must be known before it
//! can be written is kept in L1, as f32; others are made in one sweep.
#![forbid(unsafe_code)]

use std::ops::Range;

use bytemuck::cast_slice_mut;

use crate::bf16;
use crate::gemm::Activation;
use crate::simd::{Simd, SimdOp};
use crate::view::{Coding, ImageShape, OperandMut, Rows};

use super::columns::Columns;
use super::silu::{DIP, SiluTable};
use super::sweep::{
    Activate, Affine, AffineSilu, Ahead, Codes, Distance, Elements, Floats, Function, HighCodes, Keep,
    KeepPairs, LowCodes, Most, Row, Same, ScaledCodes, Sink, Standard, Sums, Sweep, SweepKept, SweepPairs,
    width,
};
use super::{Norm, Recipe, Source, Walk};

/// Rows of f32, filled up to whole blocks, that must fit into a task's scratch memory: those of the statistics.
pub(super) const SCRATCH_ROWS: usize = 7;

/// Rows that are made together, so that what waits for a whole row waits for all of them at once.
const ROWS: usize = 16;

/// Elements of the rows that are kept: a quarter of L1, which holds the source's too, those of the next rows, and parameters.
const KEPT: usize = 3 * 1024;

/// Results of SiLU in 16 bits make a row of codes where their error is less than a part of a step, the inverse of this.
const STEPS: f32 = 6.0;

/// The least magnitude that gets a scale: a row of smaller numbers is a row of zeros.
const LEAST: f32 = 1e-30;

/// Some output rows of a pass.
pub(super) struct Chunk<'a> {
    pub(super) walk: Walk<'a>,
    pub(super) columns: &'a Columns,
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
    /// The norm and SiLU in 16 bits, where the rows are made of these and the output has 8 bits.
    silu: Option<AffineSilu<'a>>,
}

impl SimdOp for Chunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Walk { source, image, recipe: Recipe { norm, activation, .. }, stride } = self.walk;
        let together = (KEPT / width::<S>(&source).max(1) / 2 * 2).clamp(2, ROWS);
        let rows = self.out.len() / stride.max(1);
        let mut made = [Row::default(); ROWS];
        let mut row = 0;
        while row < rows {
            let Run { image: b, pixel, rows: n } = image.run(self.first + row, rows - row);
            if let Some(pixel) = pixel {
                let norming = match (norm, self.columns.norm(b)) {
                    (Norm::Layer { eps, .. }, Some(columns)) => Norming::Layer { columns, eps },
                    (_, Some(columns)) => Norming::Affine(columns),
                    (_, None) => Norming::Same,
                };
                let (factors, silu) = (self.columns.times(), self.columns.silu(b));
                let maker = Maker { source, norming, activation, factors, silu };
                for first in (0..n).step_by(together) {
                    let made = &mut made[..together.min(n - first)];
                    for (i, made) in made.iter_mut().enumerate() {
                        let at = first + i;
                        *made = Row { row: row + at, pixel: pixel + at, ..Row::default() };
                    }
                    maker.write(s, made, b, self.scratch, &mut self.out, stride);
                }
            } else {
                self.out.zero_rows(row * stride..(row + n) * stride, row..row + n, b);
            }
            row += n;
        }
    }
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
                match self.silu {
                    Some(silu) => self.write_silu(s, rows, silu, kept, codes, scale, stride),
                    None => self.write_scaled(s, rows, kept, codes, scale, stride),
                }
            }
            OperandMut::U8Uniform { codes, images } => {
                fill_slack(codes, rows, columns..stride, 128);
                let Coding { scale, zero } = images[b];
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                let shift = (zero - 128) as f32;
                if let Some(silu) = self.silu {
                    self.sweep(s, rows, Ahead::SOURCE, silu, HighCodes { codes, stride });
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
            self.sweep(s, rows, Ahead::SOURCE, Same, Most(most));
        } else {
            let claim = Some((&*codes, stride));
            self.keep(s, rows, true, claim, Keep { kept: &mut *kept, width, most: &mut *most });
        }
        for (row, &mut most) in rows.iter_mut().zip(most) {
            (row.inverse, scale[row.row]) =
                if most < LEAST { (0.0, 0.0) } else { (127.0 / most, most / 127.0) };
        }
        let sink = ScaledCodes { codes, stride };
        if bare {
            self.sweep(s, rows, Ahead::NONE, Same, sink);
        } else {
            s.outline(SweepKept { source: &self.source, rows, kept, width, sink });
        }
    }

    /// As [`Maker::write_scaled`], of 16-bit numbers, but for rows whose greatest is so small that these would be too coarse.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn write_silu<S: Simd>(
        &self,
        s: S,
        rows: &mut [Row],
        silu: AffineSilu<'_>,
        kept: &mut [f32],
        codes: &mut [u8],
        scale: &mut [f32],
        stride: usize,
    ) {
        let AffineSilu(_, &SiluTable { unit, error, .. }) = silu;
        let width = width::<S>(&self.source);
        let mut most = [0; ROWS];
        let most = &mut most[..rows.len()];
        let pairs: &mut [i16] = cast_slice_mut(&mut *kept);
        let ahead = Ahead { claim: Some((&*codes, stride)), ..Ahead::SOURCE };
        self.sweep(s, rows, ahead, silu, KeepPairs { kept: pairs, width, most: &mut *most });
        // Where the greatest is not that of the magnitudes, it is small.
        let least = (127.0 * STEPS * error).max(DIP / unit + error);
        let (mut weak, mut n) = ([Row::default(); ROWS], 0);
        for (row, &mut most) in rows.iter_mut().zip(most) {
            let most = f32::from(most);
            if most < least {
                weak[n] = *row;
                n += 1;
            }
            scale[row.row] = most * unit / 127.0;
            row.times = (127.0 * 32_768.0 / most.max(least)) as i16;
        }
        let sink = LowCodes { codes: &mut *codes, stride };
        s.outline(SweepPairs { source: &self.source, rows, kept: pairs, width, sink });
        if n > 0 {
            self.write_scaled(s, &mut weak[..n], kept, codes, scale, stride);
        }
    }

    /// Hands `rows` to `sink`, whose output is `coarse`; by way of `kept` where there is an activation.
    #[inline(always)]
    fn make<S: Simd>(
        &self,
        s: S,
        rows: &[Row],
        coarse: bool,
        kept: &mut [f32],
        sink: impl Sink<Kind = Floats>,
    ) {
        if self.activation == Activation::None {
            return self.normalize(s, rows, None, sink);
        }
        let width = width::<S>(&self.source);
        let mut most = [0.0; ROWS];
        self.keep(s, rows, coarse, None, Keep { kept: &mut *kept, width, most: &mut most[..rows.len()] });
        s.outline(SweepKept { source: &self.source, rows, kept, width, sink });
    }

    /// Keeps `rows` for an output that is `coarse`.
    #[inline(always)]
    fn keep<S: Simd>(&self, s: S, rows: &[Row], coarse: bool, claim: Option<(&[u8], usize)>, to: Keep<'_>) {
        let Keep { kept, width, most } = to;
        self.normalize(s, rows, claim, Keep { kept: &mut *kept, width, most: &mut *most });
        let &Maker { activation, factors, .. } = self;
        if activation != Activation::None {
            s.outline(Activate { rows: Keep { kept, width, most }, activation, coarse, factors });
        }
    }

    /// Hands `rows` to `sink` as they are before the activation.
    #[inline(always)]
    fn normalize<S: Simd>(
        &self,
        s: S,
        rows: &[Row],
        claim: Option<(&[u8], usize)>,
        sink: impl Sink<Kind = Floats>,
    ) {
        let ahead = Ahead { claim, ..Ahead::SOURCE };
        match self.norming {
            Norming::Same => self.sweep(s, rows, ahead, Same, sink),
            Norming::Affine(columns) => self.sweep(s, rows, ahead, columns, sink),
            Norming::Layer { columns, .. } => {
                // These rows have been read; the next ones are.
                let ahead = Ahead { source: Distance::Rows(rows.len()), claim };
                self.sweep(s, rows, ahead, Standard(columns), sink);
            }
        }
    }

    #[inline(always)]
    fn sweep<S: Simd, F: Function>(
        &self,
        s: S,
        rows: &[Row],
        ahead: Ahead<'_>,
        function: F,
        sink: impl Sink<Kind = F::Kind>,
    ) {
        s.outline(Sweep { source: &self.source, rows, ahead, function, sink });
    }

    /// Means and deviations of `rows`.
    #[inline(always)]
    fn standardize<S: Simd>(&self, s: S, rows: &mut [Row], eps: f32) {
        /// Where the mean square is this many times the variance, it is too inexact to be made from the sums.
        const FAR: f32 = 4.0;
        let mut sums = [[0.0; 2]; ROWS];
        self.sweep(s, rows, Ahead::NONE, Same, Sums(&mut sums[..rows.len()]));
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
    /// The run of at most `most` operand rows that begins with row `first`.
    fn run(&self, first: usize, most: usize) -> Run {
        let (full_h, full_w) = (self.full_h(), self.full_w());
        let (line, x) = (first / full_w, first % full_w);
        let (b, y) = (line / full_h, line % full_h);
        let (row, column) = (y.wrapping_sub(self.border.top), x.wrapping_sub(self.border.left));
        let pixel = (row < self.h && column < self.w).then(|| (b * self.h + row) * self.w + column);
        let end = if row < self.h && x < self.border.left {
            self.border.left
        } else if pixel.is_some() {
            self.border.left + self.w
        } else {
            full_w
        };
        Run { image: b, pixel, rows: most.min(end - x) }
    }
}

/// Operand rows of one line, next to each other.
struct Run {
    image: usize,
    /// The first row's pixel of the source; none on the border.
    pixel: Option<usize>,
    rows: usize,
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

    /// Makes `rows`, whose elements are `range`, zeros of image `b`.
    fn zero_rows(&mut self, range: Range<usize>, rows: Range<usize>, b: usize) {
        match self {
            OperandMut::U8 { codes, scale } => {
                codes[range].fill(128);
                scale[rows].fill(0.0);
            }
            OperandMut::U8Uniform { codes, images } => codes[range].fill(images[b].zero as u8),
            OperandMut::Bf16(out) => out[range].fill(bf16::ZERO),
            OperandMut::F32(out) => out[range].fill(0.0),
        }
    }
}
