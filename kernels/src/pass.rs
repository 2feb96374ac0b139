//! One walk over a tensor: read one or two sources, normalize, activate, write it as rows or as the operand of a GEMM.

use bytemuck::cast_slice_mut;

use crate::gemm::Activation;
use crate::math;
use crate::par::{SCRATCH_BYTES, Shared};
use crate::simd::{Element, Simd, SimdOp, dispatch};
use crate::view::{ImageShape, OperandMut, Rows, RowsMut};
use crate::{Isa, Workers, bf16};

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

/// The most columns a pass takes: it keeps three rows of f32 in a worker's scratch memory.
pub const MAX_COLUMNS: usize = SCRATCH_BYTES / 12;

/// Elements that one task of a pass handles, about: enough to hide the cost of starting it.
const TASK_ELEMENTS: usize = 32 * 1024;

/// Tasks that share one image in [`group_stats`].
const STATS_TASKS: usize = 64;

/// Pixels whose sums [`group_stats`] keeps in f32 before it adds them up in f64.
const STATS_PIXELS: usize = 64;

/// Mean and reciprocal standard deviation of each group of channels over each image: `stats` is `[batch, groups, 2]`.
/// The biased variance, as PyTorch's `group_norm`.
///
/// # Panics
/// Where shapes don't agree.
pub fn group_stats(
    workers: &Workers,
    isa: Isa,
    source: Source<'_>,
    image: ImageShape,
    groups: usize,
    eps: f32,
    stats: &mut [f32],
) {
    let (columns, pixels) = (source.columns(), image.h * image.w);
    source.check(image.pixels());
    assert!(groups > 0 && columns % groups == 0, "{columns} channels in {groups} groups");
    assert_eq!(stats.len(), image.batch * groups * 2, "statistics of {} x {groups} groups", image.batch);
    let chunk = pixels.div_ceil(STATS_TASKS).max(STATS_PIXELS);
    let chunks = pixels.div_ceil(chunk);
    // [batch, chunks, groups, 2]: sum and sum of squares.
    let mut sums = vec![0f64; image.batch * chunks * groups * 2];
    let parts = Shared::new(&mut sums);
    workers.for_each(image.batch * chunks, |task, scratch| {
        // SAFETY: each task has its own part.
        let sums = unsafe { parts.slice(task * groups * 2, groups * 2) };
        let (first, last) = (task % chunks * chunk, (task % chunks * chunk + chunk).min(pixels));
        let base = task / chunks * pixels;
        dispatch(
            isa,
            Moments { source, rows: base + first..base + last, sums, scratch: cast_slice_mut(scratch) },
        );
    });
    let count = (pixels * (columns / groups)) as f64;
    for (image, stats) in stats.chunks_exact_mut(groups * 2).enumerate() {
        for (g, stats) in stats.chunks_exact_mut(2).enumerate() {
            let parts = (0..chunks).map(|c| ((image * chunks + c) * groups + g) * 2);
            let (sum, squares) = parts.fold((0.0, 0.0), |(s, q), at| (s + sums[at], q + sums[at + 1]));
            let mean = sum / count;
            let variance = (squares / count - mean * mean).max(0.0);
            stats[0] = mean as f32;
            stats[1] = (1.0 / (variance + f64::from(eps)).sqrt()) as f32;
        }
    }
}

/// Writes `activation(norm(source))` as the operand rows of a GEMM, `stride` elements each, with the border of `image`
/// and the slack of each row zero. `U8` rows get a scale each: the row's largest magnitude / 127.
///
/// # Panics
/// Where shapes don't agree, or for [`Activation::Geglu`].
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
    assert!(stride.is_multiple_of(64), "operand rows of {stride} elements");
    let walk = Walk { source, image, norm, activation, stride };
    walk.run(workers, isa, out);
}

/// Writes `activation(norm(source))` as plain rows `[pixels, columns]`.
///
/// # Panics
/// Where shapes don't agree, or for [`Activation::Geglu`].
pub fn rows_pass(
    workers: &Workers,
    isa: Isa,
    source: Source<'_>,
    image: ImageShape,
    norm: Norm<'_>,
    activation: Activation,
    out: RowsMut<'_>,
) {
    let image = ImageShape { border: Default::default(), ..image };
    let walk = Walk { source, image, norm, activation, stride: source.columns() };
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
    norm: Norm<'a>,
    activation: Activation,
    /// Elements from one output row to the next.
    stride: usize,
}

