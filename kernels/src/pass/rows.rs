//! What one task of a pass does: row by row from the source to the output, through a row of f32 in L1.
#![forbid(unsafe_code)]

use crate::bf16;
use crate::gemm::Activation;
use crate::math;
use crate::simd::{Element, MAX_LANES, Simd, SimdOp};
use crate::view::{Coding, ImageShape, OperandMut, Rows};

use super::stats::stats_len;
use super::{Norm, Recipe, Walk};

/// Rows of f32 that a task keeps in scratch memory.
pub(super) const SCRATCH_ROWS: usize = 5;

/// How many bytes ahead of a sweep memory is asked for: about two pages, which hardware does not look beyond.
pub(super) const AHEAD: usize = 4096;

/// Some output rows of a pass.
pub(super) struct Chunk<'a> {
    pub(super) walk: Walk<'a>,
    /// The output row that `out` begins with.
    pub(super) first: usize,
    pub(super) out: OperandMut<'a>,
    /// [`SCRATCH_ROWS`] rows at least.
    pub(super) scratch: &'a mut [f32],
}

impl SimdOp for Chunk<'_> {
    type Output = ();

    /// A row is written after the next one was read: the reduction to its scale then costs no waiting.
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Walk { source, image, recipe: Recipe { norm, activation, factors }, stride } = self.walk;
        let columns = source.columns();
        let (even, rest) = self.scratch.split_at_mut(columns);
        let (odd, rest) = rest.split_at_mut(columns);
        let (factor, rest) = rest.split_at_mut(columns);
        let offset = &mut rest[..columns];
        let activation = Function::new(activation, &self.out);
        let mut image_of_factors = usize::MAX;
        let mut waiting = None;
        let rows = self.out.len() / stride.max(1);
        for i in 0..=rows {
            let (row, earlier) = if i % 2 == 0 { (&mut *even, &*odd) } else { (&mut *odd, &*even) };
            let mut made = None;
            if i < rows {
                match image.pixel(self.first + i) {
                    None => self.out.zero_row(i, stride, image.image(self.first + i)),
                    Some((b, pixel)) => {
                        if let Norm::Group { stats, groups, gamma, beta } = norm
                            && image_of_factors != b
                        {
                            group_factors(
                                &stats[b * stats_len(groups, columns)..][..2 * groups],
                                gamma,
                                beta,
                                factor,
                                offset,
                            );
                            image_of_factors = b;
                        }
                        let most = read_row(s, source.row(pixel), norm, (factor, offset), activation, row);
                        made = Some((factors.map_or(most, |factors| multiply(s, row, factors)), b));
                    }
                }
            }
            if let Some((most, image)) = waiting {
                write_row(s, earlier, most, image, &mut self.out, i - 1, stride);
            }
            waiting = made;
        }
    }
}

impl ImageShape {
    /// The image of operand row `row`.
    #[inline(always)]
    fn image(&self, row: usize) -> usize {
        row / (self.full_h() * self.full_w())
    }