impl Walk<'_> {
    fn run(self, workers: &Workers, isa: Isa, out: OperandMut<'_>) {
        let (image, columns, rows) = (self.image, self.source.columns(), self.image.operand_rows());
        self.source.check(image.pixels());
        assert!(columns <= self.stride, "{columns} columns in rows of {}", self.stride);
        assert!(self.activation != Activation::Geglu, "GEGLU joins columns: only in an epilogue");
        match self.norm {
            Norm::None => {}
            Norm::Group { stats, groups, gamma, beta } => {
                assert!(groups > 0 && columns % groups == 0, "{columns} channels in {groups} groups");
                assert_eq!(stats.len(), image.batch * groups * 2, "statistics of {} x {groups}", image.batch);
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
            OperandMut::U8Uniform { codes, scale } => {
                assert!(*scale > 0.0, "a scale of {scale}");
                codes.len()
            }
            OperandMut::Bf16(out) => out.len(),
            OperandMut::F32(out) => out.len(),
        };
        assert_eq!(elements, rows * self.stride, "operand of {rows} x {}", self.stride);

        let chunk = (TASK_ELEMENTS / columns.max(1)).clamp(8, 512);
        let tasks = rows.div_ceil(chunk);
        let part = |task: usize| (task * chunk, chunk.min(rows - task * chunk));
        let task = |task: usize, scratch: &mut [u8], out: OperandMut<'_>| {
            dispatch(isa, Chunk { walk: self, first: part(task).0, out, scratch: cast_slice_mut(scratch) });
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
            OperandMut::U8Uniform { codes, scale } => {
                let codes = Shared::new(codes);
                workers.for_each(tasks, |t, scratch| {
                    let (first, n) = part(t);
                    // SAFETY: each task has its own rows.
                    let codes = unsafe { codes.slice(first * self.stride, n * self.stride) };
                    task(t, scratch, OperandMut::U8Uniform { codes, scale });
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

/// Some output rows of a pass.
struct Chunk<'a> {
    walk: Walk<'a>,
    /// The output row that `out` begins with.
    first: usize,
    out: OperandMut<'a>,
    /// Three rows of f32.
    scratch: &'a mut [f32],
}

impl SimdOp for Chunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Walk { source, image, norm, activation, stride } = self.walk;
        let columns = source.columns();
        let (row, rest) = self.scratch.split_at_mut(columns);
        let (factor, offset) = rest.split_at_mut(columns);
        let offset = &mut offset[..columns];
        let mut image_of_factors = usize::MAX;
        let rows = self.out.len() / stride.max(1);
        for i in 0..rows {
            let Some((b, pixel)) = image.pixel(self.first + i) else {
                self.out.zero_row(i, stride);
                continue;
            };
            let parts = source.row(pixel);
            let most = match norm {
                Norm::None => sweep(s, parts, None, activation, row),
                Norm::Group { stats, groups, gamma, beta } => {
                    if image_of_factors != b {
                        group_factors(&stats[b * groups * 2..][..groups * 2], gamma, beta, factor, offset);
                        image_of_factors = b;
                    }
                    sweep(s, parts, Some((factor, offset)), activation, row)
                }
                Norm::Layer { gamma, beta, eps } => {
                    sweep(s, parts, None, Activation::None, row);
                    layer_norm(s, row, gamma, beta, eps, activation)
                }
            };
            write_row(s, row, most, &mut self.out, i, stride);
        }
    }
}

impl ImageShape {
    /// The image and the source pixel that operand row `row` holds, none on the border.
    #[inline(always)]
    fn pixel(&self, row: usize) -> Option<(usize, usize)> {
        let (full_h, full_w) = (self.full_h(), self.full_w());
        let (b, y, x) = (row / (full_h * full_w), row / full_w % full_h, row % full_w);
        let (y, x) = (y.wrapping_sub(self.border.top), x.wrapping_sub(self.border.left));
        (y < self.h && x < self.w).then(|| (b, (b * self.h + y) * self.w + x))
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

    fn zero_row(&mut self, i: usize, stride: usize) {
        match self {
            OperandMut::U8 { codes, scale } => {
                codes[i * stride..(i + 1) * stride].fill(128);
                scale[i] = 0.0;
            }
            OperandMut::U8Uniform { codes, .. } => codes[i * stride..(i + 1) * stride].fill(128),
            OperandMut::Bf16(out) => out[i * stride..(i + 1) * stride].fill(bf16::ZERO),
            OperandMut::F32(out) => out[i * stride..(i + 1) * stride].fill(0.0),
        }
    }
}

/// `factor[c] = rstd * gamma[c]` and `offset[c] = beta[c] - mean * factor[c]`.
fn group_factors(stats: &[f32], gamma: &[f32], beta: &[f32], factor: &mut [f32], offset: &mut [f32]) {
    let size = gamma.len() / (stats.len() / 2);
    for (g, stats) in stats.chunks_exact(2).enumerate() {
        for c in g * size..(g + 1) * size {
            factor[c] = stats[1] * gamma[c];
            offset[c] = beta[c] - stats[0] * factor[c];
        }
    }
}

/// A function of a vector, known when its loop is compiled.
trait Map: Copy {
    fn of<S: Simd>(self, s: S, x: S::F) -> S::F;
}

#[derive(Clone, Copy)]
struct Identity;

#[derive(Clone, Copy)]
struct Silu;

impl Map for Identity {
    #[inline(always)]
    fn of<S: Simd>(self, _: S, x: S::F) -> S::F {
        x
    }
}

impl Map for Silu {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::F) -> S::F {
        math::silu(s, x)
    }
}

impl Map for Activation {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::F) -> S::F {
        self.apply(s, x)
    }
}

/// `row = activation(parts * factor + offset)`; returns the lanes' greatest magnitudes.
#[inline(always)]
fn sweep<'a, S: Simd>(
    s: S,
    parts: impl Iterator<Item = (usize, Rows<'a>)>,
    affine: Option<(&[f32], &[f32])>,
    activation: Activation,
    row: &mut [f32],
) -> S::F {
    match activation {
        Activation::None => sweep_with(s, parts, affine, Identity, row),
        Activation::Silu => sweep_with(s, parts, affine, Silu, row),
        other => sweep_with(s, parts, affine, other, row),
    }
}

#[inline(always)]
fn sweep_with<'a, S: Simd>(
    s: S,
    parts: impl Iterator<Item = (usize, Rows<'a>)>,
    affine: Option<(&[f32], &[f32])>,
    f: impl Map,
    row: &mut [f32],
) -> S::F {
    let mut most = s.splat(0.0);
    for (column, part) in parts {
        let range = column..column + part.len();
        let row = &mut row[range.clone()];
        most = match (part, affine) {
            (Rows::F32(part), None) => sweep_part(s, Plain(part), f, row, most),
            (Rows::Bf16(part), None) => sweep_part(s, Plain(part), f, row, most),
            (Rows::F32(part), Some((a, b))) => {
                sweep_part(s, Affine(part, &a[range.clone()], &b[range]), f, row, most)
            }
            (Rows::Bf16(part), Some((a, b))) => {
                sweep_part(s, Affine(part, &a[range.clone()], &b[range]), f, row, most)
            }
        };
    }
    most
}

/// Columns to sweep over.
trait Columns<S: Simd> {
    /// The vector at column `i`.
    fn load(&self, s: S, i: usize) -> S::F;
    /// The columns from `i` to the end, fewer than a vector.
    fn load_partial(&self, s: S, i: usize) -> S::F;
}

struct Plain<'a, T>(&'a [T]);

struct Affine<'a, T>(&'a [T], &'a [f32], &'a [f32]);

impl<S: Simd, T: Element> Columns<S> for Plain<'_, T> {
    #[inline(always)]
    fn load(&self, s: S, i: usize) -> S::F {
        T::load(s, &self.0[i..])
    }
    #[inline(always)]
    fn load_partial(&self, s: S, i: usize) -> S::F {
        T::load_partial(s, &self.0[i..])
    }
}

impl<S: Simd, T: Element> Columns<S> for Affine<'_, T> {
    #[inline(always)]
    fn load(&self, s: S, i: usize) -> S::F {
        s.fma(T::load(s, &self.0[i..]), s.load(&self.1[i..]), s.load(&self.2[i..]))
    }
    #[inline(always)]
    fn load_partial(&self, s: S, i: usize) -> S::F {
        s.fma(T::load_partial(s, &self.0[i..]), s.load_partial(&self.1[i..]), s.load_partial(&self.2[i..]))
    }
}

#[inline(always)]
fn sweep_part<S: Simd>(s: S, src: impl Columns<S>, f: impl Map, row: &mut [f32], mut most: S::F) -> S::F {
    let whole = row.len() / S::LANES * S::LANES;
    let (body, tail) = row.split_at_mut(whole);
    for (i, out) in body.chunks_exact_mut(S::LANES).enumerate() {
        let y = f.of(s, src.load(s, i * S::LANES));
        s.store(y, out);
        most = s.max(s.abs(y), most);
    }
    if !tail.is_empty() {
        let y = f.of(s, src.load_partial(s, whole));
        s.store_partial(y, tail);
        // The lanes past the end hold f(0) = 0.
        most = s.max(s.abs(y), most);
    }
    most
}