    /// The image and the source pixel that operand row `row` holds, none on the border.
    #[inline(always)]
    fn pixel(&self, row: usize) -> Option<(usize, usize)> {
        let (full_h, full_w) = (self.full_h(), self.full_w());
        let (line, x) = (row / full_w, row % full_w);
        let (b, y) = (line / full_h, line % full_h);
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

/// An activation as exact as its output.
#[derive(Clone, Copy)]
enum Function {
    Identity,
    Silu,
    SiluCoarse,
    /// The rarer ones have a loop of their own.
    Other(Activation),
}

impl Function {
    fn new(activation: Activation, out: &OperandMut<'_>) -> Self {
        match activation {
            Activation::None => Function::Identity,
            Activation::Silu if matches!(out, OperandMut::F32(_)) => Function::Silu,
            Activation::Silu => Function::SiluCoarse,
            other => Function::Other(other),
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

#[derive(Clone, Copy)]
struct SiluCoarse;

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

impl Map for SiluCoarse {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::F) -> S::F {
        math::silu_coarse(s, x)
    }
}

impl Map for Activation {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::F) -> S::F {
        self.apply(s, x)
    }
}

/// The numbers of a row before the activation: `x[i]`, or `x[i] * factor[i] + offset[i]`.
trait Affine: Copy {
    /// The part from column `start` on, `len` columns.
    fn slice(self, start: usize, len: usize) -> Self;
    fn apply<S: Simd>(self, s: S, x: S::F, i: usize) -> S::F;
    fn apply_partial<S: Simd>(self, s: S, x: S::F, i: usize) -> S::F;
}

#[derive(Clone, Copy)]
struct Plain;

impl Affine for Plain {
    #[inline(always)]
    fn slice(self, _: usize, _: usize) -> Self {
        self
    }
    #[inline(always)]
    fn apply<S: Simd>(self, _: S, x: S::F, _: usize) -> S::F {
        x
    }
    #[inline(always)]
    fn apply_partial<S: Simd>(self, _: S, x: S::F, _: usize) -> S::F {
        x
    }
}

impl Affine for (&[f32], &[f32]) {
    #[inline(always)]
    fn slice(self, start: usize, len: usize) -> Self {
        (&self.0[start..start + len], &self.1[start..start + len])
    }
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::F, i: usize) -> S::F {
        s.fma(x, s.load(&self.0[i..i + S::LANES]), s.load(&self.1[i..i + S::LANES]))
    }
    #[inline(always)]
    fn apply_partial<S: Simd>(self, s: S, x: S::F, i: usize) -> S::F {
        s.fma(x, s.load_partial(&self.0[i..]), s.load_partial(&self.1[i..]))
    }
}

/// What a sweep over a row finds, lane by lane.
#[derive(Clone, Copy)]
struct Found<F> {
    /// The greatest magnitude.
    most: F,
    /// The sum.
    sum: F,
}

/// Writes `activation(norm(parts))` to `row`; returns the greatest magnitudes, lane by lane.
#[inline(always)]
fn read_row<'a, S: Simd>(
    s: S,
    parts: impl Iterator<Item = (usize, Rows<'a>)>,
    norm: Norm<'_>,
    factors: (&[f32], &[f32]),
    activation: Function,
    row: &mut [f32],
) -> S::F {
    let most = match (norm, activation) {
        (Norm::Layer { gamma, beta, eps }, _) => {
            let sum = s.sum(sweep(s, parts, Plain, Identity, row).sum);
            layer_norm(s, row, sum, gamma, beta, eps)
        }
        (Norm::Group { .. }, Function::Silu) => sweep(s, parts, factors, Silu, row).most,
        (Norm::Group { .. }, Function::SiluCoarse) => sweep(s, parts, factors, SiluCoarse, row).most,
        (Norm::Group { .. }, _) => sweep(s, parts, factors, Identity, row).most,
        (Norm::None, _) => sweep(s, parts, Plain, Identity, row).most,
    };
    match (norm, activation) {
        (_, Function::Identity) | (Norm::Group { .. }, Function::Silu | Function::SiluCoarse) => most,
        (_, Function::Silu) => activate(s, row, Silu),
        (_, Function::SiluCoarse) => activate(s, row, SiluCoarse),
        (_, Function::Other(activation)) => activate(s, row, activation),
    }
}

/// `row = f(affine(parts))`
#[inline(always)]
fn sweep<'a, S: Simd>(
    s: S,
    parts: impl Iterator<Item = (usize, Rows<'a>)>,
    affine: impl Affine,
    f: impl Map,
    row: &mut [f32],
) -> Found<S::F> {
    let mut found = Found { most: s.splat(0.0), sum: s.splat(0.0) };
    for (start, part) in parts {
        let row = &mut row[start..start + part.len()];
        let affine = affine.slice(start, part.len());
        found = match part {
            Rows::F32(part) => sweep_part(s, part, affine, f, row, found),
            Rows::Bf16(part) => sweep_part(s, part, affine, f, row, found),
        };
    }
    found
}

#[inline(always)]
fn sweep_part<S: Simd, T: Element>(
    s: S,
    src: &[T],
    affine: impl Affine,
    f: impl Map,
    row: &mut [f32],
    mut found: Found<S::F>,
) -> Found<S::F> {
    let n = src.len();
    let row = &mut row[..n];
    let mut i = 0;
    while i + S::LANES <= n {
        s.prefetch(&src[i..i + S::LANES], AHEAD);
        let y = f.of(s, affine.apply(s, T::load(s, &src[i..i + S::LANES]), i));
        s.store(y, &mut row[i..i + S::LANES]);
        found = Found { most: s.max(s.abs(y), found.most), sum: s.add(y, found.sum) };
        i += S::LANES;
    }
    if i < n {
        // The lanes past the end hold f(0) = 0.
        let y = f.of(s, affine.apply_partial(s, T::load_partial(s, &src[i..]), i));
        s.store_partial(y, &mut row[i..]);
        found = Found { most: s.max(s.abs(y), found.most), sum: s.add(y, found.sum) };
    }
    found
}

/// `row = f(row)`; returns the greatest magnitudes, lane by lane.
#[inline(always)]
fn activate<S: Simd>(s: S, row: &mut [f32], f: impl Map) -> S::F {
    let (n, mut i, mut most) = (row.len(), 0, s.splat(0.0));
    while i + S::LANES <= n {
        let y = f.of(s, s.load(&row[i..i + S::LANES]));
        s.store(y, &mut row[i..i + S::LANES]);
        most = s.max(s.abs(y), most);
        i += S::LANES;
    }
    if i < n {
        let y = f.of(s, s.load_partial(&row[i..]));
        s.store_partial(y, &mut row[i..]);
        most = s.max(s.abs(y), most);
    }
    most
}

/// `row *= factors`; returns the greatest magnitudes, lane by lane.
#[inline(always)]
fn multiply<S: Simd>(s: S, row: &mut [f32], factors: &[f32]) -> S::F {
    let (n, mut i, mut most) = (row.len(), 0, s.splat(0.0));
    let factors = &factors[..n];
    while i + S::LANES <= n {
        let y = s.mul(s.load(&row[i..i + S::LANES]), s.load(&factors[i..i + S::LANES]));
        s.store(y, &mut row[i..i + S::LANES]);
        most = s.max(s.abs(y), most);
        i += S::LANES;
    }
    if i < n {
        let y = s.mul(s.load_partial(&row[i..]), s.load_partial(&factors[i..]));
        s.store_partial(y, &mut row[i..]);
        most = s.max(s.abs(y), most);
    }
    most
}

/// The sum of squares of `row - mean`, in four chains.
#[inline(always)]
fn squares<S: Simd>(s: S, row: &[f32], mean: f32) -> f32 {
    let shift = s.splat(mean);
    let mut sums = [s.splat(0.0); 4];
    let mut blocks = row.chunks_exact(4 * S::LANES);
    for block in &mut blocks {
        for (sum, x) in sums.iter_mut().zip(block.chunks_exact(S::LANES)) {
            let x = s.sub(s.load(x), shift);
            *sum = s.fma(x, x, *sum);
        }
    }
    let mut padded = [mean; 4 * MAX_LANES];
    let rest = blocks.remainder();
    padded[..rest.len()].copy_from_slice(rest);
    for (sum, x) in sums.iter_mut().zip(padded.chunks_exact(S::LANES)).take(rest.len().div_ceil(S::LANES)) {
        let x = s.sub(s.load(x), shift);
        *sum = s.fma(x, x, *sum);
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

/// Layer norm in place of a row whose sum is known; returns the greatest magnitudes, lane by lane.
#[inline(always)]
fn layer_norm<S: Simd>(s: S, row: &mut [f32], sum: f32, gamma: &[f32], beta: &[f32], eps: f32) -> S::F {
    let n = row.len();
    let (gamma, beta) = (&gamma[..n], &beta[..n]);
    let mean = sum / n as f32;
    let variance = squares(s, row, mean) / n as f32;
    let (mean, rstd) = (s.splat(mean), s.splat(1.0 / (variance + eps).sqrt()));
    let (mut i, mut most) = (0, s.splat(0.0));
    while i + S::LANES <= n {
        let end = i + S::LANES;
        let x = s.mul(s.sub(s.load(&row[i..end]), mean), rstd);
        let y = s.fma(x, s.load(&gamma[i..end]), s.load(&beta[i..end]));
        s.store(y, &mut row[i..end]);
        most = s.max(s.abs(y), most);
        i = end;
    }
    if i < n {
        let x = s.mul(s.sub(s.load_partial(&row[i..]), mean), rstd);
        // Where gamma and beta end, so does y.
        let y = s.fma(x, s.load_partial(&gamma[i..]), s.load_partial(&beta[i..]));
        s.store_partial(y, &mut row[i..]);
        most = s.max(s.abs(y), most);
    }
    most
}

/// The least magnitude that gets a scale: a row of smaller numbers is a row of zeros.
const LEAST: f32 = 1e-30;

/// Writes output row `i`, a pixel of `image`: `row`, then zeros up to `stride`.
#[inline(always)]
fn write_row<S: Simd>(
    s: S,
    row: &[f32],
    most: S::F,
    image: usize,
    out: &mut OperandMut<'_>,
    i: usize,
    stride: usize,
) {
    match out {
        OperandMut::U8 { codes, scale } => {
            let most = s.max_lane(most);
            let (inverse, step) = if most < LEAST { (0.0, 0.0) } else { (127.0 / most, most / 127.0) };
            scale[i] = step;
            write_codes(s, row, inverse, 128, &mut codes[i * stride..(i + 1) * stride]);
        }
        OperandMut::U8Uniform { codes, images } => {
            let Coding { scale, zero } = images[image];
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            write_codes(s, row, inverse, zero, &mut codes[i * stride..(i + 1) * stride]);
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
fn write_codes<S: Simd>(s: S, row: &[f32], inverse: f32, zero: i32, codes: &mut [u8]) {
    let (codes, slack) = codes.split_at_mut(row.len());
    let (inverse, shift) = (s.splat(inverse), s.splat((zero - 128) as f32));
    let mut src = row.chunks_exact(S::LANES);
    let mut dst = codes.chunks_exact_mut(S::LANES);
    for (x, y) in (&mut src).zip(&mut dst) {
        s.store_codes(s.fma(s.load(x), inverse, shift), y);
    }
    if !src.remainder().is_empty() {
        let x = s.fma(s.load_partial(src.remainder()), inverse, shift);
        s.store_codes_partial(x, dst.into_remainder());
    }
    slack.fill(128);
}