/// The sum of `f` over `row`, in four chains.
#[inline(always)]
fn sum_over<S: Simd>(s: S, row: &[f32], f: impl Fn(S::F, S::F) -> S::F, shift: f32) -> f32 {
    let zero = s.splat(0.0);
    let shift_by = s.splat(shift);
    let mut sums = [zero; 4];
    let mut blocks = row.chunks_exact(4 * S::LANES);
    for block in &mut blocks {
        for (sum, x) in sums.iter_mut().zip(block.chunks_exact(S::LANES)) {
            *sum = f(s.sub(s.load(x), shift_by), *sum);
        }
    }
    let mut rest = blocks.remainder().chunks_exact(S::LANES);
    for x in &mut rest {
        sums[0] = f(s.sub(s.load(x), shift_by), sums[0]);
    }
    let tail = rest.remainder();
    if !tail.is_empty() {
        let mut padded = [shift; crate::simd::MAX_LANES];
        padded[..tail.len()].copy_from_slice(tail);
        sums[1] = f(s.sub(s.load(&padded), shift_by), sums[1]);
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

/// Layer norm and activation in place; returns the lanes' greatest magnitudes.
#[inline(always)]
fn layer_norm<S: Simd>(
    s: S,
    row: &mut [f32],
    gamma: &[f32],
    beta: &[f32],
    eps: f32,
    activation: Activation,
) -> S::F {
    let n = row.len() as f32;
    let mean = sum_over(
        s,
        row,
        #[inline(always)]
        |x, sum| s.add(x, sum),
        0.0,
    ) / n;
    let variance = sum_over(
        s,
        row,
        #[inline(always)]
        |x, sum| s.fma(x, x, sum),
        mean,
    ) / n;
    let (mean, rstd) = (s.splat(mean), s.splat(1.0 / (variance + eps).sqrt()));
    let mut most = s.splat(0.0);
    let whole = row.len() / S::LANES * S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        let x = s.mul(s.sub(s.load(&row[i..]), mean), rstd);
        let y = activation.apply(s, s.fma(x, s.load(&gamma[i..]), s.load(&beta[i..])));
        s.store(y, &mut row[i..]);
        most = s.max(s.abs(y), most);
    }
    if whole < row.len() {
        let x = s.mul(s.sub(s.load_partial(&row[whole..]), mean), rstd);
        let y =
            activation.apply(s, s.fma(x, s.load_partial(&gamma[whole..]), s.load_partial(&beta[whole..])));
        s.store_partial(y, &mut row[whole..]);
        most = s.max(s.abs(y), most);
    }
    most
}

/// The least magnitude that gets a scale: a row of smaller numbers is a row of zeros.
const LEAST: f32 = 1e-30;

/// Writes output row `i`: `row`, then zeros up to `stride`.
#[inline(always)]
fn write_row<S: Simd>(s: S, row: &[f32], most: S::F, out: &mut OperandMut<'_>, i: usize, stride: usize) {
    match out {
        OperandMut::U8 { codes, scale } => {
            let most = s.max_lane(most);
            let (inverse, step) = if most < LEAST { (0.0, 0.0) } else { (127.0 / most, most / 127.0) };
            scale[i] = step;
            write_codes(s, row, inverse, &mut codes[i * stride..(i + 1) * stride]);
        }
        OperandMut::U8Uniform { codes, scale } => {
            write_codes(s, row, 1.0 / *scale, &mut codes[i * stride..(i + 1) * stride]);
        }
        OperandMut::Bf16(out) => {
            let (out, slack) = out[i * stride..(i + 1) * stride].split_at_mut(row.len());
            let mut src = row.chunks_exact(S::LANES);
            let mut dst = out.chunks_exact_mut(S::LANES);
            for (x, y) in (&mut src).zip(&mut dst) {
                s.store_bf16(s.load(x), y);
            }
            if !src.remainder().is_empty() {
                s.store_bf16_partial(s.load_partial(src.remainder()), dst.into_remainder());
            }
            slack.fill(bf16::ZERO);
        }
        OperandMut::F32(out) => {
            let (out, slack) = out[i * stride..(i + 1) * stride].split_at_mut(row.len());
            out.copy_from_slice(row);
            slack.fill(0.0);
        }
    }
}

#[inline(always)]
fn write_codes<S: Simd>(s: S, row: &[f32], inverse: f32, codes: &mut [u8]) {
    let (codes, slack) = codes.split_at_mut(row.len());
    let inverse = s.splat(inverse);
    let mut src = row.chunks_exact(S::LANES);
    let mut dst = codes.chunks_exact_mut(S::LANES);
    for (x, y) in (&mut src).zip(&mut dst) {
        s.store_codes(s.mul(s.load(x), inverse), y);
    }
    if !src.remainder().is_empty() {
        s.store_codes_partial(s.mul(s.load_partial(src.remainder()), inverse), dst.into_remainder());
    }
    slack.fill(128);
}

/// Adds the sums and the sums of squares of `rows` to `sums`, `[groups, 2]`.
struct Moments<'a> {
    source: Source<'a>,
    rows: std::ops::Range<usize>,
    sums: &'a mut [f64],
    scratch: &'a mut [f32],
}

impl SimdOp for Moments<'_> {
    type Output = ();

    /// Sums over [`STATS_PIXELS`] pixels at a time, per channel, of the differences to the first of them: these are small
    /// where the mean is far from zero.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let columns = self.source.columns();
        let size = columns / (self.sums.len() / 2);
        let (shift, rest) = self.scratch.split_at_mut(columns);
        let (sum, rest) = rest.split_at_mut(columns);
        let squares = &mut rest[..columns];
        let last = self.rows.end;
        for first in self.rows.step_by(STATS_PIXELS) {
            let pixels = first..(first + STATS_PIXELS).min(last);
            let n = pixels.len() as f64;
            sweep(s, self.source.row(first), None, Activation::None, shift);
            sum.fill(0.0);
            squares.fill(0.0);
            for pixel in pixels.skip(1) {
                for (column, part) in self.source.row(pixel) {
                    let range = column..column + part.len();
                    let (shift, sum, squares) =
                        (&shift[range.clone()], &mut sum[range.clone()], &mut squares[range]);
                    match part {
                        Rows::F32(part) => add_moments(s, part, shift, sum, squares),
                        Rows::Bf16(part) => add_moments(s, part, shift, sum, squares),
                    }
                }
            }
            for (g, out) in self.sums.chunks_exact_mut(2).enumerate() {
                for c in g * size..(g + 1) * size {
                    let (k, sum, squares) = (f64::from(shift[c]), f64::from(sum[c]), f64::from(squares[c]));
                    out[0] += n * k + sum;
                    out[1] += (n * k + 2.0 * sum) * k + squares;
                }
            }
        }
    }
}

#[inline(always)]
fn add_moments<S: Simd, T: Element>(s: S, src: &[T], shift: &[f32], sum: &mut [f32], squares: &mut [f32]) {
    let whole = src.len() / S::LANES * S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        let d = s.sub(T::load(s, &src[i..]), s.load(&shift[i..]));
        s.store(s.add(s.load(&sum[i..]), d), &mut sum[i..]);
        s.store(s.fma(d, d, s.load(&squares[i..])), &mut squares[i..]);
    }
    if whole < src.len() {
        let d = s.sub(T::load_partial(s, &src[whole..]), s.load_partial(&shift[whole..]));
        s.store_partial(s.add(s.load_partial(&sum[whole..]), d), &mut sum[whole..]);
        s.store_partial(s.fma(d, d, s.load_partial(&squares[whole..])), &mut squares[whole..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::pass as reference;
    use crate::simd::tests::tiers;
    use crate::view::Border;

    fn noise(n: usize, seed: u32, mean: f32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| mean + next() + next() + next()).collect()
    }

    fn half(x: &[f32]) -> Vec<bf16> {
        x.iter().map(|&x| bf16::from_f32(x)).collect()
    }

    fn close(got: f32, want: f64, bound: f64, what: &str) {
        assert!((f64::from(got) - want).abs() <= bound * want.abs().max(1.0), "{what}: {got} for {want}");
    }

    /// Two parts, f32 and bf16, with sizes around the width of vectors; group sizes of 1, 2, 3, 10 and more.
    const SHAPES: [(usize, usize, usize); 10] = [
        (1, 0, 1),
        (3, 0, 1),
        (16, 0, 8),
        (20, 10, 10),
        (64, 32, 32),
        (31, 33, 32),
        (17, 3, 2),
        (320, 0, 32),
        (40, 56, 32),
        (130, 62, 3),
    ];

    const IMAGES: [ImageShape; 4] = [
        ImageShape::rows(5),
        ImageShape { batch: 2, h: 3, w: 5, border: Border { top: 1, left: 1, bottom: 1, right: 1 } },
        ImageShape { batch: 1, h: 2, w: 2, border: Border { top: 0, left: 0, bottom: 1, right: 1 } },
        ImageShape { batch: 3, h: 21, w: 17, border: Border { top: 0, left: 2, bottom: 0, right: 0 } },
    ];

    #[test]
    fn group_stats_agree_with_the_reference() {
        let workers = Workers::new(2);
        for isa in tiers() {
            for image in IMAGES {
                for (c0, c1, groups) in SHAPES {
                    for mean in [0.0, 30.0] {
                        let (a, b) =
                            (noise(image.pixels() * c0, 1, mean), half(&noise(image.pixels() * c1, 2, mean)));
                        let source = Source::two((Rows::F32(&a), c0), (Rows::Bf16(&b), c1));
                        let mut stats = vec![f32::NAN; image.batch * groups * 2];
                        group_stats(&workers, isa, source, image, groups, 1e-5, &mut stats);
                        let want = reference::group_stats(source, image, groups, 1e-5);
                        for (&got, want) in stats.iter().zip(want) {
                            close(got, want, 1e-6, &format!("{isa:?} {image:?} {c0}+{c1}/{groups}"));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn passes_agree_with_the_reference() {
        let workers = Workers::new(2);
        for isa in tiers() {
            for image in IMAGES {
                for (i, (c0, c1, groups)) in SHAPES.into_iter().enumerate() {
                    let c = c0 + c1;
                    let (a, b) =
                        (noise(image.pixels() * c0, 3, 0.5), half(&noise(image.pixels() * c1, 4, 0.5)));
                    let source = Source::two((Rows::F32(&a), c0), (Rows::Bf16(&b), c1));
                    let (gamma, beta) = (noise(c, 5, 1.0), noise(c, 6, 0.0));
                    let mut stats = vec![f32::NAN; image.batch * groups * 2];
                    group_stats(&workers, isa, source, image, groups, 1e-5, &mut stats);
                    let norms = [
                        Norm::None,
                        Norm::Group { stats: &stats, groups, gamma: &gamma, beta: &beta },
                        Norm::Layer { gamma: &gamma, beta: &beta, eps: 1e-3 },
                    ];
                    let activations = [Activation::None, Activation::Silu, Activation::GeluTanh];
                    for (norm, activation) in norms.into_iter().flat_map(|n| activations.map(|a| (n, a))) {
                        let what = format!("{isa:?} {image:?} {c0}+{c1} {norm:?} {activation:?}");
                        check(
                            &workers,
                            isa,
                            source,
                            image,
                            norm,
                            activation,
                            c.next_multiple_of(64) + 64 * (i % 2),
                            &what,
                        );
                    }
                }
            }
        }
    }

    /// Every type of output.
    #[expect(clippy::too_many_arguments)]
    fn check(
        workers: &Workers,
        isa: Isa,
        source: Source<'_>,
        image: ImageShape,
        norm: Norm<'_>,
        activation: Activation,
        stride: usize,
        what: &str,
    ) {
        let rows = reference::rows(source, image, norm, activation);
        let want = reference::operand(&rows, image, stride);
        let n = image.operand_rows();

        let mut plain = vec![f32::NAN; rows.len()];
        rows_pass(workers, isa, source, image, norm, activation, RowsMut::F32(&mut plain));
        rows.iter().zip(&plain).for_each(|(&want, &got)| close(got, want, 4e-6, what));

        let mut wide = vec![f32::NAN; n * stride];
        operand_pass(workers, isa, source, image, norm, activation, OperandMut::F32(&mut wide), stride);
        want.iter().zip(&wide).for_each(|(&want, &got)| close(got, want, 4e-6, what));

        let mut narrow = vec![bf16::NAN; n * stride];
        operand_pass(workers, isa, source, image, norm, activation, OperandMut::Bf16(&mut narrow), stride);
        assert_eq!(narrow, half(&wide), "{what}");

        let (mut codes, mut scale) = (vec![7u8; n * stride], vec![f32::NAN; n]);
        let out = OperandMut::U8 { codes: &mut codes, scale: &mut scale };
        operand_pass(workers, isa, source, image, norm, activation, out, stride);
        let quantized =
            |x: f32, inverse: f32| ((x * inverse).round_ties_even().clamp(-127.0, 127.0) + 128.0) as u8;
        for (i, row) in wide.chunks_exact(stride).enumerate() {
            let most = row.iter().fold(0f32, |m, x| m.max(x.abs()));
            assert_eq!(scale[i], most / 127.0, "{what}: scale of row {i}");
            let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
            let want: Vec<u8> = row.iter().map(|&x| quantized(x, inverse)).collect();
            assert_eq!(codes[i * stride..(i + 1) * stride], want, "{what}: row {i}");
        }

        let out = OperandMut::U8Uniform { codes: &mut codes, scale: 0.01 };
        operand_pass(workers, isa, source, image, norm, activation, out, stride);
        let want: Vec<u8> = wide.iter().map(|&x| quantized(x, 1.0 / 0.01)).collect();
        assert_eq!(codes, want, "{what}: uniform");
    }

    #[test]
    fn threads_and_batches_do_not_change_a_bit() {
        let image =
            ImageShape { batch: 2, h: 33, w: 40, border: Border { top: 1, left: 1, bottom: 1, right: 1 } };
        let one = ImageShape { batch: 1, ..image };
        let (c, groups, stride) = (96, 32, 128);
        let x = noise(image.pixels() * c, 9, 2.0);
        let (gamma, beta) = (noise(c, 5, 1.0), noise(c, 6, 0.0));
        for isa in tiers() {
            let run = |threads: usize, image: ImageShape, x: &[f32]| {
                let workers = Workers::new(threads);
                let source = Source::one(Rows::F32(x), c);
                let mut stats = vec![0.0; image.batch * groups * 2];
                group_stats(&workers, isa, source, image, groups, 1e-6, &mut stats);
                let norm = Norm::Group { stats: &stats, groups, gamma: &gamma, beta: &beta };
                let mut out = vec![f32::NAN; image.operand_rows() * stride];
                operand_pass(
                    &workers,
                    isa,
                    source,
                    image,
                    norm,
                    Activation::Silu,
                    OperandMut::F32(&mut out),
                    stride,
                );
                out
            };
            let all = run(1, image, &x);
            assert_eq!(all, run(3, image, &x), "{isa:?}");
            let split: Vec<f32> = x.chunks(one.pixels() * c).flat_map(|x| run(2, one, x)).collect();
            assert_eq!(all, split, "{isa:?}");
        }
    }

    #[test]
    fn rows_of_zeros_and_of_tiny_numbers_have_no_scale() {
        for isa in tiers() {
            let x = [vec![0.0; 20], vec![1e-38; 20], vec![1e-20; 20]].concat();
            let (mut codes, mut scale) = (vec![0u8; 3 * 64], vec![f32::NAN; 3]);
            let out = OperandMut::U8 { codes: &mut codes, scale: &mut scale };
            let source = Source::one(Rows::F32(&x), 20);
            operand_pass(
                &Workers::new(1),
                isa,
                source,
                ImageShape::rows(3),
                Norm::None,
                Activation::None,
                out,
                64,
            );
            assert_eq!(scale, [0.0, 0.0, 1e-20 / 127.0], "{isa:?}");
            assert!(
                codes[..128].iter().all(|&c| c == 128) && codes[128..148].iter().all(|&c| c == 255),
                "{isa:?}"
            );
        }
    }
}
